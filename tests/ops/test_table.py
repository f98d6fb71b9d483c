"""Every operator in the table passes every check."""

import pytest

from tritoncaps import testing


@pytest.mark.parametrize("operator", testing.OPERATORS.values(), ids=str)
@pytest.mark.parametrize("check", testing.CHECKS.values(), ids=testing.CHECKS)
def test_operator(operator, check, device):
    check(operator, device)
