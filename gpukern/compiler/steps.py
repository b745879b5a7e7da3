"""What the nodes of a compiled graph call. Each is a function of tensors like those of :mod:`gpukern.functional`.

Autocast is applied here, at the call, as there: a compiled graph follows the contexts that it runs in. Tensors that are
no plain ones (a tracer's, a subclass's) take the functions of :mod:`gpukern.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gpukern import functional
from gpukern.compiler.autograd import Geometry, add_norms, convolve, eager, normalize
from gpukern.compiler.mailbox import Mailbox
from gpukern.compiler.origin import Epilogue, Origin, origin_of
from gpukern.compiler.pointwise import Numbers, PointwiseNorm
from gpukern.ops import conv2d
from gpukern.ops._batch_norm.problem import Running
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.pointwise_norm import takes
from gpukern.runtime.amp import autocast, is_any_autocast_enabled
from gpukern.runtime.operator import is_lazy, needs_operator, resolved

#: Bytes of a tensor that takes longer to pass over than a launch: making it once more costs the traffic and no more.
LARGE = 8 * 2**20


class Normalized(NamedTuple):
    """The result of a batch norm that only nodes of this graph read, with what they need of its origin."""

    y: torch.Tensor
    origin: Origin | None


class Statistics(NamedTuple):
    """How a batch norm takes its statistics; those that are running are updated in training."""

    mean: torch.Tensor | None
    variance: torch.Tensor | None
    training: bool
    momentum: float
    eps: float

    @property
    def running(self) -> Running | None:
        if not self.training or self.mean is None or self.variance is None:
            return None
        return Running(self.mean, self.variance, self.momentum)


class Convolved(NamedTuple):
    """z, and its mean and biased variance [C] if the convolution's kernel made them."""

    z: torch.Tensor
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None


def convolution(
    x: torch.Tensor | Normalized,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    statistics: Statistics,
) -> Convolved:
    """``z = x ∗ w + b``, with its statistics if its batch norm takes the batch's. Of sequences and rows too."""
    dims = weight.dim()
    if dims == 4:
        return _convolution(x, weight, bias, geometry, statistics)
    assert isinstance(x, torch.Tensor)  # only images are handed on with their origin
    made = _convolution(_as_images(x), _as_images(weight), bias, geometry, statistics)
    return made._replace(z=made.z.squeeze(2) if dims == 3 else made.z.flatten(1))


def convolution_alone(
    x: torch.Tensor | Normalized, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """``x ∗ w + b`` of images, one of the readers of ``x``."""
    return _convolution(x, weight, bias, geometry, _FROZEN).z


_FROZEN = Statistics(None, None, False, 0.0, 0.0)


def _convolution(
    x: torch.Tensor | Normalized,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    statistics: Statistics,
) -> Convolved:
    operand, origin = x if isinstance(x, Normalized) else (x, None)
    running = statistics.running
    taken, weight, bias = _cast(operand, weight, bias)
    if needs_operator((taken, weight, bias) if running is None else (taken, weight, bias, *running[:2])):
        _leave(origin)
        return Convolved(conv2d.apply(taken, weight, bias, None, *geometry, "none", 0.0))
    if origin is not None and (taken is not operand or is_lazy(taken)):
        _leave(origin)
        origin = None
    operands = resolved(taken), resolved(weight), resolved(bias)
    made = convolve(*operands, geometry, statistics.training, running, origin)
    return Convolved(*made) if statistics.training else Convolved(made)


def convolution_with_epilogue(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    geometry: Geometry,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """``act(x ∗ w + b + residual)``, of images or of sequences."""
    flat = weight.dim() == 3
    if flat:
        x, weight = _as_images(x), _as_images(weight)
        residual = None if residual is None else _as_images(residual)
    x, weight, bias, residual = _cast(x, weight, bias, residual)
    y = conv2d.apply(x, weight, bias, residual, *geometry, activation, negative_slope)
    return y.squeeze(2) if flat else y


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, negative_slope: float
) -> torch.Tensor:
    """``act(x wᵀ + b)``."""
    return functional.linear(x, weight, bias, activation=activation, negative_slope=negative_slope)


def transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    geometry: tuple[Any, ...],
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """``act(x ∗ᵀ w + b + residual)``, of images or of sequences; ``geometry``: stride, padding, output padding, groups,
    dilation."""
    flat = weight.dim() == 3
    if flat:
        x, weight = _as_images(x), _as_images(weight)
        residual = None if residual is None else _as_images(residual)
    y = functional.conv_transpose2d(
        x, weight, bias, *geometry, residual=residual, activation=activation, negative_slope=negative_slope
    )
    return y.squeeze(2) if flat else y


def _as_images(tensor: torch.Tensor) -> torch.Tensor:
    """Sequences [N, C, L] as images of height 1, rows [N, C] as images of one pixel."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor[:, :, None, None]


def _cast(*tensors: Any) -> tuple[Any, ...]:
    return autocast(*tensors) if is_any_autocast_enabled() else tensors


def norm(
    z: torch.Tensor | Convolved,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | Normalized | None,
    statistics: Statistics,
    activation: str,
    negative_slope: float,
    readers: int = 0,
    again: bool | None = None,
) -> torch.Tensor | Normalized:
    """``act(batch_norm(z) + residual)``; a :class:`Normalized` for ``readers``, the convolutions and residuals that
    read it. ``again``: they may compute it once more in backward instead of saving it; None: if it is large, and
    made of one tensor.
    """
    z, mean, variance = z if isinstance(z, Convolved) else (z, None, None)
    added, source = residual if isinstance(residual, Normalized) else (residual, None)
    if mean is None and _is_unusual(z, weight, bias, added, statistics.mean, statistics.variance):
        _leave(source)
        y = functional.batch_norm(
            z, statistics.mean, statistics.variance, weight, bias, statistics.training, statistics.momentum,
            statistics.eps, residual=added, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        return Normalized(y, None) if readers else y
    if not statistics.training:
        mean, variance = statistics.mean, statistics.variance
    if added is not None and added.dtype is not z.dtype:
        # Under autocast, where dtypes mix: a sum of its own, in the dtype that torch gives it.
        _leave(source)
        y, *_ = _norm(z, weight, bias, None, mean, variance, statistics, "none", 0.0)
        y = functional_activation(y + added, activation, negative_slope)
        return Normalized(y, None) if readers else y
    weight, bias, added = resolved(weight), resolved(bias), resolved(added)
    if not readers or not torch.is_grad_enabled():
        y, *_ = _norm(z, weight, bias, added, mean, variance, statistics, activation, negative_slope, source)
        return Normalized(y, None) if readers else y
    mailbox = Mailbox(readers)
    again = z.nbytes >= LARGE and added is None if again is None else again
    y, mean, variance = _norm(
        z, weight, bias, added, mean, variance, statistics, activation, negative_slope, source, mailbox, again
    )
    epilogue = Epilogue(statistics.training, statistics.eps, activation, negative_slope)
    return Normalized(y, origin_of(mailbox, z, weight, bias, added, y, mean, variance, epilogue, again, source))


def norm_pair(
    a: Convolved,
    weight_a: torch.Tensor | None,
    bias_a: torch.Tensor | None,
    statistics_a: Statistics,
    b: Convolved,
    weight_b: torch.Tensor | None,
    bias_b: torch.Tensor | None,
    statistics_b: Statistics,
    activation: str,
    negative_slope: float,
    readers: int = 0,
    again: bool | None = None,
) -> torch.Tensor | Normalized:
    """``act(batch_norm(a) + batch_norm(b))``, both with the batch's statistics; otherwise as :func:`norm`."""
    parameters = weight_a, bias_a, weight_b, bias_b
    if a.mean is None or b.mean is None or a.z.dtype is not b.z.dtype or _is_unusual(a.z, b.z, *parameters):
        added = norm(b, weight_b, bias_b, None, statistics_b, "none", 0.0)
        return norm(a, weight_a, bias_a, added, statistics_a, activation, negative_slope, readers, again)
    mailbox = Mailbox(readers) if readers and torch.is_grad_enabled() else None
    again = bool(again) and mailbox is not None
    other = Origin.of_norm(b.z, weight_b, bias_b, b.mean, b.variance, statistics_b.eps)
    epilogue = Epilogue(True, statistics_a.eps, activation, negative_slope)
    y = add_norms(a.z, weight_a, bias_a, b.z, weight_b, bias_b, a.mean, a.variance, epilogue, other, mailbox, again)
    if mailbox is None:
        return Normalized(y, None) if readers else y
    kept = None if again or activation == "none" else y
    tensors = a.z, weight_a, bias_a, kept, a.mean, a.variance
    return Normalized(y, Origin(mailbox, *tensors, epilogue, again, True, other))


def pointwise_norm(
    z: Convolved,
    inner_weight: torch.Tensor | None,
    inner_bias: torch.Tensor | None,
    inner: Statistics,
    inner_activation: tuple[str, float],
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    outer: Statistics,
    added: torch.Tensor | Normalized | None,
    partner: tuple[Convolved, torch.Tensor | None, torch.Tensor | None, Statistics] | None,
    activation: str,
    negative_slope: float,
    readers: int = 0,
    again: bool | None = None,
) -> torch.Tensor | Normalized:
    """``act(batch_norm(f(batch_norm(z)) ∗ w) + added)`` of a 1×1 convolution, f being ``inner_activation``.

    ``partner``: a convolution that is added behind a batch norm of its own, with that norm's numbers; otherwise as
    :func:`norm`. Where neither the input nor the output of the convolution can be left out, one after the other.
    """
    residual, source = added if isinstance(added, Normalized) else (added, None)
    other = Convolved(residual) if partner is None else partner[0]  # type: ignore[arg-type]
    filters = _cast(z.z, weight)[1]
    parameters = inner_weight, inner_bias, filters, norm_weight, norm_bias, *(partner[1:3] if partner else ())
    known = z.mean is not None and (partner is None or other.mean is not None)
    if not known or _is_unusual(z.z, other.z, *parameters) or not takes(z.z, filters, other.z):
        y = norm(z, inner_weight, inner_bias, None, inner, *inner_activation, 1, again)
        v = convolution(y, weight, None, POINTWISE, outer)
        if partner is None:
            return norm(v, norm_weight, norm_bias, added, outer, activation, negative_slope, readers, again)
        more = activation, negative_slope, readers, again
        return norm_pair(v, norm_weight, norm_bias, outer, *partner, *more)
    mailbox = Mailbox(readers) if readers and torch.is_grad_enabled() else None
    of_inner = Epilogue(True, inner.eps, *inner_activation)
    epilogue = Epilogue(True, outer.eps, activation, negative_slope)
    of_added = partner[1:] if partner else (None, None, None)
    eps = 0.0 if partner is None else partner[3].eps
    numbers = Numbers(z.mean, z.variance, of_inner, epilogue, other.mean, other.variance, eps)  # type: ignore[arg-type]
    y, mean, variance = _pointwise_norm(
        z.z, inner_weight, inner_bias, filters, norm_weight, norm_bias, other.z, *of_added[:2], numbers, outer.running,
        mailbox, None if source is None else source.mailbox,
    )  # fmt: skip
    if mailbox is None:
        return Normalized(y, None) if readers else y
    kept = None if activation == "none" else y
    if partner is not None:
        tensors = other.z, *of_added[:2], kept, other.mean, other.variance
        return Normalized(y, Origin(mailbox, *tensors, epilogue._replace(eps=eps), False, True, None))
    # Of the convolution's output nothing is left: y in its place, whose sums are ignored.
    return Normalized(y, Origin(mailbox, y, None, None, kept, mean, variance, epilogue, False, True, None))


POINTWISE = (1, 1), (0, 0, 0, 0), (1, 1), 1
_pointwise_norm = eager(PointwiseNorm)


def _is_unusual(*tensors: torch.Tensor | None) -> bool:
    return needs_operator(tensors) or any(each is not None and is_lazy(each) for each in tensors)


def _norm(
    z, weight, bias, residual, mean, variance, statistics: Statistics, activation: str, negative_slope: float,
    source: Origin | None = None, mailbox: Mailbox | None = None, again: bool = False,
) -> Any:  # fmt: skip
    epilogue = Epilogue(statistics.training, statistics.eps, activation, negative_slope)
    running = statistics.running if mean is None else None
    return normalize(z, weight, bias, residual, mean, variance, running, epilogue, mailbox, source, again)


def avg_pool2d(x: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, *options: Any) -> torch.Tensor:
    """The operator's arguments, of which the function has no dilation."""
    return functional.avg_pool2d(x, kernel, stride, padding, *options)


def layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """``torch.layer_norm``, which functional has without its last argument."""
    return functional.layer_norm(x, shape, weight, bias, eps)


def functional_activation(x: torch.Tensor, activation: str, negative_slope: float) -> torch.Tensor:
    """An activation by gpukern's name of it."""
    return x if activation == "none" else apply_activation(x, activation, negative_slope)


def _leave(origin: Origin | None) -> None:
    """A reader's forward does not take part: all readers return their gradients to autograd."""
    if origin is not None and origin.mailbox is not None:
        origin.mailbox.broken = True
