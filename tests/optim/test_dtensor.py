"""Parameters that are spread over processes: DTensors, and what FSDP2 makes of a model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gpukern.optim as optim
from gpukern.runtime.mode import Mode, mode_of
from tests.optim.cases import FULL, Case

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="of processes on the CPU"),
]
ROOT = Path(__file__).resolve().parents[2]
#: Without norms of whole tensors.
ELEMENTWISE = [case for case in FULL if case.name not in ("LARS", "LAMB")]


@pytest.fixture(scope="module")
def mesh():
    """Of this process alone."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def spread(tensor: torch.Tensor, mesh) -> torch.Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.detach().clone(), mesh, [Shard(0)])


def pairs(mesh) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Whole parameters, and the same ones as DTensors."""
    whole = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7))]
    return whole, [nn.Parameter(spread(parameter, mesh)) for parameter in whole]


def give_gradients(whole: list[nn.Parameter], shards: list[nn.Parameter], mesh) -> None:
    for parameter, shard in zip(whole, shards, strict=True):
        parameter.grad = torch.randn_like(parameter)
        shard.grad = spread(parameter.grad, mesh)


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
@pytest.mark.parametrize("more", [{}, {"state_dtype": torch.bfloat16, "max_grad_value": 0.5}], ids=str)
def test_shards_are_updated_as_whole_tensors_are(case, more, mesh, where):
    from torch.distributed.tensor import DTensor

    whole, shards = pairs(mesh)
    one, other = case.ours(whole, **case.options, **more), case.ours(shards, **case.options, **more)
    for number in range(4):
        give_gradients(whole, shards, mesh)
        one.step()
        other.step()
        assert all(torch.equal(a, b.full_tensor()) for a, b in zip(whole, shards, strict=True))
        if number == 1:
            # In the middle of a training, by its state.
            saved, other = other.state_dict(), case.ours(shards, **case.options, **more)
            other.load_state_dict(saved)
    for parameter, shard in zip(whole, shards, strict=True):
        for name, value in one.state.get(parameter, {}).items():
            held = other.state[shard][name]
            if name == "step":
                assert torch.equal(held, value)
            else:
                assert isinstance(held, DTensor) and held.placements == shard.placements
                assert held.dtype is value.dtype and torch.equal(held.full_tensor(), value)


@pytest.mark.parametrize(
    ("case", "more"),
    [(Case("LARS"), {}), (Case("LAMB"), {}), (Case("Adam"), {"max_grad_norm": 1.0})],
    ids=str,
)
def test_what_needs_whole_tensors_is_refused_of_shards(case, more, mesh, where):
    from torch.distributed.tensor import Replicate

    whole, shards = pairs(mesh)
    give_gradients(whole, shards, mesh)
    before = [shard.full_tensor().clone() for shard in shards]
    optimizer = case.ours(shards, **more)
    with pytest.raises(RuntimeError, match=f"{case.name}.* needs norms of whole tensors"):
        optimizer.step()
    assert all(torch.equal(shard.full_tensor(), value) for shard, value in zip(shards, before, strict=True))
    copies = [nn.Parameter(shard.detach().redistribute(placements=[Replicate()])) for shard in shards]
    for copy, shard in zip(copies, shards, strict=True):
        copy.grad = shard.grad.redistribute(placements=[Replicate()])
    one, other = case.ours(whole, **more), case.ours(copies, **more)
    one.step()
    other.step()
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(whole, copies, strict=True))


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_a_model_that_is_fully_sharded(case, mesh, where):
    from torch.distributed.fsdp import fully_shard

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    plain, sharded = model(), fully_shard(model(), mesh=mesh)
    optimizers = [case.ours(each.parameters(), **case.options) for each in (plain, sharded)]
    for _ in range(3):
        x = torch.randn(4, 5)
        for each, optimizer in zip((plain, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for parameter, shard in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(parameter, shard.full_tensor())


def test_two_processes(tmp_path):
    mode = "1" if mode_of(torch.empty(0)) is not Mode.REFERENCE else "0"
    environment = {**os.environ, "GPUKERN_EMULATE": mode, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.optim.sharded", str(rank), str(tmp_path / "store")],
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]


def test_shards_and_whole_tensors_in_one_launch(mesh, where):
    """Where the memory of each is looked for in its own way: both may move."""
    whole, shards = pairs(mesh)
    mixed = [whole[0], shards[1]]
    optimizer, twin = optim.SGD(mixed, lr=0.5), optim.SGD([whole[1]], lr=0.5)
    for _ in range(3):
        give_gradients(whole, shards, mesh)
        optimizer.step()
        twin.step()
        assert torch.equal(mixed[1].full_tensor(), whole[1])
        for parameter in (mixed[0], mixed[1]._local_tensor):
            parameter.data = parameter.detach().clone()
    assert len(optimizer._step._parts) == 1
