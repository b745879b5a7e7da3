"""Networks of the lecture on gpukern's layers, their data and their training. Run from a checkout, never installed."""

import os

# Threads that wait for one another by spinning train ten times slower as soon as another process wants a core. The
# OpenMP of PyTorch reads this when it is loaded, so it is set before the first import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
