#!/usr/bin/env bash
# pickle writes tensors of float8, uint16, uint32 and uint64 without a word, and cannot read them back.
#
# One would guess that a tensor which pickle.dumps takes can be had again by pickle.loads, as those of every older dtype
# can: it is what caches, queues and joblib do. But torch keeps dtypes for which it has no typed storage class in another
# way, by a function that asks the bytes' untyped storage for a dtype, which only the reader of torch.load's files gives
# them. So nothing fails when the data are kept, and all of it when they are needed; torch.save and copy.deepcopy work.
#
# What gpukern does about it: a fused model in fp8 keeps bytes in its pickled state and makes float8 of them again
# (gpukern/fusion/module.py); tests/fusion/quantization/test_pickle.py.
#
# Seen with torch 2.13.0 (2026-11-30), on a CPU:
#   bfloat16: pickle reads it, torch.load reads it
#   int8: pickle reads it, torch.load reads it
#   float8_e4m3fn: pickle raises AttributeError, torch.load reads it
#   uint16: pickle raises AttributeError, torch.load reads it
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
cat >"$folder/pickled.py" <<'PYTHON'
import io
import pickle

import torch

print("torch", torch.__version__.partition("+")[0])
for name in ("bfloat16", "int8", "float8_e4m3fn", "uint16"):
    tensor = torch.tensor([0, 1, 2]).to(getattr(torch, name))
    try:
        again = pickle.loads(pickle.dumps(tensor))
        by_pickle = "reads it" if again.dtype is tensor.dtype else "reads another dtype"
    except AttributeError:
        by_pickle = "raises AttributeError"
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    again = torch.load(file)
    same = again.dtype is tensor.dtype and torch.equal(again.float(), tensor.float())
    print(f"{name}: pickle {by_pickle}, torch.load {'reads it' if same else 'reads something else'}")
PYTHON
PYTHONPATH="$folder/site" python3 "$folder/pickled.py" | tee "$folder/seen"
cat >"$folder/expected" <<'TEXT'
torch 2.13.0
bfloat16: pickle reads it, torch.load reads it
int8: pickle reads it, torch.load reads it
float8_e4m3fn: pickle raises AttributeError, torch.load reads it
uint16: pickle raises AttributeError, torch.load reads it
TEXT
if ! diff "$folder/expected" "$folder/seen"; then
    echo "behaviour changed" >&2
    exit 1
fi
echo "as described"
