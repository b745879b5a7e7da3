"""On the path of a dry run alone: every Python process of it gets a GPU that is not there."""

import os

if os.environ.get("LEASE_DRY"):
    from bench.lease.pretend import pretend_gpu

    pretend_gpu()
