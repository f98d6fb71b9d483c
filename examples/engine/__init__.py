"""The training engine that the examples share: runtime, run directory, loop, checkpoints, figures."""
