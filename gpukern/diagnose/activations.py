"""Statistics of activations and gradients, layer by layer. See :func:`activation_statistics`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpukern.diagnose.activation_report import ActivationReport
from gpukern.diagnose.activation_values import LayerStatistics
from gpukern.diagnose.calling import buffers_kept, call, floating, python_module, random_state_kept
from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.watching import Watched, Watcher


def activation_statistics(
    model: torch.nn.Module,
    inputs: Any,
    loss: Callable[..., torch.Tensor] | None = None,
    *,
    targets: Any = None,
    training: bool | None = None,
    seed: int | None = None,
) -> ActivationReport:
    """Run ``model`` once, and with a ``loss`` backward too, and describe the output of every layer and its gradient.

    Of each innermost layer's output x, and of ∂loss/∂x: mean, √(Σ(x − mean)²/n), the share of zeros, a histogram. Of
    activations that are bounded the share *saturated*: within 1 % of the way between the bounds, where the slope is
    nearly 0. Of ReLUs the share of *dead* units: channels or features that are zero for every sample and position, and
    so get no gradient. Functions such as ``F.relu`` that a forward calls by itself have rows too.

    Parameters
    ----------
    model:
        any module. It is left as it was: buffers, mode, gradients, hooks. So are the random states.
    inputs:
        a tensor, a tuple or list of the arguments, or a dict of arguments by name; a batch, of any dtypes.
    loss:
        of the model's output, and of ``targets`` if given: ``loss(output, targets)``. Gradients are not computed
        without; a loss that is not a scalar is summed.
    training:
        the mode of the model, its own by default.
    seed:
        of dropout and other random numbers.

    Returns
    -------
    An :class:`~gpukern.diagnose.activation_report.ActivationReport`: ``layers``, ``findings`` in words, ``plot``,
    ``to_json``; it prints as a table.

    Raises
    ------
    TypeError for what is no module, and for TorchScript; DiagnoseError if no layer returns a floating-point tensor,
    or the loss does not depend on the parameters; what the forward raises comes through.
    """
    model = python_module(model, "activation_statistics")
    watcher = Watcher(model)
    with random_state_kept(seed), buffers_kept(model):
        if training is not None:
            model.train(training)
        with watcher.watching(), torch.set_grad_enabled(loss is not None):
            output = call(model, inputs)
            if loss is not None:
                _backward(model, output, loss, targets)
    return _report(watcher)


@contextlib.contextmanager
def watch_activations(model: torch.nn.Module) -> Iterator[Callable[[], ActivationReport]]:
    """Gather the same statistics of all that runs inside: several batches, or steps of a training.

    Yields a function that returns the report so far. Memory does not grow with the number of batches: histograms have
    256 bins, whose limit is doubled when a value is beyond it. ::

        with gpukern.diagnose.watch_activations(model) as statistics:
            for images, labels in loader:
                loss(model(images), labels).backward()
        print(statistics())
    """
    watcher = Watcher(python_module(model, "watch_activations"))
    with watcher.watching():
        yield lambda: _report(watcher)


def _backward(model: torch.nn.Module, output: Any, loss: Callable[..., torch.Tensor], targets: Any) -> None:
    """Compute the gradients of all parameters, for the hooks, and leave ``.grad`` alone."""
    value = loss(output) if targets is None else loss(output, targets)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(value, torch.Tensor) or not value.requires_grad or not parameters:
        raise DiagnoseError("the loss does not depend on any parameter that requires a gradient")
    torch.autograd.grad(value.sum(), parameters, allow_unused=True)


def _report(watcher: Watcher) -> ActivationReport:
    layers = tuple(filter(None, map(_statistics, watcher.layers.values())))
    if not layers:
        raise DiagnoseError("no layer of the model was called, or none returned a floating-point tensor")
    return ActivationReport(type(watcher.model).__name__, layers)


def _statistics(watched: Watched) -> LayerStatistics | None:
    output = watched.output.result()
    if output is None:
        return None
    far = watched.saturated
    weights = floating(getattr(watched.layer, "weight", None))
    weight = weights[0].detach() if weights and weights[0].numel() else None
    return LayerStatistics(
        name=watched.name or "(the model)",
        type=watched.type,
        kind=watched.kind,
        calls=watched.calls,
        output=output,
        gradient=watched.gradient.result(),
        weight_deviation=None if weight is None else float(weight.float().std(correction=0)),
        weight_gradient=watched.weight_gradient.result(),
        saturated=None if far is None or not output.count else far / output.count,
        units=None if watched.alive is None else len(watched.alive),
        dead=None if watched.alive is None else float((~watched.alive).double().mean()),
        observed=watched.observed,
    )
