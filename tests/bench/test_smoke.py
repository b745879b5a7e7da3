"""What is tried first on a GPU, tried here on emulated kernels; a hang, a wrong result and a lost device."""

from __future__ import annotations

import json
import re

import pytest
import torch

from bench import smoke
from bench.attempt import UNFINISHED
from bench.smoke_cases import KINDS, Case, Compared
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import H200
from tests.device import DEVICE

CPU = torch.device("cpu")


def case(name: str, difference: float = 0.0, problem: Exception | None = None, called: list | None = None) -> Case:
    def run(device):
        if called is not None:
            called.append(name)
        if problem is not None:
            raise problem
        yield Compared(torch.ones(3), torch.ones(3), 1e-3)
        yield Compared(torch.ones(3) + difference, torch.ones(3), 1e-3)

    return Case(name, run)


def lines(path) -> dict[str, dict]:
    return {line["case"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_each_case_leaves_a_line(tmp_path, capsys):
    path = tmp_path / "new" / "smoke.jsonl"
    cases = [case("good"), case("wrong", 0.1), case("raises", problem=ValueError("no")), case("NaN", float("nan"))]
    status, _ = smoke.run(cases, CPU, path)
    found = lines(path)
    assert status == 1 and [name for name, line in found.items() if line["ok"]] == ["good"]
    assert found["good"]["errors"] == [0.0, 0.0] and found["wrong"]["errors"][1] == pytest.approx(0.1)
    assert found["raises"]["message"] == "ValueError: no" and found["NaN"]["errors"] == [0.0, None]
    # The bad ones are printed, the good ones only counted.
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["wrong", "raises", "NaN"]


def test_what_is_known_is_not_tried_again_nor_what_hung(tmp_path):
    path, called = tmp_path / "smoke.jsonl", []
    cases = [case(name, called=called) for name in ("a", "b", "c")]
    smoke.run(cases[:1], CPU, path)
    # As a process leaves it that was killed.
    earlier = smoke.Attempts(path)
    earlier.begin(smoke.Attempt("smoke", "b", ""), 60)
    earlier._stop()  # the process that it watched is this one, which must live on
    status, _ = smoke.run(cases, CPU, path)
    assert called == ["a", "c"] and status == 1
    assert lines(path)["b"]["message"] == "it hung, or ended the process"
    assert smoke.Attempts(path).left() is None
    assert smoke.run(cases, CPU, path)[0] == 1 and called == ["a", "c"]


def test_a_lost_device_ends_the_process_and_the_next_goes_on_behind_it(tmp_path, monkeypatch):
    path, called = tmp_path / "smoke.jsonl", []
    cases = [case("a", problem=RuntimeError("CUDA error"), called=called), case("b", called=called)]
    monkeypatch.setattr(smoke, "is_lost", lambda device: called == ["a"])
    assert smoke.run(cases, CPU, path)[0] == UNFINISHED
    assert smoke.run(cases, CPU, path)[0] == 1 and called == ["a", "b"]


def test_it_ends_when_the_time_is_up(tmp_path):
    assert smoke.run([case("a")], CPU, tmp_path / "smoke.jsonl", until=0.0) == (UNFINISHED, [])


@pytest.mark.parametrize("kind", ["convolutions", "operators"])
def test_names_are_distinct(kind):
    with pretend(H200):
        names = [each.name for each in KINDS[kind](CPU)]
    assert len(set(names)) == len(names) > 100


def test_every_family_of_kernels_is_tried():
    from gpukern.conv.families.registry import FAMILIES

    variants = [variant for family in FAMILIES for variant in family.variants]
    with pretend(H200):
        names = [each.name for each in KINDS["convolutions"](CPU)]
    assert not [each.value for each in variants if not any(name.startswith(f"{each.value} ") for name in names)]


# Convolutions of these sizes take minutes in emulation.
SMALL = ("batch_norm of rows", "linear, odd", "adaptive pool to 3")


@pytest.mark.parametrize("dtype", ["float16", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_emulated_operators_are_right(name, dtype, tmp_path):
    chosen = [each for each in KINDS["operators"](DEVICE) if each.name.startswith(f"{name}, {dtype}, channels_last")]
    assert len(chosen) == 1
    status, found = smoke.run(chosen, DEVICE, tmp_path / "smoke.jsonl")
    assert status == 0, found
    # The result and a gradient for each tensor.
    assert len(found[0]["errors"]) >= 2


def test_emulated_convolutions_are_right(tmp_path, monkeypatch):
    """Of each family that an interpreter runs, in each direction."""
    monkeypatch.setattr("bench.smoke_cases._CONVOLUTIONS", (((1, 16, 5, 4), (16, 16, 3, 3), 1, 1, 1),))
    with pretend(H200):
        chosen = [each for each in KINDS["convolutions"](DEVICE) if "warp-specialized" not in each.name]
        halves = [each for each in chosen if " float16 " in each.name]
        assert len(halves) >= 5 and {each.name.count("gradient") for each in halves} == {0, 1}
        status, found = smoke.run(halves, DEVICE, tmp_path / "smoke.jsonl")
    assert status == 0, [line for line in found if not line["ok"]]


def test_a_wrong_gradient_is_found(tmp_path, monkeypatch):
    import bench.smoke_cases as cases

    real = torch.autograd.grad
    calls = []

    def spoiled(*given, **options):
        found = list(real(*given, **options))
        calls.append(1)
        if len(calls) == 1:
            found[-1] = found[-1] * 1.01
        return found

    monkeypatch.setattr(cases.torch.autograd, "grad", spoiled)
    (chosen,) = [each for each in KINDS["operators"](DEVICE) if re.match("linear, odd, float16, channels", each.name)]
    status, found = smoke.run([chosen], DEVICE, tmp_path / "smoke.jsonl")
    assert status == 1 and found[0]["errors"][-1] == pytest.approx(0.01, rel=0.2)
