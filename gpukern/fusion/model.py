"""The fused model that :func:`gpukern.fuse` returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from gpukern.fusion.cuda_graph import Replayed
from gpukern.fusion.module import ForInference, FusedModule
from gpukern.fusion.report import FusionReport


class FusedModel(ForInference):
    """A model fused for inference: call it as the model was called.

    It is an ``nn.Module`` without parameters, its weights are buffers; ``train()`` and another dtype are refused, with
    RuntimeError. Its one child is ``module``, the same without the report and without CUDA graphs. It takes the
    arguments of the example, by place or by name, and returns what the model did, in dicts and tuples as they were, in
    the dtype that it was fused for. ``report`` describes what was done.

    Floating-point tensors are cast to that dtype, with a warning if the example was in another one; other tensors must
    be of the example's dtype, or a call raises TypeError. Autocast has no effect, and a warning says so. Numbers,
    flags, words and None are constants: a call with others than the example's raises ValueError, and so does one with
    an argument that the example left at its default.
    """

    def __init__(
        self, module: FusedModule, report: FusionReport, example: tuple, dynamic_batch: bool, cuda_graph: bool
    ) -> None:
        super().__init__()
        self.module = module
        self.report = report
        self._example, self._dynamic_batch = example, dynamic_batch
        self._replayed = Replayed(module.in_order) if cuda_graph else None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self._replayed is None or torch.compiler.is_compiling():
            return self.module(*inputs, **named)
        return self._replayed(*self.module.bound(inputs, named))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedModel:
        super()._apply(fn, recurse)
        if self._replayed is not None:
            self._replayed = Replayed(self.module.in_order)  # captures read the tensors where they were
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module and the report to ``path``, a ``.pt2`` file for :func:`gpukern.load`: all of it or, with
        OSError or FusionError, nothing: a file that was there stays."""
        from gpukern.fusion.artifact import save

        save(path, self.module, self.report, self._example, self._dynamic_batch)

    def __repr__(self) -> str:
        told = self.report.quantization
        if told is not None:
            eight = sum(group.precision == told.format for group in told.groups)
            kind = f"{told.format} in {eight} of {len(told.groups)} products, else {told.precision}"
        else:
            kind = self.report.dtype
        return f"FusedModel({self.report.model}, {kind}, {len(self.report.fused)} fused groups)"
