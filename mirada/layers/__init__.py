"""Torch blocks for one device. They know nothing of families, checkpoints or parallelism."""
