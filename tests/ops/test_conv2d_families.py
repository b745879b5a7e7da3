"""The registry of kernel families: complete, without overlaps, and its first family serves every problem."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from gpukern.conv.families import registry
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.plan import Direction, Layout, Operands
from gpukern.runtime.device import A100, H100
from tests.ops.conv_cases import CASES, as_problem


def test_every_folder_with_a_plan_is_registered_under_its_own_name():
    folders = {path.parent.name for path in Path(registry.__file__).parent.glob("*/plan.py")}
    assert {family.name for family in FAMILIES} == folders
    assert len(FAMILIES) == len(folders)
    for family in FAMILIES:
        assert callable(importlib.import_module(family.launch_module).prepare)


def test_every_variant_belongs_to_one_family_which_tells_no_facts_of_others():
    variants = [variant for family in FAMILIES for variant in family.variants]
    assert len(variants) == len(set(variants))
    for family in FAMILIES:
        assert family.elementwise | family.across_runs <= set(family.variants)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_candidates_are_of_their_family_and_the_first_family_serves_every_problem(case):
    p = as_problem(case)
    kinds = ("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee")
    layouts = Layout.NHWC, Layout.NCHW, Layout.STRIDED
    for direction, kind, layout, device in itertools.product(Direction, kinds, layouts, (A100, H100)):
        operands = Operands(*kind, layout, layout, layout)
        found = {family: list(family.candidates(p, direction, operands, device)) for family in FAMILIES}
        assert all(family_of(plan) is family for family, plans in found.items() for plan in plans)
        assert found[FAMILIES[0]]
