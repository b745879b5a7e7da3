"""The two functions that most users need. Their implementation is imported when they are called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from gpukern.fusion.model import FusedModel


def fuse(
    model: torch.nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    calibrate: Iterable[Any] | None = None,
    calibration: str | None = None,
    target: float | tuple[Callable[[FusedModel], float], float] | None = None,
    precision: torch.dtype | None = None,
    channels_last: bool = True,
    cuda_graph: bool = False,
    dynamic_batch: bool = True,
    verify: bool = True,
    measure: bool = True,
    skip: Sequence[str] = (),
    strict: bool = False,
) -> FusedModel:
    """``model`` for inference, its layers fused: ``act(scale · (x ∗ w + b) + shift + residual)`` becomes one operator.

    Batch norms in evaluation mode, and constants that scale or shift channels, are folded into the convolution,
    transposed convolution or linear layer before them (or after them, where that pads nothing), in fp64 from the
    original weights. Additions of equal shapes and activations become epilogues of gpukern's kernels, constant weight
    computations (weight_norm, spectral_norm, parametrizations) are done once, dropout goes. What stays as it was is
    listed in the report with the reason. ``model`` itself is not touched.

    Parameters
    ----------
    model:
        any module that torch.export captures; one in training mode is put in evaluation mode on the copy, with a
        warning.
    example_inputs:
        a tensor, or a tuple of the arguments. Random values prove more than constant ones, which are exchanged for
        random ones in the proof, as are those for which the original is nowhere finite; a note says so. Numbers, flags
        and words become constants of the fused model.
    kwargs:
        the arguments of the example that are given by name, as for :func:`torch.export.export`: ``{"mask": mask}``.
    dtype:
        what to compute in, the model's by default. A layer whose weights the dtype cannot hold stays in float32.
        ``"int8"`` (or ``torch.int8``) and ``"fp8"`` (``torch.float8_e4m3fn``) store weights and activations in eight
        bits where that costs less than ``target`` allows; the next four arguments are for them.
    calibrate:
        batches as the model takes them, any iterable, of which it is enough to go through once: a DataLoader, whose
        labels are left out, a list of tensors, a generator. Ranges are measured on one half, and the other half is kept
        aside for the proof. Some hundred images are enough.
    calibration:
        how the range of a tensor is taken from what was seen: ``"max"``, ``"percentile"`` (99.99 %), ``"mse"``,
        ``"entropy"``, or ``"auto"``, the default: for each tensor the one of them by which the layers that read it have
        the least error.
    target:
        what the model in eight bits must reach on the batches kept aside: 0.99, the default, is the share of rows with
        the original's argmax (of a model without such rows, 1 − ‖y − truth‖² / ‖truth‖²), and ``(metric, least)`` a
        function of a :class:`FusedModel` that returns a number, and the least that this may be. The groups that cost
        most are given back to 16 bits until it holds.
    precision:
        what everything else computes in: torch.float16, the default, or torch.bfloat16.
    channels_last:
        keep images in that layout; weights are packed once.
    cuda_graph:
        on a CUDA device, capture the launches per input shape and replay them.
    dynamic_batch:
        leave the batch size free. Where the model does not allow that, a note in the report says so. Inputs whose first
        dimension is another than that of the images have no batch.
    verify:
        compare with the original in float64: see :mod:`gpukern.fusion.verify`; where the batch is free, at other sizes
        too, and a size of 0 or 1 that the original treats as a case of its own is refused by calls. Without it none of
        that is done.
    measure:
        on a CUDA device, time the model as it was and as it is, count their kernels, and put that in the report. A
        hundred passes of each.
    skip:
        patterns, as of :mod:`fnmatch`, of paths of modules that stay as they are, with all inside: ``["head.*"]``. A
        note names those that are the path of none.
    strict:
        raise where anything that follows a convolution or linear layer stays unfused, unless it was skipped.

    Raises
    ------
    TypeError for what is no module or no list of patterns, and for arguments that the model does not take; ValueError
    for an unknown dtype, for options of eight bits without that and batches that the model does not take or that are
    not finite, RuntimeError for ``cuda_graph`` without a CUDA device; FusionError if the model lacks its
    weights or cannot be copied or captured, if the verification fails (it names the fused group to blame, and has the
    report as its ``report``) or can prove nothing (the original is random or keeps a state, or returns nothing finite,
    or the same for another example), if the target cannot be met, or with ``strict``.
    """
    from gpukern.fusion.given import bare
    from gpukern.fusion.pipeline import run
    from gpukern.fusion.quantization.settings import settings_for

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse() takes a torch.nn.Module, got {type(model).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict of arguments by their names, got {type(kwargs).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip takes a list of patterns, got the word {skip!r}")
    options = {"calibrate": calibrate, "calibration": calibration, "target": target, "precision": precision}
    eight = settings_for(dtype, options, verify)
    wide = eight.precision if eight is not None else cast("torch.dtype | None", dtype)
    return run(
        bare(model),
        tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,),
        dict(kwargs or {}),
        dtype=wide,
        eight=eight,
        channels_last=channels_last,
        cuda_graph=cuda_graph,
        dynamic_batch=dynamic_batch,
        verify=verify,
        measure=measure,
        skip=skip,
        strict=strict,
    )


def load(path: str | os.PathLike[str], *, cuda_graph: bool = False) -> FusedModel:
    """The fused model that :meth:`FusedModel.save` wrote to ``path``; ``cuda_graph`` as for :func:`fuse`.

    FileNotFoundError if there is no such file; FusionError if it is damaged, or something else.
    """
    from gpukern.fusion.artifact import read
    from gpukern.fusion.model import FusedModel

    return FusedModel(*read(path), cuda_graph)
