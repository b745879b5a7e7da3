"""One file a suite; each registers itself when it is imported."""
