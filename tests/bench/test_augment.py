"""The suite of the input pipeline, and what is tried of it first on a new GPU."""

from __future__ import annotations

import pytest
import torch

from bench import smoke
from bench.accuracy import relative_error
from bench.results import Case
from bench.smoke_cases import KINDS
from bench.suite import Selection, Task, suites, tasks
from bench.suites.augment import EVALUATION, TRAINING, Pipeline
from tests.device import DEVICE

SUITE = suites()["augment"]


@pytest.mark.parametrize("dtype", SUITE.dtypes)
@pytest.mark.parametrize("computation", [TRAINING, EVALUATION])
def test_all_compute_the_same(computation, dtype, where):
    for problem in (Pipeline(3, 9, 3, 9, 2, 4), Pipeline(2, 12, 1, 8, 0, 0)):
        task = Task(Case("augment", computation, *SUITE.describe(problem), 3, dtype, "", ()), problem)
        tensors = SUITE.tensors(task, where)
        found = SUITE.implementations(task, ("library",), where)
        for each in found:
            output = each.function(*each.prepare(tensors))
            assert output.dtype == getattr(torch, dtype)
            assert relative_error(output, SUITE.reference(task, tensors)) <= SUITE.bound(task), each.name
        assert len(found) == 2
        images, *_ = tensors
        assert not torch.equal(images, SUITE.tensors(task, where)[0])


def test_bytes_are_those_of_the_crops():
    """Of CIFAR-10 with four pixels around it each crop sees 32 − 20/9 rows and columns, on average."""
    (training,) = tasks(SUITE, Selection(("cifar10",), (2,), ("float16",), ("",), (TRAINING,)))
    assert SUITE.work(training).bytes == pytest.approx(2 * 3 * ((32 - 20 / 9) ** 2 + 32 * 32 * 2))
    (evaluation,) = tasks(SUITE, Selection(("imagenet",), (2,), ("float32",), ("",), (EVALUATION,)))
    assert SUITE.work(evaluation).bytes == 2 * 3 * 224 * 224 * 5


def test_data_sets_are_called_by_name():
    assert SUITE.networks_called("CIFAR10") == ["cifar10"] and len(SUITE.networks_called("all")) == 3
    with pytest.raises(ValueError, match="resnet50: expected one of cifar10, mnist, imagenet"):
        SUITE.networks_called("resnet50")


def test_what_is_tried_first_is_right(tmp_path):
    (case,) = [each for each in KINDS["operators"](DEVICE) if each.name == "augment, float32, reflect"]
    status, found = smoke.run([case], DEVICE, tmp_path / "smoke.jsonl")
    assert status == 0 and len(found[0]["errors"]) == 4, found
