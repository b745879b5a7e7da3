from __future__ import annotations

import builtins

import pytest
import torch
from torch import nn

from gpukern.diagnose import (
    DiagnoseError,
    MissingPackage,
    confusion,
    misclassified,
    plot_filters,
    plot_training,
    saliency,
)
from gpukern.diagnose.curves import trailing_mean

PNG = b"\x89PNG"


def test_saliency_is_the_largest_derivative_over_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 5)).double()
    images, labels = torch.randn(2, 3, 5, 5).double(), torch.tensor([3, 0])
    found = saliency(model, images, labels)
    model.eval()
    # Every pixel of every image, changed alone.
    steps = 1e-6 * torch.eye(75).double().view(75, 3, 5, 5)
    with torch.no_grad():
        scores = [
            [model(image + sign * steps)[:, label] for sign in (1, -1)]
            for image, label in zip(images, labels, strict=True)
        ]
    exact = torch.stack([(up - down) / 2e-6 for up, down in scores]).view(2, 3, 5, 5)
    torch.testing.assert_close(found.maps, exact.abs().amax(1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.scores, model(images)[[0, 1], labels].detach())


def test_saliency_leaves_the_model_as_it_was_and_takes_the_largest_logit():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    images = torch.randn(5, 2, 2)
    found = saliency(model, images)
    assert model.training and model[1].training and model[1].num_batches_tracked == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(found.labels, model.eval()(images).argmax(1)) and found.maps.shape == (5, 2, 2)
    assert not images.requires_grad


def test_saliency_of_a_model_that_works_on_its_input_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3))
    images = torch.randn(5, 2, 2)
    kept = images.clone()
    maps = saliency(model, images).maps
    assert torch.equal(images, kept) and torch.equal(maps != 0, kept > 0)


@pytest.mark.parametrize(
    ("images", "labels", "error", "said"),
    [
        (torch.zeros(2, 3), None, ValueError, r"\[N, C, H, W\] or \[N, H, W\]"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), None, TypeError, "floating-point images"),
        (torch.zeros(2, 2, 2), torch.tensor([0, 3]), ValueError, "0 to 2"),
        (torch.zeros(2, 2, 2), torch.tensor([0.0, 1]), ValueError, "whole numbers"),
        ([1], None, TypeError, "one tensor"),
    ],
)
def test_saliency_of_what_does_not_fit_is_refused(images, labels, error, said):
    with pytest.raises(error, match=said):
        saliency(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images, labels)


def test_saliency_needs_logits():
    with pytest.raises(DiagnoseError, match=r"needs logits \[N, C\] of the model, got \[2, 1, 3, 3\]"):
        saliency(nn.Conv2d(1, 1, 1), torch.zeros(2, 1, 3, 3))


def test_logits_that_are_nan_are_no_predictions():
    logits, labels = torch.full((2, 3), torch.nan), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="logits are NaN"):
        confusion(logits, labels)
    with pytest.raises(ValueError, match="logits are NaN"):
        misclassified(torch.rand(2, 1, 4, 4), logits, labels)


def test_confusion_counts_every_pair():
    labels, taken = torch.randint(0, 4, (200,)), torch.randint(0, 4, (200,))
    found = confusion(taken, labels, "abcd")
    for truth in range(4):
        for said in range(4):
            expected = sum(1 for t, p in zip(labels.tolist(), taken.tolist(), strict=True) if (t, p) == (truth, said))
            assert found.counts[truth][said] == expected
    assert found.accuracy == (labels == taken).double().mean().item()
    assert [pair[2] for pair in found.worst] == sorted((pair[2] for pair in found.worst), reverse=True)
    assert "accuracy" in str(found) and "a (" in str(found)


def test_confusion_takes_logits_of_pixels_and_leaves_ignored_ones_out():
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0] = -100
    found = confusion(logits, labels)
    assert sum(map(sum, found.counts)) == 20 and len(found.names) == 3
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels)[1].double().mean().item())


@pytest.mark.parametrize(
    ("predictions", "labels", "names", "said"),
    [
        (torch.zeros(3), torch.zeros(3), "", "expected logits"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "", "0 to 1"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 1]), "abc", "2 classes, and 3 names"),
        (torch.zeros(2, 2), torch.tensor([-1, -1]), "", "no sample"),
    ],
)
def test_confusion_of_what_does_not_fit_is_refused(predictions, labels, names, said):
    with pytest.raises(ValueError, match=said):
        confusion(predictions, labels, names)


def test_misclassified_are_sorted_by_how_sure_the_model_was():
    logits = torch.tensor([[9.0, 0, 0], [0, 1, 0], [0, 5, 0], [0, 0, 2]])
    labels = torch.tensor([1, 1, 0, 0])
    images = torch.arange(4.0)[:, None, None].expand(4, 2, 2)
    found = misclassified(images, logits, labels, ["cat", "dog", "owl"])
    assert found.places == (0, 2, 3) and found.predictions == (0, 1, 2) and found.labels == (1, 0, 0)
    assert found.images[:, 0, 0].tolist() == [0, 2, 3]
    assert found.probabilities == pytest.approx(logits.double().softmax(1).amax(1)[[0, 2, 3]].tolist())
    assert "3 of 4 are misclassified" in str(found) and "owl" in str(found)


def test_misclassified_of_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected logits \[N, C\] and labels \[N\] for 2 images"):
        misclassified(torch.zeros(2, 3, 3), torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


def test_trailing_mean_is_over_the_last_samples():
    assert trailing_mean([5.0, 3, 1, 7, 2], [1] * 5, window=2) == pytest.approx([5, 4, 2, 4, 4.5])


@pytest.mark.parametrize(
    ("losses", "rest", "said"),
    [
        ([1.0, 2, 3], {"validation_losses": [1.0, 2]}, "3 losses are no whole number"),
        ([1.0, 2], {"validation_losses": [1.0, 2], "accuracies": [0.1]}, "expected 2 accuracies"),
    ],
)
def test_losses_of_no_whole_epochs_are_refused(losses, rest, said):
    with pytest.raises(ValueError, match=said):
        plot_training(losses, **rest)


def test_curves_of_steps_and_epochs_are_drawn(tmp_path):
    figure = plot_training([4.0, 3, 2, 1, 1, 1], [3, 1, 2], accuracies=[0, 0.5, 1], path=tmp_path / "a.png", title="t")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert lines["training"] == [3.5, 1.5, 1] and lines["validation"] == [3, 1, 2]
    assert figure.axes[0].get_title() == "validation: the loss is least after epoch 2"
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_all_pictures_are_written(tmp_path):
    names = ["zero", "one", "two"]
    logits, labels = torch.randn(9, 3), torch.randint(0, 3, (9,))
    images = torch.rand(9, 3, 4, 4)
    confusion(logits, labels, names).plot(tmp_path / "confusion.png")
    misclassified(images, logits, labels, names).plot(tmp_path / "wrong.png")
    misclassified(images, logits, logits.argmax(1)).plot(tmp_path / "none_wrong.png")
    saliency(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), images).plot(tmp_path / "saliency.png", names=names)
    plot_filters(nn.Sequential(nn.Conv2d(3, 70, 5)), path=tmp_path / "colours.png")
    plot_filters(torch.randn(7, 2, 3, 3, requires_grad=True), path=tmp_path / "filters.png")
    assert len(list(tmp_path.iterdir())) == 6, "and no drafts"
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_model_without_filters_is_refused():
    with pytest.raises(DiagnoseError, match="no two-dimensional convolution"):
        plot_filters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[K, C, R, S\], got \[2, 2\]"):
        plot_filters(torch.zeros(2, 2))


def test_missing_matplotlib_is_told_with_what_installs_it(monkeypatch):
    def without(name, *rest, **named):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return original(name, *rest, **named)

    original = builtins.__import__
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingPackage, match=r"matplotlib is not installed.*pip install 'gpukern\[train\]'"):
        plot_training([1.0])
