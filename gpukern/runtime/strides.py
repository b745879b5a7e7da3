"""Layout of a tensor from its strides. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Sequence


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Apply torch's rule, ``suggest_memory_format()``: C before W before H before N, for dense and other tensors.

    A dimension of one element has a stride too, which distinguishes an image of one channel in channels_last, of
    strides (H·W, 1, W, 1), from the same memory in NCHW, (H·W, H·W, W, 1). If no stride decides, as for one pixel of
    [N, 1, 1, 1], it is NCHW. The same for [N, C, D, H, W], depth between height and batch, and for [N, C, L], as images
    of one row.
    """
    if len(shape) == 3:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
    if len(shape) == 5:
        return _is_channels_last_3d(shape, strides)
    (N, C, H, W), (n, c, h, w) = shape, strides
    if not (c > 0 and c * C <= w and w * W <= h and h * H <= n):
        return False
    # A tracer's batch must not be inspected, and an example is never empty.
    return C != 0 and H != 0 and W != 0 and h * H != c and not (type(N) is int and N == 0)


def _is_channels_last_3d(shape: Sequence[int], strides: Sequence[int]) -> bool:
    (N, C, D, H, W), (n, c, d, h, w) = shape, strides
    if not (c > 0 and c * C <= w and w * W <= h and h * H <= d and d * D <= n):
        return False
    return C != 0 and D != 0 and H != 0 and W != 0 and d * D != c and not (type(N) is int and N == 0)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether no element lies in a gap or twice; False too where a tracer does not give all sizes as numbers."""
    if not all(type(size) is int for size in (*shape, *strides)):
        return False
    run = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != run:
            return 0 in shape
        run *= size
    return True


def dense_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Return the strides PyTorch gives a new tensor, also an empty one."""
    if len(shape) == 5:
        _, C, D, H, W = (max(size, 1) for size in shape)
        plane = H * W
        return (D * plane * C, 1, plane * C, W * C, C) if channels_last else (C * D * plane, D * plane, plane, W, 1)
    _, C, H, W = (max(size, 1) for size in shape)
    return (H * W * C, 1, W * C, C) if channels_last else (C * H * W, H * W, W, 1)


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The largest offset, in elements, between two elements of a tensor."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def joined(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Join neighbouring dimensions where the strides of all tensors allow it, and leave out those of one element.

    Return the sizes that remain, and each tensor's strides along them.
    """
    kept: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(s[-1] == size * given[i] for s, given in zip(steps, strides, strict=True)):
            kept[-1] *= size
            for s, given in zip(steps, strides, strict=True):
                s[-1] = given[i]
        else:
            kept.append(size)
            for s, given in zip(steps, strides, strict=True):
                s.append(given[i])
    return kept, steps


def joined_to(
    dimensions: int, sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """:func:`joined`, in so many dimensions, the first ones of one element. Raises ValueError where more remain."""
    kept, steps = joined(sizes, strides)
    missing = dimensions - len(kept)
    if missing < 0:
        raise ValueError(f"more than {dimensions} dimensions that cannot be joined: {sizes}, strides {strides}")
    return [1] * missing + kept, [[0] * missing + s for s in steps]
