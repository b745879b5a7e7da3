"""Dropout, of elements and of channels."""

from __future__ import annotations

import functools
import warnings

import torch

from gpukern.ops import dropout as _dropout
from gpukern.runtime.arguments import as_bool, as_float, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating


def dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x · m + residual``, each m independently 0 with probability ``p``, else 1 / (1 − p).

    No mask is stored: backward makes the same numbers again. They are drawn as torch's are, from the default generator
    of the input's device, so that ``torch.manual_seed``, ``torch.utils.checkpoint`` and CUDA graphs have the effect
    that they have there; the same seed gives other numbers than torch's dropout has.

    Parameters
    ----------
    input:
        of any shape and strides.
    p, training, inplace:
        as for ``torch.nn.functional.dropout``. Without ``training``, with p = 0 and without elements the result is
        ``input`` itself. With p = 1 it is x · 0: NaN where x is infinite or NaN, and no numbers are drawn.
    residual:
        gpukern's extension, of the input's shape: added before the result is rounded, in the same pass.

    Differentiable to any order, under ``torch.func`` too; ``vmap`` draws as its ``randomness`` says. See Srivastava et
    al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.

    Returns
    -------
    a tensor of ``input``'s shape, with the strides of torch's result, and its dtype or that of the sum.

    Raises
    ------
    ValueError for p outside [0, 1], and for a residual with ``inplace``; NotImplementedError, a RuntimeError, for a
    dtype that is not floating-point; RuntimeError for a residual that does not fit.
    """
    return _apply("dropout", input, p, training, inplace, 0, residual)


def dropout1d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """:func:`dropout` of whole channels of [N, C, L] or [C, L]. Raises RuntimeError for other inputs."""
    _check_like_torch("dropout1d", input, p, input.dim() in (2, 3))
    return _apply("dropout1d", input, p, training, inplace, input.dim() - 1)


def dropout2d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """:func:`dropout` of whole channels of [N, C, H, W]. Warns, as torch does, of others: [N, C, ...] is assumed."""
    _check_like_torch("dropout2d", input, p, input.dim() == 4)
    return _apply("dropout2d", input, p, training, inplace, 2)


def dropout3d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """:func:`dropout` of whole channels of [N, C, D, H, W] or [C, D, H, W]. Warns, as torch does, of others."""
    _check_like_torch("dropout3d", input, p, input.dim() in (4, 5))
    return _apply("dropout3d", input, p, training, inplace, 2 if input.dim() == 5 else 1)


def _check_like_torch(name: str, input: torch.Tensor, p: float, expected: bool) -> None:
    """Let torch itself say what it has against the dimensions of ``input``, of the line that called ours."""
    check_tensors(name, input)
    if expected:
        return
    check = functools.partial(getattr(torch.nn.functional, name), p=p, training=False)
    example = torch.empty((1,) * input.dim(), device="meta")
    if torch.compiler.is_compiling():  # Dynamo does not trace what records warnings
        check(example)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check(example)
    for each in said:
        warnings.warn(each.message, stacklevel=3)


def _apply(
    name: str,
    input: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    features: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    check_tensors(name, input, optional=(residual,))
    p = as_float("p", p)
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    require(p == p, f"dropout probability has to be between 0 and 1, but got {p}")
    p = p if as_bool("training", training) else 0.0
    if residual is not None:
        if inplace:
            raise ValueError(f"{name}: a residual is not added in place")
        check_floating(name, input)
        return _dropout.apply(input, residual, p, features)
    if p == 0 or not input.numel():
        # As torch's: of a single image a view, which it has looked at as a batch of one.
        return input.unsqueeze(0).squeeze(0) if features == 1 and not inplace else input
    check_floating(name, input)
    require(p == 1 or input.dim() >= features, "Feature dropout requires at least 2 dimensions in the input")
    return _dropout.apply_(input, p, features) if inplace else _dropout.apply(input, None, p, features)
