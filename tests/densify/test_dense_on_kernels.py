"""Dense networks on the kernels: no test here may ask for the reference mode, which lasts for a whole file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import profile

from gpukern.densify import dense
from tests.densify.patches import FACTOR, assert_equals_patches, by_patches
from tests.densify.random_networks import RandomClassifier

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("seed", range(0, 30, 5))
def test_random_networks_on_the_kernels_too(seed, layout, device, full_fp32):
    model = RandomClassifier(seed).eval()
    image = torch.randn(1, model.channels, model.patch[0] + 2, model.patch[1] + 1)
    network = dense(copy.deepcopy(model).to(device), model.patch)
    assert_equals_patches(network, model, image.to(device, memory_format=layout), torch.float32)


def small() -> nn.Sequential:
    """Of patches of 9 × 9, with each kind of window dilated."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Sigmoid(),
        nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_the_kernels_are_those_of_all_patches(layout, device, full_fp32):
    model = small().eval()
    image = torch.randn(1, 2, 11, 10)
    wanted = torch.randn(1, 3, 3, 2, dtype=torch.float64)

    def gradients(function, model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
        image = image.detach().requires_grad_()
        loss = (function(image) * wanted.to(image)).sum()
        found = torch.autograd.grad(loss, [image, *model.parameters()])
        return [gradient.double().cpu() for gradient in found]

    doubled = copy.deepcopy(model).double()
    exact = gradients(lambda x: by_patches(doubled, x, (9, 9)), doubled, image.double())
    rounded = gradients(lambda x: by_patches(model, x, (9, 9)), model, image)
    network = dense(copy.deepcopy(model).to(device), 9)
    ours = gradients(network, network, image.to(device, memory_format=layout))
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= FACTOR * ((theirs - truth).abs().max() + unit)


def test_no_convolution_or_pool_of_torch_runs_in_the_place_of_a_kernel(device):
    network, image = dense(small().to(device), 9), torch.randn(1, 2, 10, 10, device=device, requires_grad=True)
    with profile() as seen:
        network(image).sum().backward()
    names = {event.name.lower() for event in seen.events()}
    assert len(names) > 3
    assert not {name for name in names if name.startswith(("aten::", "cudnn")) and ("conv" in name or "pool" in name)}
