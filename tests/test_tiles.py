"""A network over an image, tile by tile, gives what it gives of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gpukern
from models.unet import UNet

pytestmark = pytest.mark.usefixtures("reference_mode")

NUMPY_BORDER = {"reflect": "reflect", "symmetric": "symmetric", "replicate": "edge", "constant": "constant"}


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def convolution(padding: int = 0) -> torch.nn.Module:
    """[n, 2, h, w] → [n, 3, …], from 3 rows around and 2 columns before and 1 behind a pixel."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(2, 3, (7, 4), padding=(3 * padding, 0)).double()


@pytest.mark.parametrize("border", NUMPY_BORDER)
@pytest.mark.parametrize("shape", [(2, 11, 9), (2, 2, 3), (2, 1, 30)])
@pytest.mark.parametrize("tile", [1, (4, 7), 40])
def test_predict_tiles_equals_the_padded_whole(border, shape, tile):
    image = np.random.default_rng(0).standard_normal(shape)
    network, margin = convolution(), ((3, 3), (2, 1))
    padded = np.pad(image, ((0, 0), *margin), mode=NUMPY_BORDER[border])
    with torch.no_grad():
        expected = network(torch.from_numpy(padded)[None])[0].numpy()
    found = gpukern.predict_tiles(network, image, tile=tile, margin=margin, border=border, batch_size=3)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_predict_tiles_of_a_network_that_pads_cuts_its_margins():
    image = torch.randn(2, 23, 17, dtype=torch.float64)
    network = torch.nn.Sequential(torch.nn.ZeroPad2d((2, 1, 0, 0)), convolution(padding=1))
    found = gpukern.predict_tiles(network, image, tile=(8, 5), margin=((3, 3), (2, 1)), border="constant")
    with torch.no_grad():
        torch.testing.assert_close(found, network(image[None])[0], rtol=0, atol=1e-12)


def test_predict_tiles_of_a_unet_of_valid_convolutions_equals_one_tile():
    torch.manual_seed(0)
    unet = UNet(1, width=4, depth=2, padding="valid").eval().double()
    image = torch.randn(1, 45, 61, dtype=torch.float64)
    options = {"margin": unet.margin, "multiple": unet.multiple}
    whole = gpukern.predict_tiles(unet, image, tile=unet.fitting(61), **options)
    # Tiles of 12 overlap by none, the ones of 8 × 20 neither; of 9 would not fit.
    for tile in (12, (8, 20)):
        torch.testing.assert_close(gpukern.predict_tiles(unet, image, tile=tile, **options), whole, rtol=0, atol=1e-12)


def test_tiles_begin_at_multiples_and_overlap():
    seen = []

    def network(x):
        seen.append(x[0, 0, 0, 0].item())
        return x

    image = torch.arange(10.0).expand(1, 10, 10).contiguous()
    found = gpukern.predict_tiles(network, image, tile=(10, 5), multiple=(1, 4))
    assert seen == [0, 4, 8] and found.equal(image)


def test_predict_tiles_reads_and_writes_memory_maps(tmp_path):
    """Of another byte order too, as ImageJ writes them."""
    values = np.random.default_rng(0).integers(0, 2**16, (1, 20, 30))
    image = np.memmap(tmp_path / "image", ">u2", "w+", shape=(1, 20, 30))
    image[:] = values
    out = np.memmap(tmp_path / "out", "float32", "w+", shape=(2, 20, 30))
    found = gpukern.predict_tiles(lambda x: torch.cat([x, 2 * x], 1), image, tile=(7, 8), margin=2, out=out)
    assert found is out
    np.testing.assert_array_equal(out, np.concatenate([values, 2 * values]))


def test_predict_tiles_reads_no_more_than_tiles_need():
    class Image:
        shape, most = (1, 1000, 1000), 0

        def __getitem__(self, place):
            rows, columns = place[1:]
            Image.most = max(Image.most, rows.stop - rows.start, columns.stop - columns.start)
            return np.zeros((1, rows.stop - rows.start, columns.stop - columns.start), np.uint8)

    assert gpukern.predict_tiles(same, Image(), tile=200, margin=10).shape == (1, 1000, 1000)
    assert Image.most == 220


def test_predict_tiles_converts_and_calls_before_and_after():
    network = torch.nn.Conv2d(1, 1, 1).to(torch.bfloat16)
    seen = []
    found = gpukern.predict_tiles(
        network,
        np.ones((1, 4, 4), np.uint8),
        tile=4,
        before=lambda x: seen.append(x.dtype) or x / 255,
        after=lambda y: y.sigmoid(),
    )
    assert seen == [torch.bfloat16] and found.dtype == np.float32 and found.min() > 0 and not network.weight.grad


@pytest.mark.parametrize(
    "image, options, error, words",
    [
        (torch.zeros(4, 4), {}, ValueError, r"\[C, H, W\]"),
        ([[1]], {}, ValueError, "got list"),
        (torch.zeros(1, 0, 4), {}, ValueError, "no pixels"),
        (torch.zeros(1, 4, 4), {"tile": 0}, ValueError, "tile must be positive"),
        (torch.zeros(1, 4, 4), {"tile": 2.0}, TypeError, "tile must be an int"),
        (torch.zeros(1, 4, 4), {"tile": 4, "multiple": 8}, ValueError, "holds no multiple"),
        (torch.zeros(1, 4, 4), {"margin": -1}, ValueError, "negative"),
        (torch.zeros(1, 4, 4), {"border": "mirror"}, ValueError, "border must be one of reflect"),
        (torch.zeros(1, 4, 4), {"batch_size": 0}, ValueError, "batch_size"),
        (torch.zeros(1, 4, 4), {"out": torch.zeros(1, 4, 5)}, ValueError, r"out must be \[K, 4, 4\]"),
        (torch.zeros(1, 4, 4), {"out": [1]}, ValueError, r"out must be \[K, 4, 4\], got list"),
        (
            torch.zeros(1, 4, 4),
            {"margin": (1, 2, 3)},
            RuntimeError,
            "margin to be a single integer value or a list of 2",
        ),
        (torch.zeros(1, 4, 4, dtype=torch.complex64), {}, TypeError, "image must be of real numbers"),
    ],
)
def test_predict_tiles_bad_arguments_are_refused_before_the_network_runs(image, options, error, words):
    def network(x):
        raise AssertionError("ran")

    with pytest.raises(error, match=words):
        gpukern.predict_tiles(network, image, **{"tile": 4} | options)


def test_predict_tiles_outputs_of_another_size_are_refused():
    words = r"made \[1, 1, 3, 2\] of 1 × 6 × 6 pixels of tiles with margins.* gives 3 rows and 4 columns less"
    with pytest.raises(RuntimeError, match=words):
        gpukern.predict_tiles(lambda x: x[:, :, :3, :2], torch.zeros(1, 8, 8), tile=4, margin=1)
    for network in (lambda x: x.mean((2, 3)), lambda x: x.repeat(1, 1, 2, 2), lambda x: x.repeat(2, 1, 1, 1)):
        with pytest.raises(RuntimeError, match=r"or the size of its input$"):
            gpukern.predict_tiles(network, torch.zeros(1, 8, 8), tile=4)
    with pytest.raises(ValueError, match="out has 2 channels, the network's output 1"):
        gpukern.predict_tiles(same, torch.zeros(1, 8, 8), tile=4, out=torch.zeros(2, 8, 8))


@pytest.mark.parametrize(
    "network, options, error, words",
    [
        (lambda x: (x,), {}, TypeError, "network must give a tensor, got tuple"),
        (lambda x: x[:1], {"batch_size": 3}, RuntimeError, r"made \[1, 1, 4, 4\] of 3 × 4 × 4 pixels"),
        (same, {"after": lambda y: None}, TypeError, "after must give a tensor, got NoneType"),
        (same, {"after": lambda y: y[:, :, :2]}, RuntimeError, r"after made \[1, 1, 2, 4\] of tiles"),
        (same, {"after": lambda y: y[:, 0]}, RuntimeError, r"after made \[1, 4, 4\] of tiles"),
        (same, {"out": np.zeros((1, 8, 8), np.uint8)}, TypeError, "out of uint8 does not hold .* torch.float32"),
        (same, {"out": torch.zeros(1, 8, 8, dtype=torch.bool)}, TypeError, "out of bool does not hold"),
        (same, {"after": lambda y: y.long() + 256, "out": np.zeros((1, 8, 8), ">u1")}, TypeError, "out of uint8"),
        (
            same,
            {"after": lambda y: y.long() - 1, "out": torch.zeros(1, 8, 8).int().to(torch.uint16)},
            TypeError,
            "uint16",
        ),
        (same, {"margin": 6, "multiple": 4}, ValueError, "begin at no multiple of .* would be shifted"),
    ],
)
def test_predict_tiles_outputs_that_would_be_lost_or_shifted_are_refused(network, options, error, words):
    with pytest.raises(error, match=words):
        gpukern.predict_tiles(network, torch.zeros(1, 8, 8), **{"tile": 4} | options)


def test_predict_tiles_integers_that_fit_are_written():
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 9))
    for out in (np.zeros((1, 9, 9), np.uint8), torch.zeros(1, 9, 9, dtype=torch.int16)):
        assert gpukern.predict_tiles(same, image, tile=4, after=lambda y: y.long(), out=out) is out
        np.testing.assert_array_equal(out, image)
    large = np.full((1, 3, 3), 2**24 + 1)
    assert gpukern.predict_tiles(same, large, tile=3, dtype=torch.float64)[0, 0, 0] == 2**24 + 1


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda x: torch.from_numpy(x).bfloat16()])
def test_predict_tiles_does_not_overwrite_the_image(convert):
    pair = convert(np.zeros((2, 8, 8), np.float32))
    with pytest.raises(ValueError, match="out has the memory of image"):
        gpukern.predict_tiles(same, pair[:1], tile=4, out=pair[:1])
    assert gpukern.predict_tiles(lambda x: x + 1, pair[:1], tile=4, out=pair[1:]) is not None
    assert (pair[1] == 1).all() and (pair[0] == 0).all()
