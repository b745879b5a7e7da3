"""The arithmetic of a network as a table: sizes, parameters, multiply-adds and receptive fields, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gpukern.runtime.evaluation import evaluate
from gpukern.summary.inputs import example, original
from gpukern.summary.table import Row, Summary
from gpukern.summary.views import tensors

__all__ = ["Row", "Summary", "summary"]


def summary(
    model: torch.nn.Module,
    input_size: Sequence[int] | torch.Tensor | Mapping[str, Any] | Sequence[Sequence[int] | torch.Tensor | Any],
) -> Summary:
    """Run ``model`` once on zeros and describe every layer that has no layers inside.

    Output size ``(N + 2P − D(K−1) − 1)/S + 1``; receptive field ``r + D(K−1)·j`` where ``j``, the product of the
    strides before, is the distance in the input of two neighbouring elements. Multiply-adds are counted operator by
    operator as they run, by the formulas of :mod:`torch.utils.flop_counter` (a multiply-add is two FLOPs): every
    convolution and matrix product, that of attention, of functions and of a layer's parametrization too; not products
    element by element, nor of a matrix with a vector.

    Parameters
    ----------
    model:
        any module. It runs in eval mode and without gradients, on its own device and dtype; its mode and its buffers
        are left as they were. Of one that ``torch.compile`` wrapped, what was wrapped is shown; also a fused model's
        module.
    input_size:
        one sample [features], [C, L], [C, H, W] or [C, D, H, W], or a batch of them, [N, …]: the model's first
        convolution, pooling or normalization tells which (without one, sizes of even length are batches, and a first
        embedding gets whole numbers). For several inputs a list of sizes. For anything else a tensor, or a list of
        the arguments, each a tensor or a dict, list or tuple with tensors in it, the batch first; a dict alone is one
        argument. Multiply-adds are divided by the first tensor's size.

    Where the size formula gives a fraction, torch silently rounds down and never reads the last rows or columns: a
    note says so. In a network with branches the receptive field is that of the branch that sees most; a norm over
    positions, a global pool or a gate computed from one sees everything. ValueError for an input size of another rank,
    TypeError for what is no module, or one of TorchScript; what the forward raises comes through.
    """
    # Torch's counter imports Triton: ``import gpukern`` must not wait for it.
    from gpukern.summary.record import Recorder

    model = original(model)
    inputs = example(model, input_size)
    given = tensors(inputs)
    recorder = Recorder(model, given, max(1, *given[0].shape[:1]))
    with torch.no_grad(), _eval_mode(model):
        with recorder.watching():
            model(*inputs)
        rows = recorder.rows()
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(row.parameters for row in rows)
    notes = recorder.notes
    if counted < total:
        notes.append(f"{total - counted:,} parameters belong to no layer of this table.")
    return Summary(type(model).__name__, rows, total, sum(row.multiply_adds for row in rows), tuple(notes))


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    evaluate(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
