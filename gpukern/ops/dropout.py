"""Dropout of elements or of whole channels, with a residual: no mask is stored.

With independent bits b, 0 with probability p, and m = b / (1 − p), which keeps the mean:

    y = x · m + residual        ∂L/∂x = ∂L/∂y · m        ∂L/∂residual = ∂L/∂y

See Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014, and Tompson et al.,
"Efficient object localization using convolutional networks", 2015, for whole channels. The bits follow from a key and
an offset (:mod:`gpukern.runtime.random`) and the element's place in the memory order of the result, or the number of
its channel: the backward is the same operator on ∂L/∂y, and reads nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._dropout.reference import empty
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, is_lazy, needs_operator
from gpukern.runtime.random import draw
from gpukern.runtime.tensors import check_alike
from gpukern.runtime.transforms import total

_implementations = Implementations("gpukern.ops._dropout")
_aten = torch.ops.aten


def apply(input: torch.Tensor, residual: torch.Tensor | None, p: float, features: int) -> torch.Tensor:
    """Dropout with ``p`` from 0 to 1, drawing new numbers where the result depends on any.

    ``features``: 0 for elements, or how many leading dimensions tell channels apart: 2 of a batch, 1 of one image.
    """
    return dropout(input, residual, *_arguments(input, p, features))


def apply_(input: torch.Tensor, p: float, features: int) -> torch.Tensor:
    """Overwrite ``input`` and return it. RuntimeError, as torch's, for what may not be changed: leaves for example."""
    arguments = _arguments(input, p, features)
    if needs_operator((input,)) or is_lazy(input):
        return input.copy_(dropout(input, None, *arguments))
    if input.requires_grad and torch.is_grad_enabled():
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        # Autograd first: it may have something against changing this tensor, a view of a leaf for example.
        input = _Inplace.apply(input, *arguments)
    _implementations.of(input).dropout_(input.detach(), *arguments)
    return input


def _arguments(input: torch.Tensor, p: float, features: int) -> tuple:
    if 0 < p < 1:
        state, key, offset = draw(input)
    else:
        state, key, offset, features = None, 0, 0, 0
    return state, p, features, key, offset, order_of(input)


def order_of(input: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of torch's element-wise results, outermost in memory first; nothing for the usual order."""
    if input.is_contiguous():
        return ()
    strides = torch.empty_like(input, device="meta").stride()
    order = tuple(sorted(range(input.dim()), key=lambda i: -strides[i]))
    return () if order == tuple(range(input.dim())) else order


def _dropout(input, residual, *others) -> torch.Tensor:
    _check(input, residual)
    return _implementations.of(input).dropout(input, residual, *others)


def _dropout_fake(input, residual, state, p, features, key, offset, order) -> torch.Tensor:
    _check(input, residual)
    return empty(input, tuple(order), residual)


def _check(input: torch.Tensor, residual: torch.Tensor | None) -> None:
    if residual is None:
        return
    # Of dtypes only the kind must be the same: the sum promotes.
    if residual.device != input.device or not residual.is_floating_point():
        check_alike("dropout", input, residual)
    if residual.shape != input.shape:
        raise RuntimeError(
            f"expected residual to have the input's shape {list(input.shape)}, but got {list(residual.shape)}"
        )


def _dropout_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(arguments[2])
    ctx.state = arguments[3:]
    ctx.dtypes = tuple(None if each is None else each.dtype for each in arguments[:2])


def _dropout_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (state,) = ctx.saved_tensors
    needs_input, needs_residual, *_ = ctx.needs_input_grad
    by_input, by_residual = ctx.dtypes
    grad_input = dropout(grad, None, state, *ctx.state).to(by_input) if needs_input else None
    return grad_input, grad.to(by_residual) if needs_residual else None, None, *(None for _ in ctx.state)


def _dropout_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
    dinput, dresidual, _ = tangents
    kept = None if dinput is None else operator(dinput, None, *arguments[2:]).to(output.dtype)
    return total(kept, None if dresidual is None else dresidual.to(output.dtype))


def _in_torch(input, residual, state, p, features, key, offset, order) -> torch.Tensor:
    """The same with bits of torch's own: exporters write their format's dropout."""
    drop = _aten.feature_dropout.default if features == 2 else _aten.dropout.default
    y = drop(input, p, True)
    return y if residual is None else _aten.add.Tensor(y, residual)


#: ``x · m + residual`` in the order of dimensions ``order``, see :func:`order_of`. The numbers are those of ``state``,
#: int64 [2] of key and offset, or where it is None of ``key`` and ``offset``; ``features`` as for :func:`apply`.
dropout = Operator(
    "dropout",
    "(Tensor input, Tensor? residual, Tensor? state, float p, int features, int key, int offset, int[] order)"
    " -> Tensor",
    forward=_dropout,
    fake=_dropout_fake,
    save=_dropout_save,
    backward=_dropout_backward,
    jvp=_dropout_jvp,
    decomposition=_in_torch,
)


class _Inplace(torch.autograd.Function):
    """Autograd's part of ``x ← x · m``, whose derivative needs no x."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, *arguments: Any) -> torch.Tensor:
        ctx.mark_dirty(input)
        _dropout_save(ctx, (input, None, *arguments), input)
        return input

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (state,) = ctx.saved_tensors
        return dropout(grad, None, state, *ctx.state), *(None for _ in range(1 + len(ctx.state)))
