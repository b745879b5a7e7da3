"""Who gpukern is measured against, and under which names and settings."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench import peers as module
from bench.peers import PEERS, both_layouts, to_layout, torch_peers
from bench.suite import Selection, suites, tasks
from tests.bench.tiny import CPU, Products, candidate, product

CUDA = torch.device("cuda")


def names(**chosen) -> dict[str, str]:
    given = {"library": "cuDNN", "layout": "NCHW", "peers": PEERS, "device": CUDA} | chosen
    return {each.name: each.setting for each in torch_peers(product, **given)}


def test_each_peer_is_named_with_its_setting():
    assert names() == {
        "cuDNN NCHW": "NCHW, cudnn.benchmark on, deterministic off",
        "cuDNN channels_last": "channels_last, cudnn.benchmark on, deterministic off",
        "torch.compile": "NCHW, mode default, static shapes",
        "torch.compile max-autotune": "NCHW, mode max-autotune-no-cudagraphs, static shapes",
        "FlagGems": "NCHW",
    }
    assert next(iter(names(layout="channels_last"))) == "cuDNN channels_last"  # the case's own first
    assert names(peers=()) == {}
    assert names(peers=("library",), layout="", library="cuBLAS") == {"cuBLAS": "as PyTorch calls it"}


def test_nobody_is_called_cudnn_who_is_not():
    assert names(peers=("library",), device=CPU) == {"torch NCHW": "NCHW", "torch channels_last": "channels_last"}
    assert names(peers=("library",), library="ATen")["ATen NCHW"] == "NCHW"


def test_a_layout_has_the_same_values():
    image, matrix, indices = torch.randn(2, 3, 4, 5), torch.randn(3, 4), torch.arange(120).view(2, 3, 4, 5)
    for layout in both_layouts("NCHW"):
        same = to_layout(layout, (image, matrix, indices))
        assert all(torch.equal(a, b) for a, b in zip(same, (image, matrix, indices), strict=True))
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert same[0].is_contiguous(memory_format=wanted) and same[2].is_contiguous(memory_format=wanted)
    assert both_layouts("") == ("",)


def test_flaggems_is_missing_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (found,) = torch_peers(product, "cuDNN", "NCHW", ("flaggems",), CPU)
    assert found.missing == "flag_gems is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (found,) = torch_peers(product, "cuDNN", "NCHW", ("flaggems",), CPU)
    assert not found.missing


@pytest.fixture
def compiles(monkeypatch) -> list:
    """What was compiled or forgotten, in order."""
    log = []

    def compile(function, mode, dynamic):
        assert dynamic is False
        log.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: log.append("reset"))
    monkeypatch.setitem(module.sys.modules, "torch._dynamo", object())
    return log


def test_compiling_happens_at_the_first_call_and_once(compiles):
    first, second = torch_peers(product, "cuDNN", "", ("compile", "max-autotune"), CPU)
    assert compiles == []
    x = torch.ones(2, 2)
    for _ in range(3):
        first.function(x, x)
        second.function(x, x)
    # No reset between the two, which would compile the first again, while it is timed.
    assert compiles == [None, "max-autotune-no-cudagraphs"]


def test_what_was_compiled_is_forgotten_between_rows(compiles):
    from bench.measure import measure
    from tests.bench.tiny import QUICK, task

    peers = torch_peers(product, "cuDNN", "", ("compile",), CPU)
    for _ in range(2):
        measure(Products(candidate("gpukern", product), *peers), task(), QUICK, CPU)
    assert compiles == ["reset", None, "reset"]


def test_the_fused_peer_of_cudnn_is_missing_without_it():
    suite = suites()["epilogue"]
    (task, *_) = tasks(suite, Selection(("lenet",), (1,), ("float32",), ("NCHW",), suite.computations))
    for device, missing in ((CPU, "cuDNN needs a CUDA device"), (CUDA, "")):
        found = {each.name: each.missing for each in suite.implementations(task, ("library",), device)}
        assert found["cuDNN fused"] == missing
    assert "cuDNN fused" not in [each.name for each in suite.implementations(task, (), CPU)]


@pytest.mark.parametrize("name", ["conv", "epilogue", "pool", "linear", "model"])
def test_gpukern_comes_first_and_peers_as_asked_for(name):
    suite = suites()[name]
    for task in tasks(suite, Selection(("lenet",), (1,), ("float32",), suite.layouts, suite.computations)):
        alone = [each.name for each in suite.implementations(task, (), CPU)]
        everyone = [each.name for each in suite.implementations(task, PEERS, CPU)]
        assert alone[0] == "gpukern" == everyone[0] and len(set(everyone)) == len(everyone) > len(alone)
        assert all(each.startswith("gpukern") for each in alone)
