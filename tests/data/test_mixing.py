"""Mixed samples and smoothed labels, and the losses that they are for."""

from __future__ import annotations

import pytest
import torch

import gpukern.functional as F
from gpukern.data import mixup, smooth_labels


def test_smoothed_labels_have_the_loss_of_label_smoothing(where):
    logits, labels = torch.randn(6, 5, device=where), torch.tensor([0, 4, 2, 2, 1, 3], device=where)
    for smoothing in (0.0, 0.1, 1.0):
        targets = smooth_labels(labels, 5, smoothing)
        assert targets.shape == (6, 5) and targets.dtype is torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6, device=where))
        torch.testing.assert_close(
            F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=smoothing)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_images_and_targets_are_mixed_alike(dtype, last):
    """Images that hold their own targets: what is mixed of one is mixed of the other, and rows are in [0, 1]."""
    labels = torch.arange(7) % 5
    images = torch.nn.functional.one_hot(labels, 5).to(dtype)[:, :, None, None].expand(7, 5, 3, 4)
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    generator = torch.Generator().manual_seed(1)
    mixed, targets = mixup(images, labels, 1.0, classes=5, generator=generator)
    assert mixed.dtype is dtype and mixed.stride() == images.stride() and targets.dtype is torch.float32
    torch.testing.assert_close(mixed[:, :, 1, 2].float(), targets, rtol=0, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(targets.sum(1), torch.ones(7))
    assert (targets > 0).sum() > 7
    again = mixup(images, labels, 1.0, classes=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], mixed) and torch.equal(again[1], targets)
    soft = torch.rand(7, 5)
    _, probabilities = mixup(images, soft, 1.0, generator=torch.Generator().manual_seed(1))
    _, smoothed = mixup(images, labels, 1.0, classes=5, smoothing=0.5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(smoothed, targets * 0.5 + 0.1)
    assert not torch.equal(probabilities, soft)


def test_shares_have_betas_distribution():
    """Mean 1/2 and variance 1 / (4 (2α + 1)), within six standard deviations of the means of 2,000 batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([[1.0], [0.0]])
    for alpha in (0.2, 4.0):
        mixed = torch.stack([mixup(x, x.expand(2, 2), alpha, generator=generator)[0][0, 0] for _ in range(2000)])
        # Half of the batches pair a sample with itself.
        share = mixed[(mixed != 1) & (mixed != 0)].double()
        variance = 1 / (4 * (2 * alpha + 1))
        if alpha > 1:
            assert abs(share.mean() - 0.5) < 6 * (variance / len(share)) ** 0.5
            assert abs(share.var() - variance) < 6 * variance * (2 / len(share)) ** 0.5
        else:
            assert share.var() > 0.1


def test_gradients_flow_through_mixtures():
    images = torch.randn(4, 3, requires_grad=True)
    mixed, _ = mixup(images, torch.arange(4), classes=4)
    mixed.sum().backward()
    torch.testing.assert_close(images.grad, torch.ones(4, 3))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x, t: mixup(x, t), TypeError, "classes"),
        (lambda x, t: mixup(x, t, 0.0, classes=3), ValueError, "alpha"),
        (lambda x, t: mixup(x.byte(), t, classes=3), NotImplementedError, "floating-point"),
        (lambda x, t: mixup(x, t[1:], classes=3), RuntimeError, "as many targets"),
        (lambda x, t: mixup(x, x, smoothing=0.1), ValueError, "smoothing is for labels"),
        (lambda x, t: smooth_labels(t, 3, 1.5), ValueError, "between 0 and 1"),
        (lambda x, t: smooth_labels(t.int(), 3), RuntimeError, "int64 labels"),
        (lambda x, t: smooth_labels(t, 2), RuntimeError, "smaller than num_classes"),
        (lambda x, t: smooth_labels([0], 2), TypeError, "Tensor"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(3, 3), torch.arange(3))
