"""Activations: which there are as layers and functions, where they saturate, and which can die."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

#: Functions that a forward calls by itself, and the names of their layers.
FUNCTIONS: dict[Callable, str] = {
    function: name
    for name, functions in {
        "ReLU": (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
        "ReLU6": (F.relu6,),
        "Tanh": (F.tanh, torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_),
        "Sigmoid": (F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.Tensor.sigmoid, torch.Tensor.sigmoid_),
        "Hardsigmoid": (F.hardsigmoid,),
        "Hardtanh": (F.hardtanh, F.hardtanh_),
        "LeakyReLU": (F.leaky_relu, F.leaky_relu_),
        "ELU": (F.elu,),
        "GELU": (F.gelu,),
        "SiLU": (F.silu,),
        "Hardswish": (F.hardswish,),
        "Mish": (F.mish,),
        "Softplus": (F.softplus,),
    }.items()
    for function in functions
}
_LAYERS = tuple(getattr(nn, name) for name in dict.fromkeys(FUNCTIONS.values()))
#: The outputs between which an activation moves; the slope is nearly 0 at both.
_BOUNDS = {"Tanh": (-1.0, 1.0), "Sigmoid": (0.0, 1.0), "Hardsigmoid": (0.0, 1.0), "Hardtanh": (-1.0, 1.0)}
#: An output this share of the way between the bounds, or less, away from one of them is saturated.
SATURATED = 0.01


def kind_of(layer: nn.Module) -> str:
    """Return the name of an activation layer, torch's or gpukern's; "" for any other layer."""
    return next((kind.__name__ for kind in _LAYERS if isinstance(layer, kind)), "")


def bounds(kind: str, layer: nn.Module | None) -> tuple[float, float] | None:
    """The least and the largest output of a saturating activation; None for others. ReLU6 has only an upper one."""
    if isinstance(layer, nn.Hardtanh) and kind == "Hardtanh":
        return float(layer.min_val), float(layer.max_val)
    if kind == "ReLU6":
        return -6.0, 6.0
    return _BOUNDS.get(kind)


def saturated(kind: str, layer: nn.Module | None, output: torch.Tensor) -> int | None:
    """The number of outputs where the slope is nearly zero because the input is far out; None: cannot saturate."""
    limits = bounds(kind, layer)
    if limits is None:
        return None
    low, high = limits
    near = SATURATED * (high - low)
    above = output.detach() >= high - near
    # The zeros of ReLU6 are no saturation, but those of a unit that is off.
    return int(above.sum()) if kind == "ReLU6" else int((above | (output.detach() <= low + near)).sum())


def can_die(kind: str) -> bool:
    """Whether the activation has a flat zero, in which a unit gets no gradient."""
    return kind in ("ReLU", "ReLU6")
