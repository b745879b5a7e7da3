"""What is written comes back equal, and anything else is refused with its place."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import results
from gpukern.conv import database
from gpukern.runtime.records import RecordError, build, plain

ROOT = Path(__file__).resolve().parents[2]
MEASURED = sorted((ROOT / "bench" / "results").rglob("f2d2b3c0f5*/*.json"))


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "dark blue"


class Note(NamedTuple):
    name: str
    reason: str = "none given"


@dataclasses.dataclass(frozen=True)
class Part:
    size: tuple[int, int, int] | None
    colour: Colour
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    notes: list[Note]
    status: Literal["ok", "wrong"]
    shares: dict[str, float]
    versions: Mapping[str, str | None]
    good: bool = True
    extra: Any = None
    counts: list[int] = dataclasses.field(default_factory=list)


WHOLE = Whole(
    (Part((1, 2, 3), Colour.BLUE), Part(None, Colour.RED, 0.5)),
    [Note("a", "b"), Note("c")],
    "ok",
    {"x": 0.25},
    {"triton": "3.7", "driver": None},
    extra={"any": [1, "thing"]},
)


def test_plain_is_what_json_holds():
    assert plain(WHOLE) == json.loads(json.dumps(plain(WHOLE)))
    assert plain(WHOLE)["parts"][0] == {"size": [1, 2, 3], "colour": "dark blue", "weight": 1.0}
    assert plain(WHOLE)["notes"] == [{"name": "a", "reason": "b"}, {"name": "c", "reason": "none given"}]


def test_what_was_written_comes_back_equal_and_of_the_same_types():
    again = build(Whole, json.loads(json.dumps(plain(WHOLE))), "it")
    assert again == WHOLE and type(again.parts[0].colour) is Colour and type(again.notes[0]) is Note


PARTS = st.builds(
    Part,
    st.none() | st.tuples(st.integers(), st.integers(), st.integers()),
    st.sampled_from(Colour),
    st.floats(allow_nan=False),
)


@given(PARTS)
def test_any_value_comes_back_equal(part):
    assert build(Part, json.loads(json.dumps(plain(part, name_nonfinite=True), allow_nan=False)), "it") == part


def test_numbers_that_json_lacks_are_text_where_that_is_asked_for():
    part = Part(None, Colour.RED, math.inf)
    assert plain(part, name_nonfinite=True)["weight"] == "inf" and plain(part)["weight"] == math.inf
    assert math.isnan(build(float, plain(math.nan, name_nonfinite=True), "it"))
    with pytest.raises(ValueError, match="Out of range"):
        json.dumps(plain(part), allow_nan=False)


def test_a_number_without_a_fraction_stays_as_it_was_written():
    assert type(build(float, 3, "it")) is int


def test_missing_fields_keep_their_default():
    given = plain(WHOLE)
    del given["counts"], given["good"], given["notes"][0]["reason"]
    again = build(Whole, given, "it")
    assert again.counts == [] and again.good and again.notes[0].reason == "none given"


def test_unknown_fields_are_ignored_where_that_is_asked_for():
    given = {**plain(WHOLE), "shape": "round"}
    given["parts"][1]["age"] = given["notes"][0]["age"] = 3
    assert build(Whole, given, "it", ignore_unknown=True) == WHOLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(shape="round", age=3), "the file: unknown age, shape"),
        (lambda it: it["notes"][1].update(age=3), "the file.notes[1]: unknown age"),
        (lambda it: it.pop("status"), "the file: no status"),
        (lambda it: it["notes"][0].pop("name"), "the file.notes[0]: no name"),
        (lambda it: it.update(status="good"), "the file.status: expected one of 'ok', 'wrong', got \"good\""),
        (lambda it: it["parts"][0].update(colour="green"), "colour: expected one of 'red', 'dark blue', got \"green\""),
        (lambda it: it["parts"][0].update(colour=[]), "parts[0].colour: expected one of 'red', 'dark blue', got []"),
        (lambda it: it["parts"][0].update(size=[1, 2]), "parts[0].size: expected 3 items, got [1, 2]"),
        (lambda it: it["parts"][0].update(size=[1, 2, 3.0]), "parts[0].size[2]: expected int, got 3.0"),
        (lambda it: it["parts"][0].update(weight="much"), 'parts[0].weight: expected float, got "much"'),
        (lambda it: it["parts"][0].update(weight=True), "parts[0].weight: expected float, got true"),
        (lambda it: it.update(counts=[True]), "counts[0]: expected int, got true"),
        (lambda it: it.update(good=1), "good: expected bool, got 1"),
        (lambda it: it.update(parts={}), "parts: expected a list, got {}"),
        (lambda it: it.update(shares=[]), "shares: expected an object, got []"),
        (lambda it: it["versions"].update(triton=3), "versions.triton: expected str, got 3"),
        (lambda it: it.update(notes=[7]), "notes[0]: expected an object, got 7"),
    ],
)
def test_anything_else_is_refused_with_its_place(change, message):
    given = json.loads(json.dumps(plain(WHOLE)))
    change(given)
    with pytest.raises(RecordError) as refused:
        build(Whole, given, "the file")
    assert message in str(refused.value)


# ---- files that were written before ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in MEASURED if '"schema": 1' in p.read_text()[:40]], ids=lambda p: p.stem)
def test_committed_results_are_written_again_byte_for_byte(path, tmp_path):
    results.write(tmp_path / "again.json", results.read(path))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_committed_plans_are_written_again_byte_for_byte(tmp_path):
    bundled = next(database.BUNDLED.glob("*.json"))
    device, entries = json.loads(bundled.read_text())["device"], database.read(bundled)
    assert len(entries) == len(json.loads(bundled.read_text())["plans"]) > 80
    for name, entry in entries.items():
        database.store(tmp_path / "again.json", device, name, entry)
    assert (tmp_path / "again.json").read_bytes() == bundled.read_bytes()
