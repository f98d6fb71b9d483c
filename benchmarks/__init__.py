"""Measurements of tritoncaps beside its rivals: `python -m benchmarks --help`, and README.md."""
