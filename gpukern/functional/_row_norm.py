"""Layer and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.ops._layer_norm.problem import Norm
from gpukern.ops.activation import check_activation
from gpukern.ops.layer_norm import apply
from gpukern.ops.layer_norm import layer_norm as _layer_norm
from gpukern.ops.rms_norm import rms_norm as _rms_norm
from gpukern.runtime.arguments import as_float, as_shape, check_tensors
from gpukern.runtime.tensors import check_floating


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act((x − mean) / √(var + eps) · weight + bias + residual)``, over the last dimensions.

    Parameters
    ----------
    input:
        [*, *normalized_shape]; any strides. Permuted images, as ``x.permute(0, 2, 3, 1)``, are read where they are.
        Tensors whose normalized dimensions cannot be seen as one of one stride are copied first.
    normalized_shape:
        the sizes over which mean and biased variance are taken.
    weight, bias:
        of ``normalized_shape``, or None.
    residual, activation, negative_slope:
        gpukern's extension, as in :func:`batch_norm`: ``residual`` has the input's shape and the result's dtype.

    float16 and bfloat16 inputs take parameters of their own dtype, or both of float32; computes in fp32, and the mean
    may be any number of deviations away from zero. Differentiable to any order; second and higher derivatives are
    computed in plain torch. Under ``torch.autocast("cuda")`` the result is float32, as torch's, without a copy of the
    input in float32. See Ba, Kiros and Hinton, "Layer Normalization", 2016.

    Returns
    -------
    a contiguous tensor of ``input``'s shape and dtype.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit; ValueError for an unknown activation; TypeError for
    arguments of a wrong type; NotImplementedError for a dtype that is not floating point. As
    ``torch.nn.functional.layer_norm``, before anything is computed.
    """
    check_tensors("layer_norm", input, optional=(weight, bias, residual))
    check_floating("layer_norm", input)
    shape, eps = as_shape("normalized_shape", normalized_shape), as_float("eps", eps)
    norm = _norm(input, shape, eps, True, activation, negative_slope)
    return apply(_layer_norm, "layer_norm", input, (weight, bias), _as_result(residual, norm), norm)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act(x / √(mean(x²) + eps) · weight + residual)``, the mean over the last dimensions.

    Arguments, results and errors are those of :func:`layer_norm`, and there is no bias. ``eps=None`` is the machine
    epsilon of what torch computes in: float64's for float64, else float32's. The weight may have any floating dtype, on
    the kernels any of theirs. ValueError for an input of fewer dimensions than ``normalized_shape``. See Zhang and
    Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    check_tensors("rms_norm", input, optional=(weight, residual))
    check_floating("rms_norm", input)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    shape, eps = as_shape("normalized_shape", normalized_shape), as_float("eps", eps)
    norm = _norm(input, shape, eps, False, activation, negative_slope)
    return apply(_rms_norm, "rms_norm", input, (weight,), _as_result(residual, norm), norm)


def _norm(
    input: torch.Tensor, shape: tuple[int, ...], eps: float, centered: bool, activation, negative_slope: float
) -> Norm:
    dtype = torch.float32 if _autocasts(input) else None
    return Norm(shape, eps, centered, check_activation(activation, negative_slope), negative_slope, dtype)


def _autocasts(input: torch.Tensor) -> bool:
    """Whether autocast has these norms computed in float32: on GPUs, where torch leaves float64 alone."""
    return input.device.type == "cuda" and torch.is_autocast_enabled("cuda") and input.dtype is not torch.float64


def _as_result(residual: torch.Tensor | None, norm: Norm) -> torch.Tensor | None:
    """Under autocast a sum promotes: the result is float32."""
    return residual if residual is None or norm.dtype is None else residual.to(norm.dtype)
