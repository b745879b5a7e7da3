"""``gpukern.summary`` of signals, images, volumes, tokens, several inputs, and of what other tools made of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gpukern
from gpukern.summary import summary
from tests.test_summary import Residual
from tests.test_summary_products import Called


@pytest.mark.parametrize(
    ("layers", "size", "output"),
    [
        ([nn.Conv1d(4, 8, 3)], (4, 100), (8, 98)),
        ([nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)], (4, 100), (8, 98)),
        ([nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)], (5, 4, 100), (8, 98)),
        ([nn.ConvTranspose1d(4, 8, 3)], (4, 100), (8, 102)),
        ([nn.MaxPool1d(2)], (4, 100), (4, 50)),
        ([nn.InstanceNorm1d(4), nn.AdaptiveAvgPool1d(1)], (4, 100), (4, 1)),
        ([nn.Upsample(scale_factor=2), nn.Conv2d(4, 8, 3)], (4, 5, 6), (8, 8, 10)),
        ([nn.Conv3d(1, 2, 3)], (1, 8, 8, 8), (2, 6, 6, 6)),
        ([nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.MaxPool3d(2)], (1, 8, 8, 8), (2, 3, 3, 3)),
        ([nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()], (4, 1, 8, 8, 8), (2,)),
        ([nn.BatchNorm1d(6), nn.Linear(6, 3)], (6,), (3,)),
        ([nn.BatchNorm1d(6), nn.Linear(6, 3)], (2, 6), (3,)),
        ([nn.Embedding(10, 6), nn.Linear(6, 3)], (7,), (7, 3)),
        ([nn.Embedding(10, 6), nn.Linear(6, 3)], (2, 7), (7, 3)),
        ([nn.EmbeddingBag(10, 6)], (2, 7), (6,)),
    ],
    ids=str,
)
def test_inputs_of_any_rank(layers, size, output):
    row = summary(nn.Sequential(*layers), size).rows[-1]
    assert row.output_size == output


def test_windows_of_any_rank():
    told = summary(nn.Sequential(nn.Conv1d(4, 8, 3, stride=2), nn.Conv1d(8, 8, 3)), (4, 100))
    assert told.rows[-1].receptive_field == (7,) and told.multiply_adds == 49 * 8 * 12 + 47 * 8 * 24
    (note,) = told.notes
    assert note.endswith("does not fit: (100 − 3)/2 + 1 = 49.5 ✗, torch ignores the last position of the input")
    told = summary(nn.Sequential(nn.Conv3d(1, 2, 3), nn.AvgPool3d(2)), (1, 8, 8, 8))
    assert told.rows[-1].receptive_field == (4, 4, 4) and told.multiply_adds == 216 * 2 * 27


@pytest.mark.parametrize("size", [(), (1, 2, 3, 4, 5), (1,) * 6])
def test_other_ranks_are_refused_in_words(size):
    with pytest.raises(ValueError, match=r"expected \[C, H, W\] or \[features\].* for another layout pass a tensor"):
        summary(nn.Conv2d(1, 1, 1), size)
    with pytest.raises(ValueError, match=r"expected \[C, L\]"):
        summary(nn.Conv1d(1, 1, 1), (*size, 1) if size else size)


@pytest.mark.parametrize("size", ["3,8,8", (3, 8.0, 8), [(3, 8), torch.zeros(2)], None, 8])
def test_what_is_no_size(size):
    with pytest.raises(TypeError, match="expected sizes, a list of sizes, or tensors"):
        summary(nn.Conv2d(3, 1, 1), size)


def test_several_inputs_and_tensors():
    model = Called(lambda x, y, f, g: f(x).mean((2, 3)) + g(y), f=nn.Conv2d(3, 4, 3), g=nn.Linear(5, 4))
    told = summary(model, [(3, 8, 8), (5,)])
    assert [row.output_size for row in told.rows] == [(3, 8, 8), (5,), (4, 6, 6), (4,)]
    assert told == summary(model, [(2, 3, 8, 8), (2, 5)])
    assert told == summary(model, (torch.zeros(2, 3, 8, 8), torch.zeros(2, 5)))
    clip = Called(lambda x, f: f(x.flatten(0, 1)), f=nn.Conv2d(3, 4, 3))
    assert summary(clip, torch.zeros(2, 6, 3, 8, 8)).multiply_adds == 6 * 36 * 4 * 27
    ids = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    assert summary(ids, torch.zeros(2, 7, dtype=torch.int32)).multiply_adds == 7 * 18


def test_arguments_with_tensors_inside():
    conv, x, y = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 6, 6)
    plain = summary(Called(lambda x, y, f: (f(x), f(y)), f=conv), [x, y])
    named = Called(lambda given, f: {"x": f(given["x"]), "y": f(given["y"])}, f=conv)
    listed = Called(lambda given, f: [f(each) for each in given], f=conv)
    for told in (
        summary(named, {"x": x, "y": y}),
        summary(named, [{"x": x, "y": y, "scale": 2.0}]),
        summary(listed, [[x, y]]),
        summary(listed, ((x, y),)),
    ):
        assert [row.output_size for row in told.rows] == [(3, 8, 8), (3, 6, 6), (4, 6, 6), (4, 4, 4)]
        assert told.multiply_adds == plain.multiply_adds == (36 + 16) * 4 * 27
    assert summary(conv, np.array([3, 8, 8]).tolist()) == summary(conv, tuple(np.array([3, 8, 8])))


def test_no_values_are_in_the_message():
    with pytest.raises(TypeError, match=r"got \[\(3, 8\), 'tensor\[2\]'\]$"):
        summary(nn.Conv2d(3, 1, 1), [(3, 8), torch.zeros(2)])


def test_an_empty_batch_is_described_as_one_sample():
    model = nn.Conv2d(3, 4, 3)
    assert summary(model, (0, 3, 8, 8)) == summary(model, (3, 8, 8))
    assert summary(model, torch.zeros(0, 3, 8, 8)).rows[-1].output_size == (4, 6, 6)


def test_dtype_and_device_are_the_models():
    for model in (nn.Conv2d(1, 1, 1).double(), nn.BatchNorm2d(1, affine=False).double(), nn.Conv2d(1, 1, 1).bfloat16()):
        assert summary(model, (1, 2, 2)).rows[-1].output_size == (1, 2, 2)
    with torch.device("meta"):
        large = nn.Conv2d(3, 4, 3)
    assert summary(large, (3, 1000, 1000)).multiply_adds == 998 * 998 * 108


# ---- what other tools made of it -----------------------------------------------------------------------------------


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


def test_compiled_models_show_what_was_compiled():
    model = small()
    right = summary(model, (3, 8, 8))
    assert summary(torch.compile(model, backend="eager"), (3, 8, 8)) == right
    inside = nn.Sequential(torch.compile(model, backend="eager"))
    assert summary(inside, (3, 8, 8)).multiply_adds == right.multiply_adds
    in_place = small()
    in_place.compile(backend="eager")
    assert summary(in_place, (3, 8, 8)) == right


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_and_counted_inside_of_others():
    scripted, traced = torch.jit.script(small()), torch.jit.trace(small(), torch.zeros(1, 3, 8, 8))
    for model in (scripted, traced):
        with pytest.raises(TypeError, match=r"summary\(\) .* TorchScript has compiled this one: pass the original"):
            summary(model, (3, 8, 8))
        told = summary(nn.Sequential(model), (3, 8, 8))
        assert told.multiply_adds == 7776 and [row.layer for row in told.rows] == ["Input", "(functional)"]


def test_what_is_no_module():
    for model, words in ((lambda x: x, "got function"), (nn.ReLU, "got type"), ("resnet18", "got str")):
        with pytest.raises(TypeError, match=rf"summary\(\) takes a torch\.nn\.Module, and {words}"):
            summary(model, (3, 8, 8))
    exported = torch.export.export(small(), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(TypeError, match=r"got ExportedProgram: pass its \.module\(\)"):
        summary(exported, (3, 8, 8))


# ---- what an element sees ------------------------------------------------------------------------------------------


def after_conv(function, **layers):
    """A 3 × 3 convolution, ``function``, and what then can be seen."""
    conv, end = nn.Conv2d(4, 4, 3), nn.Identity()
    return Called(lambda x, conv, end, **rest: end(function(conv(x), **rest)), conv=conv, end=end, **layers)


def seen(model, size=(4, 12, 12)):
    return summary(model, size).rows[-1].receptive_field


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm([4, 10, 10]), nn.LayerNorm([10, 10]), nn.RMSNorm([4, 10, 10]), nn.GroupNorm(1, 4),
        nn.InstanceNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), gpukern.nn.LayerNorm([4, 10, 10]),
    ],
    ids=str,
)  # fmt: skip
def test_norms_and_pools_over_positions_see_everything(layer):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), layer, nn.ReLU())
    assert seen(model) == "all"
    assert seen(nn.Sequential(model, nn.ConvTranspose2d(4, 4, 2), nn.Upsample(scale_factor=2))) == "all"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F(x, [4, 10, 10]),
        lambda x: torch.nn.functional.group_norm(x, 2),
        lambda x: torch.nn.functional.instance_norm(x),
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(dim=(-1, -2), keepdim=True),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x * x.mean((2, 3)).view(-1, 4, 1, 1) + x,
        lambda x: torch.nn.functional.normalize(x, dim=(2, 3)),
        lambda x: (x - x.mean()) / x.std(),
        lambda x: torch.var_mean(x, (1, 2, 3), keepdim=True)[0] * x,
    ],
)
def test_functions_over_positions_see_everything(function):
    assert seen(after_conv(function)) == "all"


F = torch.nn.functional.layer_norm


def test_softmax_over_positions():
    signal = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Softmax(-1))
    assert seen(signal, (4, 12)) == "all"
    assert seen(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Softmax(1)), (4, 12)) == (3,)
    assert seen(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Softmax2d())) == (3, 3)
    assert seen(gpukern.convert(signal), (4, 12)) == "all"
    assert seen(gpukern.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.LogSoftmax(1)))) == (3, 3)
    assert seen(after_conv(lambda x: x.softmax(-1))) is None  # a row
    assert seen(after_conv(lambda x: x.flatten(2).softmax(-1).view_as(x) * x)) is None


def test_an_excitation_gate():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid())
    assert seen(after_conv(lambda x, gate: x * gate(x), gate=gate)) == "all"


@pytest.mark.parametrize(
    ("function", "field"),
    [
        (lambda x: x.mean(1, keepdim=True), (3, 3)),
        (lambda x: torch.nn.functional.normalize(x), (3, 3)),
        (lambda x: torch.nn.functional.local_response_norm(x, 3), (3, 3)),
        (lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1), (5, 5)),
        (lambda x: torch.nn.functional.max_pool2d(x, 2), (4, 4)),
        (lambda x: torch.nn.functional.conv2d(x, torch.ones(4, 4, 3, 1), None, 1, 0, 2), (7, 3)),
        (lambda x: torch.zeros_like(x.mean((2, 3), keepdim=True)) + x, (3, 3)),
        (lambda x: x[:, :2], None),
        (lambda x: x[:, :, 0, 0], None),
        (lambda x: x.mean(3, keepdim=True), None),
    ],
)
def test_functions_that_see_less(function, field):
    assert seen(after_conv(function)) == field


def test_a_linear_layer_sees_what_it_is_given():
    assert seen(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(400, 2))) == "all"
    assert seen(nn.Sequential(nn.Linear(4, 2)), (4,)) == "all"
    assert seen(after_conv(lambda x, f: f(x.permute(0, 2, 3, 1).reshape(-1, 4)), f=nn.Linear(4, 2))) is None
    assert seen(after_conv(lambda x, f: f(x[:, :, 0, 0]), f=nn.Linear(4, 2))) is None
    assert seen(after_conv(lambda x, f: f(x.permute(0, 2, 3, 1).flatten(1)), f=nn.Linear(400, 2))) == "all"


def test_branches_of_which_one_sees_everything():
    assert seen(Residual(lambda a, b: a * b.mean((2, 3), keepdim=True)), (4, 9, 9)) == "all"
