"""What a run says of where it was made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import environment as module
from bench.environment import environment, flags, run_name, slug
from bench.peers import torch_at_its_best
from gpukern.runtime.mode import EMULATE
from tests.bench import made_up


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A small project in place of this one, with a repository of its own."""
    for name in ("gpukern", "bench/suites", "bench/results", "models"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("gpukern/kernel.py", "gpukern/plans.json", "bench/run.py", "bench/suites/conv.py", "README.md"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("GPUKERN_COMMIT", raising=False)
    # A folder above may be a repository itself.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    yield tmp_path
    forget()


def forget() -> None:
    module.revision.cache_clear()
    module.source_hash.cache_clear()


def git(checkout: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    ran = subprocess.run(
        ["git", "-C", str(checkout), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.fixture
def committed(checkout) -> str:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    forget()
    return git(checkout, "rev-parse", "HEAD")


def source() -> str:
    forget()
    return module.source_hash()


def test_the_source_hash_is_that_of_the_package_s_files(checkout):
    before = source()
    assert len(before) == 16 and source() == before
    (checkout / "README.md").write_text("other")
    (checkout / "gpukern" / "kernel.pyc").write_text("other")
    (checkout / "bench" / "run.py").write_text("other")
    assert source() == before
    hashes = {before}
    for name, text in (("kernel.py", "other"), ("plans.json", "{}"), ("new.cuh", ""), ("newer.py", "")):
        (checkout / "gpukern" / name).write_text(text)
        hashes.add(source())
    (checkout / "gpukern" / "newer.py").rename(checkout / "gpukern" / "renamed.py")
    hashes.add(source())
    assert len(hashes) == 6


def test_the_commit_and_whether_code_differs(checkout, committed):
    assert module.revision() == (committed, False)
    (checkout / "README.md").write_text("other")
    (checkout / "bench" / "results" / "conv.json").write_text("{}")
    forget()
    assert module.revision() == (committed, False)  # neither is code


@pytest.mark.parametrize("name", ["gpukern/kernel.py", "bench/suites/conv.py", "gpukern/not_added.py", "models/new.py"])
def test_changed_and_new_code_is_noticed(name, checkout, committed):
    (checkout / name).write_text("other")
    forget()
    assert module.revision() == (committed, True)
    assert run_name() == f"{committed[:10]}-{module.source_hash()[:8]}"


def test_a_checkout_without_its_git(checkout, monkeypatch):
    forget()
    assert module.revision() == (None, False)
    assert run_name() == module.source_hash()
    monkeypatch.setenv("GPUKERN_COMMIT", "0123456789abcdef")
    forget()
    assert module.revision() == ("0123456789abcdef", False) and run_name() == "0123456789"
    monkeypatch.setenv("GPUKERN_COMMIT", "")
    forget()
    assert module.revision() == (None, False)


def test_a_machine_without_git(checkout, committed, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GPUKERN_COMMIT", "abc")
    forget()
    assert shutil.which("git") is None and module.revision() == ("abc", False)


def test_a_run_is_named_by_what_tells_it_from_others(monkeypatch):
    made = made_up.environment()
    monkeypatch.setattr(module, "source_hash", lambda: made.source)
    for revision, name in {
        (made.commit, False): made.commit[:10],
        (made.commit, True): f"{made.commit[:10]}-{made.source[:8]}",
        (None, False): made.source,
    }.items():
        monkeypatch.setattr(module, "revision", lambda revision=revision: revision)
        assert run_name() == name


def test_a_run_on_a_cpu_is_in_no_gpu_s_folder(monkeypatch):
    monkeypatch.setattr(module, "device_name", lambda device: "Made-up 9000")
    monkeypatch.setattr(module, "run_name", lambda: "commit")
    folders = [str(module.run_folder(torch.device(kind))) for kind in ("cpu", "cuda")]
    assert folders == ["cpu-made-up-9000/commit", "made-up-9000/commit"]


@pytest.mark.parametrize(
    "name, folder",
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Intel(R) Xeon(R) @ 2.20GHz", "intel-r-xeon-r-2-20ghz"),
        ("../a/b", "a-b"), (" A  B ", "a-b"), ("RTX 4090", "rtx-4090"),
    ],
)  # fmt: skip
def test_a_device_s_name_as_a_folder(name, folder):
    assert slug(name) == folder


def test_of_this_machine():
    made = environment(torch.device("cpu"))
    assert made.device and made.device_type == "cpu" and made.torch == torch.__version__
    assert made.driver is None and made.compute_capability is None
    assert made.source == module.source_hash() and made.date.endswith("Z") and len(made.date) == 20
    assert not made.same_setup(environment(torch.device("cpu")))
    assert made.flags.get("GPUKERN_EMULATE", False) is EMULATE


def test_the_flags_are_those_in_force_and_put_back():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = flags(), conv.fp32_precision, matmul.fp32_precision
    for dtype in ("tf32", "float32", "float16"):
        with torch_at_its_best(dtype):
            assert flags()["cudnn.benchmark"] is True and flags()["cudnn.deterministic"] is False
            assert (conv.fp32_precision == "tf32") is matmul.allow_tf32 is (dtype == "tf32")
    assert (flags(), conv.fp32_precision, matmul.fp32_precision) == before
    with pytest.raises(KeyError), torch_at_its_best("tf32"):
        raise KeyError
    assert (flags(), conv.fp32_precision, matmul.fp32_precision) == before
    assert flags()["threads"] == torch.get_num_threads() and os.environ is not None
