"""What each pattern computes: results, gradients and statistics beside torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.compiler import autograd
from tests.compiler.nets import (
    Block,
    Net,
    PreActBlock,
    classifier,
    conv,
    conv_norm,
    dense,
    frozen,
    read_by_three,
    residual_twice,
    sequential,
    squeeze_excite,
)
from tests.compiler.training import assert_step_follows, bound, calls_of, depth, pair

pytestmark = pytest.mark.usefixtures("poisoned", "full_fp32")

IMAGES, SEQUENCES, ROWS = (3, 4, 6, 5), (3, 4, 9), (9, 4)
NETS = {
    "residual blocks": (lambda: sequential(Block(), Block()), IMAGES),
    "projections": (lambda: sequential(Block(4, 8), Block(8, 4)), IMAGES),
    "no activation": (lambda: sequential(Block(act=lambda x: x), nn.Tanh(), conv(4, 4)), IMAGES),
    "pre-activation": (lambda: sequential(PreActBlock(), PreActBlock()), IMAGES),
    "dense": (dense, IMAGES),
    "squeeze-excite": (squeeze_excite, IMAGES),
    "residual twice": (residual_twice, IMAGES),
    "read by three": (lambda: read_by_three(0, 1, 2), IMAGES),
    "read by three, one returned": (lambda: read_by_three(0), IMAGES),
    "read by three, residual returned": (lambda: read_by_three(1, 2), IMAGES),
    "depthwise": (
        lambda: sequential(conv_norm(4, 8, 1), nn.SiLU(), conv_norm(8, 8, groups=8, stride=2), nn.SiLU(), conv(8, 4)),
        IMAGES,
    ),
    "grouped": (
        lambda: sequential(conv_norm(4, 8, groups=2), nn.Tanh(), conv_norm(8, 4, groups=4, dilation=2), nn.Sigmoid()),
        IMAGES,
    ),
    "bias and activation": (lambda: sequential(nn.Conv2d(4, 6, 3), nn.GELU(), nn.Conv2d(6, 3, 1), nn.Tanh()), IMAGES),
    "bias and residual": (lambda: Net(lambda net, x: torch.tanh(net.conv(x) + x), conv=conv(4, 4, bias=True)), IMAGES),
    "sequences": (
        lambda: sequential(
            nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), nn.SiLU(), nn.Conv1d(6, 4, 3, padding=1), nn.GELU()
        ),
        SEQUENCES,
    ),
    "row norms": (
        lambda: Net(
            lambda net, x: net.rms(torch.relu(net.norm(net.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
            conv=conv(4, 6), norm=nn.LayerNorm(6), rms=nn.RMSNorm(6, eps=1e-3),
        ),
        IMAGES,
    ),
    "transposed": (
        lambda: sequential(
            nn.ConvTranspose2d(4, 6, 2, 2, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.ConvTranspose2d(6, 2, 3),
            nn.Sigmoid(),
        ),
        IMAGES,
    ),
    "transposed sequences": (
        lambda: sequential(nn.ConvTranspose1d(4, 6, 2, 2), nn.Tanh(), nn.BatchNorm1d(6), nn.Tanh()), SEQUENCES,
    ),
    "rows": (
        lambda: sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3), nn.GELU()), ROWS,
    ),
    "volumes": (
        lambda: sequential(nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.Tanh(), nn.Conv3d(4, 2, 1)),
        (2, 2, 4, 3, 3),
    ),
    "pools": (
        lambda: sequential(
            conv_norm(4, 4), nn.SiLU(), nn.MaxPool2d(2), conv_norm(4, 4), nn.AvgPool2d(2, ceil_mode=True, padding=1),
            nn.AdaptiveAvgPool2d((2, None)), nn.Flatten(), nn.Linear(24, 3),
        ),
        (3, 4, 9, 8),
    ),
    "padding": (
        lambda: sequential(
            conv(4, 4, padding="same", dilation=2), nn.BatchNorm2d(4), nn.SiLU(), nn.ZeroPad2d((1, 0, 2, 1)),
            nn.Conv2d(4, 4, (2, 3), padding="valid"), conv(4, 4, padding_mode="circular", padding=1),
        ),
        IMAGES,
    ),
    "frozen norms": (lambda: frozen(sequential(Block(), Block(4, 8))), IMAGES),
    "evaluation": (lambda: sequential(Block(), Block(4, 8)).eval(), IMAGES),
    "norms without parameters": (
        lambda: sequential(
            conv(4, 4), nn.BatchNorm2d(4, affine=False), nn.Tanh(), conv(4, 4),
            nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.SiLU(),
        ),
        IMAGES,
    ),
    "norms without running statistics": (
        lambda: sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), conv(4, 4)), IMAGES,
    ),
    "norms that average over all batches": (
        lambda: sequential(conv(4, 4), nn.BatchNorm2d(4, momentum=None), nn.Tanh(), conv(4, 4)), IMAGES,
    ),
    "one pixel": (lambda: sequential(conv_norm(4, 4, 1), nn.SiLU(), conv(4, 4, 1)), (9, 4, 1, 1)),
    "no image": (lambda: sequential(conv_norm(4, 4, 1), nn.SiLU(), conv(4, 4, 1)), (0, 4, 3, 3)),
    "a whole network": (classifier, (3, 3, 6, 5)),
}  # fmt: skip
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: Those that call what no other does, which the emulated kernels compute too.
KERNELS = (
    "projections", "no activation", "pre-activation", "read by three", "read by three, one returned", "depthwise",
    "grouped", "bias and residual", "sequences", "transposed", "rows", "pools", "padding", "frozen norms",
    "norms without parameters", "no image", "a whole network",
)  # fmt: skip
#: Those with kernels of their own for a dtype or a layout.
FEW = ("projections", "pre-activation", "depthwise", "bias and residual")


@pytest.mark.parametrize("name", NETS)
def test_patterns_of_the_reference(name, cpu):
    assert_pattern(name, cpu)


@pytest.mark.parametrize("name", KERNELS)
def test_patterns_of_the_kernels(name, device):
    assert_pattern(name, device)


def assert_pattern(name, where):
    make, shape = NETS[name]
    model, exact, call = pair(make, where)
    for _ in range(2):  # the second time with other statistics
        assert_step_follows(call, model, exact, torch.randn(shape, device=where), bound(torch.float32, depth(model)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_dtypes_and_layouts(name, dtype, layout, device):
    make, shape = NETS[name]
    model, exact, call = pair(make, device)
    model.to(dtype).to(memory_format=LAYOUTS[layout])
    exact.load_state_dict(model.state_dict())
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    y = assert_step_follows(call, model, exact, x, bound(dtype, depth(model)))
    assert y[0].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("name", ["residual blocks", "frozen norms", "read by three"])
def test_results_computed_again(name, where):
    make, shape = NETS[name]
    model, exact, call = pair(make, where, options={"recompute": True})
    assert_step_follows(call, model, exact, torch.randn(shape, device=where), bound(torch.float32, depth(model)))


@pytest.mark.parametrize("needs_x", [True, False])
def test_parameters_that_need_no_gradient(needs_x, cpu):
    model, exact, call = pair(lambda: sequential(Block(), Block(4, 8), Block(8, 8)), cpu)
    for net in (model, exact):
        for parameter in (*net[0].parameters(), *net[1].bn2.parameters(), net[2].conv1.weight):
            parameter.requires_grad_(False)
    x = torch.randn(IMAGES)
    assert_step_follows(call, model, exact, x, bound(torch.float32, depth(model)), needs_x=needs_x)


def test_gradients_meet_in_the_kernel_of_the_last_reader(where, monkeypatch):
    """What two residual blocks hand on: the first block's inner result to one reader, its outer to two."""
    model, exact, call = pair(lambda: sequential(Block(), Block(), conv(4, 2)), where)
    x = torch.randn(IMAGES, device=where)
    with calls_of("conv2d_input_grad_norm", monkeypatch, autograd) as calls:
        assert_step_follows(call, model, exact, x, bound(torch.float32, depth(model)))
    assert len(calls) == 4
    added = [arguments[8] is not None for arguments in calls]
    assert sorted(added) == [False, False, False, True]


def test_what_others_read_too_is_left_to_autograd(where, monkeypatch):
    def forward(net, x):
        y = F.silu(net.bn(net.conv(x)))
        return net.after(y), y.mean((2, 3))

    first, norm = conv_norm(4, 4)
    model, exact, call = pair(lambda: Net(forward, conv=first, bn=norm, after=conv(4, 4)), where)
    with calls_of("conv2d_input_grad_norm", monkeypatch, autograd) as calls:
        x = torch.randn(IMAGES, device=where)
        assert_step_follows(call, model, exact, x, bound(torch.float32, depth(model)))
    assert not calls


@pytest.mark.parametrize("library", [nn, gpukern.nn], ids=["torch", "gpukern"])
def test_norms_of_rows_are_gpukerns(library, where, monkeypatch):
    model = nn.Sequential(library.LayerNorm(6), nn.Linear(6, 6), library.RMSNorm(6)).to(where)
    x = torch.randn(3, 6, device=where)
    with calls_of("apply", monkeypatch, gpukern.functional._row_norm) as calls:
        found = torch.compile(model, backend="gpukern")(x)
    assert [arguments[1] for arguments in calls][-2:] == ["layer_norm", "rms_norm"]
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


def test_float64_is_torchs(cpu):
    model, exact, call = pair(classifier, cpu)
    model.double()
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    assert torch.equal(call(x), exact(x))
