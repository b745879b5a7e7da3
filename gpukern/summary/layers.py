"""Properties of single layers: their windows, notation, and uncovered inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.nn.utils import parametrize

from gpukern.summary.table import Size


@dataclass(frozen=True)
class Window:
    """A sliding window; ``padding`` is the total of both sides of a dimension."""

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool = False


def dimensions(layer: torch.nn.Module) -> int | None:
    """Spatial dimensions of a convolution, a pooling or a normalizing layer; None for layers without fixed ones."""
    if isinstance(layer, _ConvNd):
        return len(layer.kernel_size)
    for kind in type(layer).__mro__:
        family = kind.__module__.rpartition(".")[2]
        if kind.__module__.startswith("torch.nn.modules.") and family in ("pooling", "batchnorm", "instancenorm"):
            number = kind.__name__[-2:]  # MaxPool2d
            # BatchNorm1d takes features too.
            return int(number[0]) if number in ("1d", "2d", "3d") and kind.__name__ != "BatchNorm1d" else None
    return None


def window(layer: torch.nn.Module) -> Window | None:
    """The window of a convolution or a pooling layer, None for every other layer."""
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, (_ConvNd, _MaxPoolNd, _AvgPoolNd)):
        return None

    spatial = dimensions(layer) or 0

    def each(value: Any) -> Size:
        return (value,) * spatial if isinstance(value, int) else tuple(value)

    kernel, dilation = each(layer.kernel_size), each(getattr(layer, "dilation", 1))
    if layer.padding == "same":
        padding = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    else:
        padding = tuple(2 * p for p in each(0 if layer.padding == "valid" else layer.padding))
    return Window(kernel, each(layer.stride), padding, dilation, getattr(layer, "ceil_mode", False))


def describe(layer: torch.nn.Module) -> str:
    """Describe the layer in the lecture's notation."""
    kind = parametrize.type_before_parametrizations(layer).__name__
    if isinstance(layer, torch.nn.Linear):
        return f"{kind} ({layer.in_features} -> {layer.out_features})"
    found = window(layer)
    if found is None:
        return kind
    if not isinstance(layer, _ConvNd):
        padding = f", P={_short(layer.padding)}" if any(found.padding) else ""
        return f"{kind.removesuffix('2d')}(K={_short(found.kernel)}{padding}, S={_short(found.stride)})"
    options = f", D={_short(found.dilation)}" if set(found.dilation) != {1} else ""
    options += f", G={layer.groups}" if layer.groups != 1 else ""
    return (
        f"{kind.removesuffix('2d')} (C_out={layer.out_channels}, K={_short(found.kernel)}, P={_short(layer.padding)}, "
        f"S={_short(found.stride)}{options})"
    )


def misfits(layer: str, window: Window, input_size: Size) -> Iterator[str]:
    """A sentence for each way in which the window does not cover a dimension evenly."""
    if window.ceil_mode:
        return
    names = ("row", "column") if len(input_size) == 2 else ("position",) * len(input_size)
    unread_names: dict[tuple[str, str], list[str]] = {}
    for name, n, k, s, p, d in zip(
        names, input_size, window.kernel, window.stride, window.padding, window.dilation, strict=True
    ):
        extent = d * (k - 1) + 1
        unread = (n + p - extent) % s
        if unread:
            result = f"{(n + p - extent) / s + 1:.2f}".rstrip("0")
            formula = f"({n}{f' + {p}' if p else ''} − {extent})/{s} + 1 = {result} ✗"
            # They lie at the end, where the second half of the padding is.
            of = "padding" if unread <= (p + 1) // 2 else "padded input" if p else "input"
            unread_names.setdefault((formula, of), []).append(f"{unread} {name}s" if unread > 1 else name)
    for (formula, of), counts in unread_names.items():
        yield f"{layer} does not fit: {formula}, torch ignores the last {' and '.join(counts)} of the {of}"


def weight_size(layer: torch.nn.Module) -> Size:
    """Return [in, out] of a linear layer, the shape of the weight of others."""
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


def is_whole(layer: torch.nn.Module) -> bool:
    """Whether no layers are inside: modules that compute its weights (weight_norm, spectral_norm) belong to it."""
    return all(name == "parametrizations" for name, _ in layer.named_children())


def parameters(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The layer's own, without those of layers inside."""
    within = getattr(layer, "parametrizations", None) if parametrize.is_parametrized(layer) else None
    return [*layer.parameters(recurse=False), *(within.parameters() if within is not None else ())]


def _short(value: Any) -> str:
    """``5`` for (5, 5), ``1×7`` for (1, 7)."""
    if isinstance(value, (int, str)):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "×".join(str(n) for n in value)
