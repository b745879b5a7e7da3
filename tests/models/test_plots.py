from __future__ import annotations

import numpy as np
import pytest
import torch

from models.plots import batch_sizes, plot_convergence, plot_curves, plot_filters, trailing_mean


def test_trailing_mean_is_over_the_last_samples():
    losses = [5.0, 3, 1, 7, 2]
    assert trailing_mean(losses, [1] * 5, window=2) == pytest.approx([5, 4, 2, 4, 4.5])
    assert trailing_mean(losses, [10] * 5, window=20) == pytest.approx([5, 4, 2, 4, 4.5])
    assert trailing_mean(losses, [10] * 5, window=1000) == pytest.approx([5, 4, 3, 4, 3.6])


def test_trailing_mean_weighs_batches_by_their_size():
    assert trailing_mean([1.0, 4], [30, 10], window=40)[-1] == pytest.approx((30 + 40) / 40)


def test_trailing_mean_of_batches_larger_than_the_window():
    assert trailing_mean([5.0, 3, 1], [50] * 3, window=20) == pytest.approx([5, 3, 1])


@pytest.mark.parametrize(("batch", "sizes"), [(4, [4, 4, 2, 4, 4]), (5, [5] * 5), (10, [10] * 5), (1, [1] * 5)])
def test_last_batch_of_an_epoch_is_what_is_left(batch, sizes):
    assert batch_sizes(5, training_size=10, batch_size=batch).tolist() == sizes


@pytest.mark.parametrize(("losses", "accuracies"), [([], []), ([2.0], []), ([2.0, 0.0, 1e-9, 3, 4], [0.5, 1.0])])
def test_pictures_are_written(tmp_path, losses, accuracies):
    plot_convergence(tmp_path / "new" / "loss.png", losses, accuracies, training_size=8, batch_size=4, title="t")
    plot_filters(tmp_path / "new" / "filters.png", torch.randn(7, 3, 5, 5, requires_grad=True))
    parts = ("train_loss", "held_out_loss", "train_accuracy", "held_out_accuracy")
    history = [{"epoch": number, **dict.fromkeys(parts, accuracy)} for number, accuracy in enumerate(accuracies)]
    plot_curves(tmp_path / "new" / "curves.png", history, "t")
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_averaged_curve_is_smoother():
    noisy = np.abs(np.random.RandomState(0).randn(500)) + 1
    assert trailing_mean(noisy, [10] * 500).std() < 0.2 * noisy.std()
