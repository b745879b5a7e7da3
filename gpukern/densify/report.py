"""What a dense network saves: the multiply-adds of a patch classifier, patch by patch and all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gpukern import formatting
from gpukern.densify.steps import Crop, Step
from gpukern.densify.values import Pair

if TYPE_CHECKING:
    from rich.table import Table


class MultiplyAdds(NamedTuple):
    """Of an image: by a patch for each pixel, and by the dense network."""

    patchwise: int
    dense: int

    @property
    def ratio(self) -> float:
        return self.patchwise / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class DenseLayer:
    """A call of a layer or function. ``name``: its dotted name; a function has that of the module that calls it.

    ``kernel`` and ``dilation``, in pixels of the image, are of a window and None for what has none.
    ``receptive_field`` is that of its result in the patch, ``size`` the height and width of this in the patch
    classifier. ``patchwise`` and ``dense``: multiply-adds for each pixel of a large image.
    """

    name: str
    kind: str
    kernel: Pair | None
    dilation: Pair | None
    receptive_field: Pair
    size: Pair
    patchwise: int
    dense: int
    #: Rows and columns that the dense network has more than the image has patches.
    margin: Pair = (0, 0)


@dataclass(frozen=True)
class DenseReport:
    """The report of a :class:`DenseNetwork`. ``str()`` gives a table as plain text, ``rich.print`` a prettier one.

    Convolutions and linear layers count, as in :func:`gpukern.summary`; averages, maxima and activations do not.
    ``receptive_field`` is the part of the patch that the model reads: rows and columns at its end that no window
    reaches are not.
    """

    model: str
    patch_size: Pair
    border: str
    receptive_field: Pair
    layers: tuple[DenseLayer, ...]

    @classmethod
    def of(cls, model: str, steps: Sequence[Step], patch_size: Pair, border: str) -> DenseReport:
        layers = tuple(_layer(step) for step in steps if not isinstance(step.operation, Crop))
        reach = steps[-1].value.reach if steps else (1, 1)
        return cls(model, patch_size, border, reach, layers)

    @property
    def patchwise(self) -> int:
        """Multiply-adds of one patch."""
        return sum(layer.patchwise for layer in self.layers)

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense network for each pixel of a large image."""
        return sum(layer.dense for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds the dense network takes, on a large image."""
        return MultiplyAdds(self.patchwise, self.dense).ratio

    def multiply_adds(self, image_size: Sequence[int]) -> MultiplyAdds:
        """The exact multiply-adds of an image (H, W), its borders counted. ValueError for one without a patch."""
        height, width = image_size
        rows, columns = height, width
        if self.border == "valid":
            rows, columns = height - self.patch_size[0] + 1, width - self.patch_size[1] + 1
        if rows < 1 or columns < 1:
            raise ValueError(
                f"an image of {height} × {width} has no patch of {self.patch_size[0]} × {self.patch_size[1]}"
            )
        dense = sum(each.dense * (rows + each.margin[0]) * (columns + each.margin[1]) for each in self.layers)
        return MultiplyAdds(self.patchwise * rows * columns, dense)

    def to_dict(self) -> dict[str, Any]:
        """The report in numbers, words, lists and dicts, as JSON takes them."""
        totals = {"patchwise": self.patchwise, "dense": self.dense, "ratio": self.ratio}
        plain = asdict(self)
        plain["layers"] = [_lists(layer) for layer in plain["layers"]]
        return {**_lists(plain), **totals}

    def __rich__(self) -> Table:
        from gpukern.tables import Column, table

        made = table(
            Column("Layer", False, "Total"),
            "Kind",
            Column("Kernel"),
            Column("Dilation"),
            Column("Receptive Field", total=_times(self.receptive_field)),
            Column("Patchwise", total=f"{self.patchwise:,}"),
            Column("Dense", total=f"{self.dense:,}"),
            Column("Ratio", total=formatting.ratio(self.ratio)),
            title=f"{self.model}, patches of {_times(self.patch_size)}",
            caption="Multiply-adds for each pixel of a large image: a patch for each pixel, and the dense network.",
        )
        for layer in self.layers:
            counted = layer.patchwise > 0
            made.add_row(
                layer.name,
                layer.kind,
                _times(layer.kernel),
                _times(layer.dilation),
                _times(layer.receptive_field),
                f"{layer.patchwise:,}" if counted else "",
                f"{layer.dense:,}" if counted else "",
                formatting.ratio(layer.patchwise / layer.dense) if counted else "",
            )
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)


def _layer(step: Step) -> DenseLayer:
    value = step.value
    margin = tuple(d * (s - 1) + e for d, s, e in zip(value.dilation, value.size, value.excess, strict=True))
    return DenseLayer(
        step.name, step.kind, step.kernel, step.dilation, value.reach, value.size,
        step.multiply_adds * value.positions, step.multiply_adds, (margin[0], margin[1]),
    )  # fmt: skip


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _times(size: Pair | None) -> str:
    return "" if size is None else f"{size[0]} × {size[1]}"
