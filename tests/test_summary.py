"""``gpukern.summary``: the lecture's tables and formulas to the letter, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpukern.nn
from gpukern.summary import summary
from models.lenet import LeNet5
from tests.resnet import resnet18

pytestmark = pytest.mark.usefixtures("reference_mode")

LECTURE = [
    ("Input", (1, 28, 28), ()),
    ("Conv (C_out=20, K=5, P=2, S=1)", (20, 28, 28), (20, 1, 5, 5)),
    ("ReLU", (20, 28, 28), ()),
    ("MaxPool(K=2, S=2)", (20, 14, 14), ()),
    ("Conv (C_out=50, K=5, P=2, S=1)", (50, 14, 14), (50, 20, 5, 5)),
    ("ReLU", (50, 14, 14), ()),
    ("MaxPool(K=2, S=2)", (50, 7, 7), ()),
    ("Flatten", (2450,), ()),
    ("Linear (2450 -> 500)", (500,), (2450, 500)),
    ("ReLU", (500,), ()),
    ("Linear (500 -> 10)", (10,), (500, 10)),
]


def test_lenet_is_the_lectures_table():
    result = summary(LeNet5(), (1, 28, 28))
    assert [(row.layer, row.output_size, row.weight_size) for row in result.rows] == LECTURE
    counts = [(row.parameters, row.multiply_adds) for row in result.rows if row.parameters]
    assert counts == [(520, 392_000), (25_050, 4_900_000), (1_225_500, 1_225_000), (5_010, 5_000)]
    assert (result.parameters, result.multiply_adds) == (1_256_080, 6_522_000)
    seen = [row.receptive_field for row in result.rows]
    assert seen == [(1, 1), *[(5, 5)] * 2, (6, 6), *[(14, 14)] * 2, *[(16, 16)] * 2, "all", "all", "all"]
    assert result.notes == ()


def test_lenet_as_text():
    text = str(summary(LeNet5(), (1, 28, 28)))
    lines = [line.split() for line in text.splitlines()]
    expected = "Conv (C_out=50, K=5, P=2, S=1) 50 × 14 × 14 50 × 20 × 5 × 5 25,050 4,900,000 14 × 14"
    assert expected.split() in lines
    assert ["Total", "1,256,080", "6,522,000"] in lines
    assert "\x1b" not in text


def test_quiz():
    result = summary(nn.Conv2d(3, 10, kernel_size=5, stride=1, padding=2), (3, 32, 32))
    assert result.rows[-1].output_size == (10, 32, 32)
    assert result.parameters == 760


@pytest.mark.parametrize(("stride", "size", "fits"), [(1, 5, True), (2, 3, True), (3, 2, False)])
def test_7_by_7_with_a_3_by_3_filter(stride, size, fits):
    result = summary(nn.Conv2d(1, 1, kernel_size=3, stride=stride), (1, 7, 7))
    assert result.rows[-1].output_size == (1, size, size)
    if fits:
        assert result.notes == ()
    else:
        (note,) = result.notes
        assert note.startswith("Conv (C_out=1, K=3, P=0, S=3) does not fit: (7 − 3)/3 + 1 = 2.33 ✗")
        assert note.endswith("torch ignores the last row and column of the input")
        assert "(7 − 3)/3 + 1 = 2.33 ✗" in str(result)


@pytest.mark.parametrize(
    ("layer", "size", "note"),
    [
        (nn.Conv2d(1, 1, 3, stride=2, padding=1), (8, 9), "(8 + 2 − 3)/2 + 1 = 4.5 ✗, … row of the padding"),
        (nn.Conv2d(1, 1, 1, stride=4), (7, 5), "(7 − 1)/4 + 1 = 2.5 ✗, … 2 rows of the input"),
        (nn.Conv2d(1, 1, 3, stride=2, dilation=2), (7, 8), "(8 − 5)/2 + 1 = 2.5 ✗, … column of the input"),
        (nn.Conv2d(1, 1, 2, stride=4, padding=1), (5, 4), "(5 + 2 − 2)/4 + 1 = 2.25 ✗, … row of the padding"),
        (nn.Conv2d(1, 1, 2, stride=4, padding=1), (7, 4), "(7 + 2 − 2)/4 + 1 = 2.75 ✗, … 3 rows of the padded input"),
        (nn.AvgPool2d(2), (5, 4), "(5 − 2)/2 + 1 = 2.5 ✗, … row of the input"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_exactly(layer, size, note):
    """Rows and columns that do not fit in different ways get a note each."""
    expected = note.replace("…", "torch ignores the last")
    assert any(found.endswith(f"does not fit: {expected}") for found in summary(layer, (1, *size)).notes)


def test_what_is_said_to_be_ignored_is_ignored():
    layer = nn.Conv2d(1, 1, 3, stride=3)
    image = torch.randn(1, 1, 7, 7)
    changed = image.clone()
    changed[..., 6, :] = changed[..., :, 6] = 9
    assert torch.equal(layer(image), layer(changed))


def test_ceil_mode_ignores_nothing():
    result = summary(nn.MaxPool2d(2, ceil_mode=True), (1, 5, 5))
    assert (result.rows[-1].output_size, result.notes) == ((1, 3, 3), ())


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("kernel", [3, 5])
def test_receptive_field_of_a_stack(layers, kernel):
    stack = nn.Sequential(*[nn.Conv2d(1, 1, kernel) for _ in range(layers)])
    size = 1 + layers * (kernel - 1)
    assert summary(stack, (1, 40, 40)).rows[-1].receptive_field == (size, size)


def measured_receptive_field(model, size):
    """Rows and columns of the input on which the middle element of the output depends."""
    image = torch.rand(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    output = model(image)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    touched = image.grad[0, 0].nonzero()
    return tuple((touched.max(0).values - touched.min(0).values + 1).tolist())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 1, (3, 5), stride=2), nn.Conv2d(1, 1, 3, dilation=2), nn.AvgPool2d(2)),
        nn.Sequential(nn.AvgPool2d(3, stride=2), nn.ReLU(), nn.Conv2d(1, 1, 5, stride=(1, 2)), nn.Conv2d(1, 1, 3)),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.AdaptiveAvgPool2d(20), nn.Conv2d(1, 1, 2)),
    ],
)
def test_receptive_field_is_what_a_gradient_touches(model):
    model = model.double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 1)  # so that nothing cancels
    assert summary(model, (1, 60, 60)).rows[-1].receptive_field == measured_receptive_field(model, 60)


class Residual(nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.narrow, self.wide, self.after = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2), nn.Identity()
        self.combine = combine

    def forward(self, x):
        return self.after(self.combine(self.wide(x), self.narrow(x)))


def iadd(a, b):
    a += b
    return a


@pytest.mark.parametrize(
    "combine",
    [torch.add, iadd, lambda a, b: torch.cat([b, a], 1), lambda a, b: torch.relu(b * torch.rand(4, 1, 1)) + a],
)
def test_branches_report_the_longest_path(combine):
    assert summary(Residual(combine), (4, 9, 9)).rows[-1].receptive_field == (5, 5)


@pytest.mark.parametrize("combine", [lambda a, b: a.transpose(2, 3) + b, lambda a, b: a.reshape(1, 4, 3, 27)])
def test_what_cannot_be_followed_is_left_open(combine):
    result = summary(Residual(combine), (4, 9, 9))
    assert result.rows[-1].receptive_field is None
    assert str(result).splitlines()[-3].split()[-1] == "–"


@pytest.mark.parametrize(
    ("layer", "seen"),
    [
        (nn.AdaptiveAvgPool2d(1), "all"),
        (nn.AdaptiveMaxPool2d(7), None),
        (nn.GroupNorm(2, 4), "all"),
        (nn.InstanceNorm2d(4), "all"),
        (nn.InstanceNorm2d(4, track_running_stats=True).eval(), (3, 3)),
        (gpukern.nn.GroupNorm(2, 4), "all"),
        (gpukern.nn.InstanceNorm2d(4), "all"),
        (nn.BatchNorm2d(4), (3, 3)),
        (nn.LayerNorm(10), None),
        (gpukern.nn.LayerNorm([10, 10]), "all"),
        (gpukern.nn.LayerNorm2d(4), (3, 3)),
        (gpukern.nn.RMSNorm(10), None),
        (nn.Dropout(), (3, 3)),
        (nn.Flatten(), (3, 3)),
        (nn.ConvTranspose2d(4, 4, 2), None),
    ],
)
def test_what_other_layers_see(layer, seen):
    assert summary(nn.Sequential(nn.Conv2d(4, 4, 3), layer), (4, 12, 12)).rows[-1].receptive_field == seen


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


@pytest.mark.parametrize("library", [nn, gpukern.nn], ids=["torch", "gpukern"])
def test_channels_may_be_normalized_where_they_are_last(library):
    """As in ConvNeXt: each position by itself, between two permutations. Over a row of positions it is left open."""
    last, first = Permute(0, 2, 3, 1), Permute(0, 3, 1, 2)
    inside = library.LayerNorm(4), library.Linear(4, 8), nn.GELU(), library.RMSNorm(8), library.Linear(8, 4)
    whole = nn.Sequential(nn.Conv2d(4, 4, 3), last, *inside, first, nn.Conv2d(4, 4, 3))
    assert summary(whole, (4, 12, 12)).rows[-1].receptive_field == (5, 5)
    for norm, seen in ((library.LayerNorm([10, 10, 4]), "all"), (library.LayerNorm([10, 4]), None)):
        assert (
            summary(nn.Sequential(nn.Conv2d(4, 4, 3), last, norm, first), (4, 12, 12)).rows[-2].receptive_field == seen
        )


def test_resnet18():
    result = summary(resnet18(), (3, 224, 224))
    assert (result.parameters, result.multiply_adds) == (11_689_512, 1_814_073_344)
    last_convolution = [row for row in result.rows if row.layer.startswith("Conv")][-1]
    assert last_convolution.receptive_field == (435, 435)  # as published
    assert result.rows[-1].receptive_field == "all"


def test_groups_and_dilation():
    row = summary(nn.Conv2d(8, 16, (3, 1), groups=4, dilation=2, bias=False), (8, 10, 10)).rows[-1]
    assert row.layer == "Conv (C_out=16, K=3×1, P=0, S=1, D=2, G=4)"
    assert row.weight_size == (16, 2, 3, 1)
    assert (row.parameters, row.multiply_adds) == (96, 6 * 10 * 96)


def test_shared_parameters_count_once():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    result = summary(nn.Sequential(layer, layer), (2, 5, 5))
    assert [row.parameters for row in result.rows] == [0, 38, 0]
    assert result.parameters == 38
    assert result.multiply_adds == 2 * 25 * 36


def test_parameters_outside_of_layers_are_noted():
    model = nn.Sequential(nn.Linear(3, 2))
    model.scale = nn.Parameter(torch.ones(5))
    result = summary(model, (3,))
    assert result.parameters == 8 + 5
    assert result.notes == ("5 parameters belong to no layer of this table.",)


@pytest.mark.parametrize("size", [(1, 28, 28), (1, 1, 28, 28), (6, 1, 28, 28)])
def test_batch_makes_no_difference(size):
    assert summary(LeNet5(), size) == summary(LeNet5(), (1, 28, 28))


@pytest.mark.parametrize("size", [(), (1, 2, 3, 4, 5)])
def test_other_ranks_are_refused(size):
    with pytest.raises(ValueError, match="C, H, W"):
        summary(LeNet5(), size)


def test_dtype_follows_the_model():
    assert summary(LeNet5().double(), (1, 28, 28)).parameters == 1_256_080


@pytest.mark.parametrize("size", [(3, 8, 8), (2, 8, 8)])
def test_model_is_left_as_it_was(size):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.Conv2d(4, 1, 3)))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if size[0] == 3:
        summary(model, size)
    else:
        with pytest.raises(RuntimeError):
            summary(model, size)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
