"""Proof by example: the fused model beside the original in fp64, and whose fault it is where it is no longer the same.

The fused model must be no further from the truth than ``FACTOR`` times the unfused model in the same dtype is, plus a
floor of a few roundings: two models that both round as they must can differ by so much by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpukern.fuse.errors import FusionError
from gpukern.fuse.given import duplicate
from gpukern.fuse.lower import Lowered
from gpukern.fuse.match import Match
from gpukern.fuse.program import Program, assemble
from gpukern.fuse.report import Verification
from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.precision import TF32_ROUNDED, conv_precision, matmul_precision

aten = torch.ops.aten

FACTOR = 2.0
#: The floor in roundings to the dtype, of the output in either model ...
_ROUNDINGS = 1.0
#: ... and in those of sums, which two kernels add in different orders; more where the truth's own sums were no wider.
_SUMS, _SUMS_OF_TRUTH = 16.0, 64.0
#: Bytes of parameters in fp64 beyond which fp32 is the truth.
_LARGEST = 2e9
#: Of outputs that are no floating-point numbers, as classes of pixels: so many may differ.
DISAGREEMENT = 0.01


class Witness:
    """What the original returns for ``inputs``, in truth and in ``dtype``. ``model`` is a private copy."""

    def __init__(self, model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> None:
        self.inputs = inputs
        with _Products() as products:
            self.truth_dtype, truth = _truth(model, inputs)
        self.truth = leaves(truth)
        unfused = leaves(_in_dtype(model, inputs, dtype))
        self.unfused = distance(unfused, self.truth)
        if not math.isfinite(self.unfused):
            # The original overflows in this dtype, and is no measure: roundings of all layers by their square root.
            self.unfused = math.sqrt(max(products.convolutions + products.matrices, 1)) * torch.finfo(dtype).eps
        self.floor = _floor(dtype, self.truth_dtype) + _tf32(products, inputs, dtype)
        if not any(leaf.is_floating_point() for leaf in self.truth):
            self.floor = max(self.floor, DISAGREEMENT)

    def judge(self, module: torch.nn.Module) -> Verification:
        """How far ``module`` is from the truth."""
        with torch.no_grad():
            outputs = leaves(module(*self.inputs))
        return Verification(
            truth=str(self.truth_dtype).removeprefix("torch."),
            error=distance(outputs, self.truth),
            unfused=self.unfused,
            factor=FACTOR,
            floor=self.floor,
            argmax_agreement=_argmax_agreement(outputs, self.truth),
        )


def _floor(dtype: torch.dtype, truth: torch.dtype) -> float:
    sums = torch.promote_types(dtype, torch.float32)
    wider = torch.finfo(truth).eps < torch.finfo(sums).eps
    of_sums = (_SUMS if wider else _SUMS_OF_TRUTH) * torch.finfo(sums).eps
    return _ROUNDINGS * torch.finfo(dtype).eps + of_sums


class _Products(TorchDispatchMode):
    """Counts convolutions and matrix products, whatever a model is made of: modules, functions, an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.convolutions += func.overloadpacket in (aten.convolution, aten._convolution)
        self.matrices += func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
        return func(*args, **(kwargs or {}))


def _tf32(products: _Products, inputs: tuple, dtype: torch.dtype) -> float:
    """What the floor has more where the fused model's kernels may multiply in TF32.

    The unfused model is no measure of it: cuDNN does so for some layers and not for others, a CPU for none. Operands of
    each layer are rounded to 11 bits, and errors of random sign add up by the square root of their number.
    """
    tensors = leaves(inputs)
    if dtype is not torch.float32 or not tensors or mode_of(tensors[0]) is Mode.REFERENCE:
        return 0.0
    kinds = (products.convolutions, conv_precision(dtype)), (products.matrices, matmul_precision(dtype))
    return math.sqrt(sum(count for count, precision in kinds if precision == "tf32")) * TF32_ROUNDED


def _truth(model: torch.nn.Module, inputs: tuple) -> tuple[torch.dtype, Any]:
    size = 8 * sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float64, torch.float32):
        if dtype is torch.float64 and size > _LARGEST:
            continue
        try:
            with torch.no_grad():
                return dtype, duplicate(model).to(dtype)(*cast(inputs, dtype))
        except Exception as error:  # whatever a model raises
            # One that makes fp32 tensors of its own, or asks for them, cannot run in fp64.
            failure = error
    raise FusionError(f"the model fails for the example: {type(failure).__name__}: {failure}") from failure


def _in_dtype(model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> Any:
    """What the unfused model returns in ``dtype``, its batch norms in fp32 where that can be: the stricter measure."""
    for keep in (True, False):
        typed = duplicate(model).to(dtype)
        if keep:
            exact = dict(model.named_modules())
            for name, module in list(typed.named_modules()):
                if isinstance(module, _BatchNorm):
                    module.float().load_state_dict(exact[name].state_dict())
        try:
            with torch.no_grad():
                return typed(*cast(inputs, dtype))
        except Exception as error:  # whatever a model raises
            failure = error
    raise FusionError(f"the model fails in {dtype}: {type(failure).__name__}: {failure}") from failure


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """``inputs`` with all floating-point tensors in ``dtype``, copied: some models write into their input."""
    return pytree.tree_map(
        lambda leaf: (
            (leaf.to(dtype, copy=True) if leaf.is_floating_point() else leaf.clone())
            if isinstance(leaf, torch.Tensor)
            else leaf
        ),
        inputs,
    )


def leaves(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def distance(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest ‖y − truth‖ / ‖truth‖ of all floating-point outputs; of others, where there are no such, the share
    that differs. Infinite where the outputs are of other number or shape, or not finite where the truth is."""
    if [tuple(each.shape) for each in outputs] != [tuple(each.shape) for each in truth]:
        return math.inf
    pairs = list(zip(outputs, truth, strict=True))
    floating = [_relative(y, t) for y, t in pairs if t.is_floating_point() or t.is_complex()]
    others = [(y != t).double().mean().item() for y, t in pairs if t.numel()]
    return max(floating or others, default=0.0)


def _relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    kind = torch.complex128 if truth.is_complex() else torch.float64
    y, truth = y.to(kind), truth.to(kind)
    finite = truth.isfinite()
    if not torch.equal(y.isfinite(), finite):
        return math.inf
    y, truth = torch.where(finite, y, 0), torch.where(finite, truth, 0)
    size = truth.norm().item()
    difference = (y - truth).norm().item()
    return difference / size if size else difference


def _argmax_agreement(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float | None:
    for y, t in zip(outputs, truth, strict=False):
        if t.is_floating_point() and t.dim() >= 2 and t.shape[1] > 1 and t.numel() and y.shape == t.shape:
            return (y.argmax(1) == t.argmax(1)).double().mean().item()
    return None


# ---- whose fault ----------------------------------------------------------------------------------------------------


def blame(found: Verification, matches: Sequence[Match], judge: Callable[[Sequence[Match]], Verification]) -> str:
    """What to say of a verification that did not pass, naming the first match without which it would.

    ``judge`` verifies the model with some of the matches only.
    """
    told = (
        f"the fused model is wrong: error {found.error:.3g}, while the unfused model's is {found.unfused:.3g} "
        f"and {found.bound:.3g} would do"
    )
    if not judge([]).passed:
        return f"{told}. No fused group is to blame: it is wrong with none of them"
    good, bad = 0, len(matches)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if judge(matches[:middle]).passed else (good, middle)
    guilty = matches[bad - 1]
    names = ", ".join(dict.fromkeys(node.name for node in guilty.nodes))
    return f"{told}. To blame is {guilty.pattern} ({names}), by {guilty.operator}"


# ---- the error of each group ----------------------------------------------------------------------------------------


def group_errors(program: Program, matches: Sequence[Match], lowered: Lowered, inputs: Sequence[Any]) -> list[float]:
    """‖y − truth‖ / ‖truth‖ of each match's output within the whole; empty where the program cannot run in fp64.

    ``inputs`` are the leaves of an example as the fused module prepares them.
    """
    exact = {name: held.double() if held.is_floating_point() else held for name, held in program.constants.items()}
    graph, _ = program.copy()
    try:
        truth = _record(
            assemble(graph, exact, program.modules),
            cast(list(inputs), torch.float64),
            [match.output.name for match in matches],
        )
    except (RuntimeError, TypeError):
        return []
    found = _record(lowered.module, inputs, lowered.names)
    return [distance([y], [t]) for y, t in zip(found, truth, strict=True)]


def _record(module: GraphModule, inputs: Sequence[Any], names: Sequence[str]) -> list[torch.Tensor]:
    """The values of nodes, by their names, in a run for ``inputs``."""
    values = {}
    wanted = set(names)

    class Recorder(Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            result = super().run_node(node)
            if node.name in wanted:
                values[node.name] = result
            return result

    with torch.no_grad():
        Recorder(module).run(*inputs)
    return [values[name] for name in names]
