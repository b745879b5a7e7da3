"""What a batch norm's result was computed from: for the backward of what reads it, and to compute it once more.

    y = act((z − mean) / √(variance + eps) · γ + β + residual)

Where y is not saved (``again``), whoever needs it in the backward pass computes it from z, which is; and where the
residual is a result of another such batch norm, that one first. One pass over memory makes it for all its readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch

from gpukern.compiler.mailbox import Mailbox
from gpukern.ops._batch_norm.problem import Norm
from gpukern.ops.activation import needs_input
from gpukern.ops.batch_norm import batch_norm, batch_norm_training, kept_for_backward
from gpukern.ops.norm_pair import normalize_pair
from gpukern.runtime.mode import Implementations

_norms = Implementations("gpukern.ops._batch_norm")
_TENSORS = 6


class Epilogue(NamedTuple):
    """The numbers of a batch norm's pass; ``training`` if the statistics are the batch's."""

    training: bool
    eps: float
    activation: str
    negative_slope: float


class Origin(NamedTuple):
    """``kept``: y is ``again`` computed from it, the residual, if ``source`` does not make that; otherwise ``other`` of
    :func:`gpukern.ops.batch_norm.batch_norm_backward`.
    """

    mailbox: Mailbox | None
    z: Any
    weight: Any
    bias: Any
    kept: Any
    mean: Any
    variance: Any
    epilogue: Epilogue
    again: bool
    has_residual: bool
    source: Origin | None

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[1 : 1 + _TENSORS]

    @property
    def numbers(self) -> Norm:
        return Norm(self.mean, self.variance, self.weight, self.bias, self.epilogue.eps)

    @property
    def is_pair(self) -> bool:
        """Whether the residual is another batch norm's result that exists nowhere: both are one pass."""
        return self.source is not None and self.source.mailbox is None

    @classmethod
    def of_norm(cls, z, weight, bias, mean, variance, eps: float) -> Origin:
        """That of a batch norm's result that is never stored."""
        return cls(None, z, weight, bias, None, mean, variance, Epilogue(True, eps, "none", 0.0), True, False, None)


def origin_of(mailbox, z, weight, bias, residual, y, mean, variance, epilogue, again, source) -> Origin:
    """The origin of ``y``; that of its residual is ``source``, where it may be computed again."""
    kept = residual if again else kept_for_backward(residual, y, epilogue.activation)
    if not again or source is None or not source.again:
        source = None
    else:
        kept = None
    has_residual = residual is not None
    return Origin(mailbox, z, weight, bias, kept, mean, variance, epilogue, again, has_residual, source)


@overload
def taken_apart(origin: Origin) -> tuple[tuple[torch.Tensor | None, ...], Origin]: ...
@overload
def taken_apart(origin: Origin | None) -> tuple[tuple[torch.Tensor | None, ...], Origin | None]: ...
def taken_apart(origin: Origin | None) -> tuple[tuple[torch.Tensor | None, ...], Origin | None]:
    """(the tensors of ``origin`` and of its sources, to be saved by autograd; all else)."""
    if origin is None:
        return (), None
    tensors, source = taken_apart(origin.source)
    return (*origin.tensors, *tensors), origin._replace(**_NONE, source=source)


_NONE: dict[str, Any] = dict.fromkeys(Origin._fields[1 : 1 + _TENSORS])


def put_together(shape: Origin | None, tensors: Sequence[torch.Tensor | None]) -> Any:
    """The origin that :func:`taken_apart` took apart."""
    if shape is None:
        return None
    own: dict[str, Any] = dict(zip(_NONE, tensors[:_TENSORS], strict=True))
    return shape._replace(**own, source=put_together(shape.source, tensors[_TENSORS:]))


def other_of(origin: Origin) -> torch.Tensor | None:
    """What the activation's derivative reads besides z: the residual, or y."""
    activation = origin.epilogue.activation
    if not origin.again:
        return origin.kept
    if not origin.has_residual or activation == "none":
        return None
    return _residual(origin) if needs_input(activation) else made(origin)


def made(origin: Origin) -> torch.Tensor:
    """y once more; differentiably where derivatives of derivatives are asked for."""
    shared = origin.mailbox is not None and origin.mailbox.is_open()
    if shared and origin.mailbox.made is not None:  # type: ignore[union-attr]
        return origin.mailbox.made  # type: ignore[union-attr]
    z, weight, bias, _, mean, variance = origin.tensors
    training, *numbers = origin.epilogue
    if origin.is_pair and not torch.is_grad_enabled():
        y = pair_of(origin)
    elif training and torch.is_grad_enabled():
        return batch_norm_training(z, weight, bias, _residual(origin), *numbers)[0]
    elif training:
        residual = _residual(origin)
        y = _norms.of(z).apply_statistics(z, weight, bias, residual, mean, variance, *numbers)
    else:
        y = batch_norm(z, weight, bias, _residual(origin), mean, variance, *numbers)
    if shared:
        origin.mailbox.made = y  # type: ignore[union-attr]
    return y


def pair_of(origin: Origin) -> torch.Tensor:
    """y of two batch norms, in one pass."""
    other, (_, _, activation, negative_slope) = origin.source, origin.epilogue
    assert other is not None
    return normalize_pair(origin.z, origin.numbers, other.z, other.numbers, activation, negative_slope)


def _residual(origin: Origin) -> torch.Tensor | None:
    return origin.kept if origin.source is None else made(origin.source)
