"""``gpukern.fuse(..., dtype="int8")`` and ``"fp8"``: against the original in float64, and what is launched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gpukern
from gpukern.fusion import FusionError
from tests.fusion.networks import CASES
from tests.fusion.quantization.nets import NETS, Around, batches, chain

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def snr(fused: nn.Module, model: nn.Module, inputs: tuple) -> float:
    """Decibels of all floating-point outputs beside the original in float64, the least."""
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(*(each.double() for each in inputs))
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (fused(*inputs), truth)), strict=True)
    found = [
        10 * (t.square().sum() / (y.double() - t).square().sum()).log10().item()
        for y, t in pairs
        if isinstance(t, torch.Tensor)
    ]
    return min(found)


def launches(fused: gpukern.FusedModel) -> int:
    return sum(node.op == "call_function" and not _computes_nothing(node) for node in fused.module.network.graph.nodes)


def _computes_nothing(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return "sym_size" in str(node.target) or any(each.alias_info for each in node.target._schema.returns)


def dtypes_written(fused: gpukern.FusedModel) -> list[torch.dtype]:
    found = []

    class Seen(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node.op == "call_function" and isinstance(result, torch.Tensor):
                found.append(result.dtype)
            return result

    Seen(fused.module.network).run(*fused.module.prepared(tuple(batches(1))))
    return found


@pytest.mark.parametrize("name, dtype", [*((name, "int8") for name in NETS), ("chain", "fp8"), ("u-net", "fp8")])
def test_a_network_is_in_8_bits_with_the_launches_of_16_bits(name, dtype, tmp_path):
    model = NETS[name]()
    x = batches(1, 2)[0]
    fused = gpukern.fuse(model, x, dtype=dtype, calibrate=batches(), target=0.5)
    told = fused.report.quantization
    eight = [group for group in told.groups if group.precision == told.format]
    assert len(eight) >= len(told.groups) - 4 and told.format == str(FORMATS[dtype]).removeprefix("torch.")
    assert dtypes_written(fused).count(FORMATS[dtype]) >= len(eight) - 1
    assert launches(fused) == launches(gpukern.fuse(model, x, dtype=torch.float16))
    # On images that nobody has seen it is as far from the truth as the report says.
    assert snr(fused, model, (batches(1, 9, seed=5)[0],)) > min(told.reached.snr, 60) - 4 > 10
    fused.save(tmp_path / "saved.pt2")
    loaded = gpukern.load(tmp_path / "saved.pt2")
    for rows in (0, 1, 5):
        image = torch.randn(rows, 3, 16, 16)
        assert torch.equal(loaded(image), fused(image)) and fused(image).dtype is torch.float16
    assert loaded.report == fused.report


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("activation")])
def test_no_made_up_network_is_silently_wrong(name):
    """Each in eight bits is as good as its report says, or in 16, or refused as in 16."""
    torch.manual_seed(0)
    model, example = CASES[name].make()
    with torch.no_grad():
        model = Around(model, example).eval()
    # As many images that no later one is far out of the ranges that were seen.
    draws = [tuple(torch.randn(24, *tensor.shape[1:]) for tensor in example) for _ in range(5)]
    try:
        fused = gpukern.fuse(model, example, dtype="int8", calibrate=draws[:4])
    except FusionError as problem:
        assert name == "batch statistics that update running ones" and "keeps no state" in str(problem)
        return
    told = fused.report.quantization
    assert told.reached.value >= 0.99 or not told.groups
    assert snr(fused, model, draws[4]) > told.reached.snr - 8


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "leaky_relu", "tanh"])
def test_activations_are_those_of_the_original(name):
    model, example = CASES[f"activation {name}"].make()
    with torch.no_grad():
        model = Around(model, example).eval()
    draws = [torch.randn_like(example[0]) for _ in range(3)]
    fused = gpukern.fuse(model, example, dtype=torch.int8, calibrate=draws[:2], target=0.9)
    assert any(group.precision == "int8" for group in fused.report.quantization.groups)
    assert snr(fused, model, draws[2:]) > 25


def test_a_network_of_skewed_channels_is_equalized():
    """Channels of very different size between two layers: alone, most of them are lost in one scale."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)),
    ).eval()
    factors = torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    with torch.no_grad():
        for first, second in ((model[2], model[4]),):
            first.weight.mul_(factors), first.bias.mul_(factors.flatten())
            second.weight.div_(factors)
    fused = gpukern.fuse(model, batches(1, 2)[0], dtype="int8", calibrate=batches(), target=0.2)
    told = fused.report.quantization
    assert any(group.equalized for group in told.groups) and told.reached.snr > 25
    assert snr(fused, model, (batches(1, seed=3)[0],)) > told.reached.snr - 3
    # What its groups return is beside the truth too, where their channels were divided.
    assert all(group.snr > 20 for group in told.groups)


def test_without_a_proof_all_that_can_be_is_in_8_bits():
    fused = gpukern.fuse(chain(), batches(1, 2)[0], dtype="int8", calibrate=batches(), verify=False)
    told = fused.report.quantization
    assert told.reached is None and all(group.snr is None for group in told.groups)
    assert sum(group.precision == "int8" for group in told.groups) == 4 and not fused.report.verification
    assert str(fused.report)


def test_bfloat16_beside_8_bits():
    model = chain()
    fused = gpukern.fuse(
        model, batches(1, 2)[0], dtype="int8", calibrate=batches(), target=0.5, precision=torch.bfloat16
    )
    assert fused(batches(1)[0]).dtype is torch.bfloat16 and fused.report.quantization.precision == "bfloat16"
    with pytest.raises(RuntimeError, match=r"computes in the dtype it was fused for, torch\.bfloat16"):
        fused.half()


def test_choices_are_judged_by_the_numbers_behind_them():
    """One class for every image proves nothing; the numbers that it is chosen by do, in eight bits too."""

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *(layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))
            )

        def forward(self, x):
            return (self.layers(x).mean((2, 3)) + torch.tensor([0.0, 50, 0])).argmax(1)

    torch.manual_seed(0)
    fused = gpukern.fuse(Classes().eval(), batches(1, 2)[0], dtype="int8", calibrate=batches())
    told = fused.report.quantization
    assert any(group.precision == "int8" for group in told.groups) and 20 < told.reached.snr < 150
    assert any("verified by the numbers they are chosen by" in note for note in fused.report.notes)
    assert fused(batches(1)[0]).tolist() == [1] * 6
