"""PyTorch's own samples of the operators and modules that gpukern has."""

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
    "nn.functional.conv2d": F.conv2d,
    "nn.functional.group_norm": F.group_norm,
    "nn.functional.linear": F.linear,
    "nn.functional.max_pool2d": F.max_pool2d,
    "nn.functional.avg_pool2d": F.avg_pool2d,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_right(name, where):
    check_samples(name, FUNCTIONS[name], device=where)


@pytest.mark.parametrize(
    "name", ["nn.functional.max_pool2d", "nn.functional.avg_pool2d", "nn.functional.conv2d", "nn.functional.group_norm"]
)
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


@pytest.mark.parametrize("layer", [*NORMS, "Conv2d", "BatchNorm2d", "BatchNorm1d", "Linear"])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_sample_is_right(layer, training, where):
    check_module(getattr(gpukern.nn, layer), training=training, device=where)
