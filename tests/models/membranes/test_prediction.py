"""Probabilities of whole sections: tiles, mirrored borders, averaged views, patches, fused networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from models.ciresan import CiresanN4
from models.membranes.config import Config
from models.membranes.networks import INSIDE, NETWORKS, Network
from models.membranes.normalization import Normalization
from models.membranes.prediction import Options, Predictor

CPU = torch.device("cpu")
NORMAL = Normalization(0.4, 0.2)
SMALL = {
    "unet": Config(width=4, depth=2, precision="fp64"),
    "unet-valid": Config("unet-valid", width=4, depth=2, precision="fp64"),
    "ciresan": Config("ciresan", width=4, precision="fp64"),
}


def network(name, seed=0, **changes):
    torch.manual_seed(seed)
    made = Network(dataclasses.replace(SMALL[name], **changes), CPU)
    for layer in made.model.modules():  # statistics and biases of a network that has learned something
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    made.train(False)
    return made


def section(height, width, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(0, 1, (height, width)).astype(dtype)


@pytest.mark.parametrize("size", [(61, 50), (20, 37)])
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_give_the_whole_sections_probabilities(name, size, reference_mode):
    image, made = section(*size), network(name)
    whole = Predictor(made, NORMAL, size)(image)
    assert whole.shape == size and whole.dtype == np.float64 and 0 < whole.min() < whole.max() < 1
    calls = []
    tiled = Predictor(made, NORMAL, size, Options(tile=12), lambda: calls.append(1))
    # The same sums in float64, in another order at most.
    np.testing.assert_allclose(tiled(image), whole, rtol=1e-11)
    assert len(calls) == tiled.tiles > 4


def test_a_pixel_of_the_dense_network_is_that_of_its_patch(reference_mode):
    image, made = section(40, 33), network("ciresan")
    found = Predictor(made, NORMAL, image.shape)(image)
    # A section smaller than a patch: it is mirrored more than once.
    mirrored = np.pad(image, CiresanN4.MARGIN, mode="reflect")
    rng = np.random.default_rng(1)
    for row, column in zip(rng.integers(0, 40, 20), rng.integers(0, 33, 20), strict=True):
        patch = torch.from_numpy(mirrored[row : row + CiresanN4.PATCH, column : column + CiresanN4.PATCH].copy())
        alone = made.model(NORMAL(patch)[None, None]).softmax(1)[0, INSIDE].item()
        assert found[row, column] == pytest.approx(alone, rel=1e-11)


def test_an_average_of_eight_views_is_their_mean_turned_back(reference_mode):
    image, made = section(24, 36), network("unet")
    once = lambda seen: Predictor(made, NORMAL, seen.shape)(np.ascontiguousarray(seen))  # noqa: E731
    views = []
    for turns in range(4):
        views.append(np.rot90(once(np.rot90(image, turns)), -turns))
        views.append(np.rot90(np.fliplr(once(np.fliplr(np.rot90(image, turns)))), -turns))
    found = Predictor(made, NORMAL, image.shape, Options(average=8))(image)
    np.testing.assert_allclose(found, np.mean(views, 0), rtol=1e-12)
    assert np.abs(found - views[0]).max() > 1e-3, "views differ"
    # What is averaged over all views turns with the section.
    turned = Predictor(made, NORMAL, (36, 24), Options(average=8))(np.ascontiguousarray(np.rot90(image)))
    np.testing.assert_allclose(np.rot90(turned, -1), found, rtol=1e-10)


@pytest.mark.parametrize("name", ["unet", "ciresan"])
def test_a_fused_network_gives_the_same_probabilities(name, reference_mode):
    image = section(30, 30, dtype=np.float32)
    made = network(name, precision="fp32")
    plain = Predictor(made, NORMAL, image.shape)(image)
    fused = Predictor(made, NORMAL, image.shape, Options(fuse=True))(image)
    # fuse() proves its own bound; a logit's error of 1e-5 moves no probability by more than a quarter of it.
    assert fused.dtype == np.float32 and np.abs(fused - plain).max() < 1e-5


def test_mixed_precision_is_close_and_not_the_same(reference_mode):
    image = section(30, 30, dtype=np.float32)
    made = network("unet", precision="fp32")
    plain = Predictor(made, NORMAL, image.shape)(image)
    mixed = Predictor(made, NORMAL, image.shape, Options(dtype="bf16"))(image)
    assert 0 < np.abs(mixed - plain).max() < 0.1


@pytest.mark.parametrize(
    "options, said", [({"tile": 0}, "one pixel"), ({"average": 3}, "1 or 8"), ({"dtype": "int8"}, "unknown dtype")]
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Options(**options)
