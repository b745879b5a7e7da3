"""Counts and accuracies of fused networks in 16 and 8 bits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gpukern
from bench.quantization.__main__ import app, counted
from bench.quantization.accuracy import measure
from bench.quantization.cases import Case
from bench.quantization.count import count
from gpukern.runtime.device import H200

pytestmark = pytest.mark.usefixtures("reference_mode")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def test_bytes_are_those_of_every_operator():
    fused = gpukern.fuse(net(), torch.randn(2, 3, 8, 8), dtype=torch.float16, verify=False)
    found = count(fused.module, (5, 3, 8, 8), H200)
    pixels = 5 * 64
    # Two convolutions, the average and the linear layer: biases are of float32.
    weights = 2 * (16 * 27 + 16 * 144 + 160) + 4 * (16 + 16 + 10)
    activations = 2 * (pixels * (3 + 16) + pixels * 32 + (pixels + 5) * 16 + 5 * 26)
    assert found[:4] == (4, 0, activations, weights)
    # Each operator takes the longer of its two times: at least all bytes, and at most all bytes and all products.
    memory, products = found.bytes / H200.peaks.bandwidth, 2 * pixels * (16 * 27 + 16 * 144) + 2 * 5 * 16 * 10
    assert 0.999 * memory <= found.seconds <= 1.001 * memory + products / H200.peaks.matrix_rates["float16"]


@pytest.mark.slow
def test_eight_bits_move_half_and_launch_as_often():
    found = counted("resnet18", 32, H200, "int8")
    full, half, eight = found.values()
    assert full.launches == half.launches == eight.launches and eight.conversions == 0
    assert eight.bytes <= 0.55 * half.bytes and half.bytes < 0.51 * full.bytes
    assert half.seconds >= 1.8 * eight.seconds


def test_accuracy_counts_what_is_right_and_what_was_given_back():
    model, images = net(), torch.randn(40, 3, 8, 8)
    labels = model(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10
    case = Case("net", model, [torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)], images, labels)
    found = measure(case, "int8", 0.5)
    assert (found.images, found.of_labels, found.full, found.groups) == (40, True, 0.75, 3)
    assert abs(found.eight - 0.75) <= 0.1 and abs(found.half - 0.75) <= 0.05
    assert found.sixteen >= 1 and found.bytes < found.bytes_half
    without = measure(Case("net", model, case.calibration, images, None), "int8", 0.5)
    assert without.full == 1 and not without.of_labels and without.eight >= 0.8


def test_command_writes_its_numbers(tmp_path):
    run = CliRunner().invoke(app, ["bytes", "--network", "lenet", "--batch", "2", "--json", str(tmp_path / "n.json")])
    assert run.exit_code == 0, run.output
    (row,) = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert row["network"] == "lenet" and set(row) == {"network", "batch", "float32", "float16", "int8"}
    assert row["int8"]["weights"] < row["float16"]["weights"] and "LeNet-5" in run.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bytes", "--dtype", "int4"], "neither int8 nor fp8"),
        (["accuracy", "--network", "alexnet"], "none of lenet"),
        (["bytes", "--device", "h999"], "no device"),
    ],
)
def test_wrong_options_are_named(arguments, words):
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code != 0 and words in run.output
