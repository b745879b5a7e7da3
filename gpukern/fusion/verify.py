"""Proof by example: the fused model beside the original in fp64, and whose fault it is where it is no longer the same.

The fused model must be no further from the truth than ``FACTOR`` times the unfused model in the same dtype is, plus a
floor of a few roundings: two models that both round as they must can differ by so much by chance. Where it is, the
unfused model is run some more times, in the fused one's memory format, which is enough to double the error of a long
sum on a CPU, and ``spread`` estimates from them how far a right model may be. Faults of one layer that are smaller
than this are for ``alone`` to find.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpukern import formatting
from gpukern.fusion.decisions import See, decided, leaves, returned
from gpukern.fusion.errors import FusionError
from gpukern.fusion.given import duplicate
from gpukern.fusion.match import Match
from gpukern.fusion.report.values import Verification
from gpukern.fusion.spread import DRAWS, perturb, spread_of
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
#: Share of outputs that are not floating point, such as classes of pixels, that may differ.
DISAGREEMENT = 0.01


class Witness:
    """The original's outputs for ``inputs``, in truth and in ``dtype``. ``model`` is a private copy.

    ``channels_last``: whether the fused model has images in that format. ``see``: by what models are judged, what they
    return or what they decide by.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: tuple,
        dtype: torch.dtype,
        *,
        channels_last: bool = False,
        see: See = returned,
    ) -> None:
        self.inputs, self._see = inputs, see
        self._model, self._dtype = model, dtype
        self._packed = torch.channels_last if channels_last else torch.contiguous_format
        with _Products() as products:
            self.truth_dtype, self.truth = truth_of(model, inputs, see)
        unfused = _in_dtype(model, inputs, dtype, see)
        self.unfused = distance(unfused, self.truth)
        if not math.isfinite(self.unfused):
            # The original overflows in this dtype, so it is not used: roundings of all layers by their square root.
            self.unfused = math.sqrt(max(products.convolutions + products.matrices, 1)) * torch.finfo(dtype).eps
        self.floor = _floor(dtype, self.truth_dtype) + tf32(products.convolutions, products.matrices, inputs, dtype)
        if not any(leaf.is_floating_point() for leaf in self.truth):
            self.floor = max(self.floor, DISAGREEMENT)

    def judge(self, module: Callable[..., Any]) -> Verification:
        """Measure the distance of ``module`` from the truth. FusionError if it decides by other kinds of numbers."""
        with torch.no_grad():
            outputs = self._see(module, self.inputs)
        if self._see is decided and [each.shape for each in outputs] != [each.shape for each in self.truth]:
            raise FusionError(
                "nothing can be proved: the original returns the same for another example too, and the fused model "
                "does not choose that as the original does; fuse with verify=False, unproved"
            )
        found = Verification(
            truth=str(self.truth_dtype).removeprefix("torch."),
            error=distance(outputs, self.truth),
            unfused=self.unfused,
            factor=FACTOR,
            floor=self.floor,
            argmax_agreement=_argmax_agreement(outputs, self.truth),
        )
        if found.passed or not math.isfinite(found.error):
            return found
        unfused, factor = self._spread
        return replace(found, unfused=unfused, factor=factor)

    @functools.cached_property
    def _spread(self) -> tuple[float, float]:
        """The error of the unfused model over draws of it, and the factor of one more: no less than was known."""
        generator = torch.Generator().manual_seed(0)
        change = functools.partial(perturb, generator=generator)
        given = self._model, self.inputs, self._dtype, self._see, self._packed, change
        draws = [_in_dtype(*given) for _ in range(DRAWS)]
        found = [(self.unfused, FACTOR)]
        for number, truth in enumerate(self.truth):
            errors = [_error(draw[number], truth) for draw in draws]
            finite = [error for error in errors if error is not None]
            if truth.is_floating_point() and len(finite) == len(errors):
                found.append(spread_of(finite))
        unfused, factors = zip(*found, strict=True)
        return max(unfused), max(factors)


def _floor(dtype: torch.dtype, truth: torch.dtype) -> float:
    sums = torch.promote_types(dtype, torch.float32)
    wider = torch.finfo(truth).eps < torch.finfo(sums).eps
    return floor(dtype, _SUMS if wider else _SUMS_OF_TRUTH)


def floor(dtype: torch.dtype, sums: float) -> float:
    """Return the error that right models may have, whatever the unfused one's: ``sums`` are roundings of sums."""
    return _ROUNDINGS * torch.finfo(dtype).eps + sums * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


class _Products(TorchDispatchMode):
    """Counts convolutions and matrix products, whatever a model is made of: modules, functions, an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.matrices = 0

    #: Branches of control flow too.
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        self.convolutions += packet in (aten.convolution, aten._convolution)
        self.matrices += packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
        return func(*args, **(kwargs or {}))


def tf32(convolutions: int, matrices: int, inputs: Sequence[Any], dtype: torch.dtype) -> float:
    """Return the increase of the floor, for so many layers, if the fused model's kernels may multiply in TF32.

    The unfused model is not a reference: cuDNN does so for some layers and not for others, a CPU for none. Operands of
    each layer are rounded to 11 bits, and errors of random sign add up by the square root of their number.
    """
    tensors = leaves(inputs)
    if dtype is not torch.float32 or not tensors or mode_of(tensors[0]) is Mode.REFERENCE:
        return 0.0
    kinds = (convolutions, conv_precision(dtype)), (matrices, matmul_precision(dtype))
    return math.sqrt(sum(count for count, precision in kinds if precision == "tf32")) * TF32_ROUNDED


def truth_of(model: torch.nn.Module, inputs: tuple, see: See) -> tuple[torch.dtype, list[torch.Tensor]]:
    size = 8 * sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float64, torch.float32):
        if dtype is torch.float64 and size > _LARGEST:
            continue
        try:
            with torch.no_grad():
                return dtype, see(duplicate(model).to(dtype), cast(inputs, dtype))
        except Exception as error:  # whatever a model raises
            # A model that creates or requires fp32 tensors cannot run in fp64.
            failure = error
    raise FusionError(f"the model fails for the example: {type(failure).__name__}: {failure}") from failure


def _in_dtype(
    model: torch.nn.Module,
    inputs: tuple,
    dtype: torch.dtype,
    see: See,
    packed: torch.memory_format = torch.contiguous_format,
    change: Callable[[torch.nn.Module], None] | None = None,
) -> list[torch.Tensor]:
    """Return the unfused model's outputs in ``dtype``, with batch norms in fp32 if possible: the stricter measure.

    Images and their weights are ``packed``, where the model takes them so. ``change`` is done to it before, in place.
    """
    formats = dict.fromkeys((packed, torch.contiguous_format))
    for keep, format in itertools.product((True, False), formats):
        typed = duplicate(model).to(dtype)
        if keep:
            exact = dict(model.named_modules())
            for name, module in list(typed.named_modules()):
                if isinstance(module, _BatchNorm):
                    module.float().load_state_dict(exact[name].state_dict())
        if change is not None:
            change(typed)
        given = cast(inputs, dtype)
        if format is not torch.contiguous_format:
            for parameter in typed.parameters():
                parameter.data = _packed(parameter.data, format)
            given = pytree.tree_map(functools.partial(_packed, format=format), given)
        try:
            with torch.no_grad():
                return see(typed, given)
        except Exception as error:  # whatever a model raises
            failure = error
    raise FusionError(f"the model fails in {dtype}: {type(failure).__name__}: {failure}") from failure


def _packed(leaf: Any, format: torch.memory_format) -> Any:
    is_image = isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.is_floating_point()
    return leaf.contiguous(memory_format=format) if is_image else leaf


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
    error = _error(y, truth)
    return math.inf if error is None else error.norm().item()


def _error(y: torch.Tensor, truth: torch.Tensor) -> torch.Tensor | None:
    """(y − truth) / ‖truth‖ where the truth is finite; None if ``y`` is not finite just there."""
    kind = torch.complex128 if truth.is_complex() else torch.float64
    y, truth = y.to(kind), truth.to(kind)
    finite = truth.isfinite()
    if not torch.equal(y.isfinite(), finite):
        return None
    y, truth = torch.where(finite, y, 0), torch.where(finite, truth, 0)
    return (y - truth) / (truth.norm().item() or 1.0)


def _argmax_agreement(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float | None:
    for y, t in zip(outputs, truth, strict=False):
        if t.is_floating_point() and t.dim() >= 2 and t.shape[1] > 1 and t.numel() and y.shape == t.shape:
            return (y.argmax(1) == t.argmax(1)).double().mean().item()
    return None


# ---- whose fault ----------------------------------------------------------------------------------------------------


def blame(found: Verification, matches: Sequence[Match], judge: Callable[[Sequence[Match]], Verification]) -> str:
    """Describe a failed verification, naming the first match without which it would pass.

    ``judge`` verifies the model with some of the matches only.
    """
    error, unfused, bound = map(formatting.error, (found.error, found.unfused, found.bound))
    told = f"the fused model is wrong: error {error}, while the unfused model's is {unfused} and {bound} would do"
    if not judge([]).passed:
        return f"{told}. No fused group is to blame: it is wrong with none of them"
    good, bad = 0, len(matches)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if judge(matches[:middle]).passed else (good, middle)
    guilty = matches[bad - 1]
    names = ", ".join(dict.fromkeys(node.name for node in guilty.nodes))
    return f"{told}. To blame is {guilty.pattern} ({names}), by {guilty.operator}"
