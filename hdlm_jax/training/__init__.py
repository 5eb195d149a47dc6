"""Training: the optimizer, the state and where it lies, checkpoints, the metrics log, progress."""
