"""conv3d, conv_transpose3d and their gradients, on the kernels (on a GPU or emulated), against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern
import gpukern.functional as F
from gpukern.conv import Direction, volume_problem
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import conv_precision
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, truth

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = (
    Case("3x3x3", (2, 16, 2, 3, 4), 24, (3, 3, 3), padding=1),
    Case("3x3x3 ragged", (1, 17, 3, 4, 5), 9, (3, 3, 3)),
    Case("oblong, all geometries", (1, 18, 5, 6, 7), 9, (2, 3, 2), (2, 1, 3), (1, 0, 1), (1, 2, 1)),
    Case("even, same", (1, 16, 3, 4, 5), 8, (2, 3, 4), padding="same"),
    Case("stem", (1, 3, 3, 5, 6), 16, (3, 5, 3), (1, 2, 2), (1, 2, 1)),
    Case("more than 32 taps", (1, 16, 4, 3, 3), 16, (4, 3, 3), padding=1),
    Case("stride 2, dilation 2", (1, 16, 6, 5, 7), 16, (2, 2, 3), 2, 1, 2),
    Case("stride beyond the kernel", (1, 8, 5, 5, 7), 8, (1, 2, 1), 3),
    Case("groups", (1, 32, 3, 4, 4), 48, (2, 3, 3), (1, 2, 2), 1, groups=2),
    Case("depthwise", (2, 6, 4, 4, 5), 12, (3, 3, 3), padding=1, groups=6),
    Case("split sum, one channel", (1, 1, 7, 8, 9), 1, (2, 2, 2)),
    # by the kernels of images
    Case("1x1x1", (2, 16, 3, 4, 5), 24, (1, 1, 1)),
    Case("3x1x1", (2, 16, 4, 3, 5), 16, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    Case("1x3x3", (2, 16, 3, 5, 4), 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    # as one product, with a remainder that no window has, and without
    Case("patches", (2, 3, 4, 8, 8), 24, (2, 4, 4), (2, 4, 4)),
    Case("patches, remainder", (1, 5, 3, 5, 7), 8, (1, 2, 3), (1, 2, 3)),
    Case("points of a grid", (2, 16, 3, 5, 4), 24, (1, 1, 1), 2),
    Case("batch 0", (0, 16, 3, 4, 4), 16, (3, 3, 3), padding=1),
)
LAYOUTS = {"NCDHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
KINDS = ((torch.float32, "NCDHW"), (torch.float16, "channels_last_3d"))


def make(case: Case, dtype: torch.dtype, device, memory_format=torch.contiguous_format) -> list[torch.Tensor]:
    """input, weight, bias: random, in ``dtype``, requiring gradients."""
    input = torch.randn(case.input).to(device, dtype).contiguous(memory_format=memory_format)
    weight = (torch.randn(case.weight) * 0.3).to(device, dtype).contiguous(memory_format=memory_format)
    return [t.requires_grad_() for t in (input, weight, torch.randn(case.outputs).to(device, dtype))]


def run_and_check(case: Case, input, weight, bias, grad=None) -> torch.Tensor:
    output = F.conv3d(input, weight, bias, **case.arguments)
    grad = torch.randn(output.shape).to(output) if grad is None else grad
    output.backward(grad)
    expected = truth(case, input, weight, bias, grad)
    tf32 = uses_tf32(input.dtype, conv_precision(input.dtype))
    gradients = {"input gradient": input.grad, "weight gradient": weight.grad, "bias gradient": bias.grad}
    for name, actual in {"output": output, **gradients}.items():
        value = expected.values[name]
        bound = sum_bound(value, expected.absolutes[name], expected.terms[name] + 1, input.dtype, tf32=tf32)
        if actual is not None:
            assert_within(f"{case.name}: {name}", actual, value, bound)
    return output


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients(case, dtype, layout, device):
    input, weight, bias = make(case, dtype, device, LAYOUTS[layout])
    output = run_and_check(case, input, weight, bias)
    if output.numel() and output.shape[1] > 1:
        channels_last = layout != "NCDHW"
        assert output.is_contiguous(memory_format=LAYOUTS[layout]) and output.is_contiguous() is not channels_last
        assert (input.grad.stride(), weight.grad.stride()) == (input.stride(), weight.stride())


def test_bfloat16_and_mixed_layouts(device):
    case = CASES[0]
    input, weight, bias = make(case, torch.bfloat16, device)
    weight = weight.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    assert run_and_check(case, input, weight, bias).is_contiguous(memory_format=torch.channels_last_3d)


SMALL = Case("small", (2, 8, 3, 4, 5), 12, (2, 3, 3), padding=1)
PATCHES = Case("small patches", (2, 8, 4, 4, 6), 12, (2, 2, 3), (2, 2, 3))


@pytest.mark.parametrize("case", [SMALL, PATCHES], ids=lambda case: case.name)
@pytest.mark.parametrize("view", ["every second column", "cropped", "expanded", "permuted"])
def test_any_strides(case, view, device):
    N, C, D, H, W = case.input
    base = {
        "every second column": lambda: torch.randn(N, C, D, H, 2 * W, device=device)[..., ::2],
        "cropped": lambda: torch.randn(N, D + 2, H + 1, W + 3, C + 1, device=device).permute(0, 4, 1, 2, 3)[
            :, 1:, 1 : D + 1, :H, 2 : W + 2
        ],
        "expanded": lambda: torch.randn(1, C, 1, H, 1, device=device).expand(case.input),
        "permuted": lambda: torch.randn(W, D, C, H, N, device=device).permute(4, 2, 1, 3, 0),
    }[view]()
    _, weight, bias = make(case, torch.float32, device)
    grad = torch.randn(F.conv3d(base, weight, bias, **case.arguments).shape, device=device)
    if view == "expanded":
        grad = grad[:1, :, :1].expand(grad.shape)
    run_and_check(case, base, weight, bias, grad)


@pytest.mark.parametrize("kernel, stride", [((3, 2, 2), (1, 1, 2)), ((2, 2, 2), (2, 2, 2)), ((1, 3, 3), 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_epilogue(kernel, stride, layout, device, full_fp32):
    x, w, b = torch.randn(2, 8, 4, 4, 4), torch.randn(12, 8, *kernel) * 0.2, torch.randn(12)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    plain = torch_F.conv3d(x.double(), w.double(), b.double(), stride)
    # One that is laid out as the output, and one that is not.
    for residual in (torch.randn(plain.shape), torch.randn(*plain.shape[:2][::-1], *plain.shape[2:]).transpose(0, 1)):
        arguments = (each.to(device) for each in (x, w, b))
        y = F.conv3d(*arguments, stride, residual=residual.to(device), activation="silu")
        expected = torch_F.silu(plain + residual.double())
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


TRANSPOSED = (
    dict(shape=(2, 8, 3, 3, 4), outputs=6, kernel=(3, 2, 3), stride=2, padding=1, output_padding=1),
    dict(shape=(1, 16, 2, 3, 2), outputs=4, kernel=(2, 2, 2), stride=2),
    dict(shape=(1, 4, 3, 2, 3), outputs=2, kernel=(2, 3, 2), stride=(1, 2, 1), dilation=3, output_padding=2, groups=2),
    dict(shape=(2, 8, 3, 4, 4), outputs=5, kernel=(1, 1, 1)),
    dict(shape=(0, 8, 3, 4, 4), outputs=5, kernel=(3, 3, 3)),
)


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda case: f"{case['kernel']}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposed_and_gradients(case, layout, where, full_fp32):
    given = dict(case)
    shape, outputs, kernel = given.pop("shape"), given.pop("outputs"), given.pop("kernel")
    weight = shape[1], outputs // given.get("groups", 1), *kernel
    x, *others = (torch.randn(size) for size in (shape, weight, (outputs,)))
    tensors = x.contiguous(memory_format=LAYOUTS[layout]), *others
    ours = [t.clone().to(where).requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    y, z = F.conv_transpose3d(*ours, **given), torch_F.conv_transpose3d(*theirs, **given)
    grad = torch.randn(z.shape)
    y.backward(grad.to(where))
    z.backward(grad.double())
    for a, b in ((y, z), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-4, atol=1e-4)


def launches_of(function, *shapes, memory_format=torch.contiguous_format) -> list[str]:
    tensors = [torch.empty(shape, device="meta", dtype=torch.float16) for shape in shapes]
    tensors = [tensor.contiguous(memory_format=memory_format) for tensor in tensors]
    with record_launches(H100) as launches:
        output = function(*(t.requires_grad_() for t in tensors))
        output.backward(torch.empty_like(output))
    return [each.kernel for each in launches]


RECORD = """
from tests.ops.test_conv3d import *
for layout in (torch.contiguous_format, torch.channels_last_3d):
    print(launches_of(lambda x, w: F.conv3d(x, w, stride=(2, 16, 16)), (8, 3, 16, 224, 224), (768, 3, 2, 16, 16),
                      memory_format=layout))
    for kernel in ((1, 1, 1), (3, 1, 1), (1, 3, 3)):
        padding = tuple(k // 2 for k in kernel)
        print(launches_of(lambda x, w: F.conv3d(x, w, padding=padding), (8, 64, 8, 28, 28), (64, 64, *kernel),
                          memory_format=layout))
"""


def test_patches_are_one_launch_and_flat_kernels_those_of_images(run_python):
    result = run_python(RECORD, GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr
    patches, points, temporal, spatial, *channels_last = map(eval, result.stdout.splitlines())
    assert patches == channels_last[0] == ["strided_product_kernel"] * 3
    assert not any("conv3d" in kernel for kernels in (points, temporal, *channels_last) for kernel in kernels)
    assert [kernel for kernel in spatial if "conv3d" in kernel]  # N and D do not join in NCDHW


def test_plans_of_volumes_are_those_of_images_with_as_many_taps():
    from gpukern.conv import Layout, Operands
    from gpukern.conv.volumes.planner import candidates, grid, plan

    problem = volume_problem((8, 64, 16, 56, 56), (64, 64, 3, 3, 3), None, (1, 1, 1), (1,) * 6, (1, 1, 1), 1)
    last = plan(problem, Direction.FORWARD, Operands("float16"), H100)
    assert not any(last.pack) and (last.block_m, last.block_n) == (128, 64)
    assert grid(problem, Direction.FORWARD, last)[0] == 8 * 16 * 56 * 56 // 128
    # Tiles of elements that do not lie in runs are smaller: larger ones would spill.
    first = Operands("float16", first=Layout.STRIDED, second=Layout.STRIDED, output=Layout.STRIDED)
    unpacked = [each for each in candidates(problem, Direction.FORWARD, first, H100) if not any(each.pack)]
    assert unpacked and all(each.block_m * each.block_n <= 64 * 32 for each in unpacked)


@pytest.mark.parametrize("case", [SMALL, PATCHES], ids=lambda case: case.name)
def test_second_derivatives_jvp_and_vmap_are_torchs(case):
    with force_mode(Mode.REFERENCE):
        x, w, b = (t.detach().double().requires_grad_() for t in make(case, torch.float32, "cpu"))

        def ours(*tensors):
            return F.conv3d(*tensors, **case.arguments)

        assert torch.autograd.gradcheck(ours, (x, w, b), fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, (x, w, b), fast_mode=True)
        batched = torch.stack([x, 2 * x]).detach()
        got = torch.func.vmap(ours, (0, None, None))(batched, w, b)
        torch.testing.assert_close(got, torch.stack([ours(each, w, b) for each in batched]))


def test_autocast_and_compile(where, full_fp32):
    layer = gpukern.nn.Conv3d(4, 8, 3, padding=1).to(where)
    x = torch.randn(2, 4, 3, 4, 4, device=where)
    with torch.autocast(where.type, torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


class Block(torch.nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.branch = torch.nn.Sequential(
            torch.nn.Conv3d(channels, outputs, 3, 2, 1, bias=False),
            torch.nn.BatchNorm3d(outputs),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv3d(outputs, outputs, (1, 3, 3), padding=(0, 1, 1), bias=False),
            torch.nn.BatchNorm3d(outputs),
        )
        self.shortcut = torch.nn.Sequential(torch.nn.Conv3d(channels, outputs, 1, 2, bias=False))
        self.relu = torch.nn.ReLU()

    def forward(self, x):
        return self.relu(self.branch(x) + self.shortcut(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_of_volumes_trains_as_torchs(layout, where, full_fp32):
    torch.manual_seed(0)
    stem = torch.nn.Conv3d(3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False), torch.nn.BatchNorm3d(8), torch.nn.ReLU()
    head = torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)
    model = torch.nn.Sequential(*stem, torch.nn.MaxPool3d((1, 2, 2)), Block(8, 16), *head)
    model = model.to(where, memory_format=LAYOUTS[layout])
    ours, report = gpukern.convert(model, return_report=True)
    assert not report.left
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, target = torch.randn(3, 3, 4, 8, 8, device=where), torch.randint(4, (3,), device=where)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    losses = []
    for network in (model, ours):
        network.load_state_dict(start)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        losses.append([])
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch_F.cross_entropy(network(x), target)
            losses[-1].append(float(loss.detach()))
            loss.backward()
            optimizer.step()
        losses[-1] += [float(p.detach().double().norm()) for p in network.parameters()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
