"""The calls that tests of the whole table make: every operator, with all its results."""

from tritoncaps.testing import OPERATORS

# (operator, options) by name. An operator with several forms appears once for each.
CALLS = {}
for _operator in OPERATORS.values():
    _options = {
        name: True if name.startswith("return_") else values[0]
        for name, values in _operator.options.items()
    }
    if "form" not in _options:
        CALLS[str(_operator)] = (_operator, _options)
    for _form in _operator.options.get("form", ()):
        CALLS[f"{_operator}-{_form}"] = (_operator, _options | {"form": _form})
