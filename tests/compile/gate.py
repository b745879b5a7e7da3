"""``make gate``: compiles every distinct launch for every architecture and lists what its code lacks."""

from __future__ import annotations

import concurrent.futures
import os
import sys

from rich.console import Console
from rich.progress import Progress

from gpukern.runtime import device
from tests.compile.test_compile import compile_share, faults

ARCHITECTURES = ("A100", "H100")
SHARES = 40


def main() -> int:
    console = Console()
    tasks = [(architecture, share) for share in range(SHARES) for architecture in ARCHITECTURES]
    kernels = wrong = 0
    with (
        Progress(console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        bar = progress.add_task("compiling", total=len(tasks))
        running = {pool.submit(compile_share, *task, SHARES, "--all"): task[0] for task in tasks}
        for done in concurrent.futures.as_completed(running):
            architecture = running[done]
            for row in done.result():
                kernels += 1
                if found := faults(row, getattr(device, architecture).shared_memory):
                    wrong += 1
                    console.print(f"{architecture}: {'; '.join(found)}: {row}", markup=False)
            progress.advance(bar)
    console.print(f"{kernels} kernels compiled, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
