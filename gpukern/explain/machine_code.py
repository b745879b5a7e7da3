"""The machine code of a plan: compiled for the named device, disassembled and counted. Needs Triton, not a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gpukern.conv import ConvPlan, shapes
from gpukern.explain.query import Question
from gpukern.runtime.mode import EMULATE, has_triton
from gpukern.runtime.strides import dense_strides

if TYPE_CHECKING:
    from gpukern.runtime.compile_only import Launch
    from gpukern.runtime.sass import Sass


class CannotCompile(Exception):
    """There is no machine code to show; the message gives the reason in a sentence."""


@dataclass(frozen=True)
class Compiled:
    """One kernel of a launch. Sizes in bytes; ``loop`` counts the instructions of the main loop by their purpose.

    ``copies_ahead`` are the asynchronous copies before the main loop: 0 of a loop that fetches nothing in advance.
    """

    kernel: str
    grid: tuple[int, ...]
    registers: int
    shared_memory: int
    spills: int
    instructions: int
    tensor_core: str | None
    loop: dict[str, int]
    copies_ahead: int

    @property
    def loop_length(self) -> int:
        return sum(self.loop.values())


def compiled(question: Question, choice: ConvPlan) -> list[Compiled]:
    """Every kernel that a call under ``choice`` launches, in order; raises :class:`CannotCompile`."""
    if not has_triton():
        raise CannotCompile("Triton is not installed, so nothing can be compiled here")
    if EMULATE:
        raise CannotCompile("GPUKERN_EMULATE=1 replaces the compiler by an interpreter; unset it to see machine code")
    from gpukern.runtime.compile_only import record_launches

    with record_launches(question.device) as launches:
        _call(question, choice)
    try:
        return [_counted(launch) for launch in launches]
    except Exception as error:  # any error of Triton, LLVM or ptxas
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CannotCompile(f"{choice} does not compile: {reason}") from error


def _call(question: Question, choice: ConvPlan) -> None:
    """Make the call on tensors without memory."""
    from gpukern.conv import launch_quantized, prepared_for, run  # need Triton

    p, direction = question.problem, question.direction
    given = zip(shapes(p, direction), (question.first, question.second), strict=False)
    first, second = (_empty(shape, strides, question) for shape, strides in given)
    if question.types is not None:
        numbers = torch.empty(p.K, device="meta")
        bias, activation = numbers if question.bias else None, question.epilogue.activation
        laid_out = dense_strides(shapes(p, direction)[2], question.channels_last)
        residual = _empty(shapes(p, direction)[2], laid_out, question) if question.epilogue.residual else None
        rest = activation, 0.1, 0.5 if question.epilogue.residual else 1.0, 0.5, question.types.output, choice
        launch_quantized(direction, p, first, second, numbers, bias, residual, *rest)
        return
    prepared = prepared_for(p, direction, first, second, question.channels_last, question.epilogue, choice)
    bias = _empty((p.K,), (1,), question) if question.bias else None
    residual = _empty(prepared.shape, prepared.written, question) if question.epilogue.residual else None
    run(prepared, first, second, bias, residual)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], question: Question) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=question.dtype, device="meta")


_read: dict[str, Sass] = {}


def _counted(launch: Launch) -> Compiled:
    """Launches that share a compiled kernel are read once; Triton keeps what it compiled on disk."""
    from gpukern.runtime.sass import read_sass

    if launch.fingerprint not in _read:
        _read[launch.fingerprint] = read_sass(launch.compile())
    sass = _read[launch.fingerprint]
    loop = sass.main_loop
    return Compiled(
        kernel=launch.kernel,
        grid=launch.grid,
        registers=sass.registers,
        shared_memory=sass.shared_memory,
        spills=sass.spills,
        instructions=sass.instructions.total(),
        tensor_core=sass.tensor_core,
        loop=loop.mix if loop else {},
        copies_ahead=loop.copies_ahead if loop else 0,
    )
