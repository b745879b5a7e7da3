"""Launches, bytes and roofline of a fused network, operator by operator: nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gpukern.fusion.network import launching
from gpukern.runtime.device import DeviceSpec, assumed_peaks
from gpukern.runtime.roofline import Work, floor

#: The rate of products by the dtype of their weights; the network's first operand may be narrower.
_KINDS = {
    torch.float32: "tf32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8",
}


class Count(NamedTuple):
    """Of one forward pass: ``launches`` of operators, bytes that they read and write, seconds of the roofline.

    Each operator reads its inputs and writes its result once, a convolution with a pool its pooled result. Weights are
    constants of the network, biases and scales among them. ``conversions``: launches that only change the dtype.
    """

    launches: int
    conversions: int
    activations: int
    weights: int
    seconds: float

    @property
    def bytes(self) -> int:
        return self.activations + self.weights


def count(module: torch.nn.Module, shape: Iterable[int], device: DeviceSpec) -> Count:
    """Count a :attr:`gpukern.FusedModel.module` for an image batch of ``shape``; the module ends on the meta device."""
    nodes = launching(module.to("meta"), torch.empty(*shape, device="meta"))
    activations = weights = conversions = 0
    seconds = 0.0
    for node in nodes:
        constants = [each for each in node.all_input_nodes if _is_constant(each)]
        others = [each for each in node.all_input_nodes if each not in constants]
        held, moved = (sum(map(_nbytes, each)) for each in (constants, [*others, node]))
        weights, activations = weights + held, activations + moved
        conversions += _changes_only_the_dtype(node)
        seconds += _floor(node, held + moved, device)
    return Count(len(nodes), conversions, activations, weights, seconds)


def _is_constant(node: Node) -> bool:
    """Whether a placeholder of the exported program is a buffer: the images have names of arguments."""
    return node.op == "get_attr" or (node.op == "placeholder" and node.name.startswith(("b_", "p_", "c_")))


def _tensors(node: Node) -> list[torch.Tensor]:
    return [each for each in tree_leaves(node.meta.get("val")) if isinstance(each, torch.Tensor)]


def _nbytes(node: Node) -> int:
    return sum(each.nbytes for each in _tensors(node))


def _changes_only_the_dtype(node: Node) -> bool:
    name = str(node.target)
    return any(word in name for word in ("gpukern.quantize", "gpukern.dequantize", "_to_copy"))


def _floor(node: Node, moved: int, device: DeviceSpec) -> float:
    """Seconds of the roofline; what multiplies nothing takes the time of its bytes."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    flops, kind = 0.0, "float16"
    if formula is not None:
        values = torch.fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        flops = float(formula(*values[0], **values[1], out_val=node.meta["val"]))
        kind = _KINDS[_tensors(node.all_input_nodes[1])[0].dtype]
    return floor(Work(flops, moved, kind), assumed_peaks(device)).seconds
