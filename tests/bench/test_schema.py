"""The files: what is written fits schema.json and comes back equal; anything else is refused with its place."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import typing
from pathlib import Path

import pytest

import bench.results
from bench.results import SCHEMA, Results, ResultsError, read, write
from tests.bench import made_up

# Not on every GPU machine, where these tests run too.
jsonschema = pytest.importorskip("jsonschema")

SCHEMA_FILE = Path(bench.results.__file__).with_name("schema.json")
FILES = {Results.file_kind: made_up.run}
DATACLASSES = {
    name: kind
    for name, kind in vars(bench.results).items()
    if dataclasses.is_dataclass(kind) and kind.__module__ == "bench.results"
}
_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean"}


def described(kind: type) -> dict:
    """The JSON Schema, but for descriptions, of a dataclass of bench.results."""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    properties = {field.name: _described_type(hints[field.name]) for field in fields}
    optional = (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING for field in fields
    )
    required = [field.name for field, has_default in zip(fields, optional, strict=True) if not has_default]
    if kind is Results:
        properties = {"schema": {"const": SCHEMA}, "kind": {"const": kind.file_kind}, **properties}
        required = ["schema", "kind", *required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _described_type(hint) -> dict:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (tuple, list):
        return {"type": "array", "items": _described_type(arguments[0])}
    if origin is dict:
        inner = _described_type(arguments[1])
        return {"type": "object", **({"additionalProperties": inner} if inner else {})}
    if origin is types.UnionType:
        return {"type": [_SIMPLE[arguments[0]], "null"]}
    return {"type": _SIMPLE[hint]}


def schema() -> dict:
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def without_descriptions(part):
    if isinstance(part, dict):
        # A property may itself be called so; then it is no text.
        return {k: without_descriptions(v) for k, v in part.items() if not (k == "description" and isinstance(v, str))}
    return part


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(schema())


def test_every_dataclass_is_in_the_schema_and_nothing_else():
    assert list(schema()["$defs"].keys() ^ DATACLASSES.keys()) == []


@pytest.mark.parametrize("name", DATACLASSES)
def test_the_schema_says_of_each_dataclass_what_the_code_says(name):
    part = schema()["$defs"][name]
    assert without_descriptions(part) == described(DATACLASSES[name])
    assert part["description"]
    assert [n for n, field in part["properties"].items() if not field.get("description")] == []


@pytest.mark.parametrize("kind", FILES)
def test_what_is_written_fits_the_schema_and_comes_back_equal(kind, tmp_path):
    path, original = tmp_path / "new folder" / "a.json", FILES[kind]()
    write(path, original)
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema(), jsonschema.Draft202012Validator)
    assert read(path) == original
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def _at(raw, *place):
    for step in place:
        raw = raw[step]
    return raw


CHANGES = {
    "older": (lambda raw: raw.update(schema=SCHEMA - 1), "older version"),
    "newer": (lambda raw: raw.update(schema=SCHEMA + 1), "newer version"),
    "no schema": (lambda raw: raw.pop("schema"), "no schema number"),
    "other kind": (lambda raw: raw.update(kind="guessed"), "'guessed'"),
    "predictions": (lambda raw: raw.update(kind="predicted"), "nothing was measured"),
    "unknown field": (lambda raw: _at(raw, "rows", 1).update(colour="red"), "rows[1]: unknown colour"),
    "missing field": (lambda raw: _at(raw, "rows", 2, "case").pop("batch"), "rows[2].case: no batch"),
    "wrong type": (lambda raw: _at(raw, "rows", 0, "case").update(batch="32"), "rows[0].case.batch: expected int"),
    "a truth for a number": (lambda raw: _at(raw, "environment").update(sm_count=True), ".sm_count: expected int"),
    "not a list": (lambda raw: raw.update(rows={}), ".rows: expected a list"),
    "unknown status": (
        lambda raw: _at(raw, "rows", 0, "candidates", 0).update(status="good"),
        "rows[0].candidates[0].status: expected one of 'ok'",
    ),
    "a word among the samples": (
        lambda raw: _at(raw, "rows", 0, "candidates", 0, "samples").update(graph=[1.0, "fast"]),
        "rows[0].candidates[0].samples.graph[1]: expected float",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_file_is_refused_with_its_place(change, tmp_path):
    path = tmp_path / "a.json"
    write(path, made_up.run())
    raw = json.loads(path.read_text(encoding="utf-8"))
    changed = copy.deepcopy(raw)
    alter, message = CHANGES[change]
    alter(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(ResultsError) as refused:
        read(path)
    assert str(path) in str(refused.value) and message in str(refused.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, schema())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
def test_what_is_no_results_file_is_refused(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"a\.json: (not JSON|no results file)"):
        read(path)


@pytest.mark.parametrize("unwritable", [object(), "a lone surrogate \ud800"], ids=["no JSON", "no UTF-8"])
def test_a_failing_write_leaves_the_old_file(unwritable, tmp_path):
    path, old = tmp_path / "a.json", made_up.run()
    write(path, old)
    new = dataclasses.replace(old, method={"fails": unwritable})
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write(path, new)
    assert read(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
