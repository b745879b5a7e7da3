"""Dropout by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools

import torch

from gpukern.ops._batch_norm.tiles import tiles_of
from gpukern.ops._dropout import kernels
from gpukern.ops._dropout.planner import plan
from gpukern.ops._dropout.problem import Shape, chance, walk
from gpukern.ops._dropout.reference import empty
from gpukern.ops._images import Image
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import check_kernel_dtype


def dropout(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    state: torch.Tensor | None,
    p: float,
    features: int,
    key: int,
    offset: int,
    order: Shape,
) -> torch.Tensor:
    for each in (input, residual):
        check_kernel_dtype("dropout", input.dtype if each is None else each.dtype)
    output = empty(input, order, residual)
    _write(output, input, residual, state, p, features, key, offset, order)
    return output


def dropout_(input: torch.Tensor, *others) -> None:
    check_kernel_dtype("dropout", input.dtype)
    if input.stride() == empty(input.detach().to("meta"), others[-1]).stride():
        _write(input, input, None, *others)
    else:
        input.copy_(dropout(input, None, *others))


def _write(output, input, residual, state, p: float, features: int, key: int, offset: int, order: Shape) -> None:
    if not output.numel():
        return
    numbers = (_unread(output.device), 0, key, offset) if state is None else (state, 1, 0, 0)
    if features:
        _write_features(output, input, residual, numbers, p, features)
    else:
        _write_elements(output, input, residual, numbers, p, order)


def _write_elements(output, input, residual, numbers: tuple, p: float, order: Shape) -> None:
    operands = [input] if residual is None else [input, residual]
    path = walk(tuple(output.shape), order, tuple(each.stride() for each in operands))
    if path is None:  # more dimensions than the kernel has strides for
        operands = [empty(each, order).copy_(each) for each in operands]
        path = walk(tuple(output.shape), order, tuple(each.stride() for each in operands))
        assert path is not None
    size = output.numel()
    farthest = max(size, *(reach(path.sizes, strides) for strides in path.strides))
    chosen = plan(size, device_spec(output.device))
    images = [Image(each, *strides) for each, strides in zip(operands, path.strides, strict=True)]
    launch(
        kernels.dropout_kernel,
        (chosen.programs,),
        output.device,
        (
            *(images if len(images) == 2 else (*images, Image(None, 0, 0, 0, 0))),
            *(output, *numbers, path.sizes, size, *chance(p)),
        ),
        {"FLAT": path.flat, "BLOCK": chosen.block, "INDEX": index_type(farthest), "num_warps": chosen.warps},
    )


def _write_features(output, input, residual, numbers: tuple, p: float, features: int) -> None:
    target = _as_images(output, features)
    operands = (None if each is None else _as_images(each, features) for each in (input, residual))
    tiles = tiles_of(False, *operands, target, by_image=True)
    launch(
        kernels.feature_dropout_kernel,
        (tiles.plan.steps * tiles.plan.channel_tiles,),
        output.device,
        (*tiles.images, *numbers, tiles.sizes, *chance(p)),
        tiles.options,
    )
    if target.data_ptr() != output.data_ptr():
        output.copy_(target.view(output.shape))


@functools.cache
def _unread(device: torch.device) -> torch.Tensor:
    return torch.empty(2, dtype=torch.int64, device=device)


def _as_images(tensor: torch.Tensor, features: int) -> torch.Tensor:
    """View as [N, C, ...], of four dimensions at most: a copy where the strides do not allow it."""
    images = tensor.unsqueeze(0) if features == 1 else tensor
    return images.flatten(2) if images.dim() > 4 else images
