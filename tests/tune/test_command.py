"""The command, and what its words name."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from gpukern.conv.plan import Direction
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.precision import fp32_products
from gpukern.tune import command, measurement, session, sources
from gpukern.tune.progress import Progress
from gpukern.tune.record import calls_of
from gpukern.tune.session import distinct
from tests.tune.tools import LAYERS, Clock, entries

# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "words, layer",
    [
        ("2x16x5x5 24x3x3 --stride 2 --padding 1", nn.Conv2d(16, 24, 3, 2, 1)),
        ("2x16x5x5 24x3x3 --padding same --dilation 2", nn.Conv2d(16, 24, 3, padding="same", dilation=2)),
        ("2x16x5x5 16x3x3 --groups 16", nn.Conv2d(16, 16, 3, groups=16)),
        ("2x1x5x5 8x3x3", nn.Conv2d(1, 8, 3)),
        ("2x8x5x5 8x1x1", nn.Conv2d(8, 8, 1)),
        ("2x1x5x5 1x2x2", nn.Conv2d(1, 1, 2)),
        ("2x8x1x1 8x1x1", nn.Conv2d(8, 8, 1)),
    ],
)
def test_a_layer_in_words_is_that_of_a_model(words, layer, channels_last, device):
    """The database's keys agree, so that what is tuned in words is found by models."""
    problem = sources.layer_called(words)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    image = torch.randn(problem.N, problem.C, problem.H, problem.W, device=device).to(memory_format=memory_format)
    model = layer.to(device, memory_format=memory_format)
    with fp32_products("ieee", "ieee"):
        recorded = calls_of(model, [image], input_gradient=True)
    said = sources.calls_of_layer(problem, "float32", channels_last, list(Direction))
    assert set(distinct(said)) == set(distinct(recorded))


def test_layers_in_words():
    assert sources.layer_called(" 1x4x5x6  8x3x2 stride=2x1 --dilation 2 ") == _like(
        1, 4, 5, 6, 8, 3, 2, (2, 1), (2, 2)
    )
    for words in ("", "1x4x5x6", "1x4x5 8x3x3", "1x4x5x6 8x3x3 --stride", "1x4x5x6 8x3x3 --speed 3", "1x4x5x6 8x9x9"):
        with pytest.raises(ValueError, match=r"expected|is no size|can't be greater"):
            sources.layer_called(words)


class _like:
    """Equal to the problem of these sizes: problems are compared by identity."""

    def __init__(self, *sizes) -> None:
        self.sizes = sizes

    def __eq__(self, p: ConvProblem) -> bool:
        return self.sizes == (p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.stride, p.dilation)


def test_layers_in_a_file(tmp_path):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(LAYERS))
    assert [problem.N for problem in sources.layers_in(file)] == [1, 2]
    for content in ("{}", "[1]", "[", '["1x2"]'):
        file.write_text(content)
        with pytest.raises(ValueError):
            sources.layers_in(file)


def test_models_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef small(): return nn.Conv2d(16, 16, 1)\nclass Nets:\n    large = small\nnumber = int\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my_nets:small", "my_nets:Nets.large", "torch.nn:Identity"):
        assert isinstance(sources.model_called(name), nn.Module)
    for name in ("my_nets", "my_nets:", ":small", "my_nets:missing", "no_such_nets:small", "my_nets:number"):
        with pytest.raises(ValueError):
            sources.model_called(name)


# ---- the command -----------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(command.tune)


def run(*words: str):
    return CliRunner().invoke(app, words)


@pytest.fixture
def clock(device, few, monkeypatch) -> Clock:
    """The command finds a GPU, or takes what it finds for one."""
    clock = Clock()
    monkeypatch.setattr(command, "_gpu", lambda number: device)
    monkeypatch.setattr(session, "check_device", lambda device, timer: None)
    monkeypatch.setattr(session, "do_bench", clock)
    return clock


def test_the_command_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--layer", LAYERS[0])
    assert result.exit_code == 1 and not folder.exists()
    assert result.stderr.startswith("gpukern tune: tuning measures on a CUDA device, and PyTorch sees none here")


def test_the_command_without_that_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = run("--layer", LAYERS[0], "--device", "2")
    assert result.exit_code == 1 and "there is no GPU 2, only 2 of them" in result.stderr


def test_the_command_tunes_layers(folder, device, clock, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps(LAYERS[1:]))
    words = ["--layer", LAYERS[0], "--layers", str(tmp_path / "more.json"), "--direction", "forward,weight-grad"]
    result = run(*words, "--batch", "1, 4", "--dtype", "fp16,bf16")
    assert result.exit_code == 0, result.stderr
    found = entries(folder, device)
    assert len(found) == 2 * 2 * 2 * 2
    assert {entry.batch for entry in found.values()} == {1, 4}
    assert {name.split(":")[0] for name in found} == {"forward", "weight gradient"}
    assert {name.split("; ")[1] for name in found} == {"float16 ieee", "bfloat16 ieee"}
    assert all("channels_last * channels_last" in name for name in found)
    assert "geometric mean" in result.stdout and "1.00×" in result.stdout
    assert len(result.stderr.splitlines()) == 16  # no terminal: a line for each
    before = len(clock.timed)
    result = run(*words, "--batch", "1, 4", "--dtype", "fp16,bf16", "--nchw", "--budget", "0")
    assert result.exit_code == command.UNFINISHED and len(clock.timed) == before
    assert run(*words, "--batch", "1", "--dtype", "fp16", "--again").exit_code == 0
    assert len(clock.timed) > before


def test_the_command_tunes_a_model(folder, device, clock):
    result = run("--model", "torch.nn:Identity", "--input", "2,3,4,4")
    assert result.exit_code == 0 and not entries(folder, device)
    model = "tests.tune.test_record:Net"
    result = run("--model", model, "--input", "2x3x4x4", "--batch", "1", "--dtype", "tf32", "--direction", "forward")
    assert result.exit_code == 0, result.stderr
    found = entries(folder, device)
    assert len(found) == 3 and all(entry.batch == 1 for entry in found.values())
    assert all("; float32 tf32; " in name for name in found)
    (middle,) = (name for name in found if "x16x4x4 16x3x3" in name)
    assert middle.endswith("channels_last * channels_last -> channels_last")


@pytest.mark.gpu
def test_the_command_on_a_gpu_with_a_real_clock(folder, device):
    result = run("--layer", "8x64x14x14 64x3x3 --padding 1", "--direction", "forward")
    assert result.exit_code == 0, result.stderr
    (entry,) = entries(folder, torch.device("cuda", 0)).values()
    assert entry.plan and 0.5 < entry.microseconds <= entry.heuristic_microseconds < 10_000
    assert not any("WrongResult" in reason for _, reason in entry.rejected)


def test_the_command_ends_with_an_error_where_something_cannot_be_measured(device, clock, monkeypatch):
    def fails(call, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measurement, "Check", fails)
    result = run("--layer", LAYERS[0], "--direction", "forward")
    assert result.exit_code == 1 and "out of memory" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--layer", "1x2"],
        ["--layers", "no-such-file.json"],
        ["--layer", LAYERS[0], "--batch", "0"],
        ["--layer", LAYERS[0], "--dtype", "fp4"],
        ["--layer", LAYERS[0], "--direction", "sideways"],
        ["--model", "torch.nn:Identity"],
        ["--input", "1x2x3x4"],
        ["--model", "torch.nn:Identity", "--input", "1x2x3"],
        ["--model", "torch.nn:NoSuchLayer", "--input", "1x2x3x4"],
    ],
)
def test_options_that_make_no_sense(words, clock):
    result = run(*words)
    assert result.exit_code == 2 and result.stderr.startswith("Usage: ") and not clock.timed


def test_a_terminal_sees_how_far_it_is(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with Progress(3, True) as bar:
        bar.begin("a [layer]")
        bar.watch(0, 7, math.inf)
        assert bar._bar.tasks[0].description.endswith("plan 1 of 7")
        bar.watch(1, 7, 12.34e-6)
        assert bar._bar.tasks[0].description.endswith("plan 2 of 7, best 12.3 µs")
        bar.advance()
        assert bar._bar.tasks[0].completed == 1
