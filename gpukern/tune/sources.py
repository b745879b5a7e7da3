"""Problems to tune, from a command line."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpukern.conv import ConvProblem, Direction, Types, shapes
from gpukern.explain.formatting import problem_called, sizes_called
from gpukern.explain.query import KINDS, QUANTIZED_KINDS
from gpukern.runtime.precision import fp32_products
from gpukern.runtime.strides import dense_strides, is_channels_last
from gpukern.tune.record import Call, calls_of

_GEOMETRY = ("stride", "padding", "dilation", "groups")


# ---- layers --------------------------------------------------------------------------------------------------------


def layer_called(words: str) -> ConvProblem:
    """ "32x64x56x56 64x3x3 --stride 2 --padding 1": input, filters, what is not as usual. ValueError if it is not."""
    parts = re.split(r"[\s=]+", words.strip())
    names, values = [part.lstrip("-") for part in parts[2::2]], parts[3::2]
    if len(parts) < 2 or len(names) != len(values) or not set(names) <= set(_GEOMETRY):
        options = " ".join(f"--{name} VALUE" for name in _GEOMETRY)
        raise ValueError(f"{words!r} is no layer: expected NxCxHxW KxRxS and any of {options}")
    geometry: dict[str, Any] = dict(zip(names, values, strict=True))
    if "groups" in geometry:
        geometry["groups"] = sizes_called(geometry["groups"], 1)[0]
    return problem_called(parts[0], parts[1], **geometry)


def layers_in(path: Path) -> list[ConvProblem]:
    """Read a JSON list of such descriptions. OSError or ValueError if it is not one."""
    try:
        listed = json.loads(path.read_text("utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if not isinstance(listed, list) or not all(isinstance(words, str) for words in listed):
        raise ValueError(f'{path} is no list of layers: expected ["NxCxHxW KxRxS --stride 2", ...]')
    return [layer_called(words) for words in listed]


def calls_of_layer(
    problem: ConvProblem, kind: str, channels_last: bool, directions: Collection[Direction]
) -> Iterator[Call]:
    """Return the launches of a layer of these sizes; ``channels_last`` is the layout of its input and its filter.

    In 8 bits there is a forward only."""
    dtype, precision = (KINDS | QUANTIZED_KINDS)[kind]
    types = Types(dtype, dtype) if kind in QUANTIZED_KINDS else None
    x, w, y = shapes(problem, Direction.FORWARD)
    image, filter = (dense_strides(shape, channels_last) for shape in (x, w))
    # PyTorch's rule for a result.
    grad = dense_strides(y, is_channels_last(x, image) or is_channels_last(w, filter))
    operands = {
        Direction.FORWARD: (image, filter, None),
        Direction.INPUT_GRAD: (grad, filter, channels_last),
        Direction.WEIGHT_GRAD: (grad, image, channels_last),
    }
    for direction in directions:
        if types is None or direction is Direction.FORWARD:
            yield Call(problem, direction, *operands[direction], True, dtype, precision, types)


def with_batch(problem: ConvProblem, batch: int | None) -> ConvProblem:
    return problem if batch is None else replace(problem, N=batch)


# ---- models --------------------------------------------------------------------------------------------------------


def model_called(name: str, *arguments: Any) -> torch.nn.Module:
    """Call "package.module:factory" with ``arguments``; modules of the working directory are found too. ValueError
    if there is none, or if it makes no model."""
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{name!r} names no model: expected package.module:factory")
    with working_directory_on_path():
        try:
            factory: Any = importlib.import_module(module_name)
            for part in factory_name.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as problem:
            raise ValueError(f"{name} is not there: {problem}") from problem
        made = factory(*arguments)
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"{name} makes a {type(made).__name__}, expected a torch.nn.Module")
    return made


def calls_of_model(
    model: torch.nn.Module,
    shape: Sequence[int],
    kind: str,
    channels_last: bool,
    directions: Collection[Direction],
    device: torch.device,
) -> tuple[Call, ...]:
    """Return the launches of ``model`` for an input of ``shape``. The model is left in another dtype, on ``device``."""
    memory_format = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    model = model.to(device, KINDS[kind][0])
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(*shape, device=device).to(KINDS[kind][0], memory_format=memory_format)
    with fp32_products(KINDS[kind][1], KINDS[kind][1]):
        return calls_of(model, [image], directions)


@contextlib.contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Put the working directory on the path, where the command's own folder is instead."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
