"""DistributedDataParallel: two processes, each with half of a batch and statistics of its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpukern.compiler import backend
from gpukern.runtime.mode import Mode, force_mode
from tests.compiler.nets import classifier
from tests.compiler.training import assert_follows, bound, depth, loss, state, trained
from tests.processes import in_processes


def train(rank: int, inside: bool) -> None:
    # One parameter to a bucket: Dynamo then cuts the graph where a bucket is full.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    torch.manual_seed(0)
    model = trained(classifier)
    exact = DistributedDataParallel(copy.deepcopy(model).double(), broadcast_buffers=False)
    graphs = []
    compile_graph = backend.compile_graph
    backend.compile_graph = lambda *given: (graphs.append(given), compile_graph(*given))[1]  # type: ignore[assignment]
    options = {"broadcast_buffers": False, "bucket_cap_mb": 0.001}
    if inside:
        call = DistributedDataParallel(torch.compile(model, backend="gpukern"), **options)
    else:
        call = torch.compile(DistributedDataParallel(model, **options), backend="gpukern")
    with force_mode(Mode.REFERENCE):
        for _ in range(2):
            x = torch.randn(4, 3, 6, 5)[2 * rank : 2 * rank + 2]
            loss(call(x)).backward()
            loss(exact(x.double())).backward()
    assert_follows(state(model), state(exact.module), 2 * bound(torch.float32, depth(model)))
    assert inside or len(graphs) > 2


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["model compiled", "all compiled"])
def test_gradients_are_averaged(inside):
    in_processes(2, train, inside)
