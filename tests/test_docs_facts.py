"""What README and docs/ say of the code and of measurements: errors, kernel families, limits, times."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpukern.conv.families.family import Family
from gpukern.conv.families.grouped import plan as grouped
from gpukern.conv.families.implicit_gemm import plan as implicit_gemm
from gpukern.conv.families.registry import FAMILIES
from gpukern.conv.families.tma_stem import plan as tma_stem
from gpukern.conv.families.tma_wgrad import plan as tma_wgrad
from gpukern.conv.plan import Direction, Operands
from gpukern.conv.problem import conv_problem
from gpukern.runtime.device import A100, B200, H100, DeviceSpec
from tests.documents import ROOT, prose, table

DOCS = ROOT / "docs"


def messages() -> Iterator[str]:
    """Every string of gpukern's code, "…" in the place of what is filled in."""
    for path in sorted((ROOT / "gpukern").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quotations(page: Path) -> list[str]:
    """Of three words or more, outside of code."""
    text = " ".join(re.sub(r"`[^`]*`", "", prose(page)).split())
    return [quote for quote in re.findall(r'"([^"]+)"', text) if quote.count(" ") > 1]


#: What differs from call to call: "…" in a quotation, or an example's names, numbers and dtypes.
_FILLED_IN = re.compile(r"…|'\w+'|\d+(?:\.\d+)?|torch\.(?:u?int|b?float)\d+|True|False")
#: PyTorch's own words.
_TORCHS = {"We ran into an error when deserializing the saved file"}


@pytest.mark.parametrize("name", ["limits.md", "fusing.md"])
def test_errors_are_quoted_as_they_are(name):
    said = list(messages())
    quoted = set(quotations(DOCS / name)) - _TORCHS
    assert len(quoted) > 12
    for quote in quoted:
        pattern = re.compile(".*".join(map(re.escape, _FILLED_IN.split(quote))), re.IGNORECASE)
        assert any(pattern.search(message) for message in said), f"nothing says {quote!r}"


#: Input, weight, stride, padding, groups: what each family was written for.
_CONVOLUTIONS = (
    ((32, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
    ((32, 64, 56, 56), (64, 64, 1, 1), 1, 0, 1),
    ((32, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    ((32, 64, 56, 56), (64, 1, 3, 3), 1, 1, 64),
    ((32, 64, 1, 1024), (64, 1, 1, 4), 1, 0, 64),
    ((32, 128, 56, 56), (128, 4, 3, 3), 1, 1, 32),
)
#: What the table calls the dtypes of a family that serves the first of these; products of fp32 "tf32x3" are in full.
_DTYPES = {
    "all": ("float32", "ieee"),
    "all, fp32 in full as three TF32 products": ("float32", "tf32x3"),
    "16 bits, TF32": ("float32", "tf32"),
    "16 bits": ("float16", "ieee"),
}


def serves(family: Family, direction: Direction, device: DeviceSpec, dtypes: str = "16 bits") -> bool:
    operands = Operands(*_DTYPES[dtypes])
    problems = (
        conv_problem(x, w, None, (stride,) * 2, (padding,) * 4, (1, 1), groups)
        for x, w, stride, padding, groups in _CONVOLUTIONS
    )
    return any(any(family.candidates(problem, direction, operands, device)) for problem in problems)


def described(family: Family) -> tuple[set[str], str, str, str]:
    """(variants, directions, dtypes, what it needs) in the words of the table."""
    served = [direction for direction in Direction if serves(family, direction, H100)]
    directions = "all" if served == list(Direction) else ", ".join(direction.value for direction in served)
    dtypes = next(words for words in _DTYPES if serves(family, served[0], H100, words))
    needs = "any GPU" if serves(family, served[0], A100) else "TMA" if serves(family, served[0], B200) else "sm_90"
    return {variant.value for variant in family.variants}, directions, dtypes, needs


def test_the_table_of_kernel_families_is_the_codes():
    written = {
        folder.strip("`"): (set(re.findall(r"`([^`]+)`", variants)), *facts)
        for folder, variants, *facts in (row[:5] for row in table(DOCS / "adding-a-kernel.md", "| family"))
    }
    assert written == {family.name: described(family) for family in FAMILIES}


def test_convolution_describes_every_kernel_family():
    rows = [re.findall(r"`([^`]+)`", " ".join(row[:2])) for row in table(DOCS / "convolution.md", "| family")]
    in_code = {family.name: {variant.value for variant in family.variants} for family in FAMILIES}
    assert {folder: set(variants) for folder, *variants in rows} == in_code


def test_limits_of_kernels_are_the_codes():
    text = " ".join((DOCS / "convolution.md").read_text().split())
    for words in (
        f"layers of up to {tma_stem._MOST_CHANNELS} channels",
        f"batches of {tma_wgrad._FEWEST_IMAGES} and more",
        f"convolutions of 2 to {grouped._FULL_GROUP // 2} channels a group",
        f"fewer than {implicit_gemm._FLAT_CHANNELS} of these (`flat`)",
        f"groups of fewer than {implicit_gemm._DIRECT_CHANNELS} channels (`direct`)",
    ):
        assert words in text, words


def test_every_environment_variable_is_documented():
    read = {
        node.value
        for folder in ("gpukern", "models")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"GPUKERN_\w+", str(node.value))
    }
    rows = {row[0].strip("`").partition("=")[0] for row in table(DOCS / "README.md", "| variable |")}
    assert len(read) > 4 and read == {name for name in rows if name.startswith("GPUKERN_")}


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "host" / name).read_text())


def test_times_of_calls_are_those_that_were_measured():
    microseconds = measured("host_overhead.json")["microseconds"]
    least = microseconds["empty autograd.Function"]
    rows = [[name, f"{each:.1f}", f"{each / least:.1f}"] for name, each in microseconds.items()]
    assert list(table(DOCS / "performance.md", "| call |")) == rows


def test_steps_of_optimizers_are_those_that_were_measured():
    file = measured("optimizers.json")
    launches = {row["optimizer"]: row for row in file["launches"] if row["model"] == "ResNet-50"}
    host = {(row["optimizer"], row["groups"]): row for row in file["host"]}
    rows = list(table(DOCS / "performance.md", "| | launches |"))
    for name, ours, foreach, fused, *times in rows:
        theirs = launches[name]["torch"]
        assert [ours, foreach, fused] == [
            str(launches[name]["gpukern"]),
            ", ".join(map(str, theirs.get("foreach", "–"))),
            ", ".join(map(str, theirs.get("fused", "–"))),
        ]
        for groups, *shown in zip((1, 465), times[::2], times[1::2], strict=True):
            step = host[name, groups]
            fused_us = (step["torch"] or {}).get("fused")
            assert shown == [f"{step['checked']:,.0f}", f"{fused_us:,.0f}" if fused_us else "–"], (name, groups)
    assert len(rows) == 4
