"""Max pools that become part of the convolution before them, and zero padding that becomes its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.fusion import describe
from gpukern.fusion.calls import Signature
from gpukern.fusion.capture import capture_program, private_copy
from gpukern.fusion.lowering import lower
from gpukern.fusion.matcher import find
from gpukern.fusion.prediction import kernel
from gpukern.fusion.settling import Settled
from gpukern.fusion.verify import cast, distance, leaves
from gpukern.runtime.device import A100, H100
from gpukern.runtime.mode import force_mode, mode_of
from tests.device import DEVICE
from tests.fusion.networks import NORM, conv, net, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

#: ‖y − ref‖ / ‖ref‖ of a few layers in fp32.
BOUND = 12 * torch.finfo(torch.float32).eps
#: The kernels, emulated where there is no GPU.
KERNELS = mode_of(torch.empty(0, device=DEVICE))


def fused(function, *shape: int, **layers: nn.Module):
    """(the patterns, the fused model), verified and right at another batch size."""
    model, (x,) = net(function, *shape, **layers)
    found = gpukern.fuse(model, x)
    assert found.report.verification.passed
    more = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        expected = model.double()(*cast((more,), torch.float64))
    assert distance(leaves(found(more)), leaves(expected)) <= BOUND
    return [group.pattern for group in found.report.fused], found


def calls(graph: torch.fx.Graph, words: str) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and words in node.name]


# ---- max pools -------------------------------------------------------------------------------------------------------

POOL = "max_pool2d"
POOLED = {
    "plain": (lambda m, x: F.max_pool2d(m.a(x), 2), f"conv2d + {POOL}"),
    "batch norm, activation": (lambda m, x: F.max_pool2d(F.relu(m.b(m.a(x))), 2), f"{NORM} + relu + {POOL}"),
    "no monotone activation": (lambda m, x: F.max_pool2d(F.silu(m.b(m.a(x))), 2, 2), f"{NORM} + silu + {POOL}"),
    "activation after it": (lambda m, x: F.relu(F.max_pool2d(m.b(m.a(x)), 2)), f"{NORM} + {POOL} + relu"),
    "one before and one after": (lambda m, x: F.relu(F.max_pool2d(m.a(x).tanh(), 2)), f"conv2d + tanh + {POOL}"),
    "gpukern's own": (lambda m, x: gpukern.functional.max_pool2d(F.relu(m.a(x)), 2), f"conv2d + relu + {POOL}"),
    "a module": (lambda m, x: m.p(m.b(m.a(x))), f"{NORM} + {POOL}"),
}


@pytest.mark.parametrize("name", POOLED)
def test_pools(name):
    function, pattern = POOLED[name]
    found, model = fused(function, a=conv(bias=True), b=norm(), p=nn.MaxPool2d(2))
    assert found == [pattern]
    (group,) = model.report.fused
    assert group.operator == "gpukern::conv2d_max_pool2d"
    assert len(calls(model.module.network.graph, "max_pool2d")) == 1


#: What comes after the first convolution, and what becomes of it.
UNPOOLED = {
    "overlapping": (lambda m, x: F.max_pool2d(m.a(x), 3, 2, 1), []),
    "other stride": (lambda m, x: F.max_pool2d(m.a(x), 2, 1), []),
    "padded": (lambda m, x: F.max_pool2d(m.a(x), 2, 2, 1), []),
    "dilated": (lambda m, x: F.max_pool2d(m.a(x), 2, 2, dilation=2), []),
    "ceil": (lambda m, x: F.max_pool2d(m.a(x), 2, ceil_mode=True), []),
    "indices": (lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True), []),
    "averages": (lambda m, x: F.avg_pool2d(m.a(x), 2), []),
    "another user": (lambda m, x: (y := m.a(x), F.max_pool2d(y, 2)), []),
    "a residual": (lambda m, x: F.max_pool2d(m.a(x) + x, 2), ["conv2d + add"]),
    "a rising activation it is not": (lambda m, x: F.silu(F.max_pool2d(m.a(x), 2)), [f"conv2d + {POOL}"]),
    "a batch norm between": (lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), [f"conv2d + {POOL}"]),
    "transposed": (lambda m, x: F.max_pool2d(m.t(x), 2), []),
    "a sequence": (lambda m, x: F.max_pool1d(m.s(x.flatten(2)), 2), []),
}


@pytest.mark.parametrize("name", UNPOOLED)
def test_what_stays(name):
    function, patterns = UNPOOLED[name]
    layers = {"a": conv(), "b": norm(), "t": nn.ConvTranspose2d(4, 4, 3), "s": nn.Conv1d(4, 4, 3)}
    found, _ = fused(function, **layers)
    assert found == patterns


def test_a_pool_is_skipped_by_its_own_name_and_strict_minds_no_pool():
    def function(m, x):
        return F.max_pool2d(F.silu(m.p(m.b(m.a(x)))), 3, 2)

    model, x = net(function, a=conv(), b=norm(), p=nn.MaxPool2d(2))
    (group,) = gpukern.fuse(model, x, strict=True, skip=["p"]).report.fused
    assert (group.pattern, group.modules) == (NORM, ("a", "b"))
    # The activation after the pool is left, as it was before pools were fused: it follows no convolution.
    report = gpukern.fuse(model, x, strict=True).report
    (group,) = report.fused
    assert (group.pattern, group.modules) == (f"{NORM} + {POOL}", ("a", "b", "p"))
    assert [reason for _, reason in report.not_fused] == [
        "follows max_pool2d, p (max_pool2d): no convolution or linear layer"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_compute_it(dtype, device):
    model, (x,) = net(
        lambda m, x: F.max_pool2d(F.relu(m.b(m.a(F.pad(x, (0, 1, 0, 1))))), 2), 2, 4, 9, 8, a=conv(stride=2), b=norm()
    )
    with force_mode(KERNELS):
        report = gpukern.fuse(model.to(device), x.to(device), dtype=dtype).report
    (group,) = report.fused
    assert (group.pattern, group.operator) == (f"pad + {NORM} + relu + {POOL}", "gpukern::conv2d_max_pool2d")
    assert report.verification.passed and group.dtype == str(dtype).removeprefix("torch.")


def test_in_double_precision_torch_pools():
    model, (x,) = net(lambda m, x: F.max_pool2d(m.b(m.a(x)), 2), a=conv(), b=norm())
    (group,) = gpukern.fuse(model, x, dtype=torch.float64).report.fused
    assert (group.pattern, group.operator) == (NORM, "aten::convolution")


def test_a_layer_that_half_cannot_hold_is_pooled_in_fp32():
    model, (x,) = net(lambda m, x: F.max_pool2d(m.b(m.a(x)), 2) * 1e-6, a=conv(), b=norm())
    model.b.weight.data.mul_(1e6)
    model.b.running_mean.zero_()
    found = gpukern.fuse(model, x * 1e-3, dtype=torch.float16)
    (group,) = found.report.fused
    assert (group.pattern, group.dtype) == (f"{NORM} + {POOL}", "float32")
    assert found.report.verification.passed and found(x * 1e-3).dtype is torch.float16


def test_saved_and_loaded_in_another_process(tmp_path, run_python):
    model, (x,) = net(lambda m, x: F.max_pool2d(F.relu(m.b(m.a(x))), 2), a=conv(), b=norm())
    found = gpukern.fuse(model, x)
    found.save(tmp_path / "pooled.pt2")
    torch.save((x, found(x)), tmp_path / "expected.pt")
    run = run_python(
        "import sys, torch, gpukern\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "print(torch.equal(gpukern.load(sys.argv[1])(x), expected))\n",
        str(tmp_path / "pooled.pt2"),
        str(tmp_path / "expected.pt"),
    )
    assert run.stdout == "True\n", run.stderr


def test_prediction():
    """One launch for channels_last; for 1×1 of planes on Hopper two, whose time counts and whose traffic does not."""
    model, (x,) = net(
        lambda m, x: F.max_pool2d(F.relu(m.b(F.max_pool2d(m.a(x), 2))), 2),
        *(32, 64, 56, 56),
        a=nn.Conv2d(64, 64, 1, bias=False),
        b=nn.Conv2d(64, 64, 3, padding=1, bias=False),
    )
    captured = capture_program(private_copy(model).half(), model, (x.half(),), Signature.of(model), dynamic_batch=True)
    lowered = lower(captured, find(Settled(captured)).matches, channels_last=True)
    graph = describe.shaped(lowered.module.graph, dict(lowered.module.named_buffers()), {}, (x.half(),))
    nodes = calls(graph, "conv2d_max_pool2d")
    image = x.numel()
    for device in (H100, A100):
        first, second = (kernel(node, device, True) for node in nodes)
        assert first.bytes == 2 * (image + image // 4 + 64 * 64)
        assert second.bytes == 2 * (image // 4 + image // 16 + 64 * 64 * 9)
        assert "max_pool2d" not in first.plan + second.plan
        assert first.expected > first.floor and second.expected > second.floor
    apart = kernel(nodes[0], H100, False)
    assert apart.plan.endswith(", and max_pool2d") and apart.bytes == 2 * (image + image // 4 + 64 * 64)
    assert apart.expected > 3 * apart.floor / 2


# ---- zeros -----------------------------------------------------------------------------------------------------------


class Same(nn.Conv2d):
    """As timm's Conv2dSame: TensorFlow's padding, more of it at the end."""

    def forward(self, x):
        height, width = (max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, 2)


PADDED = {
    "TensorFlow's": (lambda m, x: m.b(m.s(x)), f"pad + {NORM}"),
    "ZeroPad2d": (lambda m, x: m.b(m.a(m.z(x))), f"pad + {NORM}"),
    "constant_pad_nd": (lambda m, x: m.a(torch.constant_pad_nd(x, (1, 2, 0, 3))), "pad + conv2d"),
    "columns alone": (lambda m, x: F.relu(m.a(F.pad(x, (0, 2)))), "pad + conv2d + relu"),
    "padding same": (lambda m, x: m.e(F.pad(x, (0, 2, 1, 0))), "pad + conv2d"),
    "none of images and channels": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1, 0, 0))), "pad + conv2d"),
}


def padded_layers() -> dict[str, nn.Module]:
    return {
        "a": conv(bias=True),
        "b": norm(),
        "s": Same(4, 4, 3),
        "z": nn.ZeroPad2d((2, 0, 1, 3)),
        "e": nn.Conv2d(4, 4, (2, 3), padding="same"),
        "c": nn.Conv2d(5, 4, 3),
    }


@pytest.mark.parametrize("name", PADDED)
def test_zeros_become_the_padding_of_the_convolution(name):
    function, pattern = PADDED[name]
    found, model = fused(function, 2, 4, 8, 9, **padded_layers())
    assert found == [pattern]
    assert not calls(model.module.network.graph, "pad")


KEPT = {
    "crops": (lambda m, x: m.a(F.pad(x, (-1, 1, 1, 1))), []),
    "ones": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), value=1.0)), []),
    "reflections": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), mode="reflect")), []),
    "channels": (lambda m, x: m.c(F.pad(x, (1, 1, 1, 1, 0, 1))), []),
    "another user": (lambda m, x: m.a(y := F.pad(x, (1, 1))).mean((2, 3)) + y.mean((2, 3)), []),
    "an output": (lambda m, x: (y := F.pad(x, (1, 1)), F.relu(m.a(y))), ["conv2d + relu"]),
    "a sequence": (lambda m, x: m.q(F.pad(x.flatten(2), (1, 1))), []),
    # A shift before the zeros cannot be folded past them.
    "a batch norm before": (lambda m, x: m.a(F.pad(m.b(x), (1, 1))), ["pad + conv2d"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_padding_stays(name):
    function, patterns = KEPT[name]
    layers = {**padded_layers(), "a": conv(padding=0), "q": nn.Conv1d(4, 4, 3)}
    assert fused(function, 2, 4, 8, 9, **layers)[0] == patterns


def test_zeros_that_depend_on_the_batch_stay():
    model, (x,) = net(lambda m, x: m.a(F.pad(x, (0, x.shape[0]))), a=conv())
    found = gpukern.fuse(model, x)
    assert not found.report.fused
    for batch in (1, 3):
        more = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            assert distance([found(more)], [model.float()(more).double()]) <= BOUND


def test_a_skipped_module_keeps_its_zeros():
    model, x = net(lambda m, x: m.b(m.a(m.z(x))), **padded_layers())
    (group,) = gpukern.fuse(model, x, skip=["z"]).report.fused
    assert (group.pattern, group.modules) == (NORM, ("a", "b"))
    (group,) = gpukern.fuse(model, x).report.fused
    assert group.modules == ("z", "a", "b")
