"""Machine code of every rule, for GPUs that nobody needs to have: wide loads and stores, registers, no spills."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gpukern.optim._fused import codegen, rules
from gpukern.optim._fused.codegen import Variant
from gpukern.optim._fused.device_tables import GRADIENTS, arguments_type
from gpukern.optim._fused.nvrtc import OPTIONS
from gpukern.optim._fused.rules import Rule
from gpukern.runtime.device import A100, B200, H100, DeviceSpec
from tests.optim import nvrtc

pytestmark = pytest.mark.skipif(nvrtc.library() is None, reason="NVRTC is not installed")

RULES = (rules.SGD, rules.ADAGRAD, rules.RMSPROP, rules.ADAM, rules.LION, rules.LARS, rules.LAMB)
DEVICES = {"sm_80": A100, "sm_90": H100, "sm_100": B200}
#: What CuPy adds to those of its own kernels.
CUPY = ("-ftz=true",)
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Dtypes of parameter, gradient and state, and whether there are master weights.
DTYPES = {
    "fp32": ("float32", "float32", "float32", False),
    "bf16, state fp32": ("bfloat16", "bfloat16", "float32", False),
    "bf16": ("bfloat16", "bfloat16", "bfloat16", False),
    "fp16": ("float16", "float16", "float16", False),
    "bf16, master": ("bfloat16", "bfloat16", "float32", True),
    (MIXED := "fp16, gradient fp32, state bf16"): ("float16", "float32", "bfloat16", False),
}
#: Of a multiprocessor. A thread gets them by eights.
REGISTERS = 65536
#: Bytes that the loads of a multiprocessor must ask for at once: 3.35 TB/s · 0.7 µs / 132 of an H100 are 18 KB.
ON_THEIR_WAY = 32 * 1024
#: The shortest way's instructions by those that a device can issue in the time that memory takes. LAMB's norms divide
#: for every element and store none: of 16 bits, an A100 and a B200 wait for that.
ISSUED = {"update_kernel": 0.85, "square_sum_kernel": 0.5, "norms_kernel": 1.15}


def variant(rule: Rule, dtypes: str, **more) -> Variant:
    """With every state that the rule has."""
    parameter, gradient, state, master = DTYPES[dtypes]
    names = tuple(state.name for state in rule.states)
    return Variant(rule, parameter, gradient, state, names, 128, master, **more)


def compiled(given: Variant, architecture: str) -> dict[str, nvrtc.Kernel]:
    return nvrtc.kernels(codegen.source(given), architecture, OPTIONS)


def blocks(kernel: nvrtc.Kernel) -> int:
    """How many of them a multiprocessor has registers for."""
    return REGISTERS // (-(-kernel.registers // 8) * 8 * codegen.THREADS)


def wide(given: Variant, *names: str) -> int:
    """Accesses of 16 bytes to the tensors ``names`` for a run of elements, which fills 16 bytes of the narrowest."""
    sizes = {"parameter": SIZES[given.parameter], "gradient": SIZES[given.gradient], "master": 4}
    sizes |= dict.fromkeys(given.states, SIZES[given.state])
    return sum(given.run * sizes[name] // 16 for name in names)


@dataclass(frozen=True)
class Expected:
    """Accesses of 16 bytes for ``together`` runs, and the bytes that those are."""

    loads: int
    stores: int
    size: int


def expected(given: Variant, read: Sequence[str], written: Sequence[str] = (), together: int = 1) -> Expected:
    loads, stores = together * wide(given, *read), together * wide(given, *written)
    return Expected(loads, stores, 16 * (loads + stores))


def faults(given: Variant, kernels: dict[str, nvrtc.Kernel], architecture: str = "sm_90") -> list[str]:
    """What is wrong with the code, in words."""
    held = "master" if given.master else "parameter"
    # The norms of LARS are of the parameter and its gradient alone.
    measured = given.states if given.rule is rules.LAMB else ()
    wanted = {
        "update_kernel": expected(
            given, (held, "gradient", *given.states), ("parameter", *(["master"] * given.master), *given.states)
        ),
        "square_sum_kernel": expected(given, ("gradient",), together=4),
        "norms_kernel": expected(given, (held, "gradient", *measured), together=1 if measured else 2),
    }
    found = [] if set(kernels) == set(codegen.kernels(given.rule)) else [f"kernels {sorted(kernels)}"]
    for name, kernel in kernels.items():
        found += [f"{name}: {what}" for what in _faults(kernel, wanted[name], ISSUED[name], DEVICES[architecture])]
    return found


def _faults(kernel: nvrtc.Kernel, wanted: Expected, most: float, device: DeviceSpec) -> list[str]:
    # Once where all tensors begin alike, once where each is asked.
    loads, stores = 2 * wanted.loads, 2 * wanted.stores
    waited_for = blocks(kernel) * codegen.THREADS * 16 * wanted.loads
    issued = kernel.run * device.peaks.bandwidth / wanted.size / (device.peaks.matrix_rates["fma"] / 2)
    checks = {
        f"{kernel.stack} bytes of stack": kernel.stack == 0,
        "local memory": kernel.count("LDL") + kernel.count("STL") == 0,
        f"{kernel.count('LDG', '128')} loads of 16 bytes, not {loads}": kernel.count("LDG", "128") == loads,
        f"{kernel.count('STG', '128')} stores of 16 bytes, not {stores}": kernel.count("STG", "128") == stores,
        "generic addresses": kernel.count("LD", "128") + kernel.count("ST", "128") == 0,
        f"{kernel.registers} registers: {waited_for} bytes on their way": waited_for >= ON_THEIR_WAY,
        f"{kernel.run} instructions for {wanted.size} bytes: {issued:.0%} of the memory's time": issued <= most,
    }
    return [what for what, right in checks.items() if not right]


@pytest.mark.parametrize(
    ("dtypes", "architecture"),
    # Of three different dtypes for one architecture only, and for the third architecture two: each takes its time.
    [
        *itertools.product([name for name in DTYPES if name != MIXED], ("sm_80", "sm_90")),
        *itertools.product(("fp32", "bf16, master"), ("sm_100",)),
        (MIXED, "sm_90"),
    ],
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_machine_code(rule, dtypes, architecture):
    given = variant(rule, dtypes)
    assert not faults(given, compiled(given, architecture), architecture)


@pytest.mark.parametrize("architecture", DEVICES)
def test_most_pointers_and_random_rounding(architecture):
    """As many gradients as travel by value: more than an argument could be in CUDA 12.0 and before."""
    parameter, gradient, state, _ = DTYPES["bf16"]
    given = Variant(rules.ADAM, parameter, gradient, state, ("exp_avg", "exp_avg_sq"), GRADIENTS[-1], stochastic=True)
    assert not faults(given, compiled(given, architecture), architecture)
    assert arguments_type(GRADIENTS[-1]).itemsize <= 32764


@pytest.mark.parametrize("dtypes", ["bf16", "fp16"])
def test_gpus_that_round_one_number_at_a_time(dtypes):
    for kernel in compiled(variant(rules.ADAM, dtypes), "sm_75").values():
        assert kernel.stack == 0 and kernel.count("LDG", "128") and not kernel.count("LDL")


def test_one_element_at_a_time_is_seen():
    given = variant(rules.ADAM, "fp32")
    text = codegen.source(given)
    assert "constexpr int RUN = 4;" in text
    narrow = nvrtc.kernels(text.replace("constexpr int RUN = 4;", "constexpr int RUN = 1;"), "sm_90", OPTIONS)
    found = faults(given, narrow)
    assert any("0 loads of 16 bytes, not 10" in each for each in found), found
    assert any("0 stores of 16 bytes, not 8" in each for each in found), found


def test_spills_are_seen():
    given = variant(rules.ADAM, "bf16")
    tight = codegen.source(given).replace("RESIDENT = 3", "RESIDENT = 8")
    found = faults(given, nvrtc.kernels(tight, "sm_90", OPTIONS))
    assert any("bytes of stack" in each for each in found) and any("local memory" in each for each in found), found


def test_too_few_loads_at_once_are_seen():
    given = variant(rules.SGD, "fp32")
    text = codegen.source(given)
    assert "TOGETHER = 4" in text
    found = faults(given, nvrtc.kernels(text.replace("TOGETHER = 4", "TOGETHER = 1"), "sm_90", OPTIONS))
    assert "square_sum_kernel: 2 loads of 16 bytes, not 8" in found
    for registers, seen in ((128, False), (200, True)):
        greedy = nvrtc.Kernel(registers, stack=0, shared_memory=0)
        found = faults(given, {"square_sum_kernel": greedy})
        assert any("bytes on their way" in each for each in found) is seen, found


def test_too_many_instructions_are_seen():
    given = variant(rules.ADAGRAD, "bf16")
    slow = codegen.source(given).replace("sqrtf(sum)", "sqrtf(sqrtf(sum))")
    found = faults(given, nvrtc.kernels(slow, "sm_100", OPTIONS), "sm_100")
    assert any("update_kernel" in each and "of the memory's time" in each for each in found), found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_nothing_is_flushed_to_zero(rule):
    text = codegen.source(variant(rule, "fp32"))
    assert ".ftz.f32" not in nvrtc.ptx(text, "sm_90", OPTIONS)
    assert ".ftz.f32" in nvrtc.ptx(text, "sm_90", (*OPTIONS, *CUPY))


def test_what_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match='identifier "unknown" is undefined'):
        nvrtc.compile_text('extern "C" __global__ void kernel() { unknown(); }', "sm_90", OPTIONS)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.norms], ids=lambda rule: rule.name)
def test_the_elementwise_kernel_compiles_as_cupy_writes_it(rule):
    cupy = pytest.importorskip("cupy")
    from cupy._core import _carray, _kernel

    given, changed, operation = codegen.elementwise(rule)
    kernel = cupy.ElementwiseKernel(given, changed, operation, name="elementwise")
    # What CuPy knows of arguments when they are there: arrays (1), sizes (2) and numbers (3).
    kinds = {
        "float": (1, cupy.ndarray, np.dtype("f4"), 1, True, True),
        "double": (3, np.float64, np.dtype("f8"), 0, True, True),
    }
    sizes = (2, _carray.Indexer, None, 1, True, True)
    arguments = [_kernel._ArgInfo(*(sizes if p.name == "_ind" else kinds[p.ctype])) for p in kernel.params]
    text = _kernel._get_elementwise_kernel_code(
        tuple(arguments), _kernel._TypeMap(()), kernel.params, kernel.operation, kernel.name, kernel.preamble
    )
    headers = Path(cupy.__file__).parent / "_core" / "include"
    folders = ["", *(f"cupy/_cccl/{part}" for part in ("libcudacxx", "thrust", "cub"))]
    text = "#include <cupy/complex.cuh>\n#include <cupy/carray.cuh>\n" + text
    assert nvrtc.compile_text(text, "sm_90", (*OPTIONS, *CUPY, *(f"-I{headers / folder}" for folder in folders)))
