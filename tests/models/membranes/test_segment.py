"""``python -m models.segment``: train, stop, go on, predict, evaluate; and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from models import checkpoint, segment
from models.membranes import volumes
from models.membranes.loading import FORMAT
from models.membranes.segmentation import watershed
from models.membranes.training import Trainer
from tests.models.membranes import synthetic

pytestmark = pytest.mark.usefixtures("reference_mode")
#: 5 steps of each network take seconds.
SMALL = {
    "unet": ("--width", 4, "--depth", 2, "--batch-size", 2, "--crop", 32),
    "unet-valid": ("--width", 4, "--depth", 1, "--batch-size", 2, "--crop", 32),
    "ciresan": ("--width", 4, "--batch-size", 2, "--crop", 12, "--pixels", 64),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five sections, of which the fifth is held out."""
    return synthetic.write(synthetic.volume(), tmp_path_factory.mktemp("segment") / "data")


def run(*arguments, code=0):
    result = CliRunner().invoke(segment.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def train(data, out, network="unet", *more, code=0):
    steps = () if "--steps" in more else ("--steps", 5)
    given = () if "--resume" in more else (*SMALL[network], "--network", network, "--data", data, *steps)
    return run("train", *given, "--out", out, "--average", 1, "--device", "cpu", *more, code=code)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a training of a U-Net."""
    out = tmp_path_factory.mktemp("trained")
    train(data, out, "unet", "--evaluate-every", 2)
    return out


# ---- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network, sampling", [("unet-valid", "crops"), ("ciresan", "crops"), ("ciresan", "patches")])
def test_a_training_ends_with_scores_beside_the_smoothed_images(network, sampling, data, tmp_path):
    output = train(data, tmp_path, network, "--sampling", sampling)
    assert "4 sections of 96 × 112 to learn, the next 1 held out" in output
    assert "step 5/5 loss" in output and "as found" in output and "smoothed image" in output


def test_a_training_leaves_checkpoint_metrics_scores_and_pictures(trained):
    assert checkpoint.load(trained / "checkpoint.pt", FORMAT)["steps"] == 5
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 <= line["v_rand"] <= 1 and line["loss"] > 0 for line in lines)
    scores = json.loads((trained / "scores.json").read_text())
    # Cells are bright, membranes are not: a threshold nearly finds them.
    assert scores["smoothed image"]["thinned"]["best"]["rand"]["rand"]["f"] > 0.9
    for name in ("sections.png", "curves.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    with tifffile.TiffFile(trained / "held-out.tif") as tiff:
        assert tiff.is_imagej and tiff.asarray().dtype == np.float32 and tiff.asarray().shape == (96, 112)


def test_stopped_and_resumed_is_uninterrupted(data, trained, tmp_path, monkeypatch):
    step = Trainer.step

    def stopped(self):
        step(self)
        if self.steps_done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopped)
        output = train(data, tmp_path, "unet", "--evaluate-every", 2, code=130)
    assert f"saved {tmp_path / 'checkpoint.pt'}; go on with --resume" in output
    assert checkpoint.load(tmp_path / "checkpoint.pt", FORMAT)["steps"] == 3
    train(None, tmp_path, "unet", "--resume")  # all other options come from the checkpoint
    resumed, whole = (checkpoint.load(out / "checkpoint.pt", FORMAT) for out in (tmp_path, trained))
    for name, tensor in whole["average"]["model"].items():
        assert tensor.equal(resumed["average"]["model"][name]), name
    assert resumed["losses"].equal(whole["losses"])
    kept = ("step", "loss", "v_rand")
    one, other = (
        [{name: json.loads(line)[name] for name in kept} for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path, trained)
    )
    assert one == other


def test_a_new_training_keeps_the_old_checkpoint(data, tmp_path):
    train(data, tmp_path, "unet", "--steps", 1)
    old = (tmp_path / "checkpoint.pt").read_bytes()
    assert "kept the checkpoint of an earlier training" in train(data, tmp_path, "unet", "--steps", 1, "--seed", 1)
    assert (tmp_path / "checkpoint.previous.pt").read_bytes() == old


@pytest.mark.parametrize(
    "more, said",
    [
        (("--crop", 33), "error: U-Net takes no crops of 33 pixels: the next larger one has 36"),
        (("--sampling", "patches"), "error: U-Net takes no patches: --sampling crops"),
        (("--average", 3), "error: expected an average over 1 or 8 views, got 3"),
        (("--dropout", 1), "error: dropout must be in [0, 1), got 1.0"),
        (("--train-sections", 5), "error: data: 5 sections cannot be split into 5 and the others"),
        (("--lr", 1e30, "--steps", 9), "the training diverged before step 9"),
    ],
)
def test_trainings_that_cannot_be_are_one_clear_line(more, said, data, tmp_path):
    assert said in train(data, tmp_path, "unet", *more, code=1)


def test_data_that_cannot_be_trained_on_are_one_clear_line(data, tmp_path):
    output = train(tmp_path / "none", tmp_path / "run", code=1)
    assert "error:" in output and "none: no such" in output
    assert "sections without labels" in train(data / "image", tmp_path / "run", code=1)


def test_held_out_sections_without_cells_are_refused_before_the_training(tmp_path):
    volume = synthetic.volume()
    assert volume.labels is not None
    volume.labels[-1] = False
    data = synthetic.write(volume, tmp_path / "data")
    assert "held out: no pixel inside a cell" in train(data, tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()


def test_a_hollow_checkpoint_is_one_clear_line(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"model": {}}, FORMAT)
    assert "checkpoint.pt: the checkpoint has no config" in train(None, tmp_path, "unet", "--resume", code=1)


def test_a_package_that_is_missing_is_named_before_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    output = train(data, tmp_path / "run", code=1)
    assert "error: scikit-image is missing, of the extra train" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (("--lr", 0.5), "cannot resume: lr is 0.5, was 0.003"),
        (("--network", "ciresan"), "cannot resume: network is ciresan, was unet"),
        (("--preset", "gpu"), "--resume takes no --preset"),
        (("--out", "none"), "nothing to resume"),
    ],
)
def test_resuming_another_training_is_one_clear_line(more, said, trained):
    assert said in train(None, trained, "unet", "--resume", *more, code=1)


# ---- predict -------------------------------------------------------------------------------------------------------


def test_predictions_are_tiffs_for_fiji_and_the_same_for_all_tiles(trained, data, tmp_path):
    model = trained / "checkpoint.pt"
    whole, tiled, labels = (tmp_path / name for name in ("deep/whole.tif", "tiled.tif", "labels.tif"))
    output = run("predict", model, data, "--out", whole, "--labels", labels, "--device", "cpu")
    assert "U-Net after 5 steps: 5 sections of 96 × 112" in output
    run("predict", model, data, "--out", tiled, "--tile", 20, "--device", "cpu")
    found, again = tifffile.imread(whole), tifffile.imread(tiled)
    assert found.shape == (5, 96, 112) and found.dtype == np.float32
    # fp32 in other tiles: sums in another order.
    np.testing.assert_allclose(again, found, atol=1e-5)
    cells = tifffile.imread(labels)
    assert cells.dtype == np.uint16 and np.array_equal(cells, watershed(found))
    with tifffile.TiffFile(whole) as tiff:
        assert tiff.is_imagej and tiff.series[0].axes == "ZYX"
    np.testing.assert_allclose(found[4], tifffile.imread(trained / "held-out.tif"), atol=1e-6)
    assert not list(tmp_path.rglob(".segment*")), "what lay on the disk meanwhile is gone"


def test_sections_of_bytes_16_bits_and_floats_predict_the_same(trained, tmp_path):
    image = synthetic.volume().images[:1]
    # A hundredth of the pixels of each end of the range: the percentiles that 16 bits are stretched to.
    image[0, :2], image[0, -2:] = 0, 255
    outputs = []
    for stack in (image, image.astype(np.uint16) * 257, (image / 255).astype(np.float32)):
        volumes.save_tiff(tmp_path / "in.tif", stack)
        run("predict", trained / "checkpoint.pt", tmp_path / "in.tif", "--out", tmp_path / "out.tif")
        outputs.append(tifffile.imread(tmp_path / "out.tif"))
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-5)


def test_parts_of_a_volume_are_those_of_a_training(trained, data, tmp_path):
    run("predict", trained / "checkpoint.pt", data, "--sections", "held-out", "--out", tmp_path / "out.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), tifffile.imread(trained / "held-out.tif"))


def test_predictions_that_cannot_be_are_one_clear_line(trained, data, tmp_path):
    model, out = trained / "checkpoint.pt", tmp_path / "out.tif"
    foreign, broken, damaged = (tmp_path / name for name in ("foreign.pt", "broken.pt", "damaged.tif"))
    checkpoint.save(foreign, {"epoch": 1})
    broken.write_bytes(model.read_bytes()[:-100])
    volumes.save_tiff(damaged, synthetic.volume().images)
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    for arguments, said in (
        ((tmp_path / "none.pt", data), "none.pt: no such checkpoint"),
        ((foreign, data), "foreign.pt: not a 'gpukern models.segment checkpoint"),
        ((broken, data), "broken.pt: the checkpoint is corrupt"),
        ((model, damaged), "damaged.tif: truncated"),
        ((model, tmp_path / "none.tif"), "none.tif: no such file"),
        ((model, out), "must be different files"),
        ((model, data, "--labels", out), "must be different files"),
    ):
        output = run("predict", *arguments, "--out", out, code=1)
        assert "error:" in output and said in output
        assert not out.exists()


def test_predictions_replace_nothing_that_they_are_made_of(trained, data, tmp_path):
    model, one = tmp_path / "checkpoint.tif", tmp_path / "one.tif"
    model.write_bytes((trained / "checkpoint.pt").read_bytes())
    volumes.save_tiff(one, synthetic.volume().images[:1])
    (tmp_path / "folder").mkdir()
    picture = tmp_path / "folder/0.tif"
    picture.write_bytes(one.read_bytes())
    before = [path.read_bytes() for path in (model, picture)]
    for arguments, said in (
        ((data, "--out", model), "checkpoint.tif, --out and --labels must be different files"),
        ((tmp_path / "folder", "--out", picture), "0.tif, --out and --labels must be different files"),
        ((data, "--out", tmp_path / "out.tif", "--labels", picture.parent / "../checkpoint.tif"), "different files"),
        ((data, "--out", tmp_path / "out.png"), "out.png: a result is a TIFF"),
        ((one, "--out", tmp_path / "out.tif", "--sections", "held-out"), "one.tif: one section has no parts"),
    ):
        assert said in run("predict", model, *arguments, code=1)
    assert [path.read_bytes() for path in (model, picture)] == before


# ---- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluating_the_held_out_sections_repeats_the_trainings_scores(trained, data, tmp_path):
    output = run("evaluate", trained / "held-out.tif", "--data", data, "--sections", "held-out", "--out", tmp_path)
    assert "held-out" in output and "smoothed image" in output
    one, other = (json.loads((out / "scores.json").read_text()) for out in (trained, tmp_path))
    assert other["held-out"] == one["U-Net"] and other["smoothed image"] == one["smoothed image"]
    for name in ("sections.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_evaluating_the_truth_against_itself_is_perfect(tmp_path):
    labels = synthetic.volume().labels
    volumes.save_tiff(tmp_path / "probabilities.tif", labels.astype(np.float32))
    volumes.save_tiff(tmp_path / "labels.tif", labels)
    run("evaluate", tmp_path / "probabilities.tif", "--labels", tmp_path / "labels.tif", "--out", tmp_path / "out")
    best = json.loads((tmp_path / "out/scores.json").read_text())["probabilities"]["plain"]["best"]
    assert best["rand"]["rand"] == best["info"]["info"] == {"f": 1, "precision": 1, "recall": 1}
    assert best["pixel_error"]["pixel_error"] == 0
    volumes.save_tiff(tmp_path / "probabilities.tif", labels[4:].astype(np.float32))
    files = tmp_path / "probabilities.tif", "--labels", tmp_path / "labels.tif"
    run("evaluate", *files, "--sections", "held-out", "--out", tmp_path / "out")
    # With the sections themselves there is something to compare with.
    volumes.save_tiff(tmp_path / "images.tif", synthetic.volume().images)
    parts = "--images", tmp_path / "images.tif", "--sections", "held-out"
    run("evaluate", *files, *parts, "--out", tmp_path / "out")
    assert set(json.loads((tmp_path / "out/scores.json").read_text())) == {"probabilities", "smoothed image"}


def test_evaluations_that_cannot_be_are_one_clear_line(trained, data, tmp_path):
    found, wrong = trained / "held-out.tif", tmp_path / "wrong.tif"
    volumes.save_tiff(wrong, synthetic.volume().images)
    volumes.save_tiff(tmp_path / "other.tif", synthetic.volume().labels[:1, 1:])
    for arguments, said in (
        ((found, "--data", data), "1 × 96 × 112 probabilities for 5 × 96 × 112 labels of data: try --sections held"),
        ((wrong, "--data", data), "wrong.tif: expected probabilities, floats from 0 to 1, got uint8"),
        ((found, "--data", data / "image"), "sections without labels"),
        ((found, "--data", data, "--labels", found), "--data and --labels are two truths"),
        ((found, "--images", found), "--images goes with --labels"),
        (
            (found, "--labels", tmp_path / "other.tif"),
            "1 × 96 × 112 probabilities for 1 × 95 × 112 labels of other.tif",
        ),
        ((found, "--labels", data / "label/0.png", "--out", data / "label/0.png/x"), "Not a directory"),
        ((tmp_path / "none.tif", "--data", data), "none.tif: no such file"),
    ):
        output = run("evaluate", "--out", tmp_path / "out", *arguments, code=1)
        assert "error:" in output and said in output
