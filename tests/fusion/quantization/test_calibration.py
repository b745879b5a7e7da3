"""What is done with the batches: taken once, checked, divided, counted; and how ranges come of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpukern
from gpukern.fusion.quantization import data
from gpukern.fusion.quantization.data import few, take
from gpukern.fusion.quantization.estimators import ESTIMATORS, threshold
from gpukern.fusion.quantization.formats import FP8, INT8, rounded_to, scale_for
from gpukern.fusion.quantization.histogram import BINS, Histogram
from tests.fusion.quantization.nets import batches, chain

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


@pytest.fixture(scope="module")
def module():
    """A fused model that takes [N, 3, 4, 4]."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).eval()
    return gpukern.fuse(model, torch.randn(2, 3, 4, 4), verify=False).module


def images(*rows: int) -> list[torch.Tensor]:
    """Batches of so many images, that begin with the batch's number."""
    batches = [torch.randn(count, 3, 4, 4) for count in rows]
    for number, batch in enumerate(batches):
        batch[:, 0, 0, 0] = number
    return batches


def taken(module, given) -> tuple[list[float], list[float], data.Data]:
    seen: list[float] = []
    found = take(given, module, ("batch",), lambda leaves: seen.append(leaves[0][0, 0, 0, 0].item()))
    return seen, [leaves[0][0, 0, 0, 0].item() for leaves in found.aside], found


def test_half_of_the_batches_is_kept_aside(module):
    seen, aside, found = taken(module, images(2, 2, 2, 2, 2))
    assert (seen, aside) == ([0, 2, 4], [1, 3]) and (found.observed_rows, found.aside_rows) == (6, 4)


def test_a_generator_that_can_be_read_once_will_do(module):
    seen, aside, _ = taken(module, (batch for batch in images(3, 3)))
    assert (seen, aside) == ([0], [1])


def test_a_generator_may_write_every_batch_into_the_same_memory(module):
    memory = torch.empty(2, 3, 4, 4)
    seen, aside, found = taken(module, (memory.copy_(batch) for batch in images(2, 2, 2, 2)))
    assert (seen, aside) == ([0, 2], [1, 3])
    assert [leaves[0][0, 0, 0, 0].item() for leaves in found.observed] == [0, 2]


def test_of_one_batch_half_of_the_rows_are_kept_aside(module):
    _, _, found = taken(module, images(5))
    assert (found.observed_rows, found.aside_rows, found.shared) == (3, 2, False)


def test_of_one_image_it_is_told_that_the_proof_is_by_the_same(module):
    _, _, found = taken(module, images(1))
    assert found.shared and "proved on the same" in found.words


def test_labels_of_a_loader_are_left_out(module):
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 4, 4), torch.arange(8)), batch_size=2)
    assert taken(module, loader)[2].observed_rows == 4


def test_what_is_beyond_the_budget_is_observed_and_not_kept(module, monkeypatch):
    monkeypatch.setattr(data, "BUDGET", 2 * 3 * 16 * 4)
    seen, aside, found = taken(module, images(*[2] * 9))
    assert len(seen) == 7 and len(aside) == 2 and len(found.observed) == 1 and found.observed_rows == 14


def test_few_rows_of_many(module):
    found = list(few([[each] for each in images(2, 2, 2)], ("batch",), 3))
    assert [len(leaves[0]) for leaves in found] == [2, 1]


@pytest.mark.parametrize(
    "given, kind, words",
    [
        ([], ValueError, "calibrate has no batch"),
        (images(0, 0), ValueError, "only empty batches"),
        ([torch.randn(2, 3, 5, 5)], ValueError, r"batch 1 of calibrate: expected input 0 of shape \[batch, 3, 4, 4\]"),
        ([*images(2), torch.full((1, 3, 4, 4), torch.nan)], ValueError, "batch 2 of calibrate has NaN or infinity"),
        ([*images(2), torch.full((1, 3, 4, 4), torch.inf)], ValueError, "batch 2 of calibrate has NaN or infinity"),
        (["image"], TypeError, "batch 1 of calibrate: expected a tensor as input 0, got str"),
        ([torch.ones(2, 3, 4, 4, dtype=torch.uint8)], TypeError, "expected input 0 of torch.float32, got torch.uint8"),
        ([torch.zeros(2, 3, 4, 4)] * 2, ValueError, "calibrate has the same number everywhere, 0: "),
        ([()], ValueError, "batch 1 of calibrate has 0 of the model's 1 arguments"),
        ([{"other": images(2)[0]}], TypeError, "batch 1 of calibrate: .*other"),
    ],
)
def test_batches_that_are_of_no_use_are_refused(given, kind, words, module):
    with pytest.raises(kind, match=words):
        taken(module, given)


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"dtype": "int8"}, ValueError, "dtype='int8' needs calibrate="),
        ({"dtype": "int4"}, ValueError, "knows 'int8', .* got 'int4'"),
        ({"calibrate": []}, ValueError, "calibrate is for dtype='int8' or 'fp8', got dtype=None"),
        ({"dtype": torch.float16, "target": 0.9}, ValueError, "target is for dtype='int8'"),
        ({"dtype": "fp8", "calibrate": "a word"}, TypeError, "an iterable of batches, got str"),
        ({"dtype": "int8", "calibrate": [1], "calibration": "best"}, ValueError, "one of auto, max"),
        ({"dtype": "int8", "calibrate": [1], "target": 1.5}, ValueError, "above 0 and at most 1"),
        ({"dtype": "int8", "calibrate": [1], "target": len}, ValueError, "needs the least value"),
        ({"dtype": "int8", "calibrate": [1], "target": "high"}, TypeError, "a number, or a metric and a number"),
        (
            {"dtype": "int8", "calibrate": [1], "precision": torch.float32},
            ValueError,
            "torch.float16 or torch.bfloat16",
        ),
        (
            {"dtype": "int8", "calibrate": [1], "target": 0.9, "verify": False},
            ValueError,
            "cannot go with verify=False",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, kind, words):
    with pytest.raises(kind, match=words):
        gpukern.fuse(nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4), **options)


def test_a_model_that_is_not_finite_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="computes NaN or infinity for a batch of calibrate"):
        gpukern.fuse(chain(), batches(1)[0], dtype="int8", calibrate=[batches(1)[0].clamp(-1, 1) * 3e38, *batches(1)])


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_what_came_in_any_order():
    parts = [torch.randn(1000), torch.zeros(10), torch.randn(1000) * 300, torch.empty(0), torch.randn(1000) * 1e-3]
    forth, back = Histogram(), Histogram()
    for part in parts:
        forth.add(part)
    for part in reversed(parts):
        back.add(part)
    everything = torch.cat(parts).abs()
    assert forth.largest == back.largest == everything.max() and forth.width == back.width
    assert torch.equal(forth.counts, back.counts) and forth.counts.sum() == len(everything)
    assert torch.equal(forth.counts.float(), torch.histc(everything, BINS, 0, forth.width * BINS))
    assert everything.max() <= forth.width * BINS <= 2 * everything.max()


def counted(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(x)
    return histogram


@pytest.mark.parametrize("format", [INT8, FP8], ids=str)
def test_outliers_are_clamped_by_all_but_the_maximum(format):
    x = torch.cat([torch.randn(200_000), torch.tensor([60.0])])
    found = {name: threshold(counted(x), name, format) for name in ESTIMATORS}
    assert found["max"] == 60 and 3 < found["percentile"] < 6
    assert found["mse"] < 60 or format is FP8  # whose steps grow with the numbers
    assert found["entropy"] < 60


def test_the_least_squares_threshold_has_the_least_squares():
    x = torch.randn(100_000) ** 3
    found = threshold(counted(x), "mse", INT8)

    def error(limit: float) -> float:
        return (rounded_to(x, scale_for(limit, INT8), INT8) - x).square().mean().item()

    largest = x.abs().max().item()
    assert error(found) <= 1.02 * min(error(largest * share / 20) for share in range(4, 21))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_range_of_nothing_but_zeros_or_one_number(name):
    assert threshold(counted(torch.zeros(5)), name, INT8) == 0 and scale_for(0.0, INT8) == 1.0
    assert math.isclose(threshold(counted(torch.full((9,), 3.0)), name, INT8), 3.0, rel_tol=0.01)
