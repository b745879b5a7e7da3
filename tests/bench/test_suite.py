"""Suites and their tasks: read off the networks, each once, and named so that no two are taken for one."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from bench import command, results
from bench.layers import layer_calls
from bench.measure import measure
from bench.suite import SUITES, Selection, merged, register, suites, tasks
from bench.suites.pool import Kind, Pool
from gpukern.ops._pool2d.problem import pool_problem
from models.zoo import NETWORKS
from tests.bench.tiny import CPU, QUICK, Products

LAYERS = ("conv", "epilogue", "pool", "linear", "plans")


def select(suite, *networks: str, batches=(32,), **others) -> list:
    all_of = {"dtypes": suite.dtypes[:1], "layouts": suite.layouts[:1], "computations": suite.computations}
    return tasks(suite, Selection(networks, batches, **(all_of | others)))


def counts(suite: str, network: str, batch: int = 32) -> list[int]:
    return [use.count for use, _ in suites()[suite].problems(network, batch)]


# ---- layer lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suite, network, layers, distinct",
    [
        ("conv", "resnet50", 53, 23), ("conv", "resnet18", 20, 11), ("conv", "vgg16", 13, 9), ("conv", "lenet", 2, 2),
        ("conv", "mobilenet_v2", 52, None), ("conv", "efficientnet_b0", 81, None), ("conv", "convnext_tiny", 22, None),
        ("linear", "convnext_tiny", 37, None), ("linear", "vgg16", 3, 3), ("pool", "resnet50", 2, 2),
        ("pool", "vgg16", 6, 6), ("pool", "unet", 4, 4), ("pool", "lenet", 2, 2),
    ],
)  # fmt: skip
def test_the_known_numbers_of_layers(suite, network, layers, distinct):
    found = counts(suite, network)
    assert sum(found) == layers
    assert distinct is None or len(found) == distinct


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_of_a_network_is_counted_once(network):
    """Against the modules that the network has, which its forward calls once each, but for U-Net's one pool."""
    with torch.device("meta"):
        modules = list(NETWORKS[network].make().modules())
    pools = torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d
    for suite, kinds in (("conv", (torch.nn.Conv2d,)), ("linear", (torch.nn.Linear,)), ("pool", pools)):
        calls = 4 if (suite, network) == ("pool", "unet") else sum(type(module) in kinds for module in modules)
        assert sum(counts(suite, network)) == calls, suite


@pytest.mark.parametrize(
    "network, published",
    [("resnet18", 1.814), ("resnet50", 4.089), ("vgg16", 15.47), ("mobilenet_v2", 0.301), ("efficientnet_b0", 0.386)],
)
def test_the_layers_make_up_the_published_multiply_adds(network, published):
    """torchvision's table of models, in 10⁹ for one image: wrong sizes, groups or counts would show."""
    total = 0
    for use, problem in suites()["conv"].problems(network, 1):
        sizes = suites()["conv"].describe(problem)[1]
        each = math.prod(sizes[name] for name in ("N", "K", "P", "Q", "C", "R", "S")) / sizes["groups"]
        total += use.count * each
    total += sum(use.count * p.rows * p.inputs * p.outputs for use, p in suites()["linear"].problems(network, 1))
    assert total / 1e9 == pytest.approx(published, rel=0.003)


def test_depthwise_layers_keep_their_groups():
    found = [(use.count, p) for use, p in suites()["conv"].problems("mobilenet_v2", 8)]
    assert sum(count for count, p in found if p.groups == p.C == p.K) == 17
    assert sum(count for count, p in found if p.groups == 1) == 35
    assert all(p.N == 8 for _, p in found)


def test_a_layer_is_named_as_in_the_network():
    with torch.device("meta"):
        names = dict(NETWORKS["resnet50"].make().named_modules())
    for call in layer_calls("resnet50", 2):
        assert names[call.name].__class__ is call.module.__class__
    uses = [use for use, _ in suites()["conv"].problems("resnet50", 2)]
    assert uses[0].layer == "conv1" and all(isinstance(names[use.layer], torch.nn.Conv2d) for use in uses)


# ---- tasks ---------------------------------------------------------------------------------------------------------


def test_a_problem_of_two_networks_is_one_task_with_two_uses():
    conv = suites()["conv"]
    both = select(conv, "resnet18", "resnet50", computations=("forward",))
    shared = [task for task in both if len(task.case.uses) == 2]
    # The stem, and the 3 × 3 convolutions of stride 1 and 2 that bottlenecks have too.
    assert shared and all({use.network for use in task.case.uses} == {"resnet18", "resnet50"} for task in shared)
    assert "conv1" in {task.case.uses[0].layer for task in shared}
    for network, layers in (("resnet18", 20), ("resnet50", 53)):
        assert sum(use.count for task in both for use in task.case.uses if use.network == network) == layers
    assert len(both) == 11 + 23 - len(shared)


def test_a_network_asked_for_twice_counts_once():
    conv = suites()["conv"]
    assert select(conv, "lenet", "lenet") == select(conv, "lenet")
    a, b, newer = (results.Use(*each) for each in (("a", "x", 1), ("b", "y", 2), ("a", "z", 3)))
    assert merged((a, b), (newer,)) == (newer, b)


@pytest.mark.parametrize("name", [*LAYERS, "model", "inference"])
def test_different_tasks_have_different_keys(name):
    """Whatever decides the time is in the words: batch, computation, dtype, layout, and every size."""
    suite = suites()[name]
    chosen = {"dtypes": suite.dtypes, "layouts": suite.layouts}
    found = select(suite, *NETWORKS, batches=(7, 11), **chosen)
    assert len({task.case.key for task in found}) == len(found) > 0
    # tasks() merges equal keys: no two problems may have fallen into one.
    described = {}
    for network in NETWORKS:
        for batch in (7, 11):
            for _, problem in suite.problems(network, batch):
                words, sizes = suite.describe(problem)
                described.setdefault(words, []).append(sizes)
                assert json.loads(json.dumps(sizes)) == sizes  # a tuple would come back as a list
    assert all(sizes == each[0] for each in described.values() for sizes in each)
    seven, eleven = ({t.case.problem for t in select(suite, *NETWORKS, batches=(b,))} for b in (7, 11))
    assert not seven & eleven
    if name != "linear":  # rows of a matrix are pixels too
        assert all(f"{task.case.batch}×" in task.case.problem for task in found)


@pytest.mark.parametrize("name", [*LAYERS, "model", "inference"])
def test_every_suite_has_every_network_that_it_can(name):
    networks = {use.network for task in select(suites()[name], *NETWORKS) for use in task.case.uses}
    without = {"pool": {"convnext_tiny"} - networks, "linear": {"unet", "ciresan_dense"}}.get(name, set())
    assert networks == set(NETWORKS) - without


def test_pools_that_differ_in_one_option_are_not_taken_for_one():
    def pool(kind=Kind.AVERAGE, padding=(1, 1), dilation=(1, 1), ceil_mode=False, *rest):
        return Pool(kind, pool_problem((2, 4, 8, 8), (3, 3), (2, 2), padding, dilation, ceil_mode, *rest))

    variants = [
        pool(), pool(Kind.MAX), pool(padding=(0, 0)), pool(Kind.MAX, dilation=(2, 2)), pool(ceil_mode=True),
        pool(Kind.AVERAGE, (1, 1), (1, 1), False, False), pool(Kind.AVERAGE, (1, 1), (1, 1), False, True, 5),
    ]  # fmt: skip
    words, sizes = zip(*map(suites()["pool"].describe, variants), strict=True)
    assert len(set(words)) == len(variants)
    assert len(set(map(json.dumps, sizes))) == len(variants)


def test_nobody_asks_for_the_gradient_of_an_image():
    for name in ("conv", "plans"):
        found = select(suites()[name], "resnet50", "lenet")
        gradients = [t for t in found if t.case.computation == "input gradient"]
        images = [t for t in found if t.problem.C in (1, 3)]
        assert {t.case.computation for t in images} == {"forward", "weight gradient"}
        assert len(gradients) == len([t for t in found if t.case.computation == "forward"]) - 2
    pools = Counter(t.case.computation for t in select(suites()["pool"], "resnet50"))
    assert pools == {"forward": 2, "forward for training": 1, "backward": 2}
    assert suites()["conv"].steps(images[0].problem, training=True) == ("forward", "weight gradient")
    assert suites()["conv"].steps(images[0].problem, training=False) == ("forward",)


def test_a_selection_takes_nothing_but_what_it_names():
    conv = suites()["conv"]
    found = select(conv, "resnet50", batches=(2, 3), dtypes=("tf32", "float16"), layouts=("NCHW",))
    assert {t.case.batch for t in found} == {2, 3} and {t.case.layout for t in found} == {"NCHW"}
    assert {t.case.dtype for t in found} == {"tf32", "float16"}
    by_layer = select(conv, "resnet50", containing="layer2.0.conv2")
    assert {t.case.uses[0].layer for t in by_layer} == {"layer2.0.conv2"} and len(by_layer) == 3
    by_size = select(conv, "resnet50", containing="64×3×7×7")
    assert {t.case.uses[0].layer for t in by_size} == {"conv1"}
    assert not select(conv, "resnet50", containing="no such thing")
    assert not select(conv, "resnet50", computations=())
    # A key is that of one row, though others begin with it: with gradients in a bucket.
    steps = select(suites()["optimizer"], "lenet", computations=("Adam",))
    assert [select(suites()["optimizer"], "lenet", containing=t.case.key) for t in steps] == [[t] for t in steps]


# ---- new suites ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    suite = Products()
    register(suite)
    yield suite
    del SUITES[suite.name]


def test_a_new_suite_is_measured_and_has_its_command(registered, tmp_path):
    """No other file knows of it."""
    assert suites()["tiny"] is registered
    row = measure(registered, select(registered, "lenet")[0], QUICK, CPU)
    assert [(c.name, c.status) for c in row.candidates] == [("gpukern", "ok"), ("torch", "ok")]
    app = Typer()
    app.command("tiny")(command.of(registered))
    ran = CliRunner().invoke(app, ["--cpu", "--suite", "lenet", "--seconds", "0", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    (path,) = tmp_path.rglob("tiny.json")
    assert len(results.read(path).rows) == 5 and path.with_suffix(".html").exists()
    assert "Small products" in CliRunner().invoke(app, ["--help"]).output


def test_two_suites_of_one_name_are_refused(registered):
    with pytest.raises(ValueError, match="two suites are called tiny"):
        register(Products())
    assert SUITES["tiny"] is registered
