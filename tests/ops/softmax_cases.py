"""What the tests of softmax and of cross entropy share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest.mock import patch

import torch

from gpukern.ops._softmax import planner, tiles
from gpukern.runtime.mode import Mode, mode_of

#: Rows of masked, infinite and undefined logits.
INFINITIES = [
    [0, -math.inf, 1],
    [-math.inf] * 3,
    [math.inf, 0, 1],
    [math.nan, 0, 1],
    [-math.inf, 0, 1],
    [-math.inf, -math.inf, 2],
]


@contextlib.contextmanager
def short_tiles(short: bool = True) -> Iterator[None]:
    """Let rows of more than four numbers be longer than a tile, if ``short``."""
    with contextlib.ExitStack() as stack:
        if short:
            for name, value in (("_MOST", 4), ("_LONG", 4)):
                stack.enter_context(patch.object(planner, name, value))
            stack.callback(_forget)
        _forget()
        yield


def _forget() -> None:
    planner.plan.cache_clear()
    tiles._prepared.cache_clear()


def lengths(where: torch.device, dtype: torch.dtype = torch.float32) -> tuple[bool, ...]:
    """Whether tiles are short: both, but where that makes no difference, or none that the dtype makes."""
    kernels = mode_of(torch.empty(0, device=where)) is not Mode.REFERENCE
    return (False, True) if kernels and dtype is torch.float32 else (False,)
