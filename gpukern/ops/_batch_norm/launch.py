"""Batch norm by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.conv import ConvProblem, Direction, Epilogue, prepared_for, run
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm import kernels
from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._batch_norm.tiles import NOTHING, Tiles, empty_like, tiles_of
from gpukern.ops._normalization import Norm
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.launch import with_workspace
from gpukern.runtime.launcher import launch
from gpukern.runtime.operator import resolved
from gpukern.runtime.tensors import check_kernel_dtype

# ---- forward -------------------------------------------------------------------------------------------------------


def batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    check_kernel_dtype("batch_norm", input.dtype)
    output = empty_like(input)
    if output.numel():
        norm = norm_of(mean, variance, weight, bias)
        _write(output, input, residual, norm, eps, activation, negative_slope)
    return output


def _write(
    output: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    norm: Norm,
    eps: float,
    activation: str,
    negative_slope: float,
) -> None:
    """Fill ``output`` from ``input`` and the numbers of its channels."""
    tiles = tiles_of(False, input, residual, output)
    launch(
        kernels.batch_norm_kernel,
        (tiles.plan.steps * tiles.plan.channel_tiles,),
        input.device,
        (*tiles.images, norm, tiles.sizes, eps, negative_slope),
        {"ACTIVATION": activation} | tiles.options,
    )


def batch_norm_training(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_kernel_dtype("batch_norm", input.dtype)
    C, device = input.shape[1], input.device
    if input.numel() == 0:
        mean, variance = (torch.zeros(C, dtype=torch.float32, device=device) for _ in range(2))
        return empty_like(input), mean, variance
    output = empty_like(input)
    tiles = tiles_of(True, input, residual, output)
    chosen = tiles.plan
    statistics = statistics_for(C, device, running)
    mean, variance = statistics.mean, statistics.variance
    norm = norm_of(mean, variance, weight, bias)
    whole = chosen.splits == 1
    make_statistics(tiles, statistics, norm, whole, eps, activation, negative_slope)
    keep(running, statistics)
    if not whole:
        _write(output, input, residual, norm, eps, activation, negative_slope)
    return output, mean, variance


def make_statistics(
    tiles: Tiles,
    statistics: Statistics,
    norm: Norm,
    whole: bool,
    eps: float = 0.0,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> None:
    """Fill ``statistics`` from the first image of ``tiles``, or if ``whole``, by plans of one split, all images."""
    chosen, device = tiles.plan, statistics.mean.device
    if not whole:
        channels = statistics.mean.numel()
        statistics = with_workspace(statistics, channels, device, chosen.splits, chosen.channel_tiles)
    launch(
        kernels.batch_norm_statistics_kernel,
        (chosen.splits * chosen.channel_tiles,),
        device,
        (
            *(tiles.images if whole else (tiles.images[0], NOTHING, NOTHING)),
            *(norm, statistics, tiles.sizes),
            *(chosen.steps, chosen.steps_per_split, chosen.splits, eps, negative_slope),
        ),
        {"WHOLE": whole, "UNROLL": chosen.unroll, "ACTIVATION": activation if whole else "none"} | tiles.options,
    )


def conv2d_batch_norm(
    problem: ConvProblem,
    input: torch.Tensor,
    filters: torch.Tensor,
    filters_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z, mean, variance = conv2d_with_statistics(problem, input, filters, filters_bias, running)
    return batch_norm(z, weight, bias, residual, mean, variance, eps, activation, negative_slope), z, mean, variance


def conv2d_with_statistics(
    problem: ConvProblem,
    input: torch.Tensor,
    filters: torch.Tensor,
    filters_bias: torch.Tensor | None,
    running: Running | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prepared = prepared_for(problem, Direction.FORWARD, input, filters, None, Epilogue(statistics=True))
    statistics = statistics_for(problem.K, input.device, running)
    z, made = run(prepared, input, filters, filters_bias, statistics=statistics)
    if made is None and z.numel():  # no channels to sum over
        return z, *batch_norm_training(z, None, None, None, 0.0, "none", 0.0, running)[1:]
    if made is None:
        mean, variance = (torch.zeros(problem.K, dtype=torch.float32, device=z.device) for _ in range(2))
        return z, mean, variance
    keep(running, statistics)
    return z, statistics.mean, statistics.variance


#: With the input's own statistics the kernel is the same.
apply_statistics = batch_norm


def statistics_for(channels: int, device: torch.device, running: Running | None) -> Statistics:
    """Return memory for mean and variance, and where the kernels update the running ones."""
    mean, variance = (torch.empty(channels, dtype=torch.float32, device=device) for _ in range(2))
    if running is None:
        return Statistics(mean=mean, variance=variance)
    running_mean, running_variance = (_flat(resolved(tensor)) for tensor in (running.mean, running.variance))
    return Statistics(None, None, None, mean, variance, running_mean, running_variance, running.momentum)


def keep(running: Running | None, statistics: Statistics) -> None:
    """Make what a kernel wrote to ``statistics`` the running ones."""
    if running is None:
        return
    pairs = (running.mean, statistics.running_mean), (running.variance, statistics.running_variance)
    for tensor, written in pairs:
        if tensor is not written:
            tensor.copy_(written)
        elif not tensor.is_inference():
            # Autograd must be notified: a frozen batch norm's backward needs the old values.
            torch.autograd.graph.increment_version(tensor)


# ---- backward ------------------------------------------------------------------------------------------------------


def batch_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    check_kernel_dtype("batch_norm", input.dtype)
    C, device = input.shape[1], input.device
    out = empty_like(input) if wants_input else None
    inner = empty_like(input) if wants_inner else None
    grad_weight = grad_bias = None
    if wants_parameters:
        # One is there: its gradient is wanted.
        dtype = (bias if weight is None else weight).dtype  # type: ignore[union-attr]
        grad_weight, grad_bias = (torch.empty(C, dtype=dtype, device=device) for _ in range(2))
    results = tuple(input.new_empty(0) if t is None else t for t in (out, grad_weight, grad_bias, inner))
    if input.numel() == 0:
        for tensor in results:
            tensor.zero_()
        return results

    needs_sums = wants_parameters or (training and wants_input)
    # With frozen statistics, x is read only for an activation's derivative.
    needs_input = activation != "none" and PROPERTIES[activation].needs_input
    reads_x = needs_sums or (activation != "none" and (other is None or needs_input))
    tiles = tiles_of(needs_sums, grad, input if reads_x else None, other, inner, out)
    chosen = tiles.plan
    first, x, kept, inner_image, out_image = tiles.images
    splits, each = (chosen.splits, chosen.steps_per_split) if needs_sums else (chosen.steps, 1)
    whole = splits == 1 or not needs_sums
    later = training and wants_input and not whole
    norm = norm_of(mean, variance, weight, bias)
    totals = torch.empty((2, C), dtype=torch.float32, device=device) if later else None
    sums = Sums(totals=totals, grad_bias=grad_bias, grad_weight=grad_weight) if needs_sums else None
    if sums and not whole:
        sums = with_workspace(sums, C, device, splits, chosen.channel_tiles, sums=2)
    launch(
        kernels.batch_norm_backward_kernel,
        (splits * chosen.channel_tiles,),
        device,
        (
            *(first, x, kept, inner_image, NOTHING if later else out_image),
            norm,
            sums,
            tiles.sizes,
            *(chosen.steps, each, splits),
            eps,
            negative_slope,
        ),
        {
            "TRAINING": training,
            "WHOLE": whole,
            # It reads at least two tensors: keep as many loads in flight as the forward does for one.
            "UNROLL": max(1, chosen.unroll // 2),
            "ACTIVATION": activation,
            "NEEDS_INPUT": needs_input,
        }
        | tiles.options,
    )
    if later:
        if inner is not None:
            grad, other, activation, needs_input = inner, None, "none", False
        tiles = tiles_of(False, grad, input, other, out)
        launch(
            kernels.batch_norm_input_grad_kernel,
            (tiles.plan.steps * tiles.plan.channel_tiles,),
            device,
            (*tiles.images, norm, Sums(totals=totals), tiles.sizes, eps, negative_slope),
            {"ACTIVATION": activation, "NEEDS_INPUT": needs_input} | tiles.options,
        )
    return results


def gradients_from_sums(
    inner: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    sums: torch.Tensor,
    training: bool,
    eps: float,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if not training or not input.numel():
        frozen = False, eps, "none", 0.0, True, False, False
        out = batch_norm_backward(inner, input, weight, bias, None, mean, variance, *frozen)[0]
        grads = (None if p is None else s.to(p.dtype) for p, s in ((weight, sums[1]), (bias, sums[0])))
        return out, *grads  # type: ignore[return-value]
    out = empty_like(input)
    tiles = tiles_of(False, inner, input, None, out)
    # In fp32 the sums are the gradients.
    grad_weight, grad_bias = (
        None if p is None else s if p.dtype is s.dtype else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, s in ((weight, sums[1]), (bias, sums[0]))
    )
    rounded_bias, rounded_weight = (None if g is None or g.dtype is sums.dtype else g for g in (grad_bias, grad_weight))
    launch(
        kernels.batch_norm_input_grad_kernel,
        (tiles.plan.steps * tiles.plan.channel_tiles,),
        input.device,
        (
            *tiles.images,
            norm_of(mean, variance, weight, bias),
            Sums(None, None, None, sums, rounded_bias, rounded_weight, count),
            tiles.sizes,
            eps,
            0.0,
        ),
        {"ACTIVATION": "none", "NEEDS_INPUT": False} | tiles.options,
    )
    return out, grad_weight, grad_bias


def sums_of(
    inner: torch.Tensor, input: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    if not input.numel():
        return torch.zeros((2, input.shape[1]), dtype=torch.float32, device=input.device)
    return inner_gradient_and_sums(inner, input, None, None, None, mean, variance, eps, "none", 0.0)[1]


def inner_gradient_and_sums(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g = ∂L/∂z in ``grad``'s layout, fp32 [2, C] of Σ g and Σ g·x̂): the first half of :func:`batch_norm_backward`.

    With nothing to multiply with, g is ``grad`` itself. No tensor is empty.
    """
    inner = None if activation == "none" else torch.empty_like(grad)
    tiles = tiles_of(True, grad, input, other, inner)
    chosen = tiles.plan
    C, device, whole = input.shape[1], grad.device, chosen.splits == 1
    totals = torch.empty((2, C), dtype=torch.float32, device=device)
    sums = Sums(totals=totals)
    if not whole:
        sums = with_workspace(sums, C, device, chosen.splits, chosen.channel_tiles, sums=2)
    launch(
        kernels.batch_norm_backward_kernel,
        (chosen.splits * chosen.channel_tiles,),
        device,
        (
            *(*tiles.images, NOTHING),
            *(norm_of(mean, variance, weight, bias), sums, tiles.sizes),
            *(chosen.steps, chosen.steps_per_split, chosen.splits),
            *(eps, negative_slope),
        ),
        {
            "TRAINING": True,
            "WHOLE": whole,
            "UNROLL": max(1, chosen.unroll // 2),
            "ACTIVATION": activation,
            "NEEDS_INPUT": activation != "none" and PROPERTIES[activation].needs_input,
        }
        | tiles.options,
    )
    return grad if inner is None else inner, totals


# ---- what both share -----------------------------------------------------------------------------------------------


def norm_of(
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Norm:
    return Norm(*(None if t is None else _flat(t) for t in (mean, variance, weight, bias)))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` contiguous, as kernels take these operands, and only these, without strides."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
