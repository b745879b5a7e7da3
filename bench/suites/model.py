"""Whole networks: inference, and a training step of forward, loss, backward and parameter update."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import gpukern
from bench.accuracy import DTYPES, network_bound
from bench.peers import both_layouts, compile_for_these_shapes, to_layout
from bench.results import Prediction, Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from bench.suites.conv import Convolutions
from bench.suites.linear import Linears
from bench.suites.pool import Pools
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Work
from models.zoo import network

INFERENCE, TRAINING = "inference", "training step"


@dataclass(frozen=True)
class WholeNetwork:
    name: str
    batch: int


class Models(Suite[WholeNetwork]):
    name = "model"
    title = "Whole network"
    computations = (INFERENCE, TRAINING)
    #: A network sweeps through more memory than the cache holds by itself.
    cold = False

    def problems(self, name: str, batch: int) -> Iterator[tuple[Use, WholeNetwork]]:
        yield Use(network(name).name, "", 1), WholeNetwork(network(name).name, batch)

    def describe(self, problem: WholeNetwork) -> tuple[str, dict[str, Any]]:
        found = network(problem.name)
        size = "×".join(map(str, (problem.batch, *found.input_size)))
        return f"{found.title}, {size}", {"network": found.name, "input": [problem.batch, *found.input_size]}

    def work(self, task: Task[WholeNetwork]) -> Work:
        """The sum over convolutions, pools and linear layers, each from memory to memory, as they run one by one."""
        works = [(part.case.uses[0].count, suite.work(part)) for suite, part in _parts(task)]
        return Work(sum(n * w.flops for n, w in works), sum(n * w.bytes for n, w in works), task.case.dtype)

    def bound(self, task: Task[WholeNetwork]) -> float:
        layers = [m for m in _made(task.problem.name).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return network_bound(task.case.dtype, len(layers), task.case.computation == TRAINING)

    def tensors(self, task: Task[WholeNetwork], device: torch.device) -> Tensors:
        """Images, and labels: one for each image, or for each pixel where the network has logits for each."""
        name, batch = task.problem.name, task.problem.batch
        images = torch.randn(batch, *network(name).input_size, device=device)
        classes, *places = _logits_size(name)
        return images, torch.randint(classes, (batch, *places), device=device)

    def reference(self, task: Task[WholeNetwork], tensors: Tensors) -> torch.Tensor:
        """The mathematics of the weights and images as the candidates have them, in 16 bit if they have."""
        images, labels = tensors
        model = copy.deepcopy(_made(task.problem.name)).to(images.device)
        if task.case.computation == INFERENCE:
            dtype = DTYPES[task.case.dtype]
            with torch.no_grad():
                return model.to(dtype).double().eval()(images.to(dtype).double())
        model = model.double().train()
        return self.result(_gradients(model, list(model.parameters()), images.double(), labels))

    def result(self, output: Any) -> torch.Tensor:
        """The logits, or the gradient of the last layer, whose error does not depend on which ReLUs rounding flips.

        NaN if another gradient is not finite, or nothing but zeros.
        """
        if isinstance(output, torch.Tensor):
            return output
        norms = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in output])
        sound = (norms > 0).all() & norms.isfinite().all()
        last = torch.cat([gradient.double().flatten() for gradient in output[-2:]])
        return torch.where(sound, last, torch.nan)

    def implementations(
        self, task: Task[WholeNetwork], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        layout = task.case.layout
        found = [_implementation(task, "gpukern", layout, in_mode("gpukern.convert, eager", device), gpukern.convert)]
        if "library" in peers:
            found += [
                _implementation(task, f"PyTorch {each}", each, "eager, cudnn.benchmark on")
                for each in both_layouts(layout)
            ]
        for peer, mode in (("compile", None), ("max-autotune", "max-autotune-no-cudagraphs")):
            if peer in peers:
                name = "torch.compile" + (" max-autotune" if mode else "")
                compile_it = functools.partial(compile_for_these_shapes, mode=mode)
                found.append(_implementation(task, name, layout, f"mode {mode or 'default'}", compile_it))
        return found

    def predict(self, task: Task[WholeNetwork], device: DeviceSpec) -> Prediction:
        """The sum over what gpukern computes; norms, activations between layers and the loss are not in it."""
        parts = [(part.case.uses[0].count, suite.predict(part, device)) for suite, part in _parts(task)]

        def total(name: str) -> float:
            return sum(count * getattr(prediction, name) for count, prediction in parts)

        memory = sum(count * p.floor_us for count, p in parts if p.bound == "memory")
        return Prediction(
            case=task.case,
            plan=f"{sum(count for count, _ in parts)} calls of convolution, pooling and linear layers",
            launches=total("launches"),
            tiles=total("tiles"),
            waves=total("waves"),
            efficiency=total("flops") / sum(count * p.flops / p.efficiency for count, p in parts),
            flops=total("flops"),
            moved=total("moved"),
            bytes=total("bytes"),
            predicted_us=total("predicted_us"),
            floor_us=total("floor_us"),
            bound="memory" if memory > total("floor_us") / 2 else "compute",
        )


def _parts(task: Task[WholeNetwork]) -> Iterator[tuple[Suite, Task]]:
    """The network's layers as tasks of their own suites."""
    for suite in (Convolutions(), Pools(), Linears()):
        layout = task.case.layout if task.case.layout in suite.layouts else suite.layouts[0]
        for use, problem in suite.problems(task.problem.name, task.problem.batch):
            for computation in suite.steps(problem, training=task.case.computation == TRAINING):
                case = replace(task.case, suite=suite.name, computation=computation, layout=layout, uses=(use,))
                yield suite, Task(case, problem)


@functools.lru_cache(maxsize=1)
def _made(name: str) -> nn.Module:
    """The network with the weights that all candidates have, and the reference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(name).make()


@functools.cache
def _logits_size(name: str) -> tuple[int, ...]:
    """Of one image."""
    found = network(name)
    with torch.device("meta"):
        return tuple(found.make().eval()(torch.empty(1, *found.input_size)).shape[1:])


def _implementation(
    task: Task[WholeNetwork],
    name: str,
    layout: str,
    setting: str,
    transform: Callable[[nn.Module], Callable] = lambda model: model,
) -> Implementation:
    dtype, inference = DTYPES[task.case.dtype], task.case.computation == INFERENCE

    @functools.cache
    def made(device: torch.device) -> Callable[..., Any]:
        # At the first call: a candidate that is not run takes no memory.
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        model = copy.deepcopy(_made(task.problem.name)).to(device, memory_format=memory_format)
        return _inference(model.to(dtype), transform) if inference else _training_step(model, dtype, transform)

    def prepare(tensors: Tensors) -> Tensors:
        images, labels = tensors
        (images,) = to_layout(layout, (images,))
        return (images.to(dtype) if inference else images), labels

    amp = ", autocast" if not inference and dtype is not torch.float32 else ""
    return Implementation(
        name, f"{layout}, {setting}{amp}", lambda images, labels: made(images.device)(images, labels), prepare
    )


def _inference(model: nn.Module, transform: Callable) -> Callable[..., torch.Tensor]:
    run = transform(model.eval())

    def logits(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return run(images)

    return logits


def _training_step(model: nn.Module, dtype: torch.dtype, transform: Callable) -> Callable[..., tuple]:
    model = transform(model.train())
    parameters = list(model.parameters())
    # The update does its full work, but at a rate of zero: every step computes the same, and can be checked.
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=parameters[0].is_cuda)

    def step(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Without the cache: each weight is cast once a step anyhow, and a CUDA graph must not keep what it casts.
        enabled = dtype is not torch.float32
        with torch.autocast(images.device.type, dtype if enabled else None, enabled=enabled, cache_enabled=False):
            gradients = _gradients(model, parameters, images, labels)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return gradients

    return step


def _gradients(model: Callable, parameters: list[nn.Parameter], images: torch.Tensor, labels: torch.Tensor) -> tuple:
    loss = nn.functional.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, parameters)


register(Models())
