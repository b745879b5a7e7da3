"""Parsing and formatting of queries: as typed at a command line, and as answers repeat them."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from gpukern.conv import ConvPlan, ConvProblem, Direction, Epilogue, Padding, Pair, conv_problem, same_padding
from gpukern.explain.query import KINDS, QUANTIZED_KINDS
from gpukern.ops.activation import ACTIVATIONS
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import (
    A100,
    B200,
    B300,
    DEVICES,
    H100,
    L4,
    RTX_3090,
    RTX_5090,
    DeviceSpec,
    assumed_peaks,
    named_device,
)

_SHORT_KINDS = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
_SHORT_QUANTIZED = {"fp8": "float8", "e4m3": "float8", "float8_e4m3fn": "float8"}
#: The best known GPU of each architecture.
ARCHITECTURES = {
    "sm_80": A100,
    "sm_86": RTX_3090,
    "sm_89": L4,
    "sm_90": H100,
    "sm_100": B200,
    "sm_103": B300,
    "sm_120": RTX_5090,
}
#: Names of the kernels' operands and output, in order.
OPERANDS = {
    Direction.FORWARD: ("x", "w", "y"),
    Direction.INPUT_GRAD: ("dy", "w", "dx"),
    Direction.WEIGHT_GRAD: ("dy", "x", "dw"),
}
#: A size that exceeds a GPU's memory is a typing error.
_LARGEST = 2**31


def device_called(name: str | None) -> DeviceSpec:
    """A known GPU by its name or architecture; with None the one that is here, or else an H100. ValueError if none."""
    if name is None:
        if not torch.cuda.is_available():
            return H100
        here = device_spec(torch.device("cuda"))
        return replace(here, peaks=assumed_peaks(here))
    short = name.lower().replace("_", "")
    for architecture, best in ARCHITECTURES.items():
        if short == architecture.replace("_", ""):
            return best
    try:
        return named_device(name)
    except ValueError:
        raise ValueError(
            f"no device or architecture is called {name!r}; known are {', '.join((*DEVICES, *ARCHITECTURES))}"
        ) from None


def kind_called(name: str) -> str:
    """One of :data:`KINDS`, by its name or a short one; raises ValueError for others."""
    kind = _SHORT_KINDS.get(name.lower(), name.lower())
    if kind not in KINDS:
        raise ValueError(f"no dtype is called {name!r}; known are fp16, bf16, tf32, fp32")
    return kind


def layer_kind_called(name: str) -> str:
    """One of :data:`KINDS` or :data:`QUANTIZED_KINDS`, by its name or a short one; raises ValueError for others."""
    kind = _SHORT_QUANTIZED.get(name.lower(), name.lower())
    if kind in QUANTIZED_KINDS:
        return kind
    try:
        return kind_called(name)
    except ValueError:
        raise ValueError(f"no dtype is called {name!r}; known are fp16, bf16, tf32, fp32, int8, fp8") from None


def directions_called(name: str) -> list[Direction]:
    """One or all, "input-grad" for :attr:`Direction.INPUT_GRAD`; raises ValueError for others."""
    names = {direction.name.lower().replace("_", "-"): [direction] for direction in Direction}
    names |= {direction.value: [direction] for direction in Direction} | {"all": list(Direction)}
    if name.lower() not in names:
        raise ValueError(f"no direction is called {name!r}; known are forward, input-grad, weight-grad, all")
    return names[name.lower()]


def epilogue_called(words: str) -> tuple[bool, Epilogue]:
    """(whether a bias is added, the rest) from "bias,residual,relu" in any order; raises ValueError."""
    parts = [part for part in re.split(r"[\s,+]+", words.lower()) if part and part != "none"]
    unknown = [part for part in parts if part not in ("bias", "residual", *ACTIVATIONS)]
    if unknown:
        known = ", ".join(("bias", "residual", *ACTIVATIONS[1:]))
        raise ValueError(f"an epilogue has no part {unknown[0]!r}; known are {known}")
    activations = [part for part in parts if part in ACTIVATIONS]
    if len(activations) > 1:
        raise ValueError(f"an epilogue has one activation, not {' and '.join(activations)}")
    return "bias" in parts, Epilogue(*activations or ["none"], residual="residual" in parts)


def sizes_called(words: str, *counts: int) -> tuple[int, ...]:
    """Positive sizes joined by "x", "×" or ",", as many as one of ``counts``; raises ValueError."""
    parts = re.split(r"[x×,]", words.strip().lower())
    if len(parts) not in counts:
        sizes = "1 size" if len(parts) == 1 else f"{len(parts)} sizes"
        raise ValueError(f"{words!r} has {sizes}, expected {' or '.join(map(str, counts))} joined by x")
    return tuple(_size(part, words) for part in parts)


def _size(part: str, words: str, least: int = 1) -> int:
    if not re.fullmatch(r"\d+", part.strip(), re.ASCII) or not least <= int(part) < _LARGEST:
        where = f" in {words!r}" if part != words else ""
        raise ValueError(f"{part!r}{where} is no size: expected a number from {least} on")
    return int(part)


def pair_called(words: str, least: int = 1) -> Pair:
    """ "2" is (2, 2), "2x1" is (2, 1), rows first; raises ValueError."""
    parts = re.split(r"[x×,]", words.strip().lower())
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"{words!r} is no size: expected one number, or two joined by x")
    vertical, horizontal = (_size(part, words, least) for part in (*parts, *parts)[:2])
    return vertical, horizontal


def padding_called(words: str) -> Pair | str:
    """A pair, "same" or "valid"; raises ValueError."""
    return words if words in ("same", "valid") else pair_called(words, least=0)


def problem_called(
    image: str, filter: str, stride: str = "1", padding: str = "0", dilation: str = "1", groups: int = 1
) -> ConvProblem:
    """The problem of NxCxHxW by KxRxS or KxC/groupsxRxS; raises ValueError for what is not a convolution."""
    N, C, H, W = sizes_called(image, 4)
    K, *group_inputs, R, S = sizes_called(filter, 3, 4)
    if groups < 1 or C % groups:
        raise ValueError(f"{C} input channels do not divide into {groups} groups")
    weight = K, *(group_inputs or [C // groups]), R, S
    steps, spread = pair_called(stride), pair_called(dilation)
    around = _padding(padding_called(padding), (R, S), steps, spread)
    try:
        return conv_problem((N, C, H, W), weight, None, steps, around, spread, groups)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _padding(given: Pair | str, taps: Pair, stride: Pair, dilation: Pair) -> Padding:
    if given == "same":
        if stride != (1, 1):
            raise ValueError("padding 'same' is for stride 1")
        return same_padding(taps, dilation)
    if isinstance(given, str):  # "valid"
        return 0, 0, 0, 0
    vertical, horizontal = given
    return vertical, vertical, horizontal, horizontal


# ---- back into words -----------------------------------------------------------------------------------------------


def describe(p: ConvProblem) -> str:
    """The sizes as people write them: input, filters, geometry; of images of one pixel, matrices."""
    if (p.H, p.W, p.R, p.S) == (1, 1, 1, 1) and p.groups == 1:
        return f"{by(p.N, p.C)} by {by(p.K, p.C)}"
    top, bottom, left, right = p.padding
    lopsided = (top, left) != (bottom, right)
    padding = f"{top}+{bottom}×{left}+{right}" if lopsided else _short((top, left))
    words = [f"{by(p.N, p.C, p.H, p.W)} by {by(p.K, p.group_inputs, p.R, p.S)}"]
    words += [f"stride {_short(p.stride)}", f"padding {padding}"]
    if p.dilation != (1, 1):
        words.append(f"dilation {_short(p.dilation)}")
    if p.groups > 1:
        words.append(f"{p.groups} groups")
    return ", ".join(words)


def describe_plan(plan: ConvPlan, direction: Direction) -> str:
    """Describe a plan uniquely among the launch's plans: including its copies and the products of float32."""
    words = str(replace(plan, pack=(False, False, False)))
    if plan.precision != "ieee":
        words += f", {plan.precision}"
    copied = [name for name, packed in zip(OPERANDS[direction], plan.pack, strict=True) if packed]
    return f"{words}, {' and '.join(copied)} copied" if copied else words


def by(*values: int) -> str:
    return "×".join(map(str, values))


def _short(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else by(*pair)
