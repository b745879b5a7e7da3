"""Batch norm across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gpukern.nn.batch_norm import BatchNormAct2d, _BatchNorm
from gpukern.nn.leaf import mark
from gpukern.ops import sync_batch_norm


class SyncBatchNorm(_BatchNorm, torch.nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` on gpukern's kernels: in training, the statistics are those of all processes' batches.

    In evaluation, and where there is only one process, it is :func:`gpukern.functional.batch_norm`. Batches may have
    different sizes, or be empty: in training every process of the group calls the layer, forward and backward, as often
    as the others. Where torch's refuses tensors on a CPU, this one takes them, with gloo for example; there
    ``DistributedDataParallel`` refuses a model with such a layer, but not one that is converted when it is wrapped.

    Raises, beyond what batch norm does, ValueError for an input without channels, and RuntimeError for a second
    derivative.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = self._group()
        if group is None:
            return self._compute(input)
        momentum, mean, variance = self._counted()
        return sync_batch_norm.apply(input, mean, variance, self.weight, self.bias, momentum, self.eps, group)

    def _group(self) -> Any:
        """The processes whose batches are one batch; None where this one is alone."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replace every batch norm of ``module``, torch's and gpukern's, and return it, as torch's method of that name.

        A module that is a batch norm itself is not changed: the result is another one with its tensors. Raises
        TypeError for a :class:`~gpukern.nn.BatchNormAct2d`, whose activation would be lost.
        """
        if isinstance(module, BatchNormAct2d):
            raise TypeError("BatchNormAct2d has an activation, and SyncBatchNorm none: use a BatchNorm2d and a layer")
        converted = super().convert_sync_batchnorm(module, process_group)
        if type(converted) is torch.nn.SyncBatchNorm:
            converted.__class__ = cls
            mark(converted)
        return converted
