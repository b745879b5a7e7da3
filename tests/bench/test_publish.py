"""What was measured, as the README and RESULTS.md show it."""

from __future__ import annotations

import json

import pytest

from bench import publish, results
from tests.bench import made_up


def written(folder, name, made):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path, made)


@pytest.fixture
def folder(tmp_path):
    written(tmp_path, "gpu/old/all.json", made_up.run(1.0, date="2001-01-01T00:00:00Z", commit=made_up.OLD))
    written(tmp_path, "gpu/new/conv.json", made_up.run(2.0, date="2001-01-02T00:00:00Z"))
    (tmp_path / "gpu" / "new" / "other.json").write_text("{}")
    return tmp_path


def test_a_group_is_shown_as_it_was_measured_last(folder):
    (device,) = (devices := publish.newest(folder))
    assert device == made_up.DEVICE
    assert {found.path.parent.name for found in devices[device]} == {"new"}
    page = publish.page(devices, folder)
    assert "gpu/new/conv.json" in page and "gpu/old" not in page


def test_what_runs_on_a_cpu_and_plans_are_left_out(tmp_path):
    written(tmp_path, "cpu/a.json", made_up.run(device_type="cpu"))
    written(tmp_path, "gpu/plans.json", made_up.results([made_up.row(1.0, {"other": 2.0}, suite="plans")]))
    assert publish.newest(tmp_path) == {}


def test_the_table_has_sums_of_layers_and_images_a_second(tmp_path):
    use = made_up.Use("resnet50", "layer1.conv", 3)
    layer = made_up.row(10.0, {"cuDNN": 20.0, "slower": 40.0}, uses=(use,))
    sizes = {"network": "resnet50"}
    network = made_up.row(1000.0, {"PyTorch": 3000.0}, suite="inference", problem="resnet50", sizes=sizes)
    written(tmp_path, "gpu/a.json", made_up.results([layer, network]))
    table = publish.block(publish.newest(tmp_path), tmp_path)
    (line,) = (line for line in table.splitlines() if ": 3 × conv, forward, batch 32" in line)
    ours, theirs, ratio = (float(cell.split()[0].strip("*×")) for cell in line.split("|")[2:5])
    assert "(cuDNN)" in line and (ours, theirs) == pytest.approx((30, 60), rel=0.03)
    assert ratio == pytest.approx(theirs / ours, abs=0.006)
    assert "images/s" in table and "(PyTorch) | **" in table and made_up.DEVICE in table


def test_the_table_has_steps_of_optimizers(tmp_path):
    written(
        tmp_path, "gpu/a.json", made_up.results([made_up.row(10.0, {"cuDNN": 20.0}, uses=(made_up.Use("n", "l", 1),))])
    )
    for day, ours in (("2001-01-01", 9e-4), ("2001-01-02", 2e-4)):
        names = {"gpukern": ours, "torch fused": 5e-4, "torch foreach": 8e-4, "apex": 0.0}
        steps = [
            {"problem": "P", "optimizer": "Adam", "candidate": name, "seconds": taken} for name, taken in names.items()
        ]
        file = {"environment": {"device": made_up.DEVICE, "date": day}, "device": steps}
        (tmp_path / f"{day}.json").write_text(json.dumps(file))
    table = publish.block(publish.newest(tmp_path), tmp_path)
    assert "| step of Adam: P, float32, µs | 200.0 | 500.0 (torch fused) | **2.50×** |" in table


def test_steps_of_optimizers_of_the_suite_take_the_place_of_earlier_ones(tmp_path):
    about = {"suite": "optimizer", "computation": "Adam", "dtype": "float32", "layout": "", "sizes": {"parameters": 9}}
    of = made_up.case(**about, uses=(made_up.Use("resnet50", "plain", 1),))
    row = made_up.row({"eager": [10.0] * 9}, {"torch fused": {"eager": [20.0] * 9}}, of=of)
    written(tmp_path, "gpu/optimizer.json", made_up.results([row]))
    steps = [{"problem": "P", "optimizer": "Adam", "candidate": name, "seconds": 1e-3} for name in ("gpukern", "x")]
    file = {"environment": {"device": made_up.DEVICE, "date": "2001-01-02"}, "device": steps}
    (tmp_path / "old.json").write_text(json.dumps(file))
    table = publish.block(publish.newest(tmp_path), tmp_path)
    assert "| step of Adam: resnet50 plain, float32, µs | 10.00 | 20.00 (torch fused) | **2.00×** |" in table
    assert table.count("step of") == 1 and "1 × optimizer" not in table


def test_the_table_goes_between_its_marks():
    text = f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter"
    shown = publish.within(text, "new")
    assert "old" not in shown and "new" in shown and shown.startswith("before") and shown.endswith("after")
    assert publish.within(shown, "new") == shown
    with pytest.raises(ValueError, match="no place"):
        publish.within("no marks", "new")


def test_the_pages_are_what_the_results_say():
    assert publish.main(["--check"]) == 0


def test_a_stale_page_is_told_and_written(monkeypatch, tmp_path, folder, capsys):
    page, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    readme.write_text(f"{publish.BEGIN}{publish.END}")
    for name, value in (("ROOT", tmp_path), ("RESULTS", folder), ("PAGE", page), ("README", readme)):
        monkeypatch.setattr(publish, name, value)
    assert publish.main(["--check"]) == 1 and not page.exists()
    assert publish.main([]) == 0 and publish.main(["--check"]) == 0
    assert "RESULTS.md: written" in capsys.readouterr().out
