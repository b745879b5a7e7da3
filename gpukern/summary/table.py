"""The result of ``gpukern.summary``, and its display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

Size = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One call of one layer, or what a module multiplies itself, between its layers: ``layer`` is "(functional)" then.

    Sizes and ``multiply_adds`` are those of one sample, without the batch dimension. ``weight_size`` is
    [K, C/groups, R, S] for convolutions and [in, out] for linear layers, as the lecture writes it. ``parameters``
    counts biases too; a parameter that an earlier row has counted counts no more. ``multiply_adds`` counts the products
    of every convolution and matrix product that ran in the layer, and no others. ``receptive_field`` is the size of the
    window of the network's input that one output element depends on; it may be larger than the input, whose padding it
    then covers; "all": the whole input. None: not known.
    """

    name: str
    layer: str
    output_size: Size
    weight_size: Size = ()
    parameters: int = 0
    multiply_adds: int = 0
    receptive_field: Size | Literal["all"] | None = None


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`. ``str()`` gives the table as plain text, ``rich.print`` a prettier one."""

    model: str
    rows: tuple[Row, ...]
    #: All parameters of the model, once each.
    parameters: int
    #: For one sample.
    multiply_adds: int
    notes: tuple[str, ...] = ()

    def __rich__(self) -> Table:
        from gpukern.tables import Column, table

        made = table(
            Column("Layer", False, "Total"),
            "Output Size",
            "Weight Size",
            Column("Parameters", total=f"{self.parameters:,}"),
            Column("Multiply-adds", total=f"{self.multiply_adds:,}"),
            Column("Receptive Field"),
            title=self.model,
            caption="\n".join(self.notes),
        )
        for row in self.rows:
            made.add_row(
                row.layer,
                _times(row.output_size),
                _times(row.weight_size),
                f"{row.parameters:,}" if row.parameters else "",
                f"{row.multiply_adds:,}" if row.multiply_adds else "",
                _times(row.receptive_field),
            )
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)


def _times(size: Size | str | None) -> str:
    if isinstance(size, tuple):
        return " × ".join(str(n) for n in size)
    return size or "–"
