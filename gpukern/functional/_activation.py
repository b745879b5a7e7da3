"""Activations."""

from __future__ import annotations

import torch

from gpukern.ops import activation as _activation
from gpukern.runtime.arguments import as_float, check_tensors
from gpukern.runtime.tensors import check_floating


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = max(x, 0)``, of the shape and layout of ``input``. ``inplace=True`` overwrites ``input``."""
    return _elementwise("relu", input, inplace)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = min(max(x, 0), 6)``."""
    return _elementwise("relu6", input, inplace)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """``y = x`` where x > 0, ``negative_slope · x`` elsewhere. Raises ValueError for a negative slope."""
    return _elementwise("leaky_relu", input, inplace, negative_slope)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """``y = 1 / (1 + exp(−x))``."""
    return _elementwise("sigmoid", input, inplace=False)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = min(max(x + 3, 0), 6) / 6``."""
    return _elementwise("hardsigmoid", input, inplace)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """``y = tanh(x)``."""
    return _elementwise("tanh", input, inplace=False)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = x / (1 + exp(−x))``."""
    return _elementwise("silu", input, inplace)


def gelu(input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """``y = x Φ(x)``, Φ the normal distribution function, or with ``approximate="tanh"`` its form with a tanh.

    Raises RuntimeError for another ``approximate``.
    """
    if not isinstance(approximate, str):
        raise TypeError(f"approximate must be a str, got {approximate!r}")
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", input, inplace=False)


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = x · min(max(x + 3, 0), 6) / 6``."""
    return _elementwise("hardswish", input, inplace)


def _elementwise(name: str, input: torch.Tensor, inplace: bool, negative_slope: float = 0.0) -> torch.Tensor:
    check_tensors(name, input)
    check_floating(name, input)
    negative_slope = as_float("negative_slope", negative_slope)
    _activation.check_activation(name, negative_slope)
    compute = _activation.activation_ if inplace else _activation.activation
    return compute(input, name, negative_slope)
