"""GPU specifications that launch plans need, as plain numbers: plans are made and tested on machines without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Peak rates that a GPU cannot exceed, or was measured not to exceed.

    ``bandwidth`` is that of device memory in bytes/s. ``matrix_rates`` are FLOP/s of dense products by the kind of
    their operands, sums in fp32: "float16", "bfloat16", "tf32"; "fma" for fused multiply-adds outside the tensor cores;
    "tf32x3" for fp32 as three products of TF32; "float32" for full precision by the faster of these two; "int8", summed
    in int32; and "float8" on devices that have it.
    """

    bandwidth: float
    matrix_rates: Mapping[str, float]


# eq=False: specs are constants or made once for each device, and are looked up by on every call.
@dataclass(frozen=True, eq=False)
class DeviceSpec:
    """Limits of one GPU.

    ``shared_memory`` is the most a block can request, in bytes; ``sm_count`` the number of streaming multiprocessors.
    A device queried for its limits does not report its ``peaks``.
    """

    name: str
    compute_capability: tuple[int, int]
    sm_count: int
    shared_memory: int
    peaks: Peaks | None = None

    @property
    def copies_boxes(self) -> bool:
        """Whether the GPU has TMA, for which descriptors are needed."""
        return self.compute_capability >= (9, 0)

    @property
    def multiplies_from_shared_memory(self) -> bool:
        """Whether tensor cores read their operands there (wgmma, tcgen05), not from registers (mma.sync).

        GeForce and RTX PRO of the Blackwell generation (12.x) have neither instruction.
        """
        return (9, 0) <= self.compute_capability < (12, 0)

    @property
    def multiplies_float8(self) -> bool:
        """Whether tensor cores take floats of 8 bits, and whether there are instructions that round to them."""
        return self.compute_capability >= (8, 9)


def _peaks(
    terabytes: float, *, half: float, tf32: float, float32: float, int8: float, float8: float | None = None
) -> Peaks:
    """Build peaks from TB/s and TFLOP/s; tensor cores multiply float16 and bfloat16 at one rate."""
    rates = {"float16": half, "bfloat16": half, "tf32": tf32, "tf32x3": tf32 / 3, "fma": float32}
    rates["float32"] = max(float32, tf32 / 3)
    rates["int8"] = int8
    if float8 is not None:
        rates["float8"] = float8
    return Peaks(terabytes * 1e12, {kind: rate * 1e12 for kind, rate in rates.items()})


# Shared memory of a block: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
# (8.0: 163 KB; 8.6, 8.9 and 12.0: 99 KB; 9.0, 10.0 and 10.3: 227 KB). Rates are dense: data sheets print twice as much
# for 2:4 sparsity.

# NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM; SMs: NVIDIA A100 architecture whitepaper.
A100 = DeviceSpec(
    "A100",
    (8, 0),
    108,
    shared_memory=163 * 1024,
    peaks=_peaks(2.039, half=312, tf32=156, float32=19.5, int8=624),
)
# NVIDIA Ampere GA102 GPU architecture whitepaper, GeForce RTX 3090: the row "with FP32 Accumulate", half of the 142.
RTX_3090 = DeviceSpec(
    "RTX 3090",
    (8, 6),
    82,
    shared_memory=99 * 1024,
    peaks=_peaks(0.936, half=71.2, tf32=35.6, float32=35.6, int8=284),
)
# NVIDIA A10 Tensor Core GPU data sheet; SMs: the whitepaper above. It sums in fp32 as fast as in fp16.
A10 = DeviceSpec(
    "A10",
    (8, 6),
    72,
    shared_memory=99 * 1024,
    peaks=_peaks(0.6, half=125, tf32=62.5, float32=31.2, int8=250),
)
# NVIDIA L4 Tensor Core GPU data sheet, whose 242 and 120 are sparse; SMs: NVIDIA Ada GPU architecture whitepaper.
# Unlike a GeForce, it sums in fp32 as fast as in fp16.
L4 = DeviceSpec(
    "L4",
    (8, 9),
    58,
    shared_memory=99 * 1024,
    peaks=_peaks(0.3, half=121, tf32=60, float32=30.3, int8=242, float8=242),
)
# NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090: the row "with FP32 Accumulate", half of the 330.3 in fp16;
# float8 too.
RTX_4090 = DeviceSpec(
    "RTX 4090",
    (8, 9),
    128,
    shared_memory=99 * 1024,
    peaks=_peaks(1.008, half=165.2, tf32=82.6, float32=82.6, int8=660.6, float8=330.3),
)
# NVIDIA H100 architecture whitepaper, column H100 SXM5; bandwidth: NVIDIA H100 Tensor Core GPU data sheet.
H100 = DeviceSpec(
    "H100",
    (9, 0),
    132,
    shared_memory=227 * 1024,
    peaks=_peaks(3.35, half=989.4, tf32=494.7, float32=66.9, int8=1978.9, float8=1978.9),
)
# NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM: the H100's chip, so its unrounded rates, with faster memory.
H200 = DeviceSpec(
    "H200",
    (9, 0),
    132,
    shared_memory=227 * 1024,
    peaks=_peaks(4.8, half=989.4, tf32=494.7, float32=66.9, int8=1978.9, float8=1978.9),
)
# NVIDIA GH200 Grace Hopper Superchip data sheet, with 96 GB of HBM3 (144 GB of HBM3e: 4.9 TB/s): the H100's chip.
GH200 = DeviceSpec(
    "GH200",
    (9, 0),
    132,
    shared_memory=227 * 1024,
    peaks=_peaks(4.0, half=989.4, tf32=494.7, float32=66.9, int8=1978.9, float8=1978.9),
)
# NVIDIA Blackwell data sheet, one GPU of an HGX B200 at 1000 W (4.5 and 2.2 PFLOP/s are sparse). Its 7.7 TB/s are of
# the 180 GB version; the NVIDIA Blackwell architecture brief and the DGX B200 data sheet (64 TB/s for eight) have 8.
# That brief's 80 TFLOP/s of fp32 need a clock beyond 2 GHz. SMs: what the device reports, 74 of each of two dies.
B200 = DeviceSpec(
    "B200",
    (10, 0),
    148,
    shared_memory=227 * 1024,
    peaks=_peaks(8.0, half=2250, tf32=1100, float32=75, int8=4500, float8=4500),
)
# NVIDIA Blackwell Ultra data sheet, one GPU of an HGX B300 (its 18 PFLOP/s of TF32 and 36 of 16 bits are of eight, and
# sparse): the B200's rates, but for a thirtieth of the int8. SMs: what the device reports. One of a GB300 NVL72 has a
# clock that is a tenth higher.
B300 = DeviceSpec(
    "B300",
    (10, 3),
    148,
    shared_memory=227 * 1024,
    peaks=_peaks(8.0, half=2250, tf32=1125, float32=75, int8=150, float8=4500),
)
# NVIDIA RTX Blackwell GPU architecture whitepaper, GeForce RTX 5090: the row "with FP32 Accumulate", half of the 419.
RTX_5090 = DeviceSpec(
    "RTX 5090",
    (12, 0),
    170,
    shared_memory=99 * 1024,
    peaks=_peaks(1.792, half=209.5, tf32=104.8, float32=104.8, int8=838, float8=419),
)

DEVICES = {
    "a100": A100,
    "rtx3090": RTX_3090,
    "a10": A10,
    "l4": L4,
    "rtx4090": RTX_4090,
    "h100": H100,
    "h200": H200,
    "gh200": GH200,
    "b200": B200,
    "b300": B300,
    "rtx5090": RTX_5090,
}


def named_device(name: str) -> DeviceSpec:
    """One of :data:`DEVICES`; "RTX 4090" and "rtx-4090" are "rtx4090". Raises ValueError for others."""
    key = "".join(filter(str.isalnum, name)).lower()
    if key not in DEVICES:
        raise ValueError(f"no device is called {name!r}; known are {', '.join(DEVICES)}")
    return DEVICES[key]


def assumed_peaks(device: DeviceSpec) -> Peaks:
    """Return the peaks of ``device``, or, if it was only queried for its limits, those of a related device.

    That is the device with the longest name that is part of its own ("NVIDIA GH200 480GB" is not an H200), else the
    newest that is not newer, its rates taken per multiprocessor. Good enough to choose between plans, and used for
    nothing else.
    """
    if device.peaks is not None:
        return device.peaks
    named = [d for d in DEVICES.values() if d.name.lower() in device.name.lower()]
    older = [d for d in DEVICES.values() if d.compute_capability <= device.compute_capability] or [A100]
    relative = max(named, key=lambda d: len(d.name)) if named else max(older, key=lambda d: d.compute_capability)
    share, peaks = device.sm_count / relative.sm_count, relative.peaks
    assert peaks is not None, "every device of the table has its peaks"
    rates = {kind: rate * share for kind, rate in peaks.matrix_rates.items()}
    return Peaks(peaks.bandwidth * share, rates)


#: Emulated kernels run with the plan of this device: few multiprocessors, so that the interpreter, which takes the same
#: time for a small tile as for a large one, gets few tiles.
EMULATED = DeviceSpec("emulated", (9, 0), sm_count=2, shared_memory=H100.shared_memory)
