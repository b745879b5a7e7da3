"""``gpukern.fuse`` against the original in float64, and what it fused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree

import gpukern
from gpukern.fusion.verify import Witness, cast, distance, leaves
from gpukern.runtime.mode import force_mode, mode_of
from gpukern.runtime.precision import fp32_products
from models.zoo import NETWORKS as NETWORK_MODELS
from tests.device import DEVICE
from tests.fusion.networks import CASES, NORM, lively

#: ‖y − ref‖ / ‖ref‖ of a few layers in fp32: a dozen roundings.
BOUND = 12 * torch.finfo(torch.float32).eps

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def truth(model, inputs):
    with torch.no_grad():
        return model.double()(*cast(inputs, torch.float64))


#: The kernels, emulated where there is no GPU.
KERNELS = mode_of(torch.empty(0, device=DEVICE))


@pytest.mark.parametrize("name", CASES)
def test_is_right_and_fuses_what_can_be_fused(name):
    case = CASES[name]
    model, example = case.make()
    fused = gpukern.fuse(model, example)
    assert tuple(group.pattern for group in fused.report.fused) == case.fused
    reasons = [reason for _, reason in fused.report.not_fused]
    assert len(reasons) == len(case.left), reasons
    assert all(words in reason for words, reason in zip(case.left, reasons, strict=True)), reasons
    # At another batch size too.
    larger = tuple(torch.randn(3, *tensor.shape[1:]) for tensor in example)
    outputs = [fused(*inputs) for inputs in (example, larger)]
    for output, inputs in zip(outputs, (example, larger), strict=True):
        expected = truth(model, inputs)
        assert pytree.tree_structure(output) == pytree.tree_structure(expected)
        assert distance(leaves(output), leaves(expected)) <= BOUND
    errors = [group.error for group in fused.report.fused]
    assert all(error <= BOUND for error in errors), errors


@pytest.mark.parametrize(
    "name, operators",
    [
        ("residual", "conv2d"),
        ("in place", "conv2d conv2d"),
        ("sequence, same", "conv2d"),
        ("transposed, groups", "conv_transpose2d"),
        ("transposed sequence", "conv_transpose2d"),
        ("linear", "linear"),
        ("linear over (N, L, C) and an activation", "linear"),
        ("norm, addition and activation", "batch_norm"),
        ("hard gate", "conv2d conv2d"),
        ("pools", "conv2d"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_compute_it(name, operators, dtype, device):
    model, example = CASES[name].make()
    with force_mode(KERNELS):
        fused = gpukern.fuse(model.to(device), tuple(tensor.to(device) for tensor in example), dtype=dtype)
    assert [group.operator for group in fused.report.fused] == [f"gpukern::{name}" for name in operators.split()]
    assert fused.report.verification.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("allowed, layers", [(True, 4), (False, 0)])
def test_the_floor_allows_for_tf32_in_kernels_only(allowed, layers, dtype, device):
    """Convolutions alone: TF32 is not allowed in matrix products."""
    convolutions = [torch.nn.Conv2d(2, 2, 1) for _ in range(4)]
    model = torch.nn.Sequential(*convolutions, torch.nn.Linear(5, 3)).to(device)
    inputs = (torch.randn(1, 2, 4, 5, device=device),)
    with fp32_products("tf32" if allowed else "ieee"):
        plain = Witness(model, inputs, dtype).floor
        with force_mode(KERNELS):
            floor = Witness(model, inputs, dtype).floor
    assert floor - plain == pytest.approx(layers**0.5 * 2.0**-10 if dtype is torch.float32 else 0.0)


def test_the_floor_counts_layers_of_any_model(device):
    """Functions and exported graphs have no modules to count."""

    class Functions(torch.nn.Module):
        def forward(self, x):
            w = torch.ones(2, 2, 1, 1, device=x.device, dtype=x.dtype)
            return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, w), w)

    x = torch.randn(1, 2, 4, 5, device=device)
    for model in (Functions(), torch.export.export(Functions(), (x,)).module()):
        with force_mode(KERNELS):
            floor = Witness(model, (x,), torch.float32).floor
        assert floor > 2**0.5 * 2.0**-10


#: Of networks of the benchmark: batch norms, and each pattern with how often it is found.
NETWORKS = {
    "resnet18": (20, {f"{NORM} + relu": 9, f"{NORM} + add + relu": 8, NORM: 3}),
    "mobilenet_v2": (52, {f"{NORM} + relu6": 35, f"{NORM} + add": 10, NORM: 7}),
    "unet": (18, {f"{NORM} + relu": 18}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    norms, patterns = NETWORKS[name]
    model = lively(NETWORK_MODELS[name].make())
    x = torch.randn(2, 3, 64, 64)
    report = gpukern.fuse(model, x).report
    assert Counter(group.pattern for group in report.fused) == patterns
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == norms
    assert not [name for name, reason in report.not_fused if "batch_norm" in name]
    assert report.verification.truth == "float64" and report.verification.argmax_agreement == 1
    assert report.after.operators <= report.before.operators - 2 * norms + patterns.get(NORM, 0)
    assert report.after.activation_bytes < report.before.activation_bytes / 2


def test_a_model_is_captured_as_without_cudnn(monkeypatch):
    """Else what PyTorch asks of a batch before it calls cuDNN becomes a limit of the fused model, on a GPU alone."""
    seen, export = [], torch.export.export

    def watching(*given, **options):
        seen.append(torch.backends.cudnn.enabled)
        return export(*given, **options)

    monkeypatch.setattr(torch.export, "export", watching)
    before = torch.backends.cudnn.enabled
    gpukern.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval(), torch.randn(2, 3, 9, 9))
    assert seen and not any(seen) and torch.backends.cudnn.enabled is before
