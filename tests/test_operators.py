"""``torch.library.opcheck`` of every operator that gpukern registers: schema, autograd, fake tensors, AOT autograd."""

from __future__ import annotations

import pytest
import torch

import gpukern  # noqa: F401  registers the operators
from gpukern.ops._activation.properties import PROPERTIES

ACTIVATIONS = tuple(PROPERTIES)

# stride, padding (top, bottom, left, right), dilation, groups
CONV = ([2, 1], [1, 1, 0, 2], [1, 2], 1)
GROUPED = ([1, 1], [0, 0, 0, 0], [1, 1], 2)
# kernel, stride, padding, dilation, ceil_mode
POOL = ([3, 2], [2, 1], [1, 0], [1, 1], True)
# stride, padding (front, back, top, bottom, left, right), dilation, groups
CONV3D = ([1, 1, 1], [1, 0, 1, 1, 0, 0], [1, 1, 1], 1)
# output_size, kernel, stride, padding, dilation, ceil_mode
POOL3D = ([], [2, 3, 2], [2, 1, 2], [0, 1, 0], [1, 1, 1], True)
ADAPTIVE = ([3, 2, 1], [], [], [], [], False)
DILATED = ([2, 2], [1, 1], [0, 0], [2, 1], False)


class Samples:
    """Arguments for each operator, by name: ``Samples(device).conv2d()`` and so on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def image(self, *shape: int, grad: bool = True, last: bool = False) -> torch.Tensor:
        tensor = torch.randn(shape, device=self.device)
        if last:
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            tensor = tensor.contiguous(memory_format=layout)
        return tensor.requires_grad_(grad)

    def taps(self, input: torch.Tensor, geometry: tuple) -> torch.Tensor:
        return torch.ops.gpukern.max_pool2d_with_taps(input.detach(), *geometry)[1]

    def activation(self):
        return [(self.image(2, 3), name, 0.1) for name in ACTIVATIONS]

    def activation_grad(self):
        return [(self.image(2, 3), self.image(2, 3), name, 0.1) for name in ACTIVATIONS]

    def activation_grad_grad(self):
        return [(*(self.image(2, 3, grad=False) for _ in range(3)), name) for name in ACTIVATIONS]

    def conv1d(self):
        x, w, b = self.image(2, 2, 7), self.image(4, 2, 3), self.image(4)
        last = self.image(2, 7, 2, grad=False).transpose(1, 2)
        sequences = ([2], [1, 0], [2], 1)
        return [
            (x, w, b, None, *sequences, "none", 0.0),
            (x, w, b, self.image(2, 4, 2), *sequences, "silu", 0.0),
            (last, self.image(4, 3, 2, grad=False).transpose(1, 2), b, None, *sequences, "none", 0.0),
            (last.requires_grad_(), self.image(2, 1, 3), None, None, [1], [2, 0], [1], 2, "tanh", 0.0),
        ]

    def conv_transpose1d(self):
        x, w, b = self.image(2, 2, 5), self.image(2, 4, 3), self.image(4)
        sequences = ([2], [1], [1], [1], 1)
        return [
            (x, w, b, None, *sequences, "none", 0.0),
            (x, w, None, self.image(2, 4, 10), *sequences, "relu", 0.0),
            (x, self.image(2, 1, 3), None, None, [1], [0], [0], [2], 2, "none", 0.0),
        ]

    def augment(self):
        images = torch.randint(256, (3, 5, 6, 3), dtype=torch.uint8, device=self.device)
        index, mean, scale = torch.tensor([2, 0], device=self.device), *(self.image(3, grad=False) for _ in range(2))
        crops = [4, 6], [1, 1], "reflect", 0.0, 0.5, 2, torch.float16
        return [
            (images, index, index + 7, mean, scale, -5, 7, True, *crops),
            (images.transpose(1, 2), None, None, self.image(6, 5, 3, grad=False), scale, 0, 0, False, *crops),
        ]

    def dropout(self):
        state = torch.tensor([-3, 2**40], device=self.device)
        x, last = self.image(2, 3, 4, 5), self.image(2, 3, 4, 5, last=True)
        return [
            (x, None, None, 0.3, 0, -5, 7, []),
            (last, self.image(2, 3, 4, 5), state, 0.3, 0, 0, 0, [0, 2, 3, 1]),
            (last, None, state, 0.5, 2, 0, 0, [0, 2, 3, 1]),
            (x, None, None, 1.0, 0, 0, 0, []),
        ]

    def conv2d(self):
        x, w, b = self.image(2, 2, 6, 7), self.image(4, 2, 3, 2), self.image(4)
        return [
            (x, w, b, None, *CONV, "none", 0.0),
            (x, w, None, self.image(2, 4, 3, 7), *CONV, "tanh", 0.0),
            (self.image(2, 2, 6, 7, last=True), self.image(4, 1, 3, 3), b, None, *GROUPED, "leaky_relu", 0.2),
            (x.detach(), w, b.detach(), None, *CONV, "relu", 0.0),
            # Its derivative needs what went into the activation.
            (x, w, b, self.image(2, 4, 3, 7), *CONV, "silu", 0.0),
        ]

    def conv2d_statistics(self):
        x, w = self.image(2, 2, 6, 7, grad=False), self.image(4, 2, 3, 2, grad=False)
        return [(x, w, None, *CONV), (x, w, self.image(4, grad=False), *CONV)]

    def conv2d_max_pool2d(self):
        x, w, b = self.image(2, 2, 6, 7), self.image(4, 2, 3, 2), self.image(4)
        return [
            (x, w, b, *CONV, "silu", 0.0),
            (x, w, None, *CONV, "tanh", 0.0),
            (self.image(2, 2, 6, 7, last=True), self.image(4, 1, 3, 3), b, *GROUPED, "leaky_relu", 0.2),
            (x.detach(), w.detach(), None, *CONV, "none", 0.0),
        ]

    def conv2d_input_grad(self):
        grad, w = self.image(2, 4, 3, 7), self.image(4, 2, 3, 2)
        return [(grad, w, [2, 2, 6, 7], last, *CONV) for last in (False, True)] + [
            (self.image(2, 4, 4, 5), self.image(4, 1, 3, 3, last=True), [2, 2, 6, 7], False, *GROUPED)
        ]

    def conv2d_weight_grad(self):
        grad, x = self.image(2, 4, 3, 7), self.image(2, 2, 6, 7)
        return [(grad, x, [4, 2, 3, 2], last, *CONV) for last in (False, True)] + [
            (self.image(2, 4, 4, 5), self.image(2, 2, 6, 7, last=True), [4, 1, 3, 3], False, *GROUPED)
        ]

    def conv_transpose2d(self):
        # stride, padding, output_padding, dilation, groups
        geometry = [2, 1], [1, 0], [1, 0], [1, 2], 2
        x, w, b = self.image(2, 4, 3, 5), self.image(4, 1, 3, 2), self.image(2)
        last = self.image(2, 4, 3, 5, last=True)
        return [
            (x, w, b, None, *geometry, "none", 0.0),
            (last, w, None, self.image(2, 2, 6, 7), *geometry, "tanh", 0.0),
            (x, w, b, self.image(2, 2, 6, 7), *geometry, "gelu", 0.0),
        ]

    def activation_grad_sum(self):
        y = self.image(2, 3, 4, 5, grad=False)
        last = self.image(2, 3, 4, 5, grad=False, last=True)
        return [(y, self.image(2, 3, 4, 5, grad=False), "tanh", 0.0), (y, last, "leaky_relu", 0.1)]

    def channel_sum(self):
        return [(self.image(2, 3, 4, 5),), (self.image(2, 3, 4, 5, last=True),)]

    def linear(self):
        x, w, b = self.image(3, 5), self.image(4, 5), self.image(4)
        return [(x, w, b, "none", 0.0), (x, w, None, "sigmoid", 0.0), (x, w.detach(), b, "gelu", 0.0)]

    def linear_weight_grad(self):
        return [(self.image(3, 4), self.image(3, 5))]

    def max_pool2d(self):
        return [(self.image(2, 3, 7, 6), *POOL), (self.image(2, 3, 7, 6, last=True), *DILATED)]

    max_pool2d_with_taps = max_pool2d

    def max_pool2d_indices(self):
        return [(self.taps(x, geometry), list(x.shape), *geometry) for x, *geometry in self.max_pool2d()]

    def max_pool2d_backward(self):
        samples = []
        for x, *geometry in self.max_pool2d():
            taps = self.taps(x, geometry)
            samples += [(self.image(*taps.shape), taps, list(x.shape), last, *geometry) for last in (False, True)]
        return samples

    def max_pool2d_gather(self):
        return [(self.image(*x.shape), self.taps(x, geometry), *geometry) for x, *geometry in self.max_pool2d()]

    def avg_pool2d(self):
        x = self.image(2, 3, 7, 6)
        return [
            (x, *POOL, True, None),
            (x, *POOL, False, None),
            (self.image(2, 3, 7, 6, last=True), *POOL, True, 7),
        ]

    def avg_pool2d_backward(self):
        return [(self.image(2, 3, 4, 5), [2, 3, 7, 6], last, *POOL, False, None) for last in (False, True)]

    def adaptive_avg_pool2d(self):
        return [(self.image(2, 3, 7, 6), [3, 4]), (self.image(2, 3, 7, 6, last=True), [1, 1])]

    # In int8: torch's check of schemas multiplies what it is given, which float8_e4m3fn cannot.
    def adaptive_avg_pool2d_quantized(self):
        x, last = self.image(2, 3, 7, 6, grad=False), self.image(2, 3, 7, 6, grad=False, last=True)
        return [
            ((9 * x).to(torch.int8), 0.1, [3, 4], 0.2, torch.int8),
            ((9 * last).to(torch.int8), 0.1, [1, 1], 1.0, torch.float16),
        ]

    def avg_pool2d_quantized(self):
        x, last = self.image(2, 3, 7, 6, grad=False), self.image(2, 3, 7, 6, grad=False, last=True)
        geometry = ([3, 2], [2, 1], [1, 0], True)
        return [
            ((9 * last).to(torch.int8), 0.1, *geometry, False, None, 0.2, torch.int8),
            ((9 * x).to(torch.int8), 0.1, *geometry, True, 7, 1.0, torch.float32),
        ]

    def adaptive_avg_pool2d_backward(self):
        return [(self.image(2, 3, 3, 4), [2, 3, 7, 6], last, [3, 4]) for last in (False, True)]

    def batch_norm(self):
        x, w, b, residual = self.image(2, 3, 4, 5), self.image(3), self.image(3), self.image(2, 3, 4, 5)
        mean, var = self.image(3, grad=False), self.image(3, grad=False).abs()
        return [
            (x, w, b, None, mean, var, 1e-5, "none", 0.0),
            (self.image(2, 3, 4, 5, last=True), w, None, residual, mean, var, 1e-5, "silu", 0.0),
            (self.image(4, 3), None, b, self.image(4, 3), mean, var, 1e-5, "tanh", 0.0),
        ]

    def batch_norm_training(self):
        return [(*sample[:4], *sample[6:]) for sample in self.batch_norm()]

    def batch_norm_backward(self):
        return [
            (torch.randn_like(x), x, w, b, other, mean, var, training, *epilogue, True, True, True)
            for x, w, b, other, mean, var, *epilogue in self.batch_norm()
            for training in (False, True)
        ]

    def layer_norm(self):
        x, w, b = self.image(2, 3, 4, 5), self.image(4, 5), self.image(4, 5)
        permuted = self.image(2, 5, 3, 4).detach().permute(0, 2, 3, 1).requires_grad_()
        half = self.image(2, 3, 5, grad=False).half().requires_grad_()
        return [
            (x, w, b, None, [4, 5], 1e-5, "none", 0.0, None),
            (permuted, self.image(5), None, self.image(2, 3, 4, 5), [5], 1e-5, "silu", 0.0, None),
            (x, None, b, self.image(2, 3, 4, 5), [4, 5], 1e-5, "tanh", 0.0, None),
            (half, self.image(5), self.image(5), None, [5], 1e-5, "relu", 0.0, torch.float32),
        ]

    def rms_norm(self):
        return [(*sample[:2], *sample[3:]) for sample in self.layer_norm()]

    def layer_norm_backward(self):
        return [
            (torch.randn_like(x), x, w, b, other, shape, eps, centered, *epilogue, True, True, True)
            for x, w, b, other, shape, eps, *epilogue, dtype in self.layer_norm()
            for centered in (True, False)
            if dtype is None
        ]

    def group_norm(self):
        x, w, b = self.image(2, 4, 3, 5), self.image(4), self.image(4)
        last = self.image(2, 4, 3, 5, last=True)
        return [
            (x, w, b, None, 2, 1e-5, "none", 0.0),
            (last, w, None, self.image(2, 4, 3, 5), 4, 1e-5, "silu", 0.0),
            (self.image(3, 4), None, b, self.image(3, 4), 1, 1e-5, "tanh", 0.0),
        ]

    def group_norm_backward(self):
        statistics, wants = (self.image(3, 4, grad=False), self.image(3, 4, grad=False).abs()), (True, True, True)
        return [
            (torch.randn_like(x), x, w, b, other, *(s[: len(x), :groups] for s in statistics), groups, *rest, *wants)
            for x, w, b, other, groups, *rest in self.group_norm()
        ]

    def conv2d_batch_norm(self):
        x, w, scale, shift = self.image(2, 2, 6, 7), self.image(4, 2, 3, 2), self.image(4), self.image(4)
        return [
            (x, w, None, scale, shift, None, *CONV, 1e-5, "none", 0.0),
            (x, w, self.image(4), scale, None, self.image(2, 4, 3, 7), *CONV, 1e-5, "gelu", 0.0),
        ]

    def softmax(self):
        return [
            (self.image(3, 5), 1, False, torch.float32),
            (self.image(2, 3, 4, 5, last=True), 2, True, torch.float32),
        ]

    def conv3d(self):
        x, last, w, b = (
            self.image(1, 2, 3, 4, 5),
            self.image(1, 2, 3, 4, 5, last=True),
            self.image(4, 2, 2, 3, 2),
            self.image(4),
        )
        return [
            (x, w, b, None, *CONV3D, "none", 0.0),
            (last, w, None, self.image(1, 4, 3, 4, 4), *CONV3D, "tanh", 0.0),
        ]

    def conv3d_input_grad(self):
        grad, w = self.image(1, 4, 3, 4, 4), self.image(4, 2, 2, 3, 2)
        return [(grad, w, [1, 2, 3, 4, 5], last, *CONV3D) for last in (False, True)]

    def conv3d_weight_grad(self):
        return [(self.image(1, 4, 3, 4, 4), self.image(1, 2, 3, 4, 5, last=True), [4, 2, 2, 3, 2], False, *CONV3D)]

    def conv_transpose3d(self):
        geometry = [2, 1, 2], [1, 0, 0], [1, 0, 1], [1, 1, 1], 2
        x, w, b = self.image(1, 4, 2, 3, 2), self.image(4, 1, 3, 2, 2), self.image(2)
        return [
            (x, w, b, None, *geometry, "none", 0.0),
            (x, w, None, self.image(1, 2, 4, 4, 5), *geometry, "gelu", 0.0),
        ]

    def max_pool3d(self):
        return [
            (self.image(1, 2, 4, 3, 4, last=last), *geometry) for last, geometry in ((True, POOL3D), (False, ADAPTIVE))
        ]

    max_pool3d_with_taps = max_pool3d

    def taps3d(self, input: torch.Tensor, geometry: tuple) -> torch.Tensor:
        return torch.ops.gpukern.max_pool3d_with_taps(input.detach(), *geometry)[1]

    def max_pool3d_indices(self):
        return [(self.taps3d(x, geometry), list(x.shape), *geometry) for x, *geometry in self.max_pool3d()]

    def max_pool3d_backward(self):
        samples = [(x, self.taps3d(x, geometry), geometry) for x, *geometry in self.max_pool3d()]
        return [(self.image(*taps.shape), taps, list(x.shape), True, *geometry) for x, taps, geometry in samples]

    def max_pool3d_gather(self):
        return [(self.image(*x.shape), self.taps3d(x, geometry), *geometry) for x, *geometry in self.max_pool3d()]

    def avg_pool3d(self):
        return [(x, *geometry, False, None) for x, *geometry in self.max_pool3d()]

    def avg_pool3d_backward(self):
        return [
            (self.image(1, 2, 2, 3, 2), [1, 2, 4, 3, 4], True, *POOL3D, False, 3),
            (self.image(1, 2, 3, 2, 1), [1, 2, 4, 3, 4], False, *ADAPTIVE, False, None),
        ]

    def whole(self, *shape: int, last: bool = False) -> torch.Tensor:
        tensor = torch.randint(-128, 128, shape, device=self.device, dtype=torch.int8)
        return tensor.contiguous(memory_format=torch.channels_last) if last else tensor

    def conv2d_quantized(self):
        x, w, scale, bias = (
            self.whole(2, 2, 6, 7),
            self.whole(4, 2, 3, 2),
            self.image(4, grad=False),
            self.image(4, grad=False),
        )
        small, half = torch.float8_e4m3fn, self.image(2, 2, 6, 7, grad=False).half()
        last, grouped = self.whole(2, 2, 6, 7, last=True), self.image(4, 1, 3, 3, grad=False).half()
        return [
            (x, w, scale, bias, self.whole(2, 4, 3, 7), *CONV, "relu", 0.0, 0.1, 2.0, torch.int8, False),
            (last, grouped, None, None, None, *GROUPED, "leaky_relu", 0.1, 1.0, 1.0, torch.float16, False),
            (x, w, scale, None, None, *CONV, "none", 0.0, 1.0, 0.5, small, True),
            (half, w.half(), None, scale, half.new_ones(2, 4, 3, 7), *CONV, "none", 0.0, 1.0, 1.0, small, False),
        ]

    def conv_transpose2d_quantized(self):
        geometry = [2, 1], [1, 0], [1, 0], [1, 2], 2
        x, w, residual = self.whole(2, 4, 3, 5, last=True), self.whole(4, 1, 3, 2), self.whole(2, 2, 6, 7)
        scale = self.image(2, grad=False)
        return [
            (x, w, scale, scale, residual, *geometry, "relu6", 0.0, 0.2, 0.5, torch.int8),
            (x, w.half(), None, None, None, *geometry, "none", 0.0, 1.0, 1.0, torch.bfloat16),
        ]

    def linear_quantized(self):
        x, w, scale = self.whole(3, 5), self.whole(4, 5), self.image(4, grad=False)
        return [
            (x, w, scale, scale, "relu", 0.0, 0.5, torch.int8),
            (x, w.half(), None, None, "none", 0.0, 1.0, torch.float16),
        ]

    def quantize(self):
        x = self.image(2, 3, 4, 5, grad=False, last=True)
        return [(x, 0.1, torch.int8), (x[:, :, ::2].half(), 0.1, torch.float8_e4m3fn)]

    def dequantize(self):
        return [(self.whole(2, 3, 4, 5, last=True), 0.1, torch.float16), (self.whole(7), 0.1, torch.float32)]

    def softmax_backward(self):
        return [(self.image(*x.shape), self.image(*x.shape), *others) for x, *others in self.softmax()]

    def labels(self, *shape: int) -> torch.Tensor:
        return torch.randint(3, shape, device=self.device)

    def cross_entropy(self):
        x, weight = self.image(4, 3), self.image(3, grad=False).abs()
        return [
            (x, self.labels(4), weight, "mean", 1, 0.1, torch.float32),
            (self.image(2, 3, 4, 5, last=True), self.labels(2, 4, 5), None, "none", -100, 0.0, torch.float32),
            (x, self.image(4, 3), weight, "mean", -100, 0.1, torch.float32),
        ]

    def cross_entropy_backward(self):
        samples = []
        for x, target, weight, *options, dtype in self.cross_entropy():
            loss, total = torch.ops.gpukern.cross_entropy(x.detach(), target.detach(), weight, *options, dtype)
            wants = True, target.is_floating_point()
            samples.append((self.image(*loss.shape), x, target, weight, total, *options, *wants))
        return samples


def registered() -> list[str]:
    """The operators of gpukern's namespace, as PyTorch's dispatcher knows them."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(operator.partition(".")[0] for namespace, _, operator in names if namespace == "gpukern")


def test_every_operator_has_samples():
    assert registered() == sorted(
        name for name in vars(Samples) if name not in ("image", "labels", "taps", "taps3d", "whole") and name[0] != "_"
    )


@pytest.mark.parametrize("name", registered())
def test_opcheck(name, where):
    operator = getattr(torch.ops.gpukern, name).default
    for arguments in getattr(Samples(where), name)():
        torch.library.opcheck(operator, arguments)
