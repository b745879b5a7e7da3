"""The check: copies, a run in float64, every layer alone, and the model as a whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gpukern.checking import whole
from gpukern.checking.bounds import SIGMAS, Bound, bounds_of, product_error, smallest
from gpukern.checking.errors import CheckError
from gpukern.checking.layer import OUTPUT, Call, compute, restore
from gpukern.checking.models import Models, NoDropout, Unit, floating, in_full, map_floating, packed, prepare
from gpukern.checking.report import CheckReport
from gpukern.checking.values import Error, LayerCheck, TensorCheck
from gpukern.formatting import count
from gpukern.fusion.describe import environment
from gpukern.fusion.errors import first_line
from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.tensors import KERNEL_DTYPES

#: What gradients in 16 bits are scaled to, as a loss is: the largest element of any.
_LARGEST_GRAD = 2.0**10

Progress = Callable[[str, int, int], None]


def run(
    model: torch.nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    channels_last: bool,
    training: bool,
    seed: int,
    progress: Progress,
) -> CheckReport:
    """See :func:`gpukern.check`."""
    dtype = dtype or _dtype_of(model, (args, kwargs))
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"check() takes float32, float16 or bfloat16, got {dtype}")
    progress("copying the model", 0, 1)
    with torch.inference_mode(False), torch.enable_grad():
        models = prepare(model, dtype, channels_last, training)
        # Without weights that learn, the gradients that there are come from the inputs.
        learns = any(parameter.requires_grad for parameter in models.exact.parameters())
        inputs = map_floating(
            lambda each: (
                _packed(each.detach(), channels_last)
                .to(dtype, copy=True)
                .requires_grad_(each.requires_grad or not learns)
            ),
            (args, kwargs),
        )
        like = next(iter([*models.exact.parameters(), *floating(inputs)]))
        with torch.autocast(like.device.type, enabled=False):
            return _Check(models, inputs, dtype, like, seed, progress).report(
                model=type(model).__name__,
                device=str(like.device),
                mode=mode_of(like).value,
                dtype=str(dtype).removeprefix("torch."),
                channels_last=channels_last,
                training=training,
                seed=seed,
                environment=environment(like.device),
            )


def _dtype_of(model: torch.nn.Module, inputs: Any) -> torch.dtype:
    for each in (*model.parameters(), *floating(inputs)):
        if each.is_floating_point():
            return each.dtype if each.dtype in KERNEL_DTYPES else torch.float32
    raise CheckError("the model has no weights, and its inputs no floating-point tensor")


def _packed(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return packed(tensor) if channels_last else tensor


class _Check:
    """``like``: a tensor on the device of the model."""

    def __init__(
        self, models: Models, inputs: Any, dtype: torch.dtype, like: torch.Tensor, seed: int, progress: Progress
    ) -> None:
        self._models, self._inputs, self._dtype, self._like, self._seed = models, inputs, dtype, like, seed
        self._products = product_error(like, dtype)
        self._notes = list(models.notes)
        if mode_of(like) is Mode.REFERENCE:
            self._notes.append("gpukern's layers are plain torch here: GPUKERN_EMULATE=1 runs its kernels, emulated")
        self._buffers = [buffer.clone() for buffer in models.exact.buffers()]
        self._progress, self._done = progress, 0
        self._grads: list[torch.Tensor] = []
        #: by (place, tensor): the bound alone relative to the tensor's norm
        self._relative: dict[tuple[int, str], float] = {}

    def report(self, **given: Any) -> CheckReport:
        self._step("float64", 0)
        self._truth = self._run_exact()
        self._keep_called()
        self._note_zeros()
        units = self._models.units
        layers = [self._alone(place, unit) for place, unit in enumerate(units)]
        spread = self._spread()
        ours = self._run_whole(self._models.ours, "gpukern")
        torchs = self._run_whole(self._models.torchs, "torch")
        layers = list(self._with_whole(layers, ours, torchs, spread))
        return CheckReport(layers=tuple(layers), notes=tuple(self._notes), **given)

    def _step(self, what: str, advance: int = 1) -> None:
        self._done += advance
        self._progress(what, self._done, len(self._models.units) + whole.DRAWS + 3)

    # ---- float64 ---------------------------------------------------------------------------------------------------

    def _run_exact(self) -> whole.Run:
        with NoDropout() as self._dropout, _random(self._seed, self._like) as drawn:
            try:
                found = self._exact_run(self._seeds, keep=self._dtype)
            except (CheckError, torch.OutOfMemoryError):
                raise
            except Exception as problem:  # whatever a model raises
                raise CheckError(f"the model fails in float64: {first_line(problem)}") from problem
            random = drawn()
        given = [each for each in found.outputs if each.numel()]
        if given and not any(each.isfinite().any() for each in given):
            raise CheckError("the model returns nothing finite for these inputs in float64")
        if not self._grads:
            self._notes.append("nothing that the model returns has a gradient: outputs alone are compared")
        if self._dropout.happened:
            self._notes.append("calls of dropout functions are off")
        if random:
            self._notes.append(
                "the model draws random numbers: where gpukern's layers draw others, errors include that"
            )
        largest = max((grad.abs().max().item() for grad in _grads(found) if grad.numel()), default=0.0)
        #: Powers of two, which change no significand. Also where a gradient is not finite.
        exponent = math.floor(math.log2(_LARGEST_GRAD / largest)) if 0 < largest < math.inf else 0
        self._scale = 2.0**exponent if self._dtype is torch.float16 else 1.0
        return found

    def _exact_run(self, seeds: Any, **how: Any) -> whole.Run:
        restore(self._models.exact, self._buffers)
        inputs = map_floating(lambda each: each.detach().double().requires_grad_(each.requires_grad), self._inputs)
        with in_full():
            return whole.run(self._models.exact, self._models.units, inputs, seeds, **how)

    def _seeds(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Random gradients of the outputs, rounded to the dtype."""
        generator = torch.Generator().manual_seed(self._seed)
        self._grads = [
            torch.randn(each.shape, generator=generator).to(each.device, self._dtype).double() for each in outputs
        ]
        return self._grads

    def _keep_called(self) -> None:
        """Leave out layers that the model does not call: it may use their weights by itself."""
        calls, units = self._truth.calls, self._models.units
        kept = [place for place in range(len(units)) if calls[place] and all(each.outputs for each in calls[place])]
        self._truth.calls = {new: calls[old] for new, old in enumerate(kept)}
        self._models.units = [units[place] for place in kept]

    def _note_zeros(self) -> None:
        """Tell of layers to whose output only zeros come back: their gradients are zeros whoever computes them."""
        every = self._truth.calls.values()
        given = ([grad for call in calls for grad in call.grads if grad is not None] for calls in every)
        number = sum(bool(grads) and not any(grad.any() for grad in grads) for grads in given)
        if number:
            layers = count(number, "layer gets", "layers get")
            self._notes.append(f"{layers} a gradient of zeros, which proves nothing: some weights behind may be zeros")

    # ---- layers alone ----------------------------------------------------------------------------------------------

    def _alone(self, place: int, unit: Unit) -> LayerCheck:
        self._step(unit.name)
        names: dict[str, list[Error]] = {}
        notes: list[str] = []
        for call in self._truth.calls[place]:
            for name, errors in self._alone_in(place, unit, _scaled(call), notes).items():
                worst = names.setdefault(name, list(errors))
                for index, error in enumerate(errors):
                    worst[index] = _worse(worst[index], error)
        tensors = tuple(TensorCheck(name, ours, torchs, Error(), Error()) for name, (ours, torchs) in names.items())
        note = "; ".join(dict.fromkeys(notes))
        for each in self._truth.calls[place]:
            each.args, each.kwargs = (), {}
        return LayerCheck(unit.name, unit.type, unit.reason, len(self._truth.calls[place]), tensors, note)

    def _alone_in(self, place: int, unit: Unit, call: Call, notes: list[str]) -> dict[str, tuple[Error, Error]]:
        """{tensor: (gpukern's error, torch's)} of one call."""
        exact = unit.module(self._models.exact)
        narrow = call.to(self._dtype)
        wide = narrow.to(torch.float64)
        begun = [buffer.clone() for buffer in unit.module(self._models.torchs).buffers()]
        with in_full(), self._reproducible():
            restore(exact, begun)
            truth = compute(exact, wide).tensors
            if self._dtype is torch.float16 and (scale := _within_range(truth)) != 1:
                narrow = narrow.map(lambda tensor: tensor, lambda grad: grad * scale)
                wide = narrow.to(torch.float64)
                restore(exact, begun)
                truth = compute(exact, wide).tensors
            restore(exact, begun)
            allowed = bounds_of(exact, wide, truth, self._dtype, self._products)
        torchs = self._narrow(self._models.torchs, unit, narrow, begun, notes, "torch")
        ours = torchs if unit.reason else self._narrow(self._models.ours, unit, narrow, begun, notes, "gpukern")
        found = {}
        for name, tensor in truth.items():
            if name not in allowed:
                continue
            self._note_relative(place, name, tensor, allowed[name])
            errors = [
                _error(each.get(name) if each is not None else None, tensor, allowed[name]) for each in (ours, torchs)
            ]
            found[_called(unit, name)] = (errors[0], errors[1])
        return found

    def _narrow(
        self, model: torch.nn.Module, unit: Unit, call: Call, begun: Sequence[torch.Tensor], notes: list[str], by: str
    ) -> dict[str, torch.Tensor] | None:
        """The results of a layer in the dtype; None, and a note, if it raises."""
        module = unit.module(model)
        try:
            with self._reproducible():
                return compute(module, call).tensors
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a layer raises
            notes.append(f"{by} raises {first_line(problem)}")
            return None
        finally:
            restore(module, begun)

    def _note_relative(self, place: int, name: str, truth: torch.Tensor, bound: Bound) -> None:
        norm = truth.norm().item()
        size = bound if isinstance(bound, float) else bound.norm().item()
        if norm and math.isfinite(size) and math.isfinite(norm):
            key = place, name
            self._relative[key] = max(self._relative.get(key, 0.0), size / norm)

    @contextlib.contextmanager
    def _reproducible(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_random(self._seed, self._like))
            if self._dropout.happened:
                stack.enter_context(NoDropout())
            yield

    # ---- the whole model -------------------------------------------------------------------------------------------

    def _spread(self) -> dict[Any, float]:
        def draws() -> Iterator[whole.Run]:
            for number in range(whole.DRAWS):
                self._step("float64, with changed layers")
                generator = torch.Generator().manual_seed(number)

                def change(place: int, tensor: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
                    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
                    return tensor * (1 + self._change_of(place) * noise)

                with self._reproducible():
                    yield self._exact_run(self._grads, change=change)

        return whole.spread(draws(), self._truth)

    def _change_of(self, place: int) -> float:
        """A standard deviation of a layer's error, relative: of its output, or of the gradient that it passes on."""
        given = [self._relative.get((place, name), 0.0) for name in (OUTPUT, "input gradient")]
        return max(given) * 2 / SIGMAS

    def _run_whole(self, model: torch.nn.Module, by: str) -> whole.Run | None:
        self._step(f"the whole model by {by}")
        units = self._models.units
        # A hook would part what is computed as one.
        watched = [unit if len(unit.names) == 1 or by == "torch" else None for unit in units]
        places = [place for place, unit in enumerate(watched) if unit is not None]
        seeds = [grad * self._scale for grad in self._grads]
        try:
            with self._reproducible():
                found = whole.run(model, [units[place] for place in places], self._inputs, seeds)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a model raises
            self._notes.append(f"the whole model by {by} raises {first_line(problem)}")
            return None
        found.calls = {place: found.calls[index] for index, place in enumerate(places)}
        return found

    def _with_whole(
        self, layers: list[LayerCheck], ours: whole.Run | None, torchs: whole.Run | None, spread: Mapping[Any, float]
    ) -> Iterator[LayerCheck]:
        exact = dict(whole.tensors(self._truth))
        errors = [self._whole_errors(each, exact, spread) for each in (ours, torchs)]
        names: set[str] = set()
        for place, (unit, layer) in enumerate(zip(self._models.units, layers, strict=True)):
            found = {each.name: each for each in layer.tensors}
            inner = dict(unit.module(self._models.exact).named_parameters())
            keys = {f"{name} gradient": unit.parameter(name) for name in inner}
            names |= set(keys.values())
            keyed: dict[str, list[Any]] = {_called(unit, name): [key] for name, key in keys.items()}
            for key in exact:
                if isinstance(key, tuple) and key[0] == place:
                    keyed.setdefault(key[2], []).append(key)
            checked = [_in_model(found.pop(name, None), name, each, errors) for name, each in keyed.items()]
            tensors = [each for each in (*checked, *found.values()) if each is not None]
            order = [each.name for each in layer.tensors]
            tensors.sort(key=lambda each: order.index(each.name) if each.name in order else len(order))
            yield LayerCheck(layer.name, layer.type, layer.reason, layer.calls, tuple(tensors), layer.note)
        yield from self._others(set(self._truth.grads) - names, errors)

    def _others(self, names: set[str], errors: Sequence[Mapping[Any, Error]]) -> Iterator[LayerCheck]:
        """Parameters that no layer of the check has: of modules that compute with them by themselves."""
        for owner, module in self._models.exact.named_modules():
            own = [name for name, _ in module.named_parameters(prefix=owner, recurse=False) if name in names]
            names -= set(own)
            found = [_in_model(None, f"{each.rpartition('.')[2]} gradient", [each], errors) for each in own]
            tensors = tuple(each for each in found if each is not None)
            if tensors:
                reason = "its weights are used outside of its call"
                yield LayerCheck(owner or "(the model)", type(module).__name__, reason, 0, tensors)

    def _whole_errors(
        self, run: whole.Run | None, exact: Mapping[Any, torch.Tensor], spread: Mapping[Any, float]
    ) -> dict[Any, Error]:
        if run is None:
            return {}
        eps = torch.finfo(self._dtype).eps
        found = {}
        for key, tensor in whole.tensors(run, self._scale):
            if key not in exact:
                continue
            error = whole.distance(tensor, exact[key])
            scale = (
                1.0 if isinstance(key, tuple) and key[2].startswith("output") and "grad" not in key[2] else self._scale
            )
            norm = exact[key].norm().item() * scale
            underflow = smallest(self._dtype) * math.sqrt(tensor.numel()) / norm if norm else 0.0
            own = self._own_bound(key)
            allowed = whole.FACTOR * spread[key] + own + whole.ROUNDINGS * (eps + underflow)
            # Of nothing there is no relative error.
            found[key] = Error(error, _share(error, allowed) if norm else None)
        return found

    def _own_bound(self, key: Any) -> float:
        """The relative bound alone of the tensor called so."""
        if isinstance(key, tuple):
            return self._relative.get((key[0], key[2]), 0.0)
        for place, unit in enumerate(self._models.units):
            for inner, _ in unit.module(self._models.exact).named_parameters():
                if unit.parameter(inner) == key:
                    return self._relative.get((place, f"{inner} gradient"), 0.0)
        return 0.0


def _in_model(
    alone: TensorCheck | None, name: str, keys: Sequence[Any], errors: Sequence[Mapping[Any, Error]]
) -> TensorCheck | None:
    """``alone`` with the errors in the model of the tensors called ``keys``, the worst of them."""
    worst = [Error(), Error()]
    for index, known in enumerate(errors):
        for key in keys:
            worst[index] = _worse(worst[index], known.get(key, Error()))
    if alone is None:
        return None if worst == [Error(), Error()] else TensorCheck(name, Error(), Error(), *worst)
    return TensorCheck(name, alone.alone, alone.alone_torch, *worst)


def _called(unit: Unit, name: str) -> str:
    """The name of a result of a unit in reports: of neighbours, with the last part of the layer's name."""
    number, _, inner = name.partition(".")
    if len(unit.names) == 1 or not inner or not number.isdigit():
        return name
    return f"{unit.names[int(number)].rpartition('.')[2]}.{inner}"


def _grads(run: whole.Run) -> Iterator[torch.Tensor]:
    yield from run.grads.values()
    for calls in run.calls.values():
        for call in calls:
            yield from (grad for grad in call.grads if grad is not None)


def _scaled(call: Call) -> Call:
    """The call with gradients of which the largest is near one: by a power of two."""
    largest = max((grad.abs().max().item() for grad in call.grads if grad is not None and grad.numel()), default=0.0)
    scale = 2.0 ** -math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
    grads = [None if grad is None else grad * scale for grad in call.grads]
    return Call(call.args, call.kwargs, call.outputs, grads, call.needs)


def _within_range(truth: Mapping[str, torch.Tensor]) -> float:
    """The power of two by which gradients fit into float16, sums of many too."""
    grads = [tensor for name, tensor in truth.items() if name.endswith("gradient") or " gradient " in name]
    largest = max((grad.abs().max().item() for grad in grads if grad.numel()), default=0.0)
    return 2.0 ** min(0, math.floor(math.log2(_LARGEST_GRAD / largest))) if 0 < largest < math.inf else 1.0


def _worse(one: Error, other: Error) -> Error:
    if one.share is None or other.share is None:
        return other if one.share is None else one
    return other if other.share > one.share else one


def _error(tensor: torch.Tensor | None, truth: torch.Tensor, bound: Bound) -> Error:
    """``tensor`` beside ``truth``. A missing one, and one that is not finite where the truth is, errs infinitely."""
    if tensor is None or tensor.shape != truth.shape:
        return Error(math.inf, math.inf)
    error = whole.distance(tensor, truth)
    if not math.isfinite(error):
        return Error(error, math.inf)
    difference = torch.where(truth.isfinite(), tensor.double() - truth, 0.0)
    if isinstance(bound, float):
        return Error(error, _share(difference.norm().item(), bound))
    shares = torch.where(difference == 0, 0.0, difference.abs() / bound)
    return Error(error, shares.max().item() if shares.numel() else 0.0)


def _share(error: float, bound: float) -> float:
    return 0.0 if error == 0 else error / bound if bound else math.inf


@contextlib.contextmanager
def _random(seed: int, like: torch.Tensor) -> Iterator[Callable[[], bool]]:
    """Begin from ``seed``, and afterwards from where it was; yields what says whether numbers were drawn since."""
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]

        def drawn() -> bool:
            now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]
            return not all(map(torch.equal, before, now))

        yield drawn
