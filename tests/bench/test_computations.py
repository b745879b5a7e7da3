"""Every implementation of every suite computes what its suite says, by gpukern's kernels and by its reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.accuracy import relative_error
from bench.networks import weights
from bench.peers import torch_at_its_best
from bench.results import Case
from bench.suite import Selection, Suite, Task, suites, tasks
from bench.suites.linear import Linear
from bench.suites.norm import Size
from bench.suites.pool import Kind, Pool
from gpukern.conv.problem import conv_problem
from gpukern.ops._pool2d.problem import adaptive_problem, pool_problem
from gpukern.runtime.mode import Mode, force_mode, mode_of
from models.zoo import NETWORKS, Network

SMALL_CONVOLUTIONS = {
    "oblong, strided, padded": conv_problem((2, 5, 7, 9), (6, 5, 3, 2), None, (2, 1), (1, 1, 2, 2), (1, 1), 1),
    "dilated": conv_problem((1, 16, 9, 8), (18, 16, 3, 3), None, (1, 1), (2, 2, 1, 1), (2, 1), 1),
    "strided and dilated": conv_problem((1, 4, 9, 9), (4, 4, 3, 3), None, (2, 2), (2, 2, 2, 2), (3, 3), 1),
    "groups": conv_problem((2, 16, 6, 5), (24, 8, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "depthwise": conv_problem((2, 12, 6, 7), (12, 1, 3, 3), None, (2, 2), (1, 1, 1, 1), (1, 1), 12),
    "1×1": conv_problem((2, 20, 4, 4), (8, 20, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1),
}
SMALL_POOLS = {
    "maximum": Pool(Kind.MAX, pool_problem((2, 5, 7, 9), (3, 3), (2, 2), (1, 1), (1, 1), False)),
    "maximum, dilated, rounded up": Pool(Kind.MAX, pool_problem((1, 4, 10, 9), (2, 3), (2, 1), (1, 0), (2, 1), True)),
    "average": Pool(Kind.AVERAGE, pool_problem((2, 4, 7, 9), (3, 2), (1, 2), (1, 0), (1, 1), True, False)),
    "average, divisor": Pool(Kind.AVERAGE, pool_problem((1, 4, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), False, True, 7)),
    "to one": Pool(Kind.ADAPTIVE, adaptive_problem((2, 6, 7, 5), (1, 1))),
    "to 3×4": Pool(Kind.ADAPTIVE, adaptive_problem((2, 6, 7, 5), (3, 4))),
}
SMALL = {
    "conv": SMALL_CONVOLUTIONS,
    "epilogue": {name: SMALL_CONVOLUTIONS[name] for name in ("oblong, strided, padded", "groups", "1×1")},
    "pool": SMALL_POOLS,
    "norm": {"odd": Size(2, 5, 7, 3), "groups of two": Size(3, 64, 4, 5)},
    "linear": {"odd": Linear(5, 33, 7), "one row": Linear(1, 16, 16)},
}


def small_tasks(name: str, **chosen: str) -> list[Task]:
    """Every computation of the small problems, and of LeNet's at a batch of one where no interpreter runs them."""
    suite = suites()[name]
    dtype, layout = chosen.get("dtype", "float32"), chosen.get("layout", suite.layouts[0])
    made = [
        Task(Case(name, computation, *suite.describe(problem), 2, dtype, layout, ()), problem)
        for problem in SMALL[name].values()
        for computation in suite.computations
        if suite.applies(problem, computation)
    ]
    if mode_of(torch.empty(0)) is Mode.EMULATED:
        return made
    return made + tasks(suite, Selection(("lenet",), (1,), (dtype,), (layout,), suite.computations))


def check(suite: Suite, task: Task, device: torch.device) -> int:
    """Errors of all implementations that are here, against the bound; how many there were."""
    with torch_at_its_best(task.case.dtype):
        tensors = suite.tensors(task, device)
        reference = suite.reference(task, tensors)
        assert reference.dtype == torch.float64
        found = [each for each in suite.implementations(task, ("library",), device) if not each.missing]
        for each in found:
            for function in filter(None, (each.function, each.from_python)):
                output = suite.result(function(*each.prepare(tensors)))
                error = relative_error(output, reference)
                assert error <= suite.bound(task), (each.name, task.case.key, error, suite.bound(task))
                assert suite.name == "model" or output.dtype == tensors[0].dtype, (each.name, task.case.key)
    return len(found)


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("name", SMALL)
def test_all_are_right_in_float32(name, layout, where):
    suite = suites()[name]
    if layout not in suite.layouts:
        layout = ""
    for task in small_tasks(name, layout=layout):
        assert check(suite, task, where) >= (3 if layout else 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_all_are_right_in_16_bit(name, dtype, where):
    for task in small_tasks(name, dtype=dtype):
        assert check(suites()[name], task, where) >= 2


@pytest.mark.parametrize("name", SMALL)
def test_operands_are_random_and_in_the_case_s_dtype_and_layout(name, device):
    suite = suites()[name]
    for dtype in ("float32", "bfloat16"):
        for layout in suite.layouts:
            for task in small_tasks(name, dtype=dtype, layout=layout):
                first, second = suite.tensors(task, device), suite.tensors(task, device)
                for a, b in zip(first, second, strict=True):
                    assert a.dtype == getattr(torch, dtype) and a.std() > 0.01 and not torch.equal(a, b)
                    if a.dim() == 4 and layout:
                        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                        assert a.is_contiguous(memory_format=wanted)


# ---- whole networks ------------------------------------------------------------------------------------------------


def narrow() -> nn.Module:
    """Small enough for an interpreter, with a layer of each kind that networks have."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def with_narrow_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "narrow", Network("narrow", "Narrow", narrow, (2, 12, 12)))


def model_tasks(
    dtype: str = "float32", batch: int = 2, network: str = "lenet", layout: str = "channels_last", suite=None
) -> list[Task]:
    suite = suite or suites()["model"]
    return tasks(suite, Selection((network,), (batch,), (dtype,), (layout,), suite.computations))


@pytest.mark.parametrize(
    "dtype, layout",
    [("float32", "channels_last"), ("float32", "NCHW"), ("float16", "NCHW"), ("bfloat16", "channels_last")],
)
def test_networks_are_right(dtype, layout, where):
    for task in model_tasks(dtype, 4, "narrow", layout):
        assert check(suites()["model"], task, where) == 3 + suites()["model"].trains(task)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_networks_fused_or_folded_are_right(dtype, where):
    (task,) = model_tasks(dtype, 3, "narrow", suite=suites()["inference"])
    assert check(suites()["inference"], task, where) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lenet_is_right(dtype):
    with force_mode(Mode.REFERENCE):
        for task in model_tasks(dtype):
            assert check(suites()["model"], task, torch.device("cpu")) == 3 + suites()["model"].trains(task)


def gradients(task: Task, device: torch.device, break_it=lambda model: None, loss=nn.functional.cross_entropy):
    """Of a step on LeNet that a test may break, as an implementation returns them; and images, labels."""
    images, labels = suites()["model"].tensors(task, device)
    model = copy.deepcopy(weights("lenet")).to(device)
    break_it(model)
    return (images, labels), list(torch.autograd.grad(loss(model(images), labels), list(model.parameters())))


def skip_first_activation(model: nn.Module) -> None:
    relu = next(name for name, module in model.named_modules() if isinstance(module, nn.ReLU))
    model.set_submodule(relu, nn.Identity())


def test_a_training_step_that_is_wrong_is_called_so():
    suite, cpu = suites()["model"], torch.device("cpu")
    (task,) = (each for each in model_tasks() if each.case.computation == "training step")

    def error(spoil=lambda g: g, **broken) -> float:
        tensors, found = gradients(task, cpu, **broken)
        return relative_error(suite.result(spoil(found)), suite.reference(task, tensors))

    def sum_of_losses(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    bound = suite.bound(task)
    assert error() <= bound
    assert error(loss=sum_of_losses) > bound
    assert error(break_it=skip_first_activation) > bound
    for spoil in (
        lambda g: [torch.zeros_like(g[0]), *g[1:]],
        lambda g: [g[0], g[1] / 0, *g[2:]],
        lambda g: [g[0] * float("nan"), *g[1:]],
        lambda g: [*g[:-1], g[-1] * 1.1],
        lambda g: g[:-1],
    ):
        assert not error(spoil) <= bound


def test_a_step_computes_the_same_each_time():
    """Its rate is zero, so that what is timed can be checked, and every call is the call that was checked."""
    suite = suites()["model"]
    (task,) = (each for each in model_tasks() if each.case.computation == "training step")
    tensors = suite.tensors(task, torch.device("cpu"))
    for each in suite.implementations(task, ("library",), torch.device("cpu"))[1:]:
        first, second = (suite.result(each.function(*each.prepare(tensors))) for _ in range(2))
        assert torch.equal(first, second), each.name


def test_a_network_s_work_is_the_sum_of_its_layers():
    """A training step: forward, weight gradient and, but for the first layer, input gradient."""
    suite = suites()["model"]
    inference, training = (suite.work(task) for task in model_tasks(batch=8))
    # docs/summary.md: 6,522,000 multiply-adds an image, 392,000 of them in the first layer; pools add none of these.
    products = 2 * 8 * 6_522_000
    assert products * 0.85 <= inference.flops <= products * 1.02
    assert 2.7 < training.flops / inference.flops < 3.05
    assert 2 * inference.bytes < training.bytes
