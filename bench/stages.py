"""The stages of ``bench/gpu.sh``, each a list of steps in the order of their value."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import gpukern
from bench import results
from bench.command import RESULTS
from bench.environment import run_folder, slug
from bench.lease import carried
from bench.lease.calls import MINUTES, first, second
from bench.report import group_title, is_network, page, record
from bench.report.summary import Group, summarize
from bench.results import Case
from bench.steps import Step, run_stage, suite_step


def check(folder: Path) -> list[Step]:
    """Every test on the GPU, then the kernels' tests once more under compute-sanitizer."""
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))

    def tests(name: str, *paths: str) -> Step:
        pytest = (sys.executable, "-m", "pytest", "-q", "-n", workers, "--maxfail=50", "--durations=5", *paths)
        return Step(name, pytest)

    def sanitized(tool: str, name: str, chosen: str) -> Step:
        program = "compute-sanitizer"
        command = (program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5")
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"tests/ops/test_{name}.py", "-k", chosen)
        # PyTorch's allocator hands out parts of large blocks, in which an access out of bounds stays unseen.
        return Step(f"{tool}-{name}", (*command, *pytest), program, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    norm_layers = "batch_norm_layers", "conv_batch_norm"
    others = "conv2d_grouped", "conv_transpose2d", "conv_max_pool2d"
    most = {
        "conv2d": "forward_and_gradients and float16",
        "pool2d": "dtypes_and_layouts",
        "batch_norm": "dtypes_and_layouts and float16",
        "linear": "forward_and_gradients and float16",
    }
    return [
        Step("info", (sys.executable, "-c", "from gpukern.cli import app; app()", "info")),
        *(tests(name, f"tests/ops/test_{name}.py") for name in ("conv2d", "linear", "pool2d", "activation")),
        tests("batch-norm", "tests/ops/test_batch_norm.py", *(f"tests/ops/test_{name}.py" for name in norm_layers)),
        tests("fuse", "tests/fusion"),
        tests("optimizers", "tests/optim"),
        tests("other-convolutions", *(f"tests/ops/test_{name}.py" for name in others)),
        tests("layers", "tests/test_integration.py", "tests/test_convert.py", "tests/test_operators.py"),
        *(sanitized("memcheck", name, chosen) for name, chosen in most.items()),
        *(sanitized("racecheck", name, chosen) for name, chosen in most.items()),
        tests("rest-of-ops", "tests/ops", "tests/runtime"),
        tests("everything", "tests"),
    ]


def tune(folder: Path) -> list[Step]:
    """Other plans beside the chosen ones, for the layers that most of a network's time goes to."""

    # Many candidates a row: few samples of each.
    step = functools.partial(suite_step, folder, "plans", seconds="0.05")
    return [
        step("forward-32", "--computation", "forward"),
        step("input-gradient-32", "--computation", "input gradient"),
        step("weight-gradient-32", "--computation", "weight gradient"),
        step("forward-1", "--computation", "forward", "--batch", "1"),
        step("forward-128", "--computation", "forward", "--batch", "128"),
        step("mobilenet-32", "--suite", "mobilenet_v2", "--filter", "groups"),
        step("tf32-32", "--dtype", "tf32"),
    ]


def bench(folder: Path) -> list[Step]:
    """The suites against their peers: what most people ask first, first; who compiles for each row after the libraries,
    who tries everything last."""
    step = functools.partial(suite_step, folder)
    library, everyone = ("--peers", "library"), ("--peers", "library", "--peers", "compile")
    compilers = *everyone, "--peers", "max-autotune"
    eight = "--peers", "int8", "--peers", "fp8"
    segmentation = "--suite", "ciresan_dense", "--suite", "unet", "--batch", "1"
    everything, batches = ("--suite", "all"), ("--batch", "128", "--batch", "32", "--batch", "1")
    return [
        step("inference", "resnet50", *library, "--suite", "resnet50", *batches),
        step("inference", "resnet50-8-bits", *library, *eight, "--suite", "resnet50", *batches),
        step("inference", "segmentation", *library, *segmentation),
        step("conv", "resnet50-32", *library),
        step("epilogue", "resnet50-32", *library),
        step("optimizer", "all"),
        step("model", "resnet50-32", *library),
        step("norm", "resnet50-32", *library),
        step("augment", "all", *library),
        step("inference", "all", *library),
        step("pool", "all-32", *library, *everything),
        step("linear", "all-32", *library, *everything),
        step("conv", "resnet50-1", *library, "--batch", "1"),
        step("conv", "resnet50-128", *library, "--batch", "128"),
        step("conv", "mobilenet-32", *library, "--suite", "mobilenet_v2", "--suite", "efficientnet_b0"),
        step("epilogue", "resnet50-1", *library, "--batch", "1"),
        step("conv", "resnet50-tf32", *library, "--dtype", "tf32"),
        step("conv", "resnet50-nchw", *library, "--layout", "nchw"),
        step("model", "all-32", *library, *everything),
        step("conv", "all-32", *library, *everything),
        step("conv", "resnet50-bf16", *library, "--dtype", "bf16"),
        step("conv", "resnet50-fp32", *library, "--dtype", "fp32"),
        step("inference", "resnet50-compile", *everyone, *eight, "--suite", "resnet50", *batches),
        step("inference", "segmentation-compile", *everyone, *segmentation),
        step("inference", "all-compile", *everyone),
        step("model", "resnet50-compile", *everyone),
        step("inference", "resnet50-max", *compilers, "--suite", "resnet50", *batches),
        step("inference", "max", *compilers),
        step("epilogue", "max", *compilers),
        step("conv", "max", *compilers, "--computation", "forward"),
    ]


def profile(folder: Path) -> list[Step]:
    """Nsight Compute on gpukern's kernels of the three rows that lose most."""
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
    ours = f"regex:^({'|'.join(kernel_names())})$"
    # The clocks stay as they are: they are the machine's to set.
    ncu = ["ncu", "--clock-control", "none", "--launch-count", "4", "--kernel-name", ours]
    for section in sections:
        ncu += ["--section", section]
    # Named by the row: after another measurement other rows are the worst, and not done yet.
    return [Step(f"row-{slug(case.key)}", (*ncu, *_alone(case)), "ncu") for case in worst_rows(folder)]


def _alone(case: Case) -> list[str]:
    """Return the command that measures gpukern alone on one row; its times, under a profiler, are kept apart."""
    options = {
        "--suite": case.uses[0].network,
        "--batch": str(case.batch),
        "--dtype": case.dtype,
        "--layout": case.layout,
        "--computation": case.computation,
        "--filter": case.key,
        "--peers": "none",
        "--seconds": "0",
        "--out": str(Path(tempfile.gettempdir()) / "gpukern-profile"),
    }
    given = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "bench", case.suite, "--fresh", *given]


def kernel_names() -> list[str]:
    """Return the names of all of gpukern's kernels, read from its source: importing them would need Triton."""
    sources = (path.read_text(encoding="utf-8") for path in Path(gpukern.__file__).parent.rglob("*.py"))
    return sorted({name for source in sources for name in re.findall(r"jit(?:\(.*\))?\ndef (\w+_kernel)\(", source)})


def more(folder: Path) -> list[Step]:
    """Whatever is not measured yet: other plans, the other suites, who compiles for long, and compute-sanitizer."""
    sanitized = [step for step in check(folder) if step.needs]
    return [*tune(folder), *bench(folder), *sanitized]


def worst_rows(folder: Path, number: int = 3) -> list[Case]:
    """The rows where the best peer is furthest ahead, the worst first.

    Plans are no peers, and of a network a profile of a few launches would show its first layers.
    """
    found = [
        (line.best.median, line.row.case)
        for group in _groups(folder)
        for line in group.lines
        if line.best is not None and group.key.suite != "plans" and not is_network(line.row.case)
    ]
    return [case for _, case in sorted(found, key=lambda each: each[0])[:number]]


def headlines(folder: Path) -> Iterator[str]:
    """A line a group of rows: how gpukern does against the best peer of each."""
    for group in _groups(folder):
        best = group.tallies[0]
        mean = "nothing to compare" if best.mean is None else f"{best.mean:.2f}×"
        broken = f", {group.broken} rows of gpukern not ok" if group.broken else ""
        yield f"{mean}  {group_title(group.key)}: {record(best.wins, best.losses, best.ties)}{broken}"


def _groups(folder: Path) -> Iterator[Group]:
    return (group for _, read in results.read_all([folder]) for group in summarize(read))


STAGES: dict[str, Callable[[Path], list[Step]]] = {
    stage.__name__: stage for stage in (first, second, more, check, tune, bench, profile)
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in STAGES:
        print(f"usage: bash bench/gpu.sh {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench/gpu.sh: no CUDA device here, and every stage needs one", file=sys.stderr)
        return 1
    # Then a step that runs is stopped too, instead of living on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stage = arguments[0]
    place = run_folder(torch.device("cuda"))
    folder = RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(carried.FOLDER)
    print(carried.unpack(), flush=True)
    steps = STAGES[stage](folder)
    if not steps:
        print(f"{stage}: nothing to do: no measured rows in {folder}; run bench first", file=sys.stderr)
        return 1
    # After each step: whatever ends this machine, what was done is there.
    pack = functools.partial(_pack, folder, place, os.environ.get("OUT"))
    usual = MINUTES.get(stage, 9.0)
    minutes = float(os.environ.get("MINUTES") or usual)
    steps = [replace(step, limit=step.limit * max(1.0, minutes / usual)) for step in steps]
    if os.environ.get("LEASE_DRY"):
        steps = [step for step in steps if step.dry]
    status = run_stage(stage, steps, folder, 60 * minutes, after_each=pack)
    if stage not in ("check", "profile"):
        files = list(results.read_all([folder]))
        results.write_text(folder / "report.html", page.render(files))
        print("\nagainst the best of the others on each row (above 1: gpukern is faster)")
        print("\n".join(headlines(folder)))
    pack()
    return status


def _pack(folder: Path, place: Path, out: str | None) -> None:
    """All files of ``folder`` as an archive in ``out``, to be unpacked in bench/results; a step may be writing them."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        partial = Path(out) / ".results.tar.gz"
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
                    content = path.read_bytes()
                    about = archive.gettarinfo(path, str(place / path.name))
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
        partial.replace(Path(out) / "results.tar.gz")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
