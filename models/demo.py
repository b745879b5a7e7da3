"""``python -m models.demo``: trains LeNet-5 on handwritten digits, proves gpukern's kernels on it, fuses it.

Exit status 1 if the network learns to less than 97 %, a kernel is off by more than its bound, or the fused network
does not compute what the trained one does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gpukern
from gpukern import formatting, tables
from gpukern.fusion.errors import FusionError
from gpukern.runtime.mode import has_triton
from gpukern.runtime.records import build
from models import data
from models.kernel_check import Comparison, check_checkpoint
from models.running import CHECKPOINT, Interrupted, choose_device, describe_mode, make_console, run, save_plots
from models.trainer import Config, Trainer

OUT = Path("runs/demo")
CONFIG = Config(epochs=12, batch_size=32, optimizer="adam", lr=0.0005, batch_norm=True)
REQUIRED_ACCURACY = 0.97
CHECKED_IMAGES = 4
PAGE, FUSED = "fused.html", "lenet.pt2"


def main() -> None:
    """Train LeNet-5 on scikit-learn's digits, then compare gpukern's kernels with float64 on it."""
    start = time.perf_counter()
    console = make_console()
    device = choose_device("auto")
    console.rule("1. Train")
    try:
        trainer = _train(device, console)
    except Interrupted as interruption:
        raise typer.Exit(interruption.exit_code) from None
    except RuntimeError as error:  # CuPy, on a GPU, or scikit-learn is missing: the message names the package
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.rule("2. Prove the kernels")
    comparisons = _prove(trainer.device, console)
    console.rule("3. Fuse for inference")
    fused = _fuse(trainer, console)
    loss, filters, _ = save_plots(trainer, OUT, f"LeNet-5 on {trainer.data.name}")
    console.rule("4. Look")
    console.print(
        f"loss by samples seen   {loss}\nfirst-layer filters    {filters}\nwhat was fused         {OUT / PAGE}",
        highlight=False,
    )
    learned = trainer.accuracies[-1] >= REQUIRED_ACCURACY
    proved = all(comparison.ok for comparison in comparisons)
    console.print(
        f"\nheld-out accuracy {trainer.accuracies[-1]:.2%} ({REQUIRED_ACCURACY:.0%} required): {_verdict(learned)}\n"
        f"kernels within their bounds: {_verdict(proved) if comparisons else 'not checked'}\n"
        f"fused network computes the same: {_verdict(fused)}\n"
        f"{formatting.seconds(time.perf_counter() - start)}",
        highlight=False,
    )
    raise typer.Exit(0 if learned and proved and fused else 1)


def _train(device: torch.device, console: Console) -> Trainer:
    trainer = Trainer(CONFIG, data.load(), device)
    console.print(f"Layers run in {describe_mode(device)}.", highlight=False)
    console.print(gpukern.summary(trainer.model, trainer.data.image_size))
    console.print(
        f"{len(trainer.train):,} images of {trainer.data.name} to learn, {len(trainer.held_out)} held out.",
        highlight=False,
    )
    run(trainer, OUT / CHECKPOINT, console)
    return trainer


def _prove(device: torch.device, console: Console) -> list[Comparison]:
    """The comparisons, printed; none where kernels cannot run because Triton is missing."""
    if not has_triton():
        console.print("Triton is not installed (it exists for Linux): the kernels cannot run here, not even emulated.")
        return []
    where = "on the GPU" if device.type == "cuda" else "emulated on the CPU, in Triton's interpreter,"
    console.print(
        f"The trained network once more {where} with gpukern's own kernels: logits of {CHECKED_IMAGES} held-out images "
        "and the gradients of one training step on them, against float64.",
        highlight=False,
    )
    start = time.perf_counter()
    with console.status("running the kernels"):
        comparisons = (
            check_checkpoint(OUT / CHECKPOINT, CHECKED_IMAGES, device) if device.type == "cuda" else _emulated()
        )
    console.print(_table(comparisons))
    console.print(formatting.seconds(time.perf_counter() - start), highlight=False)
    return comparisons


def _fuse(trainer: Trainer, console: Console) -> bool:
    """Whether the fused network agrees with the trained one; its report, its page and its file are in OUT."""
    images = trainer.held_out.images[:CHECKED_IMAGES]
    with console.status("fusing"):
        try:
            fused = gpukern.fuse(trainer.model.eval(), (images,))
        except FusionError as error:
            console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            return False
    fused.save(OUT / FUSED)
    fused.report.to_html(OUT / PAGE)
    console.print(fused.report)
    console.print(
        f"The same from the command line: gpukern fuse {OUT / CHECKPOINT} --input 4,1,28,28 --save lenet.pt2.\n"
        f"The file {OUT / FUSED} runs anywhere (gpukern.load); gpukern explain shows how it was fused.",
        highlight=False,
    )
    verification = fused.report.verification
    return verification is not None and verification.passed


def _emulated() -> list[Comparison]:
    """In a process of its own: Triton's interpreter must be chosen before the first import."""
    command = [sys.executable, "-m", "models.kernel_check", str(OUT / CHECKPOINT), "--images", str(CHECKED_IMAGES)]
    process = subprocess.run(command, env={**os.environ, "GPUKERN_EMULATE": "1"}, stdout=subprocess.PIPE, text=True)
    if process.returncode:  # it has told why on stderr
        raise typer.Exit(1)
    return build(list[Comparison], json.loads(process.stdout), "models.kernel_check")


def _table(comparisons: list[Comparison]) -> Table:
    table = tables.table("tensor", *tables.numbers("error ‖y − ref‖/‖ref‖", "bound"), "")
    for comparison in comparisons:
        table.add_row(
            comparison.tensor,
            formatting.error(comparison.error),
            formatting.error(comparison.bound),
            _verdict(comparison.ok),
        )
    return table


def _verdict(ok: bool) -> str:
    return "[green]ok[/green]" if ok else "[red]FAILED[/red]"


if __name__ == "__main__":
    typer.run(main)
