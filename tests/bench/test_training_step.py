"""``python -m bench.training_step``: what it counts, against counts made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from bench.training_step import __main__ as command
from bench.training_step.count import Activations, Touched
from bench.training_step.operators import passes
from gpukern.runtime.accesses import Accesses, KernelError, find_accesses

aten = torch.ops.aten

# ---- whole steps, in processes that do not emulate ------------------------------------------------------------------

STEPS = """
import json
import torch
from torch import nn
from bench.training_step import paths
from gpukern.runtime.device import H200
from gpukern.runtime.records import plain

def pass_through(graph, inputs):
    return graph.forward

torch._dynamo.register_backend(pass_through, name="pass_through")
net = nn.Sequential(
    nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False)
)
found = {}
for paths.BACKEND in ("nobody", "pass_through"):
    found[paths.BACKEND] = plain(paths.count(net, (4, 8, 8, 8), torch.float16, H200)), paths.why_not_compiled()
print(json.dumps(found))
"""

#: Bytes of the images and of the logits, and of the 16 channels between the convolutions.
X, Y = 4 * 8 * 64 * 2, 4 * 16 * 64 * 2


@pytest.fixture(scope="module")
def steps(run_python):
    """Of each backend, one missing: the steps, and why there is none of the third kind."""
    result = run_python(STEPS, GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def two_layers(steps):
    found, why = steps["pass_through"]
    assert not why
    return found


def test_pytorchs_operators_of_two_layers(two_layers):
    step = two_layers["pytorch"]
    # Convolution X+Y, batch norm 2Y+Y, ReLU Y+Y, convolution Y+X, log_softmax X+X, loss X.
    assert step["forward"]["activations"] == 5 * X + 7 * Y
    # Loss X, log_softmax 2X+X; the second convolution's gradients X+Y each; ReLU 2Y+Y, batch norm 4Y+Y; Y+X.
    assert step["backward"]["activations"] == 7 * X + 11 * Y
    # The loss, and the batch norm's count and its statistics, are launches of their own.
    assert step["forward"]["operators"] == 1 + 3 + 1 + 1 + 2
    assert step["backward"]["operators"] == 3 + 2 + 1 + 2 + 1
    assert step["forward"]["kernels"] == step["backward"]["kernels"] == 0
    convolutions = step["by_name"]["aten.convolution_backward"]
    assert convolutions["operators"] == 3 and convolutions["activations"] == 3 * (X + Y)


def test_converted_two_layers(two_layers):
    step = two_layers["convert"]
    # The statistics come from the convolution's epilogue, the ReLU from the batch norm's.
    assert step["forward"]["activations"] == 5 * X + 4 * Y
    assert step["backward"]["activations"] == 7 * X + 8 * Y
    # Beside our kernels the count of batches and the loss; above all no copies of gradients.
    assert step["forward"]["operators"] == 1 + 2
    assert step["backward"]["operators"] == 3
    assert step["forward"]["kernels"] >= 3 and step["backward"]["kernels"] >= 5


def test_saved_by_two_layers(two_layers):
    # Images, both convolutions' results, the ReLU's; the batch norm's two statistics in float32; the loss's labels and
    # its sum of weights. The weights are parameters.
    expected = 2 * X + 2 * Y + 2 * 16 * 4 + 8 * 4 * 64 + 2
    # PyTorch's batch norm on a CPU has the statistics in float16.
    for way, less in ("pytorch", 0), ("convert", 0), ("compile", 2 * 16 * 2):
        assert two_layers[way]["saved"] == expected - less


def test_a_backend_that_changes_nothing_moves_what_pytorch_does(two_layers):
    for part in ("forward", "backward"):
        for counted in ("kernels", "operators", "activations"):
            assert two_layers["compile"][part][counted] == two_layers["pytorch"][part][counted]


def test_a_backend_that_is_missing_is_said_to_be(steps, two_layers):
    found, why = steps["nobody"]
    assert found == two_layers | {"compile": None} and why == "torch.compile has no backend nobody"


@pytest.mark.slow
def test_command(run_python, tmp_path):
    path = tmp_path / "counts.json"
    run = "import runpy, sys; sys.argv[0] = 'x'; runpy.run_module('bench.training_step', run_name='__main__')"
    result = run_python(
        run, "--network", "lenet", "--batch", "2", "--dtype", "float32", "--kernels", "--json", str(path)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "LeNet-5, 2×1×" in result.stdout and "aten.max_pool2d_with_indices" in result.stdout
    written = json.loads(path.read_text())
    assert written["batch"] == 2 and set(written["networks"]["lenet"]) == {"pytorch", "convert", "compile"}


@pytest.mark.parametrize("wrong", [["--device", "abacus"], ["--network", "none"], ["--dtype", "int4"]])
def test_bad_options_are_refused(wrong):
    app = command.typer.Typer()
    app.command()(command.main)
    assert CliRunner().invoke(app, wrong).exit_code == 2


# ---- what a kernel reads and writes ---------------------------------------------------------------------------------


def kernel(body: str, arguments: str = "%a: !tt.ptr<f16> {tt.divisibility = 16 : i32}, %n: i32, %b: !tt.ptr<f16>"):
    return find_accesses(
        f"module {{\n  tt.func public @k({arguments}) attributes {{noinline = false}} {{\n{body}\n  }}\n}}"
    )


def test_accesses_of_pointers_and_descriptors():
    assert kernel("%1 = tt.load %a : !tt.ptr<f16>\ntt.store %b, %1 : !tt.ptr<f16>") == ({0}, {1})
    assert kernel("%1 = tt.addptr %b, %n : !tt.ptr<f16>, i32\n%2 = tt.load %1 : !tt.ptr<f16>") == ({1}, set())
    atomic = "%1 = tt.atomic_rmw fadd, acq_rel, gpu, %b, %n, %n : (!tt.ptr<f16>, f16, i1) -> f16"
    assert kernel(atomic) == ({1}, {1})
    described = "%a: !tt.tensordesc<tensor<8x8xf16>>, %b: i32, %c: i64, %d: !tt.tensordesc<tensor<8x8xf16>>"
    moved = "%1 = tt.descriptor_load %a[%b, %b] : x -> y\ntt.descriptor_store %d[%b, %b], %1 : x"
    assert kernel(moved, described) == Accesses(frozenset({0}), frozenset({1}))


def test_accesses_through_loops_and_branches():
    loop = """
%1:2 = scf.for %i = %n to %n step %n iter_args(%p = %a, %s = %n) -> (!tt.ptr<f16>, i32)  : i32 {
  %2 = tt.load %p : !tt.ptr<f16>
  %3 = tt.addptr %p, %n : !tt.ptr<f16>, i32
  scf.yield %3, %n : !tt.ptr<f16>, i32
}
tt.store %1#0, %n : !tt.ptr<f16>
"""
    assert kernel(loop) == ({0}, {0})
    branch = """
%1 = scf.if %n -> (!tt.ptr<f16>) {
  %2 = scf.if %n -> (i32) {
    scf.yield %n : i32
  } else {
    scf.yield %n : i32
  }
  scf.yield %a : !tt.ptr<f16>
} else {
  scf.yield %b : !tt.ptr<f16>
}
tt.store %1, %n : !tt.ptr<f16>
"""
    assert kernel(branch) == (set(), {0, 1})


def test_accesses_in_blocks_beside_each_other_that_use_one_name():
    blocks = """
scf.for %i = %n to %n step %n : i32 {
  %1 = tt.addptr %a, %n : !tt.ptr<f16>, i32
  %2 = tt.load %1 : !tt.ptr<f16>
}
scf.for %i = %n to %n step %n : i32 {
  %1 = tt.addptr %b, %n : !tt.ptr<f16>, i32
  tt.store %1, %n : !tt.ptr<f16>
}
"""
    assert kernel(blocks) == ({0}, {1})


def test_accesses_of_a_warp_specialized_partition():
    body = """
ttg.warp_specialize(%n, %b) attributes {requestedRegisters = array<i32: 24>}
default {
  ttg.warp_yield
}
partition0(%arg1: i32, %arg2: !tt.ptr<f16>) num_warps(1) {
  %1 = tt.load %arg2 : !tt.ptr<f16>
  ttg.warp_return
} : (i32, !tt.ptr<f16>) -> ()
"""
    assert kernel(body) == ({1}, set())


def test_code_that_the_reader_does_not_follow_is_an_error():
    with pytest.raises(KernelError, match="no argument"):
        kernel("%1 = tt.mystery %a : !tt.ptr<f16>\n%2 = tt.load %1 : !tt.ptr<f16>")
    with pytest.raises(KernelError, match="may pass"):
        kernel("cf.br ^bb1(%a : !tt.ptr<f16>)")
    with pytest.raises(KernelError, match="may come back"):
        kernel("%1 = tt.call @other(%a) : (!tt.ptr<f16>) -> !tt.ptr<f16>")


def test_accesses_of_a_function_that_is_called():
    called = """
tt.call @some.other__Pfp16(%n, %b) : (i32, !tt.ptr<f16>) -> ()
  tt.return
}
tt.func private @some.other__Pfp16(%arg0: i32, %arg1: !tt.ptr<f16>) attributes {noinline = true} {
  tt.store %arg1, %arg0 : !tt.ptr<f16>
  tt.return
"""
    assert kernel(called) == (set(), {1})


# ---- what an operator of ATen reads and writes ----------------------------------------------------------------------


def shapes(operator, *arguments):
    """The shapes that each pass reads and writes."""
    found = passes(operator, arguments, operator(*arguments))
    return [tuple([tuple(each.shape) for each in group] for group in one) for one in found]


def meta(*size):
    return torch.empty(size, device="meta")


def test_passes_of_operators():
    a = meta(2, 3)
    assert shapes(aten.add.Tensor, a, meta(3)) == [([(2, 3), (3,)], [(2, 3)])]
    assert shapes(aten.add_.Tensor, a, a) == [([(2, 3), (2, 3)], [(2, 3)])]
    assert shapes(aten.cat.default, [a, meta(1, 3)]) == [([(2, 3), (1, 3)], [(3, 3)])]
    assert shapes(aten.copy_.default, a, meta(3)) == [([(3,)], [(2, 3)])]
    assert shapes(aten.zeros_like.default, a) == shapes(aten.zero_.default, a) == [([], [(2, 3)])]
    views = ((aten.t.default, a), (aten.squeeze_.default, meta(1, 3)), (aten.empty_like.default, a))
    assert [passes(operator, (x,), operator(x)) for operator, x in views] == [[], [], []]


def test_passes_of_gradients():
    x, w, y = meta(2, 4, 8, 8), meta(6, 4, 3, 3), meta(2, 6, 6, 6)
    window = ([6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    X, W, Y = (tuple(each.shape) for each in (x, w, y))
    all_three = shapes(aten.convolution_backward.default, y, x, w, *window, [True, True, True])
    assert all_three == [([Y, W], [X]), ([Y, X], [W]), ([Y], [(6,)])]
    only_weight = shapes(aten.convolution_backward.default, y, x, w, *window, [False, True, False])
    assert only_weight == [([Y, X], [W])]
    values, places = aten.max_pool2d_with_indices.default(x, [2, 2])
    pool = values, x, [2, 2], [2, 2], [0, 0], [1, 1], False, places
    pooled = shapes(aten.max_pool2d_with_indices_backward.default, *pool)
    assert pooled == [([(2, 4, 4, 4)] * 2, [X])]


# ---- what an activation is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "is_parameter", "expected"),
    [
        ((4, 16, 8, 8), torch.float16, False, True),
        ((256, 16), torch.float16, False, True),
        ((4, 16, 8, 8), torch.uint8, False, True),
        ((4, 16, 8, 8), torch.float16, True, False),
        ((4, 16, 8, 8), torch.float32, False, False),
        ((4096,), torch.float16, False, False),
        ((2, 2048), torch.float16, False, False),
        ((16, 4, 8, 8), torch.float16, False, False),
    ],
)
def test_activations(shape, dtype, is_parameter, expected):
    known = {(4, 16, 8, 8), (16, 16), (4096,)}
    activations = Activations(known, 4, torch.float16, torch.nn.Conv2d(4, 16, 8))
    assert (Touched(shape, dtype, 1, is_parameter) in activations) is expected


def test_the_hosts_part_is_timed(run_python):
    result = run_python(
        "import runpy; runpy.run_module('bench.training_step.host', run_name='__main__')", "--rounds", "1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "gpukern.convert" in result.stdout and "compiled / converted: " in result.stdout
