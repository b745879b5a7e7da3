"""The input pipeline in one pass: images of bytes in, normalized crops out, ready for the first convolution.

    y[i, c, h, w] = (x[index[i], top + h, left + w′, c] − mean[c]) · scale[c]      w′ = w or, flipped, width − 1 − w

Crops, flips and the squares that are cut out follow from a key, an offset and the number of the sample alone
(:mod:`gpukern.runtime.random`): whichever batch or process has a sample, it is the same. Cutout: DeVries and Taylor,
"Improved regularization of convolutional neural networks with cutout", 2017.
"""

from __future__ import annotations

import torch

from gpukern.ops._augment.problem import PADDING_MODES
from gpukern.ops._augment.reference import sides_of
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator

_implementations = Implementations("gpukern.ops._augment")


def _augment(images: torch.Tensor, *others) -> torch.Tensor:
    _check(images, *others)
    return _implementations.of(images).augment(images, *others)


def _augment_fake(images: torch.Tensor, *others) -> torch.Tensor:
    _check(images, *others)
    index, size, dtype = others[0], others[7], others[-1]
    samples = images.shape[0] if index is None else index.shape[0]
    return images.new_empty((samples, *size, images.shape[3]), dtype=dtype).permute(0, 3, 1, 2)


def _check(
    images, index, places, mean, scale, key, offset, random, size, padding, padding_mode, fill, flip, cutout, dtype
) -> None:
    """Raise what is told in :data:`augment`, before anything is launched."""
    if images.dtype is not torch.uint8:
        raise NotImplementedError(f"augment is not implemented for {images.dtype}: expected images of torch.uint8")
    require(images.dim() == 4, f"augment: expected images [N, H, W, C], but got {list(images.shape)}")
    _, H, W, C = images.shape
    require(min(H, W, C) > 0, f"augment: expected images of at least one pixel, but got {list(images.shape)}")
    if not dtype.is_floating_point:
        raise NotImplementedError(f"augment: expected a floating-point dtype, but got {dtype}")
    for name, each in (("index", index), ("places", places)):
        if each is not None:
            _check_numbers(name, each)
    samples = images.shape[0] if index is None else index.shape[0]
    if places is not None:
        require(places.shape[0] == samples, f"augment: {samples} samples, but {places.shape[0]} places")
    _check_means(mean, scale, H, W, C)
    for each in (index, places, mean, scale):
        if each is not None and each.device != images.device:
            raise RuntimeError(
                f"augment: expected all tensors to be on the same device, "
                f"but found at least two devices, {images.device} and {each.device}"
            )
    _check_options(size, padding, padding_mode, flip, cutout)
    sides_of(images, size, padding, padding_mode, random)


def _check_numbers(name: str, numbers: torch.Tensor) -> None:
    if numbers.dtype not in (torch.int64, torch.int32) or numbers.dim() != 1:
        raise RuntimeError(
            f"augment: expected {name} [samples] of torch.int64 or torch.int32, "
            f"but got {list(numbers.shape)} of {numbers.dtype}"
        )


def _check_means(mean: torch.Tensor, scale: torch.Tensor, H: int, W: int, C: int) -> None:
    for name, each in (("mean", mean), ("scale", scale)):
        if each.dtype is not torch.float32:
            raise RuntimeError(f"augment: expected {name} of torch.float32, but got {each.dtype}")
    require(
        list(mean.shape) in ([C], [H, W, C]),
        f"augment: expected mean [{C}], or a mean image {[H, W, C]}, but got {list(mean.shape)}",
    )
    require(list(scale.shape) == [C], f"augment: expected scale [{C}], but got {list(scale.shape)}")


def _check_options(size: list[int], padding: list[int], padding_mode: str, flip: float, cutout: int) -> None:
    for name, each, least in (("size", size, 1), ("padding", padding, 0)):
        require(len(each) == 2, f"augment: expected {name} for height and width, but got {list(each)}")
        if min(each) < least:
            raise ValueError(f"augment: expected {name} of at least {least}, but got {list(each)}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"augment: padding_mode must be one of {', '.join(PADDING_MODES)}, but got {padding_mode!r}")
    if not 0 <= flip <= 1:
        raise ValueError(f"augment: the probability of a flip has to be between 0 and 1, but got {flip}")
    if cutout < 0:
        raise ValueError(f"augment: expected cutout of at least 0 pixels, but got {cutout}")


#: [samples, C, *size] of ``dtype`` in channels_last, from ``images``, uint8 [N, H, W, C] of any strides.
#:
#: ``index``: the image of each sample, int64 or int32; None for all in order. ``places``: the number that tells a
#: sample's random numbers, None for that of its image. ``mean``: float32 [C], or a mean image [H, W, C]. ``scale``:
#: float32 [C]. ``random``: crops at any place of the image with ``padding`` [vertical, horizontal], flipped with
#: probability ``flip``, a square of ``cutout`` pixels set to 0; if not, the crop in the middle and nothing else.
#: Outside of an image there is ``fill``, or what ``padding_mode`` says; a mean image is continued by its edge, or as
#: the image is.
#:
#: Raises NotImplementedError for dtypes, RuntimeError for shapes that do not fit, ValueError for options and for crops
#: larger than the image with its padding. An index that is no image: IndexError in reference mode; the kernel, which
#: does not wait to look, makes the whole sample NaN.
augment = Operator(
    "augment",
    "(Tensor images, Tensor? index, Tensor? places, Tensor mean, Tensor scale, int key, int offset, bool random,"
    " int[] size, int[] padding, str padding_mode, float fill, float flip, int cutout, ScalarType dtype) -> Tensor",
    forward=_augment,
    fake=_augment_fake,
)
