"""Functions that treat all pixels alike: activations, arithmetic, dropout, and what looks along the channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpukern import functional as F
from gpukern.densify.epilogues import Activation, FixedActivation
from gpukern.densify.errors import DenseError
from gpukern.densify.recorder import Recorder
from gpukern.densify.steps import Call, Concatenate, Drop, Operand
from gpukern.densify.values import Value, told
from gpukern.densify.windows import constant, rule
from gpukern.ops.activation import ACTIVATIONS

_TORCH = torch.nn.functional
#: What gives the same tensor where it has the dtype already.
_CONVERSIONS = ("float", "double", "half", "bfloat16", "to", "type_as")
#: gpukern's activations, under the names that they have in torch: what a convolution computes in its epilogue.
_EPILOGUES = frozenset(name for name in ACTIVATIONS if hasattr(F, name))
#: Functions of one value, by the name they have in torch; gpukern's where it has one.
_UNARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(F, name) for name in sorted(_EPILOGUES)},
    **{name: getattr(_TORCH, name) for name in ("elu", "celu", "selu", "mish", "softplus", "softsign", "logsigmoid")},
    **{name: getattr(_TORCH, name) for name in ("hardtanh", "softshrink", "hardshrink", "tanhshrink", "threshold")},
    **{name: getattr(torch, name) for name in ("abs", "neg", "exp", "log", "sqrt", "rsqrt", "square", "clamp", "erf")},
    **{name: getattr(torch, name) for name in ("clamp_min", "clamp_max", "log1p", "expm1", "sign", "reciprocal")},
    "clip": torch.clamp,
    **{name: getattr(torch.Tensor, name) for name in _CONVERSIONS},
}
_BINARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow")},
    "subtract": operator.sub, "multiply": operator.mul, "div": operator.truediv, "divide": operator.truediv,
    "rsub": torch.rsub, "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip


@rule(*_UNARY)
def _unary(to: Recorder, input, *arguments, name: str, inplace=False, **options) -> Value:
    if any(isinstance(each, (Value, torch.Tensor)) for each in (*arguments, *options.values())):
        raise DenseError(f"{name} with a tensor as its second argument")
    operation = Call(_UNARY[name], (Operand(0), *arguments), options, _epilogue(name, arguments, options))
    return to.view(operation, input, input) if name in _CONVERSIONS else to.add(operation, (input,), input)


def _epilogue(name: str, arguments: tuple, options: dict[str, Any]) -> Activation | None:
    if name == "leaky_relu":
        slope = arguments[0] if arguments else options.get("negative_slope", 0.01)
        return FixedActivation(name, slope) if slope >= 0 else None
    if name == "gelu":
        approximate = arguments[0] if arguments else options.get("approximate", "none")
        return FixedActivation("gelu_tanh" if approximate == "tanh" else "gelu")
    return FixedActivation(name) if name in _EPILOGUES else None


@rule(*_BINARY)
def _binary(to: Recorder, input, other, *, name: str, alpha=1, out=None) -> Value:
    if alpha != 1 or out is not None:
        raise DenseError(f"{name} with alpha or out")
    values = [each for each in (input, other) if isinstance(each, Value)]
    operands, like = to.together(values)
    if len({value.channels for value in values} - {1}) > 1 or (
        len({v.channels for v in values}) > 1 and like.rank != 4
    ):
        raise DenseError(f"it combines {told(values[0].shape)} and {told(values[1].shape)}")
    places = iter(range(2))
    given = [Operand(next(places)) if isinstance(each, Value) else _constant(to, each, like) for each in (input, other)]
    like = replace(like, channels=max(value.channels for value in values))
    return to.add(Call(_BINARY[name], tuple(given)), operands, like)


def _constant(to: Recorder, given: Any, like: Value) -> Any:
    return constant(to, given, like) if isinstance(given, torch.Tensor) else given


@rule()
def prelu(to: Recorder, input, weight) -> Value:
    shape = [weight.numel()] + [1] * (2 if input.rank == 4 else 0)
    if weight.numel() not in (1, input.channels if input.is_pixelwise else 1):
        raise DenseError(f"it has {shape[0]} slopes, and gets {told(input.shape)}")
    return to.add(Call(_TORCH.prelu, (Operand(0), to.held(weight, "weight"))), (input,), input)


# ---- along the channels ----------------------------------------------------------------------------------------------


def along_channels(input: Value, dim: int | None, what: str) -> None:
    """DenseError unless dimension ``dim`` is that of the channels, of one position each."""
    if input.axis(1 if dim is None else dim) != 1 or not input.is_pixelwise:
        raise DenseError(f"{what} along dimension {dim} of {told(input.shape)}: only along the channels")


@rule("softmax", "log_softmax", "softmin")
def softmax(to: Recorder, input, dim=None, _stacklevel=3, dtype=None, *, name: str) -> Value:
    if dim is None and input.rank == 3:
        raise DenseError(f"{name} of {told(input.shape)} along no dimension in particular, which is the batch")
    along_channels(input, dim, name)
    if isinstance(_stacklevel, torch.dtype):  # third in torch.softmax
        dtype = _stacklevel
    function = getattr(F, name, None) or getattr(_TORCH, name)
    return to.add(Call(function, (Operand(0),), {"dim": 1, "dtype": dtype}), (input,), input)


@rule()
def glu(to: Recorder, input, dim=-1) -> Value:
    along_channels(input, dim, "glu")
    if input.channels % 2:
        raise DenseError(f"glu halves the channels of {told(input.shape)}")
    return to.add(Call(_TORCH.glu, (Operand(0), 1)), (input,), replace(input, channels=input.channels // 2))


@rule()
def normalize(to: Recorder, input, p=2.0, dim=1, eps=1e-12, out=None) -> Value:
    along_channels(input, dim, "normalize")
    return to.add(Call(_TORCH.normalize, (Operand(0), p, 1, eps)), (input,), input)


@rule()
def local_response_norm(to: Recorder, input, size, alpha=1e-4, beta=0.75, k=1.0) -> Value:
    along_channels(input, 1, "local_response_norm")
    return to.add(Call(_TORCH.local_response_norm, (Operand(0), size, alpha, beta, k)), (input,), input)


@rule("cat", "concat", "concatenate")
def _cat(to: Recorder, tensors, dim=0) -> Value:
    values, like = to.together(list(tensors))
    along_channels(like, dim, "cat")
    return to.add(Concatenate(), values, replace(like, channels=sum(value.channels for value in values)))


# ---- dropout ---------------------------------------------------------------------------------------------------------

ONE_DIMENSION = "it drops channels of one dimension, and takes no images, as which a dense network has all values"


@rule("dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(to: Recorder, input, p=0.5, training=True, inplace=False, *, name: str) -> Value:
    """Models are read in evaluation mode: what drops there drops always. What drops nothing gives the same tensor."""
    if name == "dropout1d":
        raise DenseError(ONE_DIMENSION)
    function = getattr(F, name, None) or getattr(_TORCH, name)
    return to.view(Drop(function, p, bool(training)), input, input)
