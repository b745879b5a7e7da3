"""Reports without a fusion: of a network's structure, with figures that nobody measured."""

from __future__ import annotations

from torch import fx, nn

from gpukern.fusion.report import (
    FusedGroup,
    FusionReport,
    GraphNode,
    NotFused,
    Timing,
    Totals,
    Verification,
)
from models.resnet import resnet18

CHECK = Verification("float64", error=4.1e-4, unfused=5.2e-4, factor=2.0, floor=1e-5, argmax_agreement=0.96875)


def group(*modules: str, **given) -> FusedGroup:
    values = {"pattern": "conv2d + batch_norm + relu", "operator": "gpukern::conv2d", "dtype": "float16"}
    return FusedGroup(modules, **{**values, **given})


def report(**given) -> FusionReport:
    """Two groups, a node without one, a skip connection, two reasons."""
    values = {
        "model": "torchvision:resnet50",
        "dtype": "float16",
        "fused": (
            group("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu", plan="box 256×64", error=3.2e-4, bytes=38_600_000),
            group("layer1.0.conv2", "layer1.0.bn2", pattern="conv2d + batch_norm + add", error=4.5e-4, note="large"),
        ),
        "not_fused": (
            NotFused("aux.bn", "its input has other users"),
            NotFused("norm", "batch statistics"),
            NotFused("aux.bn2", "its input has other users"),
        ),
        "before": Totals(6, 25_557_032, 161_800_000),
        "after": Totals(2, 25_530_472, 56_800_000),
        "graph_before": (
            GraphNode("x", "input", None, ()),
            GraphNode("conv1", "conv2d", 0, ("x",)),
            GraphNode("bn1", "batch_norm", 0, ("conv1",)),
            GraphNode("relu", "relu", 0, ("bn1",)),
            GraphNode("conv2", "conv2d", 1, ("relu",)),
            GraphNode("bn2", "batch_norm", 1, ("conv2",)),
            GraphNode("add", "add", 1, ("bn2", "x")),
            GraphNode("pool", "mean", None, ("add",)),
        ),
        "graph_after": (
            GraphNode("x", "input", None, ()),
            GraphNode("conv1", "conv2d + batch_norm + relu", 0, ("x",)),
            GraphNode("conv2", "conv2d + batch_norm + add", 1, ("conv1", "x")),
            GraphNode("pool", "mean", None, ("conv2",)),
        ),
        "verification": CHECK,
        "environment": {"gpukern": "0.1", "device": "CPU"},
    }  # fmt: skip
    return FusionReport(**{**values, **given})


TIMINGS = {
    "timing_before": Timing(8.1e-3, 9.0e-3, 15_800, 3_100_000_000, 174),
    "timing_after": Timing(3.9e-3, 4.1e-3, 32_800, 1_400_000_000, 55),
}


def of_network(model: nn.Module | None = None, **given) -> FusionReport:
    """As fusion would see it: convolution, batch norm, sum and activation of a traced network become one."""
    traced = fx.symbolic_trace((model or resnet18()).eval())
    groups = _grouped(traced)
    modules = dict(traced.named_modules())
    fused = tuple(_group_of(nodes, modules, number) for number, nodes in enumerate(groups))
    number_of = {node: number for number, nodes in enumerate(groups) for node in nodes}
    ends = {nodes[-1]: nodes for nodes in groups}
    before, after = [], []
    for node in traced.graph.nodes:
        sources = tuple(source.name for source in node.all_input_nodes)
        before.append(GraphNode(node.name, _kind(node, modules), number_of.get(node), sources))
        if node in ends:
            inside = set(ends[node])
            outer = dict.fromkeys(s.name for n in ends[node] for s in n.all_input_nodes if s not in inside)
            after.append(GraphNode(node.name, fused[number_of[node]].pattern, number_of[node], tuple(outer)))
        elif node not in number_of:
            after.append(before[-1])
    return report(
        **{
            "model": "models.resnet",
            "fused": fused,
            "graph_before": tuple(before),
            "graph_after": tuple(after),
            "before": Totals(len(before), 25_557_032, 161_800_000),
            "after": Totals(len(after), 25_530_472, 56_800_000),
            **given,
        }
    )


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return {"Conv2d": "conv2d", "BatchNorm2d": "batch_norm"}.get(
            type(modules[node.target]).__name__, type(modules[node.target]).__name__.lower()
        )
    return node.op if node.op in ("placeholder", "output") else getattr(node.target, "__name__", str(node.target))


def _grouped(traced: fx.GraphModule) -> list[list[fx.Node]]:
    modules = dict(traced.named_modules())
    groups, taken = [], set()
    for node in traced.graph.nodes:
        if _kind(node, modules) != "conv2d":
            continue
        nodes = [node]
        for wanted in (("batch_norm",), ("add", "iadd"), ("relu", "relu6")):
            users = list(nodes[-1].users)
            if len(users) == 1 and _kind(users[0], modules) in wanted and users[0] not in taken:
                nodes.append(users[0])
        # As the later of the two operands of a sum has it.
        if any(_kind(n, modules) in ("add", "iadd") for n in nodes) and not _is_later(nodes, modules):
            nodes = nodes[:2]
        taken.update(nodes)
        groups.append(nodes)
    return groups


def _is_later(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    (add,) = (node for node in nodes if _kind(node, modules) in ("add", "iadd"))
    order = {node: number for number, node in enumerate(add.graph.nodes)}
    return all(order[source] <= order[nodes[nodes.index(add) - 1]] for source in add.all_input_nodes)


def _group_of(nodes: list[fx.Node], modules: dict[str, nn.Module], number: int) -> FusedGroup:
    kinds = [_kind(node, modules) for node in nodes]
    names = [str(node.target) for node in nodes if node.op == "call_module"]
    size = 4_000_000 + (number * 7_919_113) % 36_000_000
    return group(
        *names,
        pattern=" + ".join(kinds),
        plan="box 256×64×64 (box 4×8×8), 4 warps, 4 stages",
        bytes=size,
        floor=size / 3.35e12,
        expected=size / 3.35e12 * (1.1 + number % 5 / 4),
        error=3e-4 + number * 1e-6,
    )


def tiny() -> nn.Module:
    """A model to name on a command line: [N, 3, H, W] → [N, 5]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def broken() -> nn.Module:
    raise RuntimeError("no such disk")
