#!/usr/bin/env bash
# What to run on a GPU machine, in stages: bash bench/gpu.sh first|second|more|check|tune|bench|profile
#
# LEASE.md tells it step by step: `first` takes five minutes and says most, `second` seven, `more` as long as there is.
# Needs PyTorch, Triton, pytest and this checkout, nothing installed. A stage does the most valuable first, stops before
# its time is up (MINUTES; 5 for first, 7 for second, 9 for the others) and goes on there when run again; its last lines
# are the verdict. Files go to bench/results/DEVICE/COMMIT/ and, where OUT is set, all of them every ten seconds as
# $OUT/results.tar.gz: unpacked in bench/results of a checkout, they are what the next machine goes on from.
# GPUKERN_COMMIT names the commit where the checkout came without its git.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m bench.stages "$@"
