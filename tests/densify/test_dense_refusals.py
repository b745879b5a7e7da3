"""What has no dense form is refused by name, with the reason, when the network is made."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpukern
from gpukern.densify import DenseError, dense

pytestmark = pytest.mark.usefixtures("reference_mode")


class Calling(nn.Module):
    """``function(layers, x)`` as a model."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.function(self.layers, x)


class Named(nn.Module):
    """A convolution under a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Conv2d(1, 2, 5))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


def hooked(name: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Sequential(nn.ReLU()))
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


def excited(layers, x):
    y = layers[0](x)
    return layers[1](y * torch.sigmoid(layers[2](F.adaptive_avg_pool2d(y, 1))))


def changed_in_place(layers, x):
    y = layers[0](x)
    rows = y.flatten(1)
    return layers[1](F.relu_(rows)) + layers[1](y.flatten(1))


def changed_by_a_layer(layers, x):
    y = layers[0](x)
    layers[1](y[:, :, 1:-1])
    return layers[2](y)


def changed_behind(same):
    """Reads a value after the change of what ``same`` makes of it, the same tensor in evaluation mode."""

    def forward(layers, x):
        y = layers[0](x)
        same(layers, y).add_(1)
        return layers[1](y)

    return Calling(forward, C(1, 2, 3), C(2, 2, 3), nn.Dropout())


@torch.fx.wrap
def normalize(x):
    """Not torch's."""
    return 2 * x


def C(inputs: int, outputs: int, kernel, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


BORDER = "sees the border of the patch"
REFUSED = {
    "padding": (nn.Sequential(C(1, 2, 3, padding=1), C(2, 2, 5)), rf"^0: padding=\(1, 1\): it {BORDER}"),
    "same padding": (nn.Sequential(C(1, 2, 3, padding="same"), C(2, 2, 5)), f"^0: padding='same': it {BORDER}"),
    "reflected padding": (nn.Sequential(C(1, 2, 3, padding=1, padding_mode="reflect"), C(2, 2, 5)), f"^0: .*{BORDER}"),
    "a padding layer": (nn.Sequential(nn.ReflectionPad2d(1), C(1, 2, 7)), r"^0: it pads by \(1, 1, 1, 1\)"),
    "F.pad": (Calling(lambda f, x: f[0](F.pad(x, (1, 0))), C(1, 2, (5, 6))), f"^pad: it pads .*{BORDER}"),
    "a padded pool": (nn.Sequential(C(1, 2, 3), nn.MaxPool2d(3, 2, 1), C(2, 2, 2)), f"^1: padding=1: it {BORDER}"),
    "a padded average": (Calling(lambda f, x: f[0](F.avg_pool2d(x, 3, 2, 1)), C(1, 2, 3)), f"^avg_pool2d: .*{BORDER}"),
    "ceil_mode": (nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), C(1, 2, 3)), "^0: with ceil_mode .* hangs over"),
    "unequal windows": (nn.Sequential(nn.AdaptiveAvgPool2d(3), C(1, 2, 3)), "^0: it pools 5 positions to 3, .* alike"),
    "indices": (Calling(lambda f, x: F.max_pool2d(x, 5, return_indices=True)[0]), "its indices are places"),
    "squeeze and excitation": (
        Calling(excited, C(1, 2, 3), C(2, 2, 3), C(2, 2, 1)),
        r"^mul: it combines \[N, 2, 3, 3\] and \[N, 2, 1, 1\]: .* squeeze-and-excitation",
    ),
    "a linear layer of another patch": (
        nn.Sequential(C(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)),
        r"^2: it takes 32 features, and this patch size gives 18 \(2 × 3 × 3\)",
    ),
    "a view of another patch": (
        Calling(lambda f, x: f[1](f[0](x).view(-1, 32)), C(1, 2, 3), nn.Linear(32, 2)),
        r"^view: it reshapes \[N, 2, 3, 3\] to \[-1, 32\]: this patch size gives 18 features",
    ),
    "a reshape that mixes": (
        Calling(lambda f, x: f[1](f[0](x).reshape(len(x), 3, 6).flatten(1)), C(1, 2, 3), nn.Linear(18, 2)),
        r"^reshape: it reshapes \[N, 2, 3, 3\] to \[N, 3, 6\], which mixes channels and positions",
    ),
    "a reshape of the batch": (
        Calling(lambda f, x: f[0](x.reshape(len(x) * 5, 5)), nn.Linear(5, 2)),
        r"^reshape: it reshapes \[N, 1, 5, 5\] to \[5045, 5\]",
    ),
    "a permutation": (Calling(lambda f, x: f[0](x.transpose(2, 3)), C(1, 2, 5)), "^transpose: it exchanges"),
    "a transposed convolution": (nn.Sequential(nn.ConvTranspose2d(1, 2, 3), C(2, 2, 7)), "^0: a transposed"),
    "a recurrent layer": (Calling(lambda f, x: f[0](x.view(len(x), 1, 25))[0], nn.LSTM(25, 3)), "^layers.0: a rec"),
    "attention": (
        Calling(lambda f, x: f[0](x.flatten(1), x.flatten(1), x.flatten(1))[0], nn.MultiheadAttention(25, 1)),
        "^layers.0: MultiheadAttention with 3 arguments",
    ),
    "instance norm": (nn.Sequential(nn.InstanceNorm2d(1), C(1, 2, 5)), "^0: its statistics are of the whole patch"),
    "group norm": (nn.Sequential(nn.GroupNorm(1, 1), C(1, 2, 5)), "^0: its statistics are of the whole patch"),
    "layer norm": (nn.Sequential(nn.LayerNorm([1, 5, 5]), C(1, 2, 5)), "^0: it norms over positions of .* each patch"),
    "a norm of flattened positions": (
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(25), nn.Linear(25, 2)),
        r"^1: it norms \[N, 25\]: each position of the patch by statistics of its own",
    ),
    "functional group norm": (Calling(lambda f, x: f[0](F.group_norm(x, 1)), C(1, 2, 5)), "^group_norm: its"),
    "softmax over positions": (nn.Sequential(nn.Softmax(2), C(1, 2, 5)), "^0: softmax along dimension 2 .* channels"),
    "linear along columns": (nn.Sequential(nn.Linear(5, 3), C(1, 2, (5, 3))), "^0: it looks along the columns"),
    "upsampling": (nn.Sequential(nn.Upsample(scale_factor=2), C(1, 2, 10)), "^0: it changes the resolution"),
    "interpolation": (Calling(lambda f, x: f[0](F.interpolate(x, scale_factor=2)), C(1, 2, 10)), "^interpolate: it ch"),
    "control flow": (
        Calling(lambda f, x: f[0](x) if f[0](x).flatten(1) else x, C(1, 2, 5)),
        "^the model cannot be traced: symbolically traced variables cannot be used as inputs to control flow",
    ),
    "a comparison": (Calling(lambda f, x: f[0](x) if f[0](x) > 0 else x, C(1, 2, 5)), "^gt: .* depend on values"),
    "a function nobody knows": (Calling(lambda f, x: f[0](x).argmax(1), C(1, 2, 5)), "^argmax: .* no dense form"),
    "a layer nobody knows": (nn.Sequential(nn.Fold(2, 2)), "^0: there is no dense form of it"),
    "a map": (nn.Sequential(C(1, 2, 3)), r"^the model gives \[N, 2, 3, 3\] for a patch of 5 × 5, and not \[N, K\]"),
    "a tuple": (Calling(lambda f, x: (f[0](x), x), C(1, 2, 5)), r"^the model returns a tuple, and not one tensor"),
    "two inputs": (TwoInputs(), "^the model cannot be traced: .*missing 1 required positional argument: 'y'"),
    "weights of the forward": (
        Calling(lambda f, x: F.conv2d(x, f[0].weight * 2), C(1, 2, 5)),
        "^conv2d: its weight is computed in forward: torch.nn.utils.parametrize",
    ),
    "a patch that is too small": (nn.Sequential(C(1, 2, 7)), r"^0: its window of 7 is larger than its input"),
    "other channels": (nn.Sequential(C(1, 2, 3), C(3, 2, 3)), r"^1: it takes 3 channels, and gets \[N, 2, 3, 3\]"),
    "hooks": (hooked("0"), "^0: it has hooks"),
    "hooks of a container": (hooked("1"), "^1: it has hooks"),
    "hooks of the model": (hooked(""), "^the model: it has hooks"),
    "values at two strides": (
        Calling(lambda f, x: f[0](F.max_pool2d(x, 2) + x[:, :, :2, :2]), C(1, 2, 2)),
        "^add: it combines values at strides of 2 and 1 pixels",
    ),
    "numbers for each position": (
        Calling(lambda f, x: f[0](x + torch.ones(5, 5)), C(1, 2, 5)),
        r"^add: it combines \[N, 1, 5, 5\] with a constant \[5, 5\], one for each position",
    ),
    "a part of the batch": (Calling(lambda f, x: f[0](x[1:]), C(1, 2, 5)), "^getitem: .* of the batch"),
    "a view changed in place": (
        Calling(changed_in_place, C(1, 2, 3), nn.Linear(18, 2)),
        "^flatten: it reads what a function has changed in place through another view",
    ),
    "a view changed in place by a layer": (
        Calling(changed_by_a_layer, C(1, 2, 3), nn.ReLU(inplace=True), C(2, 2, 3)),
        "^layers.2: it reads what a function has changed in place",
    ),
    "a dropout's input": (changed_behind(lambda f, y: f[2](y)), "^layers.1: it reads what a function has changed"),
    "a functional dropout's input": (changed_behind(lambda f, y: F.dropout(y, 0.5, False)), "^layers.1: it reads"),
    "a conversion's input": (changed_behind(lambda f, y: y.float()), "^layers.1: it reads what a function has changed"),
    "a new dimension before the channels": (
        Calling(lambda f, x: f[0](x).flatten(1)[:, None].softmax(1).flatten(1), C(1, 3, 5)),
        r"^getitem: it takes \(slice\(None, None, None\), None\) of \[N, 3\]",
    ),
    "a new dimension before the batch": (Calling(lambda f, x: f[0](x).flatten(1)[None], C(1, 3, 5)), "^getitem: it ta"),
    "an adaptive pool that repeats": (
        nn.Sequential(C(1, 2, 5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)),
        "^1: it pools 1 positions to 2",
    ),
    "a softmax of no dimension": (
        Calling(lambda f, x: f[0](F.softmax(x.flatten(2)).mean(2)), nn.Linear(1, 2)),
        r"^softmax: softmax of \[N, 1, 25\] along no dimension in particular",
    ),
    "a batch norm without statistics": (
        nn.Sequential(C(1, 2, 5), nn.BatchNorm2d(2, track_running_stats=False)),
        "^1: it has no running statistics",
    ),
    "dropout of sequences": (
        Calling(lambda f, x: f[1](f[0](x.flatten(2)).mean(2)), nn.Dropout1d(), nn.Linear(1, 2)),
        "^layers.0: it drops channels of one dimension",
    ),
    "functional dropout of sequences": (
        Calling(lambda f, x: f[0](F.dropout1d(x.flatten(2), training=False).mean(2)), nn.Linear(1, 2)),
        "^dropout1d: it drops channels of one dimension",
    ),
    "a function that fx.wrap hides": (Calling(lambda f, x: f[0](normalize(x)), C(1, 2, 5)), "^normalize: a func"),
    "a parametrized layer alone": (
        torch.nn.utils.parametrizations.weight_norm(C(1, 2, 5)),
        "^the model: a model of one layer alone",
    ),
    "a name of the network's": (Named("report"), "^report: a dense network has another attribute of this name"),
    "detach": (Calling(lambda f, x: f[0](x.detach()), C(1, 2, 5)), "^detach: gradients"),
    "a layer inside a module": (nn.Sequential(nn.Sequential(C(1, 2, 3), C(2, 2, 3, padding=1))), r"^0\.1: padding"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_has_no_dense_form_is_refused_by_name(case):
    model, message = REFUSED[case]
    with pytest.raises(DenseError, match=message) as raised:
        dense(model, 5)
    assert isinstance(raised.value, ValueError)
    assert gpukern.DenseError is DenseError


def test_lazy_and_compiled_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy layers and TorchScript, both on their way out
        lazy, script = nn.Sequential(nn.LazyConv2d(2, 5)), torch.jit.script(nn.Sequential(C(1, 2, 5)))
    with pytest.raises(DenseError, match=r"^0\.weight: its size is not known yet"):
        dense(lazy, 5)
    with pytest.raises(DenseError, match="compiled by TorchScript"):
        dense(script, 5)


def test_a_model_of_one_layer_is_a_convolution_at_most():
    assert dense(C(1, 2, 5), 5)(torch.zeros(1, 1, 6, 6)).shape == (1, 2, 2, 2)
    with pytest.raises(DenseError, match="a model of one layer alone"):
        dense(nn.ReLU(), 1)


@pytest.mark.parametrize("patch", [0, (5, -1)])
def test_sizes_below_one_are_refused(patch):
    with pytest.raises(ValueError, match="patch_size must be positive"):
        dense(nn.Sequential(C(1, 2, 5)), patch)


@pytest.mark.parametrize("patch", [5.0, (5, 5, 5), "55", None, (True, 5)])
def test_what_is_no_size_is_refused(patch):
    with pytest.raises(TypeError, match="patch_size must be an int or a pair of ints"):
        dense(nn.Sequential(C(1, 2, 5)), patch)


def test_what_is_no_model_or_border_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got int"):
        dense(5, 5)
    with pytest.raises(ValueError, match="unknown border 'mirror': it is one of valid, reflect, replicate, constant"):
        dense(nn.Sequential(C(1, 2, 5)), 5, border="mirror")


@pytest.mark.parametrize("name", ["border", "_steps", "_output"])
@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor, nn.Identity])
def test_names_of_the_networks_own_are_refused_of_all_kinds(name, kind):
    model = Named("conv")
    setattr(model, name, nn.Identity() if kind is nn.Identity else kind(torch.randn(3)))
    with pytest.raises(DenseError, match=f"^{name}: a dense network has another attribute of this name"):
        dense(model, 5)


def test_a_forward_that_changes_a_buffer_is_refused_and_the_buffer_kept():
    model = Calling(lambda f, x: f[0](x * f[1].running_mean.add_(1).sum().item()), C(1, 2, 5), nn.BatchNorm2d(1))
    with pytest.raises(DenseError, match=r"^layers\.1\.running_mean: the forward changes it"):
        dense(model, 5)
    assert model.layers[1].running_mean.item() == 0


def test_a_refusal_leaves_the_model_as_it_was():
    model = REFUSED["padding"][0].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DenseError):
        dense(model, 5)
    assert model.training
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
