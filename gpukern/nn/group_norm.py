from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class GroupNorm(Leaf, torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` on gpukern's kernels. See :func:`gpukern.functional.group_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **epilogue)


class _InstanceNorm(Leaf, torch.nn.modules.instancenorm._InstanceNorm):
    """Base of the layers: torch's bookkeeping around :func:`gpukern.functional.instance_norm`."""

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
