"""What was measured after every epoch, for programs to read: JSON lines, and TensorBoard's files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE, FOLDER = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes to ``metrics.jsonl`` in ``out``, a line for an epoch, and with ``tensorboard`` to a folder of that name.

    What is there of epochs after ``epoch`` was written by a training that went on and was stopped: it is dropped.
    ``by`` is what lines are counted by: "epoch", or "step" where a training has no epochs.
    RuntimeError where TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, epoch: int, tensorboard: bool, by: str = "epoch") -> None:
        self.path = out / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if epoch and self.path.exists() else []
        kept = [line for line in lines if _number(line, by) <= epoch]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self._board: Any = _board(out / FOLDER, kept) if tensorboard else None

    def write(self, measured: Mapping[str, float]) -> None:
        # JSON has no NaN: what was not measured is null.
        values = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board:
            for name, value in measured.items():
                if name not in ("epoch", "step"):
                    self._board.add_scalar(name, value, measured["step"])
            self._board.flush()

    def close(self) -> None:
        if self._board:
            self._board.close()


def _number(line: str, by: str) -> float:
    """Infinity for half a line."""
    try:
        return json.loads(line)[by]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _board(folder: Path, lines: list[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise RuntimeError("tensorboard is missing, of the extra train: pip install -e '.[train]'") from error
    purge = json.loads(lines[-1])["step"] + 1 if lines else 0
    return SummaryWriter(folder, purge_step=purge)
