from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from gpukern.cli import app
from gpukern.runtime.mode import Mode, force_mode

PROJECT = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
import beside


@dataclass
class Settings:
    units: int = 16


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, Settings().units), nn.Tanh(), nn.Linear(16, 3))


def build_twice():
    return build().append(nn.Softmax(1))


def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    return torch.randn(150, 4, generator=generator) + beside.SHIFT * F.one_hot(labels, 4) - beside.SHIFT / 4, labels


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 150

    def __getitem__(self, place):
        inputs, labels = batch()
        return inputs[place], labels[place]


loader = [batch()] * 3


def optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def bad_step(model, optimizer, batch):
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


broken = 3


def fails():
    raise OSError("no disk")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "train_it.py").write_text(PROJECT)
    (tmp_path / "beside.py").write_text("SHIFT = 1.5\n")
    return tmp_path / "train_it.py"


def run(*words):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with force_mode(Mode.REFERENCE):
        result = CliRunner().invoke(app, ["diagnose", *map(str, words), "--device", "cpu"], env={"COLUMNS": "200"})
    torch.set_num_threads(threads)
    return result


def test_sound_training_has_exit_status_0_and_writes_files(project, tmp_path):
    result = run(
        f"{project}:build", "--data", f"{project}:batch", "--optimizer", f"{project}:optimizer", "--step",
        f"{project}:step", "--layers", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "11 checks, all well" in result.output and "gradient's" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["passed"] is True
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("build_twice", (), "softmax twice"),
        ("build", ("--optimizer", "sgd", "--lr", "0.1", "--step", "{}:bad_step"), "missing zero_grad"),
        ("build", ("--loss", "nll_loss"), "wrong loss"),
    ],
)
def test_mistake_is_the_exit_status(project, model, options, said):
    options = (each.format(project) for each in options)
    result = run(f"{project}:{model}", "--data", f"{project}:batch", "--steps", 2, *options)
    assert result.exit_code == 1 and said in result.output


@pytest.mark.parametrize("data", ["Data", "loader", "batch", "saved"])
def test_data_may_be_a_data_set_a_loader_a_function_or_a_file(project, tmp_path, data):
    name = f"{project}:{data}"
    if data == "saved":
        name = str(tmp_path / "batch.pt")
        torch.save((torch.randn(40, 4), torch.arange(40) % 3), name)
    result = run(f"{project}:build", "--data", name, "--steps", 150, "--samples", 300)
    assert "checks" in result.output and result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("{}:absent", "--data", "{}:batch"), 2, "has no absent"),
        (("absent.py:build", "--data", "{}:batch"), 2, "there is no file"),
        (("{}:broken", "--data", "{}:batch"), 2, "makes a int"),
        (("{}:build", "--data", "{}:broken"), 2, "is a int, expected"),
        (("{}:build", "--data", "{}:fails"), 2, "fails: OSError: no disk"),
        (("{}:build", "--data", "nothing"), 2, "names nothing"),
        (("{}:build", "--data", "absent.pt"), 2, "cannot be read"),
        (("{}:build", "--data", "{}:batch", "--loss", "no_loss"), 2, "has no 'no_loss'"),
        (("{}:build", "--data", "{}:batch", "--optimizer", "nothing"), 2, "has no 'nothing'"),
        (("{}:build", "--data", "{}:batch", "--step", "{}:step"), 2, "needs --optimizer"),
        (("{}:build", "--data", "{}:batch", "--plot", "a.txt"), 2, "does not end in .png"),
        (("{}:build", "--data", "{}:batch", "--json", "no/such.json"), 2, "there is no folder"),
        (("models.lenet:LeNet5", "--data", "{}:batch"), 1, "fails for the inputs of the batch"),
    ],
)
def test_wrong_words_are_told(project, words, status, said):
    result = run(*(word.format(project) for word in words))
    assert result.exit_code == status and said in " ".join(result.output.split()), result.output
