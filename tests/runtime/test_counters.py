"""Counters of split launches: zeros for each, shared by those alone that follow one another, cleared outside graphs."""

from __future__ import annotations

import types
from dataclasses import dataclass, field

import pytest
import torch

import gpukern.functional as F
from gpukern.conv.families import split_k
from gpukern.runtime import capture, counters
from gpukern.runtime.counters import zeroed_counters
from tests.device import DEVICE
from tests.numerics import assert_within, sum_bound

GPU = torch.device("cuda", 0)


@dataclass
class Machine:
    """What torch and the driver are asked about streams; ``stream`` is current, in the capture ``capture`` if any."""

    stream: int = 7
    capture: int | None = None
    #: Fills, each with the capture that it became a node of; and how many of them a wait has made sure of.
    fills: list[int | None] = field(default_factory=list)
    finished: int = 0

    def zeros(self, count: int, device: torch.device) -> torch.Tensor:
        assert device == GPU
        self.fills.append(self.capture)
        return torch.zeros(count, dtype=torch.int32)

    def wait(self) -> None:
        assert self.capture is None, "waiting for a stream ends its capture"
        self.finished = len(self.fills)

    def asked(self, count: int = 100, stream: int | None = None, capture: int | None = None) -> torch.Tensor:
        """What a launch on ``stream`` gets; it leaves zeros behind."""
        self.stream, self.capture = stream or 7, capture
        found = zeroed_counters(count, GPU)
        assert found.numel() >= count and not found.any()
        return found

    @property
    def nodes(self) -> int:
        """Fills that are part of a graph."""
        return len(self.fills) - self.fills.count(None)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    found = Machine()
    current = lambda device: types.SimpleNamespace(cuda_stream=found.stream, synchronize=found.wait)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capture is not None)
    monkeypatch.setattr(counters, "capture_id", lambda stream: found.capture)
    monkeypatch.setattr(counters, "_zeros", found.zeros)
    for kept in ("_by_stream", "_by_capture", "_stock"):
        monkeypatch.setattr(counters, kept, {})
    return found


def shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    begins, others = one.data_ptr(), other.data_ptr()
    return begins < others + 4 * other.numel() and others < begins + 4 * one.numel()


def test_launches_on_a_stream_share_a_buffer_and_streams_do_not(machine):
    first = machine.asked()
    assert machine.asked() is first and machine.asked(stream=8) is not first
    assert not shares(machine.asked(stream=8), first)
    more = machine.asked(5000)
    assert machine.asked(5000) is more and machine.asked() is more


def test_a_capture_clears_nothing(machine):
    machine.asked()
    first = machine.asked(capture=1)
    assert all(machine.asked(count, capture=1) is first for count in (1, 100, 1024))
    assert machine.nodes == 0


def test_captures_and_their_streams_share_no_buffer(machine):
    eager = machine.asked()
    found = [machine.asked(stream=s, capture=c) for c in (1, 2) for s in (7, 8)]
    found += [machine.asked(), machine.asked(stream=9)]
    assert found[4] is eager
    assert not any(shares(a, b) for i, a in enumerate(found) for b in found[:i])
    # Nor when the first capture is over and another has its stream.
    assert machine.asked(stream=7, capture=3) is not found[0]


def test_buffers_are_zero_before_any_stream_can_replay(machine):
    machine.asked()
    machine.asked(capture=1)
    assert machine.finished >= 1 and machine.fills[0] is None
    # The stock is what was waited for: the eager buffer is cleared on the stream that uses it.
    (stock,) = counters._stock.values()
    assert stock and len(machine.fills) == 2


def test_a_stock_that_runs_low_is_filled_outside_captures_only(machine):
    machine.asked()
    for number in range(1, 61):
        machine.asked(capture=number)
    before = len(machine.fills)
    machine.asked()
    assert len(machine.fills) == machine.finished == before + 1
    found = [machine.asked(capture=number) for number in range(61, 121)]
    assert machine.nodes == 0 and len({each.data_ptr() for each in found}) == 60


@pytest.mark.parametrize("why", ["nothing ran before", "used up", "too many", "driver"])
def test_a_graph_clears_what_nobody_cleared_before(machine, monkeypatch, why):
    count = 5000 if why == "too many" else 100
    if why != "nothing ran before":
        machine.asked()
    if why == "used up":
        for number in range(2, 66):
            machine.asked(capture=number)
    if why == "driver":
        monkeypatch.setattr(counters, "capture_id", lambda stream: None)
    first, second = machine.asked(count, capture=1), machine.asked(count, capture=1)
    assert not shares(first, second) and machine.fills[-2:] == [1, 1]


# ---- the driver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "status", "expected"), [(0, 1, 2**40 + 5), (0, 0, None), (0, 2, None), (1, 1, None)]
)
def test_the_number_of_a_capture(monkeypatch, failed, status, expected):
    def driver(stream, status_out, number_out, *rest):
        assert stream.value == 0x7F00_0000_1234 and rest == (None, None, None)
        status_out._obj.value, number_out._obj.value = status, 2**40 + 5
        return failed

    monkeypatch.setattr(capture, "_driver", lambda: driver)
    assert capture.capture_id(0x7F00_0000_1234) == expected


def test_no_driver_tells_no_captures_apart(monkeypatch):
    monkeypatch.setattr(capture, "_driver", lambda: None)
    assert capture.capture_id(7) is None


# ---- a network -----------------------------------------------------------------------------------------------------

RECORD = """
import types
import torch
import gpukern
from gpukern.conv.families import split_k
from gpukern.runtime import counters
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H200
from models.resnet import resnet50

assert not torch.cuda.is_available()
model = resnet50().eval()
x = torch.randn(1, 3, 224, 224)
fused = gpukern.fuse(model, (x,), dtype=torch.float16, verify=False)
x = x.half().contiguous(memory_format=torch.channels_last)

stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
torch.cuda.current_stream = lambda device: stream
capturing, fills, asked = [False], [0, 0], [0, 0]
torch.cuda.is_current_stream_capturing = lambda: capturing[0]
counters.capture_id = lambda stream: 1
given, zeros = counters.zeroed_counters, counters._zeros

def count_zeros(count, device):
    fills[capturing[0]] += 1
    return zeros(count, "cpu")

def count_calls(count, device):
    asked[capturing[0]] += 1
    return given(count, torch.device("cuda", 0))

counters._zeros = count_zeros
split_k.zeroed_counters = count_calls
with torch.no_grad(), record_launches(H200) as launches:
    fused(x)
    launches.clear()
    capturing[0] = True
    fused(x)
print(len(launches), asked[1], fills[1])
"""


def test_resnet50_replays_launches_and_no_fills(run_python):
    done = run_python(RECORD, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    launches, split, fills = map(int, done.stdout.split())
    assert launches >= 50 and split >= 10, "of one image many convolutions share their sums"
    assert fills == 0, f"{fills} fills for {launches} launches"


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def layers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input, weight) of convolutions with so few tiles that sums are split."""
    made = []
    for channels in (256, 512, 256, 512):
        x = torch.randn(1, channels, 7, 7).half().to(DEVICE, memory_format=torch.channels_last)
        w = (torch.randn(channels, channels, 3, 3) / channels).half().to(DEVICE, memory_format=torch.channels_last)
        made.append((x, w))
    return made


def check(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    value, absolute = (
        torch.nn.functional.conv2d(a.cpu().double(), b.cpu().double(), padding=1)
        for a, b in ((x, w), (x.abs(), w.abs()))
    )
    assert_within("captured", y, value, sum_bound(value, absolute, 9 * x.shape[1], y.dtype, tf32=False))


def captured(layers) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [F.conv2d(x, w, padding=1) for x, w in layers]
    return graph, outputs


@pytest.mark.gpu
def test_graphs_of_split_launches(monkeypatch):
    """No memset in them; two of them beside each other, and again, compute what they should."""
    given = []
    wrapped = lambda count, device: given.append(zeroed_counters(count, device)) or given[-1]  # noqa: E731
    monkeypatch.setattr(split_k, "zeroed_counters", wrapped)
    work = [layers(), layers()]
    for x, w in (*work[0], *work[1]):
        F.conv2d(x, w, padding=1)  # compiles; the first fills the stock
    assert given, "no sum was split"
    given.clear()
    graphs = [captured(each) for each in work]
    assert len({each.data_ptr() for each in given}) == 2, "one buffer for each capture"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graphs[0][0].replay()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_type.name == "CUDA"]
    assert names and not any("memset" in name.lower() for name in names), names

    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for turn in range(20):
        for (graph, outputs), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for output in outputs:
                    output.fill_(float("nan"))
                graph.replay()
        torch.cuda.synchronize()
        if turn in (0, 19):
            for each, (_, outputs) in zip(work, graphs, strict=True):
                for (x, w), output in zip(each, outputs, strict=True):
                    check(x, w, output)
    assert not any(each.any() for each in given)
