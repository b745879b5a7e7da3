"""Measurement of the fastest plans on this GPU: ``gpukern tune``, and :func:`tune` from Python.

- ``record``: the convolutions and matrix products of a model;
- ``measure``: one of them, with every plan that could be the fastest, each checked before it is timed;
- ``session``: one after the other, each saved when it is done;
- ``report``: the results; ``sources`` and ``command``: the command line.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gpukern.conv import Direction
from gpukern.tune.measurement import Timer
from gpukern.tune.record import calls_of
from gpukern.tune.report import Report
from gpukern.tune.session import TuneError, check_device, tune_calls

__all__ = ["Direction", "Report", "TuneError", "tune"]


def tune(
    model: torch.nn.Module,
    *example_inputs: Any,
    directions: Collection[Direction] = tuple(Direction),
    folder: Path | str | None = None,
    minutes: float = float("inf"),
    again: bool = False,
    progress: bool = True,
    timer: Timer | None = None,
) -> Report:
    """Measure the plans of all convolutions and linear layers of ``model``, and keep the fastest for calls to come.

    A copy of the model, converted by :func:`gpukern.convert`, runs once on ``example_inputs``, and backwards if
    ``directions`` include gradients: shapes, layouts, dtypes, ``torch.autocast`` and the TF32 flags are those of that
    run. Plans serve every batch size whose nearest power of two is the same.

    Parameters
    ----------
    model, example_inputs:
        on one CUDA device. Neither is changed.
    directions:
        of :class:`gpukern.tune.Direction`; forward alone for a model that is not trained.
    folder:
        where to keep the plans: by default ``$GPUKERN_PLANS``, else the user's cache, which are where calls look.
    minutes:
        no problem is begun after them. What was measured before with the same versions is not measured again unless
        ``again``, so that the next run goes on where this one stopped.
    progress:
        show a progress bar, or lines where there is no terminal, on standard error.
    timer:
        takes the place of :func:`triton.testing.do_bench`: seconds of a call, which has a ``plan``.

    Raises
    ------
    TuneError without a GPU, when a plan took the device away, or if the file of plans cannot be written or belongs to
    another version. What the model raises comes through.
    """
    device = _device_of(model, example_inputs)
    check_device(device, timer)
    calls = calls_of(model, example_inputs, directions)
    return tune_calls(calls, device, folder=folder, minutes=minutes, again=again, progress=progress, timer=timer)


def _device_of(model: torch.nn.Module, inputs: tuple) -> torch.device:
    tensors = (*model.parameters(), *(value for value in inputs if isinstance(value, torch.Tensor)))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
