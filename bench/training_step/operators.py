"""What an ATen operator reads and writes, by its formula: inputs once, outputs once.

Operators that CUDA computes in several passes over memory by any implementation count as those: the gradients of a
convolution one by one, batch norm's statistics and their use, forward and backward. A launch is one pass that writes
something, so that PyTorch's real number is larger: zeros before a scatter, biases after cuDNN, two-stage sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Pass(NamedTuple):
    """One pass over memory."""

    reads: Sequence[torch.Tensor]
    writes: Sequence[torch.Tensor]


#: They only make a tensor, or look at one in another way without saying so in their schema.
_NOTHING = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten._local_scalar_dense,
    aten.set_,
}
#: They write without reading.
_FILLS = {
    aten.fill_,
    aten.full_like,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.zero_,
    aten.zeros_like,
}


def passes(operator: Any, arguments: Sequence[Any], result: Any) -> list[Pass]:
    """The passes of one call, none of a view or of a call without tensors to write."""
    packet = operator.overloadpacket
    mutated = _mutated(operator, arguments)
    if packet in _NOTHING or torch.Tag.inplace_view in operator.tags or (_is_view(operator) and not mutated):
        return []
    given = _tensors(arguments)
    writes = mutated or _tensors(result)
    if not writes:
        return []
    if packet in _FILLS:
        return [Pass((), writes)]
    if packet is aten.copy_:
        return [Pass([arguments[1]], [arguments[0]])]
    special = _SPECIAL.get(packet)
    return [*special(arguments, result)] if special else [Pass(given, writes)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _mutated(operator: Any, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """What the call writes into; nothing where only the memory's shape changes."""
    schema = zip(operator._schema.arguments, arguments, strict=False)
    return _tensors([value for each, value in schema if each.alias_info is not None and each.alias_info.is_write])


def _is_view(operator: Any) -> bool:
    return any(each.alias_info is not None for each in operator._schema.returns)


# ---- operators of several passes, or that leave an argument unread --------------------------------------------------


def _convolution_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """One pass for each gradient: the input's, the weight's, the bias's."""
    grad, input, weight = arguments[:3]
    for operands, gradient in zip(([grad, weight], [grad, input], [grad]), result, strict=True):
        if gradient is not None:
            yield Pass(operands, [gradient])


def _batch_norm(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """In training the statistics first, which reads the input once more."""
    input, weight, bias, mean, variance, training = arguments[:6]
    output, *saved = result
    running = _tensors([mean, variance])
    affine = _tensors([weight, bias])
    if training:
        yield Pass([input, *running], [*saved, *running])
    yield Pass([input, *affine, *(saved if training else running)], [output])


def _batch_norm_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """Two sums over the gradient and the input, then the input's gradient from both again."""
    grad, input, *others = arguments
    numbers = _tensors(others)
    for_input, *sums = result
    yield Pass([grad, input, *numbers], _tensors(sums))
    if for_input is not None:
        yield Pass([grad, input, *numbers], [for_input])


def _group_norm(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """The statistics first; both passes read a copy in NCHW of an input that is laid out otherwise."""
    input, weight, bias = arguments[:3]
    output, *saved = result
    if not input.is_contiguous():
        yield Pass([input], [output])
    yield Pass([input], saved)
    yield Pass([input, *_tensors([weight, bias]), *saved], [output])


def _group_norm_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """Sums over the gradient and the input, then the input's gradient from both again; copies in NCHW as above."""
    grad, input, mean, deviation, weight = arguments[:5]
    for_input, *sums = result
    yield from (Pass([each], [each]) for each in (grad, input) if not each.is_contiguous())
    yield Pass([grad, input, mean, deviation], _tensors(sums))
    if for_input is not None:
        yield Pass(_tensors([grad, input, mean, deviation, weight]), [for_input])


def _layer_norm_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """The input's gradient, whose sums are within a row; those of weight and bias, whose are across rows."""
    grad, input, _, mean, deviation, weight, *_ = arguments
    if result[0] is not None:
        yield Pass(_tensors([grad, input, mean, deviation, weight]), [result[0]])
    if sums := _tensors(result[1:]):
        yield Pass([grad, input, mean, deviation], sums)


def _max_pool_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """Of the pooled input only the shape matters."""
    yield Pass([arguments[0], arguments[-1]], [result])


def _nll_backward(arguments: Sequence[Any], result: Any) -> Iterator[Pass]:
    """It writes zeros, and minus the weight at each label: of the input only the shape matters."""
    grad, _, *others = arguments
    yield Pass([grad, *_tensors(others)], [result])


_SPECIAL = {
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten.native_group_norm: _group_norm,
    aten.native_group_norm_backward: _group_norm_backward,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.max_pool2d_with_indices_backward: _max_pool_backward,
    aten.nll_loss_backward: _nll_backward,
    aten.nll_loss2d_backward: _nll_backward,
}
