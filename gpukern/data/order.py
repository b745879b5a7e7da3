"""The order in which samples come, and which of them a process gets."""

from __future__ import annotations

import torch

from gpukern.ops._dropout.reference import philox
from gpukern.runtime.integers import cdiv

_LOW = 2**32 - 1
#: Beside the steps of augmentation, whose numbers have the same key.
_ORDERS = 2**62


def permutation(count: int, seed: int, epoch: int, device: torch.device) -> torch.Tensor:
    """A random order of so many samples, int64: the same on every device, by the seed and the epoch alone.

    Each sample gets 62 random bits, and they are sorted: two that are equal, once in 4 million orders of a million
    samples, stay in their order.
    """
    places = torch.arange(count, device=device)
    high, low, _, _ = philox(places & _LOW, places >> 32, seed, _ORDERS + epoch)
    return torch.argsort((high << 30) | (low >> 2), stable=True)


def share(order: torch.Tensor, start: int, whole: int, rank: int, world_size: int, even: bool) -> torch.Tensor:
    """What process ``rank`` gets of the ``whole`` samples (of all processes) of a batch, from ``start`` on.

    Of fewer that are left all get as many, if ``even``: some of the first ones again. Else the last ones get fewer.
    """
    left = min(whole, len(order) - start)
    each = cdiv(left, world_size)
    first = start + rank * each
    if not even or first + each <= start + left:
        return order[first : min(first + each, start + left)]
    return order[torch.arange(first, first + each, device=order.device) % len(order)]
