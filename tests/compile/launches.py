"""The operations whose kernels are compiled: the layers of the benchmark's networks, the correctness tests' odd cases.

They run on tensors without memory while launches are recorded: a new kernel is found as soon as an operation uses it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import gpukern
import gpukern.functional as F
from bench.layers import LayerCall, layer_calls
from gpukern.conv import launch, planner
from gpukern.conv.families.registry import family_of
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.problem import pooled_problem
from gpukern.conv.request import Epilogue, operands_of, shapes
from gpukern.convert import REPLACEMENTS
from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._pointwise_norm.problem import Added, Inner, Outer
from gpukern.ops._sync_batch_norm import launch as sync_batch_norm
from gpukern.ops.activation import ACTIVATIONS, activation
from gpukern.ops.augment import augment
from gpukern.ops.batch_norm import gradients_from_sums
from gpukern.ops.conv_max_pool2d import conv2d_max_pool2d
from gpukern.ops.dropout import dropout, order_of
from gpukern.ops.norm_pair import Norm, normalize_pair, normalize_pair_backward
from gpukern.ops.pointwise_norm import convolve_between_norms, convolve_between_norms_backward
from gpukern.runtime.compile_only import Launch, record_launches
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.precision import conv_precision, fp32_products
from models.zoo import NETWORKS
from tests.compile import quantized
from tests.compile.candidates import Requests
from tests.ops.conv_cases import CASES, Case, as_problem

META = torch.device("meta")
LAYOUTS = (torch.channels_last, torch.contiguous_format)
BATCHES = (1, 8, 32, 128)
#: The dtype, and whether fp32 products may be TF32. Those of 8 bits are convolutions for inference alone.
KINDS: dict[str, tuple[torch.dtype, bool]] = {
    "float16": (torch.float16, True),
    "bfloat16": (torch.bfloat16, True),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
    "int8": (torch.int8, False),
    "float8": (torch.float8_e4m3fn, False),
}


def cannot_be_emulated(choice: ConvPlan) -> bool:
    """Whether no other test without a GPU sees the kernel: the interpreter does not know Gluon."""
    return not family_of(choice).emulated


@dataclass(frozen=True)
class Selection:
    """Whose layers, at which batch sizes, in which layouts; and in which the odd cases of the correctness tests.

    ``candidates`` tells which plans to try beside the chosen ones.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    batches: tuple[int, ...] = BATCHES
    layouts: tuple[torch.memory_format, ...] = LAYOUTS
    odd_layouts: tuple[torch.memory_format, ...] = LAYOUTS
    candidates: Callable[[ConvPlan], bool] = cannot_be_emulated


def record(device: DeviceSpec, kind: str, what: Selection) -> tuple[list[Launch], list[Launch]]:
    """The distinct launches of the plans that ``device`` gets, and those of the other candidates."""
    dtype, tf32 = KINDS[kind]
    requests = Requests()
    chosen: dict[tuple, Launch] = {}
    others: dict[tuple, Launch] = {}
    precision = "tf32" if tf32 else "ieee"
    with fp32_products(precision, precision), record_launches(device) as launches:
        for run in quantized.calls(kind) if kind in quantized.TYPES else _operations(dtype, what):
            with requests.recording():
                run()
            chosen.update((each.key, each) for each in launches)
            launches.clear()
            for forced in requests.launches(what.candidates):
                forced()
                others.update((each.key, each) for each in launches)
                launches.clear()
        for run, forced in () if kind in quantized.TYPES else _pooled(dtype, what, device):
            run()
            (others if forced else chosen).update((each.key, each) for each in launches)
            launches.clear()
    return list(chosen.values()), [each for key, each in others.items() if key not in chosen]


def _operations(dtype: torch.dtype, what: Selection) -> Iterator[Callable[[], None]]:
    for call, layout in itertools.product(layers(what.networks, what.batches), what.layouts):
        yield lambda call=call, layout=layout: _run_layer(call, dtype, layout)
    if what.odd_layouts:
        yield from _odd(dtype, what.odd_layouts)
        yield from _volumes(dtype, what.odd_layouts)


def layers(networks: tuple[str, ...], batches: tuple[int, ...]) -> list[LayerCall]:
    """Every distinct layer of the networks that gpukern has, by what it is and the shape of its input."""
    calls = (call for batch in batches for network in networks for call in layer_calls(network, batch))
    distinct = {(repr(call.module), call.input_shape): call for call in calls}
    kinds = tuple(REPLACEMENTS)
    return [call for call in distinct.values() if type(call.module) in kinds]


def _run_layer(call: LayerCall, dtype: torch.dtype, layout: torch.memory_format) -> None:
    layer = copy.copy(call.module)
    layer._forward_hooks = {}  # those that found the layer, and know of all others
    layer = gpukern.convert(copy.deepcopy(layer), inplace=True).to(dtype).train()
    if hasattr(layer, "inplace"):
        layer.inplace = False  # the same kernel, but on a leaf
    if len(call.input_shape) == 4:
        layer = layer.to(memory_format=layout)
    elif layout is not torch.channels_last:
        return  # the same launches once more
    _backward(layer, _empty(call.input_shape, dtype, layout))


#: The 3×3 layers of ResNeXt-50 whose groups are small: no network of the benchmark has any but depthwise ones.
RESNEXT = tuple(
    Case(f"ResNeXt {size}", (32, channels, size, size), channels, (3, 3), stride=stride, padding=1, groups=32)
    for channels, size, stride in ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 28, 2))
)
#: Tensors past 2³¹ elements, where offsets take 64 bits.
FAR = (
    Case("far 1x1", (8, 64, 2900, 2900), 64, (1, 1)),
    Case("far 3x3", (8, 64, 2900, 2900), 64, (3, 3), padding=1),
    Case("far 3x3 stride 2", (8, 64, 2901, 2901), 64, (3, 3), stride=2, padding=1),
    Case("far, few channels", (16, 3, 7001, 7001), 64, (7, 7), stride=2, padding=3),
    Case("far depthwise", (8, 64, 2900, 2900), 64, (3, 3), padding=1, groups=64),
    Case("far groups", (8, 64, 2900, 2900), 64, (3, 3), padding=1, groups=16),
    Case("far odd groups", (8, 66, 2900, 2900), 66, (3, 3), padding=1, groups=22),
)
#: Depthwise convolutions of sequences: the shape, taps, and whether channels are adjacent in x, and in y.
SEQUENCES = (
    ((8, 768, 2048), 4, False, False),
    ((8, 768, 2047), 8, False, False),
    ((8, 768, 2048), 8, True, True),
    ((8, 768, 2048), 4, True, False),
    ((8, 1024, 2**18 + 64), 4, False, False),  # offsets of 64 bits
)
#: Convolutions of volumes, with and without a kernel of images behind them: by name, as functional.conv3d takes them.
VOLUMES = (
    Case("R3D's first", (8, 3, 16, 112, 112), 64, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3)),
    Case("R3D", (8, 64, 16, 56, 56), 64, (3, 3, 3), padding=1),
    Case("R3D stride 2", (8, 64, 16, 56, 56), 128, (3, 3, 3), stride=2, padding=1),
    Case("R3D's last", (8, 512, 2, 7, 7), 512, (3, 3, 3), padding=1),
    Case("1x1x1 stride 2", (8, 64, 16, 56, 56), 128, (1, 1, 1), stride=2),
    Case("5x5x5", (2, 20, 9, 12, 10), 40, (5, 5, 5), padding=2, dilation=2),
    Case("depthwise", (8, 64, 16, 56, 56), 64, (3, 3, 3), padding=1, groups=64),
    Case("groups", (8, 64, 16, 56, 56), 64, (3, 3, 3), stride=(1, 2, 2), padding=1, groups=4),
    Case("odd", (2, 17, 5, 9, 8), 33, (2, 3, 3), stride=(2, 1, 3), padding="valid"),
    Case("tubelets", (8, 3, 16, 224, 224), 768, (2, 16, 16), stride=(2, 16, 16)),
    Case("far", (8, 64, 24, 360, 360), 64, (3, 3, 3), padding=1),
)
#: Batch norms beyond those of the networks: with an epilogue, channels that are no multiple of 16, offsets of 64 bits.
NORMS = ((32, 64, 56, 56), (32, 40, 28, 28), (2, 3, 224, 224), (8, 64, 2900, 2900))
#: 1×1 convolutions between two batch norms: input, outputs, activations, whether a third norm is added.
POINTWISE = (
    ((32, 128, 28, 28), 512, "silu", "tanh", True),
    ((32, 256, 14, 14), 1024, "relu", "relu", False),
    ((8, 64, 2900, 2900), 256, "relu", "relu", False),
)
#: Rows of logits: short ones, whole ones, longer ones than a tile; classes of pixels in NCHW and as the layout says;
#: offsets of 64 bits. Of the first two every kind of loss is taken.
LOGITS = ((4096, 1000), (64, 32000), (128, 10), (64, 12000), (8, 21, 16384), (8, 21, 128, 128), (8, 64, 2900, 2900))
#: Layer and RMS norms: of tokens; of images seen as [N, H, W, C], of aligned planes and others; of columns that are no
#: multiple of 16; of the longest rows that fit; of longer ones, few and many; past 2³¹ elements.
ROW_NORMS: tuple[tuple[tuple[int, ...], str, str | None, bool], ...] = (
    ((32, 197, 768), "layer_norm", None, False),
    ((32, 197, 768), "rms_norm", "gelu", True),
    ((32, 49, 96), "layer_norm", "silu", True),
    ((32, 56, 56, 96), "permuted", "gelu", True),
    ((32, 7, 7, 768), "permuted", None, False),
    ((64, 1000), "layer_norm", "relu", True),
    ((4096, 8192), "layer_norm", "gelu", True),
    ((4096, 16384), "layer_norm", None, False),
    ((4096, 16384), "layer_norm", "gelu", True),
    ((8, 96, 56, 56), "rms_norm", "silu", True),
    ((40000, 196, 384), "layer_norm", "gelu", True),
)
#: Group norms, with an activation and perhaps a residual: groups that fit a program, in both layouts, of a channel, of
#: channels that are no power of two, of vectors; that do not; with offsets of 64 bits.
GROUP_NORMS = (
    ((32, 64, 56, 56), 32, torch.channels_last, "relu", False),
    ((8, 320, 32, 32), 32, torch.channels_last, "silu", True),
    ((32, 64, 112, 112), 64, torch.contiguous_format, "relu", False),
    ((32, 256, 28, 28), 32, torch.contiguous_format, "silu", True),
    ((64, 256), 32, torch.contiguous_format, "tanh", False),
    ((8, 64, 2900, 2900), 32, torch.channels_last, "silu", True),
)
#: The input pipeline: images, whether they are cut out of larger ones, the crop, its padding, whether there is a mean
#: image; evaluation reads the first two whole.
IMAGES = (
    ((50000, 32, 32, 3), False, 32, 4, "constant", False),
    ((60000, 28, 28, 1), False, 28, 2, "reflect", True),
    ((1000, 256, 256, 3), False, 224, 0, "constant", True),
    ((8, 33, 31, 4), True, 29, 3, "symmetric", False),
    ((4, 20000, 40000, 3), False, 224, 0, "constant", False),  # offsets of 64 bits
)
LINEAR = ((2450, 500), (500, 10), (4096, 4096))
POOLS: tuple[tuple[tuple[int, ...], Callable], ...] = (
    ((5, 9, 8), lambda x: F.max_pool2d(x, 3, 2, 1, dilation=2, return_indices=True)[0]),
    ((64, 56, 56), lambda x: F.avg_pool2d(x, 2)),
    ((5, 9, 8), lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    ((40, 10, 9), lambda x: F.adaptive_avg_pool2d(x, (3, 4))),
)


#: Pools of volumes.
VOLUME_POOLS: tuple[tuple[tuple[int, ...], Callable], ...] = (
    ((64, 16, 56, 56), lambda x: F.max_pool3d(x, 3, 2, 1)),
    ((5, 9, 8, 7), lambda x: F.max_pool3d(x, (3, 2, 3), 2, 1, dilation=2, return_indices=True)[0]),
    ((64, 16, 56, 56), lambda x: F.avg_pool3d(x, (1, 2, 2))),
    ((5, 9, 8, 7), lambda x: F.avg_pool3d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    ((512, 2, 7, 7), lambda x: F.adaptive_avg_pool3d(x, 1)),
    ((40, 10, 9, 8), lambda x: F.adaptive_avg_pool3d(x, (3, 4, 5))),
    ((40, 10, 9, 8), lambda x: F.adaptive_max_pool3d(x, (3, 4, 5), return_indices=True)[0]),
)


def _volumes(dtype: torch.dtype, layouts: tuple[torch.memory_format, ...]) -> Iterator[Callable[[], None]]:
    for case, layout in itertools.product(VOLUMES, layouts):
        yield lambda case=case, layout=layout: _run_volume(case, dtype, layout)
    for (shape, pool), layout in itertools.product(VOLUME_POOLS, layouts):
        yield lambda shape=shape, pool=pool, layout=layout: _backward(pool, _empty((8, *shape), dtype, layout))


def _run_volume(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, w = _empty(case.input, dtype, layout), _empty(case.weight, dtype, layout)
    _backward(lambda *t: F.conv3d(*t, **case.arguments, activation="relu"), x, w, _empty((case.outputs,), dtype))
    residual = F.conv3d(x, w, **case.arguments).detach()
    with torch.no_grad():
        F.conv3d(x, w, residual=residual, activation="silu", **case.arguments)


def _odd(dtype: torch.dtype, layouts: tuple[torch.memory_format, ...]) -> Iterator[Callable[[], None]]:
    for case, layout in itertools.product((*CASES, *RESNEXT, *FAR), layouts):
        yield lambda case=case, layout=layout: _run_case(case, dtype, layout)
    for sequences in SEQUENCES:
        yield lambda sequences=sequences: _run_sequences(dtype, *sequences)
    for (inputs, outputs), rows in itertools.product(LINEAR, (1, 128)):
        shapes = (rows, inputs), (outputs, inputs), (outputs,)
        yield lambda shapes=shapes: _backward(
            lambda *t: F.linear(*t, activation="relu"), *(_empty(shape, dtype) for shape in shapes)
        )
    for (shape, pool), layout in itertools.product(POOLS, layouts):
        yield lambda shape=shape, pool=pool, layout=layout: _backward(pool, _empty((8, *shape), dtype, layout))
    epilogues = (("relu", False), ("silu", True), ("tanh", True))
    for shape, layout, training, epilogue in itertools.product(NORMS, layouts, (True, False), epilogues):
        yield lambda args=(shape, layout, training, *epilogue): _run_norm(dtype, *args)
    for shape, layout, (name, with_y) in itertools.product(
        NORMS, layouts, (("relu", True), ("relu", False), ("silu", False))
    ):
        yield lambda args=(shape, layout, name, with_y): _run_norm_pair(dtype, *args)
    for args in POINTWISE if dtype.itemsize == 2 and torch.channels_last in layouts else ():
        yield lambda args=args: _run_pointwise(dtype, *args)
    for i, (shape, layout) in enumerate(itertools.product(LOGITS, layouts[:1])):
        yield lambda args=(shape, dtype, layout), every=i < 2: _run_softmax(*args, every)
        # The gradients of float16 wait for the backward.
        wide = torch.bfloat16 if dtype is torch.float16 else dtype
        yield lambda args=(shape, wide, layout), every=i < 2: _run_cross_entropy(*args, every)
    for shape, kind, act, with_residual in ROW_NORMS:
        yield lambda args=(shape, kind, act, with_residual): _run_row_norm(dtype, *args)
    for case in GROUP_NORMS:
        yield lambda case=case: _run_group_norm(dtype, *case)
    yield lambda: F.instance_norm(_empty((8, 64, 56, 56), dtype), *(_empty((64,), torch.float32) for _ in range(4)))
    for shape, layout in itertools.product(NORMS, layouts):
        yield lambda args=(shape, layout): _run_dropout(dtype, *args)
        yield lambda args=(shape, layout): _run_sync_norm(dtype, *args)
    for images in IMAGES:
        yield lambda images=images: _run_augment(dtype, *images)
    for name in ACTIVATIONS[1:]:
        yield lambda name=name: _backward_twice(lambda x: activation(x, name, 0.1), _empty((999,), dtype))


#: Layers that a max pool follows: those of VGG; of networks for small images; odd sizes.
POOLED = (
    *(
        Case(f"VGG {size}", (batch, channels, size, size), channels, (3, 3), padding=1)
        for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))
        for batch in (1, 32)
    ),
    Case("LeNet's first", (32, 1, 28, 28), 6, (5, 5), padding=2),
    Case("LeNet's second", (32, 6, 14, 14), 16, (5, 5)),
    Case("CIFAR's first", (32, 3, 32, 32), 64, (3, 3), padding=1),
    Case("1x1", (32, 64, 56, 56), 64, (1, 1)),
    Case("odd", (8, 17, 15, 15), 9, (3, 3), padding=1),
    Case("stride 2", (32, 64, 56, 56), 64, (3, 3), stride=2, padding=1),
)


def _pooled(dtype: torch.dtype, what: Selection, device: DeviceSpec) -> Iterator[tuple[Callable[[], None], bool]]:
    """Calls of the convolution with a max pool, and whether one is of a plan that is not chosen."""
    for case, layout in itertools.product(POOLED, what.layouts):
        p = as_problem(case)
        x, w, bias = (
            _empty(case.input, dtype, layout),
            _empty(case.weight, dtype, layout),
            _empty((p.K,), torch.float32),
        )
        geometry = p.stride, p.padding, p.dilation, p.groups
        yield lambda t=(x, w, bias), geometry=geometry: conv2d_max_pool2d(*t, *geometry, "gelu", 0.0), False
        both, forward, precision = pooled_problem(p), Direction.FORWARD, conv_precision(dtype)
        strides = x.stride(), w.stride(), _empty(shapes(both, forward)[2], dtype, layout).stride()
        operands = operands_of(both, forward, strides, True, dtype, precision)
        for choice in filter(what.candidates, planner.candidates(both, forward, operands, device)):
            last = layout is torch.channels_last
            prepared = launch.prepared_for(both, forward, x, w, last, Epilogue("gelu"), choice)
            yield lambda prepared=prepared, t=(x, w, bias): launch.run(prepared, *t), True


def _run_case(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    tensors = _empty(case.input, dtype, layout), _empty(case.weight, dtype, layout), _empty((case.outputs,), dtype)
    _backward(lambda *t: F.conv2d(*t, **case.arguments, activation="relu"), *tensors)


def _run_sequences(dtype: torch.dtype, shape, taps: int, x_last: bool, y_last: bool) -> None:
    N, C, L = shape
    x = _empty((N, L, C), dtype).transpose(1, 2) if x_last else _empty(shape, dtype)
    w = _empty((C, taps, 1), dtype).transpose(1, 2) if y_last else _empty((C, 1, taps), dtype)
    _backward(lambda *t: F.conv1d(*t, padding="causal", groups=C), x, w, _empty((C,), dtype))


def _run_norm(dtype: torch.dtype, shape, layout, training: bool, activation: str, with_residual: bool) -> None:
    x, residual = (_empty(shape, dtype, layout) for _ in range(2))
    mean, var, weight, bias = (_empty(shape[1:2], torch.float32) for _ in range(4))

    def norm(x, weight, bias, residual=None):
        return F.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation=activation)

    _backward(norm, x, weight, bias, *([residual] if with_residual else []))


def _run_pointwise(dtype: torch.dtype, shape, outputs: int, inner: str, outer: str, with_norm: bool) -> None:
    def norm_of(size: int) -> Norm:
        return Norm(*(torch.empty(size, device=META) for _ in range(4)), 1e-5)

    z, (N, C, H, W) = _empty(shape, dtype, torch.channels_last), shape
    weight = _empty((outputs, C, 1, 1), dtype)
    other, grad = (_empty((N, outputs, H, W), dtype, torch.channels_last) for _ in range(2))
    before, (mean, variance, *numbers, _) = Inner(z, norm_of(C), inner, 0.1), norm_of(outputs)
    after = Outer(*numbers, 1e-5, outer, 0.1)
    added = Added(other, norm_of(outputs) if with_norm else None)
    _, moments = convolve_between_norms(before, weight, after, added, Running(mean, variance, 0.1))
    convolve_between_norms_backward(grad, before, weight, after, moments, (True,) * 4)


def _run_row_norm(dtype: torch.dtype, shape, kind: str, activation: str | None, with_residual: bool) -> None:
    """A layer or RMS norm: of whole images [N, C, H, W], or over the last dimension of anything else."""
    x = _empty(shape, dtype)
    if kind == "permuted":
        x = torch.empty(shape[0], shape[-1], *shape[1:-1], dtype=dtype, device=META).movedim(1, -1)
    columns = shape[1:] if len(shape) == 4 and kind != "permuted" else shape[-1:]
    parameters = [_empty(columns, torch.float32) for _ in range(1 if kind == "rms_norm" else 2)]
    function = F.rms_norm if kind == "rms_norm" else F.layer_norm

    def norm(x, *rest):
        residual = rest[-1] if with_residual else None
        return function(x, columns, *rest[: len(parameters)], residual=residual, activation=activation)

    _backward(norm, x, *parameters, *([_empty(shape, dtype)] if with_residual else []))


def _run_group_norm(dtype: torch.dtype, shape, groups: int, layout, activation: str, with_residual: bool) -> None:
    x, residual = (_empty(shape, dtype, layout) for _ in range(2))
    weight, bias = (_empty(shape[1:2], torch.float32) for _ in range(2))

    def norm(x, weight, bias, residual=None):
        return F.group_norm(x, groups, weight, bias, residual=residual, activation=activation)

    _backward(norm, x, weight, bias, *([residual] if with_residual else []))


def _run_sync_norm(dtype: torch.dtype, shape, layout) -> None:
    x = _empty(shape, dtype, layout)
    messages = torch.stack([sync_batch_norm.local_statistics(x)] * 2)
    norm = (_empty(shape[1:2], torch.float32) for _ in range(2))
    mean, variance, count = sync_batch_norm.merged_statistics(messages, Running(*norm, 0.1))
    sums = _empty((2, shape[1]), torch.float32)
    sync_batch_norm.gradients_from_sums(x, x, mean, None, mean, variance, sums, True, 1e-5, count)


def _run_norm_pair(dtype: torch.dtype, shape, layout, activation: str, with_y: bool) -> None:
    a, b = (_empty(shape, dtype, layout) for _ in range(2))
    norm = Norm(*(_empty(shape[1:2], torch.float32) for _ in range(4)))
    y = normalize_pair(a, norm, b, norm, activation)
    normalize_pair_backward(y, y if with_y else None, a, norm, b, norm, activation)
    sums = _empty((2, shape[1]), torch.float32)
    gradients_from_sums(y, a, norm.weight, norm.bias, norm.mean, norm.variance, sums, True, norm.eps)


def _run_softmax(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, every: bool) -> None:
    for softmax in (F.softmax, F.log_softmax)[: 2 if every else 1]:
        _backward(lambda x, softmax=softmax: softmax(x, 1), _empty(shape, dtype, layout))


def _run_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, every: bool) -> None:
    labels, weight = _empty((shape[0], *shape[2:]), torch.int64), _empty(shape[1:2], dtype)
    _backward(lambda x: F.cross_entropy(x, labels), _empty(shape, dtype, layout))
    if every:
        smoothed = {"weight": weight, "label_smoothing": 0.1}
        _backward(lambda x: F.cross_entropy(x, labels, reduction="sum", **smoothed), _empty(shape, dtype, layout))
        _backward(lambda x: F.cross_entropy(x, labels, reduction="none"), _empty(shape, dtype, layout))
        operands = (_empty(shape, dtype, layout) for _ in range(2))
        _backward(lambda x, t: F.cross_entropy(x, t, **smoothed), *operands)


def _run_dropout(dtype: torch.dtype, shape, layout) -> None:
    x = _empty(shape, dtype, layout)
    order, state = order_of(x), torch.empty(2, dtype=torch.int64, device=META)
    dropout(x, None, None, 0.5, 0, 1, 1, order)
    dropout(x, x, state, 0.5, 0, 0, 0, order)
    dropout(x, None, state, 0.5, 2, 0, 0, order)
    dropout(x[:, :, 1:], None, None, 0.5, 0, 1, 1, order)


def _run_augment(
    dtype: torch.dtype, shape, cut: bool, size: int, padding: int, padding_mode: str, mean_image: bool
) -> None:
    images = torch.empty(shape, dtype=torch.uint8, device=META)
    images = images[:, 1:, 1:] if cut else images
    index, scale = torch.empty(64, dtype=torch.int64, device=META), _empty(shape[-1:], torch.float32)
    mean = _empty(images.shape[1:], torch.float32) if mean_image else scale
    for random in (True, False):
        options = [size] * 2, [padding] * 2, padding_mode, 0.0, 0.5, 8, dtype
        augment(images, index, None, mean, scale, 1, 1, random, *options)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout=torch.contiguous_format) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=META)
    if len(shape) == 5 and layout is torch.channels_last:
        layout = torch.channels_last_3d
    return tensor.contiguous(memory_format=layout) if len(shape) in (4, 5) else tensor


def _backward(function: Callable, *tensors: torch.Tensor) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(torch.empty_like(output))


def _backward_twice(function: Callable, x: torch.Tensor) -> None:
    output = function(x.requires_grad_())
    grad = torch.empty_like(output, requires_grad=True)
    (first,) = torch.autograd.grad(output, x, grad, create_graph=True)
    first.backward(torch.empty_like(first))
