"""Activations, and softmax."""

from __future__ import annotations

import torch
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from gpukern.ops import activation as _activation
from gpukern.ops import softmax as _softmax
from gpukern.runtime.amp import is_any_autocast_enabled, runs_in_fp32
from gpukern.runtime.arguments import as_float, as_int, check_tensors
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


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    r"""``y = exp(x − max x) / Σ exp(x − max x)`` along ``dim``.

    Parameters
    ----------
    input:
        any shape and strides. A row of −∞ alone, one with +∞ and one with NaN give NaN.
    dim:
        along which the results add up to 1. None is torch's old choice, with its warning: 0 for 0, 1 or 3 dimensions,
        else 1.
    dtype:
        that of the result; the input is taken in it. A wider one costs no pass of its own.

    The kernels take float16, bfloat16 and float32. Computes in fp32; differentiable to any order, from the second on in
    plain torch. Under autocast the result is float32 on a GPU, and of the input's dtype on a CPU, as torch's.

    Returns
    -------
    a contiguous tensor of ``input``'s shape, as torch's is.

    Raises
    ------
    IndexError for a ``dim`` that there is not, NotImplementedError for dtypes that are not floating point, TypeError
    for arguments of a wrong type.
    """
    if dim is None:
        dim = _get_softmax_dim("softmax", input.dim(), _stacklevel)
    return _normalized("softmax", input, dim, dtype)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``y = x − max x − log Σ exp(x − max x)`` along ``dim``; all else as :func:`softmax`."""
    if dim is None:
        dim = _get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    return _normalized("log_softmax", input, dim, dtype)


def _normalized(name: str, input: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    check_tensors(name, input)
    dim, rank = as_int("dim", dim), max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    if dtype is None:
        dtype = input.dtype
        if is_any_autocast_enabled() and input.device.type != "cpu" and runs_in_fp32(input):
            dtype = torch.float32
    elif not input.is_floating_point() or torch.promote_types(input.dtype, dtype) is not dtype:
        input = input.to(dtype)
    check_floating(name, input)
    return _softmax.apply(input, dim % rank, name == "log_softmax", dtype)
