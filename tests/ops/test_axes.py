"""What every operator promises about its axes: order carries over, and images do not mix."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritoncaps.testing import OPERATORS, cases

same_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
# Interpreted kernels compute with NumPy, which warns about the NaN that a test passes in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The target of a loss tells its classes and images apart.
SYMMETRIC = [row for row in OPERATORS.values() if not row.name.endswith("_loss")]


@pytest.mark.parametrize("operator", SYMMETRIC, ids=str)
@same_device
@given(data=st.data())
def test_order_along_an_axis_carries_over(device, operator, data):
    """Reordering an input reorders the results with that axis and changes nothing else.

    This holds for images, for input and output capsules, and for the dimensions of a pose.
    """
    case = data.draw(cases(operator, (torch.float64,)))
    # The positions of a grid and of a kernel have an order that counts.
    axis = data.draw(st.sampled_from(sorted(case.sizes.keys() - {"H", "W", "K"})))
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(case.sizes[axis], generator=generator).to(device)

    def ordered(tensor, axes):
        named = axes.split()
        return tensor.index_select(named.index(axis), order) if axis in named else tensor

    inputs = case.inputs(operator, device)
    moved = {key: ordered(tensor, operator.axes[key]) for key, tensor in inputs.items()}
    results = operator.call(moved, case.options)
    expected = operator.call(inputs, case.options)
    named = {name.removesuffix("?"): axes for name, axes in operator.outputs.items()}
    names = operator.output_names(case.options)
    for name, result, unmoved in zip(names, results, expected, strict=True):
        torch.testing.assert_close(result, ordered(unmoved, named[name]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=str)
@same_device
@given(data=st.data())
def test_another_image_changes_nothing(device, operator, data):
    """Not even an image of NaN, whose own result is NaN."""
    case = data.draw(cases(operator, (torch.float64,)))
    inputs = case.inputs(operator, device)
    batched = [key for key, axes in operator.axes.items() if axes.startswith("B") and key in inputs]
    more = {key: torch.cat([inputs[key], torch.ones_like(inputs[key][:1])]) for key in batched}
    more[batched[0]][-1] = float("nan")
    expected = operator.call(inputs, case.options)
    results = operator.call(inputs | more, case.options)
    for result, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(result[:-1], alone, rtol=1e-12, atol=1e-14)
    assert results[0][-1].isnan().all()
