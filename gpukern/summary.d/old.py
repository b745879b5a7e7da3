"""The arithmetic of a network as a table: sizes, parameters, multiply-adds and receptive fields, layer by layer."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from rich.table import Table

Size = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One call of one layer. Sizes and ``multiply_adds`` are those of one sample, without the batch dimension.

    ``weight_size`` is [K, C/groups, R, S] for convolutions and [in, out] for linear layers, as the lecture writes it.
    ``parameters`` counts biases too; a parameter that an earlier row has counted counts no more. ``multiply_adds``
    counts the products of convolutions and linear layers, and nothing for other layers. ``receptive_field`` is the
    size of the window of the network's input that one output element depends on; it may be larger than the input,
    whose padding it then covers. None: not known.
    """

    name: str
    layer: str
    output_size: Size
    weight_size: Size = ()
    parameters: int = 0
    multiply_adds: int = 0
    receptive_field: Size | Literal["all"] | None = None


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns. ``str()`` gives the table as plain text, ``rich.print`` a prettier one."""

    model: str
    rows: tuple[Row, ...]
    #: All parameters of the model, once each.
    parameters: int
    #: For one sample.
    multiply_adds: int
    notes: tuple[str, ...] = ()

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=self.model, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
        table.caption, table.caption_justify = "\n".join(self.notes) or None, "left"
        table.add_column("Layer", "Total")
        table.add_column("Output Size")
        table.add_column("Weight Size")
        table.add_column("Parameters", f"{self.parameters:,}", justify="right")
        table.add_column("Multiply-adds", f"{self.multiply_adds:,}", justify="right")
        table.add_column("Receptive Field", justify="right")
        for row in self.rows:
            table.add_row(
                row.layer,
                _times(row.output_size),
                _times(row.weight_size),
                f"{row.parameters:,}" if row.parameters else "",
                f"{row.multiply_adds:,}" if row.multiply_adds else "",
                _times(row.receptive_field),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=200, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def summary(model: torch.nn.Module, input_size: Sequence[int]) -> Summary:
    """Run ``model`` once on zeros and describe every layer that has no layers inside.

    Output size ``(N + 2P − D(K−1) − 1)/S + 1``; receptive field ``r + D(K−1)·j`` where ``j``, the product of the
    strides before, is the distance in the input of two neighbouring elements.

    Parameters
    ----------
    model:
        any module that takes one floating-point tensor. It runs in eval mode and without gradients, on its own device
        and dtype; its mode and its buffers are left as they were.
    input_size:
        one sample [C, H, W] or [features], or a batch [N, C, H, W] or [N, features].

    Where the size formula gives a fraction, torch silently rounds down and never reads the last rows or columns: a
    note says so. In a network with branches the receptive field is that of the branch that sees most. ValueError for
    an input size of another rank; what the forward raises comes through.
    """
    parameter = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))
    zeros = torch.zeros(_batched(input_size), dtype=parameter.dtype, device=parameter.device)
    recorder = _Recorder(zeros)
    with torch.no_grad(), _eval_mode(model), recorder.attached(model), _ViewsBetweenLayers(recorder.views):
        model(zeros)
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(row.parameters for row in recorder.rows)
    if counted < total:
        recorder.notes.append(f"{total - counted:,} parameters belong to no layer of this table.")
    multiply_adds = sum(row.multiply_adds for row in recorder.rows)
    return Summary(type(model).__name__, tuple(recorder.rows), total, multiply_adds, tuple(recorder.notes))


def _batched(input_size: Sequence[int]) -> Size:
    sizes = tuple(input_size)
    if len(sizes) not in (1, 2, 3, 4):
        raise ValueError(f"expected [C, H, W] or [features], with or without the batch size, got {list(sizes)}")
    return sizes if len(sizes) % 2 == 0 else (1, *sizes)


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- what one element sees -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """Per dimension: how much of the input an element sees, and how far its neighbour's view lies beside it."""

    size: Size
    step: Size


#: The view of an element that depends on the whole input.
_ALL = _View((), ())


def _union(views: list[_View | None]) -> _View | None:
    """The view of an element computed from one element of each: that of the longest path."""
    if None in views:
        return None
    if _ALL in views:
        return _ALL
    if len({view.step for view in views}) > 1:
        return None
    return _View(tuple(max(sizes) for sizes in zip(*(view.size for view in views), strict=True)), views[0].step)


def _through_window(view: _View, window: _Window) -> _View:
    dimensions = zip(view.size, view.step, window.kernel, window.dilation, strict=True)
    size = tuple(r + d * (k - 1) * j for r, j, k, d in dimensions)
    return _View(size, tuple(j * s for j, s in zip(view.step, window.stride, strict=True)))


def _through_adaptive_pool(view: _View, input_size: Size, output_size: Size) -> _View | None:
    """A pool to one element sees everything; one whose windows are all alike is an ordinary pool."""
    if math.prod(output_size) == 1:
        return _ALL
    if any(i % o for i, o in zip(input_size, output_size, strict=True)):
        return None
    kernel = tuple(i // o for i, o in zip(input_size, output_size, strict=True))
    return _through_window(view, _Window(kernel, kernel, (0,) * len(kernel), (1,) * len(kernel)))


#: Functions that compute each output element from elements of the same place, or only arrange elements anew.
_POINTWISE = re.compile(
    r"_*[ir]?(add|sub|mul|div|truediv)_*|cat|concat|relu6?_?|leaky_relu|gelu|silu|sigmoid|tanh|hardswish|hardsigmoid|"
    r"clamp|dropout|batch_norm|flatten|view|reshape|contiguous|clone|to|float|half|bfloat16|chunk|split"
)


class _ViewsBetweenLayers(TorchFunctionMode):
    """Follows views through what a forward does between its layers: sums of branches, concatenations, reshapes."""

    def __init__(self, views: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._views = views

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Tensors without an entry do not depend on the input: parameters, constants. Inside a layer this runs as well;
        # the layer's hook then has the last word.
        inputs = [tensor for tensor in _tensors((args, kwargs)) if tensor in self._views]
        if inputs:
            view = _union([self._views[tensor] for tensor in inputs])
            pointwise = _POINTWISE.fullmatch(getattr(function, "__name__", ""))
            for tensor in _tensors(result):
                same_places = tensor.shape[2:] in (inputs[0].shape[2:], torch.Size())  # the empty one: flattened
                self._views[tensor] = view if pointwise and same_places else None
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


# ---- layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """A sliding window; ``padding`` is the total of both sides of a dimension."""

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool = False


def _dimensions(layer: torch.nn.Module) -> int:
    """Spatial dimensions of a convolution or a pooling layer."""
    if isinstance(layer, _ConvNd):
        return len(layer.kernel_size)
    name = next(kind.__name__ for kind in type(layer).__mro__ if kind.__module__ == "torch.nn.modules.pooling")
    return int(name[-2])  # MaxPool2d


def _window(layer: torch.nn.Module) -> _Window | None:
    """The window of a convolution or a pooling layer, None for every other layer."""
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, (_ConvNd, _MaxPoolNd, _AvgPoolNd)):
        return None

    def each(value: int | Sequence[int]) -> Size:
        return (value,) * _dimensions(layer) if isinstance(value, int) else tuple(value)

    kernel, dilation = each(layer.kernel_size), each(getattr(layer, "dilation", 1))
    if layer.padding == "same":
        padding = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    else:
        padding = tuple(2 * p for p in each(0 if layer.padding == "valid" else layer.padding))
    return _Window(kernel, each(layer.stride), padding, dilation, getattr(layer, "ceil_mode", False))


def _describe(layer: torch.nn.Module) -> str:
    """The layer as the lecture writes it."""
    kind = type(layer).__name__
    if isinstance(layer, torch.nn.Linear):
        return f"{kind} ({layer.in_features} -> {layer.out_features})"
    window = _window(layer)
    if window is None:
        return kind
    if not isinstance(layer, _ConvNd):
        padding = f", P={_short(layer.padding)}" if any(window.padding) else ""
        return f"{kind.removesuffix('2d')}(K={_short(window.kernel)}{padding}, S={_short(window.stride)})"
    options = f", D={_short(window.dilation)}" if set(window.dilation) != {1} else ""
    options += f", G={layer.groups}" if layer.groups != 1 else ""
    return (
        f"{kind.removesuffix('2d')} (C_out={layer.out_channels}, K={_short(window.kernel)}, P={_short(layer.padding)}, "
        f"S={_short(window.stride)}{options})"
    )


def _misfits(layer: str, window: _Window, input_size: Size) -> Iterator[str]:
    """A sentence for each way in which the window does not cover a dimension evenly."""
    if window.ceil_mode:
        return
    names = ("row", "column") if len(input_size) == 2 else ("position",) * len(input_size)
    unread_names: dict[tuple[str, str], list[str]] = {}
    for name, n, k, s, p, d in zip(
        names, input_size, window.kernel, window.stride, window.padding, window.dilation, strict=True
    ):
        extent = d * (k - 1) + 1
        unread = (n + p - extent) % s
        if unread:
            result = f"{(n + p - extent) / s + 1:.2f}".rstrip("0")
            formula = f"({n}{f' + {p}' if p else ''} − {extent})/{s} + 1 = {result} ✗"
            # They lie at the end, where the second half of the padding is.
            of = "padding" if unread <= (p + 1) // 2 else "padded input" if p else "input"
            unread_names.setdefault((formula, of), []).append(f"{unread} {name}s" if unread > 1 else name)
    for (formula, of), counts in unread_names.items():
        yield f"{layer} does not fit: {formula}, torch ignores the last {' and '.join(counts)} of the {of}"


def _multiply_adds(layer: torch.nn.Module, input: torch.Tensor, output: torch.Tensor) -> int:
    """Every weight is used once for each place of the output (of the input, where the convolution is transposed)."""
    if isinstance(layer, _ConvNd):
        places = (input if isinstance(layer, _ConvTransposeNd) else output).shape[-_dimensions(layer) :]
    elif isinstance(layer, torch.nn.Linear):
        places = output.shape[1:-1]
    else:
        return 0
    return math.prod(places) * layer.weight.numel()


def _weight_size(layer: torch.nn.Module) -> Size:
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


#: Layers of these modules and their subclasses see what their input sees.
_POINTWISE_MODULES = frozenset(
    f"torch.nn.modules.{module}" for module in ("activation", "batchnorm", "dropout", "flatten", "padding")
)


class _Recorder:
    """Makes a row of every call of a layer, and knows what the elements of each tensor see of the network's input."""

    def __init__(self, zeros: torch.Tensor) -> None:
        spatial = zeros.dim() - 2
        view = _View((1,) * spatial, (1,) * spatial) if spatial else None
        self.rows = [Row("", "Input", tuple(zeros.shape[1:]), receptive_field=view and view.size)]
        self.notes: list[str] = []
        self.views = WeakTensorKeyDictionary()
        self.views[zeros] = view
        self._counted: set[torch.nn.Parameter] = set()

    @contextlib.contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        handles = []
        try:
            for name, module in model.named_modules():
                if not any(module.children()):
                    handles.append(module.register_forward_hook(functools.partial(self._record, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, layer: torch.nn.Module, inputs: tuple, result: Any) -> None:
        if not _tensors(inputs) or not _tensors(result):
            return
        input, output = _tensors(inputs)[0], _tensors(result)[0]
        description, window = _describe(layer), _window(layer)
        view = self._view(layer, input, output)
        for tensor in _tensors(result):
            self.views[tensor] = view
        if window is not None:
            self.notes.extend(_misfits(description, window, tuple(input.shape[-len(window.kernel) :])))
        new = [parameter for parameter in layer.parameters(recurse=False) if parameter not in self._counted]
        self._counted.update(new)
        self.rows.append(
            Row(
                name,
                description,
                tuple(output.shape[1:]),
                _weight_size(layer),
                sum(parameter.numel() for parameter in new),
                _multiply_adds(layer, input, output),
                "all" if view == _ALL else view and view.size,
            )
        )

    def _view(self, layer: torch.nn.Module, input: torch.Tensor, output: torch.Tensor) -> _View | None:
        view = self.views.get(input)
        if isinstance(layer, torch.nn.Linear):
            return _ALL if input.dim() == 2 else None
        if view is None or view == _ALL:
            return view
        if isinstance(layer, torch.nn.GroupNorm) or (
            isinstance(layer, _InstanceNorm) and not layer.track_running_stats
        ):
            return _ALL  # through the mean and the variance of the whole image
        if isinstance(layer, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)):
            return _through_adaptive_pool(view, tuple(input.shape[2:]), tuple(output.shape[2:]))
        window = _window(layer)
        if window is not None:
            return _through_window(view, window)
        if any(kind.__module__ in _POINTWISE_MODULES for kind in type(layer).__mro__):
            return view
        return self.views.get(output)


# ---- rendering -----------------------------------------------------------------------------------------------------


def _times(size: Size | str | None) -> str:
    if isinstance(size, tuple):
        return " × ".join(str(n) for n in size)
    return size or "–"


def _short(value: int | str | Size) -> str:
    """``5`` for (5, 5), ``1×7`` for (1, 7)."""
    if isinstance(value, (int, str)):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "×".join(str(n) for n in value)
