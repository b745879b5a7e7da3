"""PyTorch's own samples of the operators and modules that gpukern has."""

import pytest

import gpukern.nn
from gpukern import functional as F
from tests.opinfo import check_errors, check_module, check_samples

pytestmark = [
    pytest.mark.usefixtures("full_fp32"),
    # PyTorch says so of a copy that it makes itself.
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths"),
]

FUNCTIONS = {
    "nn.functional.batch_norm": F.batch_norm,
    "nn.functional.conv2d": F.conv2d,
    "nn.functional.linear": F.linear,
    "nn.functional.max_pool2d": F.max_pool2d,
    "nn.functional.avg_pool2d": F.avg_pool2d,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_right(name, where):
    check_samples(name, FUNCTIONS[name], device=where)


@pytest.mark.parametrize("name", ["nn.functional.max_pool2d", "nn.functional.avg_pool2d", "nn.functional.conv2d"])
def test_every_error_sample_is_refused(name, where):
    check_errors(name, FUNCTIONS[name], device=where)


@pytest.mark.parametrize("layer", ["Conv2d", "BatchNorm2d", "BatchNorm1d", "Linear"])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_sample_is_right(layer, training, where):
    check_module(getattr(gpukern.nn, layer), training=training, device=where)
