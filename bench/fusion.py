"""Survey of the batch norms that ``gpukern.fuse`` folds in common models: ``python -m bench.fusion [--write]``.

A batch norm counts as foldable if what it normalises is a convolution's, a transposed convolution's or a matrix
product's result that nothing else uses, or several such results that are concatenated, viewed otherwise or permuted:
counted on torch.export's own graph, not by the code that fuses. One counts as folded if the fused graph has it no more.
Weights and statistics are random, so that no layer is an identity; no pretrained file is needed. Each model is verified
as its user's would be; errors are against the original in float64, measured here once more.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import operator
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

import gpukern
from bench.peers import torch_at_its_best
from bench.results import write_text
from gpukern.fusion.capture import quiet
from gpukern.tables import markdown as table

ROOT = Path(__file__).resolve().parents[1]
#: torchvision's and timm's names, and sides of the images other than 64.
TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "mnasnet0_5", "mnasnet1_0", "efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0", "googlenet", "inception_v3", "vgg11_bn", "vgg16_bn", "squeezenet1_1", "regnet_x_400mf",
    "regnet_y_400mf", "alexnet", "convnext_tiny",
)  # fmt: skip
TIMM = (
    "resnet26d", "resnet50d", "seresnet50", "resnetv2_50", "resnext50_32x4d", "regnety_002", "regnetx_002",
    "densenet121", "mobilenetv2_100", "mobilenetv3_small_100", "mnasnet_100", "efficientnet_b0", "tf_efficientnetv2_b0",
    "repvgg_a0", "hrnet_w18_small", "darknet53", "cspdarknet53", "cspresnet50", "ghostnet_100", "ghostnetv2_100",
    "dla34", "vovnet39a", "selecsls42b", "hardcorenas_a", "rexnet_100", "fbnetc_100", "spnasnet_100", "xception41",
    "inception_v4", "dpn68", "tinynet_a", "lcnet_050", "semnasnet_075", "res2net50_26w_4s", "skresnet18",
    "ecaresnet50t", "mobileone_s0", "convnext_atto", "selecsls42", "mixnet_s", "levit_128s",
)  # fmt: skip
SIDES = {"inception_v3": 96, "inception_v4": 96, "xception41": 96, "alexnet": 96, "levit_128s": 224}

_ATEN = torch.ops.aten
_NORMS = (_ATEN._native_batch_norm_legit_no_training.default,)
_PRODUCERS = (
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.convolution.default, _ATEN.linear.default,
    _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.addmm.default, _ATEN.conv2d.padding,
)  # fmt: skip
_BETWEEN = (
    _ATEN.cat.default, _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.permute.default,
    _ATEN.transpose.int, _ATEN.clone.default, _ATEN.squeeze.dims, _ATEN.unsqueeze.default, operator.getitem,
)  # fmt: skip
_PARTS = (_ATEN.split.Tensor, _ATEN.split_with_sizes.default)


@dataclass(frozen=True)
class Row:
    """Batch ``norms`` of the captured graph, the ``foldable`` of them and the ``folded``; errors as in the module."""

    model: str
    parameters: int
    norms: int
    foldable: int
    folded: int
    groups: int
    operators_before: int
    operators_after: int
    error: float
    unfused_error: float
    problem: str = ""


@torch_at_its_best("float32")
def measure(name: str) -> Row:
    """Build, capture, fuse in fp32 and compare; without TF32, whose errors would hide those of a fusion."""
    torch.manual_seed(0)
    model = randomised(build(name))
    parameters = sum(p.numel() for p in model.parameters())
    side = SIDES.get(name.partition(":")[2], 64)
    images = torch.randn(2, 3, side, side)
    norms, foldable = count(model, images)
    try:
        fused = gpukern.fuse(model, (images,))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(name, parameters, norms, foldable, 0, 0, 0, 0, float("nan"), float("nan"), problem)
    report = fused.report
    with torch.no_grad():
        others = torch.randn(3, 3, side, side)  # another batch size
        actual, plain = _flat(fused.module(others)), _flat(model(others))
        truth = _flat(model.double()(others.double()))
    calls = [node for node in fused.module.network.graph.nodes if node.op == "call_function"]
    folded = norms - sum("batch_norm" in str(node.target) for node in calls)
    return Row(
        name, parameters, norms, foldable, folded, len(report.fused), report.before.operators, report.after.operators,
        _distance(actual, truth), _distance(plain, truth),
    )  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """``torchvision:NAME`` or ``timm:NAME``, in evaluation mode."""
    source, _, called = name.partition(":")
    # Beside a torch for CPUs its compiled operators do not load, which no classifier needs; timm imports it too.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    if source == "timm":
        import timm

        return timm.create_model(called, pretrained=False).eval()
    import torchvision

    options = {"aux_logits": False} if called in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial weights
        return torchvision.models.get_model(called, weights=None, **options).eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Statistics and scales as a trained network has them: neither 0 nor 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.2)
    return model


def count(model: torch.nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """(batch norms, those that follow layers whose results nothing else uses) in torch.export's graph."""
    with quiet():
        graph = torch.export.export(model, (images,)).run_decompositions({}).graph
    norms = [node for node in graph.nodes if node.target in _NORMS]
    return len(norms), sum(_follows_layers(norm.args[0], direct=True) for norm in norms)


def _follows_layers(node: Any, direct: bool = False) -> bool:
    if node.target in _PARTS:
        return _follows_layers(node.args[0])
    if len(node.users) != 1:
        return False
    if node.target in _PRODUCERS:
        # The features of a linear layer over more than rows are the last dimension, and the second is normalised.
        return not direct or node.target is not _ATEN.linear.default or node.meta["val"].dim() == 2
    tensors = [each for each in node.all_input_nodes if not isinstance(each.meta["val"], torch.SymInt)]
    return node.target in _BETWEEN and all(map(_follows_layers, tensors))


def _flat(output) -> torch.Tensor:
    tensors = torch.utils._pytree.tree_leaves(output)
    return torch.cat([t.double().flatten() for t in tensors if isinstance(t, torch.Tensor)])


def _distance(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual - truth).norm() / truth.norm())


_COLUMNS = ("model", "parameters", "batch norms", "foldable", "folded", "operators", "fused", "error", "unfused")


def _cells(row: Row) -> tuple[str, ...]:
    operators = f"{row.operators_before} → {row.operators_after}" if not row.problem else row.problem
    return (
        row.model, f"{row.parameters / 1e6:.1f} M", str(row.norms), str(row.foldable), str(row.folded), operators,
        str(row.groups), f"{row.error:.1e}", f"{row.unfused_error:.1e}",
    )  # fmt: skip


def summary(rows: list[Row]) -> str:
    foldable, folded = sum(r.foldable for r in rows), sum(min(r.folded, r.foldable) for r in rows)
    share = folded / foldable if foldable else 1.0
    refused = [r.model for r in rows if r.problem]
    wrong = [r.model for r in rows if not r.error <= 10 * max(r.unfused_error, 1e-7)]
    return (
        f"{len(rows)} models, {sum(r.norms for r in rows):,} batch norms; of {foldable:,} that follow layers whose "
        f"results nothing else uses, {folded:,} were folded ({share:.1%}). Refused: {', '.join(refused) or 'none'}. "
        f"Wrong: {', '.join(wrong) or 'none'}."
    )


_LEGEND = """\
*foldable*: batch norms whose input is the result of a convolution or a fully-connected layer that nothing else uses, or
several such results concatenated, viewed otherwise or permuted: counted on torch.export's graph; *folded*: those that
the fused graph has no more, of which a few went into the layer that follows. *operators*: of a forward
pass, before → after. *error*: ‖y − truth‖ / ‖truth‖ of the fused model at another batch size than the example's, the
truth being the original in float64; *unfused*: the original in float32."""


def markdown(rows: list[Row]) -> str:
    versions = f"torch {torch.__version__}, gpukern {gpukern.__version__}"
    made = f"Made by `python -m bench.fusion --write` ({versions}, CPU, fp32, random weights). {summary(rows)}"
    return "\n\n".join(("# What gpukern.fuse folds", made, _LEGEND, table(_COLUMNS, map(_cells, rows)))) + "\n"


def main(
    model: Annotated[list[str], typer.Option(help="torchvision:NAME or timm:NAME; repeatable. All by default.")] = [],  # noqa: B006
    write: Annotated[bool, typer.Option("--write", help="Write docs/fusion-models.md and its JSON too.")] = False,
) -> None:
    """Fuse every model and count."""
    names = model or [f"torchvision:{n}" for n in TORCHVISION] + [f"timm:{n}" for n in TIMM]
    rows, console = [], Console(stderr=True)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        for name in bar.track(names, description="fusing"):
            try:
                rows.append(measure(name))
            except ImportError as error:
                bar.console.print(f"{name}: {error}")
            gc.collect()
    if not rows:
        raise typer.Exit(1)
    typer.echo(f"{table(_COLUMNS, map(_cells, rows))}\n{summary(rows)}")
    if write:
        write_text(ROOT / "docs" / "fusion-models.md", markdown(rows))
        found = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        write_text(ROOT / "bench" / "results" / "host" / "fusion_models.json", found.replace("NaN", "null") + "\n")


if __name__ == "__main__":
    typer.run(main)
