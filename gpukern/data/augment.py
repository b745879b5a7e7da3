"""The layer of the input pipeline: images of bytes in, normalized crops out, with the state that repeats them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpukern.ops import augment as _augment
from gpukern.ops._augment.problem import PADDING_MODES
from gpukern.runtime.arguments import as_float, as_int, as_pair, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import KERNEL_DTYPES

#: What a channel's mean or deviation is told by: a number for all channels, one for each; or a mean image.
Numbers = float | Sequence[float] | torch.Tensor

_SEEDS = range(-(2**63), 2**63)


class Augment(torch.nn.Module):
    """``(x / 255 − mean) / std`` of random crops, perhaps flipped and with a square cut out, in one pass.

    In evaluation the crop is the middle one, and nothing is flipped or cut out. The result is in channels_last.

    Parameters
    ----------
    size:
        height and width of the crops, an int for both.
    padding:
        pixels around an image (above and below, left and right, or an int) that a random crop may reach into.
    flip:
        the probability that an image is flipped from left to right; True is one half.
    cutout:
        side of the square that is set to 0, the mean. Its middle is any pixel, so that it may lie partly outside.
    mean, std:
        of pixels between 0 and 1, as torchvision takes them: for each channel, or a number for all. ``mean`` may be a
        mean image [H, W, C] (:func:`gpukern.data.mean_image`), of the images before they are cropped. Computed with
        as ``(x − 255 · mean) · (1 / (255 · std))`` in fp32.
    dtype:
        of the result: float32, float16 or bfloat16; in reference mode float64 too.
    padding_mode, fill:
        ``"constant"``, of the pixel value ``fill`` between 0 and 255; ``"edge"``, ``"reflect"`` or ``"symmetric"``,
        as torchvision names them. In evaluation too, where images are smaller than ``size``.
    seed:
        with ``step`` and the number of a sample it tells everything that is random about the sample.
    before:
        a function of uint8 images [N, C, H, W] to such images, called first and in training only: torchvision's v2
        transforms, which draw from torch's generators, once for a whole batch.

    ``step`` is what was counted so far: one for each call in training. It is in ``state_dict``, with the seed. Not
    differentiable; not for CUDA graphs, which would repeat one step, nor traced by ``torch.compile``, which goes on
    behind it.

    Raises ValueError and TypeError for options; in a call what :data:`gpukern.ops.augment.augment` raises:
    NotImplementedError for other dtypes than uint8, RuntimeError for shapes and devices, ValueError for images that are
    smaller than a crop.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] = 0,
        flip: bool | float = False,
        cutout: int = 0,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        dtype: torch.dtype = torch.float32,
        *,
        padding_mode: str = "constant",
        fill: float = 0.0,
        seed: int = 0,
        before: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.padding = as_pair("size", size), as_pair("padding", padding)
        self.flip = flip / 2 if isinstance(flip, bool) else as_float("flip", flip)
        self.cutout = as_int("cutout", cutout)
        self.padding_mode, self.fill, self.dtype, self.before = padding_mode, as_float("fill", fill), dtype, before
        if before is not None and not callable(before):
            raise TypeError(f"before must be a function of images, got {type(before).__name__}")
        self.seed, self.step = seed, 0
        self._check()
        self.register_buffer("mean", (255 * _numbers("mean", mean)).float())
        deviations = _numbers("std", std)
        if deviations.dim() == 3 or not bool((deviations > 0).all()):
            raise ValueError(f"std must be above 0, a number or one for each channel, got {std}")
        self.register_buffer("scale", (1 / (255 * deviations)).float())

    def _check(self) -> None:
        if min(self.size) < 1 or min(self.padding) < 0 or self.cutout < 0:
            raise ValueError(
                f"size must be at least 1, padding and cutout at least 0, "
                f"got size={self.size}, padding={self.padding}, cutout={self.cutout}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"the probability of a flip has to be between 0 and 1, but got {self.flip}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {self.padding_mode!r}")
        if self.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")
        if as_int("seed", self.seed) not in _SEEDS:
            raise ValueError(f"seed must have 64 bits, got {self.seed}")

    @torch._disable_dynamo  # torch.compiler.disable, but for its import, which takes a second
    def forward(
        self,
        images: torch.Tensor,
        index: torch.Tensor | None = None,
        *,
        places: torch.Tensor | None = None,
        step: int | None = None,
    ) -> torch.Tensor:
        """Return [samples, C, *size] of uint8 ``images`` [N, H, W, C]: of those that ``index`` names, or of all.

        ``places`` are the numbers of the samples, by default those in ``index``, or from 0 on. With a ``step`` the
        layer's own is neither taken nor counted. An index that is no image is an IndexError on a CPU; on a GPU, where
        finding out would mean to wait for it, the sample is NaN.
        """
        check_tensors("Augment", images, optional=(index, places))
        require(images.dim() == 4, f"Augment: expected images [N, H, W, C], but got {list(images.shape)}")
        if self.training and images.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Augment: a CUDA graph would repeat the random numbers of one step; call it before")
        if self.training and self.before is not None:
            images, index, places = self._transformed(images, index, places)
        mean, scale = (each.expand(images.shape[-1]) if len(each) == 1 else each for each in (self.mean, self.scale))
        offset = self.step if step is None else as_int("step", step)
        output = _augment.augment(
            *(images, index, places, mean, scale, self.seed, offset, self.training),
            *(self.size, self.padding, self.padding_mode, self.fill, self.flip, self.cutout, self.dtype),
        )
        if self.training and step is None:
            self.step += 1
        return output

    def _transformed(
        self, images: torch.Tensor, index: torch.Tensor | None, places: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """The images gathered and transformed; their samples keep their numbers."""
        assert self.before is not None
        if index is not None:
            images = images.index_select(0, index)
            places = index if places is None else places
        made = self.before(images.permute(0, 3, 1, 2))
        if not isinstance(made, torch.Tensor) or made.dim() != 4 or len(made) != len(images):
            got = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise RuntimeError(f"Augment: expected {len(images)} images [N, C, H, W] of before=, but got {got}")
        return made.permute(0, 2, 3, 1), None, places

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seed, self.step = state["seed"], state["step"]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Augment:
        """Means stay float32 whatever the model around becomes: ``model.half()`` is about its parameters."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype is not kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self

    def extra_repr(self) -> str:
        shown = {
            **{"size": self.size, "padding": self.padding, "flip": self.flip, "cutout": self.cutout},
            **{"mean": self.mean / 255, "std": 1 / (255 * self.scale), "dtype": self.dtype},
            **{"padding_mode": self.padding_mode, "fill": self.fill, "seed": self.seed},
        }
        if self.before is not None and not isinstance(self.before, torch.nn.Module):  # layers are shown anyway
            shown["before"] = self.before
        parts = [f"{name}={_shown(value)}" for name, value in shown.items()]
        return ", ".join(part for part in parts if part not in _UNSAID)


#: What a layer that was not told otherwise has.
_UNSAID = ("padding=0", "flip=0", "cutout=0", "padding_mode='constant'", "fill=0")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)}" if value.dim() == 3 or value.is_meta else _shown(tuple(value.tolist()))
    if isinstance(value, tuple):
        words = [_shown(each) for each in value]
        return words[0] if len(set(words)) == 1 else f"({', '.join(words)})"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _numbers(name: str, given: Numbers) -> torch.Tensor:
    """float64 [1], [C] or [H, W, C]. ValueError for other shapes, and for what is not finite."""
    numbers = torch.as_tensor(given, dtype=torch.float64)
    numbers = numbers.reshape(1) if numbers.dim() == 0 else numbers
    if numbers.dim() not in (1, 3) or not numbers.numel():
        raise ValueError(f"{name} must be a number, one for each channel, or an image [H, W, C], got {given}")
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {given}")
    return numbers
