"""``python -m models.train``: stopped by every kind of signal and resumed, it ends with the very same weights."""

from __future__ import annotations

import signal
import time

import pytest
import torch
import typer

from gpukern.runtime.mode import Mode, force_mode
from models import checkpoint, train
from models.trainer import OPTIMIZERS
from tests.models.idx import write_dataset

#: 3 epochs of 40 steps: long enough to be stopped in the middle, short enough to finish.
TRAINING = ("--epochs", 3, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("idx"), train=315, held_out=20)


def finish(process, code=0):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def steps_done(path):
    """Steps in the checkpoint at ``path``, −1 where there is none yet."""
    return len(checkpoint.load(path)["losses"]) if path.exists() else -1


def stop(process, path, number, after):
    """Send ``number`` once the checkpoint at ``path`` holds more than ``after`` steps."""
    deadline = time.monotonic() + 120
    while steps_done(path) <= after:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)


@pytest.mark.slow
def test_stopped_and_resumed_is_uninterrupted(start, dataset, tmp_path):
    arguments = (*TRAINING, "--data", dataset, "--checkpoint-every", 3)
    output = finish(start("models.train", *arguments, "--out", tmp_path / "whole"))
    assert "reference mode on CPU" in output
    assert "epoch 3/3" in output
    whole = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")
    out = tmp_path / "stopped"
    path = out / "checkpoint.pt"

    positions = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        resume = ("--resume",) if path.exists() else ()
        after = max(steps_done(path), 0)
        process = start("models.train", *arguments, "--out", out, *resume)
        stop(process, path, number, after)
        output = finish(process, code)
        assert ("go on with --resume" in output) == (number != signal.SIGKILL)
        state = checkpoint.load(path)
        positions.append((state["epoch"], state["position"]))
    assert positions == sorted(set(positions)), "each part goes on where the one before stopped"
    assert positions[-1][0] < 3, "too fast a machine: the training was over before it was stopped"
    assert any(position for _, position in positions), "no stop in the middle of an epoch"

    finish(start("models.train", "--resume", "--out", out))  # all other options come from the checkpoint
    resumed = checkpoint.load(path)
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert torch.equal(whole["losses"], resumed["losses"])
    assert whole["accuracies"] == resumed["accuracies"]
    for name in ("loss.png", "filters.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def command(dataset, tmp_path, capsys):
    """``command(**options)``: the same in this process, for what needs no process of its own; (exit code, output)."""

    def run(**options):
        options = {"epochs": 1, "batch_size": "all", "data": dataset, "out": tmp_path / "run"} | options
        try:
            with force_mode(Mode.REFERENCE):
                train.main(**options, device=train.DeviceName.cpu)
        except typer.Exit as exit:
            return exit.exit_code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_errors_are_one_clear_line(command, tmp_path):
    assert command()[0] == 0
    for options, message in [
        ({"resume": True, "lr": 0.7}, "cannot resume: lr is 0.7, was 0.01"),
        ({"resume": True, "optimizer": train.OptimizerName.adam}, "cannot resume: optimizer is adam, was momentum"),
        ({"resume": True, "out": tmp_path / "none"}, "nothing to resume"),
        ({"data": tmp_path / "none"}, "none: no such directory"),
        ({"optimizer": train.OptimizerName.adam, "momentum": 0.5}, "a momentum is for momentum and nesterov, not for"),
        ({"epochs": 30, "lr": 1e6}, "diverged in epoch"),
    ]:
        code, output = command(**options)
        assert code == 1
        assert message in output
    with pytest.raises(typer.BadParameter, match="expected a number"):
        command(batch_size="few")


def test_resuming_from_a_corrupt_checkpoint(command, tmp_path):
    command()
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    code, output = command(resume=True)
    assert code == 1
    assert f"{path}: the checkpoint is corrupt" in output


@pytest.mark.parametrize("optimizer", train.OptimizerName)
def test_every_optimizer_by_its_name(command, tmp_path, optimizer):
    code, output = command(optimizer=optimizer, batch_size="63")
    assert code == 0 and f"optimizer {optimizer.value}, lr {OPTIMIZERS[optimizer.value][0]}" in output
    (group,) = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"]
    assert group["lr"] == OPTIMIZERS[optimizer.value][0]


def test_a_new_training_keeps_the_old_checkpoint(command, tmp_path):
    command()
    old = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    _, output = command(seed=1)
    assert "kept the checkpoint" in output
    assert (tmp_path / "run" / "checkpoint.previous.pt").read_bytes() == old


def test_a_finished_training_resumes_to_itself(command, tmp_path):
    command()
    weights = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
    assert command(resume=True)[0] == 0
    again = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
