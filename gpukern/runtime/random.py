"""Where a call's random numbers begin, drawn from PyTorch's default generator of the device.

Kernels make random numbers by counting (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): number i
of a call follows from a key, an offset and i alone, so that a backward pass makes again what forward drew, and nothing
is stored. Key and offset come from PyTorch's generator, which advances: ``torch.manual_seed``, ``torch.cuda.fork_rng``
and activation checkpointing have the effect that they have on torch's own functions.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from gpukern.runtime.operator import needs_operator

#: Numbers that a generator's offset counts for one turn of the counter, as CUDA generators do: they want multiples.
_A_TURN = 4
_lock = threading.Lock()


class Stream(NamedTuple):
    """The numbers of one call: ``state``, int64 [2] of key and offset on the tensor's device, or where it is None the
    two numbers themselves, as int64 too."""

    state: torch.Tensor | None
    key: int = 0
    offset: int = 0


def draw(tensor: torch.Tensor) -> Stream:
    """Return a stream that no other call gets, from the default generator of ``tensor``'s device.

    It is drawn by an operator of torch's where one must be seen: tracers record it, ``vmap`` applies its
    ``randomness``, and a CUDA graph draws anew in each replay. Elsewhere on a GPU the generator is read and advanced on
    the host, which saves the launch. No other kernel has the same numbers: torch's count alike, from other offsets.
    """
    device = tensor.device
    if needs_operator((tensor,)) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return Stream(torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device))
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        with _lock:
            offset = generator.get_offset()
            generator.set_offset(offset + _A_TURN)
        return Stream(None, _signed(generator.initial_seed()), offset // _A_TURN)
    if device.type == "meta":
        return Stream(None)
    return Stream(None, *torch.randint(2**63 - 1, (2,), dtype=torch.int64).tolist())


def _signed(number: int) -> int:
    """Return 64 bits as an int64, which operators take."""
    return number - 2**64 if number >= 2**63 else number
