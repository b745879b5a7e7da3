"""A training from its first step to its last: progress, checkpoints, signals, and scores of the held-out sections."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TextColumn

from models import checkpoint
from models.distributed import Group
from models.membranes.loading import FORMAT
from models.membranes.metrics import evaluate
from models.membranes.prediction import Options, Predictor
from models.membranes.training import Trainer
from models.membranes.volumes import Volume
from models.metrics import Metrics
from models.progress import progress_bar
from models.running import Interrupted, collected_signals

#: While a network learns; at the end there are more.
_FEW = tuple(step / 10 for step in range(2, 10))
#: Steps whose mean loss is shown, and how.
_SHOWN, _SAID = 50, "loss {task.fields[loss]:.4f}   {task.fields[speed]:.2f} steps/s"


def run(
    trainer: Trainer,
    held_out: Volume,
    path: Path,
    console: Console,
    checkpoint_every: int = 0,
    tensorboard: bool = False,
    more: dict[str, Any] | None = None,
) -> None:
    """Train to the end; save to ``path`` at the start, with every evaluation and every ``checkpoint_every`` steps.

    ``more`` is saved too. Every ``evaluate_every`` steps a line goes to ``metrics.jsonl`` beside ``path``. Interrupted,
    after saving once more, if SIGINT or SIGTERM arrives.
    """

    def save() -> None:
        checkpoint.save(path, {**(more or {}), **trainer.state_dict()}, FORMAT)

    config = trainer.config
    metrics = Metrics(path.parent, trainer.steps_done, tensorboard, by="step")
    with collected_signals(Group()) as received, progress_bar(console, TextColumn(_SAID)) as progress:
        task = progress.add_task(
            "training", total=config.steps, completed=trainer.steps_done, loss=float("nan"), speed=0
        )
        save()
        shown = begun = time.perf_counter()
        first = trainer.steps_done
        while not trainer.finished:
            trainer.step()
            now = time.perf_counter()
            if now - shown > 0.5 or trainer.finished:
                shown, speed = now, (trainer.steps_done - first) / (now - begun)
                progress.update(task, completed=trainer.steps_done, loss=_recent(trainer, _SHOWN), speed=speed)
            evaluated = trainer.steps_done % config.evaluate_every == 0 or trainer.finished
            if evaluated:
                _measure(trainer, held_out, metrics, console, (now - begun) / (trainer.steps_done - first))
                begun += time.perf_counter() - now
            if evaluated or received or (checkpoint_every and trainer.steps_done % checkpoint_every == 0):
                save()
            if received:
                raise Interrupted(received[0])
    metrics.close()


def _recent(trainer: Trainer, count: int) -> float:
    last = trainer.losses[-count:]
    return sum(last) / len(last)


def _measure(trainer: Trainer, held_out: Volume, metrics: Metrics, console: Console, seconds: float) -> None:
    """Score the held-out sections; a line on the terminal and one in the file."""
    trainer.check()
    found = segment(trainer, held_out, Options())
    scores = evaluate(found, _truth(held_out), _FEW, progress=False)
    thinned = scores.best
    trainer.history.append(
        {
            "step": trainer.steps_done,
            "loss": _recent(trainer, trainer.config.evaluate_every),
            "lr": trainer.rate,
            "seconds_per_step": seconds,
            "v_rand": thinned.rand.f,
            "v_rand_unthinned": scores.plain.rand.rand.f,
            "threshold": thinned.threshold,
            "pixel_error": scores.plain.pixel_error.pixel_error,
        }
    )
    measured = trainer.history[-1]
    metrics.write(measured)
    console.print(
        f"step {trainer.steps_done:,}/{trainer.config.steps:,}   loss {measured['loss']:.4f}   held out: V-Rand "
        f"{measured['v_rand']:.4f} thinned, {measured['v_rand_unthinned']:.4f} as found, pixel error "
        f"{measured['pixel_error']:.4f}",
        highlight=False,
    )


def segment(trainer: Trainer, volume: Volume, options: Options) -> np.ndarray:
    """float32 [sections, H, W]: the probabilities of ``volume`` by the averaged weights."""
    trainer.averaged.train(False)
    sections = volume.normalized()
    predictor = Predictor(trainer.averaged, trainer.normalization, sections.shape[1:], options)
    return np.stack([predictor(section) for section in sections])


def _truth(volume: Volume) -> np.ndarray:
    assert volume.labels is not None
    return volume.labels
