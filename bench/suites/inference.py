"""Whole networks ready for inference: fused by gpukern in 16 and in 8 bits, folded by hand, or compiled by PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import optimization

import gpukern
from bench.accuracy import DTYPES, network_bound
from bench.layers import layer_calls
from bench.networks import Networks, WholeNetwork, placed, sums, weights
from bench.peers import EIGHT_BITS, compile_for_these_shapes, to_layout
from bench.suite import Implementation, Task, Tensors, in_mode, register
from gpukern.fusion.model import FusedModel
from models.zoo import network

#: Images that decide the statistics of batch norms.
_CALIBRATION = 4
#: What can be beside 8 bits in one network.
_SIXTEEN = ("float16", "bfloat16")
#: The error that networks in 8 bits may have, of random weights: 10 dB, which gpukern.fuse refuses to go below.
_NOISE = 10**-0.5
_META = torch.device("meta")


class Inference(Networks):
    name = "inference"
    title = "Whole network, ready for inference"
    computations = ("forward",)
    layouts = ("channels_last",)
    networks = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
    batches = (1, 32, 128)

    def bound(self, task: Task[WholeNetwork]) -> float:
        return network_bound(task.case.dtype, sums(task.problem.name), training=False)

    def tensors(self, task: Task[WholeNetwork], device: torch.device) -> Tensors:
        images = torch.randn(task.problem.batch, *network(task.problem.name).input_size, device=device)
        return to_layout(task.case.layout, (images.to(DTYPES[task.case.dtype]),))

    def reference(self, task: Task[WholeNetwork], tensors: Tensors) -> torch.Tensor:
        """Return the result of the network before its weights were rounded or folded."""
        (images,) = tensors
        model = placed(trained_alike(task.problem.name), images.device, torch.float64, "NCHW")
        with torch.no_grad():
            return model(images.double().contiguous())

    def implementations(
        self, task: Task[WholeNetwork], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        # Where there is nothing to fold it would be the same once more.
        has_norms = any(isinstance(call.module, nn.BatchNorm2d) for call in layer_calls(task.problem.name, 1))
        folds = (False, True) if has_norms else (False,)
        found = [_gpukern(task, device)]
        if task.case.dtype in _SIXTEEN:
            found += [_gpukern(task, device, format) for format in EIGHT_BITS if format in peers]
        for peer in (each for each in _PEERS if each in peers):
            found += [_peer(task, peer, fold, device) for fold in folds]
        return found


@functools.lru_cache(maxsize=4)
def trained_alike(name: str) -> nn.Module:
    """The network in evaluation mode, with statistics and scales in its batch norms that folding cannot ignore.

    The statistics are those of a few random images.
    """
    model = _with_scales(name).train()
    for norm in _norms(model).values():
        norm.momentum = None  # of these images alone
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model(torch.randn(_CALIBRATION, *network(name).input_size))
    return model.eval()


def _with_scales(name: str) -> nn.Module:
    """Set scales as small as in trained networks: at 1 a deep random network amplifies every rounding error."""
    model = copy.deepcopy(weights(name)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for norm in _norms(model).values():
            nn.init.uniform_(norm.weight, 0.1, 0.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)
    return model


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}


# ---- candidates ----------------------------------------------------------------------------------------------------


def _gpukern(task: Task[WholeNetwork], device: torch.device, format: str = "") -> Implementation:
    """gpukern's network in the task's dtype, or all that can be in the 8 bits of ``format`` and the rest in it."""
    name, dtype = task.problem.name, DTYPES[task.case.dtype]
    fused = functools.cache(lambda where: _fused(name, dtype, format, where))
    words = f', dtype="{format}"' if format else ""
    setting = in_mode(f"{task.case.layout}, gpukern.fuse{words}", device)
    function = _running(lambda where: fused(where).module)
    called, bound = (f"gpukern {format}", _NOISE) if format else ("gpukern", None)
    if device.type != "cuda":
        return Implementation(called, setting, function, bound=bound)
    setting = f"{setting}; from Python cuda_graph=True"
    return Implementation(called, setting, function, from_python=_running(fused), bound=bound)


def _fused(name: str, dtype: torch.dtype, format: str, device: torch.device) -> FusedModel:
    """Fuse without verification: every candidate timed here was checked before."""
    if device.type == "meta":
        return _fused_sizes(name, dtype, format)
    model = copy.deepcopy(trained_alike(name)).to(device)
    example = torch.randn(2, *network(name).input_size, device=device)
    options = _options(dtype, format, example)
    return gpukern.fuse(model, example, cuda_graph=device.type == "cuda", verify=False, **options)


def _options(dtype: torch.dtype, format: str, images: torch.Tensor) -> dict[str, Any]:
    """Options of :func:`gpukern.fuse`: in 8 bits, every group that can be, with the largest numbers of ``images``."""
    if not format:
        return {"dtype": dtype}
    return {"dtype": format, "precision": dtype, "calibrate": [images], "calibration": "max"}


@functools.lru_cache(maxsize=4)
def _fused_sizes(name: str, dtype: torch.dtype, format: str) -> FusedModel:
    """Fuse on the meta device, where only sizes count: statistics are arbitrary, but there are biases to fold."""
    example = torch.randn(2, *network(name).input_size)
    fused = gpukern.fuse(_with_scales(name), example, verify=False, **_options(dtype, format, example[:1]))
    fused.module.to(_META)
    return fused


def _compiled(mode: str | None = None) -> Callable[[nn.Module], Callable]:
    return lambda model: compile_for_these_shapes(model, mode=mode)


#: (name, setting, what makes a function of a network)
_PEERS: dict[str, tuple[str, str, Callable[[nn.Module], Callable]]] = {
    "library": ("PyTorch", "eager, cudnn.benchmark on", lambda model: model),
    "compile": ("torch.compile", "mode default, static shapes", _compiled()),
    "max-autotune": (
        "torch.compile max-autotune",
        "mode max-autotune, static shapes",
        _compiled("max-autotune-no-cudagraphs"),
    ),
}


def _peer(task: Task[WholeNetwork], peer: str, fold: bool, device: torch.device) -> Implementation:
    """The peer on the network or, with ``fold``, on the network without batch norms.

    On a GPU max-autotune is in CUDA graphs: ours if all candidates use one, its own for calls from Python.
    """
    name, setting, transform = _PEERS[peer]
    from_python = None

    @functools.cache
    def model(device: torch.device) -> nn.Module:
        plain = trained_alike(task.problem.name)
        return placed(folded(plain) if fold else plain, device, DTYPES[task.case.dtype], task.case.layout)

    def running(make: Callable[[nn.Module], Callable]) -> Callable[..., torch.Tensor]:
        return _running(lambda device: make(model(device)))

    if peer == "max-autotune" and device.type == "cuda":
        setting = "mode max-autotune-no-cudagraphs, static shapes; from Python max-autotune with its CUDA graphs"
        from_python = running(_compiled("max-autotune"))
    words = f"{task.case.layout}, {setting}" + (", batch norms folded by torch.fx" if fold else "")
    return Implementation(
        f"{name} folded" if fold else name,
        words,
        running(transform),
        from_python=from_python,
        slow=peer != "library",
    )


def folded(model: nn.Module) -> nn.Module:
    """Fold by PyTorch's own tool, in the weights' float32. RuntimeError if it leaves a batch norm."""
    without = optimization.fuse(model)
    if left := _norms(without):
        raise RuntimeError(f"torch.fx did not fold {', '.join(left)}")
    return without


def _running(make: Callable[[torch.device], Callable]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Call ``make`` for a device, for inference, at the first call: a candidate that is not run takes no memory."""
    make = functools.cache(make)

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return make(images.device)(images)

    return run


register(Inference())
