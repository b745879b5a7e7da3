"""Losses."""

from __future__ import annotations

import torch
from torch.nn import _reduction

from gpukern.ops import cross_entropy as _cross_entropy
from gpukern.ops._cross_entropy.problem import MEAN, NONE, SUM, Options, check_labels, check_weight
from gpukern.runtime.amp import is_any_autocast_enabled, runs_in_fp32
from gpukern.runtime.arguments import as_float, as_int, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating

_REDUCTIONS = (NONE, MEAN, SUM)
#: torch's names of dtypes in its errors.
_NAMES = {
    torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16",
    torch.int64: "Long", torch.int32: "Int", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte",
    torch.bool: "Bool",
}  # fmt: skip


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""``− Σ_c q[c] · log p[c]`` with p the softmax of the logits, for each row, and the sum or mean of these.

    With class indices ``q[c] = (1 − s) · w[c] · [c = label] + s / C · w[c]``; with probabilities t of the classes
    ``q[c] = w[c] · ((1 − s) · t[c] + s / C)``, where s is ``label_smoothing`` and w ``weight``, or ones.

    Parameters
    ----------
    input:
        logits [C], [N, C] or [N, C, d1, …]; any strides, channels_last without a copy.
    target:
        class indices, int64 (or uint8 for [C] and [N, C]), without the dimension C; or probabilities, floating point,
        of the shape of ``input``.
    weight:
        [C] or None.
    ignore_index:
        a row with this index has the loss 0 and the gradient 0. Not for probabilities.
    reduction:
        ``"none"``; ``"sum"``; or ``"mean"``, which divides by Σ w[label] over the rows that are not ignored (NaN if all
        are), with probabilities by the number of rows, whatever the weights.
    size_average, reduce:
        torch's old form of ``reduction``.
    label_smoothing:
        at most 1; below 0 is as 0.

    Computes in fp32; differentiable to any order, by probabilities and their weights too, from the second on in plain
    torch. Sums have a fixed order: the same bits in every run. Forward and backward read the logits once, see
    :mod:`gpukern.ops.cross_entropy`. Under autocast the loss of halves is float32.

    A class index that is none is an IndexError on a CPU. On a GPU, where finding out would mean to wait for it, the
    row's loss and its gradient are NaN, and nothing is read or written outside of the tensors.

    Returns
    -------
    the loss in the dtype of ``input`` (promoted by those of probabilities and their weights): a number, or with
    ``"none"`` one for each row.

    Raises
    ------
    RuntimeError, ValueError and IndexError for sizes, dtypes or devices that do not fit; ValueError for an unknown
    ``reduction``; TypeError for arguments of a wrong type. As ``torch.nn.functional.cross_entropy``, before anything is
    computed.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in _REDUCTIONS:
        reduction = _REDUCTIONS[_reduction.get_enum(reduction)]
    check_tensors("cross_entropy_loss", input, target, optional=(weight,))
    smoothing = max(as_float("label_smoothing", label_smoothing), 0.0)
    ignore_index = as_int("ignore_index", ignore_index)
    in_fp32 = is_any_autocast_enabled() and runs_in_fp32(input)
    dtype = torch.float32 if in_fp32 else input.dtype
    if input.shape == target.shape:
        _check_probabilities(input, target, weight, ignore_index)
        for tensor in (target, weight):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    else:
        if in_fp32 and weight is not None and weight.dtype is not torch.float64:
            weight = weight.float()
        _check_indices(input, target, weight, dtype)
    check_floating("cross_entropy", input)
    require(smoothing <= 1.0, f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing:g}")
    return _cross_entropy.apply(input, target, weight, Options(reduction, ignore_index, smoothing), dtype)


def _check_probabilities(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> None:
    require(
        target.is_floating_point(),
        f"Expected floating point type for target with class probabilities, got {_name(target.dtype)}",
    )
    require(ignore_index < 0, "ignore_index is not supported for floating point target")
    if input.dim() == 0:
        check_labels(input.shape, target.shape)
    _check_devices(input, target, weight)
    check_weight(None if weight is None else weight.shape, input.shape, probabilities=True)


def _check_indices(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> None:
    check_labels(input.shape, target.shape)
    check_weight(None if weight is None else weight.shape, input.shape, probabilities=False)
    _check_devices(input, target, weight)
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {_name(target.dtype)}")
    require(target.dtype is torch.int64 or input.dim() < 3, "expected scalar type Long but found Byte")
    if weight is None:
        return
    require(weight.dtype is dtype, f"expected scalar type {_name(dtype)} but found {_name(weight.dtype)}")
    if weight.requires_grad and torch.is_grad_enabled():
        function = "nll_loss_forward" if input.dim() < 3 else "nll_loss2d_forward"
        raise RuntimeError(
            f"The function '{function}' is not differentiable with respect to argument 'weight'. "
            "This input cannot have requires_grad True."
        )


def _check_devices(input: torch.Tensor, *others: torch.Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {input.device} and {other.device}!"
            )


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))
