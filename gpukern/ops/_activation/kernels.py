"""Element-wise kernels over dense memory: every tensor here is one run of ``size`` elements in the same order."""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, activation_curvature, apply_activation


@triton.jit
def activation_kernel(x_ptr, y_ptr, size, negative_slope, NAME: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """y = act(x)."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < size
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = apply_activation(x, NAME, negative_slope)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_grad_kernel(
    grad_ptr, saved_ptr, out_ptr, size, negative_slope, NAME: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """∂L/∂x = ∂L/∂y · act′, from the saved input or output of the activation."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < size
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    saved = tl.load(saved_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = activation_backward(grad, saved, NAME, negative_slope)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_grad_grad_kernel(
    grad_ptr, grad_grad_ptr, saved_ptr, out_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """grad · grad_grad · ∂act′/∂saved, for the activations that are not piecewise linear."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < size
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad_grad = tl.load(grad_grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    saved = tl.load(saved_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = grad * grad_grad * activation_curvature(saved, NAME)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)
