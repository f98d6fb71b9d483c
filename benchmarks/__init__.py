"""Measure tritoncaps beside its rivals. See README.md and `python -m benchmarks --help`."""
