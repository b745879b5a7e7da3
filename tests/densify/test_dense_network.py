"""Dense networks as modules: sizes, borders, shared parameters, modes, gradients, copies, files."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import gpukern
from gpukern.densify import dense
from gpukern.densify.epilogues import InTorch, Kernels, kernels_of
from tests.densify.patches import assert_equals_patches, by_patches, patches_of

pytestmark = pytest.mark.usefixtures("reference_mode")


def classifier(channels: int = 2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Of patches of 10 × 12, with a batch norm of statistics of its own, in evaluation mode."""
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 2 * 3, 5), nn.Dropout(), nn.Linear(5, 3),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval().to(dtype)


PATCH = (10, 12)


def images(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


# ---- sizes and layouts -----------------------------------------------------------------------------------------------


def test_an_image_of_one_patch_gives_one_pixel():
    model = classifier()
    patch = images(3, 2, *PATCH)
    assert torch.allclose(dense(model, PATCH)(patch)[..., 0, 0], model(patch), rtol=1e-12, atol=1e-12)


def test_an_empty_batch_gives_an_empty_result():
    assert dense(classifier(), PATCH)(images(0, 2, 12, 15)).shape == (0, 3, 3, 4)


def test_one_image_needs_no_batch():
    network, image = dense(classifier(), PATCH), images(2, 13, 14)
    assert torch.equal(network(image), network(image[None])[0])


@pytest.mark.parametrize("size", [(9, 30), (30, 11)])
def test_an_image_smaller_than_the_patch_is_refused(size):
    with pytest.raises(RuntimeError, match=rf"an image of {size[0]} × {size[1]} has no patch of 10 × 12"):
        dense(classifier(), PATCH)(images(1, 2, *size))


def test_what_is_no_image_is_refused():
    network = dense(classifier(), PATCH)
    with pytest.raises(RuntimeError, match=r"expected an image \[C, H, W\] or images \[N, C, H, W\], got \[30, 30\]"):
        network(images(30, 30))
    with pytest.raises(TypeError, match="Tensor"):
        network(np.zeros((1, 2, 30, 30)))
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 3 channels"):
        network(images(1, 3, 30, 30))


def test_views_and_layouts_are_taken():
    model = classifier()
    network, image = dense(model, PATCH), images(2, 2, 24, 33)
    strided = image[:, :, ::2, 3:]
    assert_equals_patches(network, model, strided, torch.float64)
    last = network(strided.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, network(strided), rtol=1e-12, atol=1e-12)
    assert last.is_contiguous(memory_format=torch.channels_last)


# ---- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("border, mode", [("reflect", "reflect"), ("replicate", "edge"), ("constant", "constant")])
@pytest.mark.parametrize("patch", [PATCH, (11, 11)])
def test_borders_are_those_of_numpy(border, mode, patch):
    model = nn.Sequential(nn.Conv2d(2, 3, 4, stride=2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Conv2d(3, 2, 1)).double()
    image = images(1, 2, 9, 13)
    before = [size // 2 for size in patch]
    around = [(side, size - 1 - side) for side, size in zip(before, patch, strict=True)]
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *around], mode))
    network = dense(model, patch, border=border)
    assert network.border == border
    assert network(image).shape == (1, 2, 9, 13)
    assert torch.allclose(network(image), by_patches(model, padded, patch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("border", ["valid", "reflect"])
def test_tiles_with_its_margin_give_the_whole_image(border):
    model, image = classifier(), images(1, 2, 25, 31)
    network = dense(model, PATCH, border=border)
    assert network.margin == ((5, 4), (6, 5))
    tiled = gpukern.predict_tiles(network, image[0], tile=9, margin=network.margin)
    whole = dense(model, PATCH, border="reflect")(image)[0]
    assert torch.allclose(tiled, whole, rtol=1e-12, atol=1e-12)


def test_an_image_too_small_to_be_reflected_is_refused():
    network = dense(classifier(), PATCH, border="reflect")
    assert network(images(1, 2, 6, 7)).shape == (1, 3, 6, 7)
    for size in ((5, 30), (30, 6)):
        with pytest.raises(RuntimeError, match=r"too small to be reflected for patches of 10 × 12: it takes 6 × 7"):
            network(images(1, 2, *size))
    assert dense(classifier(), PATCH, border="replicate")(images(1, 2, 1, 1)).shape == (1, 3, 1, 1)
    with pytest.raises(RuntimeError, match="an image of 0 × 5 has no pixels"):
        dense(classifier(), PATCH, border="constant")(images(1, 2, 0, 5))


# ---- parameters and modes --------------------------------------------------------------------------------------------


def test_parameters_and_buffers_are_the_models_own():
    model = classifier()
    network = dense(model, PATCH)
    ours, theirs = network.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in model.named_parameters()]
    image = images(1, 2, 11, 13)
    with torch.no_grad():
        model[7].weight.mul_(-2)
    assert_equals_patches(network, model, image, torch.float64)
    network.load_state_dict(classifier().state_dict())
    assert_equals_patches(network, model, image, torch.float64)


def test_buffers_that_are_not_saved_are_not_saved_by_the_network_either():
    model = classifier()
    model.register_buffer("counts", torch.zeros(3), persistent=False)
    network = dense(model, PATCH)
    assert list(network.state_dict()) == list(model.state_dict())
    assert network.counts is model.counts


def test_training_the_network_trains_the_model():
    model = classifier()
    network = dense(model, PATCH)
    before = model(images(1, 2, *PATCH) * 0)
    step = torch.optim.SGD(network.parameters(), 0.1)
    network(images(1, 2, 12, 14)).square().sum().backward()
    step.step()
    assert not torch.equal(model(images(1, 2, *PATCH) * 0), before)


def test_modes_are_apart_and_those_of_the_model_at_first():
    model = classifier()
    model[8].train()
    network = dense(model, PATCH)
    assert not network.training
    assert network.get_submodule("8").training
    network.train()
    assert not model[1].training
    assert dense(classifier().train(), PATCH).training


def test_a_batch_norm_in_training_takes_the_statistics_of_all_pixels():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).double().train()
    image = images(2, 2, 8, 9)
    # A map of one pixel for each patch: the statistics of patches are those of pixels.
    result = by_patches(copy.deepcopy(model), image, (3, 3))
    network = dense(model, 3)
    assert torch.allclose(network(image), result, rtol=1e-10, atol=1e-10)
    assert model[1].num_batches_tracked == 1


def test_gradients_are_those_of_all_patches():
    model, target = classifier(), images(2, 3, 3, 4)
    image = images(2, 2, PATCH[0] + 2, PATCH[1] + 3).requires_grad_()
    network = dense(model, PATCH)
    results = []
    for function in (network, lambda x: by_patches(model, x, PATCH)):
        loss = (function(image) - target).square().sum()
        results.append(torch.autograd.grad(loss, [image, *model.parameters()]))
    # Sums of 24 patches in another order, of up to 24·N·H·W terms: 1e-12 is some 5000 roundings of the largest.
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, theirs.abs().max())


def test_gradients_of_averages_are_those_of_all_patches():
    model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Softplus(), nn.AvgPool2d(3)).double()
    image = images(1, 2, 10, 9).requires_grad_()
    network = dense(model, 8)
    ours, theirs = (
        torch.autograd.grad(function(image).sin().sum(), image)[0]
        for function in (network, lambda x: by_patches(model, x, (8, 8)))
    )
    assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_one_image_is_not_read_again_patch_by_patch():
    """The patches of an image of 24 × 26 are 225: their convolutions are not what runs."""
    seen = []
    model = classifier()
    network = dense(model, PATCH)
    network.get_submodule("1").register_forward_hook(lambda layer, given, result: seen.append(tuple(given[0].shape)))
    network(images(1, 2, 24, 26))
    assert seen == [(1, 4, 22, 24)]
    assert len(patches_of(images(1, 2, 24, 26), PATCH)) == 225


def test_values_that_nobody_reads_any_more_are_let_go():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3)).double().eval()
    network = dense(model, 3)
    made: list[weakref.ref] = []
    alive: list[bool] = []
    network.get_submodule("1").register_forward_hook(lambda layer, given, result: made.append(weakref.ref(result)))
    network.get_submodule("3").register_forward_hook(lambda *_: alive.append(made[0]() is not None))
    with torch.no_grad():
        network(images(1, 2, 6, 6))
    assert alive == [False]


# ---- copies, dtypes, exports -----------------------------------------------------------------------------------------


def test_copies_and_pickles_have_tensors_of_their_own():
    model = classifier()
    network, image = dense(model, PATCH, border="reflect"), images(1, 2, 12, 13)
    expected = network(image)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(image), expected)
        assert other.report == network.report
        with torch.no_grad():
            other.get_submodule("0").weight.zero_()
        assert torch.equal(network(image), expected)


def test_repr_has_patch_and_border():
    assert repr(dense(classifier(), PATCH)).startswith("DenseNetwork(\n  patch_size=10×12, border='valid'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_channels_last_change_as_those_of_any_module(dtype):
    model = classifier()
    network = copy.deepcopy(dense(model, PATCH)).to(dtype, memory_format=torch.channels_last)
    image = images(1, 2, 12, 13).to(dtype)
    result = network(image)
    exact = network.double()(image.double())
    assert result.dtype is dtype
    # Weights are below 1/2 and values below 2: an output sums 24 rounded products of rounded values of that size.
    assert (result.double() - exact).abs().max() <= 24 * torch.finfo(dtype).eps
    assert model[0].weight.dtype is torch.float64


def test_autocast_is_followed():
    network = dense(classifier(dtype=torch.float32), PATCH)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(1, 2, 12, 13)).dtype is torch.bfloat16


def test_export_gives_the_same():
    network, image = dense(classifier(dtype=torch.float32), PATCH), torch.randn(2, 2, 14, 15)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(network, (image,), dynamic_shapes=(sizes,)).module()
    for size in ((2, 2, 14, 15), (3, 2, 20, 17)):
        image = torch.randn(size)
        assert torch.equal(exported(image), network(image))


def test_compiled_networks_give_the_same():
    network, image = dense(classifier(dtype=torch.float32), PATCH), torch.randn(1, 2, 14, 15)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(image), network(image))


def test_functions_are_those_of_the_layers():
    """float64 has no kernels: there gpukern.convert leaves layers to torch, whose functions then compute all else."""
    network = dense(classifier(dtype=torch.float32), PATCH)
    doubled = dense(classifier(), PATCH)
    assert type(kernels_of(network)) is Kernels
    assert type(kernels_of(doubled)) is InTorch
    assert type(kernels_of(gpukern.convert(doubled.float()))) is Kernels


def test_converted_networks_and_gpukerns_models_are_taken():
    model = classifier()
    network = gpukern.convert(dense(gpukern.convert(model), PATCH))
    assert_equals_patches(network, model, images(1, 2, 12, 13), torch.float64)
