"""The run directory: checkpoints, integrity, lock, metrics."""
