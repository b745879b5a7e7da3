"""PyTorch's own samples of the operators and modules that gpukern has."""

import re

import pytest

import gpukern.nn
from gpukern import functional as F
from tests.opinfo import check_errors, check_module, check_module_errors, check_samples

pytestmark = [
    pytest.mark.usefixtures("full_fp32"),
    # PyTorch says so of a copy that it makes itself.
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths"),
]

FUNCTIONS = {
    "nn.functional.batch_norm": F.batch_norm,
    "nn.functional.conv1d": F.conv1d,
    "nn.functional.conv2d": F.conv2d,
    "nn.functional.group_norm": F.group_norm,
    "nn.functional.conv_transpose1d": F.conv_transpose1d,
    "nn.functional.linear": F.linear,
    "nn.functional.max_pool1d": F.max_pool1d,
    "nn.functional.max_pool2d": F.max_pool2d,
    "nn.functional.avg_pool1d": F.avg_pool1d,
    "nn.functional.avg_pool2d": F.avg_pool2d,
    "nn.functional.adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "nn.functional.adaptive_max_pool1d": F.adaptive_max_pool1d,
    "nn.functional.conv3d": F.conv3d,
    "nn.functional.conv_transpose3d": F.conv_transpose3d,
    "nn.functional.max_pool3d": F.max_pool3d,
    "nn.functional.avg_pool3d": F.avg_pool3d,
    "nn.functional.adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "nn.functional.adaptive_max_pool3d": F.adaptive_max_pool3d,
}
HAVE_ERRORS = [name for name in FUNCTIONS if re.search(r"conv\dd|pool\dd|group_norm", name)]
LAYERS = (
    "AdaptiveAvgPool1d", "AdaptiveMaxPool1d", "AvgPool1d", "BatchNorm1d", "BatchNorm2d", "Conv1d", "Conv2d",
    "ConvTranspose1d", "Linear", "MaxPool1d", "Conv3d", "ConvTranspose3d", "MaxPool3d", "AdaptiveAvgPool3d",
    "AdaptiveMaxPool3d", "BatchNorm3d",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_right(name, where):
    # Those of images are pooled by the same kernels.
    at_most = 20 if name.endswith("pool1d") else 8 if name.endswith("3d") else 60
    check_samples(name, FUNCTIONS[name], at_most=at_most, device=where, only=_quick if name.endswith("e3d") else _any)


def _any(sample) -> bool:
    return True


def _quick(sample) -> bool:
    # Two of transposed volumes have 120 taps for each of 18,000 voxels: a minute emulated.
    return sample.input.numel() * sample.args[0].numel() < 50_000


@pytest.mark.parametrize("name", HAVE_ERRORS)
def test_every_error_sample_is_refused(name, where):
    check_errors(name, FUNCTIONS[name], device=where)


def test_every_sample_of_instance_norm_is_right(where):
    # Laid out as its input: torch's own, which computes a copy, is contiguous.
    check_samples(
        "nn.functional.instance_norm", F.instance_norm, device=where, only=lambda sample: sample.input.is_contiguous()
    )


NORMS = ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


def test_every_error_sample_of_a_module_is_refused(where):
    check_module_errors(gpukern.nn.GroupNorm, device=where)


@pytest.mark.parametrize("layer", [*NORMS, *LAYERS])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_sample_is_right(layer, training, where):
    check_module(getattr(gpukern.nn, layer), training=training, device=where)
