"""Compiles gpukern's kernels for a run in all processor cores at once, into Triton's cache on disk.

A first call compiles for a second or more while a rented GPU waits; hundreds of launches one after the other cost more
than measuring them. The worker processes never touch the GPU: they record what an operation would launch, on tensors
without memory, and compile that (:mod:`gpukern.runtime.compile_only`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from bench.peers import EIGHT_BITS, torch_at_its_best
from bench.suite import Suite, Task, suites
from gpukern.runtime.device import DeviceSpec


def precompile(
    suite_name: str,
    tasks: Sequence[Task],
    device: DeviceSpec,
    processes: int | None = None,
    on_done: Callable[[float], None] = lambda tasks: None,
    peers: Sequence[str] = (),
) -> int:
    """Compile what gpukern launches for ``tasks`` on ``device``; the number of kernels, each counted in its process.

    Those of ``peers`` that are gpukern's own, in 8 bits, are compiled too. ``on_done`` gets how many tasks were
    finished, or which part of one. What does not compile is left for the run to show.
    """
    processes = processes or os.cpu_count() or 1
    ours = tuple(each for each in EIGHT_BITS if each in peers)
    shares = _shares(suites()[suite_name].many_kernels, tasks, processes)
    # spawn: a fork of a process that has started CUDA cannot use Triton's compiler safely.
    context = multiprocessing.get_context("spawn")
    kernels = 0
    pool = ProcessPoolExecutor(min(processes, len(shares)) or 1, mp_context=context, initializer=_without_gpu)
    try:
        futures = {pool.submit(_compile, suite_name, share, device, ours): share for share in shares}
        for future in as_completed(futures):
            with contextlib.suppress(Exception):  # a worker that died, above all: it takes the others' work along
                kernels += future.result()
            on_done(len(futures[future].tasks) / futures[future].parts)
    except BaseException:
        # An interrupted run must save now, not after what was submitted has been compiled.
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return kernels


@dataclass(frozen=True)
class _Share:
    """Share of one process: the kernels of ``tasks`` whose number is ``part`` modulo ``parts``."""

    tasks: Sequence[Task]
    part: int = 0
    parts: int = 1


def _shares(many_kernels: bool, tasks: Sequence[Task], processes: int) -> list[_Share]:
    if many_kernels:
        parts = max(1, processes // max(1, len(tasks)))
        each = [[task] for task in tasks]
        return [_Share(task, part, parts) for task in each for part in range(parts)]
    # Neighbours share kernels: shares of consecutive tasks compile fewer of them twice.
    size = max(1, min(16, len(tasks) // (4 * processes)))
    return [_Share(tasks[first : first + size]) for first in range(0, len(tasks), size)]


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


_compiled: set[tuple] = set()


def _compile(suite_name: str, share: _Share, device: DeviceSpec, peers: Sequence[str] = ()) -> int:
    from gpukern.runtime.compile_only import record_launches

    suite, meta = suites()[suite_name], torch.device("meta")
    before = len(_compiled)
    for task in share.tasks:
        with record_launches(device) as launches, torch_at_its_best(task.case.dtype), torch.no_grad():
            _call(suite, task, meta, peers)
        # In the order of the launches, which is the same in every process.
        distinct = list({launch.key: launch for launch in launches}.values())
        for launch in distinct[share.part :: share.parts]:
            if launch.key not in _compiled:
                _compiled.add(launch.key)
                with contextlib.suppress(Exception):
                    launch.compile()
    return len(_compiled) - before


def _call(suite: Suite, task: Task, device: torch.device, peers: Sequence[str]) -> None:
    """Make the call; a failure must not stop the tasks after it."""
    with contextlib.suppress(Exception):
        tensors = suite.tensors(task, device)
        for implementation in suite.implementations(task, peers, device):
            with contextlib.suppress(Exception):
                implementation.function(*implementation.prepare(tensors))
