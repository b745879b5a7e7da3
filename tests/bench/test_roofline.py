"""Layers against the roofline: which rows there are, what they hold, and how they are written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import typer
from typer.testing import CliRunner

from bench import roofline
from bench.roofline import Row, by_batch, document, layers, main_kernel, markdown, row, summary
from gpukern.conv.plan import Direction
from gpukern.explain.compiled import CannotCompile, Compiled
from gpukern.runtime.device import A100, H100, RTX_4090

runner = CliRunner()
app = typer.Typer()
app.command()(roofline.main)

LENET = ("--network", "lenet", "--batch", "8")
ROW = Row(32, "conv1", 2, "a by b", "taps 64×64×32", 1, 30.0, 20.0, 10.0, "memory", 128, 0, 95)


def test_every_layer_is_a_row_of_each_batch():
    found = layers("resnet50", (1, 32), Direction.FORWARD, "float16", H100)
    # 53 convolutions and the layer of classes.
    assert [sum(each.count for each in found if each.batch == batch) for batch in (1, 32)] == [54, 54]
    assert [each.name for each in found][0::24] == ["conv1", "conv1"] and found[-1].name == "fc"
    assert {each.question.problem.N for each in found if each.batch == 32} == {32}
    # Nobody asks for the gradient of an image.
    assert "conv1" not in [each.name for each in layers("resnet50", (1,), Direction.INPUT_GRAD, "float16", H100)]


@pytest.mark.parametrize("direction", Direction)
def test_a_row_says_what_the_plan_costs(direction):
    for layer in layers("lenet", (8,), direction, "tf32", A100):
        found = row(layer, compiles=False)
        assert 0 < found.floor_us <= found.bound_us <= found.expected_us and found.launches >= 1
        assert (found.registers, found.spills, found.loop, found.note) == (None, None, None, "")


def test_machine_code_is_that_of_the_main_kernel(monkeypatch):
    main = Compiled("conv2d_taps_kernel", (7,), 99, 2**16, 3, 500, "HGMMA", {"tensor cores": 4, "predicates": 8}, 6)
    others = [dataclasses.replace(main, kernel=name) for name in ("copy_image_kernel", "sum_splits_kernel")]
    assert main_kernel([others[0], main, others[1]]) is main
    layer = layers("lenet", (8,), Direction.FORWARD, "float16", H100)[0]
    monkeypatch.setattr(roofline, "compiled", lambda question, plan: [others[0], main])
    found = row(layer, compiles=True)
    assert (found.registers, found.spills, found.loop) == (99, 3, 12)

    def fails(question, plan):
        raise CannotCompile("Triton is not installed")

    monkeypatch.setattr(roofline, "compiled", fails)
    found = row(layer, compiles=True)
    assert (found.registers, found.note) == (None, "Triton is not installed")


def test_the_summary_counts_layers_as_often_as_the_network_has_them():
    rows = [ROW, dataclasses.replace(ROW, count=1, layer="fc", floor_us=5.0)]
    assert summary(rows) == "All layers: floor 25.00 µs, bound 60.00 µs, expected 90.00 µs, 3.60 times the floor."
    single = dataclasses.replace(ROW, batch=1)
    assert by_batch([ROW, single, ROW]) == {32: [ROW, ROW], 1: [single]}


def test_markdown_has_a_table_for_each_batch_and_every_reason():
    unknown = dataclasses.replace(ROW, batch=1, registers=None, spills=None, loop=None, note="no compiler")
    text = markdown([unknown, ROW], "ResNet-50 on H100", "gpukern 1.0.")
    lines = text.splitlines()
    assert lines[0] == "# ResNet-50 on H100" and "**Predicted, not measured**" in lines[2]
    assert [line for line in lines if line.startswith("## ")] == ["## Batch 1", "## Batch 32"]
    tables = [line for line in lines if line.startswith("| conv1")]
    assert tables[0] == "| conv1 (2×) | a by b | taps 64×64×32 | 1 | 10.00 | 20.00 | 30.00 | 3.00× | – | – | – |"
    assert tables[1].endswith("| 128 | 0 | 95 |") and lines[-1] == "- no compiler"


def test_the_command_prints_a_table_markdown_or_json():
    plain = runner.invoke(app, [*LENET, "--no-compile"])
    assert plain.exit_code == 0 and "LeNet-5 on H100: forward, float16, channels_last" in plain.output
    assert "conv2" in plain.output and "All layers: floor" in plain.output
    as_markdown = runner.invoke(app, [*LENET, "--no-compile", "--markdown"])
    assert as_markdown.output.startswith("# LeNet-5 on H100") and as_markdown.output.count("\n| fc") == 2
    rows = json.loads(runner.invoke(app, [*LENET, "--batch", "1", "--no-compile", "--json"]).output)
    assert [found["layer"] for found in rows] == ["conv1", "conv2", "fc1", "fc2"] * 2
    assert {found["batch"] for found in rows} == {1, 8} and all(found["expected_us"] > 0 for found in rows)


def test_it_writes_where_the_documentation_is(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "ROOT", tmp_path)
    result = runner.invoke(app, [*LENET, "--no-compile", "--write"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "docs" / "roofline-lenet-h100.md").read_text().startswith("# LeNet-5 on H100")


def test_documents_are_named_by_what_is_not_usual():
    assert str(document("resnet50", H100, Direction.FORWARD, "float16")) == "roofline-resnet50-h100.md"
    name = document("vgg16", RTX_4090, Direction.WEIGHT_GRAD, "tf32")
    assert str(name) == "roofline-vgg16-rtx-4090-weight-gradient-tf32.md"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--network", "alexnet"), "--network: unknown network 'alexnet'"),
        (("--device", "tpu"), "--device: no device or architecture is called 'tpu'"),
        (("--dtype", "int8"), "--dtype: no dtype is called 'int8'"),
        (("--direction", "all"), "--direction: one at a time"),
        (("--batch", "0"), "batch"),
    ],
)
def test_what_it_does_not_understand(arguments, message):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
