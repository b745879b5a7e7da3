"""The layer of the input pipeline: what it tells the operator, its state, and what it is beside torchvision."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as T

import gpukern
from gpukern.data import Augment, channel_statistics, mean_image
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, rounding_bound

pytestmark = pytest.mark.usefixtures("poisoned")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(256, (6, 9, 8, 3), dtype=torch.uint8, device=device)


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).double().cpu() / 255


def test_evaluation_normalizes_as_torchvision_does(images, where):
    layer, images = Augment((9, 8), 4, True, 3, MEAN, STD).to(where).eval(), images.to(where)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    reference = (scaled(images) - mean) / std
    y = layer(images)
    # 255 · mean, 1 / (255 · std), the difference and the product are rounded, and the difference can be small.
    bound = rounding_bound(reference.abs() + mean / std, torch.float32, 4)
    assert_within("normalized", y, reference, bound)
    assert y.is_contiguous(memory_format=torch.channels_last) and layer.step == 0
    plain = Augment((9, 8), dtype=torch.float16).to(where).eval()(images)
    assert_within("scaled", plain, scaled(images), rounding_bound(scaled(images), torch.float16))


def test_a_mean_image_is_subtracted_before_the_crop(images, where):
    images, mean = images.to(where), mean_image(images)
    layer = Augment(5, mean=mean, std=0.5).to(where).eval()
    middle = (scaled(images) - mean.cpu().double().permute(2, 0, 1))[:, :, 2:7, 2:7] / 0.5
    assert_within("middle", layer(images), middle, rounding_bound(middle.abs() + 2, torch.float32, 4))


def test_random_crops_are_crops_of_the_padded_image(images, where):
    """All there are at once: each sample is one of them, flipped or not, with the square where nothing else is."""
    images = images.to(where)
    layer = Augment((7, 6), (2, 1), True, padding_mode="reflect", seed=3).to(where)
    y = layer(images).cpu().double()
    padded = T.pad(scaled(images), (1, 1, 2, 2), "reflect")
    windows = padded.unfold(2, 7, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    for sample, of in zip(y, windows, strict=True):
        both = torch.cat((of, of.flip(-1)))
        assert ((both - sample).abs().amax((1, 2, 3)) < 1e-6).any()


def test_state_repeats_what_comes_next(images, where):
    images = images.to(where)
    layer = Augment(8, 2, True, 3, MEAN, STD, seed=11).to(where)
    first = layer(images)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    after = [layer(images) for _ in range(2)]
    assert layer.step == 3 and not torch.equal(first, after[0]) and not torch.equal(*after)
    file.seek(0)
    other = Augment(8, 2, True, 3, (0.0,) * 3, (1.0,) * 3).to(where)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.seed, other.step) == (11, 1)
    assert all(torch.equal(other(images), each) for each in after)
    assert torch.equal(copy.deepcopy(layer)(images), layer(images))
    told = layer(images, step=1)
    assert torch.equal(told, after[0]) and layer.step == 4
    layer.eval()(images)
    assert layer.step == 4


def test_refused_calls_count_no_step(images, where):
    layer = Augment(20).to(where)
    with pytest.raises(ValueError, match="larger than the image"):
        layer(images.to(where))
    assert layer.step == 0


def test_gathering_in_the_layer_or_before_is_the_same(images, where):
    images = images.to(where)
    layer = Augment(8, 2, True, 3, 0.5, 0.25).to(where)
    index = torch.tensor([5, 1, 1], device=where)
    gathered = layer(images, index, step=7)
    assert torch.equal(layer(images[index], places=index, step=7), gathered)
    assert torch.equal(layer(images, step=7)[index], gathered)
    seen = []

    def before(x):
        seen.append(x.shape)
        return 255 - x

    inverted = Augment(8, 2, True, 3, 0.5, 0.25, before=before).to(where)
    plain = Augment(8, 2, True, 3, 0.5, 0.25).to(where)(255 - images, index, step=7)
    assert torch.equal(inverted(images, index, step=7), plain) and seen == [(3, 3, 9, 8)]
    assert torch.equal(inverted.eval()(images), layer.eval()(images)) and len(seen) == 1


def test_torchvision_transforms_come_before(images):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    with force_mode(Mode.REFERENCE):
        layer = Augment(8, before=v2.Compose([v2.RandAugment(), v2.RandomGrayscale(1.0)]))
        y = layer(images.cpu())
        assert y.shape == (6, 3, 8, 8) and torch.equal(y[:, 0], y[:, 2])


def test_means_stay_float32_in_a_model_of_halves(images, where):
    layer = Augment(8, mean=MEAN, std=STD, dtype=torch.float16).to(where)
    model = torch.nn.Sequential(layer, gpukern.nn.Conv2d(3, 2, 3)).to(where).half().eval()
    assert layer.mean.dtype is layer.scale.dtype is torch.float32
    assert torch.equal(layer.mean, Augment(8, mean=MEAN, std=STD).mean.to(where))
    assert model(images.to(where)).dtype is torch.float16
    assert gpukern.convert(copy.deepcopy(model))[0].step == 0


def test_repr_is_what_was_told():
    layer = Augment(32, 4, True, 8, MEAN, STD, torch.float16, seed=3)
    assert repr(layer) == (
        "Augment(size=32, padding=4, flip=0.5, cutout=8, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261), "
        "dtype=torch.float16, seed=3)"
    )
    layer = Augment((28, 30), mean=torch.rand(32, 32, 3), padding_mode="constant", fill=3, before=torch.neg)
    assert "size=(28, 30), mean=tensor [32, 32, 3], std=1, dtype=torch.float32, fill=3, seed=0, before=" in repr(layer)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"size": 0}, ValueError, "at least 1"),
        ({"size": "large"}, TypeError, "size"),
        ({"padding": -1}, ValueError, "at least 0"),
        ({"cutout": -1}, ValueError, "at least 0"),
        ({"cutout": 0.5}, TypeError, "cutout"),
        ({"flip": 1.1}, ValueError, "between 0 and 1"),
        ({"flip": "yes"}, TypeError, "flip"),
        ({"mean": ((0.5, 0.5),)}, ValueError, "mean must be a number"),
        ({"mean": float("nan")}, ValueError, "finite"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "above 0"),
        ({"std": torch.ones(4, 4, 3)}, ValueError, "above 0"),
        ({"dtype": torch.int32}, ValueError, "dtype must be float32"),
        ({"padding_mode": "mirror"}, ValueError, "reflect, symmetric"),
        ({"seed": 2**63}, ValueError, "64 bits"),
        ({"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_options_are_refused_at_once(options, error, words):
    with pytest.raises(error, match=words):
        Augment(**({"size": 4} | options))


def test_calls_are_refused(images, where):
    layer = Augment(4, mean=(0.5, 0.5), std=(0.5, 0.5)).to(where)
    for given, error, words in (
        ([1], TypeError, "expected a Tensor"),
        (images.to(where)[0], RuntimeError, r"images \[N, H, W, C\]"),
        (images.to(where), RuntimeError, r"expected mean \[3\]"),
        (images.to(where).float(), NotImplementedError, "uint8"),
    ):
        with pytest.raises(error, match=words):
            layer(given)


def test_compiled_models_go_on_behind_it(images):
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        layer = Augment(8, 1, True)
        model = torch.compile(torch.nn.Sequential(layer, torch.nn.ReLU()), backend="eager")
        made = [model(images.cpu()) for _ in range(4)]
        assert layer.step == 4
        layer.step = 0
        assert all(torch.equal(each, layer(images.cpu())) for each in made)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_cuda_graphs_are_refused_and_evaluation_is_not(images, device):
    layer, graph = Augment(8, 1, True).to(device), torch.cuda.CUDAGraph()
    expected = layer.eval()(images)
    with torch.cuda.graph(graph):
        y = layer(images)
        with pytest.raises(RuntimeError, match="one step"):
            layer.train()(images)
    graph.replay()
    assert torch.equal(y, expected)


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_statistics_are_exact(where):
    images = torch.randint(256, (1500, 3, 2, 2), dtype=torch.uint8, device=where)
    images[..., 1] = 255
    pixels = images.cpu().double() / 255
    means, deviations = channel_statistics(images)
    for found, reference in ((means, pixels.mean((0, 1, 2))), (deviations, pixels.std((0, 1, 2), correction=0))):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), reference, rtol=1e-12, atol=1e-12)
    assert deviations[1] == 0
    image = mean_image(images)
    assert image.shape == (3, 2, 2) and image.dtype is torch.float32
    torch.testing.assert_close(image.cpu().double(), pixels.mean(0), rtol=1e-7, atol=0)
    for function in (channel_statistics, mean_image):
        with pytest.raises(NotImplementedError, match="uint8"):
            function(images.float())
        for empty in (images[:0], images[0]):
            with pytest.raises(RuntimeError, match="with pixels"):
                function(empty)


@pytest.mark.parametrize("wrong", [lambda x: None, lambda x: x[:1], lambda x: x[0]])
def test_what_a_function_before_returns_is_checked(images, wrong):
    with pytest.raises(RuntimeError, match=r"images \[N, C, H, W\] of before=, but got"):
        Augment(4, before=wrong)(images)
    with pytest.raises(TypeError, match="before must be a function"):
        Augment(4, before=3)
