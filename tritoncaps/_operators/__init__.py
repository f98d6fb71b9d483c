"""The operators as torch knows them, one file an operator.

`_register.py` holds what all of them share, `_dispatch.py` the rule that chooses the backend.
"""

from tritoncaps._operators._dispatch import INTERPRETED

__all__ = ["INTERPRETED"]
