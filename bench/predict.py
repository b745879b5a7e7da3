"""The plan of a case on a device that need not be here, beside the time that no implementation can beat."""

from __future__ import annotations

from bench.accuracy import DTYPES
from bench.results import Prediction
from bench.suite import Task
from gpukern.ops._conv2d.cost import cost, work
from gpukern.ops._conv2d.plan import ConvPlan, Direction, plan
from gpukern.ops._conv2d.prepare import dense_strides, prepare_gather, prepare_weight_grad
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Cost, Work, floor


def predict_convolution(task: Task, p: ConvProblem, direction: Direction, device: DeviceSpec) -> Prediction:
    """Of one of gpukern's launches for a convolution, or for a linear layer seen as one."""
    case = task.case
    dtype, precision = DTYPES[case.dtype], "tf32" if case.dtype == "tf32" else "ieee"
    last = case.layout != "NCHW"
    x, w, y = (
        dense_strides(shape, last)
        for shape in ((p.N, p.C, p.H, p.W), (p.K, p.group_inputs, p.R, p.S), (p.N, p.K, p.P, p.Q))
    )
    if direction is Direction.WEIGHT_GRAD:
        prepared = prepare_weight_grad(p, y, x, last, dtype, precision, device)
    else:
        transposed = direction is Direction.INPUT_GRAD
        source = y if transposed else x
        prepared = prepare_gather(p, transposed, source, w, last, dtype, precision, "none", device)
    chosen = plan(p, direction, str(dtype).removeprefix("torch."), precision, device)
    costs = cost(p, direction, chosen, dtype.itemsize, prepared.pack, device, case.dtype)
    packs = sum(prepared.pack)
    return prediction(
        task,
        plan=describe_plan(chosen) + (f", {packs} operand{'s' * (packs > 1)} packed" if packs else ""),
        costs=costs,
        must=work(p, direction, dtype.itemsize, case.dtype),
        device=device,
    )


def describe_plan(plan: ConvPlan) -> str:
    words = f"{plan.variant.value} {plan.block_m}×{plan.block_n}×{plan.block_k}, {plan.num_warps} warps"
    if plan.num_stages > 1:
        words += f", {plan.num_stages} stages"
    return words + (f", {plan.splits} splits" if plan.splits > 1 else "")


def prediction(task: Task, plan: str, costs: Cost, must: Work, device: DeviceSpec) -> Prediction:
    """``costs`` of the plan, beside what any implementation ``must`` do."""
    least = floor(must, device.peaks)
    return Prediction(
        case=task.case,
        plan=plan,
        launches=costs.launches,
        tiles=costs.tiles,
        waves=costs.waves,
        efficiency=costs.efficiency,
        flops=must.flops,
        moved=costs.bytes,
        bytes=must.bytes,
        predicted_us=costs.seconds * 1e6,
        floor_us=least.seconds * 1e6,
        bound=least.bound,
    )
