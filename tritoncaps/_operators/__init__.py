"""The operators as torch sees them, one file per operator.

`_register.py` holds what they share. `_dispatch.py` holds the rule that chooses the backend.
"""

from tritoncaps._operators._dispatch import INTERPRETED

__all__ = ["INTERPRETED"]
