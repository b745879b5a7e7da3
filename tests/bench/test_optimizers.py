"""``python -m bench.optimizers``: what it counts, against counts made by hand, and that it measures what it says."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from bench import measure as measure_module
from bench import optimizer_steps, optimizers
from bench.accuracy import relative_error
from bench.measure import measure
from bench.optimizer_steps import OPTIMIZERS, Operation, Tensors
from bench.suite import Selection, suites, tasks
from bench.suites import optimizer
from gpukern.runtime.mode import Mode, force_mode
from tests.bench.tiny import QUICK


def test_shapes():
    found = [optimizer_steps.shapes(model) for model in ("resnet50", optimizer_steps.LLAMA)]
    elements = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in found]
    assert elements[0] == 25_557_032 and 1.05e9 < elements[1] < 1.15e9
    assert list(map(len, found)) == [161, 201]


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
    assert row["gpukern"] == 1
    assert {way: row["torch"][way] for way in expected} == expected


def test_rules_with_norms_take_a_second_launch():
    row = optimizers.count_launches("ResNet-50", "LAMB")
    assert row["gpukern"] == 2 and row["torch"] == {}


@pytest.mark.parametrize(
    ("name", "floor", "ours", "fused"),
    [("SGD", 12, 12, 12), ("SGD, momentum", 20, 20, 20), ("Adam", 28, 28, 28), ("Adam, amsgrad", 36, 36, 36)],
)
def test_bytes(name, floor, ours, fused):
    row = optimizers.count_bytes(name)
    assert (row["floor"], row["gpukern"], row["torch"]["fused"]) == (floor, ours, fused)
    assert row["torch"]["single"] >= floor and row["torch"]["foreach"] >= floor


def test_bytes_of_norms():
    assert [optimizers.count_bytes(name)["gpukern"] for name in ("LARS", "LAMB")] == [28, 44]


def test_a_stubbed_step_changes_nothing_and_is_put_back():
    with optimizer_steps.stubbed_launch():
        optimizer, parameters = optimizer_steps.ones("Adam", Tensors([(3,)]), optimizers.optim)
        optimizer.step()
    assert optimizer_steps.Nothing.launched == ["update_kernel"] and torch.equal(parameters[0], torch.ones(3))
    row = optimizers.time_host("Adam", 3, True, rounds=2)
    assert (row["tensors"], row["groups"]) == (3, 3)
    assert min(row["cached"], row["checked"], *row["torch"].values()) > 0
    with force_mode(Mode.REFERENCE):
        optimizer, parameters = optimizer_steps.ones("Adam", Tensors([(3,)]), optimizers.optim)
        optimizer.step()
    assert not torch.equal(parameters[0], torch.ones(3))


def test_gradients_in_a_bucket():
    plain, in_bucket = ([p.grad for p in Tensors([(4, 3), (), (5,)], bucket=b).made()] for b in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, in_bucket, strict=True))
    assert [(gradient.data_ptr() - in_bucket[0].data_ptr()) // 4 for gradient in in_bucket] == [0, 12, 13]
    assert in_bucket[0].data_ptr() % 16 == 4


# ---- the suite -----------------------------------------------------------------------------------------------------

SUITE, CPU = suites()["optimizer"], torch.device("cpu")


def chosen(*names: str, networks=("tiny",), dtype: str = "float32"):
    return tasks(SUITE, Selection(networks, (1,), (dtype,), ("",), names or SUITE.computations))


@pytest.fixture
def small(monkeypatch):
    """Networks of two tensors, on the kernels' substitute."""
    monkeypatch.setattr(optimizer, "shapes", lambda model: [(5, 3), (7,)])
    with force_mode(Mode.REFERENCE):
        yield


def test_every_optimizer_is_a_row_and_the_harder_layouts_are_of_few(small):
    found = [(task.case.computation, task.case.uses[0].layer) for task in chosen()]
    wanted = [(name, layer) for name in OPTIMIZERS for layer in ("plain", "groups", "bucket")]
    assert found == [each for each in wanted if each[1] != "bucket" or each[0] in ("SGD, momentum", "Adam")]
    (llama,) = chosen("Adam", networks=(optimizer_steps.LLAMA,))
    assert llama.case.uses[0].network == optimizer_steps.LLAMA == SUITE.networks_called("Llama")[0]
    assert [SUITE.work(task).bytes for task in chosen("Adam")] == [22 * 28, 3 * 22 * 28, 22 * 28]
    assert SUITE.work(chosen("Adam", dtype="bfloat16")[0]).bytes == 22 * 14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_candidate_is_right_and_leaves_the_gradients(name, dtype, small):
    for task in chosen(name, dtype=dtype):
        row = measure(SUITE, task, QUICK, CPU)
        expected = ["gpukern", *(f"torch {way}" for way in ("fused", "foreach") if optimizer_steps.has(name, way))]
        # Not each of PyTorch's fused ones runs on a CPU.
        known = [each for each in row.candidates if "fused" not in each.name]
        assert [each.name for each in row.candidates] == expected
        assert {each.status for each in known} == {"ok"} and all(each.samples["wall"] for each in known)


def test_gradients_of_the_suite_in_a_bucket(small):
    plain, _, bucket = chosen("Adam")
    first, second = SUITE.tensors(bucket, CPU)
    assert second.data_ptr() - first.data_ptr() == 4 * 15 and first.data_ptr() % 16 == 4
    assert first.std() > 0.1 and SUITE.tensors(plain, CPU)[0].shape == (5, 3)


def test_a_wrong_step_is_not_timed(small, monkeypatch):
    real = optimizers.optim.Adam.step

    def wrong(self, closure=None):
        real(self, closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.data += 1e-5

    monkeypatch.setattr(optimizers.optim.Adam, "step", wrong)
    ours, *others = measure(SUITE, chosen("Adam")[0], QUICK, CPU).candidates
    assert ours.status == "wrong" and not ours.samples and {each.status for each in others} == {"ok"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_left_out_is_found(name, small):
    """Parameters are ones, and even the smallest update of one is more than the bound."""
    task = chosen(name)[0]
    gradients = SUITE.tensors(task, CPU)
    reference = SUITE.reference(task, gradients)
    (stepper,) = SUITE.implementations(task, (), CPU)[0].prepare(gradients)
    assert relative_error(SUITE.result(stepper), reference) > SUITE.bound(task)
    assert relative_error(SUITE.result(stepper.step()), reference) <= SUITE.bound(task)


def test_of_a_large_model_a_part_is_compared(small, monkeypatch):
    monkeypatch.setattr(optimizer, "_COMPARED", 15)
    task = chosen("SGD, momentum")[0]
    gradients = SUITE.tensors(task, CPU)
    assert SUITE.reference(task, gradients).shape == (15,)
    assert measure(SUITE, task, QUICK, CPU).candidates[0].status == "ok"


def test_steps_are_timed_from_python_alone(monkeypatch):
    """A step of PyTorch's counts on the host, and cannot be captured."""
    ways = [type("Way", (), {"way": name}) for name in ("graph", "eager")]
    monkeypatch.setattr(measure_module, "stopwatches", lambda device: ways)
    contest = measure_module._Contest(SUITE, 0.0, CPU, lambda each: None, lambda found: None)
    assert [way.way for way in contest._ways] == ["eager"]
    assert len(measure_module._Contest(suites()["conv"], 0.0, CPU, print, print)._ways) == 2


def test_the_command(tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(optimizers, "RESULTS", tmp_path)
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
