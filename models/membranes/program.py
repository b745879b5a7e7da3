"""What the commands of :mod:`models.segment` do, once their options are read."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpukern import formatting
from gpukern.runtime import files
from models.membranes import loading, pictures, results, running, volumes
from models.membranes.config import Config, settings
from models.membranes.metrics import Evaluation
from models.membranes.networks import NETWORKS
from models.membranes.prediction import Options, Predictor
from models.membranes.segmentation import watershed
from models.membranes.training import Trainer
from models.membranes.volumes import Volume
from models.progress import progress_bar
from models.running import CHECKPOINT, choose_device, describe_mode
from models.train import keep_previous

PROBABILITIES, SCORES, SECTIONS_PLOT, CURVES_PLOT = "held-out.tif", "scores.json", "sections.png", "curves.png"
#: Imported where they are used: module → package.
_PACKAGES = {"skimage": "scikit-image", "scipy": "scipy", "tifffile": "tifffile"}


def _require_packages() -> None:
    """RuntimeError before a training, not after it."""
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"{package} is missing, of the extra train: pip install -e '.[train]'")


def train(
    options: Mapping[str, Any],
    preset: str | None,
    data: str | None,
    train_sections: int | None,
    out: Path,
    device: str,
    resume: bool,
    console: Console,
    checkpoint_every: int = 0,
    average: int = 8,
    tensorboard: bool = False,
) -> None:
    """``options`` are those of :class:`Config`, None where not given. Whatever goes wrong is an error that says so."""
    _require_packages()
    path, views = out / CHECKPOINT, Options(average=average)
    state = loading.state_of(path) if resume else None
    if state and preset:
        raise ValueError("a training that goes on keeps its settings: --resume takes no --preset")
    given = {name: value for name, value in options.items() if value is not None}
    config = Config(**(state["config"] if state else settings(given.get("network"), preset)) | given)
    source = data or (state["data"] if state else None)
    first = train_sections or (state["train_sections"] if state else None)
    volume = loading.labelled(source)
    learned, held_out = volume.split(first)
    if held_out.labels is not None and not held_out.labels.any():
        raise ValueError(f"{held_out.name}, held out: no pixel inside a cell, so that nothing can be scored")
    place = choose_device(device)
    trainer = Trainer(config, learned, place)
    if state:
        trainer.load_state_dict(state)
    else:
        keep_previous(path, console)
    _describe(trainer, volume, learned, held_out, describe_mode(place), console)
    more = {"data": str(volume.path and volume.path.resolve()), "train_sections": len(learned)}
    running.run(trainer, held_out, path, console, checkpoint_every, tensorboard, more)
    _finish(trainer, held_out, out, views, console)


def _describe(trainer: Trainer, volume: Volume, learned: Volume, held_out: Volume, mode: str, console: Console) -> None:
    config = trainer.config
    height, width = volume.images.shape[1:]
    parameters = sum(parameter.numel() for parameter in trainer.network.model.parameters())
    console.print(
        f"{NETWORKS[config.network].title} of {parameters:,} parameters, {mode}; "
        f"{formatting.count(len(learned), 'section')} of {height} × {width} to learn, the next {len(held_out)} held "
        f"out, from {volume.name}",
        highlight=False,
    )
    usual = {field.name: field.default for field in fields(Config)}
    main = ("steps", "batch_size", "crop", "lr", "seed")
    shown = {name: value for name, value in asdict(config).items() if name in main or value != usual[name]}
    console.print(", ".join(f"{name} {value}" for name, value in shown.items()), highlight=False)


def _finish(trainer: Trainer, held_out: Volume, out: Path, options: Options, console: Console) -> None:
    """The scores of the held-out sections, beside those of the smoothed images, as a table, JSON and pictures."""
    title = NETWORKS[trainer.config.network].title
    with console.status("segmenting the held-out sections"):
        found = running.segment(trainer, held_out, options)
    volumes.save_tiff(out / PROBABILITIES, found, held_out.voxel)
    assert held_out.labels is not None
    evaluations = {title: results.score(found, held_out.labels), results.RAW: results.baseline(held_out)}
    views = f", the mean of {options.average} views" if options.average > 1 else ""
    sections = formatting.count(len(held_out), "held-out section")
    console.print(results.table(f"{held_out.name}: {sections}{views}", evaluations))
    _write_scores(out / SCORES, evaluations)
    heading = f"{title} after {formatting.count(trainer.steps_done, 'step')}"
    drawn = _draw(out, held_out, found, evaluations, heading)
    curves = out / CURVES_PLOT
    pictures.plot_curves(curves, trainer.losses, trainer.history, evaluations, heading)
    written = {"checkpoint": out / CHECKPOINT, "probabilities": out / PROBABILITIES, "scores": out / SCORES}
    _tell(console, written | {"sections": drawn, "curves": curves})


def _tell(console: Console, written: Mapping[str, Path]) -> None:
    """What was written, a file a line."""
    for what, path in written.items():
        console.print(f"{what:13} {path}", highlight=False, soft_wrap=True)


def _write_scores(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    told = {name: scores.to_dict() for name, scores in evaluations.items()}
    files.write_text(path, json.dumps(told, indent=1) + "\n")


def _draw(
    out: Path, volume: Volume, found: np.ndarray, evaluations: Mapping[str, Evaluation], heading: str,
    with_images: bool = True,
) -> Path:  # fmt: skip
    """The picture of the sections at the first evaluation's best threshold."""
    best = next(iter(evaluations.values())).best
    sections = formatting.count(len(volume), "section")
    title = f"{heading}: V-Rand {best.rand.f:.3f} of {sections}, thinned, above a probability of {best.threshold:.2f}"
    pictures.plot_sections(out / SECTIONS_PLOT, volume, found, best.threshold, title, with_images=with_images)
    return out / SECTIONS_PLOT


def predict(
    checkpoint: Path, images: Path, out: Path, labels: Path | None, sections: str, device: str, options: Options,
    console: Console,
) -> None:  # fmt: skip
    """Probabilities of ``images`` as a TIFF, and with ``labels`` another one of the cells, by a watershed."""
    _require_packages()
    _check_written((checkpoint, images, *(volumes.sources(images) if images.is_dir() else ())), out, labels)
    trained = loading.trained(checkpoint, choose_device(device))
    stack = loading.images(images, sections)
    of = volumes.limits(stack)
    for path in (out, labels):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".segment.") as folder, progress_bar(console) as progress:
        task = progress.add_task("tiles", total=None)
        predictor = Predictor(
            trained.network, trained.normalization, stack.shape[1:], options, lambda: progress.advance(task)
        )
        progress.update(task, total=len(stack) * predictor.tiles)
        # On the disk: a volume, and what is found in it, may be larger than the memory.
        found = _mapped(Path(folder) / "probabilities", np.float32, stack.shape)
        cells = _mapped(Path(folder) / "labels", np.uint16, stack.shape) if labels else None
        for index, section in enumerate(stack):
            found[index] = predictor(volumes.to_unit(section, of, images))
            if cells is not None:
                cells[index] = _numbered(watershed(found[index]), index)
        voxel = volumes.stacks.read_voxel(images) if images.is_file() else None
        volumes.save_tiff(out, found, voxel)
        if labels and cells is not None:
            volumes.save_tiff(labels, cells, voxel)
    written = f"{out}, labels {labels}" if labels else f"{out}"
    console.print(
        f"{NETWORKS[trained.config.network].title} after {formatting.count(trained.steps, 'step')}: "
        f"{formatting.count(len(stack), 'section')} of {stack.shape[1]} × {stack.shape[2]}, probabilities {written}",
        highlight=False,
        soft_wrap=True,
    )


def _check_written(made_of: Iterable[Path], *written: Path | None) -> None:
    """ValueError where a result would replace what it is made of, or another result, or is named like no TIFF."""
    results = [path for path in written if path]
    places = {path.resolve() for path in results}
    replaced = [path for path in made_of if path.resolve() in places]
    if replaced or len(places) < len(results):
        which = f"{replaced[0]}, " if replaced else ""
        raise ValueError(f"{which}--out and --labels must be different files")
    for path in results:
        if path.suffix.lower() not in volumes.stacks.TIFF:
            raise ValueError(f"{path}: a result is a TIFF, .tif or .tiff")


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "w+", shape=shape)


def _numbered(labels: np.ndarray, index: int) -> np.ndarray:
    if labels.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"section {index + 1} has {labels.max():,} cells: 16 bits of a TIFF do not hold their numbers")
    return labels


def evaluate(
    probabilities: Path, data: str | None, labels: Path | None, images: Path | None, sections: str, out: Path,
    console: Console,
) -> None:  # fmt: skip
    """The table of scores and the pictures of ``probabilities`` against the labels of ``data``, or those of a file."""
    _require_packages()
    found = loading.probabilities(probabilities)
    volume = loading.truth(data, labels, images, sections)
    assert volume.labels is not None
    if found.shape != volume.images.shape:
        got, wanted = (" × ".join(map(str, array.shape)) for array in (found, volume.images))
        raise ValueError(
            f"{probabilities}: {got} probabilities for {wanted} labels of {volume.name}{_hint(found, data, volume)}"
        )
    evaluations = {probabilities.stem: results.score(found, volume.labels)}
    with_images = labels is None or images is not None
    if with_images:
        evaluations[results.RAW] = results.baseline(volume)
    console.print(results.table(f"{volume.name}: {formatting.count(len(volume), 'section')}", evaluations))
    out.mkdir(parents=True, exist_ok=True)
    _write_scores(out / SCORES, evaluations)
    drawn = _draw(out, volume, found, evaluations, probabilities.stem, with_images)
    pictures.plot_curves(out / CURVES_PLOT, (), (), evaluations, f"{probabilities.stem}, {volume.name}")
    _tell(console, {"scores": out / SCORES, "sections": drawn, "curves": out / CURVES_PLOT})


def _hint(found: np.ndarray, data: str | None, volume: Volume) -> str:
    """Which part of the data has as many sections."""
    whole = loading.labelled(data) if volume.path else volume
    if len(whole) < 2 or found.shape[1:] != whole.images.shape[1:]:
        return ""
    fitting = [name for name in loading.PARTS if len(loading.part(whole, name)) == len(found)]
    return f": try --sections {fitting[0]}" if fitting else ""
