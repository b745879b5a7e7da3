"""What is tried first on a new GPU: each kernel family, operator and optimizer once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import gpukern.functional as F
from bench import results
from bench.accuracy import DTYPES, sum_bound
from bench.peers import torch_at_its_best, without_cudnn
from bench.suite import Selection, Suite, Task, Tensors, suites, tasks
from bench.suites.plans import question_of, with_plan
from gpukern.conv import ConvPlan, Variant, conv_problem, ranking
from gpukern.ops.augment import augment
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.mode import Mode, force_mode

LAST, PLANES = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Compared:
    """A result, what float64 says, and how far apart they may be."""

    actual: torch.Tensor
    expected: torch.Tensor
    bound: float


@dataclass(frozen=True)
class Case:
    name: str
    #: Everything that is launched; what it yields is compared.
    run: Callable[[torch.device], Iterator[Compared]]


# ---- convolutions --------------------------------------------------------------------------------------------------

#: Input, weight, stride, padding, groups.
_CONVOLUTIONS = (
    ((32, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
    ((32, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1),
    ((32, 128, 56, 56), (128, 128, 3, 3), 2, 1, 1),
    ((32, 64, 56, 56), (256, 64, 1, 1), 1, 0, 1),
    ((1, 512, 7, 7), (2048, 512, 1, 1), 1, 0, 1),
    ((1, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1),
    ((32, 256, 56, 56), (512, 256, 1, 1), 2, 0, 1),
    ((32, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    ((32, 32, 112, 112), (32, 1, 3, 3), 1, 1, 32),
    ((32, 96, 112, 112), (96, 1, 3, 3), 2, 1, 96),
    ((8, 128, 28, 28), (128, 4, 3, 3), 1, 1, 32),
    ((4, 40, 19, 17), (56, 40, 3, 3), 1, 1, 1),
    ((8, 96, 1, 2048), (96, 1, 1, 4), 1, 0, 96),
)


def convolutions(device: torch.device) -> Iterator[Case]:
    """The best plan of every kernel family, in each direction, for layers of all kinds."""
    suite = suites()["plans"]
    for dtype in ("float16", "tf32", "float32"):
        for images, filters, stride, padding, groups in _CONVOLUTIONS:
            p = conv_problem(images, filters, None, (stride, stride), (padding,) * 4, (1, 1), groups)
            if dtype == "float16" or images[0] <= 8 or images[2] <= 60:
                words, sizes = suite.describe(p)
                for direction in suite.computations:
                    about = suite.name, direction, words, sizes, p.N, dtype, "channels_last", ()
                    yield from _families(suite, Task(results.Case(*about), p), device)


def _families(suite: Suite, task: Task, device: torch.device) -> Iterator[Case]:
    case = task.case
    question = question_of(task, device_spec(device))
    best: dict[Variant, ConvPlan] = {}
    for ranked in ranking(question.problem, question.direction, question.operands, question.device):
        best.setdefault(ranked.plan.variant, ranked.plan)
    for variant, plan in best.items():
        name = f"{variant.value} {case.computation} {case.dtype} {case.problem}: {plan}"
        yield Case(name, functools.partial(_computed, suite, task, with_plan(question, plan), tuple))


def _computed(
    suite: Suite, task: Task, run: Callable[..., Any], prepare: Callable[[Tensors], Tensors], device: torch.device
) -> Iterator[Compared]:
    """What ``run`` makes of a task's tensors."""
    with torch_at_its_best(task.case.dtype):
        tensors = suite.tensors(task, device)
        actual = suite.result(run(*prepare(tensors)))
        with without_cudnn():
            yield Compared(actual, suite.reference(task, tensors), suite.bound(task))


# ---- operators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operator:
    """A call of public functions, and the sizes of its tensors; ``product``: whether TF32 rounds them."""

    function: Callable[..., Any]
    sizes: tuple[tuple[int, ...], ...]
    product: bool = False


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, **options)


_SMALL, _FILTER = (8, 64, 28, 28), (64, 64, 3, 3)
_OPERATORS = {
    "relu": _Operator(F.relu, ((32, 64, 56, 56),)),
    "gelu": _Operator(F.gelu, ((8, 96, 28, 28),)),
    "silu": _Operator(F.silu, ((8, 96, 28, 28),)),
    "max_pool 3, stride 2": _Operator(lambda x: F.max_pool2d(x, 3, 2, 1), ((32, 64, 112, 112),)),
    "max_pool 2": _Operator(lambda x: F.max_pool2d(x, 2), ((8, 72, 27, 29),)),
    "avg_pool": _Operator(lambda x: F.avg_pool2d(x, 3, 2, 1), ((8, 64, 27, 29),)),
    "adaptive pool to 1": _Operator(lambda x: F.adaptive_avg_pool2d(x, 1), ((32, 2048, 7, 7),)),
    "adaptive pool to 3": _Operator(lambda x: F.adaptive_avg_pool2d(x, 3), ((4, 100, 7, 11),)),
    "linear": _Operator(F.linear, ((32, 2048), (1000, 2048), (1000,)), True),
    "linear, odd": _Operator(F.linear, ((7, 3, 99), (61, 99), (61,)), True),
    "batch_norm": _Operator(_norm, ((32, 256, 56, 56), (256,), (256,))),
    "batch_norm, small": _Operator(_norm, ((32, 512, 7, 7), (512,), (512,))),
    "batch_norm of rows": _Operator(_norm, ((64, 500), (500,), (500,))),
    "batch_norm, residual, relu": _Operator(
        lambda x, w, b, r: _norm(x, w, b, residual=r, activation="relu"),
        ((32, 256, 14, 14), (256,), (256,), (32, 256, 14, 14)),
    ),
    "layer_norm": _Operator(lambda x, w, b: F.layer_norm(x, (768,), w, b), ((8, 197, 768), (768,), (768,))),
    "layer_norm over channels, residual, gelu": _Operator(
        lambda x, w, b, r: F.layer_norm(x.permute(0, 2, 3, 1), (96,), w, b, residual=r, activation="gelu"),
        ((8, 96, 28, 28), (96,), (96,), (8, 28, 28, 96)),
    ),
    "layer_norm of images": _Operator(
        lambda x, w, b: F.layer_norm(x, (96, 28, 28), w, b), ((8, 96, 28, 28), (96, 28, 28), (96, 28, 28))
    ),
    "rms_norm, silu": _Operator(lambda x, w: F.rms_norm(x, (1000,), w, activation="silu"), ((64, 3, 1000), (1000,))),
    "group_norm, relu": _Operator(
        lambda x, w, b: F.group_norm(x, 32, w, b, activation="relu"), ((8, 256, 28, 28), (256,), (256,))
    ),
    "instance_norm": _Operator(F.instance_norm, ((8, 64, 56, 56),)),
    "softmax": _Operator(lambda x: F.softmax(x, -1), ((512, 1000),)),
    "log_softmax of pixels": _Operator(lambda x: F.log_softmax(x, 1), ((4, 21, 65, 63),)),
    "cross_entropy": _Operator(
        lambda x: F.cross_entropy(x, torch.arange(len(x), device=x.device) % x.shape[1], reduction="none"),
        ((512, 1000),),
    ),
    "conv1d, depthwise": _Operator(
        lambda x, w: F.conv1d(x, w, padding="causal", groups=256), ((8, 256, 2048), (256, 1, 4)), True
    ),
    "conv3d": _Operator(
        lambda x, w, b: F.conv3d(x, w, b, padding=1, activation="relu"),
        ((4, 32, 8, 28, 28), (64, 32, 3, 3, 3), (64,)),
        True,
    ),
    "conv3d, patches": _Operator(
        lambda x, w: F.conv3d(x, w, stride=(2, 16, 16)), ((2, 3, 8, 112, 112), (256, 3, 2, 16, 16)), True
    ),
    "conv_transpose3d": _Operator(
        lambda x, w: F.conv_transpose3d(x, w, stride=2), ((2, 32, 4, 14, 14), (32, 16, 2, 2, 2)), True
    ),
    "max_pool3d": _Operator(lambda x: F.max_pool3d(x, 3, 2, 1), ((4, 32, 8, 28, 28),)),
    "avg_pool3d": _Operator(lambda x: F.avg_pool3d(x, 2), ((4, 32, 8, 28, 28),)),
    "conv, bias, relu": _Operator(
        lambda x, w, b: F.conv2d(x, w, b, padding=1, activation="relu"), (_SMALL, _FILTER, (64,)), True
    ),
    "conv, residual, silu": _Operator(
        lambda x, w, b, r: F.conv2d(x, w, b, padding=1, residual=r, activation="silu"),
        (_SMALL, _FILTER, (64,), _SMALL),
        True,
    ),
    "conv, batch_norm": _Operator(
        lambda x, w, g, b: _norm(F.conv2d(x, w, padding=1), g, b),
        ((32, 64, 28, 28), (128, 64, 3, 3), (128,), (128,)),
        True,
    ),
    "conv_transpose": _Operator(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1), ((8, 64, 14, 14), (64, 32, 4, 4), (32,)), True
    ),
    "conv in groups": _Operator(
        lambda x, w: F.conv2d(x, w, padding=1, groups=32), ((8, 128, 28, 28), (128, 4, 3, 3)), True
    ),
    "depthwise 5, stride 2": _Operator(
        lambda x, w: F.conv2d(x, w, stride=2, padding=2, groups=96), ((8, 96, 29, 27), (96, 1, 5, 5)), True
    ),
    "depthwise 7": _Operator(lambda x, w: F.conv2d(x, w, padding=3, groups=96), ((8, 96, 28, 28), (96, 1, 7, 7)), True),
}


def operators(device: torch.device) -> Iterator[Case]:
    """Each operator and all its gradients, through the public functions, beside their own references in float64; and
    the input pipeline, which has no gradients."""
    for dtype in ("float16", "tf32", "bfloat16"):
        for layout in (LAST, PLANES):
            for name, operator in _OPERATORS.items():
                words = f"{name}, {dtype}, {'channels_last' if layout is LAST else 'NCHW'}"
                yield Case(words, functools.partial(_operated, operator, dtype, layout))
    for dtype, padding_mode in (("float16", "constant"), ("float32", "reflect"), ("bfloat16", "symmetric")):
        yield Case(f"augment, {dtype}, {padding_mode}", functools.partial(_augmented, dtype, padding_mode))


def _operated(operator: _Operator, dtype: str, layout: torch.memory_format, device: torch.device) -> Iterator[Compared]:
    with torch_at_its_best(dtype):
        leaves = [_random(size, DTYPES[dtype], layout, device) for size in operator.sizes]
        if len(leaves) > 1 and leaves[1].dim() > 1:
            leaves[1].mul_(leaves[1][0].numel() ** -0.5)  # sums as large as what is summed
        leaves = [leaf.requires_grad_() for leaf in leaves]
        actual = operator.function(*leaves)
        exact = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
        with without_cudnn(), force_mode(Mode.REFERENCE):
            expected = operator.function(*exact)
        # Next to zero a rounding decides on which side of a ReLU a sum lies, and with it about its gradient.
        grad = _random(actual.shape, DTYPES[dtype], layout, device) * ((actual > 0) == (expected > 0))
        actual_grads = torch.autograd.grad(actual, leaves, grad)
        with without_cudnn(), force_mode(Mode.REFERENCE):
            expected_grads = torch.autograd.grad(expected, exact, grad.double().contiguous())
    # Sums over all pixels are the longest.
    terms = leaves[0].numel() // leaves[0].shape[-1 if leaves[0].dim() == 3 else 1]
    precision = "float32" if dtype == "tf32" and not operator.product else dtype
    # Through two roundings: a gradient is made of values that were rounded before.
    bound = 2 * sum_bound(precision, terms)
    for one, other in zip((actual, *actual_grads), (expected, *expected_grads), strict=True):
        yield Compared(one, other, bound)


def _augmented(dtype: str, padding_mode: str, device: torch.device) -> Iterator[Compared]:
    """Random crops, and those in the middle, of images whole and in part; channels' means and a mean image."""
    images = torch.randint(256, (8, 40, 36, 3), dtype=torch.uint8, device=device)
    index, scale = torch.randperm(8, device=device), torch.rand(3, device=device)
    channels, image = 255 * torch.rand(3, device=device), 255 * torch.rand(39, 33, 3, device=device)
    for seen, mean, size in ((images, channels, [40, 36]), (images[:, 1:, 3:], image, [28, 36])):
        for random in (True, False):
            numbers = seen, index, None, mean, scale, 1, 2, random, size, [4, 5], padding_mode, 9.0, 0.5, 8
            with force_mode(Mode.REFERENCE):
                expected = augment(*numbers, torch.float64)
            yield Compared(augment(*numbers, DTYPES[dtype]), expected, sum_bound(dtype, 1))


# ---- optimizers ----------------------------------------------------------------------------------------------------


def optimizers(device: torch.device) -> Iterator[Case]:
    """Two steps over ResNet-50's tensors; compiled by NVRTC, not by Triton."""
    suite = suites()["optimizer"]
    selection = Selection(("resnet50",), (1,), ("float32",), ("",), ("Adam", "SGD, momentum", *suite.computations))
    for task in tasks(suite, selection):
        if not (task.problem.groups or task.problem.bucket):
            (ours,) = suite.implementations(task, (), device)
            run = functools.partial(_computed, suite, task, ours.function, ours.prepare)
            yield Case(task.case.computation, run)


def _random(size: Any, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> torch.Tensor:
    made = torch.randn(tuple(size), device=device).to(dtype)
    return made.contiguous(memory_format=layout) if made.dim() == 4 else made


KINDS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    each.__name__: each for each in (convolutions, operators, optimizers)
}
