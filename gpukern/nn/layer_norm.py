from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class LayerNorm(Leaf, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on gpukern's kernels. See :func:`gpukern.functional.layer_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **epilogue)


class LayerNorm2d(LayerNorm):
    """Layer norm over the channels of each pixel of [N, C, H, W], as ConvNeXt's: torch.nn has none.

    What the layers of this name in torchvision and timm compute: a ``LayerNorm`` of the image seen as [N, H, W, C].
    The image is read in whatever layout it has, without a copy, and the result is channels_last, as theirs is.
    The constructor is that of ``torch.nn.LayerNorm``, with the number of channels for ``normalized_shape``; networks
    take an ``eps`` of 1e-6.
    """

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return super()._compute(input.permute(0, 2, 3, 1), **epilogue).permute(0, 3, 1, 2)


class RMSNorm(Leaf, torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` on gpukern's kernels. See :func:`gpukern.functional.rms_norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x)

    def _compute(self, x: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, **epilogue)
