"""``make gate``: compiles every launch for every architecture and lists what its code lacks. See ``README.md``."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import sys

from rich.console import Console
from rich.progress import Progress

from tests.compile.cache import Rows
from tests.compile.configurations import ALL_ARCHITECTURES
from tests.compile.faults import faults
from tests.compile.launches import KINDS
from tests.compile.test_compile import compile_piece, of_interest

SHARES = 4


def main() -> int:
    console = Console()
    shares = [f"{share}/{SHARES}" for share in range(SHARES)]
    # The A100 has no conversion from or to float8.
    pieces = [
        piece for piece in itertools.product(ALL_ARCHITECTURES, KINDS, shares) if piece[:2] != ("sm_80", "float8")
    ]
    kernels = wrong = 0
    with (
        Progress(console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        bar = progress.add_task("compiling", total=len(pieces))
        running = {pool.submit(compile_piece, *piece, "--every"): piece for piece in pieces}
        for done in concurrent.futures.as_completed(running):
            architecture, kind, _ = running[done]
            for row in done.result():
                kernels += 1
                if found := faults(row):
                    wrong += 1
                    console.print(f"{architecture} {kind}: {'; '.join(found)}: {of_interest(row)}", markup=False)
            progress.advance(bar)
    Rows().forget_old()
    console.print(f"{kernels} kernels read, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
