"""Compiles a share of the launches for one device and prints what the machine code is made of, a JSON line each.

    python -m tests.compile.worker H100 SHARE OF [--all]

Run without ``GPUKERN_EMULATE``: the interpreter takes the compiler's place. ``--all`` compiles every distinct launch,
not one for each configuration.
"""

from __future__ import annotations

import json
import sys

from gpukern.runtime import device
from gpukern.runtime.compile_only import Launch
from gpukern.runtime.sass import read_sass
from tests.compile.launches import all_launches, configurations


def describe(launch: Launch) -> dict:
    """What :mod:`tests.compile.test_compile` checks."""
    row = {"kernel": launch.kernel, "dtypes": launch.dtypes, "options": {k: str(v) for k, v in launch.options.items()}}
    try:
        sass = read_sass(launch.compile())
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[-2000:]}
    return row | {
        "registers": sass.registers,
        "spills": sass.spills,
        "stack": sass.stack,
        "shared_memory": sass.shared_memory,
        "tensor_core": sass.tensor_core,
        "instructions": sum(sass.instructions.values()),
        "loop": dict(sass.loop),
    }


def main(name: str, share: str, of: str, *options: str) -> None:
    launches = all_launches(getattr(device, name))
    if "--all" not in options:
        launches = configurations(launches)
    for launch in launches[int(share) :: int(of)]:
        print(json.dumps(describe(launch)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
