"""gpukern's layers work as torch.nn's do with the rest of PyTorch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpukern
from gpukern.runtime.mode import Mode, force_mode
from tests.resnet import resnet18

# layer, its arguments, the shape of its input
LAYERS = {
    "Conv2d": (("Conv2d", (2, 4, 3), {"padding": 1}), (2, 2, 5, 6)),
    "Conv2d-grouped": (
        ("Conv2d", (2, 4, 3), {"stride": 2, "groups": 2, "padding_mode": "circular", "padding": 1}),
        (2, 2, 5, 6),
    ),
    "ConvTranspose2d": (("ConvTranspose2d", (2, 4, 3), {"stride": 2, "output_padding": 1}), (2, 2, 3, 4)),
    "Conv1d": (("Conv1d", (4, 6, 3), {"padding": 1, "groups": 2}), (2, 4, 7)),
    "Conv1d-depthwise": (("Conv1d", (3, 3, 4), {"padding": 3, "groups": 3}), (2, 3, 8)),
    "ConvTranspose1d": (("ConvTranspose1d", (2, 4, 3), {"stride": 2, "output_padding": 1}), (2, 2, 5)),
    "Conv3d": (("Conv3d", (2, 3, (2, 3, 2)), {"padding": 1}), (1, 2, 3, 4, 3)),
    "ConvTranspose3d": (("ConvTranspose3d", (2, 3, 2), {"stride": 2, "padding": 1}), (1, 2, 2, 3, 3)),
    "Linear": (("Linear", (6, 4), {}), (3, 6)),
    "MaxPool2d": (("MaxPool2d", (2,), {"ceil_mode": True}), (2, 2, 5, 6)),
    "AvgPool2d": (("AvgPool2d", (2,), {"padding": 1}), (2, 2, 5, 6)),
    "AdaptiveAvgPool2d": (("AdaptiveAvgPool2d", (3,), {}), (2, 2, 5, 6)),
    "MaxPool1d": (("MaxPool1d", (2,), {"ceil_mode": True}), (2, 2, 7)),
    "AvgPool1d": (("AvgPool1d", (2,), {"padding": 1}), (2, 2, 7)),
    "AdaptiveAvgPool1d": (("AdaptiveAvgPool1d", (3,), {}), (2, 2, 7)),
    "AdaptiveMaxPool1d": (("AdaptiveMaxPool1d", (3,), {}), (2, 2, 7)),
    "MaxPool3d": (("MaxPool3d", (2,), {"ceil_mode": True}), (2, 2, 3, 4, 3)),
    "AvgPool3d": (("AvgPool3d", (2,), {"padding": 1}), (2, 2, 3, 4, 3)),
    "AdaptiveAvgPool3d": (("AdaptiveAvgPool3d", (3,), {}), (2, 2, 3, 5, 4)),
    "AdaptiveMaxPool3d": (("AdaptiveMaxPool3d", (3,), {}), (2, 2, 3, 5, 4)),
    "ReLU": (("ReLU", (), {}), (4, 5)),
    "LeakyReLU": (("LeakyReLU", (0.2,), {}), (4, 5)),
    "Sigmoid": (("Sigmoid", (), {}), (4, 5)),
    "Tanh": (("Tanh", (), {}), (4, 5)),
    "ReLU6": (("ReLU6", (), {}), (4, 5)),
    "Hardsigmoid": (("Hardsigmoid", (), {}), (4, 5)),
    "Hardswish": (("Hardswish", (), {}), (4, 5)),
    "SiLU": (("SiLU", (), {}), (4, 5)),
    "GELU": (("GELU", (), {}), (4, 5)),
    "GELU-tanh": (("GELU", (), {"approximate": "tanh"}), (4, 5)),
    "Softmax": (("Softmax", (1,), {}), (4, 5)),
    "Softmax2d": (("Softmax2d", (), {}), (2, 3, 4, 5)),
    "LogSoftmax": (("LogSoftmax", (-1,), {}), (4, 5)),
    # Nothing is kept: what is drawn is none of torch's.
    "Dropout": (("Dropout", (1.0,), {}), (4, 5)),
    "Dropout1d": (("Dropout1d", (1.0,), {}), (2, 2, 5)),
    "Dropout2d": (("Dropout2d", (1.0,), {}), (2, 2, 3, 4)),
    "Dropout3d": (("Dropout3d", (1.0,), {}), (2, 2, 2, 3, 4)),
    "BatchNorm1d": (("BatchNorm1d", (5,), {}), (4, 5)),
    "SyncBatchNorm": (("SyncBatchNorm", (2,), {}), (2, 2, 5, 6)),
    "BatchNorm2d": (("BatchNorm2d", (2,), {"momentum": None}), (2, 2, 5, 6)),
    "BatchNorm3d": (("BatchNorm3d", (2,), {}), (2, 2, 3, 4, 3)),
    "LayerNorm": (("LayerNorm", ((5, 6),), {}), (2, 2, 5, 6)),
    "RMSNorm": (("RMSNorm", (6,), {}), (3, 6)),
    "GroupNorm": (("GroupNorm", (2, 4), {}), (2, 4, 5, 6)),
    "InstanceNorm1d": (("InstanceNorm1d", (3,), {"affine": True}), (3, 7)),
    "InstanceNorm2d": (("InstanceNorm2d", (3,), {"affine": True, "track_running_stats": True}), (2, 3, 5, 6)),
    "InstanceNorm3d": (("InstanceNorm3d", (3,), {}), (2, 3, 2, 3, 4)),
}

FP32 = {"rtol": 1e-5, "atol": 1e-5}


pytestmark = pytest.mark.usefixtures("full_fp32")


@pytest.fixture
def reference():
    with force_mode(Mode.REFERENCE):
        yield


@pytest.fixture(params=LAYERS)
def pair(request, where):
    """(gpukern's layer, torch's layer with the same parameters, an input)."""
    (kind, args, kwargs), shape = LAYERS[request.param]
    theirs = getattr(nn, kind)(*args, **kwargs)
    ours = getattr(gpukern.nn, kind)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(where), theirs.to(where), torch.randn(shape, device=where)


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() + 1).square().sum().backward()  # of y alone it hardly changes where y is normalised
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def assert_same(ours, theirs, **tolerance) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_every_layer_has_a_case():
    # No layer of torch's, of a target, over channels, of layers.
    elsewhere = {"BatchNormAct2d", "CrossEntropyLoss", "LayerNorm2d", "Sequential"}
    assert {name.partition("-")[0] for name in LAYERS} == set(gpukern.nn.__all__) - elsewhere


def test_results_are_torchs(pair):
    ours, theirs, x = pair
    assert_same(step(ours, x), step(theirs, x), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(pair, dtype):
    """Results and gradients have torch's dtypes, and its values up to the rounding of the low precision."""
    ours, theirs, x = pair
    with torch.autocast(x.device.type, dtype):
        results = step(ours, x), step(theirs, x)
    # Each result passes through two roundings to dtype (of a factor and of the sum) on both sides; the gradients one
    # more, of the incoming gradient: sums of up to 18 products whose size is about 1.
    bound = 8 * torch.finfo(dtype).eps
    assert_same(*results, rtol=bound, atol=4 * bound)


def test_autocast_of_a_network_keeps_fp32_parameters_and_gradients(where):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).to(where)
    converted = gpukern.convert(model)
    with torch.autocast(where.type, torch.bfloat16):
        output = converted(torch.randn(2, 1, 5, 5, device=where))
        assert output.dtype is torch.bfloat16
        with torch.autocast(where.type, enabled=False):
            assert converted(torch.randn(2, 1, 5, 5, device=where)).dtype is torch.float32
    output.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())


def test_autocast_leaves_float64_alone(reference):
    layer = gpukern.nn.Linear(2, 2).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 2).double()).dtype is torch.float64


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(pair, how):
    ours, _, x = pair
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied) is type(ours) and repr(copied) == repr(ours)
    assert_same(step(copied, x), step(ours, x), rtol=0, atol=0)
    assert all(a is not b for a, b in zip(copied.parameters(), ours.parameters(), strict=True))


def test_state_dict_moves_both_ways(pair):
    ours, theirs, x = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    theirs.load_state_dict(ours.state_dict())
    assert_same(step(ours, x), step(theirs, x), **FP32)


def test_gradients_accumulate(pair):
    ours, theirs, x = pair
    gradients = []
    for layer in (ours, theirs):
        layer.zero_grad()
        input = x.clone().requires_grad_()
        for scale in (1, 3):
            layer(input * scale).square().sum().backward()
        gradients.append([input.grad, *(parameter.grad for parameter in layer.parameters())])
    assert_same(*gradients, rtol=1e-5, atol=1e-4)


def test_same_tensor_and_layer_twice(pair):
    ours, theirs, x = pair
    gradients = []
    for layer in (ours, theirs):
        layer.zero_grad()
        input = x.clone().requires_grad_()
        (layer(input) * layer(input)).sum().backward()
        gradients.append([input.grad, *(parameter.grad for parameter in layer.parameters())])
    assert_same(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["Conv2d", "Linear"])
@pytest.mark.parametrize("needed", range(8))
def test_gradients_only_for_what_requires_them(where, kind, needed):
    (name, args, kwargs), shape = LAYERS[kind]
    theirs = getattr(nn, name)(*args, **kwargs).to(where)
    ours = gpukern.convert(copy.deepcopy(theirs))
    gradients = []
    for layer in (ours, theirs):
        x = torch.linspace(-1, 1, torch.Size(shape).numel(), device=where).reshape(shape)
        tensors = x, layer.weight, layer.bias
        for place, tensor in enumerate(tensors):
            tensor.requires_grad_(bool(needed >> place & 1))
        y = layer(x)
        assert y.requires_grad == bool(needed)
        if needed:
            y.square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for place, (a, b) in enumerate(zip(*gradients, strict=True)):
        assert (a is not None) == (b is not None) == bool(needed >> place & 1)
        if a is not None:
            torch.testing.assert_close(a, b, **FP32)


@pytest.mark.parametrize("kind", ["Conv2d", "Linear"])
@pytest.mark.parametrize("needed", [1, 2, 4])
def test_only_needed_gradients_are_computed(reference, kind, needed):
    (name, args, kwargs), shape = LAYERS[kind]
    layer, x = getattr(gpukern.nn, name)(*args, **kwargs), torch.randn(shape)
    for place, tensor in enumerate((x, layer.weight, layer.bias)):
        tensor.requires_grad_(bool(needed >> place & 1))
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "gpukern":
                called.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Recorder():
        layer(x).sum().backward()
    gradient = {
        "Conv2d": {1: "conv2d_input_grad", 2: "conv2d_weight_grad", 4: "channel_sum"},
        "Linear": {1: "linear", 2: "linear_weight_grad", 4: "channel_sum"},
    }
    assert called == [kind.lower(), gradient[kind][needed]]


@pytest.mark.parametrize(
    ("kind", "what"),
    [("Conv2d", "input"), ("Conv2d", "weight"), ("Linear", "input"), ("Linear", "weight"), ("Tanh", "output")],
)
def test_change_of_a_saved_tensor_is_detected(where, kind, what):
    (name, args, kwargs), shape = LAYERS[kind]
    for library in (nn, gpukern.nn):
        layer = getattr(library, name)(*args, **kwargs).to(where)
        x = torch.randn(shape, device=where, requires_grad=True)
        input = x * 1
        output = layer(input)
        changed = {"input": input, "output": output, "weight": getattr(layer, "weight", None)}[what]
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_inplace_activation(where):
    for ours, theirs in (
        (gpukern.nn.ReLU(True), nn.ReLU(True)),
        (gpukern.nn.LeakyReLU(0.1, True), nn.LeakyReLU(0.1, True)),
        (gpukern.nn.SiLU(True), nn.SiLU(True)),
    ):
        results = []
        for layer in (ours, theirs):
            x = torch.linspace(-1, 1, 7, device=where).requires_grad_()
            input = x * 3
            output = layer(input)
            assert output is input
            output.square().sum().backward()
            results.append([output.detach(), x.grad])
        assert_same(*results, **FP32)
        with pytest.raises(RuntimeError, match="leaf Variable"):
            ours(torch.ones(2, device=where, requires_grad=True))


def test_hooks_fire(pair):
    ours, _, x = pair
    seen = []
    ours.register_forward_pre_hook(lambda *_: seen.append("before"))
    ours.register_forward_hook(lambda *_: seen.append("after"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    step(ours, x)
    assert seen == ["before", "after", "backward"]


def test_no_grad_and_inference_mode(pair):
    ours, theirs, x = pair
    with torch.no_grad():
        assert not ours(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), **FP32)


DATA_PARALLEL = """
import sys
import torch
import torch.distributed as distributed
from torch import nn
import gpukern

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = gpukern.convert(nn.Sequential(
    nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(18, 3)
))
x = torch.randn(4, 1, 8, 8)
model(x).square().mean().backward()
alone = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
parallel = nn.parallel.DistributedDataParallel(model)
parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
for expected, parameter in zip(alone, model.parameters()):
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)
distributed.destroy_process_group()
print("equal")
"""


def test_distributed_data_parallel(run_python, tmp_path):
    """Two gloo processes with half of the batch each have the gradients of one with all of it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda rank: run_python(DATA_PARALLEL, str(rank), str(tmp_path), GLOO_SOCKET_IFNAME="lo"), range(2)
            )
        )
    assert [run.stdout for run in runs] == ["equal\n"] * 2, "\n".join(run.stderr for run in runs)


@pytest.mark.slow
def test_resnet18_on_the_kernels(device):
    """Every layer in place: the whole network (emulated, a quarter as wide) against float64."""
    model = resnet18(width=64 if device.type == "cuda" else 16)
    converted = gpukern.convert(model).to(device)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        actual = converted(x.to(device)).cpu().double()
        expected = copy.deepcopy(model).cpu().double()(x.double())
    # Each computing layer adds an error of its own, in norm at most one rounding of its output; they are independent,
    # so their squares add up. (torch's fp32 kernels on a CPU come to 2 eps here, these emulated to 1 eps.)
    layers = sum(not list(module.children()) for module in model.modules())
    error = (actual - expected).norm() / expected.norm()
    assert error <= layers**0.5 * torch.finfo(torch.float32).eps, error
