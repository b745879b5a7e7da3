"""Random networks on images, in one pass and patch by patch."""

from __future__ import annotations

import pytest
import torch

from gpukern.densify import dense
from tests.densify.patches import assert_equals_patches
from tests.densify.random_networks import RandomClassifier


@pytest.mark.parametrize("seed", range(30))
def test_random_networks_give_what_they_give_for_every_patch(seed, reference_mode):
    model = RandomClassifier(seed).eval()
    image = torch.randn(1, model.channels, model.patch[0] + seed % 3, model.patch[1] + 4, dtype=torch.float64)
    network = dense(model.double(), model.patch)
    assert_equals_patches(network, model, image, torch.float64)
