"""U-Net as published, with valid convolutions, and Ciresan's network of patches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import gpukern
from models.ciresan import CiresanN4
from models.unet import UNet

pytestmark = pytest.mark.usefixtures("reference_mode")


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_unet_of_valid_convolutions_is_the_papers():
    unet = on_meta(lambda: UNet(1, padding="valid", batch_norm=False, dropout=0.5))
    assert unet(torch.empty(1, 1, 572, 572, device="meta")).shape == (1, 2, 388, 388)
    # 23 convolutions with biases: the published network's.
    assert sum(parameter.numel() for parameter in unet.parameters()) == 31_030_658
    assert sum(isinstance(layer, torch.nn.Dropout) for layer in unet.modules()) == 2
    assert unet.margin == 92 and unet.fitting(388) == 388 and unet.fitting(389) == 404


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unet_sizes_that_fit_are_all_that_fit(depth):
    unet = on_meta(lambda: UNet(1, width=1, depth=depth, padding="valid", batch_norm=False))
    possible = []
    for side in range(1, 130):
        try:
            output = unet(torch.empty(1, 1, side, side, device="meta")).shape[2]
        except ValueError as error:
            assert f"no images of {side} × {side}" in str(error)
        else:
            assert side - output == 2 * unet.margin
            possible.append(output)
    assert possible[0] <= 4 and {b - a for a, b in pairwise(possible)} == {2**depth}
    assert [unet.fitting(wanted) for wanted in range(1, possible[-1] + 1)] == [
        next(side for side in possible if side >= wanted) for wanted in range(1, possible[-1] + 1)
    ]


def test_unet_of_valid_convolutions_sees_no_border():
    """An output pixel is the same wherever it is in an image: shifted by a multiple of what the pools halve."""
    torch.manual_seed(0)
    unet = UNet(1, width=4, depth=2, padding="valid").eval().double()
    image = torch.randn(1, 1, 60, 64, dtype=torch.float64)
    whole, part = unet(image), unet(image[:, :, 8:56, 4:])
    assert whole.shape[2:] == (20, 24) and part.shape[2:] == (8, 20)
    torch.testing.assert_close(part, whole[:, :, 8:16, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"padding": "full"}, {"depth": 0}])
def test_unet_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        UNet(**options)


def test_ciresan_n4_is_the_papers():
    network = on_meta(CiresanN4)
    assert network(torch.empty(2, 1, 95, 95, device="meta")).shape == (2, 2)
    summary = gpukern.summary(network, (1, 95, 95))
    # By hand: 92²·48·16 + 42²·48²·25 + 18²·48²·16 + 6²·48²·16 + 432·200 + 400.
    assert "121,464,592" in str(summary)
    assert sum(parameter.numel() for parameter in network.parameters()) == 219_290
    assert 2 * CiresanN4.MARGIN + 1 == CiresanN4.PATCH
