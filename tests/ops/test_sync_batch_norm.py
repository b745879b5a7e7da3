"""Batch norm across processes: as one process with the whole batch, and torch's layer in all else."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpukern
from gpukern.ops._batch_norm.problem import Running
from gpukern.ops.sync_batch_norm import _implementations as implementations
from gpukern.ops.sync_batch_norm import apply
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.tensors import format_kept_by
from tests.device import DEVICE
from tests.numerics import FP32_EPS, assert_within, rounding_bound
from tests.ops.batch_norm_calls import Call, call, check
from tests.processes import in_processes

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- in several processes ------------------------------------------------------------------------------------------


class Together(torch.autograd.Function):
    """The result of all processes' parts of a batch, and the gradients of them all, in every process."""

    @staticmethod
    def forward(ctx: Any, one: Synced, x, weight, bias) -> torch.Tensor:
        with torch.enable_grad():
            ctx.leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
            whole, weight, bias = ctx.leaves
            part = whole[one.mine]
            ctx.output = apply(part, one.mean, one.var, weight, bias, one.momentum, one.eps, one.group)
        like = part.new_zeros(part.shape[1]), part.new_ones(part.shape[1])
        assert ctx.output.stride() == nn.functional.batch_norm(part, *like).stride()
        ctx.one, output = one, x.new_zeros(x.shape).to(memory_format=format_kept_by(x))
        output[one.mine] = ctx.output.detach()
        return summed(output, one.group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        wanted = [t for t in ctx.leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(ctx.output, wanted, grad[ctx.one.mine], retain_graph=True))
        grads = [None if t is None or not t.requires_grad else summed(next(found), ctx.one.group) for t in ctx.leaves]
        return None, *grads


def summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Rounded once, whatever the dtype."""
    total = tensor.double()
    dist.all_reduce(total, group=group)
    return total.to(tensor.dtype)


@dataclass
class Synced(Call):
    """One batch norm of which each process of ``group`` computes the rows ``mine`` of the batch."""

    mine: Any = None
    group: Any = None

    def __call__(self) -> torch.Tensor:
        return Together.apply(self, self.x, self.weight, self.bias)


def synced(rank: int, group: Any, sizes: list[int], shape: tuple[int, ...], **options: Any) -> Synced:
    ends = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    whole = call((sum(sizes), *shape), DEVICE, **options)
    same = {field.name: getattr(whole, field.name) for field in fields(whole)}
    return Synced(**same, mine=slice(*ends[rank]), group=group)


def compare_with_one_process(rank: int) -> None:
    pair = dist.new_group([0, 1])
    cases: list[tuple[list[int], tuple[int, ...], dict]] = [
        ([3, 1, 2], (5, 4, 5), {}),
        ([3, 1, 2], (20, 6, 7), {"layout": "channels_last", "dtype": torch.float16}),
        ([1, 3, 2], (3, 4, 5), {"layout": "strided", "dtype": torch.bfloat16, "parameters": torch.bfloat16}),
        ([2, 0, 1], (3, 4, 5), {"layout": "channels_last"}),  # an empty batch
        ([0, 1, 1], (130,), {"offset": 1000.0}),  # one value to a channel is enough where there are others
        ([19, 2, 20], (3, 4, 5), {}),  # several splits
        ([2, 2], (3, 11), {"momentum": 1.0, "offset": 1000.0}),
        ([1, 4], (64, 10, 10), {"layout": "channels_last"}),
    ]
    modes = [contextlib.nullcontext, lambda: force_mode(Mode.REFERENCE)][: 2 if DEVICE.type == "cpu" else 1]
    for (seed, (sizes, shape, options)), mode in itertools.product(enumerate(cases), modes):
        if rank >= len(sizes):
            continue
        with mode():
            group = pair if len(sizes) == 2 else dist.group.WORLD
            torch.manual_seed(seed)  # the same in every process
            one = synced(rank, group, sizes, shape, **options)
            check(one)
            if seed == 0:
                one.weight = one.mean = one.var = None
                check(one)
    compare_layers(rank)
    compare_models(rank)


def compare_layers(rank: int) -> None:
    """Counters, momentum, what is not tracked, and batches that are empty everywhere."""
    torch.manual_seed(0)
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False, "momentum": 0.3}):
        ours = gpukern.nn.SyncBatchNorm(3, **options).to(DEVICE)
        theirs = nn.BatchNorm2d(3, **options).double()
        for _ in range(3):
            x = torch.randn(6, 3, 2, 2)
            y, expected = ours(x[2 * rank : 2 * rank + 2].to(DEVICE)), theirs(x.double())
            torch.testing.assert_close(y.cpu().double(), expected[2 * rank : 2 * rank + 2], rtol=1e-5, atol=1e-5)
        leaf = x[:2].to(DEVICE).requires_grad_()
        (gradient,) = torch.autograd.grad(copy.deepcopy(ours)(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()
        for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            torch.testing.assert_close(a.cpu().to(b.dtype), b, rtol=1e-5, atol=1e-6, msg=name)
        before = copy.deepcopy(ours.state_dict())
        empty = torch.empty(0, 3, 2, 2, device=DEVICE, requires_grad=True)
        ours(empty).sum().backward()
        assert empty.grad is not None and empty.grad.shape == empty.shape
        for name, value in ours.state_dict().items():
            assert torch.equal(value, before[name] + (name == "num_batches_tracked"))
        ours.eval()
        if ours.running_mean is not None and rank == 0:  # in evaluation nobody waits for the others
            torch.testing.assert_close(
                ours(x.to(DEVICE)).cpu().double(), theirs.eval()(x.double()), rtol=1e-4, atol=1e-4
            )


def compare_models(rank: int) -> None:
    """Under DistributedDataParallel, and converted with a group."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    exact, x = copy.deepcopy(model).double(), torch.randn(9, 3)
    exact(x.double()).square().sum().backward()
    ours = gpukern.convert(model).to(DEVICE)
    parallel = DistributedDataParallel(ours)
    # Only now: on a CPU DistributedDataParallel refuses models with a SyncBatchNorm. The parameters are the same ones.
    gpukern.nn.SyncBatchNorm.convert_sync_batchnorm(parallel)
    assert type(ours[1]) is gpukern.nn.SyncBatchNorm
    sizes = (4, 2, 3)
    start = sum(sizes[:rank])
    parallel(x[start : start + sizes[rank]].to(DEVICE)).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
        # DDP takes the mean of what the processes' sums are parts of.
        torch.testing.assert_close(3 * a.grad.cpu().double(), b.grad, rtol=1e-4, atol=1e-4, msg=name)
    given = nn.SyncBatchNorm(2, process_group=dist.group.WORLD)
    converted = gpukern.convert(given)
    assert type(converted) is gpukern.nn.SyncBatchNorm and converted.process_group is given.process_group


@pytest.mark.slow
def test_processes_compute_what_one_does_with_the_whole_batch():
    in_processes(3, compare_with_one_process)


# ---- in one process ------------------------------------------------------------------------------------------------


def test_messages_are_merged_as_if_the_values_were_one_batch(where):
    parts = [torch.randn(n, 150, 3) + offset for n, offset in ((2, 0.0), (0, 0.0), (1, 1e4), (5, -3.0))]
    whole = torch.cat(parts).double()
    running = torch.zeros(150, device=where), torch.ones(150, device=where)
    implementation = implementations.of(torch.empty(0, device=where))
    messages = torch.stack([implementation.local_statistics(part.to(where)) for part in parts])
    mean, variance, count = implementation.merged_statistics(messages, Running(*running, 0.25))
    assert count.tolist() == [24.0]
    exact_variance, exact_mean = torch.var_mean(whole, (0, 2), correction=0)
    # A few roundings a part, of the mean's size and of the variance's.
    slack = 24 * FP32_EPS
    assert_within("mean", mean, exact_mean, slack * (exact_mean.abs() + exact_variance.sqrt()))
    assert_within("variance", variance, exact_variance, slack * exact_variance)
    wanted = 0.75 + 0.25 * exact_variance * 24 / 23
    assert_within("running", running[1], wanted, slack * wanted + rounding_bound(wanted, torch.float32, 3))


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_batch_norm(training, where):
    ours, theirs = gpukern.nn.SyncBatchNorm(3).to(where), nn.BatchNorm2d(3).to(where)
    x = torch.randn(2, 3, 4, 5, device=where)
    for layer in (ours, theirs):
        layer.train(training)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_errors_are_torchs():
    for layer in (gpukern.nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
        for shape, error in (((3,), ValueError), ((1, 3), ValueError), ((2, 0), ValueError), ((2, 4), RuntimeError)):
            with pytest.raises(error):
                layer(torch.ones(shape))


def test_torchs_converter_and_ours():
    for kind in (nn.BatchNorm1d, nn.BatchNorm3d, gpukern.nn.BatchNorm2d, nn.SyncBatchNorm):
        model = nn.Sequential(nn.Sequential(kind(3, momentum=None, affine=False)), nn.ReLU()).eval()
        converted = gpukern.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert converted is model and type(model[0][0]) is gpukern.nn.SyncBatchNorm
        assert repr(converted) == repr(theirs) and list(converted.state_dict()) == list(theirs.state_dict())
        assert not converted[0][0].training and type(gpukern.convert(theirs)[0][0]) is gpukern.nn.SyncBatchNorm
    norm = nn.BatchNorm2d(3)
    converted = gpukern.nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    assert type(norm) is nn.BatchNorm2d and converted.weight is norm.weight
    with pytest.raises(TypeError, match="activation"):
        gpukern.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(gpukern.nn.BatchNormAct2d(3)))
