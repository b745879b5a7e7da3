"""Values of a patch classifier as a dense network has them.

For an output of P rows, a value of h rows in the patch and a dilation d has P + d·(h − 1) rows in the dense network:
row i + r·d is row r of the patch at i. Where the stride of a layer does not divide, rows that no patch reads follow,
the *excess*. Columns likewise, independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpukern.densify.errors import DenseError

Pair = tuple[int, int]

#: Stands for the batch size while a model is read: a prime number, which no product of a patch's sizes is. Not a large
#: one, because a model may allocate as many rows.
BATCH = 1009


@dataclass(frozen=True)
class Value:
    """A value of the patch classifier: [N, channels, *size] at ``rank`` 4, [N, channels, positions] at 3, rows at 2.

    ``slot``: where the dense network has it. ``reach``: its receptive field. ``memory``: the same for views of one
    tensor.
    """

    slot: int
    channels: int
    size: Pair
    dilation: Pair = (1, 1)
    excess: Pair = (0, 0)
    reach: Pair = (1, 1)
    rank: int = 4
    memory: int = 0

    @property
    def positions(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def features(self) -> int:
        """Elements of a sample."""
        return self.channels * self.positions

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the patch classifier."""
        of_sample = {2: (self.features,), 3: (self.channels, self.positions), 4: (self.channels, *self.size)}
        return BATCH, *of_sample[self.rank]

    def axis(self, dimension: int) -> int:
        """``dimension`` counted from the first. DenseError if there is none such."""
        if not isinstance(dimension, int) or not -self.rank <= dimension < self.rank:
            raise DenseError(f"there is no dimension {dimension} in {told(self.shape)}")
        return dimension % self.rank

    @property
    def is_pixelwise(self) -> bool:
        """Whether dimension 1 is the channels of one position, so that it is dimension 1 in the dense network too."""
        return self.rank > 2 or self.positions == 1


class Windows(NamedTuple):
    """A sliding window: kernel, stride and dilation in the patch."""

    kernel: Pair
    stride: Pair
    dilation: Pair = (1, 1)

    def through(self, value: Value, channels: int, *, ceil_mode: bool = False) -> Value:
        """The value of every window of ``value``, in no slot yet. DenseError where the patch is too small."""
        sizes, excess = [], []
        of_axes = zip(value.size, value.dilation, value.excess, self.kernel, self.stride, self.dilation, strict=True)
        for size, spread, rest, kernel, stride, dilation in of_axes:
            span = size - dilation * (kernel - 1) - 1
            if span < 0:
                raise DenseError(
                    f"its window of {dilation * (kernel - 1) + 1} is larger than its input, {told(value.shape)} "
                    "for this patch size"
                )
            if ceil_mode and span % stride:
                raise DenseError("with ceil_mode its last window hangs over the border of the patch")
            sizes.append(span // stride + 1)
            excess.append(rest + spread * (span % stride))
        reach = (
            r + d * e * (k - 1)
            for r, d, e, k in zip(value.reach, value.dilation, self.dilation, self.kernel, strict=True)
        )
        return replace(
            value, channels=channels, size=_pair(sizes), excess=_pair(excess), reach=_pair(reach),
            dilation=multiplied(value.dilation, self.stride),
        )  # fmt: skip


def multiplied(one: Pair, other: Pair) -> Pair:
    return one[0] * other[0], one[1] * other[1]


def _pair(values) -> Pair:
    first, second = values
    return first, second


def cropped(value: Value, axis: int, start: int, stop: int, step: int = 1) -> tuple[Value, int, int]:
    """Rows (``axis`` 0) or columns ``start`` … ``stop`` − 1 of the patch; what to take off before and after them."""
    size, spread = value.size[axis], value.dilation[axis]
    count = -(-(stop - start) // step)
    rest = value.excess[axis] + spread * (stop - start - 1 - step * (count - 1))

    def put(of: Pair, new: int) -> Pair:
        return (new, of[1]) if axis == 0 else (of[0], new)

    result = replace(
        value,
        size=put(value.size, count),
        dilation=put(value.dilation, spread * step),
        excess=put(value.excess, rest),
    )
    return result, spread * start, spread * (size - stop)


def why_not_together(values: Sequence[Value]) -> str | None:
    """Return the reason why values cannot be combined element by element; None if they can."""
    first = values[0]
    for other in values[1:]:
        if other.rank != first.rank:
            return f"it combines {told(first.shape)} and {told(other.shape)}"
        for one, two in zip(first.size, other.size, strict=True):
            if one != two and 1 in (one, two):
                return (
                    f"it combines {told(first.shape)} and {told(other.shape)}: what is one number for a patch would "
                    "have to be known for each patch of the image, as the gate of a squeeze-and-excitation"
                )
            if one != two:
                return f"it combines {told(first.shape)} and {told(other.shape)}"
        for size, one, two in zip(first.size, first.dilation, other.dilation, strict=True):
            if size > 1 and one != two:
                return f"it combines values at strides of {one} and {two} pixels"
    return None


def told(shape: Sequence[int]) -> str:
    """[N, 48, 2, 2]."""
    return f"[{', '.join('N' if size == BATCH else str(size) for size in shape)}]"
