"""Functions that move no values between positions and channels: reshapes, crops, and groups of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpukern.densify.errors import DenseError
from gpukern.densify.pointwise import along_channels
from gpukern.densify.recorder import Recorder
from gpukern.densify.steps import Channels, Crop
from gpukern.densify.values import BATCH, Value, cropped, told
from gpukern.densify.windows import rule


@rule()
def contiguous(to: Recorder, input, memory_format=None) -> Value:
    return input


@rule()
def clone(to: Recorder, input, memory_format=None) -> Value:
    return replace(input, memory=-input.slot)


# ---- reshapes --------------------------------------------------------------------------------------------------------


@rule()
def flatten(to: Recorder, input, start_dim=0, end_dim=-1) -> Value:
    first, last = input.axis(start_dim), input.axis(end_dim)
    shape = input.shape
    if first > last:
        raise DenseError(f"it flattens {told(shape)} from dimension {first} to {last}")
    return reshaped(input, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


@rule("reshape", "view")
def _reshape(to: Recorder, input, *shape, size=None) -> Value:
    wanted = size if size is not None else shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return reshaped(input, wanted)


@rule()
def unflatten(to: Recorder, input, dim, sizes) -> Value:
    axis, shape = input.axis(dim), input.shape
    sizes = [shape[axis] // -math.prod(sizes) if n == -1 else n for n in sizes]
    return reshaped(input, (*shape[:axis], *sizes, *shape[axis + 1 :]))


def reshaped(input: Value, shape: Sequence[Any]) -> Value:
    """``input`` with another shape of the patch; DenseError for one that is none of a sample's."""
    sizes, total = list(shape), math.prod(input.shape)
    if not all(isinstance(n, int) for n in sizes) or sizes.count(-1) > 1:
        raise DenseError(f"it reshapes {told(input.shape)} to {sizes}")
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = total // known if known and total % known == 0 else 0
    fitting = {2: (input.features,), 3: (input.channels, input.positions), 4: (input.channels, *input.size)}
    for rank, of_sample in fitting.items():
        if sizes == [BATCH, *of_sample]:
            return replace(input, rank=rank)
    if sizes[:1] == [BATCH] and math.prod(sizes) == total:
        raise DenseError(f"it reshapes {told(input.shape)} to {told(sizes)}, which mixes channels and positions")
    raise DenseError(
        f"it reshapes {told(input.shape)} to {told(shape)}: this patch size gives {input.features:,} features "
        f"({input.channels} × {input.size[0]} × {input.size[1]})"
    )


@rule()
def squeeze(to: Recorder, input, dim=None) -> Value:
    shape = input.shape
    dims = {input.axis(each) for each in ((dim,) if isinstance(dim, int) else dim or range(1, input.rank))}
    ones = {axis for axis in dims if shape[axis] == 1}
    if ones & {0, 1}:
        raise DenseError(f"it removes the channels of {told(shape)}")
    return reshaped(input, [size for axis, size in enumerate(shape) if axis not in ones])


@rule()
def unsqueeze(to: Recorder, input, dim) -> Value:
    shape = list(input.shape)
    shape.insert(dim + len(shape) + 1 if dim < 0 else dim, 1)
    return reshaped(input, shape)


# ---- parts -----------------------------------------------------------------------------------------------------------


@rule()
def getitem(to: Recorder, input, index) -> Value:
    """Slices of channels, rows and columns; one position of a patch; ``None`` behind."""
    given = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in given:
        place, taken = given.index(Ellipsis), sum(each is not None for each in given) - 1
        given[place : place + 1] = [slice(None)] * (input.rank - taken)
    added = 0
    while given and given[-1] is None:
        added += 1
        given.pop()
    ahead = added > 0 and len(given) < input.rank  # [:, None] of rows is no column behind
    if not all(isinstance(each, (int, slice)) for each in given) or ahead or len(given) > input.rank:
        raise DenseError(f"it takes {index!r} of {told(input.shape)}")
    given += [slice(None)] * (input.rank - len(given))
    if given[0] != slice(None):
        raise DenseError(f"it takes {index!r} of the batch")
    value, picked = input, [axis for axis, each in enumerate(given) if isinstance(each, int)]
    for axis in range(1, input.rank):
        value = _part(to, value, axis, given[axis])
    if picked:
        if 1 in picked:
            raise DenseError(f"it takes {index!r} of {told(input.shape)}: one channel needs a slice")
        value = reshaped(value, [size for axis, size in enumerate(value.shape) if axis not in picked])
    return reshaped(value, (*value.shape, *[1] * added)) if added else value


def _part(to: Recorder, value: Value, axis: int, index: int | slice) -> Value:
    size = value.shape[axis]
    if isinstance(index, int):
        if not -size <= index < size:
            raise DenseError(f"it takes position {index} of {told(value.shape)}")
        index = slice(index % size, index % size + 1)
    start, stop, step = index.indices(size)
    if step < 1 or stop <= start:
        raise DenseError(f"it takes {index} of {told(value.shape)}")
    if axis == 1 and index != slice(None):
        # As it is written, though it be all that is read here: an image may have more channels than the first layer.
        along_channels(value, 1, "a slice")
        part = Channels(index.start, index.stop, index.step)
        return to.view(part, value, replace(value, channels=-(-(stop - start) // step)))
    if (start, stop, step) == (0, size, 1):
        return value
    if value.rank != 4:
        raise DenseError(f"it takes a part of the positions of {told(value.shape)}")
    after, before, behind = cropped(value, axis - 2, start, stop, step)
    sides = ((before, behind), (0, 0)) if axis == 2 else ((0, 0), (before, behind))
    return to.view(Crop(*sides), value, after)


@rule()
def narrow(to: Recorder, input, dim, start, length) -> Value:
    axis = input.axis(dim)
    first = start % max(1, input.shape[axis])
    if axis == 0:
        raise DenseError("it takes a part of the batch")
    return _part(to, input, axis, slice(first, first + length))


@rule()
def chunk(to: Recorder, input, chunks, dim=0) -> tuple[Value, ...]:
    size = input.shape[input.axis(dim)]
    return split(to, input, -(-size // chunks), dim)


@rule()
def split(to: Recorder, tensor, split_size_or_sections=None, dim=0, split_size=None) -> tuple[Value, ...]:
    axis = tensor.axis(dim)
    total, each = tensor.shape[axis], split_size if split_size is not None else split_size_or_sections
    sizes = [min(each, total - i) for i in range(0, total, each)] if isinstance(each, int) else list(each)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(to, tensor, axis, start, size) for start, size in zip(starts, sizes, strict=True))


@rule()
def pad(to: Recorder, input, pad, mode="constant", value=None) -> Value:
    """Only what takes off."""
    if any(n > 0 for n in pad):
        raise DenseError(f"it pads by {tuple(pad)}: it sees the border of the patch, which only patches have")
    if input.rank != 4 or len(pad) > 4:
        raise DenseError(f"it crops {told(input.shape)} by {tuple(pad)}")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    height, width = input.size
    return getitem(to, input, (slice(None), slice(None), slice(-top, height + bottom), slice(-left, width + right)))
