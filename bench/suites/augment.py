"""The input pipeline of data sets: normalized crops of uint8 images, beside PyTorch's indexing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.accuracy import DTYPES, sum_bound
from bench.peers import torch_peers
from bench.results import Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from gpukern.ops._augment.problem import Side, centre_side, random_side
from gpukern.ops._augment.reference import Windows, take, windows
from gpukern.ops.augment import augment
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.roofline import Work

TRAINING, EVALUATION = "training", "evaluation"
#: What is random, of every sample of every case.
_SEED, _STEP, _FLIP = 1, 2, 0.5


@dataclass(frozen=True)
class Pipeline:
    """``samples`` crops of ``size`` from square images of ``image`` pixels a side."""

    samples: int
    image: int
    channels: int
    size: int
    padding: int
    cutout: int

    def side(self, computation: str) -> Side:
        if computation == EVALUATION:
            return centre_side(self.image, self.size, "constant")
        return random_side(self.image, self.size, self.padding, "constant")


#: Image, channels, crop, padding and cutout, as these data sets are usually trained on.
_DATA = {"cifar10": (32, 3, 32, 4, 8), "mnist": (28, 1, 28, 2, 0), "imagenet": (256, 3, 224, 0, 0)}


class Augmentation(Suite[Pipeline]):
    name = "augment"
    title = "Input pipeline"
    computations = (TRAINING, EVALUATION)
    dtypes = ("float16", "bfloat16", "float32")
    layouts = ("",)
    networks = tuple(_DATA)
    batches = (512,)

    def networks_called(self, word: str) -> list[str]:
        if word.lower() == "all":
            return list(_DATA)
        if word.lower() not in _DATA:
            raise ValueError(f"{word}: expected one of {', '.join(_DATA)}, all")
        return [word.lower()]

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, Pipeline]]:
        yield Use(network, "", 1), Pipeline(batch, *_DATA[network])

    def describe(self, problem: Pipeline) -> tuple[str, dict[str, Any]]:
        p = problem
        words = f"{p.samples}×{p.image}×{p.image}×{p.channels} → {p.size}×{p.size}"
        words += f", padding {p.padding}" * (p.padding > 0) + f", cutout {p.cutout}" * (p.cutout > 0)
        return words, dict(vars(problem))

    def work(self, task: Task[Pipeline]) -> Work:
        """Bytes of the images that crops lie on, on average, read once; results written once."""
        p, side = task.problem, task.problem.side(task.case.computation)
        starts = range(side.first, side.first + side.choices)
        seen = sum(min(start + p.size, p.image) - max(start, 0) for start in starts) / side.choices
        written = p.size**2 * DTYPES[task.case.dtype].itemsize
        return Work(0.0, p.samples * p.channels * (seen**2 + written), task.case.dtype)

    def bound(self, task: Task[Pipeline]) -> float:
        return sum_bound(task.case.dtype, 1)

    def tensors(self, task: Task[Pipeline], device: torch.device) -> Tensors:
        """A data set of as many images as samples, their order, mean and scale."""
        p = task.problem
        images = torch.randint(256, (p.samples, p.image, p.image, p.channels), dtype=torch.uint8, device=device)
        mean = 100 + 50 * torch.rand(p.channels, device=device)
        return images, torch.randperm(p.samples, device=device), mean, 0.01 + torch.rand(p.channels, device=device) / 50

    def reference(self, task: Task[Pipeline], tensors: Tensors) -> torch.Tensor:
        with force_mode(Mode.REFERENCE):
            return _gpukern(task, torch.float64, *tensors)

    def implementations(self, task: Task[Pipeline], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        dtype = DTYPES[task.case.dtype]
        ours = Implementation("gpukern", in_mode("", device), lambda *given: _gpukern(task, dtype, *given))

        def with_windows(tensors: Tensors) -> Tensors:
            """PyTorch's gather gets its indices before the clock runs."""
            images, index, mean, scale = tensors
            seen = windows(images, index, *_numbers(task), _FLIP, task.problem.cutout)
            return images, index, seen, mean, scale

        def indexed(images, index, seen: Windows, mean, scale) -> torch.Tensor:
            return take(images, index, seen, mean, scale, 0.0, dtype)

        peers = [peer for peer in peers if peer in ("library", "compile", "max-autotune")]
        return [ours, *torch_peers(indexed, "ATen", "", peers, device, with_windows)]


def _numbers(task: Task[Pipeline]) -> tuple[int, int, bool, list[int], list[int], str]:
    p = task.problem
    random = task.case.computation == TRAINING
    return _SEED, _STEP, random, [p.size] * 2, [p.padding] * 2, "constant"


def _gpukern(task: Task[Pipeline], dtype: torch.dtype, images, index, mean, scale) -> torch.Tensor:
    return augment(images, index, None, mean, scale, *_numbers(task), 0.0, _FLIP, task.problem.cutout, dtype)


register(Augmentation())
