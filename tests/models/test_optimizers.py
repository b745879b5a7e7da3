"""The comparison of the optimizers: their paths, its pictures, its command."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from models import optimizer_plots
from models.optimizer_plots import LOOKS, plot_losses, plot_paths
from models.paths import BOWL, SADDLE, SURFACES, path
from models.trainer import OPTIMIZERS, Config
from tests.models.idx import write_dataset

pytestmark = pytest.mark.usefixtures("reference_mode")


def test_paths_are_those_of_the_lectures_formulas():
    """``v = ρ v + ∂ε/∂θ``, ``θ = θ − α v``, of ½ (x² + 20 y²) with ρ = 0 and 0.9."""
    for name, rho in (("sgd", 0.0), ("momentum", 0.9)):
        theta, v = np.array(BOWL.start), 0.0
        for reached in path(BOWL, name)[1:]:
            v = rho * v + theta * (1, 20)
            theta = theta - BOWL.rates[name] * v
            assert reached == pytest.approx(theta, abs=1e-4)


def test_sgd_jitters_in_the_steep_direction():
    steep = path(BOWL, "sgd")[:, 1]
    assert (np.sign(steep[1:20]) == -np.sign(steep[:19])).all()


def test_adagrad_slows_down():
    lengths = np.linalg.norm(np.diff(path(BOWL, "adagrad"), axis=0), axis=1)
    assert (np.diff(lengths) < 0).all() and lengths[-1] < 0.15 * lengths[0]


def test_all_but_sgd_leave_the_saddle_soon():
    steps = {name: len(path(SADDLE, name)) - 1 for name in SADDLE.rates}
    assert SADDLE.holds(*path(SADDLE, "sgd")[-1]) and steps.pop("sgd") == SADDLE.steps
    assert max(steps.values()) < SADDLE.steps / 2
    assert not any(SADDLE.holds(*path(SADDLE, name)[-1]) for name in steps)


def test_a_path_ends_where_it_leaves_the_frame():
    places = path(SADDLE, "adam")
    assert all(SADDLE.holds(*place) for place in places[:-1])
    cut = optimizer_plots._cut(SADDLE, *places[-2:])
    assert cut[1] == pytest.approx(SADDLE.frame[3]) and places[-2][0] < cut[0] < places[-1][0]


def test_every_optimizer_of_the_lecture_has_a_look():
    assert LOOKS.keys() <= OPTIMIZERS.keys()
    assert len({colour for _, colour in LOOKS.values()}) == len(LOOKS)
    assert all(surface.rates.keys() <= LOOKS.keys() for surface in SURFACES)


class Trained:
    def __init__(self, optimizer: str, losses: list[float]) -> None:
        self.config, self.losses, self.train, self.batch_size = Config(optimizer=optimizer), losses, range(8), 4


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in place of the files."""
    figures = []
    monkeypatch.setattr(optimizer_plots, "written", lambda figure, path: figures.append(figure))
    return figures


def test_labels_stand_beside_the_ends_and_apart(drawn, tmp_path):
    ends = {"sgd": 1.0, "adam": 1e-3, "adamw": 1.01e-3, "momentum": 1.02e-3, "rmsprop": 0.0}
    plot_losses(tmp_path, [Trained(name, [2.0, end, end, end]) for name, end in ends.items()], "t")
    (axes,) = drawn[0].axes
    heights = {text.get_text().split(",")[0]: text.get_position()[1] for text in axes.texts}
    assert list(sorted(heights, key=heights.get)) == ["RMSprop", "Adam", "AdamW", "Momentum", "SGD"]
    assert (np.diff(sorted(heights.values())) > 0.05).all() and max(heights.values()) <= 1
    assert len(axes.lines) == len(ends) and (axes.lines[-1].get_ydata() > 0).all()


def test_a_panel_for_each_path(drawn, tmp_path):
    plot_paths(tmp_path)
    titles = [axes.get_title() for axes in drawn[0].findobj(Axes)]
    for surface in SURFACES:
        for name, rate in surface.rates.items():
            assert sum(title.startswith(f"{LOOKS[name][0]}, rate {rate:g}: ") for title in titles) >= 1
    assert sum("gone at step" in title for title in titles) == len(SADDLE.rates) - 1
    assert len(titles) == len(BOWL.rates) + len(SADDLE.rates)


@pytest.mark.slow
def test_the_command(start, tmp_path):
    dataset = write_dataset(tmp_path / "idx", train=60, held_out=20)
    outputs = []
    for run in ("first", "second"):
        process = start("models.optimizers", "--epochs", 2, "--data", dataset, "--out", tmp_path / run)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        # All but the seconds.
        outputs.append(re.findall(r"^(\w+ +0\.\d+ +\S+ +\S+% +\S+%) +\d+$", output, re.MULTILINE))
        for name in ("optimizers.png", "optimizer-paths.png"):
            assert (tmp_path / run / name).read_bytes().startswith(b"\x89PNG") and name in output
        assert "\x1b" not in output
    assert [line.split()[0] for line in outputs[0]] == [title for title, _ in LOOKS.values()]
    assert outputs[0] == outputs[1]
    assert len({line.split()[2] for line in outputs[0]}) > len(OPTIMIZERS) // 2, "the optimizers differ"


def test_errors_are_one_clear_line(start, tmp_path):
    process = start("models.optimizers", "--data", tmp_path / "none")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: " in output and "none: no such directory" in output
    assert "Traceback" not in output
