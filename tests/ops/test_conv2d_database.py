"""The plan database: what it finds, what it leaves out, and that no writer or file can break it."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpukern.conv import database, planner
from gpukern.conv.database import Entry, bucket, file_name, key, lookup
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.prepare import prepare_launch
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import operands_of, shapes
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import H100, DeviceSpec
from gpukern.runtime.strides import dense_strides

HALF = Operands("float16")
FORWARD = Direction.FORWARD
GPU = DeviceSpec("NVIDIA H100 80GB HBM3", (9, 0), 132, H100.shared_memory)
FILE = "nvidia-h100-80gb-hbm3.json"


def problem(N=32, **sizes) -> ConvProblem:
    base = ConvProblem(N, 64, 56, 56, 64, 3, 3, 56, 56, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    return replace(base, **sizes)


def other_than(choice: ConvPlan, p: ConvProblem) -> ConvPlan:
    """A plan that is offered but not chosen."""
    offered = list(planner.candidates(p, FORWARD, HALF, GPU))
    return next(each for each in offered if each.block_m != choice.block_m)


def entry(plan: ConvPlan | None, batch: int = 32, **changes) -> Entry:
    heuristic = ConvPlan(Variant.TAPS, 64, 64, 32, 4, 3)
    return replace(Entry(plan, 12.5, heuristic, 14.0, batch, (), {"gpukern": "1"}, "2026-01-31"), **changes)


def store(folder: Path, p: ConvProblem, plan: ConvPlan | None, operands: Operands = HALF) -> Path:
    path = folder / file_name(GPU.name)
    database.store(path, GPU.name, key(p, FORWARD, operands), entry(plan, p.N))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Of ``$GPUKERN_PLANS``; the other two folders are empty."""
    chosen = tmp_path / "chosen"
    monkeypatch.setenv("GPUKERN_PLANS", str(chosen))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(database, "BUNDLED", tmp_path / "bundled")
    database.clear()
    yield chosen
    database.clear()
    prepare_launch.cache_clear()


@pytest.fixture
def family(monkeypatch):
    """A kernel that offers what the test says, in place of all others."""

    class Family:
        plans = staticmethod(lambda p: ())

        def candidates(self, p, direction, operands, device):
            return iter(self.plans(p))

    made = Family()
    monkeypatch.setattr(planner, "FAMILIES", (made,))
    return made


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_a_bucket_is_the_nearest_power_of_two_in_ratio():
    for batch in range(1, 3000):
        assert bucket(batch) == 2 ** round(math.log2(batch)), batch
    assert [bucket(batch) for batch in (22, 23, 24, 32, 45, 46)] == [16, 32, 32, 32, 32, 64]


def test_a_key_holds_everything_but_the_exact_batch_size():
    def of(p=problem(), direction=FORWARD, operands=HALF):  # noqa: B008
        return key(p, direction, operands)

    assert of(problem(24)) == of(problem(45)) == of(problem(32)) != of(problem(64))
    sizes = {"C": 32, "H": 57, "W": 57, "K": 32, "R": 1, "S": 1, "groups": 2}
    pairs = {"stride": (2, 1), "padding": (0, 1, 1, 1), "dilation": (1, 2)}
    layouts = {name: Layout.NCHW for name in ("first", "second", "output")}
    keys = [
        of(),
        *(of(problem(**{name: value})) for name, value in (sizes | pairs).items()),
        *(of(direction=direction) for direction in Direction if direction is not FORWARD),
        *(of(operands=replace(HALF, **change)) for change in ({"dtype": "bfloat16"}, {"precision": "tf32"})),
        *(of(operands=replace(HALF, **{name: value})) for name, value in layouts.items()),
    ]
    assert len(set(keys)) == len(keys)


def test_files_are_named_after_devices():
    assert file_name("NVIDIA H100 80GB HBM3") == FILE
    assert file_name("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop.json"


# ---- looking up ----------------------------------------------------------------------------------------------------


def test_what_was_stored_is_found_for_every_batch_of_its_bucket(folder):
    p = problem()
    plan = other_than(planner.heuristic_plan(p, FORWARD, HALF, GPU), p)
    assert lookup(p, FORWARD, HALF, GPU) is None
    store(folder, p, plan)
    for batch in (23, 24, 32, 45):
        assert lookup(problem(batch), FORWARD, HALF, GPU) == plan
    for batch in (0, 1, 22, 46, 64):
        assert lookup(problem(batch), FORWARD, HALF, GPU) is None
    assert lookup(p, Direction.INPUT_GRAD, HALF, GPU) is None
    assert lookup(p, FORWARD, HALF, replace(GPU, name="NVIDIA H200")) is None


def test_the_first_folder_that_has_an_answer_gives_it(folder, tmp_path):
    p = problem()
    first, second, third, *_ = planner.candidates(p, FORWARD, HALF, GPU)
    unknown = replace(first, block_m=1)
    user, bundled = tmp_path / "cache" / "gpukern" / "plans", tmp_path / "bundled"
    assert database.folders() == (folder, user, bundled)
    for place, plan in ((bundled, third), (user, second), (folder, unknown)):
        store(place, p, plan)
        assert lookup(p, FORWARD, HALF, GPU) == (second if plan is unknown else plan)
    store(folder, p, first)
    assert lookup(p, FORWARD, HALF, GPU) == first


def test_where_the_folders_are(monkeypatch):
    monkeypatch.delenv("GPUKERN_PLANS")
    assert database.folders() == (database.user_folder(), database.BUNDLED)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert database.user_folder() == Path("/home/somebody/.cache/gpukern/plans")
    monkeypatch.setenv("GPUKERN_PLANS", "")
    assert database.folders() == ()


def test_an_empty_variable_switches_it_off(tmp_path, monkeypatch):
    p = problem()
    store(tmp_path / "bundled", p, next(planner.candidates(p, FORWARD, HALF, GPU)))
    assert lookup(p, FORWARD, HALF, GPU)
    monkeypatch.setenv("GPUKERN_PLANS", "")
    assert lookup(p, FORWARD, HALF, GPU) is None


def test_the_plans_of_the_package_are_in_it():
    assert (Path(database.__file__).parents[1] / "plans").is_dir()


def test_a_file_is_read_once_until_it_is_cleared(folder):
    p = problem()
    plan = next(planner.candidates(p, FORWARD, HALF, GPU))
    path = store(folder, p, plan)
    assert lookup(p, FORWARD, HALF, GPU) == plan
    path.unlink()
    assert lookup(p, FORWARD, HALF, GPU) == plan
    database.clear()
    assert lookup(p, FORWARD, HALF, GPU) is None


# ---- only what a kernel offers -------------------------------------------------------------------------------------


def box(images: int, splits: int = 1, rows: int = 8) -> ConvPlan:
    return ConvPlan(Variant.BOX, 128, 64, 64, 4, 3, splits=splits, box=(images, rows, 16))


def test_a_box_that_the_batch_does_not_allow_is_replaced_or_left_out(folder, family):
    """A box can depend on the batch size: whatever is looked up is what the kernel offers for that very batch."""
    family.plans = lambda p: [box(p.N)]
    store(folder, problem(32), box(32))
    assert lookup(problem(32), FORWARD, HALF, GPU) == box(32)
    assert lookup(problem(24), FORWARD, HALF, GPU) == box(24)
    family.plans = lambda p: []
    assert lookup(problem(24), FORWARD, HALF, GPU) is None
    family.plans = lambda p: [replace(box(24), num_stages=2)]
    assert lookup(problem(24), FORWARD, HALF, GPU) is None


def test_of_several_stand_ins_the_nearest_is_taken(folder, family):
    store(folder, problem(32), box(32, splits=4))
    # The box's pixels count before the splits, the splits before the images.
    family.plans = lambda p: [box(32, 4, rows=4), box(24, 16), box(24, 2), box(32, 16)]
    assert lookup(problem(24), FORWARD, HALF, GPU) == box(24, 2)
    family.plans = lambda p: [box(24, 4), box(32, 4)]
    assert lookup(problem(24), FORWARD, HALF, GPU) == box(32, 4)
    family.plans = lambda p: [box(32, 4, rows=4)]
    assert lookup(problem(24), FORWARD, HALF, GPU) == box(32, 4, rows=4)


def test_a_measured_plan_may_be_of_a_kernel_that_is_never_chosen_unmeasured(folder, family):
    special = replace(box(1), variant=Variant.TAPS, num_warps=8)
    assert planner.only_measured(special)
    family.plans = lambda p: [special, box(1)]
    store(folder, problem(), special)
    assert lookup(problem(), FORWARD, HALF, GPU) == special


def rewrite(path: Path, change) -> None:
    """Change the only entry of a file."""
    content = json.loads(path.read_text())
    (name,) = content["plans"]
    content["plans"][name] = change(content["plans"][name])
    path.write_text(json.dumps(content))
    database.clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: None,
        lambda plan: "taps 64×64",
        lambda plan: {},
        lambda plan: plan | {"variant": "of tomorrow"},
        lambda plan: plan | {"warp_groups": 3},
        lambda plan: plan | {"block_m": 63},
        lambda plan: plan | {"block_m": "64"},
        lambda plan: plan | {"splits": 0},
        lambda plan: plan | {"splits": "4"},
        lambda plan: plan | {"box": 7},
        lambda plan: plan | {"pack": None},
        lambda plan: plan | {"precision": "tf32"},
        lambda plan: {name: value for name, value in plan.items() if name != "block_k"},
    ],
)
def test_a_plan_that_this_version_does_not_know_is_left_out_without_a_word(folder, change):
    path = store(folder, problem(), next(planner.candidates(problem(), FORWARD, HALF, GPU)))
    rewrite(path, lambda stored: stored | {"plan": change(stored["plan"])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(problem(), FORWARD, HALF, GPU) is None


@pytest.mark.parametrize("value", [None, 3, [], {}, "plan"])
def test_an_entry_of_another_kind_is_left_out(folder, value):
    path = store(folder, problem(), next(planner.candidates(problem(), FORWARD, HALF, GPU)))
    rewrite(path, lambda stored: value)
    assert lookup(problem(), FORWARD, HALF, GPU) is None and database.read(path) == {}


def test_an_entry_whose_heuristic_is_not_known_is_not_read(folder):
    """Tuning then measures the problem again."""
    path = store(folder, problem(), next(planner.candidates(problem(), FORWARD, HALF, GPU)))
    assert len(database.read(path)) == 1
    rewrite(path, lambda stored: stored | {"heuristic": {"plan": {"variant": "quantum"}, "microseconds": 1.0}})
    assert database.read(path) == {}


def test_fields_that_are_not_there_have_their_defaults(folder):
    """Files outlive versions: a field that is added to plans later is not in them."""
    plan = next(planner.candidates(problem(), FORWARD, HALF, GPU))
    path = store(folder, problem(), plan)
    optional = ("group_m", "splits", "box", "pack", "precision")
    assert all(getattr(plan, name) == getattr(ConvPlan, name) for name in optional)
    short = {name: value for name, value in dataclasses.asdict(plan).items() if name not in optional}
    rewrite(path, lambda stored: {"plan": short})
    assert lookup(problem(), FORWARD, HALF, GPU) == plan


# ---- broken files --------------------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "cut off": b'{"schema": 1, "plans": {"forward: 32x64',
    "not UTF-8": b'{"schema": 1, "plans": {"\xff": 3}}',
    "a list": b"[]",
    "no plans": b'{"schema": 1}',
    "plans in a list": b'{"schema": 1, "plans": []}',
    "no schema": b'{"plans": {}}',
    "of tomorrow": b'{"schema": 2, "plans": {}}',
    "too deep": b"[" * 200_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_warning_and_no_plan(folder, content):
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    with pytest.warns(UserWarning, match=f"leaves out measured plans: .*{FILE}"):
        assert lookup(problem(), FORWARD, HALF, GPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(problem(64), FORWARD, HALF, GPU) is None


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_not_understood_is_not_overwritten(folder, content):
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    with pytest.raises(ValueError):
        store(folder, problem(), None)
    assert (folder / FILE).read_bytes() == content


def test_a_file_that_cannot_be_read_is_one_warning(folder):
    (folder / FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="leaves out measured plans"):
        assert lookup(problem(), FORWARD, HALF, GPU) is None


# ---- writing -------------------------------------------------------------------------------------------------------


def test_entries_come_back_as_they_were(folder):
    plan = ConvPlan(Variant.BOX, 128, 64, 64, 4, 3, 4, 2, (1, 8, 16), (True, False, True), "tf32x3")
    rejected = ((replace(plan, box=None), "OutOfResources: too much"), (plan, "WrongResult: 3 of 4 elements"))
    whole = entry(plan, 24, rejected=rejected, versions={"triton": "3.7.1", "driver": None})
    nothing = entry(None, microseconds=None, heuristic_microseconds=None)
    for name, each in (("b", whole), ("a", nothing)):
        database.store(folder / FILE, GPU.name, name, each)
    assert database.read(folder / FILE) == {"a": nothing, "b": whole}
    content = json.loads((folder / FILE).read_text())
    assert (content["schema"], content["device"], list(content["plans"])) == (1, GPU.name, ["a", "b"])


def test_other_entries_stay_also_those_that_are_not_understood(folder):
    plan = next(planner.candidates(problem(), FORWARD, HALF, GPU))
    path = store(folder, problem(64), plan)
    content = json.loads(path.read_text())
    content["plans"]["of tomorrow"] = strange = {"plan": {"variant": "quantum"}, "shots": [1, 2]}
    path.write_text(json.dumps(content))
    store(folder, problem(32), plan)
    after = json.loads(path.read_text())["plans"]
    assert len(after) == 3 and after["of tomorrow"] == strange
    assert lookup(problem(64), FORWARD, HALF, GPU) == lookup(problem(32), FORWARD, HALF, GPU) == plan


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(folder, monkeypatch, step):
    path = store(folder, problem(), None)
    before = path.read_bytes()

    def fails(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="no space"):
        store(folder, problem(64), None)
    assert path.read_bytes() == before
    assert [file.name for file in folder.iterdir() if file.name != f".{FILE}.lock"] == [FILE]


def test_a_reader_never_sees_half_a_file(folder, monkeypatch):
    path, seen, fsync = store(folder, problem(), None), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(json.loads(path.read_text())), fsync(file)))
    store(folder, problem(64), None)
    assert [len(content["plans"]) for content in seen] == [1]


def test_processes_that_write_at_once_lose_nothing(folder):
    def write(start, number):
        start.wait()
        for each in range(20):
            database.store(folder / FILE, GPU.name, f"{number}.{each}", entry(None))

    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    processes = [fork.Process(target=write, args=(start, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(database.read(folder / FILE)) == 60


# ---- in a launch ---------------------------------------------------------------------------------------------------


def prepared(device):
    p = ConvProblem(3, 16, 6, 6, 16, 3, 3, 6, 6, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    strides = tuple(dense_strides(shape, True) for shape in shapes(p, FORWARD))
    question = p, FORWARD, operands_of(p, FORWARD, strides, True, torch.float16, "ieee"), device_spec(device)
    return question, prepare_launch(p, FORWARD, *strides[:2], None, True, torch.float16, "ieee", device_spec(device))


def test_launches_get_measured_plans(folder, device):
    question, planned = prepared(device)
    assert planned.plan == planner.heuristic_plan(*question)
    other = next(each for each in planner.candidates(*question) if each != planned.plan)
    spec = device_spec(device)
    database.store(folder / file_name(spec.name), spec.name, key(*question[:3]), entry(other, 4))
    prepare_launch.cache_clear()
    assert prepared(device)[1].plan == other != planned.plan
