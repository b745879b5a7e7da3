"""Processes that train one network together, as ``torchrun`` starts them."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gpukern

#: Statistics of synchronized batch norms are the same everywhere. Newer releases of PyTorch have another word for it.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


@dataclass(frozen=True)
class Group:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Which rows of a whole batch are this process's."""
        return slice(self.rank, None, self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, in place, summed over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any of them."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(int(flag), device=device)).item())

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: torch.nn.Module, frozen: bool) -> torch.nn.Module:
        """What computes ``model`` in all processes: gradients are averaged, batch norms see the whole batch.

        ``frozen``: some of its parameters will not learn, at least for a while.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        # Batch norms are synchronized afterwards: on a CPU DistributedDataParallel refuses a model that has such.
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=frozen,
            **_KEEP_BUFFERS,
        )
        gpukern.nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
        return wrapped


def join(device: str) -> tuple[Group, str]:
    """The group that ``torchrun`` started this process for, and its device; alone without ``torchrun``.

    ``device`` is "auto", "cpu" or "cuda". RuntimeError where there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Group(), device
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RuntimeError(f"process {local} of this machine has no GPU of its own: use --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Group(dist.get_rank(), dist.get_world_size()), device if on_gpu else "cpu"


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
