"""Kernels that are switched off: by a line of data, or because the driver refused their descriptors."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern import conv
from gpukern.conv import database, exclusions, launch, planner
from gpukern.conv.exclusions import Exclusion
from gpukern.conv.families.registry import family_of
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import conv_problem
from gpukern.explain import ranking as answers
from gpukern.explain import show
from gpukern.explain.query import convolution
from gpukern.ops.conv_max_pool2d import conv2d_max_pool2d
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, B200, EMULATED, H100, H200
from gpukern.runtime.refusal import DescriptorRefused
from tests.device import DEVICE
from tests.numerics import assert_within, sum_bound

FORWARD = Direction.FORWARD
HALF = Operands("float16")
LAYER = conv_problem((32, 128, 28, 28), (128, 128, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
SMALL = conv_problem((1, 512, 7, 7), (512, 512, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
EIGHT = Exclusion((9, 0), "3 of 198 launches were wrong", Variant.BOX, num_warps=8)
WHOLE = Exclusion((9, 0), "it hangs", Variant.BOX)


def forget() -> None:
    planner.heuristic_plan.cache_clear()
    conv.forget()


@pytest.fixture
def switch_off(monkeypatch):
    """``switch_off(line, ...)`` makes these the data. Nothing of it stays."""
    monkeypatch.setattr(exclusions, "_found", [])

    def change(*lines: Exclusion) -> None:
        monkeypatch.setattr(exclusions, "EXCLUSIONS", lines)
        forget()

    change()
    yield change
    forget()


def candidates(device=H100, p=LAYER) -> set[ConvPlan]:
    return set(planner.candidates(p, FORWARD, HALF, device))


# ---- by a line of data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        EIGHT,
        WHOLE,
        Exclusion((9, 0), "", num_warps=8),
        Exclusion((9, 0), "", Variant.TAPS, 4),
        Exclusion((9, 0), "", None),
    ],
    ids=str,
)
def test_what_a_line_names_is_no_candidate_and_all_else_is(switch_off, line):
    everything = {device: candidates(device) for device in (A100, H100, H200, B200)}
    switch_off(line)
    for device, before in everything.items():
        there = device.compute_capability == (9, 0)
        gone = {
            each
            for each in before
            if there and line.variant in (None, each.variant) and line.num_warps in (None, each.num_warps)
        }
        assert bool(gone) is there, "the layer does not show it"
        assert candidates(device) == before - gone


def test_the_next_best_plan_takes_its_place(switch_off):
    before = [r.plan for r in planner.ranking(LAYER, FORWARD, HALF, H100) if not planner.only_measured(r.plan)]
    assert planner.heuristic_plan(LAYER, FORWARD, HALF, H100) == before[0] and before[0].variant is Variant.BOX
    switch_off(WHOLE)
    expected = next(each for each in before if each.variant is not Variant.BOX)
    assert planner.heuristic_plan(LAYER, FORWARD, HALF, H100) == expected


def test_the_plan_database_does_not_bring_it_back(switch_off, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUKERN_PLANS", str(tmp_path))
    measured = next(each for each in candidates(H200) if each.variant is Variant.BOX and each.num_warps == 8)
    entry = database.Entry(measured, 1.0, measured, 1.0, LAYER.N, (), {}, "2026-01-31")
    path = tmp_path / database.file_name(H200.name)
    database.store(path, H200.name, database.key(LAYER, FORWARD, HALF), entry)
    assert database.lookup(LAYER, FORWARD, HALF, H200) == measured
    switch_off(EIGHT)
    assert database.lookup(LAYER, FORWARD, HALF, H200) is None
    database.clear()


def test_where_nothing_is_left_the_error_says_why(switch_off):
    switch_off(Exclusion((9, 0), "all of it is wrong"))
    with pytest.raises(RuntimeError, match=r"no kernel left for forward of .* on H100: plans: all of it is wrong$"):
        planner.heuristic_plan(LAYER, FORWARD, HALF, H100)


def test_explain_says_so(switch_off):
    question, elsewhere = (convolution(LAYER, FORWARD, "float16", True, device) for device in (H100, B200))
    assert not any("switched off" in each for each in answers.reasons(answers.answer(question)))
    count = sum(each.variant is Variant.BOX and each.num_warps == 8 for each in candidates())
    switch_off(EIGHT)
    found = answers.answer(question)
    said = f"Box plans of 8 warps are switched off on sm_90, {count} here: 3 of 198 launches were wrong."
    assert answers.reasons(found)[-1] == said == show.as_json(found, "")["reasons"][-1]
    assert not any(EIGHT.applies(each.plan, H100) for each in found.ranking)
    assert not any("switched off" in each for each in answers.reasons(answers.answer(elsewhere)))


# ---- by the driver -------------------------------------------------------------------------------------------------

#: What Triton says, 3.6 and 3.7 alike.
REFUSED = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument\nelemType=6 rank=5"
needs_descriptors = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="a GPU without a copy engine"
)


class Refusing:
    """In place of ``kernel``, with its signature: every launch ends in ``words``."""

    def __init__(self, kernel: Any, words: str) -> None:
        self.arg_names, self.words, self.launches = kernel.arg_names, words, 0

    def run(self, *arguments, **options):
        self.launches += 1
        raise RuntimeError(self.words)


@pytest.fixture
def driver(switch_off, monkeypatch):
    """``driver(words)`` refuses the stem's windows with these words, of a GPU as small as the emulated one."""
    from gpukern.conv.families.tma_stem import kernels

    def refuse(words: str, module=kernels, name: str = "conv2d_stem_kernel") -> Refusing:
        kernel = Refusing(getattr(module, name), words)
        monkeypatch.setattr(module, name, kernel)
        return kernel

    with pretend(EMULATED):
        yield refuse


def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input and weight of a first layer, that the stem's kernel would get, and a bias."""
    x, w = torch.randn(1, 3, 32, 32), torch.randn(64, 3, 7, 7) * 0.1
    x, w = (t.to(DEVICE, torch.float16, memory_format=torch.channels_last) for t in (x, w))
    return x, w, torch.randn(64).to(x)


def check(name: str, found: torch.Tensor, make, *operands: torch.Tensor, terms: int) -> None:
    value = make(*(t.double().cpu() for t in operands))
    absolute = make(*(t.double().cpu().abs() for t in operands))
    assert_within(name, found, value, sum_bound(value, absolute, terms, found.dtype, tf32=False))


def double_convolution(x, w, b):
    return torch_F.conv2d(x, w, b, stride=2, padding=3)


@needs_descriptors
def test_a_refused_kernel_is_planned_around_once(driver):
    kernel, (x, w, b) = driver(REFUSED), layer()
    with pytest.warns(UserWarning, match=r"plans without its stem kernel on emulated.*invalid argument\)$"):
        y = F.conv2d(x, w, b, stride=2, padding=3)
    check("refused", y, double_convolution, x, w, b, terms=148)
    assert kernel.launches == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = F.conv2d(x, w, b, stride=2, padding=3)
        F.conv2d(x[:, :, :24], w, b, stride=2, padding=3)
    assert torch.equal(again, y) and kernel.launches == 1, "the driver is not asked again"
    operands = Operands("float16", "ieee", Layout.CHANNELS, Layout.CHANNELS)
    p = conv_problem(x.shape, w.shape, None, (2, 2), (3,) * 4, (1, 1), 1)
    ((found, _),) = planner.switched_off(p, FORWARD, operands, EMULATED).items()
    assert found.variant is Variant.STEM and "the driver refused its descriptors (Triton Error" in found.reason


@needs_descriptors
def test_statistics_and_pools_are_planned_around_too(driver):
    kernel, (x, w, b) = driver(REFUSED), layer()
    with pytest.warns(UserWarning, match="stem"):
        y = F.conv2d_batch_norm(x, w, b, None, None, stride=2, padding=3, training=True)
    expected = torch_F.batch_norm(double_convolution(*(t.double().cpu() for t in (x, w, b))), None, None, training=True)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    assert kernel.launches == 1
    exclusions._found.clear()
    forget()
    with pytest.warns(UserWarning, match="stem"):
        y = conv2d_max_pool2d(x, w, b, (2, 2), (3, 3, 3, 3), (1, 1), 1, "none", 0.0)
    assert kernel.launches == 2

    def pooled(*operands):
        return torch_F.max_pool2d(double_convolution(*operands), 2)

    check("pooled", y, pooled, x, w, b, terms=148)


@needs_descriptors
def test_a_linear_layer_is_planned_around(driver):
    from gpukern.conv.families.tma_gemm import kernels

    gemm = driver(REFUSED, kernels, "conv2d_gemm_kernel")
    x, w, b = (torch.randn(size).to(DEVICE, torch.float16) for size in ((128, 256), (64, 256), (64,)))
    with pytest.warns(UserWarning, match="gemm"):
        y = F.linear(x, w, b)
    check("linear", y, torch_F.linear, x, w, b, terms=257)
    assert gemm.launches == 1


@needs_descriptors
def test_who_chose_the_plan_is_told(driver):
    kernel, (x, w, _) = driver(REFUSED), layer()
    p = conv_problem(x.shape, w.shape, None, (2, 2), (3,) * 4, (1, 1), 1)
    operands = Operands("float16", "ieee", Layout.CHANNELS, Layout.CHANNELS)
    choice = planner.heuristic_plan(p, FORWARD, operands, EMULATED)
    assert choice.variant is Variant.STEM
    with pytest.raises(DescriptorRefused, match="invalid argument"):
        launch.run(launch.prepared_for(p, FORWARD, x, w, True, plan=choice), x, w)
    assert kernel.launches == 1 and not exclusions._found


@needs_descriptors
@pytest.mark.parametrize(
    "words", ["Triton Error [CUDA]: an illegal memory access was encountered", "Triton Error [CUDA]: invalid argument"]
)
def test_other_errors_are_not_taken_for_a_refusal(driver, words):
    kernel, (x, w, b) = driver(words), layer()
    with pytest.raises(RuntimeError, match=words.replace("[", r"\[")) as raised:
        F.conv2d(x, w, b, stride=2, padding=3)
    assert not isinstance(raised.value, DescriptorRefused) and kernel.launches == 1 and not exclusions._found


def test_every_kernel_by_descriptors_has_another_beside_it():
    """Without descriptors there is still a plan, whatever the direction: the gather's."""
    for p, direction in itertools.product((LAYER, SMALL), Direction):
        found = planner.ranking(p, direction, HALF, H100)
        assert any(not family_of(r.plan).uses_descriptors and not planner.only_measured(r.plan) for r in found)
