"""A free batch: right at every size, or given up with a word about it; and inputs that have none beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import gpukern
from gpukern.fusion.batch import resized
from tests.fusion.networks import Net, conv, lively, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

SIZES = (0, 1, 2, 3, 5, 8)


def made(function) -> nn.Module:
    return lively(Net(function, a=conv(), b=norm(), c=nn.Linear(4, 3)))


def same(found, expected) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) if isinstance(b, torch.Tensor) else a == b
        for a, b in pairs
    )


def taken(model, fused, example) -> set[int]:
    """The sizes that ``fused`` takes, which all must give what the original gives. Others are refused in words."""
    sizes = set()
    for size in SIZES:
        inputs = example(size)
        try:
            found = fused(*inputs)
        except ValueError as problem:
            assert "batch" in str(problem) or "fuse the model for that size" in str(problem)
            continue
        with torch.no_grad():
            assert same(found, model(*inputs)), size
        sizes.add(size)
    return sizes


def images(size: int) -> tuple:
    return (torch.randn(size, 4, 7, 7),)


def pooled(m, x):
    return F.adaptive_avg_pool2d(m.b(m.a(x)), 1)


ALL, BUT_ONE = set(SIZES), set(SIZES) - {1}
#: What a model does with its batch, and the sizes that it can be fused for by examples of two images and of one.
MODELS = {
    "an if": (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] > 1 else 1), BUT_ONE, {1}),
    "a bare squeeze before a layer": (lambda m, x: m.c(pooled(m, x).squeeze()), BUT_ONE, {1}),
    "a bare squeeze": (lambda m, x: pooled(m, x).squeeze(), ALL, ALL),
    "view(-1, C)": (lambda m, x: m.c(pooled(m, x).view(-1, 4)), ALL, ALL),
    "an if for two": (lambda m, x: m.b(m.a(x)) * (2 if len(x) == 2 else 1), {2}),
    "an if for many": (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] > 4 else 1), {2}),
    "an even batch": (lambda m, x: m.b(m.a(x)).view(2, -1), {2}),
    "chunks": (lambda m, x: torch.cat([y * (i + 1) for i, y in enumerate(m.b(m.a(x)).chunk(2))]), {2}),
    "a split": (lambda m, x: torch.cat([y * (i + 1) for i, y in enumerate(m.b(m.a(x)).split(1))]), {2}),
    "view(N, -1)": (lambda m, x: m.b(m.a(x)).view(x.shape[0], -1), ALL - {0}),
    "the size itself": (lambda m, x: (m.b(m.a(x)), x.shape[0]), ALL),
    "statistics": (lambda m, x: F.batch_norm(pooled(m, x).flatten(1), None, None, training=True), BUT_ONE),
}


@pytest.mark.parametrize("batch, name", [*((2, name) for name in MODELS), *((1, name) for name in [*MODELS][:4])])
def test_a_free_batch_is_right_at_every_size(name, batch, tmp_path):
    function, *expected = MODELS[name]
    model = made(function)
    fused = gpukern.fuse(model, images(batch))
    sizes = taken(model, fused, images)
    assert sizes == expected[batch % 2]
    assert any("batch size" in note for note in fused.report.notes) == (not sizes >= ALL - {0})
    if name in ("an if", "a bare squeeze before a layer"):
        fused.save(tmp_path / "a.pt2")
        assert taken(model, gpukern.load(tmp_path / "a.pt2"), images) == sizes


@pytest.mark.parametrize(
    "name, why", [("an even batch", "the model computes with 2 as a number"), ("an if for many", "batch <= 4")]
)
def test_a_fixed_batch_has_a_reason(name, why):
    report = gpukern.fuse(made(MODELS[name][0]), images(2)).report
    assert any("The batch size is fixed" in note and why in note for note in report.notes), report.notes


def scaled(m, x, s):
    return m.b(m.a(x)) * s


def channels(m, x, s):
    return scaled(m, x, s.view(4, 1, 1))


#: Functions of an image and of something that has no batch, or that has it too; and that for a batch.
INPUTS = {
    "a number": (scaled, lambda n: (*images(n), torch.tensor(2.0))),
    "one for each channel": (channels, lambda n: (*images(n), torch.rand(4))),
    "a row": (scaled, lambda n: (*images(n), torch.rand(1, 4, 1, 1))),
    "before the images": (lambda m, s, x: scaled(m, x, s), lambda n: (torch.rand(7), *images(n))),
    "two numbers": (lambda m, x, s: m.b(m.a(x)) * s[0] + s[1], lambda n: (*images(n), torch.rand(2))),
    "in a dict": (
        lambda m, d: scaled(m, d["x"], d["s"]),
        lambda n: ({"x": images(n)[0], "s": torch.rand(1, 4, 1, 1)},),
    ),
    "in a tuple": (lambda m, given, by: scaled(m, *given) * by, lambda n: ((*images(n), torch.rand(7)), 2)),
    "a mask": (scaled, lambda n: (*images(n), torch.rand(n, 1, 7, 7))),
    "added": (lambda m, x, s: m.b(m.a(x)) + s, lambda n: (*images(n), *images(n))),
    "a second image": (lambda m, x, y: (m.b(m.a(x)), m.b(m.a(y))), lambda n: (*images(n), *images(n))),
}


@pytest.mark.parametrize(
    "batch, name", [*((2, name) for name in INPUTS), *((1, name) for name in ("a row", "in a dict", "a mask"))]
)
def test_other_inputs_have_their_batch_or_none(name, batch):
    function, example = INPUTS[name]
    model = made(function)
    fused = gpukern.fuse(model, example(batch))
    assert taken(model, fused, example) == ALL, fused.report.notes


def test_inputs_of_different_batches_are_refused():
    function, example = INPUTS["added"]
    fused = gpukern.fuse(made(function), example(2))
    with pytest.raises(ValueError, match=r"expected inputs of one batch size, got 3 and 2 \(input 1\)"):
        fused(example(3)[0], example(2)[1])


def test_images_that_do_not_meet_may_be_of_different_batches(tmp_path):
    function, example = INPUTS["a second image"]
    model = made(function)
    gpukern.fuse(model, example(2)).save(tmp_path / "a.pt2")
    for fused in (gpukern.fuse(model, example(2)), gpukern.load(tmp_path / "a.pt2")):
        given = example(3)[0], example(5)[1]
        with torch.no_grad():
            assert same(fused(*given), model(*given))


def test_rows_that_come_again_are_other_numbers():
    x, labels = torch.rand(2, 3) + 1, torch.tensor([4, 5])
    more, names, number = resized((x, labels, 7), ("batch", "batch", None), 5)
    assert number == 7 and names.tolist() == [4, 5, 4, 5, 4]
    assert torch.equal(more[:2], x) and len(more.unique(dim=0)) == 5


def test_a_condition_on_large_batches_is_named_without_an_end():
    model = made(lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] <= 3 else 1))
    fused = gpukern.fuse(model, images(5))
    (note,) = [note for note in fused.report.notes if "batch size" in note]
    assert note.endswith("the model does otherwise for sizes without 4 <= batch")
