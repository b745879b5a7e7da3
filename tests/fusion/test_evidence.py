"""Examples that prove nothing, or less than they seem to: refused, exchanged, or told of."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.fusion import FusionError, folding, pipeline
from gpukern.fusion.decisions import decided
from gpukern.fusion.evidence import _another, on_bound, require_rest
from gpukern.fusion.verify import Witness
from tests.fusion.networks import Net, conv, lively, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

X = torch.randn(2, 4, 7, 7)


def made(function) -> nn.Module:
    return lively(Net(function, a=conv(), b=norm()))


def y(m, x):
    return m.b(m.a(x))


def one_class(m, x):
    return F.max_pool2d(y(m, x), 2).mean((2, 3)) + torch.tensor([0.0, 0, 50, 0])


# ---- models that do not repeat themselves ----------------------------------------------------------------------------


def counting(m, x):
    m.calls = getattr(m, "calls", 0) + 1
    return y(m, x) * m.calls


def remembering(m, x):
    before, m.before = getattr(m, "before", 0), y(m, x)
    return m.before + before


def seeded(m, x):
    torch.manual_seed(0)
    return y(m, x) + torch.randn(2, 4, 7, 7)


UNSTEADY = {
    "dropout": (lambda m, x: F.dropout(y(m, x), 0.5), "native_dropout: aten::native_dropout"),
    "stochastic depth": (lambda m, x: y(m, x) * torch.empty(2, 1, 1, 1).bernoulli_(0.999), "aten::bernoulli"),
    "noise of a seed": (seeded, "randn: aten::randn"),
    "random slopes": (lambda m, x: F.rrelu(y(m, x), training=True), "aten::rrelu"),
    "Python's random": (lambda m, x: y(m, x) * random.random(), "two calls of it .* differ by"),
    "a counter": (counting, "two calls of it .* differ by 1.0 of its size; it is random, or keeps a state"),
    "a memory": (remembering, "it is random, or keeps a state"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTEADY)
def test_nothing_is_proved_of_a_model_that_does_not_repeat_itself(name):
    function, words = UNSTEADY[name]
    with pytest.raises(FusionError, match=f"does not repeat itself.*{words}"):
        gpukern.fuse(made(function), X)


def test_unproved_it_is_fused_with_a_note():
    fused = gpukern.fuse(made(UNSTEADY["dropout"][0]), X, verify=False)
    assert fused.report.notes == ("The model is random, by native_dropout: aten::native_dropout",)


def test_what_could_be_random_and_is_not():
    def function(m, x):
        rows = F.dropout(y(m, x), 0.0).flatten(2)
        return F.rrelu(F.scaled_dot_product_attention(rows, rows, rows))

    report = gpukern.fuse(made(function), X).report
    assert report.verification.passed and not report.notes


# ---- examples that tell nothing --------------------------------------------------------------------------------------

EMPTY = {
    "zeros": (lambda m, x: torch.relu(y(m, x) - 1e4), "returns only zeros for another example too"),
    "saturated": (lambda m, x: torch.sigmoid(y(m, x) + 1e4), "returns the same for another example too"),
    "a softmax of one": (lambda m, x: y(m, x).mean((1, 2, 3))[:, None].softmax(1), "returns the same"),
    "the input is ignored": (lambda m, x: m.a.weight * 2, "returns the same"),
    "one class of all": (lambda m, x: torch.relu(y(m, x) - 1e4).mean((2, 3)).argmax(1), "returns only zeros"),
    "always true": (lambda m, x: torch.relu(y(m, x) - 1e4) < 1, "returns the same"),
    "no elements": (lambda m, x: y(m, x)[:0], "returns no elements"),
    "nothing selected": (lambda m, x: (lambda z: z[z > 1e6])(y(m, x)), "returns no elements"),
    "no tensor": (lambda m, x: (y(m, x).shape[1], None), "returns no tensor"),
    "nowhere finite": (lambda m, x: torch.sqrt(-1 - y(m, x).abs()), "returns no finite number"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_proved_by_an_output_that_tells_nothing(name):
    function, words = EMPTY[name]
    with pytest.raises(FusionError, match=f"nothing can be proved by this example: the original {words}"):
        gpukern.fuse(made(function), X)
    assert gpukern.fuse(made(function), X, verify=False).report.verification is None


NOTED = {
    "one output of two": (lambda m, x: (y(m, x), torch.relu(y(m, x) - 1e4)), "Output 1 is zeros for another example"),
    "a grid": (lambda m, x: {"y": y(m, x), "grid": torch.arange(7.0) * m.b.weight[0]}, "Output 1 is the same"),
    "classes": (
        lambda m, x: y(m, x).argmax(1),
        "No output is of floating-point numbers: 1% of the elements may differ",
    ),
    "one class": (lambda m, x: one_class(m, x).argmax(1), "verified by the numbers they are chosen by"),
    "one class, with its logit": (lambda m, x: one_class(m, x).max(1)[1], "verified by the numbers they are chosen by"),
    "one side": (lambda m, x: y(m, x) < 1e4, "verified by the numbers they are chosen by"),
    "masked": (lambda m, x: y(m, x).masked_fill(x > 0, -torch.inf), "not finite in [45]\\d(\\.\\d)?% of its output"),
    "roots": (lambda m, x: y(m, x.sqrt()), r"finite in 0% .* verified with numbers between 0 and 1"),
    "logits": (lambda m, x: y(m, torch.logit(x)), r"finite in 0% .* verified with numbers between 0 and 1"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_proved_in_part_is_told(name):
    function, words = NOTED[name]
    report = gpukern.fuse(made(function), X).report
    (note,) = report.notes
    assert report.verification.passed and re.search(words, note), note


def test_a_wrong_model_of_one_class_is_found(monkeypatch):
    """By the numbers that the class is chosen by: it is the right one."""
    right = folding.exact
    monkeypatch.setattr(folding, "exact", lambda *given: (right(*given)[0] * 1.001, right(*given)[1]))
    monkeypatch.setattr(pipeline, "what_is_wrong", lambda judged: None)
    with pytest.raises(FusionError, match=r"the fused model is wrong: error .* To blame is conv2d"):
        gpukern.fuse(made(lambda m, x: one_class(m, x).argmax(1)), X)


def test_choices_that_are_not_those_of_the_original_prove_nothing():
    model = made(lambda m, x: one_class(m, x).argmax(1))
    witness = Witness(model, (X,), torch.float32, see=decided)
    assert witness.judge(model).passed
    with pytest.raises(FusionError, match=r"nothing can be proved: .* does not choose that as the original does"):
        witness.judge(lambda x: one_class(model, x)[0] > 0.5)


@pytest.mark.parametrize("value", [0.5, -3.0, 0.0, torch.nan])
def test_an_example_of_one_value_is_exchanged_for_what_the_model_takes(value):
    """As grey pixels, for a model that takes roots or checks its range."""

    def function(m, x):
        if not torch.compiler.is_compiling():
            assert value != 0.5 or 0 <= float(x.double().min()) <= float(x.double().max()) <= 1
        return y(m, x.abs().sqrt() if value != 0.5 else x.sqrt())

    report = gpukern.fuse(made(function), torch.full((2, 4, 7, 7), value)).report
    words = "finite in 0%" if value != value else "one value throughout: verified with random numbers"
    assert words in report.notes[0] and report.verification.error > 0


def test_a_model_that_takes_no_other_numbers_keeps_its_example():
    def function(m, x):
        if not torch.compiler.is_compiling():
            assert float(x.double().std()) == 0
        return y(m, x)

    report = gpukern.fuse(made(function), torch.full((2, 4, 7, 7), 0.5), dynamic_batch=False).report
    assert report.notes == ("An example input has one value throughout: it proves little",)


def test_another_example_keeps_what_may_be_an_index():
    images, boxes, rows = (
        torch.randn(2, 3, 4, 4),
        torch.tensor([[0.0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]),
        torch.tensor([1, 0]),
    )
    other, shrunk, same = _another((images, boxes, rows))
    assert same is rows and (shrunk <= boxes).all() and (shrunk >= 0.75 * boxes).all()
    assert (other != images).all() and other.abs().max() <= images.abs().max()
    tokens = torch.arange(30).view(3, 10)
    (mixed,) = _another((tokens,))
    assert not torch.equal(mixed, tokens) and torch.equal(mixed.flatten().sort().values, tokens.flatten())


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_a_bound_that_allows_anything_is_refused_and_a_wide_one_told():
    with pytest.raises(FusionError, match=r"with 1\.8 allowed a model that returns zeros would pass"):
        on_bound(0.9, 1.8)
    assert on_bound(0.1, 0.2) == [
        "The proof is weak: an error of 0.20 is allowed, the original has one of 0.10 in this dtype"
    ]
    assert on_bound(1e-7, 2e-6) == []


@pytest.mark.parametrize(
    "wrong", [lambda out: (out[0], out[1] + 1, out[2]), lambda out: (*out[:2], 7), lambda out: out[:2]]
)
def test_outputs_beside_the_floating_ones_are_compared(wrong):
    def function(m, x):
        out = y(m, x)
        return out, out.argmax(1), out.shape[1]

    model = made(function)
    expected = list(model(X))
    require_rest(model, (X,), torch.float32, expected, model)
    with pytest.raises(FusionError, match=r"the fused model is wrong: (output|it returns)"):
        require_rest(model, (X,), torch.float32, expected, lambda x: wrong(model(x)))


def test_the_example_stays_as_it_is():
    given = X.clone()
    gpukern.fuse(made(lambda m, x: y(m, x.mul_(2.0))), given)
    assert torch.equal(given, X)
