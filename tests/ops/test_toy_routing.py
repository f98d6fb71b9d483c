"""A routing that the package does not have takes only its own functions and one row.

The toy has uniform coupling, s_j = Σ_i û_ij / J. Nothing after the row is written for it.
"""

import pytest
import torch
from einops import reduce
from torch import Tensor

from tritoncaps import _checks, testing
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register

# Where kernels run, a routing without one says so and runs in plain torch.
pytestmark = pytest.mark.filterwarnings("ignore:uniform_routing_.* has no Triton kernel")

# The mathematics, its twin in plain torch, and its registration with torch.


def reference(u_hat):
    return reduce(u_hat, "B I J D -> B J D", "sum") / u_hat.shape[2]


def uniform_routing_fwd(u_hat: Tensor) -> Tensor:
    return u_hat.sum(dim=1) / u_hat.shape[2]


def uniform_routing_bwd(grad_s: Tensor, u_hat: Tensor) -> Tensor:
    grad = grad_s.unsqueeze(1) / u_hat.shape[2]
    return grad.expand(u_hat.shape).contiguous()


registered = register(
    "uniform_routing",
    dispatched(uniform_routing_fwd),
    dispatched(uniform_routing_bwd),
    reference=reference,
    inputs={"u_hat": "B I J D"},
    outputs={"s": "B J D"},
)


# The function that a user calls, and the row.


def uniform_routing(u_hat):
    _checks.check_inputs("uniform_routing", registered.inputs, u_hat=u_hat)
    return registered.forward(u_hat)


TOY = testing.Operator(
    uniform_routing,
    reference,
    inputs=registered.inputs,
    outputs=registered.outputs,
    registered=registered,
)


@pytest.mark.parametrize("check", testing.CHECKS.values(), ids=testing.CHECKS)
def test_the_row_is_all_that_a_check_needs(check, device):
    check(TOY, device)


WRONG = {
    "a gradient that is too large": lambda u_hat: reference(u_hat * 2) - reference(u_hat.detach()),
    "a value that is too large": lambda u_hat: reference(u_hat) * 1.001,
    "another shape": lambda u_hat: reference(u_hat)[:, :1],
}


@pytest.mark.usefixtures("without_shrinking")
@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_a_wrong_routing_fails(function, device):
    wrong = testing.Operator(
        function, reference, inputs=TOY.inputs, outputs=TOY.outputs, name="wrong"
    )
    with pytest.raises(AssertionError):
        testing.CHECKS["agreement"](wrong, device)


def test_a_message_without_the_numbers_fails(device):
    def vague(u_hat):
        if not isinstance(u_hat, torch.Tensor) or u_hat.ndim != 4:
            raise TypeError("vague: bad u_hat")
        return reference(u_hat)

    row = testing.Operator(vague, reference, inputs=TOY.inputs, outputs=TOY.outputs)
    with pytest.raises(AssertionError, match="does not say"):
        testing.CHECKS["errors"](row, device)
