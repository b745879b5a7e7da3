"""Results are laid out as torch's are: of images of one channel, one pixel or one image, and of slices, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from torch._subclasses import FakeTensorMode

import gpukern.functional as F

pytestmark = pytest.mark.usefixtures("full_fp32")

LAST = torch.channels_last

#: Of [N, C, H, W].
IMAGES: dict[str, Callable[[], torch.Tensor]] = {
    "grey": lambda: torch.randn(2, 1, 6, 6).to(memory_format=LAST),
    "grey, NCHW": lambda: torch.randn(2, 1, 6, 6),
    "one grey image": lambda: torch.randn(1, 1, 6, 6).to(memory_format=LAST),
    "a grey column": lambda: torch.randn(2, 1, 6, 1).to(memory_format=LAST),
    "one pixel": lambda: torch.randn(2, 4, 1, 1).to(memory_format=LAST),
    "one pixel, NCHW": lambda: torch.randn(2, 4, 1, 1),
    "one number": lambda: torch.randn(3, 1, 1, 1),
    "a channel of several": lambda: torch.randn(2, 4, 6, 6).to(memory_format=LAST)[:, 1:2],
    "channels of several": lambda: torch.randn(2, 5, 6, 6).to(memory_format=LAST)[:, :3],
    "every second row": lambda: torch.randn(2, 3, 12, 6).to(memory_format=LAST)[:, :, ::2],
    "a crop, NCHW": lambda: torch.randn(2, 3, 8, 8)[:, :, 1:7, :6],
    "colours": lambda: torch.randn(2, 3, 6, 6).to(memory_format=LAST),
    "rows and channels swapped": lambda: torch.randn(1, 6, 1, 4).transpose(1, 3),
}


def _conv(functions: Any, outputs: int, weight_last: bool = False, depthwise: bool = False) -> Callable:
    def call(x: torch.Tensor, **options: Any) -> torch.Tensor:
        C = x.shape[1]
        weight = torch.full((C if depthwise else outputs, 1 if depthwise else C, 3, 3), 0.25)
        weight = weight.to(memory_format=LAST) if weight_last else weight
        weight = torch.empty_like(weight, device=x.device, dtype=x.dtype).copy_(weight)
        return functions.conv2d(x, weight, padding=1, groups=C if depthwise else 1, **options)

    return call


def _transposed(functions: Any, outputs: int) -> Callable:
    def call(x: torch.Tensor) -> torch.Tensor:
        weight = torch.full((x.shape[1], outputs, 2, 2), 0.25, device=x.device, dtype=x.dtype)
        return functions.conv_transpose2d(x, weight, stride=2)

    return call


def _norm(functions: Any, training: bool) -> Callable:
    def call(x: torch.Tensor) -> torch.Tensor:
        numbers = [torch.full((x.shape[1],), value, device=x.device, dtype=x.dtype) for value in (0.5, 2.0)]
        return functions.batch_norm(x, *numbers, training=training)

    return call


CALLS: dict[str, Callable[[Any], Callable]] = {
    "conv2d": lambda f: _conv(f, 4),
    "conv2d to one channel": lambda f: _conv(f, 1),
    "conv2d, channels_last weight": lambda f: _conv(f, 2, weight_last=True),
    "depthwise, channels_last weight": lambda f: _conv(f, 0, weight_last=True, depthwise=True),
    "conv_transpose2d": lambda f: _transposed(f, 3),
    "conv_transpose2d to one channel": lambda f: _transposed(f, 1),
    "max_pool2d": lambda f: lambda x: f.max_pool2d(x, 2, ceil_mode=True),
    "max_pool2d, indices": lambda f: lambda x: f.max_pool2d(x, 2, ceil_mode=True, return_indices=True)[1],
    "avg_pool2d": lambda f: lambda x: f.avg_pool2d(x, 2, ceil_mode=True),
    "adaptive_avg_pool2d": lambda f: lambda x: f.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool2d to 1": lambda f: lambda x: f.adaptive_avg_pool2d(x, 1),
    "batch_norm": lambda f: _norm(f, False),
    "batch_norm, training": lambda f: _norm(f, True),
    "softmax": lambda f: lambda x: f.softmax(x, 1),
    "log_softmax along rows": lambda f: lambda x: f.log_softmax(x, 3),
    "group_norm": lambda f: lambda x: f.group_norm(x, 1),
    "relu": lambda f: f.relu,
    "gelu": lambda f: f.gelu,
    "relu6": lambda f: f.relu6,
    "hardswish": lambda f: f.hardswish,
}


@pytest.mark.parametrize("name", CALLS)
def test_strides_are_torchs(name, where):
    ours, theirs = CALLS[name](F), CALLS[name](T)
    for words, image in IMAGES.items():
        x = image()
        # Strides that clone() would change.
        moved = x.to(where)
        expected = theirs(x)
        found = ours(moved)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert found.stride() == expected.stride(), words
        with FakeTensorMode() as mode:
            assert ours(mode.from_tensor(moved)).stride() == expected.stride(), f"{words}, as a tracer sees it"


@pytest.mark.parametrize("name", [n for n in CALLS if "indices" not in n and n != "adaptive_avg_pool2d to 1"])
def test_gradients_are_laid_out_as_what_they_are_of(name, where):
    ours, theirs = CALLS[name](F), CALLS[name](T)
    for words in ("grey", "grey, NCHW", "a grey column", "one pixel", "colours"):
        x = IMAGES[words]()
        grads = []
        for function, given in ((theirs, x.detach()), (ours, x.to(where).detach())):
            leaf = given.requires_grad_()
            y = function(leaf)
            grads.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0].cpu())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
        both = all(each.is_contiguous() for each in grads)
        assert both or grads[1].stride() == grads[0].stride(), words


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "relu", "relu6", "gelu", "hardswish"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_empty_image_is_laid_out_as_torchs(name, sizes, where):
    ours, theirs = CALLS[name](F), CALLS[name](T)
    for x in (torch.randn(sizes), torch.empty(sizes, memory_format=LAST)):
        expected = theirs(x).stride()
        assert ours(x.to(where)).stride() == expected
        with FakeTensorMode() as mode:
            assert ours(mode.from_tensor(x.to(where))).stride() == expected, "as a tracer sees it"


def test_unbatched_images_and_epilogues(where):
    last = torch.randn(2, 3, 6, 6).to(memory_format=LAST)
    grey = torch.randn(1, 6, 6)
    assert F.conv2d(grey.to(where), torch.ones(2, 1, 3, 3, device=where)).stride() == (16, 4, 1)
    ours, theirs = _conv(F, 1), _conv(T, 1)
    y = theirs(last)
    assert ours(last.to(where), activation="gelu").stride() == ours(last.to(where), residual=y.to(where)).stride()
    assert ours(last.to(where), activation="gelu").stride() == y.stride() == (36, 1, 6, 1)
    fused = torch.ops.gpukern.conv2d_max_pool2d(
        last.to(where), torch.ones(1, 3, 1, 1, device=where), None, [1, 1], [0] * 4, [1, 1], 1, "none", 0.0
    )
    assert fused.stride() == (9, 1, 3, 1)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("sizes", ((1, 3), (3, 1), (1, 1)))
def test_strides_of_one_element_in_a_grouped_filter_mean_nothing(sizes, transposed):
    x = torch.randn(2, 16, 5, 7).to(memory_format=LAST).requires_grad_()
    weight = torch.randn(16, 8, *sizes).to(memory_format=LAST)
    pairs = zip(weight.shape, weight.stride(), strict=True)
    strides = [weight.numel() if size == 1 else stride for size, stride in pairs]
    odd = weight.as_strided(weight.shape, strides)
    results = []
    for functions, image, filters in ((F, x, odd), (T, x.double(), weight.double())):
        function = functions.conv_transpose2d if transposed else functions.conv2d
        y = function(image, filters, groups=2)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y, grad))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-4)
