"""What each of two processes runs for test_dtensor.py: ``python -m tests.optim.sharded RANK FILE``."""

from __future__ import annotations

import os
import sys
from copy import deepcopy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.optim.cases import FULL


def gradients(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def main(rank: int, path: str) -> None:
    """Shards of uneven sizes and sums that are still to be made give what one process computes of whole tensors."""
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for case in FULL:
        for placement in (Shard(0), Shard(1), Replicate()):
            if case.name in ("LARS", "LAMB") and placement != Replicate():
                continue
            whole = torch.nn.Parameter(gradients((7, 5), 99))
            spread = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement]))
            optimizers = [case.ours([each], **case.options) for each in (whole, spread)]
            for number in range(3):
                whole.grad = gradients((7, 5), number)
                spread.grad = distribute_tensor(whole.grad.clone(), mesh, [placement])
                if number == 2:
                    # Each process has half of the sum.
                    spread.grad = DTensor.from_local(whole.grad / 2, mesh, [Partial()])
                for optimizer in optimizers:
                    optimizer.step()
            assert torch.equal(spread.full_tensor(), whole), (case, placement)
    replicated(rank)
    dist.barrier()
    # Not as usual: threads of gloo that are still there abort the process.
    os._exit(0)


def replicated(rank: int) -> None:
    """Under DistributedDataParallel, whose gradients lie in buckets one behind the other and are aligned to nothing."""
    for case in FULL:
        torch.manual_seed(7)
        whole = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
        copy = torch.nn.parallel.DistributedDataParallel(deepcopy(whole), gradient_as_bucket_view=True)
        optimizers = [case.ours(model.parameters(), **case.options, max_grad_norm=0.5) for model in (whole, copy)]
        for number in range(3):
            x = gradients((8, 5), number)
            for model, part, optimizer in zip((whole, copy), (x, x[rank::2]), optimizers, strict=True):
                optimizer.zero_grad()
                model(part).square().mean().backward()
                optimizer.step()
        places = {parameter.grad.data_ptr() % 16 for parameter in copy.parameters()}
        assert len(places) > 1, places
        for parameter, twin in zip(whole.parameters(), copy.parameters(), strict=True):
            assert torch.allclose(parameter, twin, rtol=1e-4, atol=1e-5), (case, parameter, twin)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
