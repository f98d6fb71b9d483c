"""The operators as torch sees them, one file per operator.

What they share: `_register.py` makes an operator of its declaration. `_formulas.py` derives shapes
and derivatives. `_autograd.py` and `_vmap.py` serve the transforms of `torch.func`. `_dispatch.py`
chooses the backend.
"""

from tritoncaps._operators._dispatch import INTERPRETED

__all__ = ["INTERPRETED"]
