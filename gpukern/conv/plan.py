"""A plan for a convolution, and what it depends on: plain values, without torch or Triton."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Direction(enum.Enum):
    FORWARD = "forward"
    INPUT_GRAD = "input gradient"
    WEIGHT_GRAD = "weight gradient"


class Variant(str, enum.Enum):
    """The kernel, and the order in which it walks its sum; see the families in ``families/``.

    A value stays when its family is removed: plan files name it.
    """

    TAPS = "taps"
    FLAT = "flat"
    DIRECT = "direct"
    GEMM = "gemm"
    BOX = "box"
    BATCH_BOX = "batch box"
    STEM = "stem"
    GROUPED = "grouped"
    DEPTHWISE = "depthwise"
    DEPTHWISE_1D = "depthwise 1d"
    WARP_SPECIALIZED = "warp specialized"


class Layout(enum.Enum):
    """Memory-layout class of a tensor [N, C, H, W] or filter [K, C/groups, R, S], as finely as kernels distinguish."""

    #: Stride 1 along the channels; the pixels collapse to one dimension; it and the start are multiples of 16 bytes.
    NHWC = "channels_last"
    #: Stride 1 along the channels, every other stride and the start multiples of 16 bytes: a crop of channels_last.
    NHWC_STRIDED = "runs of channels"
    #: Stride 1 along the channels, the rest odd.
    CHANNELS = "odd runs of channels"
    #: Stride 1 along the first dimension, the second's and the start multiples of 16 bytes: a transposed matrix.
    TRANSPOSED = "transposed"
    #: Dense NCHW, the start a multiple of 16 bytes.
    NCHW = "NCHW"
    STRIDED = "strided"

    @property
    def has_runs(self) -> bool:
        """Whether a descriptor of channels_last boxes can describe a tensor of this layout."""
        return self in (Layout.NHWC, Layout.NHWC_STRIDED)


@dataclass(frozen=True)
class Operands:
    """Properties of the tensors, besides their sizes, on which a plan depends.

    ``dtype`` is that of the products: "float32", "float16" or "bfloat16", which all three tensors have; in a quantized
    launch the second tensor's, "int8" or "float8_e4m3fn" too. ``precision`` is "tf32" where products of float32 may be,
    "ieee" where they may not and for the other dtypes; a plan may use "tf32x3" instead of "ieee" (see
    :attr:`ConvPlan.precision`). ``first`` and ``second`` are what kernels take: x and w, dy and w, or dy and x.
    """

    dtype: str
    precision: str = "ieee"
    first: Layout = Layout.NHWC
    second: Layout = Layout.NHWC
    output: Layout = Layout.NHWC
    #: dtypes of first and output in a quantized launch: see :mod:`gpukern.conv.requantize`.
    first_dtype: str = ""
    output_dtype: str = ""

    @property
    def quantized(self) -> bool:
        """Whether sums are scaled, and an output perhaps rounded to 8 bits: only some families can."""
        return bool(self.first_dtype)

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """dtypes of first, second and output."""
        return self.first_dtype or self.dtype, self.dtype, self.output_dtype or self.dtype

    @property
    def mixed(self) -> bool:
        """Whether the first operand is converted to the second's dtype in registers."""
        return self.quantized and self.first_dtype != self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element as it is multiplied."""
        return _ITEMSIZES[self.dtype]

    @property
    def itemsizes(self) -> tuple[int, int, int]:
        """Bytes of an element of first, second and output."""
        first, second, output = (_ITEMSIZES[dtype] for dtype in self.dtypes)
        return first, second, output

    @property
    def types(self) -> str:
        """The dtypes in words: "float16", "int8", "int8 -> float16", "int8 * float16 -> int8"."""
        first, second, output = self.dtypes
        operands = second if first == second else f"{first} * {second}"
        return operands if output == operands else f"{operands} -> {output}"

    @property
    def kind(self) -> str:
        """The rate that bounds the products: a key of :attr:`gpukern.runtime.device.Peaks.matrix_rates`."""
        if self.dtype == "float8_e4m3fn":
            return "float8"
        return "tf32" if self.precision == "tf32" else self.dtype

    def packed(self, pack: Pack, channels: tuple[int, int, int]) -> Operands:
        """Return the operands with the tensors selected by ``pack`` copied into dense runs of ``channels`` channels."""
        first, second, output = (
            (Layout.CHANNELS if count * itemsize % 16 else Layout.NHWC) if copied else layout
            for layout, itemsize, copied, count in zip(
                (self.first, self.second, self.output), self.itemsizes, pack, channels, strict=True
            )
        )
        return Operands(self.dtype, self.precision, first, second, output, self.first_dtype, self.output_dtype)


_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}


#: Whether each of first, second and output passes through a copy in channels_last.
Pack = tuple[bool, bool, bool]


@dataclass(frozen=True)
class ConvPlan:
    """One kernel and everything it can be launched with.

    A tile is ``block_m`` × ``block_n``: output pixels × output channels, in the weight gradient output channels ×
    (tap, input channel). Its sum is walked in steps of ``block_k``; ``splits`` programs share one sum. ``box`` is the
    tile's images × rows × columns if it is a box. ``pack`` gives the tensors copied into channels_last before or after.

    ``precision`` of products of float32: "tf32"; or full, "ieee" outside the tensor cores or "tf32x3" on them, as
    the sum of three products of halves, each with 11 significant bits: errors of 2⁻²² of a product instead of 2⁻²⁴.
    """

    variant: Variant
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    splits: int = 1
    box: tuple[int, int, int] | None = None
    pack: Pack = (False, False, False)
    precision: str = "ieee"

    @property
    def own_box(self) -> tuple[int, int, int]:
        """Return ``box``, for kernels whose plans all have one; ValueError without."""
        if self.box is None:
            raise ValueError(f"{self} has no box")
        return self.box

    @property
    def sums_per_thread(self) -> int:
        """Number of the tile's sums that a thread holds."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    def __str__(self) -> str:
        words = f"{self.variant.value} {self.block_m}×{self.block_n}×{self.block_k}"
        if self.box:
            words += f" (box {'×'.join(map(str, self.box))})"
        words += f", {self.num_warps} warps"
        if self.num_stages > 1:
            words += f", {self.num_stages} stages"
        if self.splits > 1:
            words += f", {self.splits} splits"
        if copies := sum(self.pack):
            words += f", {copies} {'copy' if copies == 1 else 'copies'}"
        return words
