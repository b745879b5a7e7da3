"""Bytes that norms move, counted without a GPU."""

from __future__ import annotations

import json

#: Of two sizes: a group of 64 × 56 × 56 has two channels, 6,272 values, one of 320 × 64 × 64 has 40,960.
_ROWS = """
import json
import torch
from bench import norms
from gpukern.runtime.device import H100
sizes = ((64, 56, 56), (512, 14, 14), (320, 64, 64))
norms.NORMS = {name: norms.NORMS[name]._replace(sizes=sizes) for name in ("group norm", "instance norm")} | {
    name: norms.NORMS[name]._replace(sizes=((784, 96),)) for name in ("layer norm", "RMS norm")
} | {"cross entropy": norms.NORMS["cross entropy"]._replace(sizes=((64, 2000),))
}
print(json.dumps([(*row[:4], row.ours, row.torchs, row.floor) for row in norms.rows(8, torch.float16, H100)]))
"""


def test_every_tensor_is_read_once_where_a_group_fits_a_program(run_python):
    result = run_python(_ROWS)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    images = [row for row in rows if row[2] != "rows"]
    assert len(images) == 2 * 3 * 2 * 2 and len(rows) == len(images) + 3 * 2
    for norm, _, _, direction, (_, ours), (_, theirs), floor in rows[len(images) :]:
        assert ours <= 1.1 * floor and theirs >= floor, (norm, direction, ours / floor)
    for norm, shape, layout, direction, (launches, ours), (_, theirs), floor in images:
        what = norm, shape, layout, direction, ours / floor
        channels = shape[1] // 32 if norm == "group norm" else 1
        # In channels_last a program's share of 3,136 pixels is as narrow as 8 bytes in the backward: two passes.
        narrow = layout == "channels_last" and shape[2] >= 56
        once = channels * shape[2] * shape[3] < 16384 and not (narrow and direction == "backward")
        if once and not (narrow and shape[2] == 64):
            assert launches == 1 and ours <= 1.1 * floor, what
        assert ours < 1.75 * floor, what
        assert theirs >= 1.4 * floor, what
