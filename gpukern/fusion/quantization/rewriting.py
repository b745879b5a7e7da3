"""Lowering of a scheme: the 16-bit graph with the operators that read or write eight bits.

Nothing is launched that the 16-bit graph does not launch: layers and pools convert as they load and store.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gpukern.fusion.folding import Folded
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.program import arguments, assemble, aten, is_view, value_of_any
from gpukern.fusion.quantization.domains import averaged_size, is_average, is_move, keeps_rank
from gpukern.fusion.quantization.formats import FP8
from gpukern.fusion.quantization.network import Layer, layout_of
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.weights import eight_bit_weight

_ops = torch.ops.gpukern
#: Under it a node bears the name of the one in the 16-bit graph that it takes the place of, in ``Node.meta``.
OF = "gpukern_eight_bits_of"
#: Moves for which torch has no kernels of these types move bytes.
_AS_BYTES = (
    *(aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec),
    *(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default),
)


def quantized(scheme: Scheme, lowered: Lowered) -> Lowered:
    """``lowered``, the 16-bit model, in the scheme's eight bits; its ``names`` are those of the new nodes."""
    return _Rewriting(scheme).rewritten(lowered)


class _Rewriting:
    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.network = scheme, scheme.network
        self.graph, self.places = Graph(), dict[Node, Node]()
        self.constants: dict[str, torch.Tensor] = dict(self.network.held)
        for name in scheme.rescaled:
            self.rescale(self.network.layers[name], self.network.names[name])

    def rewritten(self, lowered: Lowered) -> Lowered:
        result = self.graph.graph_copy(self.network.graph, self.places)
        self.graph.output(result)
        names = {}
        for old in self.network.graph.nodes:
            new = None if old.op == "output" else self.new_for(old)
            if new is not None:
                place = self.places[old]
                place.replace_all_uses_with(new)
                new.meta = {**place.meta, OF: old.name}
                self.graph.erase_node(place)
                self.places[old] = new
                names[old.name] = new.name
        self.graph.eliminate_dead_code()
        self.graph.lint()
        for node in self.graph.nodes:
            node.meta.pop("val", None)  # of the 16-bit graph
        module = GraphModule(assemble(self.graph, self.constants, self.network.program.modules), self.graph).eval()
        return Lowered(module, tuple(names.get(n, n) for n in lowered.names), self.folded(lowered))

    def rescale(self, layer: Layer, node: Node) -> None:
        """The 16-bit constants of a layer whose weights are no longer the model's."""
        given = arguments(node)
        weight = layer.weight.to(self.network.precision)
        self.constants[given["weight"].target] = layout_of(self.network, given["weight"], weight)
        if layer.bias is not None:
            self.constants[given["bias"].target] = layer.bias.float()

    def folded(self, lowered: Lowered) -> tuple[Folded | None, ...]:
        """What the report says of each match's weights."""
        found = list(lowered.folded)
        for name in self.scheme.storage.eight:
            layer = self.network.layers[name]
            found[layer.place] = Folded(layer.weight, self.scheme.bias_of(name), self.scheme.format.dtype)
        return tuple(found)

    def new_for(self, old: Node) -> Node | None:
        """The node that takes the place of one, made before it; None where it stays."""
        node = self.places[old]
        with self.graph.inserting_before(node):
            if old.name in self.network.layers:
                return self.layer(old, node)
            first = old.all_input_nodes[:1] if old.op == "call_function" else []
            if not first or self.scheme.scale_of(first[0].name) is None:
                return None
            if is_average(self.network, old):
                return self.average(old, node, first[0].name)
            if is_move(self.network, old):
                return self.as_bytes(old, node)
        return None

    def call(self, like: Node, target: Any, *args: Any) -> Node:
        new = self.graph.call_function(target, args)
        if "gpukern_match" in like.meta:
            new.meta["gpukern_match"] = like.meta["gpukern_match"]
        return new

    def held(self, name: str, tensor: torch.Tensor | None) -> Node | None:
        if tensor is None:
            return None
        self.constants[name] = tensor
        return self.graph.create_node("get_attr", name, name=name)

    # ---- layers ----

    def layer(self, old: Node, node: Node) -> Node | None:
        given, layer = arguments(node), self.network.layers[old.name]
        residual = arguments(old).get("residual")
        scales = [self.scheme.scale_of(each.name) for each in (arguments(old)["input"], old)]
        input_scale, output_scale = scales
        residual_scale = None if residual is None else self.scheme.scale_of(residual.name)
        eight = old.name in self.scheme.storage.eight
        if not eight and input_scale is output_scale is residual_scale is None:
            return None
        dtype = self.network.precision if output_scale is None else self.scheme.format.dtype
        weight, scale = self.weight(arguments(old)["weight"], given["weight"], layer, input_scale, eight)
        added = self.scheme.bias_of(old.name)
        bias = self.held(f"{old.name}_added", None if added is None else added.float())
        written: tuple[Any, ...] = (output_scale or 1.0, dtype)
        activated = (given["activation"], given["negative_slope"])
        operands: tuple[Any, ...] = (given["input"], weight, scale, bias)
        if old.target is _ops.linear.default:
            return self.call(node, _ops.linear_quantized.default, *operands, *activated, *written)
        operands = *operands, given.get("residual")
        written = (residual_scale or 1.0, *written)
        if old.target is _ops.conv_transpose2d.default:
            names = ("stride", "padding", "output_padding", "dilation", "groups")
            geometry = (given[name] for name in names)
            target = _ops.conv_transpose2d_quantized.default
            return self.call(node, target, *operands, *geometry, *activated, *written)
        geometry = (given[name] for name in ("stride", "padding", "dilation", "groups"))
        pool = old.target is _ops.conv2d_max_pool2d.default
        return self.call(node, _ops.conv2d_quantized.default, *operands, *geometry, *activated, *written, pool)

    def weight(
        self, old: Node, held: Node, layer: Layer, input_scale: float | None, eight: bool
    ) -> tuple[Node | None, Node | None]:
        """The weight and what multiplies the sums: the input's scale, and that of the weight."""
        if eight:
            weight, scales = eight_bit_weight(layer, self.scheme.format)
            scales = scales * (input_scale or 1.0)
            weight = layout_of(self.network, old, weight)
            return self.held(f"{layer.name}_weight8", weight), self.held(f"{layer.name}_scale", scales.float())
        if input_scale is None:
            return held, None
        scales = torch.full((layer.channels,), input_scale, dtype=torch.float32, device=layer.weight.device)
        return held, self.held(f"{layer.name}_scale", scales)

    # ---- what is in no match ----

    def average(self, old: Node, node: Node, source: str) -> Node:
        input_scale, output_scale = self.scheme.scale_of(source), self.scheme.scale_of(old.name)
        written = (output_scale or 1.0, self.network.precision if output_scale is None else self.scheme.format.dtype)
        input = node.all_input_nodes[0]
        if old.target is not _ops.avg_pool2d.default:
            target = _ops.adaptive_avg_pool2d_quantized.default
            new = self.call(node, target, input, input_scale, averaged_size(old), *written)
            return new if keeps_rank(old) else self.call(node, aten.squeeze.dims, new, [2, 3])
        given = arguments(node)
        names = ("ceil_mode", "count_include_pad", "divisor_override")
        windows = (given["kernel"], given["stride"], given["padding"], *(given[name] for name in names))
        return self.call(node, _ops.avg_pool2d_quantized.default, input, input_scale, *windows, *written)

    def as_bytes(self, old: Node, node: Node) -> Node | None:
        """A move of numbers as one of bytes, where torch has it for no others; zero is zero in all of them."""
        copies = self.scheme.format is FP8 and not _is_view(old)
        if not (old.target in _AS_BYTES or copies) or isinstance(node.args[0], (list, tuple)):
            return None
        if old.target in (_ops.max_pool2d.default,) or not isinstance(value_of_any(old), torch.Tensor):
            return None
        bytes_of = self.call(node, aten.view.dtype, node.args[0], torch.uint8)
        target: Any = node.target
        moved = self.graph.call_function(target, (bytes_of, *node.args[1:]), dict(node.kwargs))
        return self.call(node, aten.view.dtype, moved, self.scheme.format.dtype)


def _is_view(node: Node) -> bool:
    return is_view(node) or node.target in (aten.reshape.default, aten.view.default)
