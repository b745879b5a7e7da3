from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.ops.activation import check_activation


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the layers share: torch's bookkeeping around :func:`gpukern.functional.batch_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._normalize(input)

    def _normalize(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        batch = self.training or (self.running_mean is None and self.running_var is None)
        # In training, statistics that are not tracked are neither read nor updated.
        running = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if running else None,
            self.running_var if running else None,
            self.weight,
            self.bias,
            batch,
            momentum,
            self.eps,
            **epilogue,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on gpukern's kernels. See :func:`gpukern.functional.batch_norm`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on gpukern's kernels. See :func:`gpukern.functional.batch_norm`."""


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
        return self._normalize(input, residual=residual, activation=self.activation, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}"
