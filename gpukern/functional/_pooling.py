"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.ops import pool2d as _pool2d
from gpukern.ops import pool3d as _pool3d
from gpukern.ops._pool2d.problem import check_adaptive, output_sizes
from gpukern.runtime.arguments import as_bool, as_int, as_pair, as_single, check_batched_or_not, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating, check_kernel_dtype


def max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,p,q] = max_{r,s} x[n, c, p·stride + r·dilation − padding, …]``, −∞ outside the image; NaN wins.

    Parameters
    ----------
    input:
        [N, C, H, W] or one image [C, H, W]; any strides.
    kernel_size, stride, padding, dilation:
        an int or a (vertical, horizontal) pair. ``stride`` is ``kernel_size`` by default; the padding is at most half
        of the kernel.
    ceil_mode:
        rounds the output size up, so that windows may hang over the bottom and the right; a window that would begin
        in the padding there is dropped.
    return_indices:
        also return the int64 places h·W + w of the maxima (the first of equal ones), as ``max_unpool2d`` takes them.

    Returns
    -------
    [N, C, P, Q] with P = ⌊(H + 2·padding − dilation·(R−1) − 1)/stride⌋ + 1, in the layout of ``input``; exact.

    Raises
    ------
    RuntimeError for sizes or dtypes that do not fit, TypeError for arguments of a wrong type: as
    ``torch.nn.functional.max_pool2d``, before anything is computed.
    """
    check_tensors("max_pool2d", input)
    check_floating("max_pool2d", input)
    if input.itemsize == 1:
        check_kernel_dtype("max_pool2d", input.dtype)  # the operator takes 8 bits, torch's function does not
    if input.dim() != 4 and check_batched_or_not("max_pool2d", input):
        pooled = max_pool2d(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return _squeezed(pooled, 0)
    kernel, stride = _window(kernel_size, stride)
    return _pool2d.max_pool(
        input,
        kernel,
        stride,
        as_pair("padding", padding),
        as_pair("dilation", dilation),
        as_bool("ceil_mode", ceil_mode),
        bool(return_indices),
    )


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    r"""``y[n,c,p,q] = Σ_{r,s} x[n, c, p·stride + r − padding, …] / divisor``, zeros outside the image.

    The divisor is the number of elements in the window, those of the padding included if ``count_include_pad`` (but
    not what hangs over the padding by ``ceil_mode``), or ``divisor_override``. The other arguments, the result and
    the errors as in :func:`max_pool2d`. Sums in fp32.
    """
    check_tensors("avg_pool2d", input)
    check_floating("avg_pool2d", input)
    if input.dim() != 4 and check_batched_or_not("avg_pool2d", input, IndexError):
        return avg_pool2d(
            input.unsqueeze(0), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        ).squeeze(0)
    kernel, stride = _window(kernel_size, stride)
    return _pool2d.avg_pool2d(
        input,
        kernel,
        stride,
        as_pair("padding", padding),
        (1, 1),
        as_bool("ceil_mode", ceil_mode),
        as_bool("count_include_pad", count_include_pad),
        None if divisor_override is None else as_int("divisor_override", divisor_override),
    )


def adaptive_avg_pool2d(input: torch.Tensor, output_size: int | Sequence[int | None]) -> torch.Tensor:
    r"""``y[n,c,p,q]`` is the mean of x over the rows ⌊p·H/P⌋ … ⌈(p+1)·H/P⌉ − 1 and likewise columns.

    ``output_size`` is an int or a pair (P, Q), where None keeps the size of the input. input [N, C, H, W] or
    [C, H, W] gives [N, C, P, Q] or [C, P, Q] in the same layout. Sums in fp32. Raises RuntimeError for sizes or
    dtypes that do not fit, TypeError for arguments of a wrong type.
    """
    check_tensors("adaptive_avg_pool2d", input)
    check_floating("adaptive_avg_pool2d", input)
    too_few = RuntimeError if isinstance(output_size, int) else ValueError
    if input.dim() != 4 and check_batched_or_not("adaptive_avg_pool2d", input, too_few):
        return adaptive_avg_pool2d(input.unsqueeze(0), output_size).squeeze(0)
    if isinstance(output_size, Sequence) and not isinstance(output_size, str):
        if len(output_size) != 2:
            raise RuntimeError(f"output_size must have 2 elements, got {output_size!r}")
        sizes = [n if wanted is None else wanted for wanted, n in zip(output_size, input.shape[2:], strict=True)]
        size = as_pair("output_size", sizes)
    else:
        size = as_pair("output_size", output_size)
    if size == (1, 1) and 0 in input.shape[2:]:
        return input.mean((2, 3), keepdim=True)  # of no pixels: NaN, as torch's
    return _pool2d.adaptive_avg_pool2d(input, size)


def _squeezed(
    pooled: torch.Tensor | tuple[torch.Tensor, torch.Tensor], dimension: int
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(pooled, tuple):
        return pooled.squeeze(dimension)
    values, indices = pooled
    return values.squeeze(dimension), indices.squeeze(dimension)


def _window(kernel_size, stride) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride); a stride of None or () is the kernel's size."""
    kernel = as_pair("kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        return kernel, kernel
    return kernel, as_pair("stride", stride)


# ---- sequences: images of height 1 ---------------------------------------------------------------------------------


def max_pool1d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,q] = max_s x[n, c, q·stride + s·dilation − padding]``, −∞ outside the sequence; NaN wins.

    input [N, C, L] or one sequence [C, L] gives [N, C, Q] or [C, Q]; its transpose [N, L, C] is read as it is, and
    gives such a result. The other arguments, each an int or a sequence of one, the indices, which are places in the
    sequence, and the errors are as in :func:`max_pool2d`.
    """
    check_tensors("max_pool1d", input)
    check_floating("max_pool1d", input)
    if input.dim() != 3 and check_batched_or_not("max_pool1d", input, batched=3):
        pooled = max_pool1d(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return _squeezed(pooled, 0)
    kernel, stride = _window1d(kernel_size, stride)
    padding, dilation = as_single("padding", padding), as_single("dilation", dilation)
    ceil_mode = as_bool("ceil_mode", ceil_mode)
    _check_windows(input, kernel, stride, padding, dilation, ceil_mode)
    geometry = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation), ceil_mode
    return _squeezed(_pool2d.max_pool(input.unsqueeze(2), *geometry, bool(return_indices)), 2)


def avg_pool1d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    r"""``y[n,c,q] = Σ_s x[n, c, q·stride + s − padding] / divisor``, zeros outside the sequence.

    The divisor is as in :func:`avg_pool2d`; all else as in :func:`max_pool1d`.
    """
    check_tensors("avg_pool1d", input)
    check_floating("avg_pool1d", input)
    if input.dim() != 3 and check_batched_or_not("avg_pool1d", input, batched=3):
        return avg_pool1d(input.unsqueeze(0), kernel_size, stride, padding, ceil_mode, count_include_pad).squeeze(0)
    kernel, stride = _window1d(kernel_size, stride)
    padding, ceil_mode = as_single("padding", padding), as_bool("ceil_mode", ceil_mode)
    count_include_pad = as_bool("count_include_pad", count_include_pad)
    _check_windows(input, kernel, stride, padding, (1,), ceil_mode)
    windows = (1, *kernel), (1, *stride), (0, *padding), (1, 1)
    return _pool2d.avg_pool2d(input.unsqueeze(2), *windows, ceil_mode, count_include_pad, None).squeeze(2)


def adaptive_avg_pool1d(input: torch.Tensor, output_size: int | Sequence[int]) -> torch.Tensor:
    r"""``y[n,c,q]`` is the mean of x over the places ⌊q·L/Q⌋ … ⌈(q+1)·L/Q⌉ − 1.

    ``output_size`` is Q, an int or a sequence of one. Input, result and errors as in :func:`adaptive_avg_pool2d`, of
    [N, C, L] or [C, L].
    """
    check_tensors("adaptive_avg_pool1d", input)
    check_floating("adaptive_avg_pool1d", input)
    if input.dim() != 3 and check_batched_or_not("adaptive_avg_pool1d", input, batched=3):
        return adaptive_avg_pool1d(input.unsqueeze(0), output_size).squeeze(0)
    size = as_single("output_size", output_size)
    if size == (1,) and input.shape[2] == 0:
        return input.mean(2, keepdim=True)  # of no places: NaN, as torch's
    _check_adaptive(input, size)
    return _pool2d.adaptive_avg_pool2d(input.unsqueeze(2), (1, *size)).squeeze(2)


def adaptive_max_pool1d(
    input: torch.Tensor, output_size: int | Sequence[int], return_indices: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,q]`` is the maximum of x over the windows of :func:`adaptive_avg_pool1d`; a NaN wins.

    ``return_indices`` also returns the int64 places of the maxima (the first of equal ones). All else is as in
    :func:`adaptive_avg_pool1d`; the result is contiguous.
    """
    check_tensors("adaptive_max_pool1d", input)
    check_floating("adaptive_max_pool1d", input)
    if input.dim() != 3 and check_batched_or_not("adaptive_max_pool1d", input, batched=3):
        if input.shape[0]:
            return _squeezed(adaptive_max_pool1d(input.unsqueeze(0), output_size, return_indices), 0)
        _check_adaptive(input.unsqueeze(0), as_single("output_size", output_size))
        values = input.new_empty((0, *as_single("output_size", output_size)))
        return (values, values.to(torch.int64)) if return_indices else values
    size = as_single("output_size", output_size)
    _check_adaptive(input, size)
    require(input.shape[1] != 0, f"adaptive_max_pool1d: expected channels, got size {list(input.shape)}")
    windows = _pool3d.adaptive((1, 1, *size))
    return _squeezed(_squeezed(_pool3d.max_pool(input[:, :, None, None], windows, bool(return_indices)), 2), 2)


def _check_windows(input: torch.Tensor, *windows) -> None:
    """Refuse sizes in words of one dimension. Those of a tracer the operator refuses, in words of images."""
    if not torch.compiler.is_compiling():
        output_sizes(input.shape, *windows)


def _check_adaptive(input: torch.Tensor, size: tuple[int]) -> None:
    if not torch.compiler.is_compiling():
        check_adaptive(input.shape, size)


def _window1d(kernel_size, stride) -> tuple[tuple[int], tuple[int]]:
    """(kernel, stride); a stride of None or () is the kernel's size."""
    kernel = as_single("kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        return kernel, kernel
    return kernel, as_single("stride", stride)
