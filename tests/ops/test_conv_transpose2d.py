"""The transposed convolution against torch's in float64, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF

import gpukern
import gpukern.functional as F
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.ops.conv_transpose2d import conv_transpose2d
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, sum_bound, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")

#: input, channels made, kernel, arguments
CASES = {
    "U-Net's": ((2, 24, 5, 6), 16, (2, 2), {"stride": 2}),
    "overlapping": ((2, 16, 5, 4), 24, (4, 3), {"stride": 2, "padding": 1, "output_padding": (0, 1)}),
    "stride 1": ((1, 5, 7, 6), 3, (3, 3), {"padding": 1}),
    "dilated": ((1, 16, 4, 5), 8, (3, 2), {"stride": (3, 1), "dilation": (2, 1), "output_padding": (2, 0)}),
    "more rows out": ((1, 8, 5, 5), 8, (2, 2), {"dilation": 3, "output_padding": 2, "padding": 1}),
    "groups": ((2, 12, 4, 5), 18, (3, 3), {"stride": 2, "padding": 1, "groups": 3}),
    "groups of 4": ((1, 32, 5, 5), 32, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 8}),
    "depthwise": ((2, 24, 5, 6), 24, (2, 2), {"stride": 2, "groups": 24}),
    "1x1": ((2, 40, 3, 5), 130, (1, 1), {}),
}  # fmt: skip
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def in_reference_mode():
    with force_mode(Mode.REFERENCE):
        yield


def tensors(name: str, dtype: torch.dtype, layout: str, device) -> tuple[torch.Tensor, ...]:
    """x, w, b and dy."""
    shape, outputs, kernel, arguments = CASES[name]
    weight = (shape[1], outputs // arguments.get("groups", 1), *kernel)
    x, w = (torch.randn(s).to(device, dtype).contiguous(memory_format=FORMATS[layout]) for s in (shape, weight))
    b = torch.randn(outputs).to(x)
    dy = torch.randn_like(TF.conv_transpose2d(x.cpu().double(), w.cpu().double(), **arguments))
    return x, w, b, dy.to(x).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype, layout, device):
    arguments = CASES[name][-1]
    made = tensors(name, dtype, layout, device)
    leaves = [t.clone().requires_grad_() for t in made[:3]]
    y = F.conv_transpose2d(*leaves, **arguments)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    y.backward(made[3])

    def truth(x, w, b, dy):
        operands = [t.double().cpu().requires_grad_() for t in (x, w, b)]
        y = TF.conv_transpose2d(*operands, **arguments)
        y.backward(dy.double().cpu())
        return [y.detach(), *(t.grad for t in operands)]

    values, absolutes = truth(*made), truth(*(t.abs() for t in made))
    terms = made[1].numel() + made[3].numel()  # more than any sum has
    tf32 = uses_tf32(dtype, "tf32")
    found = [y.detach(), *(leaf.grad for leaf in leaves)]
    for what, actual, value, absolute in zip(("y", "dx", "dw", "db"), found, values, absolutes, strict=True):
        assert_within(f"{name}, {what}", actual, value, sum_bound(value, absolute, terms, dtype, tf32=tf32))


@pytest.mark.parametrize("name", ["U-Net's", "overlapping", "groups of 4", "depthwise"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_epilogue_with_a_bias_in_fp32(name, act, device):
    """Bias, residual and activation are added to the fp32 sum: one rounding, as of a folded batch norm."""
    arguments = CASES[name][-1]
    x, w, b, residual = tensors(name, torch.float16, "channels_last", device)
    b = b.float() * 1.001
    shape = {name: value for name, value in arguments.items() if name != "groups"}
    pairs = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1} | shape
    pairs = {name: (v, v) if isinstance(v, int) else v for name, v in pairs.items()}
    y = conv_transpose2d(
        x, w, b, residual, pairs["stride"], pairs["padding"], pairs["output_padding"], pairs["dilation"],
        arguments.get("groups", 1), act, 0.0,
    )  # fmt: skip
    doubles = [t.double().cpu() for t in (x, w, b, residual)]
    value = reference_activation(TF.conv_transpose2d(*doubles[:3], **arguments) + doubles[3], act, 0.0)
    absolute = TF.conv_transpose2d(*(t.abs() for t in doubles[:3]), **arguments) + doubles[3].abs()
    # silu's slope reaches 1.1.
    assert_within(f"{name}, {act}", y, value, 1.1 * sum_bound(value, absolute, w.numel(), torch.float16))
    assert y.dtype is torch.float16


def test_gradients_of_gradients(in_reference_mode):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 3, 3), (4, 2, 3, 2), (4,)))
    for activation in (None, "tanh"):

        def run(x, w, b, activation=activation):
            return F.conv_transpose2d(x, w, b, 2, 1, 1, 2, activation=activation)

        assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input": (1, 3, 4, 4)}, "to have 4 channels, but got 3"),
        ({"bias": (3,)}, "expected bias to have shape"),
        ({"output_padding": 2}, "output padding must be smaller"),
        ({"output_padding": -1}, "output padding must be"),
        ({"padding": 9}, "Output size is too small"),
        ({"stride": 0}, "stride"),
        ({"groups": 3}, "groups=3"),
        ({"input": (4,)}, "4D"),
    ],
)
def test_errors_are_torchs(arguments, message, device):
    shapes = {
        "input": arguments.pop("input", (1, 4, 4, 4)),
        "weight": (4, 2, 3, 3),
        "bias": arguments.pop("bias", (2 * arguments.get("groups", 1),)),
    }
    made = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError):
        TF.conv_transpose2d(**{n: t.cpu() for n, t in made.items()}, **{"stride": 2, "padding": 1} | arguments)
    with pytest.raises(RuntimeError, match=message):
        F.conv_transpose2d(**made, **{"stride": 2, "padding": 1} | arguments)


def test_only_operators_take_a_bias_in_fp32(device):
    x, w = (torch.randn(s, device=device, dtype=torch.float16) for s in ((1, 4, 4, 4), (4, 4, 3, 3)))
    b = torch.randn(4, device=device)
    for function in (F.conv2d, F.conv_transpose2d):
        with pytest.raises(RuntimeError, match="same dtype"):
            function(x, w, b)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(x[0, 0], w[0, :, 0, 0].new_ones(4, 4), b)


@pytest.mark.parametrize("output_size", [None, (11, 12)])
def test_the_layer(output_size, device):
    torch.manual_seed(0)
    theirs = torch.nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)
    ours = gpukern.convert(theirs).to(device)
    assert type(ours) is gpukern.nn.ConvTranspose2d and ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 6, 6, 6)
    expected = theirs(x, output_size)
    torch.testing.assert_close(ours(x.to(device), output_size).cpu(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(ours(x[0].to(device), output_size).cpu(), expected[0], rtol=2e-3, atol=2e-3)


def test_export(in_reference_mode):
    layer = gpukern.nn.ConvTranspose2d(4, 6, 2, stride=2).eval()
    x = torch.randn(2, 4, 5, 5)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("n")}})
    assert "gpukern.conv_transpose2d" in str(program.graph)
    more = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(program.module()(more), layer(more))
