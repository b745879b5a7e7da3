from __future__ import annotations

from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf
from gpukern.ops.activation import activation


class GroupNorm(Leaf, torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` on gpukern's kernels. See :func:`gpukern.functional.group_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **epilogue)


class _InstanceNorm(Leaf, torch.nn.modules.instancenorm._InstanceNorm):
    """Base of the layers: torch's bookkeeping around :func:`gpukern.functional.instance_norm`."""

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        own: Any = self
        if input.dim() == own._get_no_batch_dim() + 1 and input.size(1) == self.num_features:
            return self._apply_instance_norm(input, **epilogue)
        # What torch's forward unsqueezes, warns of or refuses.
        return activation(self.forward(input), epilogue["activation"], epilogue.get("negative_slope", 0.01))

    def _apply_instance_norm(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.instance_norm(
            *(input, self.running_mean, self.running_var, self.weight, self.bias),
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            **epilogue,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` on gpukern's kernels. See :func:`gpukern.functional.instance_norm`."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` on gpukern's kernels. See :func:`gpukern.functional.instance_norm`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` on gpukern's kernels. See :func:`gpukern.functional.instance_norm`."""
