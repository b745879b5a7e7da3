"""``gpukern.compile_report``, in processes that do not emulate: its numbers, its text and its JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gpukern
from gpukern import tables
from gpukern.compiler.report import CompiledGroup, CompileReport, Traffic
from tests.documents import ROOT, blocks

BEGIN = """
import json
import gpukern, torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False), nn.Upsample(scale_factor=2), nn.Sigmoid(),
    ).half().to(memory_format=torch.channels_last)

x = torch.randn(4, 8, 128, 128, dtype=torch.float16).to(memory_format=torch.channels_last)
"""

NUMBERS = """
nested = nn.Sequential(net())
report = gpukern.compile_report(nested, x)
with torch.no_grad():
    without = gpukern.compile_report(torch.compile(nested, backend="gpukern"), x, device="H200")
print(json.dumps({
    "json": json.loads(report.to_json()),
    "text": str(report),
    "same": without == report,
    "untouched": nested[0][1].num_batches_tracked.item() == 0 and all(p.grad is None for p in nested.parameters()),
    "evaluation": str(gpukern.compile_report(net().eval(), x)),
    "skipped": json.loads(gpukern.compile_report(net(), x, options={"skip": ["3"]}).to_json()),
    "tokens": json.loads(
        gpukern.compile_report(nn.Sequential(nn.Linear(8, 16), nn.GELU()), torch.randn(2, 4, 8)).to_json()
    ),
    "sequence": json.loads(
        gpukern.compile_report(nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), torch.randn(2, 4, 32)).to_json()
    ),
    "converted": json.loads(gpukern.compile_report(gpukern.convert(net()), x).to_json()),
}))
"""

#: Bytes of the images, of the 16 channels between the convolutions, and of both weights.
X, Y = 4 * 8 * 128 * 128 * 2, 4 * 16 * 128 * 128 * 2
W, V = 16 * 8 * 9 * 2, 16 * 8 * 2


@pytest.fixture(scope="module")
def printed(run_python):
    result = run_python(BEGIN + NUMBERS, GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def about(bytes):
    """Statistics, parameters and workspaces of split sums are less than one more pass over the smallest images."""
    return pytest.approx(bytes + X / 2, abs=X / 2)


def test_numbers_of_two_layers(printed):
    found = printed["json"]
    assert (found["model"], found["training"], found["device"], found["graphs"]) == ("Sequential", True, "H200", 1)
    first, second = found["groups"]
    assert first["modules"] == ["0.0", "0.1", "0.2"] and first["pattern"] == "conv2d + batch_norm + relu"
    assert second["modules"] == ["0.3"] and second["pattern"] == "conv2d"
    # The convolution, with its statistics; one pass for the rest.
    assert first["forward"]["launches"] == 2 and first["forward"]["bytes"] == about(X + W + 3 * Y)
    assert second["forward"] == {"launches": 1, "bytes": Y + V + X}
    # Backward, workspaces of weight gradients come on top, as the plan has splits.
    # The second's gradients of input, with the norm's two sums, which need the first's result, and of weight.
    assert second["backward"]["launches"] == 2 and second["backward"]["bytes"] >= 2 * X + 3 * Y + 2 * V
    # One pass for the gradient behind the norm, and the weight's; the images need none.
    assert first["backward"]["launches"] == 2 and first["backward"]["bytes"] >= 4 * Y + X + W


def test_totals_have_what_is_in_no_group(printed):
    found = printed["json"]
    for direction in ("forward", "backward"):
        grouped = sum(group[direction]["launches"] for group in found["groups"])
        assert found[direction]["launches"] == grouped + 1  # the sigmoid


@pytest.mark.parametrize("name", ["tokens", "sequence"])
def test_a_group_that_ends_with_a_view_has_its_backward_too(printed, name):
    [group] = printed[name]["groups"]
    assert group["backward"] == printed[name]["backward"] and group["backward"]["launches"] > 1


def test_reasons_name_modules(printed):
    [left] = printed["json"]["left"]
    assert left[0] == "0.5" and left[1].startswith("follows interpolate")
    assert ["3", "skipped, by '3'"] in printed["skipped"]["left"]
    assert "conv2d_batch_norm runs as it is" in [reason for _, reason in printed["converted"]["left"]]


def test_a_compiled_model_is_its_original_and_steps_have_gradients(printed):
    assert printed["same"] and printed["untouched"]


def test_text_has_a_row_for_each_group(printed):
    text, found = printed["text"], printed["json"]
    lines = text.splitlines()
    assert lines[0] == 'Sequential by torch.compile(backend="gpukern"): 1 graph, plans of H200'
    forward, backward = found["forward"]["launches"], found["backward"]["launches"]
    assert lines[1].startswith(f"forward + backward: {forward} + {backward} launches of gpukern's kernels, ")
    assert any(line.split()[:4] == ["1", "0:", "0,", "1,"] for line in lines)
    assert any("by themselves" in line for line in lines)
    assert "not fused, because" in lines and lines[-1].startswith("1  follows interpolate")
    assert "\x1b" not in text
    assert printed["evaluation"].splitlines()[0].endswith("plans of H200, in evaluation mode")


def test_numbers_stay_whole_on_a_narrow_terminal():
    """Words break instead; modules of one parent share its name."""
    paths = tuple(f"backbone.stages.layer{i}.convolution.depthwise" for i in (1, 2))
    group = CompiledGroup(paths, "conv2d + batch_norm + add + relu", 0, Traffic(1234, 123_456_789), Traffic(5, 678_000))
    report = CompileReport("Net", True, "H200", 1, (group,), (), Traffic(1235, 123_456_799), Traffic(5, 678_000), 9)
    lines = tables.as_text(report, 80).splitlines()
    assert max(map(len, lines)) <= 80
    [row] = [line for line in lines if line.startswith(" 1") or line.startswith("1 ")]
    assert row.endswith("123 MB  0.678 MB") and "  1,234  " in row
    wide = str(report)
    assert "backbone.stages: layer1.convolution.depthwise, layer2.convolution.depthwise" in wide
    assert [line.split() for line in wide.splitlines()][-1] == ["by", "themselves", "1", "–", "0.0100", "kB", "–"]


def test_what_the_page_shows_is_printed(run_python):
    """The page's examples cannot run where its tests run, which emulate."""
    page = ROOT / "docs" / "compile.md"
    code = "\n".join(
        block.body for block in blocks(page) if block.language == "python" and "options=" not in block.body
    )
    code = code.replace("import gpukern, torch, torchvision", "import gpukern, torch\nfrom models import resnet")
    result = run_python(code.replace("torchvision.models.", "resnet."))
    assert result.returncode == 0, result.stderr[-3000:]
    [shown] = [block.output for block in blocks(page) if "compile_report" in block.body]
    for line in filter("…".__ne__, shown.splitlines()):
        assert line in [printed.rstrip() for printed in result.stdout.splitlines()], result.stdout


@pytest.mark.parametrize(
    "changed, error, said",
    [
        ({"model": torch.relu}, TypeError, "expected a torch.nn.Module, but got builtin"),
        ({"device": torch.device("cuda")}, TypeError, 'expected the name of a device, as "h200", but got device'),
        ({"device": "cuda"}, ValueError, "no device is called 'cuda'; known are .*h200"),
        ({"options": {"skp": []}}, TypeError, "gpukern has no option 'skp'; there are: skip, recompute"),
        ({"options": {"skip": "0"}}, TypeError, "skip: expected a sequence of module paths, but got '0'"),
        ({"model": nn.Linear(2, 2, device="meta")}, NotImplementedError, "on the meta device have no data"),
        ({"args": torch.empty(2, 2, device="meta")}, NotImplementedError, "on the meta device have no data"),
    ],
)
def test_mistakes_are_errors(changed, error, said):
    arguments = {"model": nn.Linear(2, 2), "args": torch.randn(2, 2), "device": "h200", **changed}
    with pytest.raises(error, match=said):
        gpukern.compile_report(arguments.pop("model"), arguments.pop("args"), **arguments)
