"""Convolutions, linear layers and what may follow them, whichever operator they were captured as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gpukern.conv import POOL_WINDOWS, same_padding, same_paddings
from gpukern.fusion.program import arguments, aten, is_call, tensor_of
from gpukern.ops._activation.reference import IN_TORCH
from gpukern.runtime.tensors import KERNEL_DTYPES

_CONVOLUTIONS: dict[Any, tuple[str, int]] = {
    aten.conv1d.default: ("conv1d", 1),
    aten.conv1d.padding: ("conv1d", 1),
    aten.conv2d.default: ("conv2d", 2),
    aten.conv2d.padding: ("conv2d", 2),
    aten.conv3d.default: ("conv3d", 3),
    aten.conv3d.padding: ("conv3d", 3),
    aten.conv_transpose1d.default: ("conv_transpose1d", 1),
    aten.conv_transpose2d.input: ("conv_transpose2d", 2),
    aten.conv_transpose3d.input: ("conv_transpose3d", 3),
}
_TARGETS = (*_CONVOLUTIONS, aten.convolution.default, aten.linear.default)


@dataclass(frozen=True)
class Product:
    """``node`` multiplies ``input`` by ``weight``, [K, C/groups, ...] or, ``transposed``, [C, K/groups, ...].

    ``kind`` is "conv2d", "conv_transpose1d", "linear" and so on, ``spatial`` the number of its window's dimensions.
    ``padding`` has a number for each, or is torch's word. ``zeros`` lie around the image beside it: see
    :func:`zeros_around`.
    """

    node: Node
    kind: str
    spatial: int
    input: Node
    weight: Any
    bias: Any
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    zeros: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def transposed(self) -> bool:
        return "transpose" in self.kind

    @property
    def has_channels(self) -> bool:
        """Whether the channels of input and output are dimension 1: not of a linear layer over more than rows."""
        rank = 2 if self.kind == "linear" else self.spatial + 2
        return tensor_of(self.node).dim() == rank == tensor_of(self.input).dim()

    @property
    def padded(self) -> bool:
        """Whether zeros surround the input."""
        return any(self.zeros) or (self.padding == "same" if isinstance(self.padding, str) else any(self.padding))

    @property
    def operator(self) -> str:
        """The operator that computes it when fused: gpukern's, or torch's if gpukern has none."""
        if tensor_of(self.node).dtype not in KERNEL_DTYPES:
            return f"aten::{'linear' if self.kind == 'linear' else 'convolution'}"
        if self.kind == "linear":
            return "gpukern::linear"
        if not self.has_channels:
            return "aten::convolution"
        if self.spatial == 3:
            return f"gpukern::{self.kind}"
        return "gpukern::conv_transpose2d" if self.transposed else "gpukern::conv2d"

    @property
    def takes_activation(self) -> bool:
        return self.operator.startswith("gpukern")

    @property
    def takes_residual(self) -> bool:
        return self.takes_activation and self.kind != "linear"

    @property
    def is_of_images(self) -> bool:
        """Whether gpukern's 2-D convolution computes it, on images: padded differently on each side, and pooled."""
        return self.operator == "gpukern::conv2d" and self.spatial == 2

    def window_padding(self, kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Zeros at the top, bottom, left and right, of one dimension as of an image of height 1."""
        top, bottom, left, right = (own + other for own, other in zip(self._own(kernel), self.zeros, strict=True))
        return top, bottom, left, right

    def _own(self, kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
        if isinstance(self.padding, str):
            if self.padding == "valid":
                return 0, 0, 0, 0
            return same_padding(image(kernel, 1), image(self.dilation, 1))
        vertical, horizontal = image(self.padding, 0)
        return vertical, vertical, horizontal, horizontal

    def volume_padding(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Zeros before and after each dimension of a volume."""
        if isinstance(self.padding, str):
            return (0,) * 6 if self.padding == "valid" else same_paddings(kernel, self.dilation)
        return tuple(pad for pad in self.padding for _ in range(2))


def image(sizes: tuple[int, ...], of_height: int) -> tuple[int, int]:
    """Sizes of an image, for those of a sequence too."""
    height, width = sizes if len(sizes) == 2 else (of_height, *sizes)
    return height, width


def is_product(node: Any) -> bool:
    return is_call(node, *_TARGETS)


def product(node: Node) -> Product:
    given = arguments(node)
    if node.target is aten.linear.default:
        return Product(node, "linear", 0, given["input"], given["weight"], given["bias"])
    if node.target is aten.convolution.default:
        spatial = tensor_of(given["weight"]).dim() - 2
        kind = f"conv{'_transpose' if given['transposed'] else ''}{spatial}d"
    else:
        kind, spatial = _CONVOLUTIONS[node.target]

    def expanded(name: str) -> Any:
        sizes = given.get(name, [0])
        if isinstance(sizes, str):
            return sizes
        return tuple(sizes) * spatial if len(sizes) == 1 else tuple(sizes)

    windows = {name: expanded(name) for name in ("stride", "padding", "dilation", "output_padding")}
    return Product(
        node, kind, spatial, given["input"], given["weight"], given["bias"], **windows, groups=given["groups"]
    )


def zeros_around(node: Node) -> tuple[int, int, int, int] | None:
    """Top, bottom, left, right: the zeros that a call puts around images, their numbers known; None for all others."""
    if not is_call(node, aten.constant_pad_nd.default, aten.pad.default) or tensor_of(node).dim() != 4:
        return None
    given = arguments(node)
    sizes = [*given["pad"], 0, 0, 0]
    of_zeros = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    if not of_zeros or any(type(size) is not int or size < 0 for size in sizes) or any(sizes[4:]):
        return None
    left, right, top, bottom = sizes[:4]
    return top, bottom, left, right


# ---- what may follow ------------------------------------------------------------------------------------------------

_ACTIVATIONS = {target: name for name, target in IN_TORCH.items()}
_BOUNDS: dict[Any, str] = {(0.0, 6.0): "relu6", (0.0, None): "relu"}


def activation(node: Any) -> tuple[str, float] | None:
    """The name that gpukern has for a call, with the negative slope; None if gpukern does not have it."""
    if is_call(node, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default):
        given = arguments(node)
        low, high = (given.get("min_val", given.get("min")), given.get("max_val", given.get("max")))
        name = _BOUNDS.get((low, high))
        return (name, 0.0) if name else None
    if not is_call(node, *_ACTIVATIONS):
        return None
    name, given = _ACTIVATIONS[node.target], arguments(node)
    slope = float(given["negative_slope"]) if name == "leaky_relu" else 0.0
    if slope < 0:
        return None
    return ("gelu_tanh" if given.get("approximate") == "tanh" else name), slope


#: Monotone activations, which commute with the maximum, so that they may come after a max pool too.
MONOTONE = frozenset(("relu", "relu6", "leaky_relu", "sigmoid", "hardsigmoid", "tanh"))

#: By the number of dimensions: maximum, average, adaptive average.
_POOLS = {
    1: (aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default),
    2: (aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default),
}


def pool(node: Node, dimensions: int = 2) -> tuple[Any, tuple] | None:
    """gpukern's operator for a pool of images, with its arguments; None for other calls.

    Of one dimension, it is the operator for images of height 1.
    """
    targets = _POOLS[dimensions]
    if not is_call(node, *targets) or tensor_of(node).dtype not in KERNEL_DTYPES:
        return None
    if tensor_of(node).dim() != dimensions + 2:
        return None
    given = arguments(node)
    input = node.args[0]

    def sizes(name: str, of_height: int = 1) -> list[int]:
        found = list(given[name])
        return [of_height] * (2 - dimensions) + (found * dimensions if len(found) == 1 else found)

    maximum, _, adaptive = targets
    if node.target is adaptive:
        return torch.ops.gpukern.adaptive_avg_pool2d.default, (input, sizes("output_size"))
    kernel = sizes("kernel_size")
    windows = (kernel, sizes("stride") if given["stride"] else kernel, sizes("padding", 0))
    if node.target is maximum:
        return torch.ops.gpukern.max_pool2d.default, (input, *windows, sizes("dilation"), given["ceil_mode"])
    divisor = given["count_include_pad"], given.get("divisor_override")
    return torch.ops.gpukern.avg_pool2d.default, (input, *windows, [1, 1], given["ceil_mode"], *divisor)


def is_epilogue_pool(node: Any) -> bool:
    """Whether a call takes the maximum of each 2 × 2 pixels, which gpukern::conv2d_max_pool2d does after a product."""
    target, found = pool(node) or (None, ())
    if target is not torch.ops.gpukern.max_pool2d.default:
        return False
    return tuple(tuple(each) if isinstance(each, (list, tuple)) else each for each in found[1:]) == POOL_WINDOWS
