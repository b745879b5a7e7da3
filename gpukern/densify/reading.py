"""Reading of a patch classifier: its forward runs once, on a stand-in for a batch of patches that knows its shape.

``torch.fx`` traces it; layers of ``torch.nn`` and ``gpukern.nn`` are read whole, all other modules through their
forward. Each call becomes steps at once, so that shapes are numbers, and an error is raised where the model makes it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from gpukern import functional
from gpukern.convert import convert
from gpukern.densify import layers, pointwise, shaping
from gpukern.densify.errors import DenseError
from gpukern.densify.patch import Patch
from gpukern.densify.recorder import Recorder
from gpukern.densify.steps import Drop, Step
from gpukern.densify.values import Pair, Value, told
from gpukern.densify.windows import RULES
from gpukern.runtime.evaluation import evaluate

#: Modules whose rules are registered by importing them.
_WITH_RULES = pointwise, shaping


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` on gpukern's layers, with its tensors."""
    if isinstance(model, torch.jit.ScriptModule):
        raise DenseError("the model is compiled by TorchScript: pass the original")
    try:
        return convert(model)
    except RuntimeError as error:
        raise DenseError(f"the model cannot be copied: {error}") from error


def read(model: torch.nn.Module, patch: Pair) -> tuple[list[Step], Value]:
    """The steps of ``model``, one of :func:`copied`, and its result. Its layers then overwrite nothing."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise DenseError(f"{name}: its size is not known yet. Call the model once before")
    errors = []
    for channels in layers.input_channels(model, patch):
        try:
            steps, result = _read_in(model, Value(0, channels, patch), training=False)
        except DenseError as error:
            errors.append(error)
        else:
            steps = _without_idle(steps, model, Value(0, channels, patch))
            _compute_out_of_place(model)
            return steps, result
    raise errors[0]


def _without_idle(steps: list[Step], model: torch.nn.Module, input: Value) -> list[Step]:
    """``steps`` with functional dropouts that drop in training neither marked as such: a second reading tells them."""
    if not any(isinstance(step.operation, Drop) and not step.operation.always for step in steps):
        return steps
    try:
        others = [step.operation for step in _read_in(model, input, training=True)[0]]
    except DenseError:
        return steps
    if [type(step.operation) for step in steps] != [type(other) for other in others]:
        return steps  # what a model does in training alone is left out
    return [
        replace(step, operation=replace(step.operation, never=not other.always))
        if isinstance(step.operation, Drop) and isinstance(other, Drop)
        else step
        for step, other in zip(steps, others, strict=True)
    ]


def _compute_out_of_place(model: torch.nn.Module) -> None:
    """Once it is known who reads what was overwritten: the steps read the values from before and after apart."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # an attribute of activations and dropouts


def _read_in(model: torch.nn.Module, input: Value, training: bool) -> tuple[list[Step], Value]:
    """The steps of ``model`` in a mode, which it has only meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    evaluate(model)
    try:
        for module, _ in modes if training else ():
            module.training = True
        return _Reader(model, input).read()
    finally:
        for module, training in modes:
            module.training = training


class _Whole(torch.nn.Module):
    """``model`` with one argument, in front of which the other ones have their defaults."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.result: Any = None

    def forward(self, input):
        self.result = self.model(input)
        return input


class _Reader(fx.Tracer):
    def __init__(self, model: torch.nn.Module, input: Value) -> None:
        super().__init__(autowrap_modules=(functional,))
        self.whole, self.input = _Whole(model), input
        held = itertools.chain(model.named_parameters(), model.named_buffers(), _plain_tensors(model))
        names: dict[int, str] = {}
        for name, tensor in held:
            names.setdefault(id(tensor), name)
        self.recorder = Recorder(names, input)
        self.stale: set[int] = set()

    def read(self) -> tuple[list[Step], Value]:
        try:
            self.trace(self.whole)
        except DenseError:
            raise
        except Exception as error:  # whatever a model raises
            where = self._where() or "the model"
            raise DenseError(f"{where} cannot be traced: {_first_line(error)}") from error
        result = self.whole.result
        if not isinstance(result, Patch):
            raise DenseError(f"the model returns a {type(result).__name__}, and not one tensor [N, K]")
        return self.recorder.steps, self._finished(self._value(result))

    def _finished(self, value: Value) -> Value:
        if value.size != (1, 1) or value.rank == 3:
            raise DenseError(
                f"the model gives {told(value.shape)} for a patch of {self.input.size[0]} × {self.input.size[1]}, and "
                "not [N, K] or [N, K, 1, 1]"
            )
        self.recorder.layer = ""
        return self.recorder.exact(value)

    # ---- what torch.fx calls ----

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # parameters stay what they are: rules know them by their names

    def proxy(self, node: fx.Node) -> Patch:
        return Patch(node, self)

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, proxy_factory_fn=None):
        if kind == "placeholder":
            return self._stand_in(self.input)
        what = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        layer = kind == "call_module"
        before, self.recorder.layer = self.recorder.layer, _of_model(what) if layer else self._named(what)
        try:
            if kind == "call_function" and (getattr(target, "__module__", None) or "torch").split(".")[0] not in _KNOWN:
                raise DenseError("a function of your own that torch.fx.wrap hides")
            if layer:
                return self._call_layer(_of_model(what), self.whole.get_submodule(what), args, kwargs)
            return self._call(what, args, kwargs)
        except DenseError as error:
            raise error.in_layer(self.recorder.layer or "the model") from error.__cause__
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DenseError(f"{self.recorder.layer or 'the model'}: {_first_line(error)}") from error
        finally:
            self.recorder.layer = before

    def call_module(self, m: torch.nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if not self.is_leaf_module(m, "") and (m._forward_hooks or m._forward_pre_hooks):
            name = _of_model(self.path_of_module(m)) or "the model"
            raise DenseError("it has hooks, which a dense network would not call").in_layer(name)
        return super().call_module(m, forward, args, kwargs)

    # ---- calls ----

    def _call_layer(self, name: str, layer: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        given = (*args, *kwargs.values())
        kind = next(each.__name__ for each in type(layer).__mro__ if each.__module__.startswith("torch."))
        self.recorder.kind = kind
        if len(given) != 1 or not isinstance(given[0], Patch):
            raise DenseError(f"{kind} with {len(given)} arguments, of which one must be the patches")
        result = layers.read(self.recorder, name, layer, self._value(given[0]))
        return self._overwritten(given[0], result) if getattr(layer, "inplace", False) else self._stand_in(result)

    def _call(self, what: str, args: tuple, kwargs: dict) -> Any:
        plain = what.strip("_")
        rule = RULES.get(plain) or RULES.get(plain.removeprefix("i") if plain in _IN_PLACE else plain)
        if rule is None:
            raise DenseError(_WHY_NOT.get(plain, f"{plain} has no dense form"))
        in_place = (what.endswith("_") and not what.endswith("__")) or kwargs.pop("inplace", False)
        self.recorder.kind = plain
        given, named = tree_map_only(Patch, self._value, (list(args), kwargs))
        if "name" in inspect.signature(rule).parameters:
            named["name"] = plain
        result = rule(self.recorder, *given, **named)
        if in_place and isinstance(args[0], Patch):
            return self._overwritten(args[0], result)
        return tree_map_only(Value, self._stand_in, result)

    def _overwritten(self, patch: Patch, result: Value) -> Patch:
        """The same stand-in with another value; what shared its memory may not be read any more."""
        self.stale.add(patch.value.memory)
        patch.value = result
        return patch

    def _value(self, patch: Patch) -> Value:
        if patch.value.memory in self.stale:
            raise DenseError("it reads what a function has changed in place through another view")
        return patch.value

    def _stand_in(self, value: Value) -> Patch:
        patch = self.proxy(self.graph.create_node("placeholder", f"value_{value.slot}"))
        patch.value = value
        return patch

    # ---- names ----

    def _where(self) -> str:
        """The dotted name of the module whose forward is running."""
        stack = list(self.module_stack.values())
        return _of_model(stack[-1][0]) if stack else ""

    def _named(self, function: str) -> str:
        return ": ".join(filter(None, (self._where(), function.strip("_"))))


_RESOLUTION = "it changes the resolution within the patch"
_STATISTICS = "its statistics are of the whole patch, other ones for each patch"
_COMPARED = "a comparison: what the model computes may not depend on values"
#: Reasons why functions have no dense form.
_WHY_NOT = {
    **dict.fromkeys(("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "grid_sample"), _RESOLUTION),
    **dict.fromkeys(("conv_transpose2d", "unfold", "fold", "max_unpool2d"), _RESOLUTION),
    **dict.fromkeys(("group_norm", "instance_norm", "layer_norm", "rms_norm", "var_mean", "std", "var"), _STATISTICS),
    **dict.fromkeys(("permute", "transpose", "movedim", "swapaxes", "t"), "it exchanges channels and positions"),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "bool", "item", "tolist", "where", "nonzero"), _COMPARED),
    **dict.fromkeys(("flip", "roll", "rot90"), "it moves pixels within the patch"),
    "detach": "gradients of the patches stop there",
}
#: Packages whose functions are known by their names.
_KNOWN = frozenset(("torch", "gpukern", "builtins", "math", "operator", "_operator"))
_IN_PLACE = ("iadd", "isub", "imul", "itruediv")


def _plain_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, held in vars(module).items():
            if isinstance(held, torch.Tensor):
                yield (f"{prefix}.{name}" if prefix else name), held


def _of_model(path: str) -> str:
    return path.removeprefix("model").removeprefix(".")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
