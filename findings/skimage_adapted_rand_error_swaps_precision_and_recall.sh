#!/usr/bin/env bash
# scikit-image's adapted_rand_error gives precision where its documentation has recall, and the other way round.
#
# One would guess that (error, precision, recall) are what the docstring says: pairs of pixels that are together in both
# images, divided by the pairs together in the test image (precision), in the true image (recall). A test image that
# merges two cells must then have a low precision and a recall of 1. It is returned as precision 1 and recall 0.48, and
# an oversegmentation the other way round; alpha, too, weighs the other one of the two. The error at alpha = 1/2 is
# symmetric, so nobody who looks at it alone notices; who tunes a segmentation by the two goes the wrong way.
#
# What gpukern does about it: models/membranes/metrics.py computes V-Rand from the contingency table itself, with a test
# of one merge and one split by hand.
#
# Seen with scikit-image 0.26.0 (2026-11-30):
#   two cells merged: precision 1.000, recall 0.484; documented 0.484, 1.000
#   two cells split:  precision 0.467, recall 1.000; documented 1.000, 0.467
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" scikit-image==0.26.0 numpy==2.4.6
cat >"$folder/merge.py" <<'PYTHON'
import sys

import numpy as np
import skimage
from skimage.metrics import adapted_rand_error

truth = np.ones((4, 8), int)
truth[:, 4:] = 2
merged, split = np.ones_like(truth), truth.copy()
split[2:] += 2


def documented(test):
    """Pairs of pixels: together in both, over together in the test image, and over together in the true one."""
    a, b = truth.ravel(), test.ravel()
    pairs = np.triu(np.ones((a.size, a.size), bool), 1)
    true, tested = (((labels[:, None] == labels) & pairs) for labels in (a, b))
    both = (true & tested).sum()
    return both / tested.sum(), both / true.sum()


swapped = True
for name, test in (("merged", merged), ("split", split)):
    _, precision, recall = adapted_rand_error(truth, test)
    told = documented(test)
    print(f"two cells {name}: precision {precision:.3f}, recall {recall:.3f}; documented {told[0]:.3f}, {told[1]:.3f}")
    swapped &= np.allclose((precision, recall), told[::-1]) and not np.allclose(precision, recall)
print("scikit-image", skimage.__version__)
sys.exit(0 if swapped else "the behaviour changed")
PYTHON
PYTHONPATH="$folder/site" python3 "$folder/merge.py"
