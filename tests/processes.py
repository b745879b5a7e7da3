"""Tests in several processes that talk to each other by gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``count`` processes of one group; a module's own function.

    The first error of any of them is raised, and so is a process that ends early without one.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (folder, count, function, arguments), nprocs=count)
        assert len(list(Path(folder).glob("done*"))) == count


def _run(rank: int, folder: str, count: int, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    function(rank, *arguments)
    dist.destroy_process_group()
    Path(folder, f"done{rank}").touch()
