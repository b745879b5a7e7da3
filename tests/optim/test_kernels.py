"""The kernels themselves, compiled for the host: runs and single elements, blocks of many threads, memory, rounding."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpukern.optim as optim
from gpukern.optim._fused import codegen, device_tables, host, tensor_group
from gpukern.runtime.mode import Mode, force_mode
from tests.optim.cases import FULL, Case, give_gradients, parameters

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the kernels as the host has them")


def stepped(
    case: Case, offset: int = 0, misaligned_gradient: int = 0, dtype: torch.dtype = torch.float32, **more
) -> torch.Tensor:
    """A parameter of the same values that begins ``offset`` elements into its memory, after three updates."""
    generator = torch.Generator().manual_seed(0)
    size = 5003
    memory = torch.zeros(size + offset, dtype=dtype)
    memory[offset:] = torch.randn(size, generator=generator)
    owner = torch.nn.Parameter(memory[offset:])
    optimizer = case.ours([owner], **case.options, **more)
    for _ in range(3):
        gradient = torch.zeros(size + misaligned_gradient, dtype=dtype)
        gradient[misaligned_gradient:] = torch.randn(size, generator=generator)
        owner.grad = gradient[misaligned_gradient:]
        optimizer.step()
    assert not memory[:offset].any()
    return owner.detach()


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "state_dtype": torch.float32},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"dtype": torch.bfloat16, "stochastic_rounding": True},
    ],
    ids=lambda more: " ".join(f"{name}={value}" for name, value in more.items()),
)
def test_where_tensors_begin_changes_nothing(case, more):
    expected = stepped(case, **more)
    # The norms that LARS and LAMB scale by are added up in another order, and then the next of 16 bits may be nearer.
    tolerance = 0.0
    if case.name in ("LARS", "LAMB"):
        tolerance = 1e-6 if not more else 2 * torch.finfo(more["dtype"]).eps
    for offset, misaligned in ((0, 1), (1, 1), (1, 2), (3, 0), (2, 2), (5, 1)):
        found = stepped(case, offset, misaligned, **more)
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), (offset, misaligned)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 2047, 2048, 2049, 4100])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_element_is_updated_once(size, offset):
    owner = torch.nn.Parameter(torch.zeros(size + offset)[offset:])
    owner.grad = torch.ones(size + offset)[offset:]
    optim.SGD([owner], lr=1.0).step()
    assert torch.equal(owner.detach(), torch.full((size,), -1.0))


def changed(monkeypatch, *changes: tuple[str, str]) -> None:
    """Compile the kernels with these changes of their text."""
    text = codegen.source

    def other(variant, platform):
        found = text(variant, platform)
        for old, new in changes:
            assert found.count(old) == 1, old
            found = found.replace(old, new)
        return found

    monkeypatch.setattr(host, "source", other)
    monkeypatch.setattr(host, "_library", host._library.__wrapped__)


@pytest.mark.parametrize(("offset", "gradient_offset"), [(0, 0), (1, 1), (3, 3), (0, 1), (2, 3)])
def test_most_elements_go_in_runs(offset, gradient_offset, monkeypatch):
    """Wherever tensors begin: a program whose single elements do nothing leaves at most those before the first and
    after the last run of each of three chunks."""
    changed(monkeypatch, ("i < singles;", "i < 0;"))
    owner = torch.nn.Parameter(torch.zeros(5003 + offset)[offset:])
    owner.grad = torch.ones(5003 + gradient_offset)[gradient_offset:]
    optim.SGD([owner], lr=1.0).step()
    assert (owner == 0).sum() <= 3 * 6


PLAIN, WITH_STATE = Case("SGD", {"lr": 1.0}), Case("SGD", {"lr": 1.0, "momentum": 0.9})


@pytest.mark.parametrize(
    ("case", "offset", "gradient_offset", "wide", "narrow"),
    # For a run of four elements: each of the tensors is read, all but the gradient are written.
    [(WITH_STATE, 0, 0, 5, 0), (WITH_STATE, 0, 1, 4, 4), (WITH_STATE, 1, 0, 3, 8), (PLAIN, 3, 3, 3, 0)],
    ids=str,
)
def test_a_tensor_that_begins_elsewhere_is_no_burden_to_the_others(
    case, offset, gradient_offset, wide, narrow, monkeypatch
):
    names = ("wide", "narrow", "agreeing")
    counters = "".join(f'extern "C" {{ long {name}_count = 0; }}\n' for name in names)
    starts = {"load16(unsigned int *to": "wide", "store16(unsigned long long to": "wide"}
    starts |= {"load4(unsigned long long from": "narrow", "store4(unsigned long long to": "narrow"}
    changes = [("#include <vector>\n", "#include <vector>\n" + counters)]
    for start, which in starts.items():
        line = next(line for line in (codegen._HERE / "host.h").read_text().splitlines() if start in line)
        changes.append((line, line.replace("{", f"{{ ++{which}_count;", 1)))
    agreed = "walk_runs<true>(work, body);"
    changed(monkeypatch, *changes, (agreed, f"++agreeing_count, {agreed}"))
    owner = torch.nn.Parameter(torch.zeros(4096 + offset)[offset:])
    owner.grad = torch.ones(4096 + gradient_offset)[gradient_offset:]
    optimizer = case.ours([owner], **case.options)
    optimizer.step()
    library = optimizer._step._parts[0]._program._library
    counters = {name: ctypes.c_long.in_dll(library, f"{name}_count") for name in names}
    before = {name: counter.value for name, counter in counters.items()}
    optimizer.step()
    counts = {name: counter.value - before[name] for name, counter in counters.items()}
    # Two chunks; where the first run begins later there is one less in each, and four elements by themselves.
    runs = 1024 - 2 * (offset == gradient_offset == 3)
    singles = 3 * 4 * (1024 - runs)
    assert counts == {"wide": wide * runs, "narrow": narrow * runs + singles, "agreeing": 2 * (narrow == 0)}


@pytest.mark.parametrize("case", FULL, ids=str)
def test_many_threads_do_what_one_does(case, monkeypatch):
    one = stepped(case, max_grad_norm=0.5)
    monkeypatch.setattr(host.HostProgram.__init__, "__defaults__", (8,))
    many = stepped(case, max_grad_norm=0.5)
    # The norms are fp64 sums in another order.
    assert torch.allclose(many, one, rtol=1e-6)


def huge(size: int) -> torch.Tensor:
    """bfloat16 zeros that take memory only where they are written."""
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def test_elements_beyond_what_32_bits_count(monkeypatch):
    """Three chunks of 2³¹ + 77 elements are updated: 4 GB would take their time."""
    size = 2**31 + 77
    owner = torch.nn.Parameter(huge(size))
    owner.grad = huge(size)
    for place in (3, 2**30 + 3, size - 3):
        owner.grad[place] = 1.0
    optimizer = optim.SGD([owner], lr=0.5, momentum=0.9)
    optimizer.state[owner]["momentum_buffer"] = huge(size)
    all_tables = device_tables.tables

    def some_tables(*given):
        tensors, chunks = all_tables(*given)
        assert len(chunks) == 2**15 + 1
        return tensors, chunks[[0, 2**14, -1]]

    monkeypatch.setattr(tensor_group, "tables", some_tables)
    optimizer.step()
    for place in (3, 2**30 + 3, size - 3):
        assert owner[place] == -0.5 and optimizer.state[owner]["momentum_buffer"][place] == 1.0
    assert owner[4] == owner[2**30 + 4] == owner[size - 1] == 0.0


def test_the_last_block_leaves_the_counter_at_zero():
    owners = parameters()
    optimizer = optim.LAMB(owners, max_grad_norm=1.0)
    for number in range(2):
        give_gradients(owners, number)
        optimizer.step()
        assert optimizer._step._parts[0]._held["arrived"] == 0
    assert all(optimizer.state[owner]["step"] == 2 for owner in owners)


# ---- memory ---------------------------------------------------------------------------------------------------------

UPDATE_ALL = """
import torch
from tests.optim.cases import FULL, parameters, give_gradients
for case in FULL[{first}:{last}]:
    for dtype, more in ((torch.float32, {{}}), (torch.bfloat16, dict(master_weights=True, max_grad_norm=1.0))):
        owners = parameters(dtype)
        optimizer = case.ours(owners, **case.options, **more)
        for number in range(2):
            give_gradients(owners, number)
            optimizer.step()
"""


def sanitizers() -> list[str]:
    """Their libraries, by full paths where there are some."""
    return [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]


def sanitized(tmp_path, first: int = 0, last: int = 99) -> subprocess.CompletedProcess:
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
    environment = {
        **os.environ,
        **{"GPUKERN_EMULATE": "1", "GPUKERN_HOST_CXXFLAGS": flags, "LD_PRELOAD": ":".join(sanitizers())},
        # Python's own memory is not the question.
        **{"ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT), "CXX": "g++"},
    }
    script = UPDATE_ALL.format(first=first, last=last)
    return subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)


has_sanitizers = shutil.which("g++") is not None and all(map(os.path.isabs, sanitizers()))
needs_sanitizers = pytest.mark.skipif(not has_sanitizers, reason="g++ has no address sanitizer here")


@needs_sanitizers
def test_no_access_is_out_of_bounds_and_nothing_is_undefined(tmp_path):
    done = sanitized(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_sanitizers
def test_the_sanitizer_sees_an_element_too_many(tmp_path, monkeypatch):
    package = tmp_path / "gpukern"
    shutil.copytree(ROOT / "gpukern", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "optim", tmp_path / "tests" / "optim")
    for name in ("__init__.py", "device.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    text = package / "optim" / "_fused" / "multi_tensor.cuh"
    right = "const int singles = work.count - work.runs * RUN;"
    assert right in text.read_text()
    text.write_text(text.read_text().replace(right, right.replace(";", " + 1;")))
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    done = sanitized(tmp_path, 0, 1)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


# ---- numbers of 16 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_written_as_torch_does(dtype):
    """All 65,536 of them, as gradients of a float32 parameter, and rounded from values between them."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    owner = torch.nn.Parameter(every.clone())
    owner.grad = torch.zeros_like(owner)
    optim.SGD([owner], lr=1.0).step()
    nan = every.isnan()
    assert torch.equal(owner.detach()[~nan].view(torch.int16), every[~nan].view(torch.int16))
    assert owner.detach()[nan].isnan().all()

    between = torch.cat([every.float() * factor for factor in (1.0, 1 + 2.0**-9, 1 - 2.0**-10, 1 + 2.0**-12)])
    # And what is as near to one as to the next, which goes to the even one.
    finite = every.float()[:-1].isfinite() & every.float()[1:].isfinite()
    between = torch.cat([between, ((every.double()[:-1] + every.double()[1:]) / 2).float()[finite]])
    between = between[~between.isnan()]
    state = torch.nn.Parameter(torch.zeros(between.numel()))
    state.grad = between
    optimizer = optim.SGD([state], lr=0.0, momentum=0.9, state_dtype=dtype)
    optimizer.step()
    assert torch.equal(optimizer.state[state]["momentum_buffer"], between.to(dtype))


def test_stochastic_rounding_is_right_on_average_and_the_same_in_every_run(where):
    def run(seed: int) -> torch.Tensor:
        owner = torch.nn.Parameter(torch.ones(40_000, dtype=torch.bfloat16, device=where))
        owner.grad = torch.full_like(owner, 2.0**-10)
        optimizer = optim.SGD([owner], lr=1.0, stochastic_rounding=True, seed=seed)
        for _ in range(8):
            optimizer.step()
        return owner.detach().float()

    moved = 1 - run(0)
    # An update of a quarter of the distance to the next number below 1: rounded to the nearest, it would be lost.
    expected = 8 * 2.0**-10
    deviation = 2.0**-8 * (8 * 0.25 * 0.75 / 40_000) ** 0.5
    assert abs(moved.mean() - expected) < 5 * deviation
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    plain = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=where))
    plain.grad = torch.full_like(plain, 2.0**-10)
    optim.SGD([plain], lr=1.0).step()
    assert torch.equal(plain.detach(), torch.ones_like(plain))


def test_random_bits_of_kernels_and_reference_are_the_same(device):
    found = []
    for mode in (None, Mode.REFERENCE):
        owners = parameters(torch.bfloat16, device)
        for owner in owners:
            owner.grad = torch.empty_like(owner).copy_(owner.detach() * 0.01)
        optimizer = optim.SGD(owners, lr=0.25, stochastic_rounding=True, seed=7)
        if mode is None:
            optimizer.step()
        else:
            with force_mode(mode):
                optimizer.step()
        found.append([owner.detach() for owner in owners])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_stochastic_rounding_never_makes_infinity_or_loses_nan(device):
    largest = torch.finfo(torch.bfloat16).max
    owner = torch.nn.Parameter(torch.tensor([largest, -largest, torch.inf, torch.nan], dtype=torch.bfloat16).repeat(99))
    owner.grad = torch.zeros_like(owner)
    before = owner.detach().clone()
    optimizer = optim.SGD([owner], lr=1.0, stochastic_rounding=True)
    for _ in range(4):
        optimizer.step()
    assert torch.equal(owner.detach().nan_to_num(1.0), before.nan_to_num(1.0))
