"""The way to a CUDA device: without one by a stub of CuPy, and what only a GPU can show."""

from __future__ import annotations

import sys

import pytest
import torch

import gpukern.optim as optim
from gpukern.optim._fused import codegen, cuda, tensor_group
from gpukern.runtime.mode import EMULATE
from tests.optim.cases import FULL, Case, give_gradients, parameters
from tests.optim.cupy_stub import Stub, TorchStream

emulated = pytest.mark.skipif(not EMULATE, reason="the stub runs kernels that are compiled for the host")
BOTH_LAUNCHES = Case("LAMB", {"weight_decay": 0.1})


@pytest.fixture
def stub(monkeypatch):
    """Parameters on the CPU are taken for those of device 3; its current stream is number 7."""
    stubs, current = [], [TorchStream(7)]

    def program(variant: codegen.Variant, device: torch.device) -> cuda.DeviceProgram:
        stubs.append(Stub(variant))
        monkeypatch.setattr(cuda, "_cupy", lambda: stubs[-1].module)
        return cuda.DeviceProgram(variant, 3)

    def current_stream(device: int) -> TorchStream:
        assert device == 3
        return current[0]

    monkeypatch.setattr(tensor_group, "_stand_ins", [program])
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setenv("GPUKERN_CUBINS", "")
    return stubs, current


def trained(case: Case, where: str = "cpu", steps: int = 3, **more) -> list[torch.Tensor]:
    owners = parameters(device=where)
    optimizer = case.ours(owners, **case.options, **more)
    for number in range(steps):
        give_gradients(owners, number)
        optimizer.step()
    return [owner.detach().clone() for owner in owners]


@emulated
@pytest.mark.parametrize("case", FULL, ids=str)
def test_what_cupy_is_given_updates_the_parameters(case, request):
    expected = trained(case, max_grad_norm=1.0)
    stubs, _ = request.getfixturevalue("stub")
    found = trained(case, max_grad_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (only,) = stubs
    norms = ["norms_kernel"] if case.name in ("LARS", "LAMB") else []
    assert [launch.kernel for launch in only.launches] == 3 * ["square_sum_kernel", *norms, "update_kernel"]
    assert only.sources == [(codegen.source(only.variant), ("-arch=sm_90", "--std=c++17"))]


@emulated
def test_all_kernels_are_loaded_before_the_first_launch(stub):
    """A graph may be captured after one step, whatever that launched."""
    stubs, _ = stub
    trained(BOTH_LAUNCHES, steps=1)
    assert sorted(stubs[0].loaded) == [(name, 3) for name in sorted(codegen.kernels(stubs[0].variant.rule))]


@emulated
def test_launches_go_to_the_device_and_torchs_current_stream(stub):
    stubs, current = stub
    owner = torch.nn.Parameter(torch.ones(5))
    optimizer = optim.SGD([owner], lr=0.1)
    for stream in (7, 9, 9, 7, 0):
        current[0] = TorchStream(stream)
        owner.grad = torch.ones(5)
        optimizer.step()
    launches = stubs[0].launches
    assert [launch.stream for launch in launches] == [7, 9, 9, 7, 0]
    assert {(launch.device, launch.block) for launch in launches} == {(3, (codegen.THREADS,))}
    assert stubs[0].current_device == 0, "the user's device is current again"
    assert stubs[0].wrapped == [7, 9, 0], "a stream is made CuPy's once"


def test_without_cupy_the_message_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for version, package in (("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x"), (None, "cupy-cuda12x")):
        monkeypatch.setattr(torch.version, "cuda", version)
        cuda._cupy.cache_clear()
        with pytest.raises(RuntimeError, match=f"pip install {package}"):
            cuda._cupy()


def test_the_installed_cupy_has_what_is_used():
    cupy = pytest.importorskip("cupy")
    assert callable(cupy.cuda.Module().load) and callable(cupy.cuda.Module().get_function)
    # A stream that is torch's stays torch's: CuPy must not destroy it.
    stream = cupy.cuda.Stream.__new__(cupy.cuda.Stream)
    stream.ptr, stream._foreign_stream_ref = 16, object()
    stream.__del__()
    assert stream._foreign_stream_ref is None
    stream.ptr = 0


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def twins(case: Case, **more):
    """(optimizer, parameters) twice, with gradients that stay where they are."""
    found = []
    for _ in range(2):
        owners = parameters(device="cuda")
        give_gradients(owners, 0)
        options = {name: torch.tensor(v, device="cuda") if name == "lr" else v for name, v in more.items()}
        found.append((case.ours(owners, **{**case.options, **options}), owners))
    return found


def captured(optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    """A step, after one that was not captured."""
    optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def assert_equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> None:
    for one, other in zip(these, those, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr a number", "lr a tensor"])
def test_a_graph_is_replayed_with_a_scheduler_in_between(case, as_tensor):
    (eager, owners), (optimizer, replayed) = twins(case, max_grad_norm=1.0, **({"lr": 0.1} if as_tensor else {}))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, gamma=0.5) for each in (eager, optimizer)]
    graph = captured(optimizer)
    eager.step()
    assert_equal(owners, replayed)
    for number in range(1, 5):
        for scheduler in schedulers:
            scheduler.step()
        for each in (owners, replayed):
            for owner, other in zip(each, parameters(device="cuda", seed=number), strict=True):
                owner.grad.copy_(other.detach())
        eager.step()
        if not as_tensor:
            optimizer.sync_hyperparameters()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(owners, replayed)
    assert torch.equal(eager.grad_norm, optimizer.grad_norm)
    for owner, other in zip(owners, replayed, strict=True):
        if "step" in eager.state.get(owner, {}):
            assert eager.state[owner]["step"] == optimizer.state[other]["step"] == 5


@pytest.mark.gpu
def test_a_graph_skips_what_overflows():
    (eager, owners), (optimizer, replayed) = twins(Case("AdamW"))
    found_inf = torch.zeros((), device="cuda")
    for each in (eager, optimizer):
        each.grad_scale, each.found_inf = torch.full((), 4.0, device="cuda"), found_inf
    graph = captured(optimizer)
    eager.step()
    for value in (0.0, 1.0, 2.0, 0.0):
        found_inf.fill_(value)
        eager.step()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(owners, replayed)
    assert optimizer.state[replayed[0]]["step"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_step_waits_for_its_stream(case):
    (expected, owners), (optimizer, others) = twins(case)
    optimizer.step()  # compiles and uploads
    late = [torch.randn_like(owner) for owner in others]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for owner, gradient in zip(others, late, strict=True):
            owner.grad.copy_(gradient)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    expected.step()
    for owner, gradient in zip(owners, late, strict=True):
        owner.grad.copy_(gradient)
    expected.step()
    assert_equal(owners, others)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL, ids=str)
def test_parameters_on_two_devices(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    owners = [*parameters(device="cuda:0"), *parameters(device="cuda:1")]
    optimizer = case.ours(owners, **case.options)
    for number in range(3):
        give_gradients(owners[: len(owners) // 2], number)
        give_gradients(owners[len(owners) // 2 :], number)
        optimizer.step()
        assert torch.cuda.current_device() == 0
    assert len(optimizer._step._parts) == 2
    half = len(owners) // 2
    assert_equal([owner.cpu() for owner in owners[:half]], [owner.cpu() for owner in owners[half:]])


@pytest.mark.gpu
def test_subnormal_moments_are_kept():
    """Below 2⁻¹²⁶, where a compiler may be told to flush to zero."""
    gradient = torch.logspace(-44, -38, 4096, device="cuda")
    moments = []
    for maker in (torch.optim.SGD, optim.SGD):
        owner = torch.nn.Parameter(torch.zeros_like(gradient))
        owner.grad = gradient.clone()
        optimizer = maker([owner], lr=1.0, momentum=0.5)
        for _ in range(3):
            optimizer.step()
        moments.append(optimizer.state[owner]["momentum_buffer"])
    assert moments[0].count_nonzero() == gradient.numel()
    # Of numbers this small, each of the three steps may be wrong by half of the smallest there is.
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-6, atol=3e-45)


@pytest.mark.gpu
def test_a_step_makes_one_launch():
    owners = parameters(device="cuda")
    optimizer = optim.Adam(owners)
    give_gradients(owners, 0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if event.device_type.name == "CUDA"]
    assert kernels == ["update_kernel"]
