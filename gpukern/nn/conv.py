from __future__ import annotations

import torch

from gpukern import functional as F


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on gpukern's kernels. See :func:`gpukern.functional.conv2d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
