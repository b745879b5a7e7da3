"""What ``torch.utils.flop_counter`` counts for gpukern's operators: what it counts for those of torch in their places.

It counts two operations for each product of convolutions and matrices, in the padding too, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from gpukern.conv import output_size
from gpukern.runtime.import_hooks import when_imported

Shape = Sequence[int]


def register_formulas() -> None:
    """Register them now or when torch's counter is imported, which imports Triton and is not needed before."""
    when_imported("torch.utils.flop_counter", _register)


def _register(counter: ModuleType) -> None:
    for name, formula in _formulas(counter.conv_flop_count).items():
        operator = getattr(torch.ops.gpukern, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


def _formulas(of_conv: Callable[..., int]) -> dict[str, Callable[..., int]]:
    """By the operator's name, of its arguments with shapes for tensors. ``of_conv`` is torch's: of the shapes of input,
    weight and output, and whether it is transposed."""

    def conv2d(input: Shape, weight: Shape, *_: object, out_shape: Shape, **__: object) -> int:
        return of_conv(input, weight, out_shape)

    def conv2d_with_more(input: Shape, weight: Shape, *_: object, out_shape: tuple[Shape, ...], **__: object) -> int:
        return of_conv(input, weight, out_shape[0])

    def conv2d_max_pool2d(
        input: Shape, weight: Shape, bias: Shape | None, *geometry: object, out_shape: Shape, **_: object
    ) -> int:
        return of_conv(input, weight, (*out_shape[:2], *output_size(input, weight, bias, *geometry[:4])))

    def conv_transpose2d(input: Shape, weight: Shape, *_: object, out_shape: Shape, **__: object) -> int:
        return of_conv(input, weight, out_shape, transposed=True)

    def conv2d_weight_grad(grad: Shape, input: Shape, *_: object, out_shape: Shape, **__: object) -> int:
        # As torch has it: a convolution in which images and channels have changed places, whatever the groups.
        return of_conv(*map(_swapped, (input, grad, out_shape)))

    def linear(input: Shape, weight: Shape, *_: object, **__: object) -> int:
        return 2 * input[0] * weight[0] * weight[1]

    def linear_weight_grad(grad: Shape, input: Shape, **_: object) -> int:
        return 2 * grad[0] * grad[1] * input[1]

    return {
        "conv2d": conv2d,
        "conv2d_statistics": conv2d_with_more,
        "conv2d_batch_norm": conv2d_with_more,
        "conv2d_max_pool2d": conv2d_max_pool2d,
        "conv2d_input_grad": conv_transpose2d,
        "conv2d_weight_grad": conv2d_weight_grad,
        "conv_transpose2d": conv_transpose2d,
        "linear": linear,
        "linear_weight_grad": linear_weight_grad,
    }


def _swapped(shape: Shape) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]
