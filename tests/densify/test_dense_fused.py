"""``gpukern.fuse`` of dense networks: everything that multiplies is a group on gpukern's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpukern
from gpukern.densify import dense

pytestmark = pytest.mark.usefixtures("reference_mode")

PATCH = 19


def classifier() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5), nn.BatchNorm1d(5), nn.SiLU(),
        nn.Dropout(), nn.Linear(5, 3),
    )  # fmt: skip
    for layer in (model[1], model[9]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def network() -> gpukern.DenseNetwork:
    torch.manual_seed(0)
    return dense(classifier(), PATCH)


@pytest.fixture(scope="module")
def fused(network, reference_mode) -> gpukern.FusedModel:
    return gpukern.fuse(network, (torch.randn(2, 2, 25, 27),))


def test_dilated_layers_and_the_first_linear_one_are_groups_on_the_kernels(network, fused):
    assert [(tuple(group.modules), group.pattern, group.operator) for group in fused.report.fused] == [
        (("0", "1", "2"), "conv2d + batch_norm + relu", "gpukern::conv2d"),
        (("4", "5"), "conv2d + tanh", "gpukern::conv2d"),
        (("8", "9", "10"), "conv2d + batch_norm + silu", "gpukern::conv2d"),
    ]
    assert not fused.report.not_fused
    image = torch.randn(3, 2, 25, 27)
    assert torch.allclose(fused(image), network(image), rtol=1e-4, atol=1e-5)


def test_nothing_that_computes_is_left_to_torch(fused):
    called = [node.target for node in fused.module.network.graph.nodes if node.op == "call_function"]
    # The fourth is the average.
    kinds = ["conv2d", "max_pool2d", "conv2d", "conv2d", "conv2d", "conv2d"]
    assert [target.__name__ for target in called] == [f"call_{kind}" for kind in kinds]


def test_files_of_fused_networks_give_the_same(fused, tmp_path):
    fused.save(tmp_path / "x.pt2")
    image = torch.randn(1, 2, 25, 27)
    assert torch.equal(gpukern.load(tmp_path / "x.pt2")(image), fused(image))


def test_networks_with_a_border_are_fused_for_float16():
    network, image = dense(classifier(), PATCH, border="reflect"), torch.randn(1, 2, 20, 21)
    fused = gpukern.fuse(network, (image,), dtype=torch.float16)
    result = fused(image.half())
    assert len(fused.report.fused) == 3
    assert result.shape == (1, 3, 20, 21)
    # Three layers of float16, whose values are below 4.
    assert (result.float() - network(image)).abs().max() < 4 * 3 * 2**-10


def test_the_network_is_left_as_it_was_by_fusing(network, fused):
    assert type(network) is gpukern.DenseNetwork
    assert type(network.get_submodule("2")) is gpukern.nn.ReLU
