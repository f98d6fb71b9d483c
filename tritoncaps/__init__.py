"""Capsule-network operators, layers and models, accelerated with Triton."""

from tritoncaps import ops, reference
from tritoncaps._version import __version__

__all__ = ["__version__", "ops", "reference"]
