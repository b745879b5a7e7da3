"""Cross entropy by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._cross_entropy import kernels
from gpukern.ops._cross_entropy.problem import MEAN, NONE, Options
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import fan_in
from gpukern.ops._softmax.tiles import tiles_of, walkable
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.tensors import check_kernel_dtype, elementwise_like

#: So many labels all programs together may read to count them, each for itself; else a launch of its own does it once.
_READ_AGAIN = 2048
#: Labels that are counted at a time.
_COUNT = 1024
#: Labels of a program that counts, at the least; and numbers of one that scales.
_LABELS, _BLOCK = 4096, 4096


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    dtype: torch.dtype,
    gradient: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gradient``, if it is a list, gets ∂loss/∂input of a loss that is not ``"none"``."""
    check_kernel_dtype("cross_entropy", input.dtype)
    check_kernel_dtype("cross_entropy", dtype)
    each = options.reduction == NONE
    loss = input.new_empty(_rows(input) if each else (), dtype=dtype)
    total = input.new_empty((), dtype=torch.float32)
    if input.numel() == 0:
        total.zero_()
        loss.fill_(float("nan") if options.reduction == MEAN else 0.0)
        return loss, total
    input = walkable(input)
    grad = None
    if gradient is not None:
        grad = elementwise_like(input)
        gradient.append(grad)
    _run(input, target, weight, options, loss=loss, total=total, grad=grad)
    return loss, total


def cross_entropy_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor,
    options: Options,
    wants_input: bool,
    wants_target: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_kernel_dtype("cross_entropy", input.dtype)
    input, target = walkable(input), walkable(target)
    wants = (wants_input, input), (wants_target, target)
    grads = [elementwise_like(tensor) if wanted else tensor.new_empty(0) for wanted, tensor in wants]
    if input.numel():
        given = {"grad": grads[0] if wants_input else None, "target_grad": grads[1] if wants_target else None}
        divisor = None if target.is_floating_point() else total
        _run(input, target, weight, options, incoming=grad, divisor=divisor, **given)
    return grads[0], grads[1]


def scaled_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply dense ``tensor`` in place by a ``factor`` without dimensions; by 1 nothing is read or written."""
    size = tensor.numel()
    if size:
        programs = min(cdiv(size, _BLOCK), 4 * device_spec(tensor.device).sm_count)
        options = {"BLOCK": _BLOCK, "INDEX": index_type(size), "num_warps": 8}
        launch(kernels.scale_kernel, (programs,), tensor.device, (tensor, factor, size), options)
    return tensor


def _rows(input: torch.Tensor) -> tuple[int, ...]:
    return input.shape[0], *input.shape[2:]


def _run(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    *,
    loss: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    target_grad: torch.Tensor | None = None,
    incoming: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
) -> None:
    """Launch the kernel for what is given: a reduced loss and its ``total``, or losses of rows; gradients."""
    labels = not target.is_floating_point()
    each, reduced = (loss, None) if options.reduction == NONE else (None, loss)
    probabilities, label = (None, target) if labels else (walkable(target), None)
    weight = None if weight is None else weight.contiguous()
    # Tiles of numbers that a program has at a time: logits, and of these whatever is there.
    kept = 1 + sum((not labels, grad is not None, weight is not None and options.smoothing > 0.0))
    tiles = tiles_of(1, input, probabilities, grad, target_grad, of_rows=(label, each, incoming), kept=kept)
    rows, classes, programs = input.numel() // input.shape[1], input.shape[1], tiles.plan.steps
    mean = options.reduction == MEAN
    counted = None
    if mean and labels and grad is not None and divisor is None:
        counted = target.contiguous()
        if programs * rows > _READ_AGAIN:
            divisor, counted = _label_weights(counted, weight, options.ignore_index, classes), None
    shared = None if reduced is None else shared_sums(1, programs, 2)(input.device)
    launch(
        kernels.cross_entropy_kernel,
        (programs,),
        input.device,
        (
            *tiles.images,
            *(counted, weight, divisor, reduced, total),
            *(shared, fan_in(programs, 2), tiles.sizes, rows, classes, options.ignore_index, options.smoothing),
        ),
        {"MEAN": mean, "SMOOTHING": options.smoothing > 0.0, "COUNT": _COUNT} | tiles.options,
    )


def _label_weights(label: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, classes: int) -> torch.Tensor:
    """Σ weight[label] over the labels that are not ignored."""
    rows = label.numel()
    out = torch.empty((), dtype=torch.float32, device=label.device)
    splits = min(cdiv(rows, _LABELS), 2 * device_spec(label.device).sm_count)
    per_split = cdiv(rows, splits)
    splits = cdiv(rows, per_split)
    shared = shared_sums(1, splits, 1)(label.device)
    launch(
        kernels.label_weights_kernel,
        (splits,),
        label.device,
        (label, weight, out, shared, fan_in(splits, 1), rows, per_split, ignore_index, classes),
        {"BLOCK": _COUNT, "num_warps": 4},
    )
    return out
