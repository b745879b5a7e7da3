"""The suite of epilogues beyond its being right: what its rows must move, and against whom they run."""

from __future__ import annotations

import torch

from bench.results import Case
from bench.suite import Task, suites
from gpukern.conv.problem import conv_problem

EPILOGUE, PLAIN = suites()["epilogue"], suites()["conv"]
PROBLEM = conv_problem((32, 64, 56, 56), (64, 64, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
SMALL = conv_problem((2, 16, 6, 5), (24, 16, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
CPU = torch.device("cpu")
BIAS, RESIDUAL = EPILOGUE.computations


def make(suite, computation: str, problem=PROBLEM, dtype: str = "float16") -> Task:
    return Task(Case(suite.name, computation, *suite.describe(problem), 32, dtype, "channels_last", ()), problem)


def test_a_residual_is_one_more_tensor_to_read():
    plain, bias, residual = (
        suite.work(make(suite, name)) for suite, name in ((PLAIN, "forward"), (EPILOGUE, BIAS), (EPILOGUE, RESIDUAL))
    )
    assert bias == plain and residual.flops == bias.flops
    assert residual.bytes - bias.bytes == 2 * 32 * 64 * 56 * 56


def test_its_peers_fuse_as_much_as_they_can():
    """cuDNN by name, and one pointwise kernel after it; the names say whose tensors are added."""
    cuda, everyone = torch.device("cuda"), ("library", "compile")
    names = {
        name: [i.name for i in EPILOGUE.implementations(make(EPILOGUE, name), everyone, cuda)]
        for name in (BIAS, RESIDUAL)
    }
    assert names[BIAS] == ["gpukern", "cuDNN + ReLU channels_last", "cuDNN + ReLU NCHW", "torch.compile", "cuDNN fused"]
    assert names[RESIDUAL] == [
        "gpukern", "cuDNN + add + ReLU channels_last", "cuDNN + add + ReLU NCHW", "torch.compile", "cuDNN fused",
        "cuDNN + one kernel",
    ]  # fmt: skip
    (fused,) = (
        i for i in EPILOGUE.implementations(make(EPILOGUE, RESIDUAL), ("library",), cuda) if i.name == "cuDNN fused"
    )
    assert not fused.missing and "cudnn_convolution_add_relu" in fused.setting


def test_cudnn_s_fused_operators_get_their_operands_in_order(monkeypatch):
    """There is no cuDNN here: against the operators' own schemas, and what stands at each place."""
    for computation in EPILOGUE.computations:
        task, given = make(EPILOGUE, computation, SMALL), []
        name = "cudnn_convolution_add_relu" if computation == RESIDUAL else "cudnn_convolution_relu"
        schema = getattr(torch.ops.aten, name).default._schema
        monkeypatch.setattr(getattr(torch.ops.aten, name), "default", lambda *arguments, to=given: to.extend(arguments))
        (fused,) = (i for i in EPILOGUE.implementations(task, ("library",), CPU) if i.name == "cuDNN fused")
        assert fused.missing == "cuDNN needs a CUDA device"
        tensors = EPILOGUE.tensors(task, CPU)
        assert [tuple(t.shape) for t in tensors[3:]] == ([(2, 24, 6, 5)] if computation == RESIDUAL else [])
        fused.function(*tensors)
        x, w, b, *residual = tensors
        wanted = {"self": x, "weight": w, "bias": b, "z": residual[0] if residual else None, "alpha": 1.0}
        wanted |= {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        for argument, value in zip(schema.arguments, given, strict=True):
            assert value is wanted[argument.name] or value == wanted[argument.name], argument.name


def test_the_pointwise_kernel_after_the_convolution_computes_the_same(monkeypatch):
    """Uncompiled: what torch.compile makes of it is its own affair."""
    monkeypatch.setattr("bench.peers.compile_for_these_shapes", lambda function, mode=None: function)
    task = make(EPILOGUE, RESIDUAL, SMALL, "float32")
    tensors = EPILOGUE.tensors(task, CPU)
    found = {i.name: i for i in EPILOGUE.implementations(task, ("compile",), CPU)}
    actual = found["cuDNN + one kernel"].function(*tensors)
    assert torch.allclose(actual.double(), EPILOGUE.reference(task, tensors), atol=1e-4) and actual.min() == 0
