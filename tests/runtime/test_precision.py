"""Flags of fp32 products are put back as they were: what was inherited goes on being inherited."""

from __future__ import annotations

import json

import pytest
import torch

import gpukern
from bench.peers import torch_at_its_best
from gpukern.conv.plan import Direction
from gpukern.runtime.precision import conv_precision, fp32_products, matmul_precision
from gpukern.tune.sources import calls_of_model

# A process of its own for each: torch's default state is not to be had again once a flag was set.
_STATES = {
    "untouched": "",
    "all inherit ieee": "torch.backends.fp32_precision = 'ieee'",
    "all inherit tf32": "torch.backends.fp32_precision = 'tf32'",
    "cuda's own": "torch.backends.cudnn.fp32_precision = 'ieee'",
    "cuda's own, as above it": "torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = 'tf32'",
    "a convolution's own": "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "a product's own": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "old flag of convolutions": "torch.backends.cudnn.allow_tf32 = False",
    "old flag of products": "torch.backends.cuda.matmul.allow_tf32 = True",
    "old word for products": "torch.set_float32_matmul_precision('medium')",
}

_SEEN = """
import torch
import gpukern
from bench.peers import torch_at_its_best
from gpukern.conv.plan import Direction
from gpukern.runtime.precision import fp32_products
from gpukern.tune.sources import calls_of_model

def old(read):
    try:
        return read()
    except RuntimeError:
        return "mixed"

def effective():
    b = torch.backends
    return [
        b.fp32_precision, b.cudnn.fp32_precision, b.cudnn.conv.fp32_precision, b.cudnn.rnn.fp32_precision,
        b.cuda.matmul.fp32_precision, old(lambda: b.cudnn.allow_tf32), old(lambda: b.cuda.matmul.allow_tf32),
        old(torch.get_float32_matmul_precision),
    ]

def answers():
    "What is in force, and what it would be if the flags above change, which tells who inherits."
    b, found = torch.backends, [effective()]
    general, cuda = b.fp32_precision, own_cuda
    for value in ("ieee", "tf32"):
        b.fp32_precision = value
        found.append(effective())
    b.fp32_precision = general
    for value in ("ieee", "tf32"):
        b.cudnn.fp32_precision = value
        found.append(effective())
    b.cudnn.fp32_precision = cuda
    return found

def contexts():
    for precision in ("ieee", "tf32"):
        with fp32_products(precision, precision):
            assert torch.backends.cudnn.conv.fp32_precision == precision
            assert torch.backends.cuda.matmul.fp32_precision == precision
        with fp32_products(precision):
            assert torch.backends.cudnn.conv.fp32_precision == precision
        for dtype in ("float32", "tf32"):
            with torch_at_its_best(dtype):
                old(lambda: torch.backends.cuda.matmul.allow_tf32)
    for kind in ("float32", "tf32"):
        layer = gpukern.convert(torch.nn.Conv2d(2, 2, 1))
        list(calls_of_model(layer, (1, 2, 3, 3), kind, False, [Direction.FORWARD], torch.device("cpu")))
"""


#: The state is that of a process, and torch's first one is not to be had again: a fork for each.
_EACH = """
import json, os, sys
for words, setting in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, words
        continue
    exec(setting)
    own_cuda = torch.backends.cudnn.fp32_precision if words.startswith("cuda") else "none"
    before, on_cpu = answers(), torch.backends.mkldnn.fp32_precision
    work()
    if before != answers() or on_cpu != torch.backends.mkldnn.fp32_precision:
        print(words, before, answers(), sep="\\n", flush=True)
        os._exit(1)
    os._exit(0)
"""


def test_the_state_comes_back(run_python):
    done = run_python(f"{_SEEN}work = contexts\n{_EACH}", json.dumps(_STATES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_fuse_leaves_them_alone(run_python, tmp_path):
    """torch.export, which it uses, gives convolutions a value of their own, or fails where they have one."""
    work = (
        "layers = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2)).eval()\n"
        "work = lambda: gpukern.fuse(layers, torch.randn(2, 2, 3, 3)).save(sys.argv[2])\n"
    )
    states = {words: _STATES[words] for words in ("untouched", "all inherit tf32", "a convolution's own", "cuda's own")}
    done = run_python(f"{_SEEN}{work}{_EACH}", json.dumps(states), str(tmp_path / "fused.pt2"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_puts_them_back_too():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    for precision in ("ieee", "tf32"):
        with pytest.raises(KeyError), fp32_products(precision, precision):
            assert conv_precision(torch.float32) == matmul_precision(torch.float32) == precision
            raise KeyError
    with torch_at_its_best("tf32"), fp32_products("ieee"):
        assert matmul_precision(torch.float32) == "tf32"  # nobody asked for another
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


@pytest.mark.parametrize("kind, expected", [("float32", "ieee"), ("tf32", "tf32")])
def test_a_tuned_model_is_asked_in_its_precision(kind, expected):

    layer = gpukern.convert(torch.nn.Conv2d(2, 2, 1))
    (call,) = calls_of_model(layer, (1, 2, 3, 3), kind, False, [Direction.FORWARD], torch.device("cpu"))
    assert call.precision == expected
