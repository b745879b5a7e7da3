"""The input pipeline by its kernel, in a function of the same name and signature as in ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._augment import kernels
from gpukern.ops._augment.planner import plan
from gpukern.ops._augment.reference import flip_threshold, sides_of
from gpukern.ops._images import image
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import check_kernel_dtype


def augment(
    images: torch.Tensor,
    index: torch.Tensor | None,
    places: torch.Tensor | None,
    mean: torch.Tensor,
    scale: torch.Tensor,
    key: int,
    offset: int,
    random: bool,
    size: list[int],
    padding: list[int],
    padding_mode: str,
    fill: float,
    flip: float,
    cutout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_kernel_dtype("augment", dtype)
    N, H, W, C = images.shape
    samples = N if index is None else len(index)
    y = torch.empty((samples, *size, C), dtype=dtype, device=images.device)
    if y.numel():
        vertical, horizontal = sides_of(images, size, padding, padding_mode, random)
        one = images[0]
        outside = vertical.outside or horizontal.outside
        chosen = plan(size[0] * size[1] * C)
        numbers = (None if each is None else each.contiguous() for each in (index, places))
        mean = mean.contiguous() if mean.dim() == 3 else mean
        launch(
            kernels.augment_kernel,
            (samples * chosen.blocks,),
            images.device,
            (
                *(image(images.permute(0, 3, 1, 2)), *numbers),
                *(mean, mean.stride(0), scale, scale.stride(0), y),
                kernels.Crop(N, H, W, vertical.first, horizontal.first, vertical.choices, horizontal.choices),
                *(fill, key, offset, flip_threshold(flip)),
            ),
            {
                **{"HEIGHT": size[0], "WIDTH": size[1], "CHANNELS": C},
                **{"RANDOM": random, "CUTOUT": cutout, "PADDING": padding_mode if outside else "none"},
                "MEAN_IMAGE": mean.dim() == 3,
                "WHOLE": not random and list(size) == [H, W] and one.is_contiguous(),
                "BLOCK": chosen.block,
                "INDEX": index_type(max(reach(one.shape, one.stride()), one.numel())),
                "num_warps": chosen.warps,
            },
        )
    return y.permute(0, 3, 1, 2)
