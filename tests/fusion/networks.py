"""Small networks that other fusers get wrong or leave as they are, each with what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import gpukern

Made = tuple[nn.Module, tuple]
NORM = "conv2d + batch_norm"


class Case(NamedTuple):
    """``make`` gives a model and its example. ``fused``: the patterns, in order; ``left``: for each thing that is left,
    in order, words that its reason must have."""

    make: Callable[[], Made]
    fused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs as forward."""

    def __init__(self, function: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def lively(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and parameters of batch norms that no fold can mistake for others."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor, low in (
                (module.running_mean, -1.0),
                (module.running_var, 0.3),
                (module.weight, 0.4),
                (module.bias, -1.0),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, 1.6)
    return model.eval()


def net(function: Callable, *shape: int, **layers: nn.Module) -> Made:
    return lively(Net(function, **layers)), (torch.randn(shape or (2, 4, 7, 7)),)


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **{"padding": 1, "bias": False, **options})


def norm(**options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


class OwnNorm(nn.BatchNorm2d):
    """A subclass that does more, as timm's BatchNormAct2d."""

    def forward(self, x):
        return F.silu(super().forward(x))


class FrozenNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, low in (("weight", 0.5), ("bias", -1.0), ("mean", -1.0), ("var", 0.5)):
            self.register_buffer(name, torch.empty(channels).uniform_(low, 1.5))

    def forward(self, x):
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.mean, self.var))
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, activation: Callable) -> None:
        super().__init__()
        self.down, self.up, self.activation = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), activation

    def forward(self, x):
        return x * self.activation(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def one(**options) -> Made:
    return net(lambda m, x: m.b(m.a(x)), a=conv(**options), b=norm())


def hooked(which: str) -> Made:
    model, example = net(lambda m, x: m.b(m.a(x)).relu(), a=conv(), b=norm())
    getattr(model, which).register_forward_hook(lambda module, inputs, output: output * 2 + inputs[0].mean())
    return model, example


def parametrized(by: Callable) -> Made:
    return net(lambda m, x: m.b(m.a(x)), a=by(conv()), b=norm())


def tied() -> Made:
    model, example = net(lambda m, x: m.d(m.c(m.b(m.a(x)))), a=conv(), b=norm(), c=conv(), d=norm())
    model.c.weight = model.a.weight
    return model, example


def other_dimensions(kind: str, transposed: bool = False, **options) -> Made:
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{kind}")(4, 6, 3, **options)
    sizes = {"1d": (9,), "2d": (5, 7), "3d": (4, 5, 6)}[kind]
    return net(lambda m, x: m.b(m.a(x)).relu(), 2, 4, *sizes, a=layer, b=getattr(nn, f"BatchNorm{kind}")(6))


def functional(m, x):
    x = F.conv2d(x, m.a.weight, padding=1)
    return F.relu(F.batch_norm(x, m.b.running_mean, m.b.running_var, m.b.weight, m.b.bias, eps=0.1))


def in_place(m, x):
    y = m.b(m.a(x)).relu_()
    z = m.d(m.c(y))
    z += y
    return F.relu(z, inplace=True)


def residual(m, x):
    return F.relu(m.b(m.a(x)) + x)


def two_branches(m, x):
    return F.relu(m.b(m.a(x)) + m.d(m.c(x)))


def _batch_statistics(m, x):
    return F.relu(F.batch_norm(m.a(x), m.b.running_mean, m.b.running_var, training=True))


#: By gpukern's names: every layer that gpukern has, and the forms of those that have several.
ACTIVATIONS = {
    **{
        kind._epilogue["activation"]: getattr(nn, name)()
        for name, kind in vars(gpukern.nn.activation).items()
        if isinstance(getattr(kind, "_epilogue", None), dict)
    },
    "leaky_relu": nn.LeakyReLU(0.3),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}

CASES = {
    "plain": Case(one, (NORM,)),
    "bias": Case(lambda: one(bias=True), (NORM,)),
    "grouped": Case(lambda: one(groups=2, stride=2, dilation=2), (NORM,)),
    "depthwise": Case(lambda: one(groups=4), (NORM,)),
    "padding same": Case(lambda: one(padding="same", dilation=2), (NORM,)),
    "circular padding": Case(lambda: one(padding_mode="circular"), (NORM,)),
    "even kernel, padding same": Case(
        lambda: net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(4, 4, (2, 4), padding="same"), b=norm()), (NORM,)
    ),
    "no affine": Case(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(), b=norm(affine=False)), (NORM,)),
    "two norms": Case(
        lambda: net(lambda m, x: m.c(m.b(m.a(x))), a=conv(), b=norm(), c=norm()), (f"{NORM} + batch_norm",)
    ),
    "reused conv": Case(
        lambda: net(lambda m, x: m.b(m.a(x)) + m.c(m.a(x + 1)).relu(), a=conv(), b=norm(), c=norm()),
        (f"{NORM} + relu", f"{NORM} + add"),
    ),
    "reused norm": Case(
        lambda: net(lambda m, x: m.n(m.b(m.n(m.a(x)).relu())), a=conv(), b=conv(), n=norm()), (f"{NORM} + relu", NORM)
    ),
    "both reused": Case(
        lambda: net(lambda m, x: m.n(m.a(m.n(m.a(x)).tanh())), a=conv(), n=norm()), (f"{NORM} + tanh", NORM)
    ),
    "linear": Case(
        lambda: net(lambda m, x: m.b(m.a(x)).relu(), 5, 4, a=nn.Linear(4, 6), b=nn.BatchNorm1d(6)),
        ("linear + batch_norm + relu",),
    ),
    "linear over (N, L, C) with L == C": Case(
        lambda: net(lambda m, x: m.b(m.a(x)), 2, 4, 4, a=nn.Linear(4, 4), b=nn.BatchNorm1d(4)),
        (),
        ("the features of a (linear) are the last",),
    ),
    "linear over (N, L, C) and an activation": Case(
        lambda: net(lambda m, x: F.gelu(m.a(x)), 2, 3, 4, a=nn.Linear(4, 5)), ("linear + gelu",)
    ),
    "hook on conv": Case(lambda: hooked("a"), ("conv2d + scale", "batch_norm + relu"), ("broadcasts",)),
    "hook on norm": Case(lambda: hooked("b"), (), ("other users: b (mean)", "follows add")),
    "subclass": Case(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(), b=OwnNorm(4)), (f"{NORM} + silu",)),
    "functional": Case(lambda: net(functional, a=conv(), b=norm()), (f"{NORM} + relu",)),
    "in place": Case(
        lambda: net(in_place, a=conv(), b=norm(), c=conv(), d=norm()), (f"{NORM} + relu", f"{NORM} + add + relu")
    ),
    "two users": Case(lambda: net(lambda m, x: m.b(y := m.a(x)) * y, a=conv(), b=norm()), (), ("other users: mul",)),
    "conv is an output": Case(
        lambda: net(lambda m, x: (y := m.a(x), m.b(y)), a=conv(), b=norm()), (), ("is an output of the model",)
    ),
    "norm is an output": Case(
        lambda: net(lambda m, x: (y := m.b(m.a(x)), F.relu(y)), a=conv(), b=norm()),
        (NORM,),
        ("is an output of the model",),
    ),
    "residual": Case(lambda: net(residual, a=conv(), b=norm()), (f"{NORM} + add + relu",)),
    "residual first": Case(lambda: net(lambda m, x: x + m.b(m.a(x)), a=conv(), b=norm()), (f"{NORM} + add",)),
    "two branches": Case(
        lambda: net(two_branches, a=conv(), b=norm(), c=conv(), d=norm()), (NORM, f"{NORM} + add + relu")
    ),
    "adds itself": Case(
        lambda: net(lambda m, x: (y := m.a(x)) + y, a=conv()), (), ("not an addition of two different tensors",)
    ),
    "broadcasting addition": Case(
        lambda: net(lambda m, x: m.b(m.a(x)) + x.mean((2, 3), keepdim=True), a=conv(), b=norm()),
        (NORM,),
        ("broadcasts",),
    ),
    "broadcast by the addition": Case(
        lambda: net(lambda m, x: m.a(x.mean((2, 3), keepdim=True)) + x, a=conv()), (), ("broadcasts",)
    ),
    "alpha = 2": Case(
        lambda: net(lambda m, x: torch.add(m.b(m.a(x)), x, alpha=2), a=conv(), b=norm()), (NORM,), ("alpha = 2",)
    ),
    "two additions": Case(
        lambda: net(lambda m, x: m.a(x) + x + x.relu(), a=conv()),
        ("conv2d + add",),
        ("model's input", "adds inputs_0 already"),
    ),
    "batch statistics": Case(
        lambda: net(lambda m, x: m.b(m.a(x)).relu(), a=conv(), b=norm(track_running_stats=False)),
        (),
        ("statistics of the batch", "follows batch_norm"),
    ),
    "batch statistics that update running ones": Case(
        lambda: net(_batch_statistics, a=conv(), b=norm()), (), ("statistics of the batch", "follows batch_norm")
    ),
    "weight_norm": Case(lambda: parametrized(torch.nn.utils.parametrizations.weight_norm), (NORM,)),
    "spectral_norm": Case(lambda: parametrized(torch.nn.utils.parametrizations.spectral_norm), (NORM,)),
    "old spectral_norm": Case(lambda: parametrized(torch.nn.utils.spectral_norm), (NORM,)),
    "tied weights": Case(tied, (NORM, NORM)),
    "transposed": Case(
        lambda: other_dimensions("2d", True, stride=2, output_padding=1), ("conv_transpose2d + batch_norm + relu",)
    ),
    "transposed, groups": Case(
        lambda: other_dimensions("2d", True, groups=2, padding=1, dilation=2), ("conv_transpose2d + batch_norm + relu",)
    ),
    "transposed sequence": Case(
        lambda: other_dimensions("1d", True, stride=2, groups=2), ("conv_transpose1d + batch_norm + relu",)
    ),
    "sequence": Case(lambda: other_dimensions("1d", padding=1, stride=2), ("conv1d + batch_norm + relu",)),
    "instance norm, frozen": Case(
        lambda: net(
            lambda m, x: m.d(m.c(m.b(m.a(x)).relu())),
            a=conv(),
            b=nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            c=conv(),
            d=nn.InstanceNorm2d(4, track_running_stats=True),
        ),
        (f"{NORM} + relu", NORM),
    ),
    "sequence, same": Case(lambda: other_dimensions("1d", padding="same"), ("conv1d + batch_norm + relu",)),
    "volume": Case(lambda: other_dimensions("3d", groups=2, padding="same"), ("conv3d + batch_norm + relu",)),
    "transposed volume": Case(
        lambda: other_dimensions("3d", True, groups=2, stride=2), ("conv_transpose3d + batch_norm + relu",)
    ),
    "norm before, unpadded": Case(
        lambda: net(lambda m, x: m.a(m.b(x)), a=conv(padding=0, groups=2), b=norm()), ("batch_norm + conv2d",)
    ),
    "norm before, padded": Case(lambda: net(lambda m, x: m.a(m.b(x)), a=conv(), b=norm()), (), ("the model's input",)),
    "norm before, transposed": Case(
        lambda: net(lambda m, x: m.a(m.b(x)), a=nn.ConvTranspose2d(4, 4, 2), b=norm()), (), ("the model's input",)
    ),
    "norms on both sides": Case(
        lambda: net(lambda m, x: m.c(m.a(m.b(x))).relu(), a=conv(padding=0, bias=True), b=norm(), c=norm()),
        ("batch_norm + conv2d + batch_norm + relu",),
    ),
    "norm before linear": Case(
        lambda: net(lambda m, x: m.a(m.b(x)), 5, 4, a=nn.Linear(4, 6), b=nn.BatchNorm1d(4)), ("batch_norm + linear",)
    ),
    "norm and activation": Case(
        lambda: net(lambda m, x: m.a(F.relu(m.b(x))), a=conv(), b=norm()), ("batch_norm + relu",)
    ),
    "norm, addition and activation": Case(
        lambda: net(lambda m, x: F.relu(m.b(x) + x), a=conv(), b=norm()), ("batch_norm + add + relu",)
    ),
    "frozen norm": Case(
        lambda: net(lambda m, x: F.relu(m.b(m.a(x))), a=conv(), b=FrozenNorm(4)), ("conv2d + scale + shift + relu",)
    ),
    "gate": Case(lambda: net(lambda m, x: m.g(x), g=Gate(torch.sigmoid)), ("conv2d + relu", "conv2d + sigmoid")),
    "hard gate": Case(
        lambda: net(lambda m, x: m.g(x), g=Gate(F.hardsigmoid)), ("conv2d + relu", "conv2d + hardsigmoid")
    ),
    "dropout": Case(
        lambda: net(lambda m, x: F.relu(m.b(m.d(m.a(x)))), a=conv(), b=norm(), d=nn.Dropout2d()), (f"{NORM} + relu",)
    ),
    "weight from the input": Case(
        lambda: net(lambda m, x: F.relu(F.conv2d(x, x[:1].mean((2, 3), keepdim=True))), a=conv()),
        (),
        ("its weight depends on the input", "was left as it is"),
    ),
    "dict and tuple": Case(
        lambda: net(lambda m, x: {"a": (y := m.b(m.a(x)).relu(), [y.mean()]), "b": (None, 3, x)}, a=conv(), b=norm()),
        (f"{NORM} + relu",),
    ),
    "two inputs": Case(
        lambda: (
            net(lambda m, x, y: m.b(m.a(x)) + y, a=conv(), b=norm())[0],
            (torch.randn(2, 4, 7, 7), torch.randn(2, 4, 7, 7)),
        ),
        (f"{NORM} + add",),
    ),
    "flattened images": Case(
        lambda: net(lambda m, x: m.c(m.b(m.a(x)).relu().view(x.shape[0], -1)), a=conv(), b=norm(), c=nn.Linear(196, 3)),
        (f"{NORM} + relu",),
    ),
    "pools": Case(
        lambda: net(
            lambda m, x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(m.b(m.a(x)), 3, 1, 1), 2, ceil_mode=True), 2),
            a=conv(),
            b=norm(),
        ),
        (NORM,),
    ),
} | {
    f"activation {name}": Case(
        lambda layer=layer: net(lambda m, x: m.c(m.b(m.a(x))), a=conv(), b=norm(), c=layer), (f"{NORM} + {name}",)
    )
    for name, layer in ACTIVATIONS.items()
}
