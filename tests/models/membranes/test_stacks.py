"""Stacks of pictures in files: nothing is lost in silence, what is damaged is named."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest

from models.membranes import stacks

tifffile = pytest.importorskip("tifffile", reason="pip install tifffile")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_saved_stack_is_read_again_and_mapped(tmp_path, dtype):
    stack = noise(5, 7, 9, dtype=np.uint8).astype(dtype)
    file = tmp_path / "stack.tif"
    stacks.save_tiff(file, stack, stacks.Voxel(50, 4, 5))
    mapped = stacks.open_stack(file)
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert not isinstance(stacks.read(file), np.memmap)
    for again in (stacks.read(file), mapped):
        assert again.dtype == dtype
        np.testing.assert_array_equal(again, stack)
    assert stacks.read_voxel(file) == pytest.approx((50, 4, 5))
    assert [each.name for each in tmp_path.iterdir()] == ["stack.tif"]


def test_fiji_finds_sections_units_and_contrast(tmp_path):
    file = tmp_path / "probabilities.tif"
    stacks.save_tiff(file, np.full((5, 7, 9), 0.25), stacks.Voxel(50, 4, 4))
    with tifffile.TiffFile(file) as tiff:
        said = tiff.imagej_metadata
        assert tiff.series[0].axes == "ZYX" and tiff.series[0].dtype == np.float32
    wanted = {"slices": 5, "unit": "nm", "spacing": 50.0, "min": 0.0, "max": 1.0}
    assert {name: said[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("stack", "dtype", "highest"),
    [
        (np.eye(4) > 0, np.uint8, 255),
        (np.eye(4, dtype=np.float64), np.float32, 1),
        (np.eye(4, dtype=np.int32) * 300, np.uint16, 300),
    ],
)
def test_other_dtypes_become_those_of_imagej(tmp_path, stack, dtype, highest):
    stacks.save_tiff(tmp_path / "a.tif", stack)
    again = stacks.read(tmp_path / "a.tif")
    assert again.dtype == dtype and again.shape == (1, 4, 4)
    np.testing.assert_array_equal(again[0], np.eye(4) * highest)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (np.zeros((2, 3, 4, 5)), "expected a stack"),
        (np.zeros((0, 4, 5)), "expected a stack"),
        (np.full((4, 5), 65536), "16 bits do not hold"),
        (np.full((4, 5), -1), "16 bits do not hold"),
        (np.zeros((4, 5), complex), "expected numbers"),
    ],
)
def test_what_imagej_has_not_is_refused_and_the_old_file_left(tmp_path, stack, words):
    file = tmp_path / "a.tif"
    file.write_bytes(b"old")
    with pytest.raises(ValueError, match=words):
        stacks.save_tiff(file, stack)
    assert file.read_bytes() == b"old"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(path, *arguments, **options):
        path.write_bytes(b"half")
        raise OSError("no space left")

    file = tmp_path / "a.tif"
    file.write_bytes(b"old")
    monkeypatch.setattr(tifffile, "imwrite", fail)
    with pytest.raises(OSError, match="no space left"):
        stacks.save_tiff(file, np.zeros((4, 5)))
    assert [each.name for each in tmp_path.iterdir()] == ["a.tif"] and file.read_bytes() == b"old"


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True}, {"byteorder": ">"}])
def test_tiffs_of_all_kinds_are_read_in_the_order_of_this_machine(tmp_path, options):
    stack = noise(3, 6, 5, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    again = stacks.read(tmp_path / "a.tif")
    assert again.dtype.isnative
    np.testing.assert_array_equal(again, stack)
    np.testing.assert_array_equal(stacks.open_stack(tmp_path / "a.tif"), stack)


def test_white_stored_as_zero_is_turned_round(tmp_path):
    stack = noise(3, 6, 5)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="miniswhite")
    for again in (stacks.read(tmp_path / "a.tif"), stacks.open_stack(tmp_path / "a.tif")):
        np.testing.assert_array_equal(again, 255 - stack)
    tifffile.imwrite(tmp_path / "b.tif", stack.astype(np.float32), photometric="miniswhite")
    np.testing.assert_array_equal(stacks.read(tmp_path / "b.tif"), stack)


@pytest.mark.parametrize("share", [0.97, 0.8, 0.5, 0.01, 0])
@pytest.mark.parametrize("kind", ["imagej", "shaped", "zlib", "pages", "pillow"])
def test_truncated_tiffs_are_refused(tmp_path, kind, share):
    """tifffile gives the pages that it still finds, and says so in its log."""
    stack, file = noise(20, 32, 32), tmp_path / "a.tif"
    if kind == "imagej":
        stacks.save_tiff(file, stack)
    elif kind == "pages":
        with tifffile.TiffWriter(file) as writer:
            for section in stack:
                writer.write(section, photometric="minisblack", contiguous=False, metadata=None)
    elif kind == "pillow":
        first, *others = map(Image.fromarray, stack)
        first.save(file, save_all=True, append_images=others)
    else:
        tifffile.imwrite(file, stack, photometric="minisblack", compression="zlib" if kind == "zlib" else None)
    assert stacks.read(file).shape == stack.shape
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    for read in (stacks.read, stacks.open_stack):
        if kind == "imagej" and share == 0.97:  # only the directory behind the pixels is cut
            np.testing.assert_array_equal(read(file), stack)
            continue
        with pytest.raises(ValueError, match=r"a\.tif: truncated") as refused:
            read(file)
        assert str(refused.value).count("a.tif:") == 1


def test_nothing_is_left_in_the_log_of_tifffile(tmp_path):
    import logging

    before = list(logging.getLogger("tifffile").handlers)
    (tmp_path / "a.tif").write_bytes(b"no TIFF")
    with pytest.raises(ValueError, match="no TIFF"):
        stacks.read(tmp_path / "a.tif")
    assert logging.getLogger("tifffile").handlers == before


def test_pages_that_differ_are_refused(tmp_path):
    for number, other in enumerate((noise(4, 9), noise(8, 9, dtype=np.uint16))):
        file = tmp_path / f"{number}.tif"
        with tifffile.TiffWriter(file) as writer:
            for section in (noise(8, 9), other):
                writer.write(section, photometric="minisblack")
        with pytest.raises(
            ValueError, match=rf"{number}\.tif: its pages differ in size or type: 8×9 uint8, {len(other)}×9"
        ):
            stacks.read(file)


def test_pages_that_were_written_one_by_one_are_a_stack(tmp_path):
    pages, file = noise(4, 8, 9), tmp_path / "pages.tif"
    with tifffile.TiffWriter(file) as tiff:
        for page in pages:
            tiff.write(page)
    assert len(tifffile.TiffFile(file).series) == 4
    for read in (stacks.read, stacks.open_stack):
        np.testing.assert_array_equal(read(file), pages)


@pytest.mark.parametrize("ome", [False, True])
def test_several_stacks_in_a_file_are_refused(tmp_path, ome):
    with tifffile.TiffWriter(tmp_path / "two.tif", ome=ome) as tiff:
        for _ in range(2):
            tiff.write(noise(5, 8, 9), photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match=r"two\.tif: it holds several stacks: 5×8×9 uint8, 5×8×9 uint8"):
        stacks.read(tmp_path / "two.tif")
    with tifffile.TiffWriter(tmp_path / "white.tif") as tiff:
        for photometric in ("minisblack", "miniswhite"):
            tiff.write(noise(8, 9), photometric=photometric)
    with pytest.raises(ValueError, match=r"white\.tif: it holds several stacks"):
        stacks.read(tmp_path / "white.tif")


def test_animations_are_refused(tmp_path):
    first, *others = (Image.fromarray(picture) for picture in noise(3, 8, 9))
    first.save(tmp_path / "a.png", save_all=True, append_images=others)
    with pytest.raises(ValueError, match=r"a\.png: an animation of 3 pictures"):
        stacks.read(tmp_path / "a.png")


def test_channels_and_two_dimensions_of_stacks_are_refused(tmp_path):
    for axes, shape in (("ZCYX", (2, 3, 8, 9)), ("CYX", (3, 8, 9)), ("TZYX", (2, 3, 8, 9))):
        tifffile.imwrite(tmp_path / "a.tif", noise(*shape), imagej=True, metadata={"axes": axes})
        for read in (stacks.read, stacks.open_stack):
            with pytest.raises(ValueError, match=r"a\.tif: expected one stack of grey sections, got"):
                read(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colour_is_taken_only_where_there_is_none(tmp_path, name):
    grey = noise(6, 5)
    colour = np.repeat(grey[..., None], 3, 2)
    Image.fromarray(colour).save(tmp_path / name)
    np.testing.assert_array_equal(stacks.read(tmp_path / name), grey[None])
    colour[3, 2, 1] ^= 1
    Image.fromarray(colour).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: a picture in colour"):
        stacks.read(tmp_path / name)


def test_alpha_is_dropped_where_it_hides_nothing(tmp_path):
    grey = noise(6, 5)
    picture = np.stack([grey, np.full_like(grey, 255)], axis=2)
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(stacks.read(tmp_path / "a.png"), grey[None])
    picture[0, 0, 1] = 254
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="transparent"):
        stacks.read(tmp_path / "a.png")


def test_pngs_of_1_8_and_16_bits_and_of_a_palette_are_read(tmp_path):
    for picture in (noise(6, 5), noise(6, 5, dtype=np.uint16), noise(6, 5) > 99):
        Image.fromarray(picture).save(tmp_path / "a.png")
        again = stacks.read(tmp_path / "a.png")
        assert again.dtype == picture.dtype
        np.testing.assert_array_equal(again[0], picture)
    palette = Image.fromarray(noise(6, 5) % 2).convert("P")
    palette.putpalette([9, 9, 9, 200, 200, 200])
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(stacks.read(tmp_path / "a.png")[0], np.where(noise(6, 5) % 2, 200, 9))


def test_16_bits_of_colour_are_refused_not_cut_to_8(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(2 * 3 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    with pytest.raises(ValueError, match=r"a\.png: 16-bit colour"):
        stacks.read(tmp_path / "a.png")


def test_damaged_pngs_are_refused(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(noise(90, 90)).save(file)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[4000] ^= 255
    for damaged in (content[:-3000], content[:20], b"", b"no picture", bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.png: truncated, damaged or no PNG"):
            stacks.read(file)


def test_missing_and_foreign_files_are_named(tmp_path):
    for read in (stacks.read, stacks.open_stack, stacks.read_voxel):
        with pytest.raises(FileNotFoundError, match=r"a\.tif: no such file"):
            read(tmp_path / "a.tif")
        (tmp_path / "a.jpg").touch()
        with pytest.raises(ValueError, match=r"a\.jpg: expected a file of \.tif"):
            read(tmp_path / "a.jpg")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for package, name in (("tifffile", "a.tif"), ("PIL", "a.png")):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RuntimeError, match=r"is missing, of the extra train"):
            stacks.read(tmp_path / name)
