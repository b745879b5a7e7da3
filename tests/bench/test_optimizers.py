"""``python -m bench.optimizers``: what it counts, against counts made by hand, and that it measures what it says."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from bench import optimizer_device, optimizer_steps, optimizers
from bench.optimizer_steps import OPTIMIZERS, Operation, Tensors
from gpukern.runtime.mode import Mode, force_mode


def test_shapes():
    elements = [sum(torch.Size(shape).numel() for shape in optimizer_steps.shapes(m)) for m in ("ResNet-50", "Llama")]
    assert elements[0] == 25_557_032 and 1.05e9 < elements[1] < 1.15e9
    assert [len(optimizer_steps.shapes(m)) for m in ("ResNet-50", "Llama")] == [161, 201]


@pytest.mark.parametrize(
    ("depth", "sizes", "small", "large"),
    [
        (2, [10] * 64, 1, 1),
        (2, [10] * 65, 2, 1),
        (4, [65536 * 320], 1, 1),
        (4, [65536 * 320 + 1], 2, 1),
        (4, [65536 * 319, 10, 10], 2, 1),
        (4, [65536 * 2240 + 1], 8, 2),
        (5, [10] * 211, 8, 2),
        (1, [0, 0], 0, 0),
    ],
)
def test_tensors_and_chunks_are_packed_into_launches(depth, sizes, small, large):
    operation = Operation(depth, depth, 1, lists=True)
    assert [optimizer_steps.launches(operation, sizes, limit) for limit in ("4 KB", "32 KB")] == [small, large]


def test_numbers_and_counts_of_steps():
    assert optimizer_steps.launches(Operation(1, 1, 1, lists=True), [1] * 110, "4 KB") == 1
    assert optimizer_steps.launches(Operation(1, 1, 1, lists=True, numbers=True), [1] * 110, "4 KB") == 2
    # As many elements as there are tensors, whatever the tensors have.
    assert optimizer_steps.launches(Operation(1, 1, 1, lists=True, counts=True), [10**9] * 110, "4 KB") == 1
    assert optimizer_steps.launches(Operation(3, 3, 1, lists=False), [10**9], "4 KB") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Of the gradient: a multiplication of the buffer, its addition, and that to the parameter.
        ("SGD, momentum", {"single": [3 * 161], "fused": [4, 1]}),
        # Of the moments in one launch for 36 tensors, and of the steps.
        ("Adam", {"foreach": [23, 7], "fused": [7, 2]}),
        ("Adam, amsgrad", {"fused": [8, 2]}),
        ("SGD", {"single": [161], "fused": [3, 1]}),
    ],
)
def test_launches_for_resnet_50(name, expected):
    row = optimizers.count_launches("ResNet-50", name)
    assert row.gpukern == 1
    assert {way: row.torch[way] for way in expected} == expected


def test_rules_with_norms_take_a_second_launch():
    row = optimizers.count_launches("ResNet-50", "LAMB")
    assert row.gpukern == 2 and row.torch == {}


@pytest.mark.parametrize(
    ("name", "floor", "ours", "fused"),
    [("SGD", 12, 12, 12), ("SGD, momentum", 20, 20, 20), ("Adam", 28, 28, 28), ("Adam, amsgrad", 36, 36, 36)],
)
def test_bytes(name, floor, ours, fused):
    row = optimizers.count_bytes(name)
    assert (row.floor, row.gpukern, row.torch["fused"]) == (floor, ours, fused)
    assert row.torch["single"] >= floor and row.torch["foreach"] >= floor


def test_bytes_of_norms():
    assert optimizers.count_bytes("LARS").gpukern == 28 and optimizers.count_bytes("LAMB").gpukern == 44


def test_a_stubbed_step_changes_nothing_and_is_put_back():
    with optimizer_steps.stubbed_launch():
        optimizer, parameters = optimizer_steps.ones("Adam", Tensors([(3,)]), optimizers.optim)
        optimizer.step()
    assert optimizer_steps.Nothing.launched == ["update_kernel"] and torch.equal(parameters[0], torch.ones(3))
    row = optimizers.time_host("Adam", 3, True, rounds=2)
    assert (row.tensors, row.groups) == (3, 3) and min(row.cached, row.checked, *row.torch.values()) > 0
    with force_mode(Mode.REFERENCE):
        optimizer, parameters = optimizer_steps.ones("Adam", Tensors([(3,)]), optimizers.optim)
        optimizer.step()
    assert not torch.equal(parameters[0], torch.ones(3))


@pytest.fixture
def small(monkeypatch):
    """Models of two tensors, and a device that is the CPU."""
    monkeypatch.setattr(optimizer_device, "DEVICE", "cpu")
    monkeypatch.setattr(optimizer_device, "shapes", lambda model: [(5, 3), (7,)])
    monkeypatch.setattr(optimizer_device, "seconds", lambda call: (call(), 1e-3)[1])


def test_every_candidate_is_measured(small):
    rows = optimizer_device.measure_all(["Adam", "Lion"])
    found = [(row.problem, row.optimizer, row.candidate) for row in rows]
    adam = [("Adam", candidate) for candidate in ("gpukern", "torch fused", "torch foreach")]
    all_of_them = [*adam, ("Lion", "gpukern")]
    assert found == [
        (name, *row) for name, p in optimizer_device.PROBLEMS.items() for row in (adam if p.optimizers else all_of_them)
    ]
    bandwidths = {row.problem: row.bandwidth for row in rows if row.optimizer == "Adam"}
    assert bandwidths["ResNet-50"] == 22 * 28 / 1e-3 and bandwidths["Llama 1.1B, bfloat16"] == 22 * 14 / 1e-3


def test_gradients_in_a_bucket():
    plain, in_bucket = ([p.grad for p in Tensors([(4, 3), (), (5,)], bucket=b).made()] for b in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, in_bucket, strict=True))
    assert [(gradient.data_ptr() - in_bucket[0].data_ptr()) // 4 for gradient in in_bucket] == [0, 12, 13]
    assert in_bucket[0].data_ptr() % 16 == 4


def test_a_wrong_step_is_not_timed(small, monkeypatch):
    def wrong(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data += 1e-3

    monkeypatch.setattr(optimizers.optim.Adam, "step", wrong)
    with pytest.raises(RuntimeError, match="Adam: gpukern's step differs from torch's by"):
        list(optimizer_device.measure("ResNet-50", "Adam"))


def test_without_memory_the_others_are_still_measured(small, monkeypatch):
    def fails(call):
        raise torch.cuda.OutOfMemoryError("no")

    monkeypatch.setattr(optimizer_device, "seconds", fails)
    assert {row.problem_found for row in optimizer_device.measure("ResNet-50", "Adam")} == {"out of memory"}


def test_the_command(tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(optimizers, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(optimizers.main)
    out = tmp_path / "run" / "optimizers.json"
    result = CliRunner().invoke(app, ["--optimizer", "Adam", "--rounds", "2", "--write", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "Launches of a step, ResNet-50" in result.output and "Bytes for each parameter" in result.output
    path = tmp_path / "host" / "optimizers.json"
    assert out.read_text() == path.read_text()
    written = json.loads(path.read_text())
    assert written["launches"][0]["gpukern"] == 1 and written["environment"]["device_type"] == "cpu"
    assert "expected SGD" in CliRunner().invoke(app, ["--optimizer", "Sgd"]).output
    assert set(OPTIMIZERS) >= {row["optimizer"] for row in written["host"]}
