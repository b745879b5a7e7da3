"""Which of all launches are compiled: for ``make test`` one of each configuration, for ``make gate`` many more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpukern.runtime.compile_only import Launch
from gpukern.runtime.device import A100, B200, H100, H200, L4, RTX_4090, RTX_5090, DeviceSpec
from tests.compile import quantized
from tests.compile.launches import LAYOUTS, Selection, record

#: What ``make test`` compiles for: the first device's architecture, for the plans of all. Code for the L4 differs from
#: the A100's in its limits, which hold here all the same.
ARCHITECTURES: dict[str, tuple[DeviceSpec, ...]] = {
    "sm_80": (A100, L4),
    "sm_90": (H100,),
    "sm_100": (B200,),
    "sm_120": (RTX_5090,),
    "sm_89": (L4,),  # for float8 alone
}
#: What ``make gate`` compiles for.
ALL_ARCHITECTURES: dict[str, tuple[DeviceSpec, ...]] = {
    "sm_80": (A100,),
    "sm_89": (L4, RTX_4090),
    "sm_90": (H100, H200),
    "sm_100": (B200,),
    "sm_120": (RTX_5090,),
}

_LAST = LAYOUTS[:1]  # channels_last
_FEW = Selection(("resnet50",), (32,), _LAST, odd_layouts=())
#: For sm_80: all the kernels of sm_90, in half as many sizes.
_FEWER_SIZES = Selection(batches=(1, 32), layouts=_LAST, odd_layouts=_LAST)
#: For products of fp32, whose plans are those of 16 bits but for their steps: networks that have every kernel.
_VARIED = Selection(("lenet", "vgg16", "resnet50", "mobilenet_v2", "convnext_tiny"), (1, 32), _LAST, odd_layouts=())


@dataclass(frozen=True, eq=False)
class Compilation:
    """A launch to compile, the devices that get such ones, and the least shared memory a block has on any of them.

    ``alike`` are all launches that it stands for.
    """

    launch: Launch
    devices: tuple[str, ...]
    limit: int
    alike: list[Launch] = field(default_factory=list)


def of_each_configuration(architecture: str, kind: str) -> list[Compilation]:
    """What ``make test`` compiles: of each configuration the most demanding launch."""
    groups: dict[tuple, Compilation] = {}
    # The L4's plans differ from the A100's most in fp32, which few compute in there: make gate has them.
    devices = ARCHITECTURES[architecture][: None if kind in ("float16", "int8") else 1]
    for launch, device in _recorded(devices, kind, _selection(architecture, kind)):
        _add(groups, configuration(launch, coarse=True), launch, device)
    return list(groups.values())


def every_one(architecture: str, kind: str) -> list[Compilation]:
    """What ``make gate`` compiles: every launch that a plan leads to, and each configuration of all candidates."""
    groups: dict[tuple, Compilation] = {}
    what = Selection(candidates=lambda choice: True)
    for launch, device in _recorded(ALL_ARCHITECTURES[architecture], kind, what):
        _add(groups, launch.key, launch, device)
    return list(groups.values())


def _selection(architecture: str, kind: str) -> Selection:
    if kind in quantized.TYPES:
        return Selection(odd_layouts=())
    if architecture in ("sm_100", "sm_120") or kind == "bfloat16":
        return _FEW  # the plans are those of sm_90, and of float16
    # Plans look at the layout before they look at the dtype, and what is odd differs in the products alone.
    if kind != "float16":
        return _VARIED
    return Selection(odd_layouts=_LAST) if architecture == "sm_90" else _FEWER_SIZES


def _recorded(devices: tuple[DeviceSpec, ...], kind: str, what: Selection) -> Iterator[tuple[Launch, DeviceSpec]]:
    """Of other candidates than the chosen, one launch of each configuration."""
    for device in devices:
        chosen, others = record(device, kind, what)
        groups: dict[tuple, Compilation] = {}
        for launch in others:
            _add(groups, configuration(launch), launch, device)
        for launch in (*chosen, *(compilation.launch for compilation in groups.values())):
            yield dataclasses.replace(launch, device=devices[0]), device


def _add(groups: dict[tuple, Compilation], group: tuple, launch: Launch, device: DeviceSpec) -> None:
    """The more demanding launch stands for the group."""
    before = groups.get(group)
    if before is None:
        groups[group] = Compilation(launch, (device.name,), device.shared_memory, [launch])
        return
    before.alike.append(launch)
    demanding = max(before.launch, launch, key=demand)
    devices = tuple(dict.fromkeys((*before.devices, device.name)))
    groups[group] = Compilation(demanding, devices, min(before.limit, device.shared_memory), before.alike)


#: Options that follow from one layer's sizes and addresses, or change what comes after the main loop alone. All others
#: make a configuration, so that those of a new kernel do.
_OF_THE_LAYER = (
    "TAPS_H", "TAPS_W", "DILATION_H", "DILATION_W", "STRIDE_H", "STRIDE_W", "TAP_STEP_H", "TAP_STEP_W", "REDUCTION",
    "EVEN_K", "ACTIVATION", "SOURCE_ALIGN", "FILTER_ALIGN", "OUT_ALIGN", "GRAD_ALIGN", "PART_N", "PART_H",
    "PART_W", "CHUNK", "TAPS", "FOOTPRINT", "STRIDES", "DILATIONS", "TAP_STEPS", "RESIDUAL_ALIGN",
)  # fmt: skip


#: Of two steps along a sum, numbers of stages or ends of a kernel, the larger one stands for both in ``make test``.
_COARSE = ("BLOCK_K", "num_stages", "SPLITS", "rounds", "statistics", "norm")


def configuration(launch: Launch, *, coarse: bool = False) -> tuple:
    """What makes two compiled kernels alike: the kernel, the dtypes, and what a plan chooses."""
    options = {name: str(value) for name, value in launch.options.items() if name not in _OF_THE_LAYER}
    if "BOX_N" in options:
        # The shape of a box makes other numbers, not another program.
        options["BOX"] = math.prod(int(options.pop(f"BOX_{dimension}")) for dimension in "NHW")
    if "BLOCK_Q" in options:
        # Depthwise tiles are as wide as the layer is; what a thread has to do makes the program.
        tile = int(options.pop("BLOCK_Q")) * int(options.pop("BLOCK_C"))
        options["elements"] = tile // int(options.pop("num_warps"))
    if "SPLITS" in options:
        options["SPLITS"] = launch.options["SPLITS"] > 1  # their number is a factor in addresses, no more
    if "probabilities" in launch.function.arg_names:
        options["given"] = _given(launch)  # forward and backward of cross entropy are one kernel
    options["rounds"] = rounds(launch)
    options["statistics"] = _has(launch, "statistics")
    if _goes_through_norm(launch):
        options["norm"] = f"{launch.options['ACTIVATION']} {_has(launch, 'other')}"
    chosen = sorted((name, value) for name, value in options.items() if not coarse or name not in _COARSE)
    # Whether channels can be copied in runs of 16 bytes decides what the main loop is made of.
    return launch.kernel, launch.dtypes[:2], tuple(chosen), copies_in_runs(launch.options)


def copies_in_runs(options: dict) -> bool:
    """Whether all operands that are read through pointers lie in runs of channels of at least 16 bytes."""
    alignments = [int(options[name]) for name in ("SOURCE_ALIGN", "FILTER_ALIGN", "GRAD_ALIGN") if name in options]
    return bool(alignments) and min(alignments) >= 8


#: Kernels that take more registers to add a residual than to make statistics; of the others it is the other way round.
_RESIDUAL_IS_HEAVIER = ("conv2d_gather_kernel", "conv2d_warp_specialized_kernel", "conv3d_gather_kernel")


def demand(launch: Launch) -> tuple:
    """Sorts launches of one configuration by how much code and how many registers they may take."""
    options = launch.options
    end = "residual" if launch.kernel in _RESIDUAL_IS_HEAVIER else "statistics"
    taps = options.get("TAPS_H", 1) * options.get("TAPS_W", 1) * math.prod(options.get("TAPS", ()))
    if "FOOTPRINT" in options:
        taps = len(options["FOOTPRINT"].offsets)
    steps = sum(options.get(name, 1) for name in ("STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W"))
    sizes = (options.get(name, 0) for name in ("SPLITS", "BLOCK_K", "num_stages", "REDUCTION"))
    through = _goes_through_norm(launch)
    # Of those the ones that read most, and have the longest derivative.
    heaviest = through and _has(launch, "other"), through and options["ACTIVATION"] == "gelu"
    return (through, *heaviest, _has(launch, end), rounds(launch), *sizes, taps, steps)


def rounds(launch: Launch) -> int:
    """How often the kernel adds what its splits left, see ``gpukern/ops/_reduction/shared_sums.py``."""
    return 0 if not _has(launch, "shared") else 2 if _has(launch, "fan_in") else 1


def _goes_through_norm(launch: Launch) -> bool:
    """Whether an input gradient goes on to the sums of the batch norm whose input z it is given."""
    return _has(launch, "z")


def _has(launch: Launch, name: str) -> bool:
    """Whether the kernel is given this: a pointer, an image or a descriptor."""
    given = dict(zip(launch.function.arg_names, launch.arguments, strict=False))
    return any(given.get(full) is not None for full in (name, f"{name}_ptr"))


def _given(launch: Launch) -> str:
    """The names of what a kernel is given, images among them."""
    named = zip(launch.function.arg_names, launch.arguments, strict=False)
    return " ".join(name for name, value in named if value is not None and getattr(value, "ptr", value) is not None)
