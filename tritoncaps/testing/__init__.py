"""Test your own routing the way this package tests its operators.

Declare an operator once, as an `Operator`: its function, its reference in plain torch, the axes of
its inputs and outputs, and the options to draw. Everything else follows from that row:

    from tritoncaps import testing

    mine = testing.Operator(
        function=my_routing,
        reference=my_routing_in_einsum,
        inputs={"u_hat": "B I J D", "prior?": "I J"},
        outputs={"v": "B J D"},
        options={"iterations": (3, 1, 2)},
    )

    @pytest.mark.parametrize("check", testing.CHECKS.values(), ids=testing.CHECKS)
    def test_my_routing(check):
        check(mine, torch.device("cpu"))

Two of the checks, "errors" and "fuzz", expect messages like those of this package: a TypeError or
ValueError that begins with the operator's name, names the argument, and gives both numbers if two
disagree.

`OPERATORS` is the table of this package, which its tests and benchmarks read. The checks need
hypothesis, which comes with the extra `dev`.
"""

from tritoncaps.testing._agreement import (
    assert_agrees,
    compare,
    compare_inputs,
    evaluate,
    gradients,
    round_once,
)
from tritoncaps.testing._cases import (
    DTYPES,
    LAYOUTS,
    Case,
    cases,
    draw_inputs,
    normal,
    with_layout,
)
from tritoncaps.testing._checks import CHECKS
from tritoncaps.testing._fuzz import Call, check_call, fuzzed_calls
from tritoncaps.testing._table import OPERATORS, SIZES, Operator

__all__ = [
    "CHECKS",
    "DTYPES",
    "LAYOUTS",
    "OPERATORS",
    "SIZES",
    "Call",
    "Case",
    "Operator",
    "assert_agrees",
    "cases",
    "check_call",
    "compare",
    "compare_inputs",
    "draw_inputs",
    "evaluate",
    "fuzzed_calls",
    "gradients",
    "normal",
    "round_once",
    "with_layout",
]
