"""The demo's proof must fail when a kernel is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from gpukern.runtime.mode import Mode, force_mode
from models import kernel_check
from models.data import Samples
from models.kernel_check import Comparison, check
from models.lenet import LeNet5


@pytest.fixture
def in_fp32(monkeypatch):
    """fp32 on the CPU stands in for the kernels: quick, and off by as much as they are."""
    monkeypatch.setattr(kernel_check, "mode_of", lambda tensor: Mode.KERNELS)
    with force_mode(Mode.REFERENCE):
        yield


@pytest.fixture
def samples():
    return Samples(torch.randn(4, 1, 28, 28), torch.tensor([3, 1, 4, 1]))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_rounding_errors_pass(in_fp32, samples, batch_norm):
    model = LeNet5(batch_norm=batch_norm)
    comparisons = check(model, samples)
    assert [c.tensor for c in comparisons] == ["logits", *(f"∂L/∂{name}" for name, _ in model.named_parameters())]
    assert all(c.ok and 0 < c.error < c.bound < 1e-4 for c in comparisons)


def rounded(output):
    return output.bfloat16().float()


def last_column_lost(output):
    return torch.nn.functional.pad(output[..., :-1], (0, 1))


LAYERS = ("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2")


@pytest.mark.parametrize("layer", [*LAYERS, "bn1", "bn3"])
@pytest.mark.parametrize("mistake", [rounded, last_column_lost, lambda output: output + 1e-3, lambda output: -output])
def test_wrong_layer_fails(in_fp32, samples, layer, mistake):
    model = LeNet5(batch_norm=layer not in LAYERS)
    model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: mistake(output) if output.dtype is torch.float32 else None
    )
    assert not all(comparison.ok for comparison in check(model, samples))


@pytest.mark.parametrize("parameter", ["conv1.weight", "conv1.bias", "conv2.weight", "fc1.weight", "fc2.bias"])
def test_wrong_gradient_fails(in_fp32, samples, parameter):
    model = LeNet5()
    model.get_parameter(parameter).register_hook(lambda gradient: gradient * (1 + 2e-4))
    failed = [comparison.tensor for comparison in check(model, samples) if not comparison.ok]
    assert failed == [f"∂L/∂{parameter}"]


def test_undecided_relu_does_not_fail(in_fp32, samples):
    """Pre-activations of 0 within rounding come out on either side of it, which is no mistake of a kernel."""
    model = LeNet5()
    with torch.no_grad():
        samples.images.fill_(0.1)
        model.conv1.bias.sub_(model.conv1(samples.images)[0, :, 14, 14])
    assert all(comparison.ok for comparison in check(model, samples))


def test_nan_fails():
    assert not Comparison("logits", math.nan, 1.0).ok


def test_reference_mode_proves_nothing(samples):
    with force_mode(Mode.REFERENCE), pytest.raises(RuntimeError, match="reference mode"):
        check(LeNet5(), samples)
