"""Weights from files: reading, choice of a state, and mapping of its names to the model's."""
