"""Calls of a fused model with other arguments than the example's: the original's result, or a word about which."""

from __future__ import annotations

import copy
import enum

import pytest
import torch
from torch import nn

import gpukern
from gpukern.fusion.calls import Signature, text
from tests.fusion.networks import conv, lively, net, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


class Flags(nn.Module):
    """All kinds of arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), norm()

    def forward(self, x, relu=True, scale=1.0, head="a", sizes=(1, 2), mask=None, *, power=1, dtype=torch.float32):
        y = self.b(self.a(x)) * scale * sizes[0] + sizes[-1]
        y = torch.relu(y) if relu else y
        y = y if mask is None else y * mask
        return (y if head == "a" else -y) ** power


X, MASK = torch.randn(2, 4, 7, 7), torch.rand(2, 4, 7, 7)
EXAMPLES = {
    "defaults": (X,),
    "others": (X, True, 2.0, "b"),
    "a list": (X, True, 1.0, "a", [3, 2]),
    "a mask": (X, False, 1.0, "a", (1, 2), MASK),
}


@pytest.fixture(scope="module")
def model():
    return lively(Flags())


@pytest.fixture(scope="module", params=EXAMPLES)
def fused(request, model, tmp_path_factory):
    """As it was fused, and as it was saved and loaded."""
    path = tmp_path_factory.mktemp("saved") / "a.pt2"
    made = gpukern.fuse(model, EXAMPLES[request.param])
    made.save(path)
    return request.param, (made, gpukern.load(path))


#: A call, and for which examples the fused model must take it; all others must refuse it and name what is in the way.
CALLS = [
    (((X,), {}), ("defaults",), None),
    (((), {"x": X}), ("defaults",), None),
    (((X, True), {"scale": 1.0, "head": "a"}), ("defaults",), None),
    (((X,), {"power": 1, "dtype": torch.float32}), ("defaults",), None),
    (((X, True, 2.0, "b"), {}), ("others",), None),
    (((X,), {"head": "b", "scale": 2.0}), ("others",), None),
    (((X, False, 2.0, "b"), {}), (), "'relu'|'mask'|'scale'|'sizes'"),
    (((X, None, 2.0, "b"), {}), (), "'relu'|'mask'|'sizes'|'scale'"),
    (((X, 1, 2.0, "b"), {}), (), "'relu'|'mask'|'sizes'|'scale'"),
    (((X, True, 3.0, "b"), {}), (), "'scale'|'mask'|'sizes'"),
    (((X, True, float("nan"), "b"), {}), (), "'scale'|'mask'|'sizes'"),
    (((X, True, torch.tensor(2.0), "b"), {}), (), "'scale'|'mask'|'sizes'"),
    (((X,), {"sizes": [3, 2]}), ("a list",), "'sizes'|'scale'|'relu'"),
    (((X,), {"sizes": [3, 5]}), (), "'sizes'|'scale'|'relu'"),
    (((X,), {"sizes": [3, 2, 2]}), (), "'sizes'|'scale'|'relu'"),
    (((X, False), {"mask": MASK}), ("a mask",), "'mask'|'relu'|'scale'|'sizes'"),
    (((X,), {"power": 2}), (), "'power'"),
    (((X,), {"dtype": torch.float16}), (), "'dtype'"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_other_arguments_are_taken_or_named(number, model, fused):
    (inputs, named), takers, words = CALLS[number]
    example, models = fused
    for each in models:
        if example in takers:
            with torch.no_grad():
                expected = model(*inputs, **named)
            assert (each(*inputs, **named) - expected).norm() < 1e-6 * expected.norm()
            assert torch.equal(each.module(*inputs, **named), each(*inputs, **named))
        else:
            with pytest.raises((TypeError, ValueError), match=words or "argument '[a-z]+'"):
                each(*inputs, **named)


@pytest.mark.parametrize(
    "inputs, named, kind, words",
    [
        ((), {}, TypeError, "missing argument 'x'"),
        ((X,), {"x": X}, TypeError, "argument 'x' is given twice"),
        ((X,), {"bias": 1}, TypeError, "unexpected argument 'bias': the model takes x, relu, scale, head"),
        ((X, True, 1.0, "a", (1, 2), None, 7), {}, TypeError, "arguments as in the example, 6 at most by place, got 7"),
        ((X, False), {}, ValueError, "argument 'relu' was left at its default True in the example, got False"),
        ((X,), {"mask": MASK}, ValueError, "argument 'mask' was left at its default None in the example, got a Tensor"),
        ((2.0,), {}, TypeError, "expected a tensor as input 0, got float"),
    ],
)
def test_what_is_said(model, inputs, named, kind, words):
    fused = gpukern.fuse(model, X, verify=False)
    with pytest.raises(kind, match=words):
        fused(*inputs, **named)


class ByName(nn.Module):
    """Arguments that can be given by name only, any number of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), norm()

    def forward(self, x, scale=1.0, shift=None, *, mask=None, power=1, **more):
        y = self.b(self.a(x)) * scale
        y = y if shift is None else y + shift
        y = y if mask is None else y * mask
        return {"y": y**power, **{name: y + each for name, each in more.items()}}


#: Arguments of an example by name, and other calls that the fused model must take, by place and by name.
BY_NAME = [
    ({"mask": MASK}, [((X,), {"mask": MASK + 1}), ((X, 1.0), {"mask": MASK}), ((X,), {"mask": MASK, "power": 1})]),
    ({"shift": MASK}, [((X,), {"shift": X}), ((X, 1.0, X), {}), ((X,), {"scale": 1.0, "shift": X})]),
    ({"mask": MASK, "scale": 2.0}, [((X, 2.0), {"mask": X}), ((), {"x": X, "scale": 2.0, "mask": X})]),
    ({"other": MASK, "power": 2}, [((X,), {"other": X, "power": 2})]),
]


@pytest.mark.parametrize("named, calls", BY_NAME)
def test_an_example_with_arguments_by_name(named, calls, tmp_path):
    model = lively(ByName())
    fused = gpukern.fuse(model, X, named)
    assert fused.report.verification.passed and len(fused.report.fused) == 1 and "forward" not in vars(model)
    fused.save(tmp_path / "a.pt2")
    for each in (fused, fused.module, gpukern.load(tmp_path / "a.pt2"), copy.deepcopy(fused)):
        for inputs, others in ((X,), named), *calls:
            expected, found = model(*inputs, **others), each(*inputs, **others)
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
        # The batch is free for all of them.
        given = {name: each[:1] if isinstance(each, torch.Tensor) else each for name, each in named.items()}
        assert each(X[:1], **given)["y"].shape[0] == 1


@pytest.mark.parametrize(
    "inputs, named, kind, words",
    [
        ((X,), {}, ValueError, "argument 'power' was 2 in the example, and is left at its default 1 now"),
        ((X,), {"power": 2}, TypeError, "missing argument 'other'"),
        ((X,), {"other": MASK}, ValueError, "argument 'power' was 2 in the example, and is left at its default 1 now"),
        ((X,), {"other": MASK, "power": 3}, ValueError, "argument 'power' was 2 in the example, got 3"),
        ((X,), {"other": MASK, "power": 2, "mask": MASK}, ValueError, "'mask' was left at its default None"),
        ((X,), {"other": MASK, "power": 2, "third": 1}, TypeError, "unexpected argument 'third': .*power, other"),
        ((X, 1.0, None, MASK, 2), {}, TypeError, "3 at most by place, got 5"),
        ((X,), {"other": 2.0, "power": 2}, TypeError, "expected a tensor as input 2, got float"),
        ((X,), {"other": MASK[:, :1], "power": 2}, ValueError, r"expected input 2 of shape \[batch, 4, 7, 7\]"),
    ],
)
def test_what_is_said_of_arguments_by_name(inputs, named, kind, words):
    fused = gpukern.fuse(lively(ByName()), X, kwargs={"power": 2, "other": MASK}, verify=False)
    with pytest.raises(kind, match=words):
        fused(*inputs, **named)


def test_an_example_of_arguments_that_the_model_does_not_take(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        gpukern.fuse(model, X, {"masks": MASK})
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        gpukern.fuse(model, X, {"x": MASK})
    with pytest.raises(TypeError, match="kwargs must be a dict of arguments by their names, got dtype"):
        gpukern.fuse(model, X, torch.float16)


def test_all_arguments_by_name():
    model = lively(ByName())
    fused = gpukern.fuse(model, (), {"x": X, "mask": MASK})
    assert torch.allclose(fused(X, mask=MASK)["y"], fused(x=X, mask=MASK)["y"])


def test_arguments_in_dicts_and_of_any_number():
    made, (x,) = net(lambda m, x, how: m.b(m.a(x)) * how["by"][0] if how["do"] else x, a=conv(), b=norm())
    fused = gpukern.fuse(made, (x, {"by": (2.0, 1), "do": True}), verify=False)
    assert fused(x, {"by": (2.0, 1), "do": True}).shape == x.shape
    # The original may go through them in order.
    with pytest.raises(TypeError, match="argument 1 was"):
        fused(x, {"do": True, "by": (2.0, 1)})
    with pytest.raises(ValueError, match=r"argument 1\['by'\]\[0\] was 2.0 in the example, got 2.5"):
        fused(x, {"by": (2.5, 1), "do": True})
    with pytest.raises(TypeError, match=r"argument 1 was \{'by': \(\*, \*\), 'do': \*\}, got \{'do': \*\}"):
        fused(x, {"do": True})
    with pytest.raises(TypeError, match="2 at most by place, got 3"):
        fused(x, {"by": (2.0, 1), "do": True}, x)
    with pytest.raises(TypeError, match="unexpected argument 'how'"):
        fused(x, how={"by": (2.0, 1), "do": True})


def test_text_of_what_is_the_same_only():
    class Colour(enum.Enum):
        RED = 1

    same = [1, 1.0, True, "1", None, float("nan"), [1], (1,), {"a": 1}, {"a": 1.0}, torch.float16, Colour.RED]
    assert len({text(each) for each in same}) == len(same) and None not in map(text, same)
    assert [text(each) for each in (X, [X], {"a": object()}, torch.nn.ReLU(), len)] == [None] * 5


def test_a_signature_that_python_cannot_see():
    model = nn.Identity()
    model.forward = max
    assert Signature.of(model).more
