"""Batch norm called in every way, and its values and gradients checked against torch in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as T

import gpukern.functional as F
from tests.numerics import FP32_EPS, assert_within, rounding_bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")
# (shape, what it is a case of); with the emulated device's plan.
SHAPES = {
    "vectors": (9, 7),
    "two vectors, many channels": (2, 130),
    "sequences": (3, 5, 11),
    "odd": (2, 3, 7, 5),
    "one channel": (4, 1, 3, 3),
    "one pixel": (6, 40, 1, 1),
    "two values": (1, 3, 1, 2),
    "40 channels": (3, 40, 6, 9),
    "several splits": (19, 3, 4, 5),
    "several splits, 64 channels": (3, 64, 10, 10),
    "three dimensions of pixels": (2, 3, 2, 3, 4),
}
SLOPE = 0.1


def make(shape, layout: str, dtype: torch.dtype, device, offset: float = 0.0) -> torch.Tensor:
    """Random [N, C, ...] in a layout; all but 4-D ones are contiguous or strided."""

    def random(*sizes):
        return (torch.randn(sizes) + offset).to(dtype).to(device)

    if layout == "channels_last" and len(shape) == 4:
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return random(*reversed(shape), 2)[..., 1].permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return random(*shape[:-1], 1).expand(shape) if len(shape) > 2 else random(1, 1).expand(shape)
    return random(*shape)


def activate(z: torch.Tensor, name: str | None) -> torch.Tensor:
    if name == "leaky_relu":
        return T.leaky_relu(z, SLOPE)
    if name == "gelu_tanh":
        return T.gelu(z, approximate="tanh")
    return z if name is None else getattr(T, name)(z)


@dataclass
class Call:
    """One batch norm, its operands leaves of a graph."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    training: bool = True
    momentum: float = 0.3
    eps: float = 1e-3
    activation: str | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None and t.requires_grad]

    def __call__(self) -> torch.Tensor:
        return F.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, self.training, self.momentum, self.eps,
            residual=self.residual, activation=self.activation, negative_slope=SLOPE,
        )  # fmt: skip

    def exact(self) -> Call:
        """The same operands in float64 on the CPU."""

        def double(t):
            return None if t is None else t.detach().cpu().double().clone().requires_grad_(t.requires_grad)

        tensors = {name: double(getattr(self, name)) for name in ("x", "weight", "bias", "residual", "mean", "var")}
        return Call(**tensors, training=self.training, momentum=self.momentum, eps=self.eps, activation=self.activation)

    def torchs(self) -> torch.Tensor:
        z = T.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, self.training, self.momentum, self.eps
        )  # fmt: skip
        return activate(z if self.residual is None else z + self.residual, self.activation)


def call(
    shape, device, *, layout="contiguous", dtype=torch.float32, parameters=torch.float32, residual=False, offset=0.0,
    **options,
) -> Call:  # fmt: skip
    C = shape[1]

    def numbers(low, high):
        return (low + (high - low) * torch.rand(C)).to(parameters).to(device)

    return Call(
        make(shape, layout, dtype, device, offset).requires_grad_(),
        (numbers(0.5, 1.5) * (-1) ** torch.arange(C, device=device)).to(parameters).requires_grad_(),
        numbers(-1, 1).requires_grad_(),
        make(shape, layout, dtype, device).requires_grad_() if residual else None,
        numbers(offset - 1, offset + 1),
        numbers(0.5, 2),
        **options,
    )


def check(actual: Call, grad_layout: str = "contiguous") -> torch.Tensor:
    """Output, running statistics and gradients of ``actual`` against torch in float64. Returns the output.

    With ``n`` values to a channel, the batch's statistics and every sum over a channel are random walks of fp32
    roundings: 6 ε √n of what is summed (see tests/numerics.py). The mean errs by a few ε of its own size, which counts
    in units of σ. A few more roundings, 16 ε, are made on the way to one element. What an activation makes of an error
    is at most 1.5 times as large (hardswish); gradients go through ∂L/∂z, or y, rounded to the input's dtype, and act″
    is at most 1.
    """
    exact = actual.exact()
    pixels = (0, *range(2, actual.x.dim()))
    n = actual.x.numel() // actual.x.shape[1]
    old = exact.mean, exact.var
    if exact.mean is not None:
        exact.mean, exact.var = (t.clone() for t in old)
    output, expected = actual(), exact.torchs()
    layout = actual.x.is_contiguous(memory_format=torch.channels_last) and not actual.x.is_contiguous()
    assert output.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)
    assert output.dtype is actual.x.dtype

    def channels(t):
        return t.view(1, -1, *(1,) * (actual.x.dim() - 2))

    x = exact.x.detach()
    var, mean = torch.var_mean(x, pixels, correction=0) if actual.training else (old[1], old[0])
    inverse = channels((var + actual.eps).rsqrt())
    normal = (x - channels(mean)) * inverse
    weight = 1 if exact.weight is None else channels(exact.weight.detach()).abs()
    slack = FP32_EPS * (16 + 6 * n**0.5 + 4 * channels(mean).abs() * inverse)
    size = weight * (normal.abs() + 1)
    size = size + (0 if exact.bias is None else channels(exact.bias.detach()).abs())
    size = size + (0 if exact.residual is None else exact.residual.detach().abs())
    assert_within("output", output, expected, 1.5 * slack * size + rounding_bound(expected, output.dtype))
    if exact.mean is not None and actual.training:
        new = torch.var(x, pixels, correction=1)
        for name, sizes in (("mean", mean.abs() + new.sqrt()), ("var", new)):
            running, wanted = getattr(actual, name), getattr(exact, name)
            bound = slack.view(-1) * (sizes + old[name == "var"].abs()) + rounding_bound(wanted, running.dtype)
            assert_within(f"running {name}", running, wanted, bound)

    grad = make(output.shape, grad_layout, output.dtype, output.device)
    results = torch.autograd.grad(output, actual.leaves, grad, retain_graph=True)
    exact_grad = grad.cpu().double()
    wanted = torch.autograd.grad(expected, exact.leaves, exact_grad, retain_graph=True)
    slack = 1.5 * slack * (size + 1) + 2 * torch.finfo(output.dtype).eps
    g = 1.5 * exact_grad.abs()
    bounds = {"x": slack * g, "weight": (slack * g * (normal.abs() + 1)).sum(pixels), "bias": (slack * g).sum(pixels)}
    bounds["residual"] = bounds["x"]
    mean_g, mean_gx = (t.mean(pixels, keepdim=True) for t in (slack * g, slack * g * (normal.abs() + 1)))
    bounds["x"] = weight * inverse * (slack * g + mean_g + (normal.abs() + 1) * mean_gx)
    names = [name for name, t in vars(actual).items() if isinstance(t, torch.Tensor) and t.requires_grad]
    for name, result, reference in zip(names, results, wanted, strict=True):
        assert result.dtype is getattr(actual, name).dtype
        bound = bounds[name] + rounding_bound(reference, result.dtype)
        assert_within(f"gradient of {name}", result, reference, bound)
    return output
