"""``make demo``, end to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gpukern
from models import demo

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_demo(start):
    process = start("models.demo", threads=2)
    output, _ = process.communicate(timeout=420)
    assert process.returncode == 0, output
    assert re.search(r"Layers run in (reference|kernels) mode", output)
    assert "Conv (C_out=20, K=5, P=2, S=1)   20 × 28 × 28   20 × 1 × 5 × 5" in output
    reached = float(re.search(r"held-out accuracy ([\d.]+)% \(97% required\): ok", output)[1])
    assert reached >= 97
    rows = re.findall(r"^ *(logits|∂L/∂\S+) +(\S+) +(\S+) +(\S+)", output, re.MULTILINE)
    assert len(rows) == 12
    assert all(float(error) <= float(bound) and verdict == "ok" for _, error, bound, verdict in rows)
    assert "kernels within their bounds: ok" in output
    assert "fused network computes the same: ok" in output
    assert "<html" in (ROOT / demo.OUT / demo.PAGE).read_text()
    assert gpukern.load(ROOT / demo.OUT / demo.FUSED).report.fused
    for name in ("loss.png", "filters.png"):
        assert str(demo.OUT / name) in output
        assert (ROOT / demo.OUT / name).read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in output


def test_it_trains_with_gpukerns_optimizer():
    assert isinstance(demo.CONFIG.make_optimizer([torch.nn.Parameter(torch.zeros(1))]), gpukern.optim.Adam)


def test_what_a_gpu_lacks_is_one_clear_line(monkeypatch, capsys):
    def fails(device, console):
        raise RuntimeError("pip install cupy-cuda12x")

    monkeypatch.setattr(demo, "_train", fails)
    with pytest.raises(demo.typer.Exit) as exit:
        demo.main()
    assert exit.value.exit_code == 1 and "error: pip install cupy-cuda12x" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["demo", "train", "optimizers"])
@pytest.mark.parametrize("module, package", [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")])
def test_what_a_bare_install_lacks_is_one_clear_line(program, module, package, run_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where some write
    result = run_python(
        f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_module('models.{program}', {{}}, '__main__')"
    )
    printed = result.stdout + result.stderr
    assert result.returncode == 1 and "Traceback" not in printed
    assert f"error: {package} is missing, of the extra demo: pip install -e '.[demo]'" in printed


@pytest.mark.parametrize(
    ("accuracy", "error", "fused", "code"),
    [(0.99, 1e-7, True, 0), (0.96, 1e-7, True, 1), (0.99, 1.0, True, 1), (0.99, 1e-7, False, 1)],
)
def test_exit_status(monkeypatch, tmp_path, accuracy, error, fused, code):
    class Trained:
        accuracies = (accuracy,)
        device = None
        data = type("Data", (), {"name": "nothing"})

    monkeypatch.setattr(demo, "_train", lambda device, console: Trained)
    monkeypatch.setattr(demo, "_prove", lambda device, console: [demo.Comparison("logits", error, 1e-5)])
    monkeypatch.setattr(demo, "_fuse", lambda trainer, console: fused)
    monkeypatch.setattr(demo, "save_plots", lambda *arguments: (tmp_path,) * 3)
    with pytest.raises(demo.typer.Exit) as exit:
        demo.main()
    assert exit.value.exit_code == code
