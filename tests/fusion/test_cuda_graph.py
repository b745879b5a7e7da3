"""Replaying a fused model as a CUDA graph."""

from __future__ import annotations

import pytest
import torch

import gpukern
from gpukern.fusion.cuda_graph import Replayed
from tests.fusion.networks import conv, net, norm


def test_needs_cuda_tensors():
    replayed = Replayed(torch.nn.Identity())
    with pytest.raises(RuntimeError, match="expected CUDA tensors"):
        replayed(torch.randn(2, 3))


@pytest.mark.gpu
def test_replays_by_shape_and_keeps_its_results(device):
    model, (x,) = net(lambda m, x: {"y": m.b(m.a(x)).relu()}, a=conv(), b=norm())
    model, x = model.to(device), x.to(device)
    plain = gpukern.fuse(model, x)
    replayed = gpukern.fuse(model, x, cuda_graph=True)
    inputs = [torch.randn(batch, *x.shape[1:], device=device) for batch in (2, 3, 2, 1)]
    results = [replayed(each)["y"] for each in inputs]
    for each, result in zip(inputs, results, strict=True):
        assert torch.equal(result, plain(each)["y"])
