"""``python -m bench.norms --device h200``: launches and bytes of norms and losses, without a GPU.

Group norms have 32 groups. Ours are recorded with the plans of the named device; which tensors a kernel reads and
writes is found in its code, and each counts once. PyTorch's operators count by their formula, see
:mod:`bench.training_step.operators`; its RMS norm, which is many operators on a CPU, as the one that it is on a GPU.
The floor: forward the input and the output, backward two inputs and one output; of a loss, the logits, and in the
backward their gradient too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch.utils._python_dispatch import _disable_current_modes

import gpukern.functional as F
import gpukern.ops.cross_entropy
from bench.environment import environment
from bench.results import write_text
from bench.training_step.count import Counter
from gpukern import tables
from gpukern.formatting import ratio, size
from gpukern.runtime.device import DeviceSpec, named_device
from gpukern.runtime.records import plain

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
#: [C, H, W] of layers of ResNet-50 and of diffusion networks; [L, C] of vision transformers and ConvNeXt, in rows; and
#: of a language model's logits.
IMAGES = ((64, 56, 56), (256, 28, 28), (512, 14, 14), (320, 64, 64))
TOKENS, LOGITS = ((196, 768), (3136, 96)), ((64, 32000),)


_Call = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Norm(NamedTuple):
    """``call(functions, x, weight, bias)`` with the functions of a library, and the sizes of an image that x has.

    ``floor``: how many tensors of x's size are moved at least, forward and backward. ``on_gpu``: the call of PyTorch
    that moves what ``call`` does on a GPU, where that is another one than on a CPU.
    """

    call: _Call
    sizes: tuple[tuple[int, ...], ...]
    floor: tuple[int, int] = (2, 3)
    on_gpu: _Call | None = None


def _cross_entropy(functions: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, 1)
    with _disable_current_modes():  # labels are given, and count for nothing
        labels = torch.arange(len(rows)) % rows.shape[1]
    return functions.cross_entropy(rows, labels)


NORMS = {
    "batch norm": Norm(lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True), IMAGES),
    "group norm": Norm(lambda f, x, w, b: f.group_norm(x, 32, w, b), IMAGES),
    "instance norm": Norm(lambda f, x, w, b: f.instance_norm(x, None, None, w, b), IMAGES),
    "layer norm": Norm(lambda f, x, w, b: f.layer_norm(x, x.shape[-1:], w, b), TOKENS),
    # torch.ops.aten._fused_rms_norm: the kernel of layer norm, without a bias.
    "RMS norm": Norm(
        lambda f, x, w, b: f.rms_norm(x, x.shape[-1:], w),
        TOKENS,
        on_gpu=lambda f, x, w, b: f.layer_norm(x, x.shape[-1:], w),
    ),
    "cross entropy": Norm(_cross_entropy, LOGITS, (1, 2)),
}


class Moved(NamedTuple):
    """Launches and bytes of one direction."""

    launches: int
    bytes: int


class Row(NamedTuple):
    norm: str
    shape: tuple[int, ...]
    layout: str
    direction: str
    floor: int
    ours: Moved
    torchs: Moved


def rows(batch: int, dtype: torch.dtype, device: DeviceSpec) -> Iterator[Row]:
    """Count every norm on every size, images in both layouts."""
    for name, norm in NORMS.items():
        for sizes in norm.sizes:
            shape = (batch, *sizes)
            for layout, memory_format in LAYOUTS.items() if len(sizes) == 3 else [("rows", torch.contiguous_format)]:
                x = torch.randn(shape).to(dtype).to(memory_format=memory_format)
                ours, theirs = _moved(F, norm, x, device), _moved(torch.nn.functional, norm, x, None)
                for direction, tensors, a, b in zip(("forward", "backward"), norm.floor, ours, theirs, strict=True):
                    yield Row(name, shape, layout, direction, tensors * x.nbytes, a, b)


def _count() -> int:
    """The number of rows, each in two directions, images in each layout."""
    return sum(2 * (len(LAYOUTS) if len(sizes) == 3 else 1) for norm in NORMS.values() for sizes in norm.sizes)


def _moved(functions: Any, norm: Norm, x: torch.Tensor, device: DeviceSpec | None) -> list[Moved]:
    """Forward and backward, of ours with a device, of PyTorch's without."""
    channels = x.shape[1 if x.dim() == 4 else -1]
    # In halves PyTorch's layer norm takes no parameters of float32 on a CPU, and its other norms no others.
    kept = x.dtype if x.dim() < 4 and device is None else torch.float32
    leaves = x.clone().requires_grad_(), *(torch.ones(channels, dtype=kept, requires_grad=True) for _ in range(2))
    counter = Counter(torch.nn.Module())
    call = norm.on_gpu if norm.on_gpu is not None and device is None else norm.call
    # That labels are classes is only looked at on a CPU.
    with mock.patch.object(gpukern.ops.cross_entropy, "_check_classes"), counter.running(device):
        y = call(functions, *leaves)
    forward = counter.launched.copy()
    counter.launched.clear()
    grad = x.clone() if y.dim() else torch.ones_like(y)
    with counter.running(device):
        torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [
        Moved(len(launched), sum(tensor.bytes for each in launched for tensor in each.touched))
        for launched in (forward, counter.launched)
    ]


def main(
    device: Annotated[str, typer.Option(help="Its plans: h200, a100, ...")] = "h200",
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float16",
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the counts too.")] = None,
) -> None:
    """Count launches and bytes of norms and losses beside PyTorch's and the floor, without a GPU."""
    try:
        spec = named_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    columns, console = (*Progress.get_default_columns()[:2], MofNCompleteColumn()), Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        found = list(bar.track(rows(batch, DTYPES[dtype], spec), total=_count(), description="counting"))
    numbers = tables.numbers("floor", "launches", "gpukern / floor", "PyTorch / floor")
    made = tables.table("norm", "size", "layout", "direction", *numbers, title=f"{dtype}, plans of {spec.name}")
    for row in found:
        made.add_row(
            row.norm,
            "×".join(map(str, row.shape)),
            row.layout,
            row.direction,
            size(row.floor),
            str(row.ours.launches),
            ratio(row.ours.bytes / row.floor),
            ratio(row.torchs.bytes / row.floor),
        )
    tables.show(made, width=120)
    if json_path is not None:
        asked = {"device": spec.name, "batch": batch, "dtype": dtype}
        kept = plain({"environment": environment(torch.device("cpu")), **asked, "rows": found})
        write_text(json_path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
