"""How the tests themselves are set up."""

from __future__ import annotations

import pytest

PROFILE = """
import os
import sys
import torch

os.environ.pop("CI", None)
os.environ.update(dict([sys.argv[2].split("=")]) if sys.argv[2] else {})
torch.cuda.is_available = lambda: sys.argv[1] == "gpu"

import hypothesis
hypothesis.settings.load_profile("default")  # whatever else hypothesis takes for a sign of CI
import tests.conftest
print(hypothesis.settings.default.derandomize)
"""


@pytest.mark.parametrize(
    ("where", "variable", "same"),
    [("cpu", "", False), ("cpu", "CI=1", True), ("gpu", "", True), ("gpu", "GPUKERN_EMULATE=1", False)],
)
def test_examples_are_the_same_every_time_in_ci_and_on_a_gpu(run_python, where, variable, same):
    done = run_python(PROFILE, where, variable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(same)
