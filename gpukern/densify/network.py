"""The dense network: a module that runs the steps read from a patch classifier, with its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gpukern.densify.epilogues import LayerActivation, find, kernels_of
from gpukern.densify.errors import DenseError
from gpukern.densify.report import DenseReport
from gpukern.densify.steps import Call, Convolve, Layer, Step
from gpukern.densify.values import Pair
from gpukern.nn.sequential import ACTIVATIONS, is_plain
from gpukern.runtime.arguments import check_tensors

#: Ways to have a result for the pixels at the border too, whose patches are not all in the image.
BORDERS = ("valid", "reflect", "replicate", "constant")
#: Attributes that a network gets after the model's.
_OWN = ("_output", "_steps")


class DenseNetwork(torch.nn.Module):
    """A patch classifier applied to every patch of an image at once; :func:`gpukern.dense` makes it.

    ``y[n, k, i, j] = model(x[n, :, i:i+h, j:j+w])[k]``: [N, C, H, W], or one image [C, H, W], gives [N, K, H−h+1,
    W−w+1], or [N, K, H, W] with a ``border``. Parameters and buffers are the model's own tensors under the model's own
    names, and so are the names of the layers, which are copies with a training mode of their own. ``to()`` and its kind
    change the parameters of both, and the buffers of the network alone: do that to the model before.

    Attributes
    ----------
    patch_size:
        (h, w).
    border:
        "valid", "reflect", "replicate" or "constant".
    margin:
        ((top, bottom), (left, right)): how far a patch reaches around its pixel, as :func:`gpukern.predict_tiles`
        takes it.
    report:
        a :class:`DenseReport`: what was done with each layer, and the multiply-adds that it saves.

    Raises
    ------
    RuntimeError, when called, for what is no image, smaller than the patch, or too small to be reflected; what torch
    raises for other channels, dtypes and devices than those of the parameters.
    """

    def __init__(
        self, model: torch.nn.Module, steps: Sequence[Step], output: int, patch_size: Pair, border: str
    ) -> None:
        super().__init__()
        self.patch_size, self.border = patch_size, border
        self.report = DenseReport.of(type(model).__name__, steps, patch_size, border)
        self._adopt(model)
        self.training = model.training
        self._output = output
        self._steps = _with_last_uses(_folded(self, steps, output), output)

    def _adopt(self, model: torch.nn.Module) -> None:
        """Have everything that ``model``, a copy for this network alone, has under a name."""
        tensors = [name for name, held in vars(model).items() if isinstance(held, torch.Tensor)]
        for name in (*model._modules, *model._parameters, *model._buffers, *tensors):
            if hasattr(self, name) or name in _OWN:
                raise DenseError(f"{name}: a dense network has another attribute of this name")
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
        for name in tensors:
            setattr(self, name, vars(model)[name])

    @property
    def margin(self) -> tuple[Pair, Pair]:
        height, width = self.patch_size
        return (height // 2, height - 1 - height // 2), (width // 2, width - 1 - width // 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        check_tensors("dense network", input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        kernels, values = kernels_of(self), {0: self._with_border(input)}
        for step in self._steps:
            result = step.operation.run(self, kernels, *(values[slot] for slot in step.inputs))
            for slot in step.last:
                del values[slot]
            values[step.value.slot] = result
        return values[self._output]

    def _with_border(self, input: torch.Tensor) -> torch.Tensor:
        """The image with what its border patches see around it; RuntimeError for one that has no patch."""
        height, width = self.patch_size
        if input.dim() != 4:
            raise RuntimeError(f"expected an image [C, H, W] or images [N, C, H, W], got {list(input.shape)}")
        rows, columns = input.shape[2:]
        if self.border == "valid":
            if rows < height or columns < width:
                raise RuntimeError(f"an image of {rows} × {columns} has no patch of {height} × {width}")
            return input
        vertical, horizontal = self.margin
        least = max(vertical) + 1, max(horizontal) + 1
        if self.border == "reflect" and (rows < least[0] or columns < least[1]):
            raise RuntimeError(
                f"an image of {rows} × {columns} is too small to be reflected for patches of {height} × {width}: "
                f"it takes {least[0]} × {least[1]} at least"
            )
        if rows == 0 or columns == 0:
            raise RuntimeError(f"an image of {rows} × {columns} has no pixels")
        return torch.nn.functional.pad(input, [*horizontal, *vertical], self.border)

    def extra_repr(self) -> str:
        height, width = self.patch_size
        return f"patch_size={height}×{width}, border={self.border!r}"


# ---- steps in the order and form in which they run -------------------------------------------------------------------


def _folded(network: torch.nn.Module, steps: Sequence[Step], output: int) -> list[Step]:
    """``steps`` with activations in the epilogues of the convolutions before them that nobody else reads."""
    readers: dict[int, int] = {output: 1}
    for step in steps:
        for slot in step.inputs:
            readers[slot] = readers.get(slot, 0) + 1
    made: list[Step] = []
    for step in steps:
        before = made[-1] if made else None
        activation = _activation(network, step)
        if (
            activation is not None
            and before is not None
            and isinstance(before.operation, Convolve)
            and before.operation.activation is None
            and step.inputs == (before.value.slot,)
            and readers[before.value.slot] == 1
        ):
            made[-1] = replace(before, operation=replace(before.operation, activation=activation), value=step.value)
        else:
            made.append(step)
    return made


def _activation(network: torch.nn.Module, step: Step):
    """The activation that ``step`` alone computes, in a form that an epilogue takes; None for all others."""
    if isinstance(step.operation, Call):
        return step.operation.activation
    if not isinstance(step.operation, Layer):
        return None
    layer = find(network, step.operation.layer)
    usable = type(layer) in ACTIVATIONS and is_plain(layer) and layer._epilogue is not None
    return LayerActivation(step.operation.layer) if usable else None


def _with_last_uses(steps: Sequence[Step], output: int) -> tuple[Step, ...]:
    """``steps`` that let go of values when nobody reads them any more: an image's may fill a device."""
    seen, made = {output}, []
    for step in reversed(steps):
        last = tuple(dict.fromkeys(slot for slot in step.inputs if slot not in seen))
        seen.update(step.inputs)
        made.append(replace(step, last=last))
    return tuple(reversed(made))
