"""Replaying a fused model as a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

import gpukern
from gpukern.fusion.cuda_graph import Replayed
from tests.fusion.networks import conv, net, norm


def test_needs_cuda_tensors():
    replayed = Replayed(torch.nn.Identity())
    with pytest.raises(RuntimeError, match="expected CUDA tensors"):
        replayed(torch.randn(2, 3))


def test_a_copy_has_a_module_of_its_own_and_captures_anew():
    replayed = Replayed(torch.nn.Identity().forward)
    replayed._captured["a shape"] = (None for _ in ())  # as a graph, nothing that can be copied
    copied = copy.deepcopy(replayed)
    assert not copied._captured and copied._call.__self__ is not replayed._call.__self__


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
