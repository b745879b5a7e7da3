from __future__ import annotations

from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.conv import Conv2d, padded
from gpukern.nn.leaf import Leaf
from gpukern.ops.activation import check_activation


class _BatchNorm(Leaf, torch.nn.modules.batchnorm._BatchNorm):
    """Base of the layers: torch's bookkeeping around :func:`gpukern.functional.batch_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        self._check_input_dim(input)
        momentum, mean, variance = self._counted()
        batch = self.training or (mean is None and variance is None)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, batch, momentum, self.eps, **epilogue)

    def _counted(self) -> tuple[float, torch.Tensor | None, torch.Tensor | None]:
        """Count this batch; return its weight in the running statistics, and these."""
        batches = self._batches()
        if batches is not None:
            batches.add_(1)
        return self._momentum(0), *self._running()

    def _compute_after(self, conv: Conv2d, input: torch.Tensor, **epilogue) -> torch.Tensor:
        """In training, compute this norm of ``conv(input)``, whose kernel makes the statistics. input: [N, C, H, W]."""
        batches = self._batches()
        input, padding = padded(conv, input)
        output = F.conv2d_batch_norm(
            *(input, conv.weight, conv.bias, *self._running(), self.weight, self.bias),
            *(conv.stride, padding, conv.dilation, conv.groups),
            momentum=self._momentum(0 if batches is None else 1),
            eps=self.eps,
            **epilogue,
        )
        if batches is not None:  # only now: a batch that the convolution refuses never comes to a norm
            batches.add_(1)
        return output

    def _running(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The running statistics. In training, those that are not tracked are neither read nor updated."""
        if self.training and not self.track_running_stats:
            return None, None
        return self.running_mean, self.running_var

    def _batches(self) -> torch.Tensor | None:
        """The counter of batches where one is kept of this batch, None elsewhere."""
        return self.num_batches_tracked if self.training and self.track_running_stats else None

    def _momentum(self, ahead: int) -> float:
        """The weight of a batch, with ``ahead`` batches that ``num_batches_tracked`` has not counted yet."""
        if self.momentum is not None:
            return self.momentum
        # The mean over all batches so far.
        batches = self._batches()
        return 0.0 if batches is None else 1.0 / float(batches + ahead)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on gpukern's kernels. See :func:`gpukern.functional.batch_norm`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on gpukern's kernels. See :func:`gpukern.functional.batch_norm`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on gpukern's kernels. See :func:`gpukern.functional.batch_norm`."""


class BatchNormAct2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``y = act(batch_norm(x) + residual)`` in the passes over memory that the batch norm alone takes.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype:
        as for ``torch.nn.BatchNorm2d``, whose ``state_dict`` this layer has.
    activation, negative_slope:
        as for :func:`gpukern.functional.batch_norm`; ValueError for an unknown one.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = check_activation(activation, negative_slope)
        self.negative_slope = negative_slope

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C, H, W], and what is added before the activation: a tensor of the same shape."""
        return self._compute(input, residual=residual, **self._epilogue)

    @property
    def _epilogue(self) -> dict[str, Any]:
        return {"activation": self.activation, "negative_slope": self.negative_slope}

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}"
