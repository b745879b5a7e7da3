"""Volumes of sections and labels, from every kind of folder; what does not fit is refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.datasets import places
from models.membranes import volumes
from models.membranes.volumes import Volume

tifffile = pytest.importorskip("tifffile", reason="pip install tifffile")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")


@pytest.fixture
def sections():
    """Twelve images, each of which says its number, and labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 8, 9), np.uint8)
    images[:, 0, 0] = range(12)
    return images, random.random((12, 8, 9)) > 0.3


def write(folder, pictures, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.{ending}")


def masks(labels):
    return labels.astype(np.uint8) * 255


@pytest.mark.parametrize(
    ("images_in", "labels_in", "ending"),
    [("train/image", "train/label", "png"), ("images", "masks", "tif"), ("image", "labels", "tiff")],
)
def test_folders_of_pictures_are_in_the_order_of_their_numbers(tmp_path, sections, images_in, labels_in, ending):
    images, labels = sections
    write(tmp_path / images_in, images, ending)
    write(tmp_path / labels_in, masks(labels))  # PNG beside TIFF: only their names count
    volume = volumes.load(tmp_path)
    np.testing.assert_array_equal(volume.images, images)
    np.testing.assert_array_equal(volume.labels, labels)
    assert volume.labels.dtype == bool and volume.name == tmp_path.name and volume.path == tmp_path
    assert len(volume) == 12


def test_volumes_of_the_challenge_are_read(tmp_path, sections):
    images, labels = sections
    voxel = volumes.Voxel(50, 4, 4)
    volumes.save_tiff(tmp_path / "train-volume.tif", images, voxel)
    assert volumes.load(tmp_path).labels is None
    volumes.save_tiff(tmp_path / "train-labels.tif", masks(labels))
    volume = volumes.load(tmp_path)
    np.testing.assert_array_equal(volume.images, images)
    np.testing.assert_array_equal(volume.labels, labels)
    assert volume.voxel == pytest.approx(voxel)
    alone = volumes.load(tmp_path / "train-volume.tif")
    assert alone.labels is None and alone.name == "train-volume"
    np.testing.assert_array_equal(alone.images, images)


def test_a_folder_without_labels_is_images_alone(tmp_path, sections):
    write(tmp_path, sections[0])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._0.png").touch()  # what macOS leaves behind
    volume = volumes.load(tmp_path)
    np.testing.assert_array_equal(volume.images, sections[0])
    assert volume.labels is None


def test_open_images_maps_one_tiff_and_reads_the_rest(tmp_path, sections):
    images, labels = sections
    write(tmp_path / "images", images)
    write(tmp_path / "labels", masks(labels))
    np.testing.assert_array_equal(volumes.open_images(tmp_path), images)
    volumes.save_tiff(tmp_path / "big.tif", images)
    mapped = volumes.open_images(tmp_path / "big.tif")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, images)
    tifffile.imwrite(tmp_path / "deep.tif", images.astype(np.int32), photometric="minisblack")
    with pytest.raises(ValueError, match=r"deep\.tif: expected images of 8 or 16 bits"):
        volumes.open_images(tmp_path / "deep.tif")


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[0, 1], [1, 1]], np.uint8),
        np.array([[0, 255], [255, 255]], np.uint8),
        np.array([[0, 65535], [65535, 65535]], np.uint16),
        np.array([[0, 7], [3, 200]], np.uint8),  # numbers of cells
        np.array([[0, 1], [2, 70000]], np.int32),
        np.array([[0, 1], [1, 1]], np.float32),
        np.array([[False, True], [True, True]]),
    ],
)
def test_labels_are_inside_where_they_are_above_0(tmp_path, labels):
    np.testing.assert_array_equal(volumes.inside(labels, tmp_path), [[False, True], [True, True]])


def test_labels_of_one_value_are_taken(tmp_path):
    assert volumes.inside(np.full((2, 2), 255, np.uint8), tmp_path).all()
    assert not volumes.inside(np.zeros((2, 2), np.uint8), tmp_path).any()


def test_masks_with_grey_edges_are_refused(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[8:56, 8:56] = 255
    assert volumes.inside(mask, tmp_path).any()
    mask[8, 8:56] = 128
    with pytest.raises(ValueError, match=r"m\.png: a mask with 1 values between 0 and 255"):
        volumes.inside(mask, tmp_path / "m.png")
    # The 255th of many cells is no mask.
    cells = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 16
    assert volumes.inside(cells.astype(np.uint8), tmp_path).mean() == 255 / 256


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([1, 2], np.uint8), "0 and another number, got 1 and 2"),
        (np.array([-1, 0, 3], np.int16), "whole numbers from 0, got -1"),
        (np.array([0, 0.5, 1], np.float32), "whole numbers"),
        (np.array([0, np.nan], np.float32), "whole numbers"),
    ],
)
def test_labels_of_unclear_meaning_are_refused(tmp_path, labels, words):
    with pytest.raises(ValueError, match=rf"m\.png: expected labels .*{words}"):
        volumes.inside(labels[None], tmp_path / "m.png")


def break_labels_size(folder, images, labels):
    Image.fromarray(masks(labels[3, :5])).save(folder / "labels/3.png")


def break_labels_count(folder, images, labels):
    volumes.save_tiff(folder / "labels/3.tif", masks(labels[:2]))
    (folder / "labels/3.png").unlink()


def break_images_size(folder, images, labels):
    Image.fromarray(images[3, :5]).save(folder / "images/3.png")


def break_images_dtype(folder, images, labels):
    Image.fromarray(images[3].astype(np.uint16)).save(folder / "images/3.png")


def break_images_depth(folder, images, labels):
    tifffile.imwrite(folder / "images/3.tif", images[3].astype(np.int32))
    (folder / "images/3.png").unlink()


def break_images_range(folder, images, labels):
    tifffile.imwrite(folder / "images/3.tif", images[3].astype(np.float32))
    (folder / "images/3.png").unlink()


def break_label_missing(folder, images, labels):
    (folder / "labels/3.png").unlink()


def break_image_missing(folder, images, labels):
    (folder / "images/3.png").unlink()


def break_twice(folder, images, labels):
    volumes.save_tiff(folder / "images/3.tif", images[3])


def break_empty(folder, images, labels):
    for file in (folder / "images").iterdir():
        file.unlink()


def break_no_labels(folder, images, labels):
    (folder / "labels").rename(folder / "truth")


def break_damaged(folder, images, labels):
    file = folder / "images/3.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (break_labels_size, "labels/3.png: 1 × 5 × 9 labels for 1 × 8 × 9 pixels of 3.png"),
        (break_labels_count, "labels/3.tif: 2 × 8 × 9 labels for 1 × 8 × 9 pixels of 3.png"),
        (break_images_size, "images/3.png: 5 × 9 uint8, but 0.png is 8 × 9 uint8"),
        (break_images_dtype, "images/3.png: 8 × 9 uint16, but 0.png is 8 × 9 uint8"),
        (break_images_depth, "images/3.tif: expected images of 8 or 16 bits, or floats from 0 to 1, got int32"),
        (
            break_images_range,
            "images/3.tif: floats must be from 0 to 1, got 2 to 251: divide them, or save 8 or 16 bits",
        ),
        (break_label_missing, "images/3.png: no label of this name in "),
        (break_image_missing, "labels/3.png: no image of this name in "),
        (break_twice, "images/3.tif: 3.png beside it has the same name"),
        (break_empty, "images: no pictures (.tif, .tiff, .png) in it"),
        (break_no_labels, "images: no folder label or labels or mask or masks beside it"),
        (break_damaged, "images/3.png: truncated, damaged or no PNG"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, sections, break_it, words):
    images, labels = sections
    write(tmp_path / "images", images)
    write(tmp_path / "labels", masks(labels))
    volumes.load(tmp_path)
    break_it(tmp_path, images, labels)
    with pytest.raises(ValueError, match=re.escape(words)):
        volumes.load(tmp_path)


def test_missing_and_empty_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
        volumes.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no pictures .*, no folders images and labels of them, and no train-volume"):
        volumes.load(tmp_path)


def test_the_data_of_the_challenge_are_the_default(tmp_path, sections, monkeypatch):
    write(tmp_path / "train/image", sections[0])
    write(tmp_path / "train/label", masks(sections[1]))
    monkeypatch.setenv(volumes.VARIABLE, str(tmp_path))
    volume = volumes.load()
    np.testing.assert_array_equal(volume.labels, sections[1])
    assert volume.voxel == (50, 4, 4) and volumes.load(tmp_path).voxel is None


def test_find_looks_at_the_variable_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv(volumes.VARIABLE, str(tmp_path))
    assert volumes.find() == tmp_path
    monkeypatch.setenv(volumes.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/isbi2012").mkdir(parents=True)
    assert volumes.find() == volumes.Path("data/isbi2012")
    monkeypatch.delenv(volumes.VARIABLE)
    assert volumes.find() == volumes.Path("data/isbi2012")
    (tmp_path / "data/isbi2012").rmdir()
    monkeypatch.setattr(places, "__file__", str(tmp_path / "models/datasets/places.py"))
    with pytest.raises(FileNotFoundError, match=rf"data/isbi2012.*{volumes.VARIABLE}"):
        volumes.find()
    monkeypatch.setenv(volumes.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=rf"none, which the variable {volumes.VARIABLE} names: no such folder"):
        volumes.find()


def test_split_keeps_the_order_and_holds_out_the_end():
    images = np.arange(30, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    volume = Volume(images, images > 3, "tissue")
    for parts in (volume.split(), volume.split(24)):
        assert [list(part.images[:, 0, 0]) for part in parts] == [[*range(24)], [*range(24, 30)]]
        assert [part.labels.sum() // 16 for part in parts] == [20, 6]
        assert [part.name for part in parts] == ["tissue, sections 1 to 24", "tissue, sections 25 to 30"]
    assert [len(part) for part in Volume(images[:10], None, "ten").split()] == [8, 2]
    assert [part.name for part in Volume(images[:2], None, "two").split()] == ["two, section 1", "two, section 2"]
    for few, train in ((1, None), (10, 10), (10, 0), (10, 24)):
        with pytest.raises(ValueError, match="cannot be split"):
            Volume(images[:few], None, "few").split(train)


def test_volumes_of_other_shapes_and_dtypes_are_refused():
    images = np.zeros((2, 4, 4), np.uint8)
    for wrong in (images[0], images[:0]):
        with pytest.raises(ValueError, match="expected images"):
            Volume(wrong, None, "a")
    with pytest.raises(TypeError, match="uint8, uint16 or float32, got int64"):
        Volume(images.astype(int), None, "a")
    with pytest.raises(TypeError, match="labels of bool, got uint8"):
        Volume(images, images, "a")
    with pytest.raises(ValueError, match="different shapes"):
        Volume(images, images[:1] > 0, "a")


def test_normalized_images_are_from_0_to_1():
    bytes_ = np.array([[[0, 51, 255]]], np.uint8)
    np.testing.assert_array_equal(Volume(bytes_, None, "a").normalized(), np.float32([[[0, 0.2, 1]]]))
    floats = np.array([[[0, 0.25, 1]]], np.float32)
    np.testing.assert_array_equal(volumes.to_unit(floats), floats)
    with pytest.raises(ValueError, match="from 0 to 1, got 0 to 2"):
        volumes.to_unit(2 * floats)
    with pytest.raises(ValueError, match="from 0 to 1"):
        volumes.to_unit(floats * np.nan)
    with pytest.raises(TypeError, match="got int64"):
        volumes.to_unit(np.zeros((1, 2, 2), int))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_stretched_between_percentiles(order):
    values = np.arange(1000, 5000, dtype=np.uint16).reshape(40, 10, 10)
    bright = values.copy()
    bright[0, 0, 0] = 65535  # one hot pixel
    unit = volumes.to_unit(bright.astype(f"{order}u2"))
    assert unit.dtype == np.float32 and unit.min() == 0 and unit.max() == 1
    low, high = volumes.limits(bright)
    assert 1000 <= low < 1100 and 4900 < high <= 5000
    section = volumes.to_unit(bright[7], (low, high))
    np.testing.assert_array_equal(section, unit[7])
    np.testing.assert_allclose(section, (values[7] - low) / (high - low), atol=1e-6)
    assert not volumes.to_unit(np.full((2, 3, 3), 700, np.uint16)).any()
