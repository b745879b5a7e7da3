"""``gpukern.dense``: a classifier of patches, applied to every patch of an image in one pass.

Neighbouring patches have most pixels in common, and a convolution of each computes the same numbers again. The dense
network computes each number once: windows keep their place at every pixel, and those after a stride s look at every
s-th pixel (dilation).

- A. Giusti, D. Cireşan, J. Masci, L. Gambardella, J. Schmidhuber: Fast image scanning with deep max-pooling
  convolutional neural networks, ICIP 2013.
- H. Li, R. Zhao, X. Wang: Highly efficient forward and backward propagation of convolutional neural networks for
  pixelwise classification, 2014 (the *d-regularly sparse kernels* here).
- J. Long, E. Shelhamer, T. Darrell: Fully convolutional networks for semantic segmentation, CVPR 2015.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch

from gpukern.densify.errors import DenseError

if TYPE_CHECKING:
    from gpukern.densify.network import DenseNetwork
    from gpukern.densify.report import DenseLayer, DenseReport, MultiplyAdds

__all__ = ["DenseError", "DenseLayer", "DenseNetwork", "DenseReport", "MultiplyAdds", "dense"]

#: Imported at the first use: ``import gpukern`` must not wait for them.
_LATER = {
    "DenseLayer": "gpukern.densify.report",
    "DenseNetwork": "gpukern.densify.network",
    "DenseReport": "gpukern.densify.report",
    "MultiplyAdds": "gpukern.densify.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def dense(
    model: torch.nn.Module,
    patch_size: int | Sequence[int],
    *,
    border: Literal["valid", "reflect", "replicate", "constant"] = "valid",
) -> DenseNetwork:
    """The network ``y[n, :, i, j] = model(x[n, :, i:i+h, j:j+w])`` of whole images, on gpukern's kernels.

    A convolution or pool after strides of s in all becomes one of stride 1 and dilation s, a linear layer a convolution
    whose window is what it had flattened, and the next ones 1 × 1 convolutions. The result equals that of the patches
    to rounding, in training too, but for batch norms, whose statistics are then those of all pixels, and dropout, which
    draws for all patches together. It is differentiable, so that whole images, or crops of them, train the model.

    Parameters
    ----------
    model:
        maps patches [N, C, h, w] to [N, K] or [N, K, 1, 1]. Any module that ``torch.fx`` can trace: layers, functions
        of ``torch``, ``torch.nn.functional`` and :mod:`gpukern.functional`, residual and dense connections. It is not
        changed; the network has its very tensors, so that training the one trains the other.
    patch_size:
        h = w, or (h, w).
    border:
        "valid" gives [N, K, H−h+1, W−w+1]. "reflect", "replicate" and "constant" (zeros) first put pixels around the
        image, as ``torch.nn.functional.pad`` does, and give [N, K, H, W]: the patch of pixel (i, j) has it in row h//2
        and column w//2.

    Raises
    ------
    :class:`DenseError`, a ValueError, with the name of the layer and the reason: for padding, and whatever else sees
    the border or all of a patch; for layers that the patch size does not fit; for a forward that depends on values.
    TypeError for what is no module, ValueError for an unknown border or a patch size below 1.
    """
    from gpukern.densify.network import BORDERS, DenseNetwork
    from gpukern.densify.reading import copied, read

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"dense() takes a torch.nn.Module, got {type(model).__name__}")
    patch = _patch(patch_size)
    if border not in BORDERS:
        raise ValueError(f"unknown border {border!r}: it is one of {', '.join(BORDERS)}")
    own = copied(model)
    steps, result = read(own, patch)
    return DenseNetwork(own, steps, result.slot, patch, border)


def _patch(patch_size: int | Sequence[int]) -> tuple[int, int]:
    sizes = (patch_size, patch_size) if isinstance(patch_size, Integral) else patch_size
    if (
        not isinstance(sizes, Sequence)
        or len(sizes) != 2
        or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in sizes)
    ):
        raise TypeError(f"patch_size must be an int or a pair of ints, got {patch_size!r}")
    if min(sizes) < 1:
        raise ValueError(f"patch_size must be positive, got {patch_size!r}")
    return int(sizes[0]), int(sizes[1])
