"""The launches that are compiled: every layer shape of common networks, and the odd ones of the correctness tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

import gpukern.functional as F
from gpukern.runtime.compile_only import Launch, record_launches
from gpukern.runtime.device import DeviceSpec
from tests.ops.conv_cases import CASES, Case


def _conv(channels: int, size: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Case:
    padding = kernel // 2
    return Case("layer", (1, channels, size, size), outputs, (kernel, kernel), stride, padding, groups=groups)


#: LeNet-5, ResNet-18 and -50, a depthwise and a grouped layer of MobileNet-V2 and ResNeXt.
LAYERS = (
    _conv(1, 28, 20, 5),
    _conv(20, 14, 50, 5),
    _conv(3, 224, 64, 7, 2),
    _conv(64, 56, 64, 1),
    _conv(64, 56, 64, 3),
    _conv(64, 56, 256, 1),
    _conv(64, 56, 128, 3, 2),
    _conv(64, 56, 128, 1, 2),
    _conv(256, 56, 128, 1),
    _conv(128, 56, 128, 3, 2),
    _conv(256, 56, 512, 1, 2),
    _conv(128, 28, 128, 3),
    _conv(512, 28, 256, 1),
    _conv(256, 14, 256, 3),
    _conv(1024, 14, 2048, 1, 2),
    _conv(512, 7, 512, 3),
    _conv(2048, 7, 512, 1),
    _conv(96, 56, 96, 3, groups=96),
    _conv(144, 56, 144, 3, 2, groups=144),
    _conv(256, 28, 256, 3, groups=32),
    _conv(24, 56, 144, 1),
)
LINEAR = ((2450, 500), (500, 10), (512, 1000), (2048, 1000), (4096, 4096))
POOLS: tuple[tuple[tuple[int, ...], Callable], ...] = (
    ((20, 28, 28), lambda x: F.max_pool2d(x, 2)),
    ((64, 112, 112), lambda x: F.max_pool2d(x, 3, 2, 1)),
    ((5, 9, 8), lambda x: F.max_pool2d(x, 3, 2, 1, dilation=2, return_indices=True)[0]),
    ((64, 56, 56), lambda x: F.avg_pool2d(x, 2)),
    ((5, 9, 8), lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    ((512, 7, 7), lambda x: F.adaptive_avg_pool2d(x, 1)),
    ((40, 10, 9), lambda x: F.adaptive_avg_pool2d(x, (3, 4))),
)
#: dtype and whether fp32 products may be TF32.
KINDS = ((torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False))


def all_launches(device: DeviceSpec) -> list[Launch]:
    """The distinct launches of :data:`LAYERS`, :data:`LINEAR`, :data:`POOLS`, the activations and the odd cases."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    distinct: dict[tuple, Launch] = {}
    try:
        with record_launches(device) as launches:
            for dtype, tf32 in KINDS:
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
                for run in _operations(dtype):
                    run()
                    distinct.update((launch.key, launch) for launch in launches)
                    launches.clear()  # they keep their tensors alive
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    return list(distinct.values())


def _operations(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    for case, batch in itertools.product(LAYERS, (1, 32)):
        yield lambda case=case, batch=batch: _run_conv(case, batch, dtype, torch.channels_last, "relu")
    # bfloat16 and float16 differ in the type of the operands alone: the odd shapes are compiled for one of them.
    if dtype is not torch.bfloat16:
        for case in CASES:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                yield lambda case=case, f=memory_format: _run_conv(case, case.input[0], dtype, f, None)
    for (inputs, outputs), rows in itertools.product(LINEAR, (1, 128)):
        yield lambda m=rows, c=inputs, k=outputs: _backward(
            lambda *t: F.linear(*t, activation="relu"), *(torch.empty(s, dtype=dtype) for s in ((m, c), (k, c), (k,)))
        )
    for (shape, pool), memory_format in itertools.product(POOLS, (torch.contiguous_format, torch.channels_last)):
        yield lambda shape=shape, pool=pool, f=memory_format: _backward(
            pool, torch.empty(8, *shape, dtype=dtype).contiguous(memory_format=f)
        )
    for activation in (F.relu, F.leaky_relu, F.sigmoid, F.tanh):
        yield lambda activation=activation: _backward(activation, torch.empty(999, dtype=dtype))


def _run_conv(case: Case, batch: int, dtype, memory_format, activation: str | None) -> None:
    input, weight = (
        torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
        for shape in ((batch, *case.input[1:]), case.weight)
    )
    bias = torch.empty(case.outputs, dtype=dtype)
    _backward(lambda *t: F.conv2d(*t, **case.arguments, activation=activation), input, weight, bias)


def _backward(function: Callable, *tensors: torch.Tensor) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(torch.empty_like(output))


#: What makes two compiled kernels the same configuration: everything a plan chooses and the dtype decides, but not the
#: sizes of one layer's window, the divisibility of its strides and the like.
_CONFIGURATION = (
    "VARIANT", "TRANSPOSED", "PRECISION", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK_CHANNELS", "BLOCK_PIXELS",
    "BLOCK", "NAME", "ADAPTIVE", "WITH_TAPS", "num_warps", "num_stages",
)  # fmt: skip


def configurations(launches: list[Launch]) -> list[Launch]:
    """One launch for each configuration: the one with most taps, whose code is the longest."""
    chosen: dict[tuple, Launch] = {}
    for launch in sorted(
        launches, key=lambda launch: launch.options.get("TAPS_H", 0) * launch.options.get("TAPS_W", 0)
    ):
        options = tuple(str(launch.options.get(name)) for name in _CONFIGURATION)
        chosen[launch.kernel, launch.dtypes, options] = launch
    return list(chosen.values())
