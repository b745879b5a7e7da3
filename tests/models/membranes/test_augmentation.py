"""Augmented images are moved as they should be, labels and weights with them, and again from the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.membranes.augment import Augmentation

#: What moves nothing and changes no intensity.
STILL = {"elastic": 0, "rotation": 0, "flip": False, "gain": 0, "bias": 0, "gamma": 0}


def given(*shape, dtype=torch.float64):
    """Images, labels and weights of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(*shape, dtype=dtype, generator=generator)
    return images, torch.rand(*shape, generator=generator) > 0.3, torch.rand(*shape, dtype=dtype, generator=generator)


def moved_by(monkeypatch, corners, angle=0.0, mirrored=1.0, moves=0.0, count=2, size=None):
    """An augmentation that draws these numbers."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = np.array([[cosine, -sine * mirrored], [sine, cosine * mirrored]])
    augment = Augmentation(size, **(STILL | {"rotation": 1}))
    draws = np.array([corners] * count), np.array([matrix] * count), np.zeros((count, 2, 3, 3)) + moves
    monkeypatch.setattr(augment, "_draw", lambda *arguments: draws)
    return augment


def test_nothing_changes_at_zero_strength():
    images, labels, weights = given(3, 1, 20, 17, dtype=torch.float32)
    found = Augmentation(**STILL)(images, labels, weights)
    assert all(torch.equal(one, other) for one, other in zip(found, (images, labels, weights), strict=True))
    assert Augmentation(**STILL)(images)[1:] == (None, None)


@pytest.mark.parametrize("shape", [(16, 16), (15, 15)])
def test_a_quarter_turn_is_that_of_torch(monkeypatch, shape):
    images, labels, weights = given(2, 1, *shape)
    found = moved_by(monkeypatch, (0, 0), angle=90)(images, labels[:, 0], weights)
    for one, other in zip(found, (images, labels[:, 0], weights), strict=True):
        torch.testing.assert_close(one, torch.rot90(other, -1, (-2, -1)), rtol=0, atol=1e-12)


def test_images_are_mirrored_or_not():
    images, labels, weights = given(40, 1, 12, 14)
    found = Augmentation(**(STILL | {"flip": True}))(images, labels, weights)
    mirrored = torch.tensor([torch.equal(one, other.flip(2)) for one, other in zip(found[1], labels, strict=True)])
    assert 5 < mirrored.sum() < 35
    for one, other in zip(found, (images, labels, weights), strict=True):
        wanted = torch.where(mirrored[:, None, None, None], other.flip(3), other)
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-12)


def test_turns_are_rigid_and_of_any_angle():
    for rotation, flip in ((180, True), (30, False)):
        _, matrices, _ = Augmentation(rotation=rotation, flip=flip)._draw(np.random.default_rng(0), 400, (9, 9), (9, 9))
        np.testing.assert_allclose(matrices @ matrices.transpose(0, 2, 1), np.tile(np.eye(2), (400, 1, 1)), atol=1e-12)
        mirrored = np.linalg.det(matrices) < 0
        assert 150 < mirrored.sum() < 250 if flip else not mirrored.any()
        angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
        assert 0.97 * rotation < angles.max() <= rotation and -rotation <= angles.min() < -0.97 * rotation


def test_an_image_of_one_row_is_moved_too():
    images = torch.rand(2, 1, 1, 9)
    assert Augmentation()(images)[0].isfinite().all()


def test_beyond_an_image_is_its_mirror_image(monkeypatch):
    images, labels, weights = given(2, 1, 12, 14)
    moves = np.array([-4.0, 5.0])[None, :, None, None]
    found = moved_by(monkeypatch, (0, 0), moves=moves)(images, labels, weights)
    for one, other in zip(found, (images, labels, weights), strict=True):
        wanted = np.pad(other.numpy(), ((0, 0), (0, 0), (4, 0), (0, 5)), mode="reflect")[:, :, :12, 5:]
        torch.testing.assert_close(one, torch.from_numpy(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("moving", [False, True])
def test_windows_show_what_is_there(monkeypatch, moving):
    images, labels, weights = given(2, 1, 12, 14)
    augment = moved_by(monkeypatch, (3, 6), size=(5, 7))
    if not moving:
        augment.rotation = 0
    for one, other in zip(augment(images, labels, weights), (images, labels, weights), strict=True):
        torch.testing.assert_close(one, other[:, :, 3:8, 6:13], rtol=0, atol=1e-12)


def test_windows_are_everywhere_and_of_the_size():
    ramp = torch.arange(10.0).expand(300, 1, 8, 10) / 10
    found, _, _ = Augmentation((8, 4), **STILL)(ramp)
    assert found.shape == (300, 1, 8, 4)
    assert set((10 * found[:, 0, 0, 0]).round().int().tolist()) == set(range(7))


def test_displacements_are_those_drawn_at_the_nodes_and_smooth_between():
    strength, images = 4.0, torch.zeros(200, 1, 129, 129, dtype=torch.float64)
    augment = Augmentation(33, **(STILL | {"elastic": strength}))
    _, _, moves = augment._draw(np.random.default_rng([0, 0]), 200, (129, 129), (33, 33))
    assert abs(moves.mean()) < 5 * strength / 3600**0.5
    assert abs(moves.std() - strength) < 5 * strength / 7200**0.5
    ramp = torch.arange(129, dtype=torch.float64)
    for axis, places in enumerate((ramp[:, None].expand(129, 129), ramp.expand(129, 129))):
        augment.step = 0
        _, _, weights = augment(images, None, places.expand(200, 1, 129, 129))
        # Weights are interpolated linearly, so that they tell where they come from.
        own = torch.arange(33, dtype=torch.float64)
        displaced = weights[:, 0] - (own[:, None] if axis == 0 else own)
        corners = augment._draw(np.random.default_rng([0, 0]), 200, (129, 129), (33, 33))[0][:, axis]
        displaced -= torch.from_numpy(corners)[:, None, None]
        inside = ((corners > 25) & (corners < 70))[:, None, None].nonzero()[0]
        nodes = displaced[inside][:, ::16, ::16]
        torch.testing.assert_close(nodes, torch.from_numpy(moves[inside, axis]), rtol=0, atol=1e-9)
        assert displaced[inside].diff(dim=2).abs().max() < 3 * np.abs(moves).max() / 16


def test_labels_and_weights_move_with_the_images():
    down, across = np.mgrid[:96, :96]
    cells = torch.from_numpy(np.hypot(down % 32 - 15.5, across % 32 - 15.5) < 12).expand(6, 1, 96, 96)
    found, labels, weights = Augmentation(**(STILL | {"elastic": 6, "rotation": 180, "flip": True}))(
        cells.float(), cells, cells.float()
    )
    assert labels.dtype == torch.bool and 0.3 < labels.float().mean() < 0.6
    assert (labels != cells).float().mean() > 0.1
    assert found.min() >= 0 and found.max() <= 1
    for other in (found, weights):
        assert ((other > 0.5) == labels).float().mean() > 0.98
    classes = Augmentation()(cells.float(), cells[:, 0].long() * 3)[1]
    assert classes.dtype == torch.int64 and set(classes.unique().tolist()) == {0, 3}


def test_large_numbers_of_cells_are_kept():
    cells = torch.tensor([0, 2**24 + 1])[(torch.rand(2, 30, 40) > 0.5).long()]
    moved = Augmentation(16)(torch.rand(2, 1, 30, 40), cells.int())[1]
    assert moved is not None and moved.dtype is torch.int32
    assert moved.unique().tolist() == [0, 2**24 + 1]


def test_intensities_follow_the_formula_and_stay_in_their_range():
    images = torch.linspace(0, 1, 11, dtype=torch.float64).expand(500, 1, 2, 11)
    lit, labels, _ = Augmentation(**(STILL | {"gain": 0.2}))(images, images[:, 0] > 0.5)
    slopes = (lit[:, 0, 0, 6] - lit[:, 0, 0, 4]) / 0.2
    assert 0.8 <= slopes.min() < 0.82 and 1.18 < slopes.max() <= 1.2
    assert torch.equal(labels, images[:, 0] > 0.5) and lit[:, 0, 0, 5].sub(0.5).abs().max() < 1e-12
    lit = Augmentation(**(STILL | {"bias": 0.1}))(images)[0]
    offsets = lit[:, 0, 0, 5] - 0.5
    assert -0.1 <= offsets.min() < -0.09 and 0.09 < offsets.max() <= 0.1
    lit = Augmentation(**(STILL | {"gamma": 0.5}))(images)[0]
    powers = lit[:, 0, 0, 5].log() / math.log(0.5)
    assert math.exp(-0.5) <= powers.min() < 0.63 and 1.6 < powers.max() <= math.exp(0.5)
    assert lit[:, 0, 0, 0].max() < 1e-12 and lit[:, 0, 0, 10].min() > 1 - 1e-12
    assert Augmentation(**(STILL | {"gamma": 0.5}))(images - 0.1)[0].isfinite().all()
    lit = Augmentation(gain=0.9, bias=3, gamma=2)(images)[0]
    assert lit.min() == 0 and lit.max() == 1


def test_a_seed_and_a_step_repeat_every_bit():
    batch = given(3, 1, 24, 24, dtype=torch.float32)
    first, second = Augmentation(16, seed=5), Augmentation(16, seed=5)
    calls = [first(*batch) for _ in range(3)]
    for one, other in zip(calls[0], second(*batch), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(calls[0][0], calls[1][0])
    assert not torch.equal(calls[0][0], Augmentation(16, seed=6)(*batch)[0])
    resumed = Augmentation(16)
    resumed.load_state_dict(second.state_dict())
    assert torch.equal(resumed(*batch)[0], calls[1][0])
    # Labels and weights do not change what is drawn.
    assert torch.equal(resumed(batch[0])[0], calls[2][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_computed_in_32(dtype):
    images = given(2, 1, 24, 24)[0].to(dtype)
    found, wanted = Augmentation()(images)[0], Augmentation()(images.float())[0]
    assert found.dtype == dtype
    assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(2, 8, 8)}, ValueError, r"expected images \[N, 1, H, W\]"),
        ({"images": torch.zeros(2, 3, 8, 8)}, ValueError, r"expected images \[N, 1, H, W\]"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, TypeError, "floats from 0 to 1, got torch.uint8"),
        ({"labels": torch.zeros(2, 8, 9)}, ValueError, r"expected labels for images \[2, 1, 8, 8\], got \[2, 8, 9\]"),
        ({"labels": torch.zeros(1, 8, 8)}, ValueError, "expected labels"),
        ({"weights": torch.zeros(2, 2, 8, 8)}, ValueError, "expected weights"),
        ({"weights": torch.zeros(2, 8, 8, dtype=torch.int64)}, TypeError, "weights of floats"),
        ({"images": torch.zeros(2, 1, 5, 8)}, ValueError, "images of 5 × 8 are smaller than 6 × 6"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, error, words):
    augment = Augmentation(6)
    with pytest.raises(error, match=words):
        augment(**({"images": torch.zeros(2, 1, 8, 8)} | change))
    assert augment.step == 0


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"elastic": -1}, {"rotation": math.inf}, {"gain": 1}, {"bias": -1}, {"gamma": math.nan}, {"grid": 1},
     {"seed": -1}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be|{next(iter(options))} at least"):
        Augmentation(**options)
