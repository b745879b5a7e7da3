"""Check of a model's layers, forward and every gradient, beside float64: whose rounding errors are more than rounding.

See :func:`check`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gpukern.checking.errors import CheckError

if TYPE_CHECKING:
    from gpukern.checking.report import CheckReport

__all__ = ["CheckError", "check"]


def check(
    model: torch.nn.Module,
    inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    training: bool | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> CheckReport:
    """Compute ``model`` and all of its gradients by gpukern, by torch and in float64, and compare them layer by layer.

    Each layer is judged twice. *Alone*, all three get the inputs, and the gradient of the output, that it has in the
    float64 run, rounded to ``dtype``: what differs is the layer's own error, and its bound is derived from the number
    of terms that its sums have, the unit roundoff and the values (:mod:`gpukern.checking.bounds`). *In the model* all
    layers before it, and for gradients all behind it, have erred too; the bound is what errors as large as the bounds
    of the layers alone add up to (:mod:`gpukern.checking.whole`).

    Parameters
    ----------
    model:
        any module; copies of it are computed with, it stays as it is. On a CUDA device torch's layers are those of
        cuDNN and cuBLAS, and gpukern's are its kernels; on a CPU gpukern's are emulated with ``GPUKERN_EMULATE=1``,
        and plain torch without.
    inputs:
        a tensor, or a tuple of the arguments; use random values.
    kwargs:
        arguments by name.
    dtype:
        float32, float16 or bfloat16: of weights and activations. The model's own by default. Whether products of
        float32 are TF32 follows torch's flags.
    channels_last:
        keep images in that layout.
    training:
        the mode of the model, its own by default. Dropout and stochastic depth are off in both modes.
    seed:
        of the gradient of the outputs, which is random, and of all random numbers that the model may draw.
    progress:
        called with the name of what is being done, and the number of steps that are done and in all.

    Returns
    -------
    A :class:`~gpukern.checking.report.CheckReport`: ``passed``, ``findings`` (which layer leaves its bound, with which
    tensor, by whom), ``layers``, ``to_html``, ``to_json``; it prints as a table.

    Raises
    ------
    TypeError for what is no module; ValueError for another dtype; CheckError if the model cannot be copied, fails for
    the inputs in float64, or returns nothing that is floating point.
    """
    from gpukern.checking.pipeline import run

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"check() takes a torch.nn.Module, got {type(model).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict of arguments by their names, got {type(kwargs).__name__}")
    return run(
        model,
        tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,),
        dict(kwargs or {}),
        dtype=dtype,
        channels_last=channels_last,
        training=model.training if training is None else training,
        seed=seed,
        progress=progress or (lambda what, done, total: None),
    )
