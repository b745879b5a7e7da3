"""Group norm kernels. Images are :class:`gpukern.ops._images.Image`, tiles [BLOCK_P, BLOCK_C] as in batch norm's.

Where all pixels of a group fit a tile, one launch reads every tensor once. Otherwise sums of each channel of each
image, [N, C], are made first, small kernels add those of a group, and a last pass reads the tensors again. All
arithmetic is fp32, every sum has a fixed order: the same bits in every run. See :mod:`gpukern.ops.group_norm` for the
mathematics.
"""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._batch_norm.functions import (
    channel_tile,
    gradient_tile,
    load_tile,
    normalize_tile,
    pixel_tile,
    statistics_of,
    store_tile,
)
from gpukern.ops._group_norm.functions import group_sum, group_tile
from gpukern.ops._normalization import affine, load_numbers
from gpukern.ops._reduction.functions import (
    finish_statistics,
    finish_sums,
    merge_statistics,
    merge_sums,
    store_part,
)

# ---- a group fits a tile -------------------------------------------------------------------------------------------


@triton.jit
def group_norm_kernel(
    x,  # Image
    residual,  # Image, or nothing (its ptr None)
    y,  # Image
    norm,  # mean and variance, fp32 [N, groups], are written; weight and bias [C]
    sizes, eps, negative_slope,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · weight / √(variance + eps) + bias + residual). Grid: images · tiles of groups.

    The mean is taken twice, the second time of what is left without the first: its rounding, which with a large mean is
    large beside the deviation, does not reach the result.
    """
    channels = sizes.channel_groups * CHANNEL_ALIGN
    tile = tl.program_id(0) % sizes.channel_tiles
    c, valid, group = group_tile(tile, channels, GROUP, BLOCK_D, BLOCK_C)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid[None, :]
    count = tl.cast(sizes.pixels, tl.float32) * GROUP
    value = load_tile(x, n, h, p, c[None, :], mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    mean = group_sum(tl.sum(value, 0), BLOCK_D) / count
    apart = tl.where(mask, value - mean[None, :], 0.0)
    total = group_sum(tl.sum(apart, 0), BLOCK_D)
    squares = group_sum(tl.sum(apart * apart, 0), BLOCK_D)
    shift = total / count
    variance = squares / count - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum: a NaN must propagate
    place = tl.program_id(0) // sizes.channel_tiles * (channels // GROUP) + group
    once = valid & (c == group * GROUP)
    tl.store(norm.mean + place, mean + shift, mask=once)
    tl.store(norm.variance + place, variance, mask=once)
    _, scale, bias = affine(norm, variance, c, valid, eps)
    z = (apart - shift[None, :]) * scale[None, :] + bias[None, :]
    if residual.ptr is not None:
        z += load_tile(residual, n, h, p, c[None, :], mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    z = apply_activation(z, ACTIVATION, negative_slope)
    store_tile(y, z, n, h, p, c[None, :], mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def group_norm_backward_kernel(
    grad,  # Image: ∂L/∂y
    x,  # Image
    other,  # Image: the residual where the activation's derivative needs its input, else y; or nothing
    inner,  # Image: ∂L/∂z is written there; or nothing
    out,  # Image: ∂L/∂x is written there; or nothing
    norm,
    sums,  # Sums of ∂L/∂z and ∂L/∂z · x̂ of each channel, or None; a split is a row of tiles
    sizes, images, images_per_split, splits, eps, negative_slope,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """All gradients. WHOLE: a program has all images of its channels. Grid: splits · tiles of groups."""
    channels = sizes.channel_groups * CHANNEL_ALIGN
    tile = tl.program_id(0) % sizes.channel_tiles
    split = tl.program_id(0) // sizes.channel_tiles
    c, valid, group = group_tile(tile, channels, GROUP, BLOCK_D, BLOCK_C)
    count = tl.cast(sizes.pixels, tl.float32) * GROUP
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_gx = tl.zeros((BLOCK_C,), tl.float32)
    first = split * images_per_split
    for image in range(first, tl.minimum(first + images_per_split, images)):
        n, h, p, inside = pixel_tile(image, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
        mask = inside & valid[None, :]
        place = image * (channels // GROUP) + group
        mean = load_numbers(norm.mean, place, valid, 0.0)
        inverse, scale, bias = affine(norm, load_numbers(norm.variance, place, valid, 1.0), c, valid, eps)
        g, normal = gradient_tile(
            grad, x, other, n, h, p, c[None, :], mask, mean[None, :], inverse[None, :], scale[None, :], bias[None, :],
            negative_slope, ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
        if inner.ptr is not None:
            store_tile(inner, g, n, h, p, c[None, :], mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        of_g = tl.sum(g, 0)
        of_gx = tl.sum(g * normal, 0)
        if out.ptr is not None:
            mean_g = group_sum(of_g * scale, BLOCK_D) / count
            mean_gx = group_sum(of_gx * scale, BLOCK_D) / count
            value = g * scale[None, :] - mean_g[None, :] - normal * mean_gx[None, :]
            store_tile(out, value, n, h, p, c[None, :], mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        sum_g += of_g
        sum_gx += of_gx
    if sums is not None:
        if WHOLE:
            finish_sums(sums, (sum_g, sum_gx), c, valid, channels)
        else:
            store_part(sums.parts, (sum_g, sum_gx), split, splits, c, valid, channels)
            wide = BLOCK_C // BLOCK_D * GROUP
            end = tl.minimum((tile + 1) * wide, channels)
            merge_sums(sums, split, splits, tile, tile * wide, end, channels, 2, BLOCK_C)


# ---- a group does not fit: first of each channel -------------------------------------------------------------------


@triton.jit
def group_norm_statistics_kernel(
    x,  # Image
    statistics,  # Statistics of [N, C]; a split is a row of tiles
    sizes, images, steps, steps_per_split, splits,
    WHOLE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each channel of each image, which has so many steps. Grid: images · splits · channel tiles.

    WHOLE: there is one split.
    """
    tile = tl.program_id(0) % sizes.channel_tiles
    split = tl.program_id(0) // sizes.channel_tiles % splits
    image = tl.program_id(0) // sizes.channel_tiles // splits
    c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
    first = split * steps_per_split
    last = image * steps + tl.minimum(first + steps_per_split, steps)
    mean, deviations, pixels = statistics_of(
        x, image * steps + first, last, c, valid, sizes, UNROLL, BLOCK_P, BLOCK_C, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX
    )
    channels = sizes.channel_groups * CHANNEL_ALIGN
    place = image * channels + c
    if WHOLE:
        finish_statistics(statistics, mean, deviations, pixels, place, valid)
    else:
        in_all = images * channels
        store_part(statistics.parts, (mean * pixels, deviations, pixels), split, splits, place, valid, in_all)
        begin = image * channels
        column = image * sizes.channel_tiles + tile
        merge_statistics(
            statistics, split, splits, column, begin + tile * BLOCK_C, begin + channels, in_all, BLOCK_C
        )  # fmt: skip


@triton.jit
def merge_channels_kernel(
    of_channels,  # Norm: mean and variance, fp32 [rows · GROUP]
    norm,  # Norm: mean and variance, fp32 [rows], are written
    rows, group,  # channels of a group
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each group from those of its channels, which have equally many pixels. Grid: row tiles."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = row < rows
    pivot = tl.load(of_channels.mean + row * group, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_R, 1), tl.float32)
    for start in range(0, group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (d < group)
        apart = tl.load(of_channels.mean + row * group + d, mask=mask, other=0.0) - pivot
        total += tl.sum(tl.where(mask, apart, 0.0), 1)[:, None]
    shift = total / group
    squares = tl.zeros((BLOCK_R, 1), tl.float32)
    for start in range(0, group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (d < group)
        apart = tl.load(of_channels.mean + row * group + d, mask=mask, other=0.0) - pivot - shift
        variance = tl.load(of_channels.variance + row * group + d, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, variance + apart * apart, 0.0), 1)[:, None]
    tl.store(norm.mean + row, pivot + shift, mask=inside)
    tl.store(norm.variance + row, squares / group, mask=inside)


@triton.jit
def _numbers(norm, image, tile, channels, group, eps, BLOCK_C: tl.constexpr):
    """(mean, 1/σ, weight/σ, bias) of each channel of a tile of an image, [1, BLOCK_C]."""
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    place = image * (channels // group) + c // group
    mean = load_numbers(norm.mean, place, valid, 0.0)
    inverse, scale, bias = affine(norm, load_numbers(norm.variance, place, valid, 1.0), c, valid, eps)
    return mean[None, :], inverse[None, :], scale[None, :], bias[None, :]


@triton.jit
def group_norm_apply_kernel(
    x, residual, y,  # as above
    norm,  # mean and variance [N, groups]
    sizes, steps, group, eps, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y from the statistics. Grid: images · steps · channel tiles."""
    tile = tl.program_id(0) % sizes.channel_tiles
    c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
    step = tl.program_id(0) // sizes.channel_tiles
    n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    channels = sizes.channel_groups * CHANNEL_ALIGN
    mean, _, scale, bias = _numbers(norm, step // steps, tile, channels, group, eps, BLOCK_C)
    normalize_tile(
        x, residual, y, n, h, p, c, inside & valid, mean, scale, bias, negative_slope,
        ACTIVATION, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip


@triton.jit
def group_norm_sums_kernel(
    grad, x, other, inner,  # as above
    norm,
    sums,  # Sums of [N, C]; a split is a row of tiles
    sizes, images, steps, steps_per_split, splits, group, eps, negative_slope,
    WHOLE: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Σ ∂L/∂z and Σ ∂L/∂z · x̂ of each channel of each image. Grid: images · splits · channel tiles."""
    tile = tl.program_id(0) % sizes.channel_tiles
    split = tl.program_id(0) // sizes.channel_tiles % splits
    image = tl.program_id(0) // sizes.channel_tiles // splits
    c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
    channels = sizes.channel_groups * CHANNEL_ALIGN
    mean, inverse, scale, bias = _numbers(norm, image, tile, channels, group, eps, BLOCK_C)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = split * steps_per_split
    last = image * steps + tl.minimum(first + steps_per_split, steps)
    for step in tl.range(image * steps + first, last, loop_unroll_factor=UNROLL):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
        mask = inside & valid
        g, normal = gradient_tile(
            grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
            ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
        if inner.ptr is not None:
            # The sums are of the stored values, which the last launch reads.
            g = store_tile(inner, g, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        sum_g += g
        sum_gx += g * normal
    totals = (tl.sum(sum_g, 0)[None, :], tl.sum(sum_gx, 0)[None, :])
    place = image * channels + c
    in_all = images * channels
    if WHOLE:
        finish_sums(sums, totals, place, valid, in_all)
    else:
        store_part(sums.parts, totals, split, splits, place, valid, in_all)
        begin = image * channels
        column = image * sizes.channel_tiles + tile
        merge_sums(sums, split, splits, column, begin + tile * BLOCK_C, begin + channels, in_all, 2, BLOCK_C)


@triton.jit
def sum_images_kernel(
    totals_ptr,  # fp32 [2, N, C]: Σ ∂L/∂z and Σ ∂L/∂z · x̂
    sums,  # Sums: where those over the images go in the parameters' dtypes
    images, channels,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """∂L/∂weight and ∂L/∂bias. Grid: channel tiles."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    valid = c < channels
    sum_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, images, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < images) & valid
        sum_g += tl.load(totals_ptr + n * channels + c, mask=mask, other=0.0)
        sum_gx += tl.load(totals_ptr + (images + n) * channels + c, mask=mask, other=0.0)
    finish_sums(sums, (tl.sum(sum_g, 0)[None, :], tl.sum(sum_gx, 0)[None, :]), c, valid, channels)


@triton.jit
def weigh_channels_kernel(
    totals_ptr,  # fp32 [2, rows · GROUP]
    weight_ptr,  # [C], or None
    out_ptr,  # fp32 [2, rows]: the sums over a group of weight · totals
    rows, groups, group,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of each group from those of its channels. Grid: row tiles."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = row < rows
    sum_g = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (d < group)
        g = tl.load(totals_ptr + row * group + d, mask=mask, other=0.0)
        gx = tl.load(totals_ptr + (rows + row) * group + d, mask=mask, other=0.0)
        if weight_ptr is not None:
            weight = load_numbers(weight_ptr, row % groups * group + d, mask, 0.0)
            g *= weight
            gx *= weight
        sum_g += g
        sum_gx += gx
    tl.store(out_ptr + row, tl.sum(sum_g, 1)[:, None], mask=inside)
    tl.store(out_ptr + rows + row, tl.sum(sum_gx, 1)[:, None], mask=inside)


@triton.jit
def group_norm_input_grad_kernel(
    grad,  # Image: ∂L/∂y, or ∂L/∂z with ACTIVATION "none"
    x, other, out,  # as above
    norm,
    totals_ptr,  # fp32 [2, N, groups]: Σ weight · ∂L/∂z and Σ weight · ∂L/∂z · x̂
    sizes, images, steps, group, eps, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂x from the sums of each group. Grid: images · steps · channel tiles."""
    tile = tl.program_id(0) % sizes.channel_tiles
    c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
    step = tl.program_id(0) // sizes.channel_tiles
    n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid
    channels = sizes.channel_groups * CHANNEL_ALIGN
    image = step // steps
    mean, inverse, scale, bias = _numbers(norm, image, tile, channels, group, eps, BLOCK_C)
    groups = channels // group
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    place = image * groups + channel // group
    per_pixel = inverse / (tl.cast(sizes.pixels, tl.float32) * group)
    mean_g = load_numbers(totals_ptr, place, channel < channels, 0.0)[None, :] * per_pixel
    mean_gx = load_numbers(totals_ptr + images * groups, place, channel < channels, 0.0)[None, :] * per_pixel
    g, normal = gradient_tile(
        grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
        ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip
    value = g * scale - mean_g - normal * mean_gx
    store_tile(out, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


# ---- instance norm's running statistics ----------------------------------------------------------------------------


@triton.jit
def running_statistics_kernel(
    norm,  # Norm: mean and biased variance, fp32 [N, C]
    running_mean_ptr, running_variance_ptr,  # [C]
    images, channels, momentum,
    unbiased,  # pixels / (pixels − 1)
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r ← (1 − momentum) · r + momentum · the mean over the images. Grid: channel tiles."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    valid = c < channels
    means = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    variances = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, images, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < images) & valid
        means += tl.load(norm.mean + n * channels + c, mask=mask, other=0.0)
        variances += tl.load(norm.variance + n * channels + c, mask=mask, other=0.0)
    mean = tl.sum(means, 0)[None, :] / images
    variance = tl.sum(variances, 0)[None, :] / images * unbiased
    old_mean = load_numbers(running_mean_ptr, c, valid, 0.0)
    old_variance = load_numbers(running_variance_ptr, c, valid, 0.0)
    new_mean = (1.0 - momentum) * old_mean + momentum * mean
    new_variance = (1.0 - momentum) * old_variance + momentum * variance
    tl.store(running_mean_ptr + c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=valid)
    tl.store(running_variance_ptr + c, new_variance.to(running_variance_ptr.dtype.element_ty), mask=valid)
