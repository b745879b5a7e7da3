"""Cross entropy kernels. Images are :class:`gpukern.ops._images.Image`, with the classes as channels.

Tiles are [BLOCK_P, BLOCK_C], values of a row [BLOCK_P, 1] and of a class [1, BLOCK_C]; all arithmetic is fp32, every
sum has a fixed order. With p = softmax(x), and coefficients q of the row that follow from its target, weights and
smoothing (see :mod:`gpukern.ops.cross_entropy`):

    loss = − Σ_c q[c] · log p[c]          ∂loss/∂x[c] = p[c] · Σ q − q[c]
"""

import triton
import triton.language as tl

from gpukern.ops._batch_norm.functions import channel_tile, load_tile, pixel_tile, store_tile
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of
from gpukern.ops._softmax.functions import load_logits, top_and_total, top_and_total_of_tiles


@triton.jit
def _weight_of(weight_ptr, c, valid):
    """The weights of classes ``c``, or ones."""
    if weight_ptr is not None:
        return tl.load(weight_ptr + c, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def _added_weights(label_ptr, weight_ptr, first, last, ignore_index, classes, BLOCK: tl.constexpr):
    """Σ weight[label] over the labels from ``first`` to ``last`` that are not ignored: [1, 1]."""
    total = tl.zeros((1, BLOCK), tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        label = tl.load(label_ptr + i, mask=i < last, other=0).to(tl.int64)
        counts = (i < last) & (label != ignore_index)
        total += _weight_of(weight_ptr, label, counts & (label >= 0) & (label < classes))
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def label_weights_kernel(
    label_ptr,  # [rows], contiguous
    weight_ptr,  # [classes] or None
    out_ptr,  # fp32, one number
    shared,  # SharedSums of one sum, or None for one split
    fan_in, rows, rows_per_split, ignore_index, classes, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ weight[label] over the labels that are not ignored: what a mean divides by. Grid: splits."""
    split = tl.program_id(0)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    total = _added_weights(label_ptr, weight_ptr, first, last, ignore_index, classes, BLOCK)
    if shared is None:
        tl.store(out_ptr + tl.zeros((1, 1), tl.int32), total)
    else:
        splits = tl.num_programs(0)
        leave_part(total, shared, 0, split, splits, fan_in, 0, 1)
        if last_to_arrive(shared, 0, split, splits, fan_in, 1, 1):
            i = tl.arange(0, 1)
            tl.store(out_ptr + i, total_of(shared, 0, splits, fan_in, i, 1))


@triton.jit
def _coefficients(
    probabilities, weight_ptr, smoothing, label, of_label, n, h, p, c, inside, valid, classes,
    SMOOTHING: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(coefficients of the label or of probabilities, those of the smoothing): q is their sum."""
    share = smoothing / classes
    if probabilities.ptr is not None:
        q = load_tile(probabilities, n, h, p, c, inside & valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        if SMOOTHING:
            q = tl.where(valid, q * (1.0 - smoothing) + share, 0.0)
        if weight_ptr is not None:
            q = q * _weight_of(weight_ptr, c, valid)
        return q, tl.zeros_like(q)
    else:
        own = tl.where(c == label, of_label, 0.0)
        if SMOOTHING:
            return own * (1.0 - smoothing), share * _weight_of(weight_ptr, c, valid) + tl.zeros_like(own)
        else:
            return own, tl.zeros_like(own)


@triton.jit
def _summed(logits, top, total, direct, spread, c, label, valid, LABELS: tl.constexpr, SMOOTHING: tl.constexpr):
    """(− Σ q · log p, Σ q) over a tile: [BLOCK_P, 1]."""
    logs = logits - top - tl.log(total)
    if LABELS:
        # A mask of −∞ at other classes than the label's does not matter.
        terms = direct * tl.where(c == label, logs, 0.0)
        if SMOOTHING:
            terms += spread * tl.where(valid, logs, 0.0)
    else:
        terms = direct * tl.where(valid, logs, 0.0)
    return -tl.sum(terms, axis=1, keep_dims=True), tl.sum(direct + spread, axis=1, keep_dims=True)


@triton.jit
def _write_gradients(
    grad, target_grad, weight_ptr, smoothing, logits, top, total, direct, spread, sum_q, scale, known,
    n, h, p, c, mask, valid,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    if grad.ptr is not None:
        value = (tl.exp(logits - top) / total * sum_q - (direct + spread)) * scale
        value = tl.where(known, value, float("nan"))
        store_tile(grad, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    if target_grad.ptr is not None:
        value = tl.where(valid, tl.log(total) - (logits - top), 0.0) * (scale * (1.0 - smoothing))
        if weight_ptr is not None:
            value = value * _weight_of(weight_ptr, c, valid)
        store_tile(target_grad, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def cross_entropy_kernel(
    x,  # Image: logits
    probabilities, grad, target_grad,  # Images, or nothing: the target's, ∂L/∂x and ∂L/∂target are written there
    label, row_loss, incoming,  # Images of numbers of rows, or nothing: indices, losses, ∂L/∂loss
    label_ptr,  # the same indices, contiguous, to be counted here; or None
    weight_ptr,  # [classes] or None
    divisor_ptr,  # fp32: Σ weight[label], if it is known already; or None
    loss_ptr, total_ptr,  # the reduced loss, and in fp32 Σ weight[label], or 0 of losses of rows; or None
    shared,  # SharedSums of these two, or None for one program
    fan_in, sizes, rows, classes, ignore_index, smoothing,
    MEAN: tl.constexpr, SMOOTHING: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Losses of rows, or their sum or MEAN, and gradients, in one pass over the logits if a row is WHOLE, one tile.

    A label that is no class, and is not ignored, makes its row's loss and gradient NaN. Grid: tiles of rows.
    """
    LABELS: tl.constexpr = label.ptr is not None
    n, h, p, inside = pixel_tile(tl.program_id(0), sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    kept = inside
    known = tl.full((BLOCK_P, 1), True, tl.int1)
    class_ = tl.zeros((BLOCK_P, 1), tl.int32)
    of_label = tl.zeros((BLOCK_P, 1), tl.float32)
    if LABELS:
        index = tl.load(label.ptr + (n * label.n + h * label.h + p * label.w), mask=inside, other=0).to(tl.int64)
        kept = inside & (index != ignore_index)
        counts = (index >= 0) & (index < classes)
        known = counts | (index == ignore_index)
        class_ = tl.where(kept & counts, index, -1).to(tl.int32)
        of_label = _weight_of(weight_ptr, index, kept & counts)

    scale = tl.where(kept, 1.0, 0.0)
    if incoming.ptr is not None:
        g = tl.load(incoming.ptr + (n * incoming.n + h * incoming.h + p * incoming.w), mask=inside, other=0.0)
        scale = tl.where(kept, g.to(tl.float32), 0.0)
    if MEAN:
        divisor = tl.full((1, 1), 1.0, tl.float32) * rows
        if divisor_ptr is not None:
            divisor = tl.full((1, 1), 1.0, tl.float32) * tl.load(divisor_ptr)
        elif label_ptr is not None:
            divisor = _added_weights(label_ptr, weight_ptr, 0, rows, ignore_index, classes, COUNT)
        # An ignored row has the gradient 0, though all may be ignored.
        scale = tl.where(kept, scale / divisor, 0.0)

    if WHOLE:
        c, valid = channel_tile(0, sizes, BLOCK_C, CHANNEL_ALIGN)
        logits = load_logits(x, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        top, total = top_and_total(logits)
        direct, spread = _coefficients(
            probabilities, weight_ptr, smoothing, class_, of_label, n, h, p, c, inside, valid, classes,
            SMOOTHING, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
        loss, sum_q = _summed(logits, top, total, direct, spread, c, class_, valid, LABELS, SMOOTHING)
        _write_gradients(
            grad, target_grad, weight_ptr, smoothing, logits, top, total, direct, spread, sum_q, scale, known,
            n, h, p, c, inside & valid, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
    else:
        top, total = top_and_total_of_tiles(
            x, n, h, p, inside, sizes, BLOCK_P, BLOCK_C, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX
        )
        if LABELS and not SMOOTHING:
            place = n * x.n + h * x.h + p * x.w + class_.to(INDEX) * x.c
            logit = tl.load(x.ptr + place, mask=kept & (class_ >= 0), other=0.0).to(tl.float32)
            loss = -of_label * (logit - top - tl.log(total))
            sum_q = of_label
        else:
            loss = tl.zeros((BLOCK_P, 1), tl.float32)
            sum_q = tl.zeros((BLOCK_P, 1), tl.float32)
            for tile in range(sizes.channel_tiles):
                c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
                logits = load_logits(x, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
                direct, spread = _coefficients(
                    probabilities, weight_ptr, smoothing, class_, of_label, n, h, p, c, inside, valid, classes,
                    SMOOTHING, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
                )  # fmt: skip
                more, more_q = _summed(logits, top, total, direct, spread, c, class_, valid, LABELS, SMOOTHING)
                loss += more
                sum_q += more_q
        if grad.ptr is not None or target_grad.ptr is not None:
            for tile in range(sizes.channel_tiles):
                c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
                logits = load_logits(x, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
                direct, spread = _coefficients(
                    probabilities, weight_ptr, smoothing, class_, of_label, n, h, p, c, inside, valid, classes,
                    SMOOTHING, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
                )  # fmt: skip
                _write_gradients(
                    grad, target_grad, weight_ptr, smoothing, logits, top, total, direct, spread, sum_q, scale, known,
                    n, h, p, c, inside & valid, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
                )  # fmt: skip

    loss = tl.where(kept, tl.where(known, loss, float("nan")), 0.0)
    if row_loss.ptr is not None:
        place = row_loss.ptr + (n * row_loss.n + h * row_loss.h + p * row_loss.w)
        tl.store(place, loss.to(row_loss.ptr.dtype.element_ty), mask=inside)
    if loss_ptr is not None:
        _reduce(
            tl.sum(loss, axis=0, keep_dims=True), tl.sum(of_label, axis=0, keep_dims=True),
            loss_ptr, total_ptr, shared, fan_in, rows, MEAN, LABELS,
        )  # fmt: skip
    elif total_ptr is not None:
        tl.store(total_ptr, 0.0, mask=tl.program_id(0) == 0)


@triton.jit
def _reduce(loss, total, loss_ptr, total_ptr, shared, fan_in, rows, MEAN: tl.constexpr, LABELS: tl.constexpr):
    """Add what all programs have, [1, 1] each, and store the reduced loss and Σ weight[label]."""
    if shared is None:
        _finish(loss, total, loss_ptr, total_ptr, rows, MEAN, LABELS)
    else:
        split = tl.program_id(0)
        splits = tl.num_programs(0)
        leave_part(loss, shared, 0, split, splits, fan_in, 0, 2)
        leave_part(total, shared, 0, split, splits, fan_in, 1, 2)
        if last_to_arrive(shared, 0, split, splits, fan_in, 2, 2):
            i = tl.arange(0, 2)
            both = total_of(shared, 0, splits, fan_in, i, 2)[None, :]
            loss = tl.sum(tl.where(i[None, :] == 0, both, 0.0), axis=1, keep_dims=True)
            total = tl.sum(tl.where(i[None, :] == 1, both, 0.0), axis=1, keep_dims=True)
            _finish(loss, total, loss_ptr, total_ptr, rows, MEAN, LABELS)


@triton.jit
def _finish(loss, total, loss_ptr, total_ptr, rows, MEAN: tl.constexpr, LABELS: tl.constexpr):
    only = tl.zeros((1, 1), tl.int32)
    if MEAN:
        loss = loss / (total if LABELS else tl.full((1, 1), 1.0, tl.float32) * rows)
    tl.store(loss_ptr + only, loss.to(loss_ptr.dtype.element_ty))
    tl.store(total_ptr + only, total)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """x ← factor · x over dense memory; nothing is read or written for the factor 1, that of a loss by itself."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(INDEX) * BLOCK
        for start in range(tl.program_id(0).to(INDEX) * BLOCK, size, step):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
            tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), mask=i < size)
