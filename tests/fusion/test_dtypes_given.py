"""What a fused model does under autocast, and with tensors of another dtype than the example's."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import gpukern
from tests.fusion.networks import conv, net, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


@pytest.fixture(scope="module")
def case():
    """Layers that fuse, and a product that does not."""
    return net(lambda m, x: m.c(m.b(m.a(x)).mean((2, 3))) @ m.c.weight, a=conv(), b=norm(), c=nn.Linear(4, 4))


def test_autocast_has_no_effect_and_that_is_said(case, tmp_path):
    model, (x,) = case
    fused = gpukern.fuse(model, x)
    fused.save(tmp_path / "a.pt2")
    expected = fused(x)
    models = (
        fused,
        gpukern.load(tmp_path / "a.pt2"),
        pickle.loads(pickle.dumps(fused.module)),
        copy.deepcopy(fused.module),
    )
    for each in models:
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="a fused model ignores autocast"):
            found = each(x)
        assert found.dtype is torch.float32 and torch.equal(found, expected)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        fused(x)  # it was said


def test_fusing_and_saving_under_autocast(case, tmp_path):
    model, (x,) = case
    with torch.autocast("cpu", torch.bfloat16):
        fused = gpukern.fuse(model, x)
        fused.save(tmp_path / "a.pt2")
    assert any("Autocast was on" in note for note in fused.report.notes)
    assert fused.report.verification.bound < 1e-5 and fused.report.fused[0].dtype == "float32"
    assert torch.equal(gpukern.load(tmp_path / "a.pt2")(x), fused(x))
    with torch.no_grad():
        assert (fused(x) - model(x)).norm() < 1e-6 * model(x).norm()


def test_floating_point_inputs_are_cast_and_unexpected_ones_are_told_of(case):
    model, (x,) = case
    half = gpukern.fuse(model, x, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the example's dtype, and that it was fused for
        assert half(x).dtype is half(x.half()).dtype is torch.float16
    with pytest.warns(UserWarning, match=r"input 0 is torch.float64, and is cast to torch.float16"):
        assert torch.equal(half(x.double()), half(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_inputs_must_be_as_in_the_example(case, dtype):
    model, (x,) = case
    fused = gpukern.fuse(model, x, verify=False)
    with pytest.raises(TypeError, match=rf"expected input 0 of torch.float32, got {dtype}"):
        fused(x.to(dtype))


def test_indices_and_masks_keep_their_dtype():
    made, (x,) = net(lambda m, x, rows, mask: m.b(m.a(x))[rows] * mask, a=conv(), b=norm())
    rows, mask = torch.tensor([1, 0]), torch.ones(7, dtype=torch.bool)
    fused = gpukern.fuse(made, (x, rows, mask), dynamic_batch=False)
    assert fused(x, rows, mask).shape == x.shape
    for wrong in ((x, rows.int(), mask), (x, rows.bool(), mask), (x, rows, mask.float()), (x, rows.float(), mask)):
        with pytest.raises(TypeError, match=r"expected input [12] of torch.(int64|bool), got torch"):
            fused(*wrong)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float16", "knows 'int8', 'fp8', .*, got 'float16'$"),
        (torch.int16, "one of torch.float32, .*, got torch.int16$"),
    ],
)
def test_fuse_takes_the_dtypes_that_it_names_and_names_of_8_bits(dtype, words):
    with pytest.raises(ValueError, match=words):
        gpukern.fuse(torch.nn.Linear(2, 2).eval(), (torch.randn(1, 2),), dtype=dtype)
