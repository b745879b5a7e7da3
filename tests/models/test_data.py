"""The two sources of digits: a fixed split of scikit-learn's, and IDX files with every way in which they break."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
import torch

from models import data
from tests.models.idx import digits_like, idx_bytes, write_dataset


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load()


def test_digits_are_1797_images_of_28_by_28(digits):
    assert (len(digits.train), len(digits.held_out)) == (1437, 360)
    assert digits.train.images.shape == (1437, 1, 28, 28)
    assert digits.held_out.images.shape == (360, 1, 28, 28)
    assert digits.train.images.dtype is torch.float32
    assert digits.train.labels.dtype is torch.int64


def test_split_is_fixed_and_stratified(digits):
    labels = digits.held_out.labels.numpy().astype(np.uint8)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "70ee2850bb25b543"
    assert np.bincount(labels).min() >= 35
    assert np.bincount(labels).max() <= 37
    assert data.load().fingerprint == digits.fingerprint


def test_no_held_out_image_is_trained_on(digits):
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out.images)


def test_training_set_has_zero_mean_and_unit_variance(digits):
    assert abs(digits.train.images.double().mean().item()) < 1e-6
    assert digits.train.images.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert digits.held_out.images.mean().item() != pytest.approx(0, abs=1e-6)  # it gets the training set's


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_idx_files_under_all_their_names(tmp_path, mark, packed):
    samples = data.load(write_dataset(tmp_path, 30, 10, mark, packed))
    images, labels = digits_like(30)
    assert torch.equal(samples.train.labels, torch.from_numpy(labels))
    restored = samples.train.images[:, 0].double() * images.std() + images.mean()
    assert np.allclose(restored, images, atol=1e-3)
    assert (len(samples.held_out), samples.name) == (10, str(tmp_path))


def test_fingerprint_tells_data_sets_apart(tmp_path):
    first = data.load(write_dataset(tmp_path / "a", 30, 10))
    same = data.load(write_dataset(tmp_path / "b", 30, 10, packed=True))
    other = data.load(write_dataset(tmp_path / "c", 31, 10))
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_file_is_named(tmp_path, name):
    (write_dataset(tmp_path, 4, 4) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        data.load(tmp_path)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")


IMAGES, LABELS = digits_like(4)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:-1], "truncated: 3151 bytes, the header announces 3152"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:9], "truncated: 9 bytes"),
        ("train-images-idx3-ubyte", b"", "truncated: 0 bytes"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES) + b"x", "too long"),
        (
            "train-images-idx3-ubyte",
            idx_bytes(LABELS).ljust(40),
            "expected the magic number 0x00000803, got 0x00000801",
        ),
        ("train-labels-idx1-ubyte", b"\x89PNG\r\n\x1a\n....", "expected the magic number 0x00000801, got 0x89504e47"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES[:, :27]), "expected images of 28 × 28, got 27 × 28"),
        ("train-labels-idx1-ubyte", idx_bytes(LABELS[:3]), "3 labels for the 4 images"),
        ("train-labels-idx1-ubyte", idx_bytes(np.array([0, 1, 26, 2])), "expected labels 0 to 9, got 26"),
        ("train-images-idx3-ubyte", idx_bytes(np.full((4, 28, 28), 7)), "all their pixels are the same"),
    ],
)
def test_broken_file_is_named_with_its_problem(tmp_path, name, content, problem):
    (write_dataset(tmp_path, 4, 4) / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as raised:
        data.load(tmp_path)
    assert (name if "pixels" not in problem else str(tmp_path)) in str(raised.value)


def test_empty_set(tmp_path):
    write_dataset(tmp_path, 0, 4)
    with pytest.raises(ValueError, match="no samples"):
        data.load(tmp_path)


@pytest.mark.parametrize("content", [b"plain", gzip.compress(idx_bytes(IMAGES))[:-200], b""])
def test_broken_gzip_is_named(tmp_path, content):
    name = "train-images-idx3-ubyte.gz"
    (write_dataset(tmp_path, 4, 4, packed=True) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        data.load(tmp_path)
