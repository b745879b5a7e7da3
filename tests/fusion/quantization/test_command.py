"""``gpukern fuse --dtype int8 --calibrate``: folders of images and files of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gpukern
from gpukern.cli import app
from gpukern.fusion.errors import SourceError
from gpukern.fusion.quantization.files import DEVIATION, MEAN, Preparation, batches_from
from tests.fusion.quantization.nets import batches

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]
CHAIN = ("fuse", "tests.fusion.quantization.nets:chain", "--input", "2,3,16,16", "--device", "cpu")


def run(*words: object):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "300"})


def images(folder, count: int = 5, size: tuple[int, int] = (40, 30)) -> None:
    pil = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for number in range(count):
        pixels = np.full((*size, 3), 50 * number, dtype=np.uint8)
        pixels[:2] = 255  # a margin that the crop leaves out
        pil.fromarray(pixels).save(folder / f"{number}.png")


def test_a_file_of_batches_and_what_is_written(tmp_path):
    np.savez(tmp_path / "data.npz", *(batch.numpy() for batch in batches(2)))
    result = run(
        *CHAIN, "--dtype", "int8", "--calibrate", tmp_path / "data.npz", "--target", 0.5, "--calibration", "mse",
        "--save", tmp_path / "out.pt2", "--report", tmp_path / "out.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "in 8 bits (int8)" in result.output and "6 kept aside" in result.output
    told = gpukern.load(tmp_path / "out.pt2").report.quantization
    assert (told.calibration, told.target, told.observed) == ("mse", 0.5, 6)
    shown = run("explain", tmp_path / "out.pt2")
    assert shown.exit_code == 0 and "in 8 bits (int8)" in shown.output


def test_a_folder_of_images(tmp_path):
    images(tmp_path / "photos")
    (batch,) = batches_from(tmp_path / "photos", [(2, 3, 14, 14)], Preparation())
    expected = (torch.arange(5.0)[:, None] * 50 / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(batch, expected[..., None, None].expand(5, 3, 14, 14))
    (grey,) = batches_from(tmp_path / "photos", [(2, 1, 8, 6)], Preparation(10, (0.5,), (0.25,)))
    torch.testing.assert_close(grey[:, 0, 3, 3], (torch.arange(5.0) * 50 / 255 - 0.5) / 0.25)
    assert grey.shape == (5, 1, 8, 6)


def test_arrays_of_all_images_are_divided_into_batches(tmp_path):
    np.save(tmp_path / "all.npy", np.zeros((40, 3, 4, 4), np.float32))
    torch.save([torch.zeros(2, 3), torch.ones(2, 3)], tmp_path / "two.pt")
    np.savez(tmp_path / "inputs.npz", a=np.zeros((20, 3)), b=np.ones((20, 2)))
    sizes = [len(each) for each in batches_from(tmp_path / "all.npy", [(1, 3, 4, 4)], Preparation())]
    assert sizes == [16, 16, 8]
    assert len(batches_from(tmp_path / "two.pt", [(2, 3)], Preparation())) == 2
    first, second = batches_from(tmp_path / "inputs.npz", [(1, 3), (1, 2)], Preparation())[1]
    assert first.shape == (4, 3) and second.shape == (4, 2)


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", "there is no"),
        ("empty", "has no images"),
        ("notes.txt", "neither a folder of images nor"),
        ("broken.npz", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told(name, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.npz").write_text("hello")
    with pytest.raises(SourceError, match=words):
        list(batches_from(tmp_path / name, [(1, 3, 8, 8)], Preparation()))


@pytest.mark.parametrize(
    "options, words",
    [
        (("--dtype", "int8"), "Invalid value for --calibrate: dtype='int8' needs calibrate="),
        (("--dtype", "int8", "--precision", "fp32"), "Invalid value for --precision: what is not in 8 bits"),
        (("--dtype", "int4"), "no dtype is called 'int4'; known are fp16, bf16, fp32, int8, fp8"),
        (("--target", "0.9"), "Invalid value for --target: target is for dtype='int8' or 'fp8'"),
        (("--dtype", "fp8", "--calibrate", "nowhere"), "there is no nowhere"),
        (("--mean", "0,0,0"), "are for --calibrate"),
        (("--std", "a,b"), "'a,b' is not numbers between commas"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    result = run(*CHAIN, *options)
    assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())
