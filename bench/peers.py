"""Peers that gpukern is measured against: torch's own function, in each of its best settings, on the same values.

cuDNN (which PyTorch calls) gets both layouts with ``cudnn.benchmark`` on; ``torch.compile`` its default mode and
max-autotune, whose own CUDA graphs are off because every candidate runs in one of ours; FlagGems runs where it is
installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.suite import Implementation, Tensors
from gpukern.runtime.precision import fp32_products

#: gpukern's networks in 8 bits, beside its own in 16.
EIGHT_BITS = ("int8", "fp8")
#: By what they cost: the compiling ones take seconds (max-autotune: up to a minute) a case before anything is timed.
PEERS = ("library", "compile", "max-autotune", "flaggems", *EIGHT_BITS)


@contextlib.contextmanager
def torch_at_its_best(dtype: str) -> Iterator[None]:
    """The settings of torch under which every candidate runs. gpukern follows the TF32 ones too."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = True, False
    precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with fp32_products(precision, precision):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Switch cuDNN off for the reference: it is a peer, and it would first try all its algorithms for float64."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def torch_peers(
    function: Callable[..., Any],
    library: str,
    layout: str,
    peers: Sequence[str],
    device: torch.device,
    prepare: Callable[[Tensors], Tensors] = tuple,
) -> list[Implementation]:
    """torch's ``function`` in the settings that ``peers`` names. ``library`` is who computes it on a GPU.

    ``prepare`` makes what the function takes of a set of tensors, in whichever layout.
    """
    found = []
    if "library" in peers:
        name = library if device.type == "cuda" else "torch"
        found += [_in_layout(function, name, other, prepare) for other in both_layouts(layout)]
    if "compile" in peers:
        found.append(compiled(function, "torch.compile", layout))
    if "max-autotune" in peers:
        found.append(compiled(function, "torch.compile max-autotune", layout, "max-autotune-no-cudagraphs"))
    if "flaggems" in peers:
        found.append(_flaggems(function, layout))
    return [replace(peer, prepare=prepare) if peer.prepare is tuple else peer for peer in found]


def to_layout(layout: str, tensors: Tensors) -> Tensors:
    """The same values, images and filters in ``layout``."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return tuple(t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors)


def both_layouts(layout: str) -> tuple[str, ...]:
    """The case's own first; a matrix has none."""
    return (layout, "NCHW" if layout == "channels_last" else "channels_last") if layout else ("",)


def _in_layout(
    function: Callable[..., Any], library: str, layout: str, prepare: Callable[[Tensors], Tensors]
) -> Implementation:
    if not layout:
        return Implementation(library, "as PyTorch calls it", function)
    setting = f"{layout}, cudnn.benchmark on, deterministic off" if "cuDNN" in library else layout
    return Implementation(f"{library} {layout}", setting, function, lambda tensors: prepare(to_layout(layout, tensors)))


def compiled(function: Callable[..., Any], name: str, layout: str, mode: str | None = None) -> Implementation:
    """``function`` through torch.compile, at the first call."""

    @functools.cache
    def make() -> Callable[..., Any]:
        return compile_for_these_shapes(function, mode)

    setting = f"{layout + ', ' if layout else ''}mode {mode or 'default'}, static shapes"
    return Implementation(name, setting, lambda *tensors: make()(*tensors), slow=True)


def compile_for_these_shapes(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile's best: no allowance for other shapes."""
    return torch.compile(function, mode=mode, dynamic=False)


def forget_compiled() -> None:
    """Between rows: what was compiled for one would count against the next one's limit of recompilations.

    Not between two candidates of a row: the first would be compiled again while it is timed.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _flaggems(function: Callable[..., Any], layout: str) -> Implementation:
    if importlib.util.find_spec("flag_gems") is None:
        return Implementation("FlagGems", layout, function, missing="flag_gems is not installed")

    def through_flaggems(*tensors: torch.Tensor) -> Any:
        import flag_gems

        with flag_gems.use_gems():
            return function(*tensors)

    return Implementation("FlagGems", layout, through_flaggems)
