"""Kernels compiled ahead, in processes that have no interpreter in place."""

from __future__ import annotations

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from bench import precompile as module
from bench.precompile import precompile
from gpukern.runtime.device import H100

COMMON = """
import json, os
from dataclasses import replace
from pathlib import Path

import torch

from bench.peers import torch_at_its_best
from bench.precompile import precompile
from bench.suite import Selection, suites, tasks
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100

def files():
    return sorted(str(path) for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

suite = suites()["conv"]
selection = Selection(("lenet",), (2,), ("float32",), ("channels_last",), ("forward", "weight gradient"))
chosen = tasks(suite, selection)
"""

COMPILE = """
if __name__ == "__main__":
    broken = replace(chosen[0], problem="no problem at all")
    done = []
    count = precompile("conv", [broken, *chosen], H100, processes=1, on_done=done.append)
    ahead = files()
    here = set()
    for task in chosen:  # the same launches once more, here, under the settings of a run
        with torch_at_its_best("float32"), record_launches(H100) as launches, torch.no_grad():
            suite.implementations(task, (), torch.device("cpu"))[0].function(*suite.tensors(task, torch.device("cpu")))
        for launch in launches:
            here.add(launch.key)
            launch.compile()
    print(json.dumps({"count": count, "done": sum(done), "ahead": len(ahead), "new": len(files()) - len(ahead),
                      "here": len(here)}))
"""


@pytest.fixture
def script(tmp_path, run_python):
    """Runs code as a file: processes that are spawned import their parent's main module."""

    def run(code: str, **environment: str) -> dict:
        path = tmp_path / "script.py"
        path.write_text(COMMON + code)
        cache = str(tmp_path / "cache")
        ran = run_python("import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", str(path),
                         TRITON_CACHE_DIR=cache, **environment)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return run


def test_kernels_are_compiled_ahead_and_found_again(script):
    """Four tasks and one that cannot be recorded, which stops none of them."""
    found = script(COMPILE)
    assert found["done"] == 5  # every task is heard of
    assert found["ahead"] >= found["here"] >= 4  # one a task
    assert found["count"] >= found["ahead"]
    assert found["new"] == 0


SHARED = """
from torch import nn

import bench.precompile as module
from gpukern.runtime.compile_only import Launch
from models.zoo import NETWORKS, Network

def narrow():
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 16, 1, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

NETWORKS["narrow"] = Network("narrow", "Narrow", narrow, (8, 12, 12))
suite = suites()["inference"]
chosen = tasks(suite, Selection(("narrow",), (2,), ("float16",), ("channels_last",), ("forward",)))
compiled = []
Launch.compile = lambda launch: compiled.append(launch.key)
shares = module._shares(True, chosen, 3)
for share in shares:
    module._compiled.clear()
    module._compile("inference", share, H100)
cpu = torch.device("cpu")
with torch_at_its_best("float16"), record_launches(H100) as launches, torch.no_grad():
    suite.implementations(chosen[0], (), cpu)[0].function(*suite.tensors(chosen[0], cpu))
print(json.dumps({"shares": len(shares), "once": len(compiled) == len(set(compiled)), "kernels": len(compiled),
                  "same": set(compiled) == {launch.key for launch in launches}}))
"""


def test_processes_share_the_kernels_of_one_fused_network(script):
    """Each compiles some, together they compile what the network launches, on tensors without memory."""
    found = script(SHARED)
    assert found == {"shares": 3, "once": True, "kernels": 4, "same": True}


def test_all_parts_of_a_task_are_one_task(pool):
    done = []
    precompile("inference", ["a", "b"], H100, processes=7, on_done=done.append)
    assert done == pytest.approx([1 / 3] * 6)


class FakePool:
    """In this process: each share is a future that was finished, or was broken."""

    def __init__(self, *_, **__):
        self.shut_down = False
        self._processes = {}
        FakePool.last = self

    def submit(self, function, suite, share, device, peers):
        future = Future()
        if "dies" in share.tasks:
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        else:
            future.set_result(len(share.tasks))
        return future

    def shutdown(self, cancel_futures=False):
        self.shut_down = cancel_futures


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", FakePool)


def test_a_process_that_dies_does_not_stop_the_run(pool):
    done = []
    assert precompile("conv", ["a", "dies", "b"], H100, processes=1, on_done=done.append) == 2
    assert done == [1, 1, 1] and FakePool.last.shut_down


def test_nothing_to_compile_is_no_error(pool):
    assert precompile("conv", [], H100) == 0


def test_an_interruption_ends_the_processes_at_once(pool):
    """Not after everything that was submitted has been compiled."""
    terminated = []

    def interrupt(tasks):
        FakePool.last._processes = {1: SimpleNamespace(terminate=lambda: terminated.append(1))}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompile("conv", ["a", "b"], H100, processes=1, on_done=interrupt)
    assert terminated == [1] and FakePool.last.shut_down
