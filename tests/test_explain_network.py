"""Networks against the roofline: which parts there are, what they hold, and how they are written."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gpukern
from gpukern.cli import app
from gpukern.conv.plan import Direction
from gpukern.explain import network
from gpukern.explain.layers import layer_calls
from gpukern.explain.machine_code import CannotCompile, Compiled
from gpukern.explain.network import Part, Setting, main_kernel, parts, total
from gpukern.explain.network_show import markdown, summary
from gpukern.fusion.network import fused_parts
from gpukern.runtime.device import A100, H100
from models.efficientnet import EfficientNetB0
from models.lenet import LeNet5
from models.resnet import resnet18, resnet50
from tests.conftest import ROOT

runner = CliRunner()
LENET = ("explain", "network", "tests.test_explain_network:lenet", "--input", "8x1x28x28", "--no-compile")
HALF = Setting("float16", True, H100)
FORWARD, EVERY = [Direction.FORWARD], list(Direction)
PART = Part(
    "conv1", 2, "conv2d", "forward", "a by b", "taps 64×64×32", 1, 1.5, 0.75, 6e9, 1e6, 2e6, "memory", 10.0, 20.0, 30.0,
    128, 0, 95,
)  # fmt: skip


def lenet() -> nn.Module:
    return LeNet5(layers=nn)


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def predicted(make, shape, directions=FORWARD, setting=HALF) -> list[Part]:
    return list(parts(on_meta(make), shape, directions, setting))


# ---- which parts there are -----------------------------------------------------------------------------------------


def test_every_layer_is_a_part_as_often_as_the_network_has_it():
    found = predicted(resnet50, (32, 3, 224, 224))
    # 53 convolutions, two pools and the layer of classes.
    every = total(found)
    assert every.plan == "53 conv2d, 1 max_pool2d, 1 adaptive_avg_pool2d, 1 linear"
    assert [found[0].layer, found[1].layer, found[-1].layer] == ["conv1", "maxpool", "fc"]
    assert sum(part.count for part in found) == 56 and found[2].problem.startswith("32×64×56×56")


def test_a_training_step_has_all_gradients_but_that_of_the_image():
    found = predicted(resnet50, (1, 3, 224, 224), EVERY)
    of_first = [part.computation for part in found if part.layer == "conv1"]
    assert of_first == ["forward", "weight gradient"]
    assert [part.computation for part in found if part.layer == "layer1.0.conv2"] == [each.value for each in Direction]
    assert [part.computation for part in found if part.layer == "maxpool"] == ["forward", "backward"]
    # A maximum writes down where it was found, a byte an element, and only for its backward.
    kept = next(part.bytes for part in found if part.layer == "maxpool")
    alone = next(part.bytes for part in predicted(resnet50, (1, 3, 224, 224)) if part.layer == "maxpool")
    assert kept - alone == 64 * 56 * 56
    assert not [
        part for part in predicted(resnet50, (1, 3, 224, 224), [Direction.WEIGHT_GRAD]) if "pool" in part.operation
    ]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32", "float32"])
def test_no_part_beats_its_floor(kind, channels_last):
    for part in predicted(lenet, (8, 1, 28, 28), EVERY, Setting(kind, channels_last, A100)):
        assert 0 < part.floor_us <= part.bound_us * 1.001 and part.bound_us <= part.expected_us and part.launches >= 1
        assert 0 < part.efficiency <= 1.001 and part.moved >= part.bytes and part.bound in ("memory", "compute")
        assert (part.registers, part.spills, part.loop, part.note) == (None, None, None, "")


def test_layers_that_gpukern_does_not_take_are_told():
    """More output pixels than kernels can number."""
    told: list[str] = []
    found = list(parts(on_meta(resnet50), (500_000, 3, 224, 224), FORWARD, HALF, told.append))
    assert told[0].startswith("conv1, forward: conv2d: ")
    assert len(found) == len(predicted(resnet50, (1, 3, 224, 224))) - len(told)


def test_a_network_is_looked_at_and_left_as_it_was():
    model = on_meta(lenet)
    calls = layer_calls(model, torch.empty(8, 1, 28, 28, device="meta"))
    assert [call.name for call in calls if call.is_first] == ["conv1"]
    assert not any(module._forward_hooks for module in model.modules())


# ---- fused networks ------------------------------------------------------------------------------------------------


@functools.cache
def fused(make, side: int = 224) -> nn.Module:
    made = gpukern.fuse(make().eval(), torch.randn(2, 3, side, side), dtype=torch.float16, verify=False)
    return made.module.to("meta")


def image(batch: int, side: int = 224) -> torch.Tensor:
    return torch.empty(batch, 3, side, side, dtype=torch.float16, device="meta")


@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.name)
def test_a_fused_resnet_is_its_layers_and_eight_residuals(device):
    setting = dataclasses.replace(HALF, device=device)
    found, layers = (
        total(each)
        for each in (
            fused_parts(fused(resnet18), image(32), setting),
            predicted(resnet18, (32, 3, 224, 224), setting=setting),
        )
    )
    assert found.plan == layers.plan == "20 conv2d, 1 max_pool2d, 1 adaptive_avg_pool2d, 1 linear"
    assert found.flops == layers.flops
    residuals = sum(2 * 64 * 56 * 56 // 2**stage for stage in range(4))
    assert found.bytes == layers.bytes + 2 * 32 * residuals  # and no pass for a batch norm
    assert found.moved >= found.bytes and found.bound_us >= found.floor_us
    # One by one from memory to memory: more than the network as a whole could not beat.
    compute, memory = layers.flops / device.peaks.matrix_rates["float16"], layers.bytes / device.peaks.bandwidth
    assert found.floor_us >= max(compute, memory) * 1e6


def test_what_is_no_layer_counts_by_its_bytes():
    """The gates of squeeze and excite: each is a product of its own, which reads an image and a gate and writes one."""
    found = fused_parts(fused(EfficientNetB0), image(32), HALF)
    every, layers = total(found), total(predicted(EfficientNetB0, (32, 3, 224, 224)))
    assert "16 mul" in every.plan and every.launches >= 115
    assert every.bytes > 1.2 * layers.bytes and every.flops == layers.flops
    gates = [part for part in found if part.operation == "mul"]
    assert all(part.bound == "memory" and part.floor_us == part.bound_us == part.expected_us for part in gates)


class Pooled(nn.Module):
    """A pair that one kernel can compute, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        return nn.functional.avg_pool2d(nn.functional.max_pool2d(torch.relu(self.conv(x)), 2), 3, 2, 1)


def test_a_convolution_with_its_pool_counts_as_two_launches():
    found = fused_parts(fused(Pooled, 64), image(4, 64), HALF)
    assert [part.operation for part in found] == ["conv2d", "max_pool2d", "avg_pool2d"]
    assert found[0].problem.endswith(", relu") and "window 2×2, stride 2×2" in found[1].problem
    assert "4×8×32×32, window 3×3, stride 2×2, padding 1×1" in found[2].problem


class Bytes(nn.Module):
    """Pools of 8 bits, as they stand in a network for inference in them."""

    def forward(self, x):
        x = torch.ops.gpukern.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False)
        return torch.ops.gpukern.adaptive_avg_pool2d_quantized(x, 0.1, [1, 1], 1.0, torch.float16)


def test_pools_of_8_bits_count_by_their_bytes():
    largest, mean = fused_parts(Bytes(), torch.empty(4, 8, 6, 6, dtype=torch.int8, device="meta"), HALF)
    assert (largest.operation, largest.bytes) == ("max_pool2d", 4 * 8 * (36 + 9))
    assert (mean.operation, mean.bytes) == ("adaptive_avg_pool2d_quantized", 4 * 8 * (9 + 2))


class Halved(nn.Module):
    """What is neither gpukern's nor one tensor: a maximum with its places, and one of ATen's pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        values, places = nn.functional.max_pool2d(self.conv(x), 2, return_indices=True)
        return values + places


def test_results_of_several_tensors_count_by_the_bytes_of_all():
    found = {part.operation: part for part in fused_parts(fused(Halved, 64), image(4, 64), HALF)}
    pooled = found["max_pool2d_with_indices"]
    assert pooled.problem == "4×8×32×32" and pooled.bytes == 4 * 8 * (64 * 64 * 2 + 32 * 32 * (2 + 8))


# ---- machine code --------------------------------------------------------------------------------------------------


def test_machine_code_is_that_of_the_main_kernel(monkeypatch):
    main = Compiled("conv2d_taps_kernel", (7,), 99, 2**16, 3, 500, "HGMMA", {"tensor cores": 4, "predicates": 8}, 6)
    others = [dataclasses.replace(main, kernel=name) for name in ("copy_image_kernel", "stem_pack_kernel")]
    assert main_kernel([others[0], main, others[1]]) is main
    compiling = dataclasses.replace(HALF, compiles=True)
    monkeypatch.setattr(network, "compiled", lambda question, plan: [others[0], main])
    found = predicted(lenet, (8, 1, 28, 28), setting=compiling)[0]
    assert (found.registers, found.spills, found.loop) == (99, 3, 12)

    def fails(question, plan):
        raise CannotCompile("Triton is not installed")

    monkeypatch.setattr(network, "compiled", fails)
    found = predicted(lenet, (8, 1, 28, 28), setting=compiling)[0]
    assert (found.registers, found.note) == (None, "Triton is not installed")


# ---- what is written -----------------------------------------------------------------------------------------------


def test_the_sum_counts_layers_as_often_as_the_network_has_them():
    pooled = dataclasses.replace(PART, count=1, operation="max_pool2d", floor_us=25.0, bound="compute", efficiency=0.5)
    every = total([PART, pooled])
    assert (every.floor_us, every.bound_us, every.expected_us, every.bound) == (45.0, 60.0, 90.0, "compute")
    assert (every.launches, every.flops, every.plan) == (3, 18e9, "2 conv2d, 1 max_pool2d")
    assert every.efficiency == pytest.approx(18 / (12 / 0.75 + 6 / 0.5))
    assert "floor 45.0 µs, bound 60.0 µs, expected 90.0 µs, 2.00× the floor" in summary([PART, pooled], 9)
    assert "100,000 images/s" in summary([PART, pooled], 9)


def test_markdown_has_a_table_for_each_batch_and_every_reason():
    unknown = dataclasses.replace(PART, registers=None, spills=None, loop=None, note="no compiler")
    text = markdown({1: [unknown, unknown], 32: [PART]}, "ResNet-50 on H100")
    lines = text.splitlines()
    assert lines[0] == "# ResNet-50 on H100" and "**Predicted, not measured**" in lines[2]
    assert [line for line in lines if line.startswith("## ")] == ["## Batch 1", "## Batch 32"]
    tables = [line for line in lines if line.startswith("| conv1")]
    assert tables[0].startswith("| conv1 (2×) | a by b | taps 64×64×32 | memory | 1 | 1.50 | 75%")
    assert tables[0].endswith("| 10.0 | 20.0 | 30.0 | 3.00× |") and tables[2].endswith("| 3.00× | 128 | 0 | 95 |")
    assert lines.count("- no compiler") == 1


def test_the_command_prints_a_table_markdown_or_json():
    plain = runner.invoke(app, [*LENET, "--batch", "1,8"])
    assert plain.exit_code == 0 and "lenet on H100: forward, float16, channels_last: predicted" in plain.output
    assert "conv2" in plain.output and plain.output.count("images/s as expected") == 2
    assert "registers" not in plain.output and "computation" not in plain.output
    as_markdown = runner.invoke(app, [*LENET, "--markdown", "--direction", "all"])
    assert as_markdown.output.startswith("# tests.test_explain_network:lenet on H100: all directions")
    assert as_markdown.output.count("\n| fc") == 6 and "| computation |" in as_markdown.output
    found = json.loads(runner.invoke(app, [*LENET, "--batch", "1,8", "--json", "--arch", "a100"]).output)
    assert [each["batch"] for each in found] == [1, 8]
    assert [part["layer"] for part in found[0]["parts"]] == ["conv1", "pool1", "conv2", "pool2", "fc1", "fc2"]
    assert found[0]["total"]["expected_us"] == pytest.approx(sum(part["expected_us"] for part in found[0]["parts"]))


def test_the_command_fuses_first():
    """The classifier's ReLUs are no operators of their own then."""
    found = json.loads(runner.invoke(app, [*LENET, "--fuse", "--json"]).output)
    parts = found[0]["parts"]
    assert found[0]["batch"] == 8 and parts[0]["problem"].startswith("8×1×28×28") and ", relu" in parts[0]["problem"]
    assert {part["operation"] for part in parts} <= {"conv2d", "max_pool2d", "linear"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("no_such_package:net",), "MODEL: no_such_package:net is not there"),
        (("--arch", "tpu"), "--arch: no device or architecture is called 'tpu'"),
        (("--dtype", "int8"), "--dtype: no dtype is called 'int8'"),
        (("--direction", "up"), "--direction: no direction is called 'up'"),
        (("--direction", "all", "--fuse"), "--direction: a fused network has a forward only"),
        (("--batch", "1,0"), "--batch: '0' is no size"),
        (("--input", "8x3x28x28"), "--input: the model does not take 8×3×28×28"),
        (("--input", "8x28"), "--input: the model does not take 8×28"),
    ],
)
def test_what_it_does_not_understand(arguments, message):
    chosen = LENET if arguments[0].startswith("--") else (*LENET[:2], *LENET[3:])
    result = runner.invoke(app, [*chosen, *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3))


def test_a_network_without_a_layer_that_is_left():
    made = "tests.test_explain_network:convolution"
    result = runner.invoke(app, ["explain", "network", made, "--input", "100000000x1x28x28", "--no-compile"])
    assert result.exit_code == 1 and "left out 0, forward: " in result.stderr
    assert result.stderr.splitlines()[-1] == "gpukern explain: no layer is left"


def test_into_a_pipe_that_closes():
    command = [sys.executable, "-m", "gpukern", *LENET]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors
