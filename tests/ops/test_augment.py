"""The input pipeline: crops, flips, cutouts and normalization, sample by sample beside plain slicing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as T

from gpukern.ops._augment.planner import plan
from gpukern.ops._augment.problem import centre_side
from gpukern.ops.augment import augment
from gpukern.runtime.mode import EMULATE, Mode, force_mode
from tests.ops.test_dropout import philox
from tests.traffic import counted_traffic

pytestmark = pytest.mark.usefixtures("poisoned")

KEY, OFFSET = -0x123456789ABCDEF, 2**33 + 5
FILL = 17.0


def bytes_of(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def means(channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return 255 * torch.rand(channels, device=device), 0.1 * torch.rand(channels, device=device)


def call(images, *, size, index=None, places=None, mean=None, scale=None, random=True, padding=(0, 0), **options):
    others = {"padding_mode": "constant", "fill": FILL, "flip": 0.5, "cutout": 0, "dtype": torch.float32} | options
    numbers = {name: others.pop(name, value) for name, value in (("key", KEY), ("offset", OFFSET))}
    if mean is None:
        mean, scale = means(images.shape[3], images.device)
    return augment(
        images, index, places, mean, scale, *numbers.values(), random, list(size), list(padding), *others.values()
    )


# ---- the oracle ----------------------------------------------------------------------------------------------------


def one_sample(image, place, mean, scale, *, size, padding, padding_mode, flip, cutout, key=KEY, offset=OFFSET):
    """A sample by numpy's padding, slices and whole numbers: the crop, then the flip, the mean, and the square."""
    H, W, _ = image.shape
    h, w = size
    wide = {"constant_values": FILL} if padding_mode == "constant" else {}
    around = ((padding[0],) * 2, (padding[1],) * 2, (0, 0))
    padded = np.pad(image.astype(np.float32), around, padding_mode, **wide)
    inner = np.pad(mean, around, "edge" if padding_mode == "constant" else padding_mode) if mean.ndim == 3 else None
    by_row, by_column, by_flip, by_cutout = philox(place % 2**64, key, offset)
    top, left = by_row * (H + 2 * padding[0] - h + 1) >> 32, by_column * (W + 2 * padding[1] - w + 1) >> 32
    window = (slice(top, top + h), slice(left, left + w))
    x = padded[window] - (mean if inner is None else inner[window])
    x = x * scale
    if by_flip < flip * 2**32:
        x = x[:, ::-1].copy()
    if cutout:
        row, column = by_cutout * h >> 32, (by_cutout * h % 2**32) * w >> 32
        row, column = row - cutout // 2, column - cutout // 2
        x[max(row, 0) : max(row + cutout, 0), max(column, 0) : max(column + cutout, 0)] = 0
    return x


def expected(images, places, mean, scale, **options):
    """[samples, C, h, w] in fp32."""
    arrays = (images.cpu().numpy(), mean.cpu().numpy(), scale.cpu().numpy())
    samples = [one_sample(image, int(p), *arrays[1:], **options) for image, p in zip(arrays[0], places, strict=True)]
    return torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2)


CASES = {
    "one channel": {"shape": (3, 7, 9, 1), "size": (5, 4), "cutout": 3},
    "two channels": {"shape": (2, 6, 5, 2), "size": (6, 5), "padding": (2, 3), "padding_mode": "edge"},
    "three channels": {"shape": (4, 32, 32, 3), "size": (32, 32), "padding": (4, 4), "cutout": 8},
    "four channels": {"shape": (2, 9, 8, 4), "size": (7, 8), "padding": (1, 2), "padding_mode": "reflect"},
    "five channels": {"shape": (2, 5, 4, 5), "size": (5, 3), "padding": (5, 4), "padding_mode": "symmetric"},
    "larger than the image": {"shape": (3, 5, 6, 3), "size": (9, 12), "padding": (3, 4), "cutout": 5},
    "as large as can be": {"shape": (2, 5, 6, 3), "size": (13, 12), "padding": (4, 3), "padding_mode": "reflect"},
    "always flipped": {"shape": (5, 4, 5, 3), "size": (3, 5), "flip": 1.0},
    "never flipped": {"shape": (5, 4, 5, 3), "size": (3, 5), "flip": 0.0, "cutout": 1},
    "one pixel": {"shape": (2, 1, 1, 3), "size": (1, 1), "padding": (1, 0)},
    "all cut out": {"shape": (2, 3, 4, 2), "size": (3, 4), "cutout": 20},
}


@pytest.mark.parametrize("mean_image", [False, True], ids=["channels", "mean image"])
@pytest.mark.parametrize("case", CASES)
def test_random_crops_equal_slices_bit_for_bit(case, mean_image, where):
    options = {"padding": (0, 0), "padding_mode": "constant", "flip": 0.5, "cutout": 0} | CASES[case]
    shape = options.pop("shape")
    images = bytes_of(*shape, device=where)
    mean, scale = means(shape[3], where)
    if mean_image:
        mean = 255 * torch.rand(shape[1:], device=where)
    y = call(images, mean=mean, scale=scale, **options)
    assert y.dtype is torch.float32 and y.permute(0, 2, 3, 1).is_contiguous()
    reference = expected(images, range(len(images)), mean, scale, **options)
    torch.testing.assert_close(y.cpu(), reference, rtol=0, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = call(images, mean=mean, scale=scale, dtype=dtype, **options)
        assert rounded.dtype is dtype and torch.equal(rounded.cpu(), reference.to(dtype))


VIEWS = {
    "NCHW": lambda t: t(3, 3, 6, 7).permute(0, 2, 3, 1),
    "cut": lambda t: t(3, 9, 12, 5)[:, 1:7, 2:9, 1:4],
    "steps": lambda t: t(6, 12, 14, 6)[::2, ::2, ::2, ::2],
    "expanded": lambda t: t(1, 6, 7, 1).expand(3, 6, 7, 3),
    "transposed": lambda t: t(3, 7, 6, 3).transpose(1, 2),
}


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_where_they_lie(view, random, where):
    images = VIEWS[view](lambda *shape: bytes_of(*shape, device=where))
    mean, scale = means(3, where)
    for size in ((6, 7), (5, 5)):
        y, dense = (
            call(each, size=size, mean=mean, scale=scale, random=random, padding=(1, 1))
            for each in (images, images.contiguous())
        )
        assert torch.equal(y, dense) and not y.isnan().any()


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 9), (5, 5), (4, 7), (1, 2), (11, 9), (9, 14)])
@pytest.mark.parametrize("mean_image", [False, True], ids=["channels", "mean image"])
def test_evaluation_takes_the_middle(size, mean_image, where):
    """Padded where the image is smaller, as torchvision's center_crop does; nothing is flipped or cut out."""
    images = bytes_of(2, 6, 9, 3, device=where)
    mean, scale = means(3, where)
    if mean_image:
        mean = 255 * torch.rand(6, 9, 3, device=where)
    y = call(images, size=size, mean=mean, scale=scale, random=False, flip=1.0, cutout=4, padding=(50, 50))
    around = [[max(s - n, 0) // 2, (max(s - n, 0) + 1) // 2] for s, n in zip(size, (6, 9), strict=True)]
    x = T.pad(images.cpu().float(), (0, 0, *around[1], *around[0]), value=FILL)
    mean = mean.cpu().expand(6, 9, 3).permute(2, 0, 1)
    mean = T.pad(mean, (*around[1], *around[0]), "replicate").permute(1, 2, 0)
    x = (x - mean) * scale.cpu()
    top, left = (round((n - s) / 2) for s, n in zip(size, x.shape[1:3], strict=True))
    assert torch.equal(y.cpu(), x[:, top : top + size[0], left : left + size[1]].permute(0, 3, 1, 2))


def test_middle_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    for image in range(1, 9):
        for size in range(1, 12):
            line = torch.arange(1, image + 1, dtype=torch.uint8).view(1, 1, image).expand(1, image, image)
            (found,) = transforms.center_crop(line, [image, size])[0, :1]
            side = centre_side(image, size, "constant")
            inside = (side.first + i for i in range(size))
            assert found.tolist() == [i + 1 if 0 <= i < image else 0 for i in inside], (image, size)


# ---- whose numbers -------------------------------------------------------------------------------------------------


def test_gathered_samples_are_those_of_their_images(where):
    """Whatever the batch and the order: a sample depends on seed, step and its number alone."""
    images = bytes_of(9, 8, 8, 3, device=where)
    options = {"size": (6, 6), "padding": (1, 1), "cutout": 2, "mean": means(3, where)[0], "scale": means(3, where)[1]}
    whole = call(images, **options)
    for dtype in (torch.int64, torch.int32):
        index = torch.tensor([7, 0, 7, 3], dtype=dtype, device=where)
        assert torch.equal(call(images, index=index, **options), whole[index.long()])
        strided = torch.stack((index, index + 1), 1)[:, 0]
        assert torch.equal(call(images, index=strided, **options), whole[index.long()])
        gathered = images[index.long()]
        assert torch.equal(call(gathered, places=index, **options), whole[index.long()])
    far = torch.tensor([2**40 + 3, -5, 2**32], device=where)
    moved = call(images, index=torch.tensor([4, 4, 5], device=where), places=far, **options)
    kept = {name: options[name] for name in ("size", "padding", "cutout")}
    reference = expected(
        images[[4, 4, 5]], far.tolist(), options["mean"], options["scale"], **kept, flip=0.5, padding_mode="constant"
    )
    assert torch.equal(moved.cpu(), reference)


def test_seeds_and_steps_give_other_numbers(where):
    images = bytes_of(16, 8, 8, 1, device=where)
    mean, scale = torch.zeros(1, device=where), torch.ones(1, device=where)
    options = {"size": (8, 8), "padding": (4, 4), "mean": mean, "scale": scale}
    made = [call(images, key=key, offset=offset, **options) for key, offset in ((1, 0), (1, 1), (2, 0), (1, 2**32))]
    assert torch.equal(call(images, key=1, offset=0, **options), made[0])
    for i, one in enumerate(made):
        for other in made[:i]:
            assert ((one != other).flatten(1).any(1)).sum() >= 12


def test_every_crop_is_as_likely_as_another():
    """Six standard deviations of each place, each flip and each square's middle, and of all pairs of two of them."""
    count = 4096
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1).expand(count, 4, 4, 1)
    options = {"mean": torch.zeros(1), "scale": torch.ones(1), "fill": 0.0, "size": (3, 3)}
    with force_mode(Mode.REFERENCE):
        seen = call(image, **options).long().flatten(1)
        cut = call(image, cutout=1, **options).flatten(1)
    top, left = (seen.min(1).values - 1) // 4, (seen.min(1).values - 1) % 4
    flipped = (seen[:, 0] > seen[:, 2]).long()
    assert ((cut == 0).sum(1) == 1).all()
    middle = (cut == 0).long().argmax(1)
    numbers = ((top, 2), (left, 2), (flipped, 2), (middle, 9))
    for i, (one, choices) in enumerate(numbers):
        for other, more in numbers[: i + 1]:
            both = torch.bincount(one * more + other, minlength=choices * more)
            p = 1 / (choices * more) if one is not other else 1 / choices
            both = both[both > 0] if one is other else both
            assert len(both) == round(1 / p) and (both - count * p).abs().max() <= 6 * math.sqrt(count * p * (1 - p))


@pytest.mark.skipif(not EMULATE, reason="counts what emulated kernels touch")
def test_bytes_are_read_once_and_only_those_that_are_seen():
    """Beside them, each program reads the index of its image, and mean and scale of three channels."""
    images, index = bytes_of(4, 16, 16, 3, device=torch.device("cpu")), torch.arange(4)
    seen, tables = 16 * 16 * 3, 8 + 2 * 3 * 4
    for random, options in ((True, {}), (False, {}), (True, {"padding": (8, 8)}), (True, {"cutout": 16})):
        with counted_traffic() as traffic:
            y = call(images, index=index, size=(16, 16), random=random, fill=0.0, dtype=torch.float16, **options)
        assert traffic.written == y.numel() * 2
        assert traffic.read == 4 * (seen + tables) if not options else traffic.read < 3.5 * (seen + tables)


# ---- sizes and errors ----------------------------------------------------------------------------------------------


def test_nothing_gives_nothing(where):
    for images, index in ((bytes_of(0, 4, 4, 3, device=where), None), (bytes_of(3, 4, 4, 3, device=where), [])):
        index = None if index is None else torch.tensor(index, dtype=torch.int64, device=where)
        y = call(images, index=index, size=(4, 4), dtype=torch.float16)
        assert y.shape == (0, 3, 4, 4) and y.dtype is torch.float16


def test_unknown_images_are_refused_or_nan(where, device):
    images, scale = bytes_of(3, 4, 4, 2, device=where), torch.ones(2, device=where)
    for random in (False, True):
        for unknown in (-1, 3, 2**40):
            index = torch.tensor([1, unknown, 2], device=where)
            try:
                y = call(images, index=index, size=(4, 4), random=random, mean=scale, scale=scale)
            except IndexError:
                continue  # the reference
            assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_images_past_two_billion_bytes_are_found(device):
    """Memory is reserved but not touched. Strides of 30 bits, of images or of rows, whose third multiple has 32."""
    stride = 2**30 + 16
    memory = torch.from_numpy(np.empty(3 * stride + 4096, dtype=np.uint8)).to(device)
    far = memory.as_strided((4, 3, 4, 3), (stride, 12, 3, 1))
    tall = memory.as_strided((2, 4, 3, 3), (48, stride, 9, 3))
    for images in (far, tall):
        images.copy_(bytes_of(*images.shape, device=device))
        near = images.clone(memory_format=torch.contiguous_format)
        mean, scale = means(3, device)
        index = torch.arange(len(images) - 1, -1, -1, dtype=torch.int32, device=device)
        for random in (True, False):
            options = {"mean": mean, "scale": scale, "random": random, "padding": (1, 1), "index": index}
            size = images.shape[1:3]
            assert torch.equal(call(images, size=size, **options), call(near, size=size, **options))


GOOD = {"size": (4, 4), "padding": (1, 1)}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"images": torch.zeros(2, 4, 4, 3)}, NotImplementedError, "expected images of torch.uint8"),
        ({"images": torch.zeros(4, 4, 3, dtype=torch.uint8)}, RuntimeError, r"images \[N, H, W, C\]"),
        ({"images": torch.zeros(2, 0, 4, 3, dtype=torch.uint8)}, RuntimeError, "at least one pixel"),
        ({"dtype": torch.int32}, NotImplementedError, "floating-point dtype"),
        ({"index": torch.zeros(2)}, RuntimeError, "torch.int64 or torch.int32"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, RuntimeError, r"expected index \[samples\]"),
        ({"places": torch.zeros(3, dtype=torch.int64)}, RuntimeError, "2 samples, but 3 places"),
        ({"mean": torch.zeros(4)}, RuntimeError, r"mean \[3\], or a mean image \[4, 4, 3\]"),
        ({"mean": torch.zeros(3, dtype=torch.float64)}, RuntimeError, "mean of torch.float32"),
        ({"scale": torch.zeros(4, 4, 3)}, RuntimeError, r"scale \[3\]"),
        ({"scale": torch.zeros(3, device="meta")}, RuntimeError, "two devices"),
        ({"size": (4,)}, RuntimeError, "size for height and width"),
        ({"size": (0, 4)}, ValueError, "size of at least 1"),
        ({"size": (4, 7)}, ValueError, r"larger than the image with its padding: 4 \+ 2 · 1"),
        ({"padding": (-1, 0)}, ValueError, "padding of at least 0"),
        ({"padding_mode": "mirror"}, ValueError, "constant, edge, reflect, symmetric"),
        ({"padding_mode": "reflect", "padding": (4, 0)}, RuntimeError, "Padding size should be less"),
        ({"padding_mode": "symmetric", "padding": (5, 0)}, RuntimeError, "Padding size should be less"),
        ({"padding_mode": "reflect", "random": False, "size": (4, 11)}, RuntimeError, "Padding size"),
        ({"flip": 1.5}, ValueError, "between 0 and 1"),
        ({"flip": math.nan}, ValueError, "between 0 and 1"),
        ({"cutout": -1}, ValueError, "at least 0 pixels"),
    ],
)
def test_bad_input_is_refused(change, error, words, where):
    arguments = {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "mean": torch.zeros(3), "scale": torch.ones(3)}
    arguments |= GOOD | change
    arguments = {k: v.to(where) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(error, match=words):
        call(arguments.pop("images"), **arguments)


def test_kernels_take_their_dtypes(device):
    with pytest.raises(NotImplementedError, match="float32, float16 and bfloat16"):
        call(bytes_of(1, 4, 4, 3, device=device), size=(4, 4), dtype=torch.float64)


@pytest.mark.parametrize("size, found", [(3072, (1024, 2, 3)), (224 * 224 * 3, (1024, 2, 147)), (10, (512, 1, 1))])
def test_plan_leaves_few_threads_idle(size, found):
    assert plan(size) == found
