"""Base of all optimizers: torch's behaviour around one launch."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard

import torch

from gpukern.optim._fused.hyperparameters import Hyperparameters
from gpukern.optim._fused.param_state import Amp, Entry, Settings, has_values, in_order_of, is_shard, kept, local
from gpukern.optim._fused.rules import Rule
from gpukern.optim._fused.step import Step

_HALVES = (torch.float16, torch.bfloat16)


class Optimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer`` whose step is one kernel launch for each device and combination of dtypes.

    Mixed into the torch class of the same name, it takes that class's arguments, and for every optimizer

    state_dtype:
        what the moments are kept in; None: as the parameter.
    master_weights:
        keep a float32 copy of each half-precision parameter, update that and round it into the parameter.
    stochastic_rounding:
        round bfloat16 parameters up as often as what is cut off is large, so that small updates are not lost. The
        same bits in every run with the same ``seed``.
    max_grad_norm:
        scale the gradients so that the norm of them all is at most this, as ``torch.nn.utils.clip_grad_norm_``, but
        leave ``.grad`` as it is. :attr:`grad_norm` is the norm before.
    max_grad_value:
        cut gradients to ± this, after that, as ``torch.nn.utils.clip_grad_value_``.

    ``foreach``, ``fused`` and ``capturable`` change nothing: the launch is always one, and always can be captured in a
    CUDA graph once a step was made. Arithmetic is in float32 (in float64 for such parameters on a CPU). A parameter may
    have gaps and any strides; a gradient with other strides is copied. Sparse gradients go where torch takes them.
    ``torch.amp.GradScaler`` hands over scale and overflow: a skipped step changes nothing, and ``.grad`` stays scaled,
    which torch's fused optimizers write back divided. On a GPU numbers below 1.2e-38 are taken for zeros.

    What is put into :attr:`state`, or taken out of it, holds from the next step on, the ``data`` of its tensors too; a
    parameter whose state is empty begins anew.

    Of a DTensor, as FSDP2 makes parameters, each process updates its shard, and states are DTensors too.

    Raises, beside what torch raises, ValueError for numbers that are infinite, RuntimeError for ``differentiable``, and
    for shards where norms of whole tensors are needed: with ``max_grad_norm``, and by LARS and LAMB.
    """

    _rule: ClassVar[Rule]
    #: A group's names of the rule's hyperparameters, "betas" for two of them; (): the rule's own names.
    _names: ClassVar[tuple[str, ...]] = ()
    #: The group entry that a state begins with; others begin with zeros.
    _begins: ClassVar[dict[str, str]] = {}
    #: Whether torch's class has the number of updates in its state.
    _counts: ClassVar[bool] = True
    _takes_sparse: ClassVar[bool] = False
    #: torch.amp.GradScaler then passes ``grad_scale`` and ``found_inf``, and leaves the rest to the kernel.
    _step_supports_amp_scaling = True

    _step: Step | None
    _square_sum: torch.Tensor | None
    _hyperparameters: Hyperparameters

    def __init_subclass__(cls, **options: Any) -> None:
        """Merge the signatures of both classes: for help() and for editors."""
        super().__init_subclass__(**options)
        torchs = next((c for c in cls.__mro__[1:] if c.__module__.startswith("torch.optim.")), None)
        if "__init__" in cls.__dict__ or torchs in (None, torch.optim.Optimizer):
            return
        shared = [p for p in inspect.signature(Optimizer.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        signature = inspect.signature(torchs.__init__)  # type: ignore[misc]
        parameters = list(signature.parameters.values())[1:]
        cls.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, *shared], return_annotation=inspect.Signature.empty
        )

    def __init__(
        self,
        *arguments: Any,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        for name, limit in (("max_grad_norm", max_grad_norm), ("max_grad_value", max_grad_value)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"Invalid {name}: {limit}, expected a positive number or None")
        if state_dtype is not None and not getattr(state_dtype, "is_floating_point", False):
            raise ValueError(f"Invalid state_dtype: {state_dtype!r}, expected a floating-point torch.dtype")
        self._state_dtype, self._master_weights = state_dtype, master_weights
        self._settings = Settings(max_grad_norm or 0.0, max_grad_value or 0.0, stochastic_rounding, seed)
        self._hidden_steps: dict[torch.Tensor, torch.Tensor] = {}
        self._counted: dict[torch.Tensor, tuple[Any, ...]] = {}
        self._forget()
        super().__init__(*arguments, **options)
        for name, value in self.defaults.items():
            _check_finite(name, value)
        if self.defaults.get("differentiable"):
            raise RuntimeError(f"gpukern.optim.{type(self).__name__} does not support differentiable=True")

    # ---- a step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what ``closure`` returns, which computes them anew.

        RuntimeError, before anything is changed, for what the optimizer cannot take.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # torch.compiler.disable, but for its import, which takes a second
    def _update(self) -> None:
        """Update, excluded from Dynamo: the step works on raw data pointers, and there is nothing to compile."""
        numbers = self._hyperparameters(self.param_groups)
        if self._step is None or not self._step.fits(self.param_groups, numbers, self.state):
            self._step = None
            step = Step(self._rule, self.param_groups, numbers, self._entry, self.state, self._settings)
            if not step.fits(self.param_groups, numbers, self.state):
                raise RuntimeError("gpukern.optim: parameters or gradients changed during the step")
            self._step = step
        amp = Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        self._square_sum = self._step.run(amp)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients of the last step before they were scaled down, fp32, on their device; None unless
        ``max_grad_norm`` is given."""
        return None if self._square_sum is None else self._square_sum.sqrt().float().squeeze()

    def sync_hyperparameters(self) -> None:
        """Bring the groups' numbers to the device, which :meth:`step` does by itself: for a captured graph that is
        replayed after a scheduler has changed them. Learning rates that are tensors need it not."""
        if self._step is not None:
            self._step.set_numbers(self._hyperparameters(self.param_groups))

    def _forget(self) -> None:
        """Drop the tensors' cached addresses, after they may have changed."""
        self._step = None
        self._square_sum = None
        self._hyperparameters = Hyperparameters(self._names or self._rule.hyperparameters)

    # ---- what belongs to a parameter -------------------------------------------------------------------------------

    def _entry(self, parameter: torch.Tensor, number: int) -> Entry:
        """Return the entry of ``parameter`` in the group ``number``, with its state, created if missing."""
        self._check(parameter)
        wanted = kept(self._rule, self._hyperparameters.of(self.param_groups[number])[1])
        names = [state.name for state, needed in zip(self._rule.states, wanted, strict=True) if needed]
        has_master = self._master_weights and parameter.dtype in _HALVES
        # With nothing to keep there is no empty state, as in torch.
        state = self.state[parameter] if names or self._counts or has_master else {}
        if self._counts:
            # torch's classes never recreate a state that depends on a hyperparameter, which may have changed since.
            always = [each.name for each in self._rule.states if not each.when]
            for name in ("step", *always) if state else ():
                if state.get(name) is None:
                    raise KeyError(name)
        step = self._step_of(parameter, state)
        for name in names:
            state[name] = self._state(name, parameter, state.get(name), self.param_groups[number])
        if has_master:
            held = state.get("master")
            state["master"] = in_order_of(parameter.detach().float() if held is None else held, parameter)
        if not self._counts:
            self._counted[parameter] = self._moments(state)
        return Entry(
            owner=parameter,
            parameter=local(parameter.detach()),
            master=local(state["master"]) if has_master else None,
            states=tuple(
                local(state[each.name]) if needed else None
                for each, needed in zip(self._rule.states, wanted, strict=True)
            ),
            step=step,
            group=number,
        )

    def _check(self, parameter: torch.Tensor) -> None:
        name = type(self).__name__
        if parameter.is_complex():
            raise RuntimeError(f"gpukern.optim.{name} does not take complex parameters")
        if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
            raise RuntimeError(f"gpukern.optim.{name} does not take expanded parameters: their elements share memory")
        if parameter.grad is not None and parameter.grad.is_sparse and not self._takes_sparse:
            advice = ", please consider SparseAdam instead" if isinstance(self, torch.optim.Adam) else ""
            raise RuntimeError(f"{'Adam' if advice else name} does not support sparse gradients{advice}")
        if is_shard(parameter):
            message = "gpukern.optim.{} needs norms of whole tensors, and of a DTensor only a shard is here"
            if self._rule.norms:
                raise RuntimeError(message.format(name))
            if self._settings.max_grad_norm:
                raise RuntimeError(message.format(f"{name} with max_grad_norm"))

    def _state(
        self, name: str, parameter: torch.Tensor, held: torch.Tensor | None, group: dict[str, Any]
    ) -> torch.Tensor:
        if held is None:
            begin = float(group[self._begins[name]]) if name in self._begins else 0.0
            return torch.full_like(parameter, begin, dtype=self._state_dtype or parameter.dtype, requires_grad=False)
        if held.shape != parameter.shape or held.device != parameter.device:
            raise RuntimeError(
                f"{name} of a parameter of shape {list(parameter.shape)} on {parameter.device} has shape "
                f"{list(held.shape)} and is on {held.device}"
            )
        return in_order_of(held.to(self._state_dtype or held.dtype), parameter)

    def _moments(self, state: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(state.get(each.name) for each in self._rule.states)

    def _step_of(self, parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """The number of updates so far, fp32 [], beside the parameter."""
        device = local(parameter).device
        if not self._counts:
            moments = self._moments(state)
            same = map(operator.is_, moments, self._counted.get(parameter, moments))
            if parameter not in self._hidden_steps or not all(same):
                # A state that the user set or loaded must not be reset; one that was removed must be.
                begun = any(isinstance(moment, torch.Tensor) for moment in moments)
                self._hidden_steps[parameter] = torch.full((), float(begun), device=device)
            return self._hidden_steps[parameter]
        step = state.get("step", 0.0)
        if not isinstance(step, torch.Tensor) or step.device != device or step.dtype is not torch.float32:
            step = torch.tensor(float(step), dtype=torch.float32, device=device)
        state["step"] = step
        return step

    # ---- saving and loading ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, that torch's class of the same name can load; with "master" where there are master weights."""
        packed = super().state_dict()
        for number, parameter in enumerate(self._in_order()):
            # A step skipped for an overflow has allocated buffers that are still empty.
            if number in packed["state"] and self._has_nothing_yet(parameter):
                names = {each.name for each in self._rule.states}
                held = packed["state"][number]
                packed["state"][number] = {name: None if name in names else held[name] for name in held}
        return packed

    def _has_nothing_yet(self, parameter: torch.Tensor) -> bool:
        step = self._hidden_steps.get(parameter)
        if step is None or not has_values(step) or step:
            return False
        moments = self._moments(self.state[parameter])
        return all(map(operator.is_, moments, self._counted.get(parameter, moments)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict` of this class, or of torch's.

        Moments stay in the dtype that they are in, unless ``state_dtype`` gives another. A state without its number of
        updates takes that of its group, where other libraries have it. ValueError, with nothing changed, for what does
        not fit, and for a state in which a moment or a group in which a number is missing; switches may be.
        """
        given: list[dict[str, Any]] = []

        def check(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            self._check_loadable(final)
            given.append(self._with_steps(final))
            return given[0]

        def restore(_: Any) -> None:
            self._hidden_steps.clear()
            self._counted.clear()
            self._forget()
            for number, parameter in enumerate(self._in_order()):
                for name, value in given[0]["state"].get(number, {}).items():
                    if isinstance(value, torch.Tensor) and name != "step":
                        self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

        # After the user's own hooks that may change the loaded state, and before those that read it.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        for number, group in enumerate(state_dict["param_groups"]):
            lacking = [name for name in self._numbers() if name not in group]
            if lacking:
                raise ValueError(
                    f"loaded state dict lacks {', '.join(lacking)} in group {number}; it has {', '.join(group)}"
                )
        moments = {"master", *(each.name for each in self._rule.states)}
        for number, parameter in enumerate(self._in_order()):
            held = state_dict["state"].get(number, {})
            lacking = self._lacking(held, _group_of(state_dict, number)) if held else []
            if lacking:
                raise ValueError(
                    f"loaded state dict lacks {', '.join(lacking)} for parameter {number}; it has {', '.join(held)}"
                )
            for name, value in held.items():
                is_moment = isinstance(value, torch.Tensor) and name in moments
                if (is_moment and value.shape != parameter.shape) or (name == "step" and not _is_number(value)):
                    got = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                    raise ValueError(
                        f"loaded state dict has {name} {got} for parameter {number}, which is {list(parameter.shape)}"
                    )

    def _numbers(self) -> list[str]:
        """Names of a group's entries that the arithmetic needs, without switches: those came with later versions."""
        needed = self._names or self._rule.hyperparameters
        return [name for name in needed if not isinstance(self.defaults[name], (bool, type(None)))]

    def _lacking(self, held: dict[str, Any], group: dict[str, Any]) -> list[str]:
        """Names of the entries that a parameter of ``group`` needs and ``held`` lacks."""
        wanted = kept(self._rule, self._hyperparameters.of({**self.defaults, **group})[1])
        names = [each.name for each, needed in zip(self._rule.states, wanted, strict=True) if needed]
        if not self._counts:
            # torch's classes save None before the first update.
            return [name for name in names if name not in held]
        steps = [] if _is_number(held.get("step")) or _is_number(group.get("step")) else ["step"]
        return [*(name for name in names if not isinstance(held.get(name), torch.Tensor)), *steps]

    def _with_steps(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The group's number of updates for a parameter that has none of its own."""
        if not self._counts:
            return state_dict
        states = dict(state_dict["state"])
        for number, held in states.items():
            step = _group_of(state_dict, number).get("step")
            if held and held.get("step") is None and _is_number(step):
                states[number] = {**held, "step": torch.tensor(float(step))}
        return {**state_dict, "state": states}

    def _in_order(self) -> list[torch.Tensor]:
        """Return all parameters, as state_dict() numbers them."""
        return list(dict.fromkeys(parameter for group in self.param_groups for parameter in group["params"]))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_state_dtype", "_master_weights", "_settings", "_hidden_steps", "_counted")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_counted", {})  # an optimizer pickled by an older version lacks this
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _check_finite(name: str, value: Any) -> None:
    for each in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(each, (float, torch.Tensor)) and not math.isfinite(each):
            raise ValueError(f"Invalid {name}: {each}")


def _group_of(state_dict: dict[str, Any], number: int) -> dict[str, Any]:
    """The group of the parameter that is saved under this number."""
    return next((group for group in state_dict["param_groups"] if number in group["params"]), {})


def _is_number(value: Any) -> TypeGuard[int | float | torch.Tensor]:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
