"""Cross entropy of logits x [N, C, …] with class indices or class probabilities, differentiable to any order.

With p = softmax(x), the label or the probabilities t of a row, weights w (else 1) and the smoothing s:

    q[c] = (1 − s) · w[c] · [c = label] + s / C · w[c]             loss = − Σ_c q[c] · log p[c], of an ignored row 0
    q[c] = w[c] · ((1 − s) · t[c] + s / C)                         of probabilities
    ∂loss/∂x[c] = p[c] · Σ q − q[c]                                ∂loss/∂t[c] = − (1 − s) · w[c] · log p[c]

The mean divides by Σ w[label] over the labels that are not ignored, with probabilities by the number of rows.

*The gradient of the logits is computed in the forward pass* if the loss is reduced: a row is in registers then, so that
forward and backward together read the logits once and write their gradient once; two passes would read them twice, a
half more. The backward hands that tensor over, scaled in place by ∂L/∂loss: one launch, which reads and writes nothing
where that is 1, as of a loss by itself; no copy of it is kept. A second backward of a retained graph, and gradients to
be differentiated again, come from the logits once more. There are two passes, too, where ∂L/∂loss is a number for each
row (scaling would be another pass), for float16 (a loss scale has to come before the rounding), under compilers and in
reference mode. Liger-Kernel does the same, over the logits themselves: https://github.com/linkedin/Liger-Kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._cross_entropy import reference
from gpukern.ops._cross_entropy.problem import NONE, Options
from gpukern.runtime.mode import Implementations, Mode, mode_of
from gpukern.runtime.operator import Operator, backward_of, needs_operator, resolved, wants_gradient
from gpukern.runtime.transforms import total as sum_of

_implementations = Implementations("gpukern.ops._cross_entropy")

_aten = torch.ops.aten
_OPTIONS = "str reduction, int ignore_index, float smoothing"


def apply(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Options, dtype: torch.dtype
) -> torch.Tensor:
    """The loss in ``dtype``. Shapes were checked; ``target`` is of integers or, of the shape of ``input``, floating.

    IndexError on a CPU for a label that is no class; elsewhere its row's loss and gradient are NaN.
    """
    if input.dim() == 1:
        rows = target.unsqueeze(0) if target.is_floating_point() else target.reshape(1)
        return apply(input.unsqueeze(0), rows, weight, options, dtype).view(())
    if weight is not None and weight.requires_grad and target.is_floating_point():
        # The gradient of the weights is that of these, summed over rows.
        classes = input.shape[1]
        target = target * (1 - options.smoothing) + options.smoothing / max(classes, 1)
        target = target * weight.view(-1, *(1,) * (input.dim() - 2))
        return apply(input, target, None, options._replace(smoothing=0.0), dtype)
    if _differentiates_at_once(input, target, weight, options):
        return cross_entropy(input, target, weight, *options, dtype, [])[0]
    return cross_entropy(input, target, weight, *options, dtype)[0]


def _differentiates_at_once(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> bool:
    """Whether forward computes the gradient of the logits."""
    return (
        options.reduction != NONE
        and input.dtype is not torch.float16
        and wants_gradient(input)
        and not target.requires_grad
        and not needs_operator((input, target, weight))
        and mode_of(input) is not Mode.REFERENCE
    )


def _check_classes(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError, as torch does on a CPU, for a label that is no class: a GPU would have to be waited for."""
    if target.device.type != "cpu" or target.is_floating_point() or not target.numel():
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


def _cross_entropy(
    input, target, weight, reduction, ignore_index, smoothing, dtype, gradient: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    # ``gradient`` is for eager calls only: the schema does not have it.
    _check_classes(target, input.shape[1], ignore_index)
    options = Options(reduction, ignore_index, smoothing)
    return _implementations.of(input).cross_entropy(input, target, weight, options, dtype, gradient)


def _cross_entropy_fake(
    input, target, weight, reduction, ignore_index, smoothing, dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (input.shape[0], *input.shape[2:]) if reduction == NONE else ()
    total = input.new_empty((), dtype=torch.promote_types(input.dtype, torch.float32))
    return input.new_empty(shape, dtype=dtype), total


def _cross_entropy_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    input, target, weight, *options, _ = arguments[:7]
    ctx.options = tuple(options)
    ctx.gradient = arguments[7] if len(arguments) > 7 else []
    ctx.save_for_backward(input, target, weight, outputs[1])
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)


def _cross_entropy_backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple:
    nothing = (None,) * 5
    if grad is None:
        return None, None, *nothing
    if ctx.gradient and not torch.is_grad_enabled() and _has_memory(grad):
        # Handed over, not kept: whoever gets it may change it.
        gradient = ctx.gradient.pop()
        return _implementations.of(gradient).scaled_(gradient, resolved(grad)), None, *nothing
    wants = ctx.needs_input_grad[:2]
    found = cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, *wants)
    return *(each if wanted else None for each, wanted in zip(found, wants, strict=True)), *nothing


def _has_memory(grad: torch.Tensor) -> bool:
    """Whether a kernel can read ``grad``: no tracer's, and not several that are mapped over."""
    try:
        grad.data_ptr()
    except RuntimeError:
        return False
    return not needs_operator((grad,))


def _cross_entropy_jvp(operator: Operator, arguments: tuple, tangents: tuple, outputs: tuple) -> tuple:
    input, target, weight, *options, _ = arguments
    loss, total = outputs
    if tangents[2] is not None and not target.is_floating_point():
        raise RuntimeError("cross_entropy is not differentiable with respect to the weights of class indices")
    wants = tuple(tangent is not None for tangent in tangents[:2])
    gradients = cross_entropy_backward(torch.ones_like(loss), input, target, weight, total, *options, *wants)
    products = [
        None if tangent is None else (gradient.to(loss.dtype) * tangent.to(loss.dtype)).sum(1)
        for gradient, tangent in zip(gradients, tangents, strict=False)
    ]
    of_rows = sum_of(*products)
    of_logits_and_target = of_rows if of_rows is None or options[0] == NONE else of_rows.sum()
    # With probabilities the loss is linear in the weights.
    of_weight = None if tangents[2] is None else operator(input, target, tangents[2], *arguments[3:])[0]
    return sum_of(of_logits_and_target, of_weight), None


def _in_torch(input, target, weight, reduction, ignore_index, smoothing, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(reduction, ignore_index, smoothing)
    kind = torch.nn._reduction.get_enum(reduction)
    of_labels = ignore_index if not target.is_floating_point() else -100
    loss = _aten.cross_entropy_loss.default(input.to(dtype), target, weight, kind, of_labels, smoothing)
    return loss, reference.divisor(input, target, weight, options)


#: The loss, and Σ weight[label] over the labels that are not ignored, which has no gradient.
cross_entropy = Operator(
    "cross_entropy",
    f"(Tensor input, Tensor target, Tensor? weight, {_OPTIONS}, ScalarType dtype) -> (Tensor, Tensor)",
    forward=_cross_entropy,
    fake=_cross_entropy_fake,
    save=_cross_entropy_save,
    backward=_cross_entropy_backward,
    jvp=_cross_entropy_jvp,
    decomposition=_in_torch,
)


def _gradients(grad, input, target, weight, total, *others) -> tuple[torch.Tensor, torch.Tensor]:
    *options, wants_input, wants_target = others
    compute = _implementations.of(grad).cross_entropy_backward
    return compute(grad, input, target, weight, total, Options(*options), wants_input, wants_target)


def _gradients_fake(grad, input, target, weight, total, *others) -> tuple[torch.Tensor, torch.Tensor]:
    wants = zip(others[-2:], (input, target), strict=True)
    first, second = (torch.empty_like(tensor) if wanted else tensor.new_empty(0) for wanted, tensor in wants)
    return first, second


def _gradients_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:5])
    ctx.state = arguments[5:]
    ctx.set_materialize_grads(False)


def _gradients_plainly(grad, input, target, weight, total, *others) -> tuple[torch.Tensor, torch.Tensor]:
    *options, wants_input, wants_target = others
    return reference.gradients(grad, input, target, weight, total, Options(*options), wants_input, wants_target)


#: ∂L/∂input and ∂L/∂target, each empty unless wanted, from ∂L/∂loss and what the forward divided by.
cross_entropy_backward = Operator(
    "cross_entropy_backward",
    f"(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor total, {_OPTIONS}, bool wants_input, "
    "bool wants_target) -> (Tensor, Tensor)",
    forward=_gradients,
    fake=_gradients_fake,
    save=_gradients_save,
    backward=backward_of(_gradients_plainly, 3),
    plain=_gradients_plainly,
)
