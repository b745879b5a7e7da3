"""Weights from files: what is read, which of the states in it is taken, and how its names become the model's."""
