"""Whole networks: inference, and a training step of forward, loss, backward and parameter update."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import gpukern
from bench.accuracy import DTYPES, network_bound
from bench.networks import Networks, WholeNetwork, placed, sums, weights
from bench.peers import both_layouts, compile_for_these_shapes, to_layout
from bench.suite import Implementation, Task, Tensors, in_mode, register
from gpukern.compiler import backend
from models.zoo import network

INFERENCE, TRAINING = "inference", "training step"


class Models(Networks):
    name = "model"
    title = "Whole network"
    computations = (INFERENCE, TRAINING)

    def trains(self, task: Task[WholeNetwork]) -> bool:
        return task.case.computation == TRAINING

    def bound(self, task: Task[WholeNetwork]) -> float:
        return network_bound(task.case.dtype, sums(task.problem.name), self.trains(task))

    def tensors(self, task: Task[WholeNetwork], device: torch.device) -> Tensors:
        """Images, and labels: one for each image, or for each pixel where the network has logits for each."""
        name, batch = task.problem.name, task.problem.batch
        images = torch.randn(batch, *network(name).input_size, device=device)
        classes, *places = _logits_size(name)
        return images, torch.randint(classes, (batch, *places), device=device)

    def reference(self, task: Task[WholeNetwork], tensors: Tensors) -> torch.Tensor:
        """The mathematics of the weights and images as the candidates have them, in 16 bit if they have."""
        images, labels = tensors
        model = copy.deepcopy(weights(task.problem.name)).to(images.device)
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
        if self.trains(task):
            setting = in_mode('torch.compile(backend="gpukern")', device)
            found.append(_implementation(task, "gpukern compiled", layout, setting, _compiled))
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


def _compiled(model: nn.Module) -> Any:
    # Not by its name, which only an installed package has.
    return torch.compile(model, backend=backend.gpukern, dynamic=False)


@functools.cache
def _logits_size(name: str) -> tuple[int, ...]:
    """Shape of the logits of one image."""
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
        if inference:
            return _inference(placed(weights(task.problem.name), device, dtype, layout), transform)
        model = placed(weights(task.problem.name), device, torch.float32, layout)
        return _training_step(model, dtype, transform)

    def prepare(tensors: Tensors) -> Tensors:
        images, labels = tensors
        (images,) = to_layout(layout, (images,))
        return (images.to(dtype) if inference else images), labels

    amp = ", autocast" if not inference and dtype is not torch.float32 else ""
    return Implementation(
        name,
        f"{layout}, {setting}{amp}",
        lambda images, labels: made(images.device)(images, labels),
        prepare,
        slow="torch.compile" in name,
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
