"""What the gate accepts and what it refuses."""

from functools import partial

import pytest
import torch

from benchmarks import networks, oracle, rivals, step
from benchmarks.cases import Case, Shape, operator_names
from benchmarks.oracle import FallbackError, Oracle, WrongResultError, gradients
from benchmarks.rivals.fused_dynamic_routing import torch_path
from tritoncaps import reference
from tritoncaps._operators import _dispatch
from tritoncaps.models import CapsNet

CPU = torch.device("cpu")
SHAPE = Shape(7, 3, 4, 5)
SMALL = Case("fused_dynamic_routing", SHAPE, B=6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("op", operator_names())
def test_every_eager_rival_passes(op, precision):
    case = Case(op, SHAPE, B=6, precision=precision)
    truth = Oracle(case, CPU)
    for name in rivals.rival_names(case, CPU):
        if name != "compile":
            errors = truth.check(rivals.op_rival(name, case, CPU))
            assert errors.keys() == {*case.output_shapes} | {
                f"grad_{n}" for n in case.arguments(CPU)
            }
            assert all(0 <= error < 0.2 for error in errors.values())


def test_the_torch_path_passes_beside_the_kernels():
    Oracle(SMALL, CPU).check(SMALL.operator.bound(SMALL.options, torch_path))


OTHER_CALLS = {
    "a prior": {"optional": ("prior",)},
    "a constant coupling": {"chosen": {"gradient": "last"}},
    "the coupling too": {"chosen": {"return_coupling": True}},
    "a coupling without a gradient": {"chosen": {"gradient": "last", "return_coupling": True}},
    "one iteration": {"iterations": 1},
}


@pytest.mark.parametrize("more", OTHER_CALLS.values(), ids=OTHER_CALLS)
@pytest.mark.parametrize("op", ["dynamic_routing", "fused_dynamic_routing"])
def test_options_and_optional_inputs_reach_both_sides(op, more):
    case = Case(op, SHAPE, B=6, **more)
    errors = Oracle(case, CPU).check(rivals.op_rival(rivals.ours(CPU), case, CPU))
    assert ("grad_prior" in errors) == ("optional" in more)
    assert ("coupling" in errors) == ("return_coupling" in more.get("chosen", {}))


# Not the losses: their target depends on the row, and their rows are too small to be sliced.
@pytest.mark.parametrize("op", [op for op in operator_names() if not op.endswith("_loss")])
def test_the_reference_is_evaluated_in_slices_of_the_batch(monkeypatch, op):
    case = Case(op, SHAPE, B=6)
    whole = Oracle(case, CPU)._exact
    monkeypatch.setattr(oracle, "_SLICE_BYTES", 2 * 8 * case.votes)
    calls = []
    monkeypatch.setattr(oracle, "gradients", lambda *a: calls.append(a) or gradients(*a))
    sliced = Oracle(case, CPU)._exact
    assert len(calls) == 2 * 3  # in two precisions, two images at a time
    assert whole.keys() == sliced.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sliced[name], tensor)


# Wrong rivals -------------------------------------------------------------------------------------


def right(u, weight):
    return reference.fused_dynamic_routing(u, weight, 3)


def softmax_over_the_inputs(u, weight):
    u_hat = reference.prediction_vectors(u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(3):
        v = reference.squash(torch.einsum("bij,bijd->bjd", b.softmax(dim=1), u_hat))
        b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
    return v


WRONG = {
    "another softmax": (softmax_over_the_inputs, "^v.*: error"),
    "a little too large": (lambda u, weight: right(u, weight) * (1 + 1e-5), "^v.*: error"),
    "gradient of u": (
        lambda u, weight: right(u + (u - u.detach()) * 1e-3, weight),
        "^grad_u: error",
    ),
    "gradient of the weight": (
        lambda u, weight: right(u, weight + (weight - weight.detach()) * 1e-3),
        "^grad_weight: error",
    ),
    "not a number": (lambda u, weight: right(u, weight) * float("nan"), "^v.*: not finite"),
    "wrong without autograd": (
        lambda u, weight: right(u, weight) * (1 if torch.is_grad_enabled() else 2),
        "^v without autograd: error",
    ),
}


@pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_rival_is_refused(function, message):
    truth = Oracle(SMALL, CPU)
    truth.check(lambda **tensors: (right(**tensors),))
    with pytest.raises(WrongResultError, match=message):
        truth.check(lambda **tensors: (function(**tensors),))


def test_another_shape_is_refused():
    truth = Oracle(SMALL, CPU)
    truth.grads = {"v": truth.grads["v"].unsqueeze(0)}
    with pytest.raises(WrongResultError, match="shape"):
        truth.check(lambda **tensors: (right(**tensors).unsqueeze(0),))


def test_an_eager_form_that_is_far_off_is_refused_as_a_measure(monkeypatch):
    monkeypatch.setitem(oracle._LIMIT, torch.float32, 1e-9)
    with pytest.raises(WrongResultError, match="the eager form is off in"):
        Oracle(SMALL, CPU)


def test_an_operator_that_leaves_its_kernel_is_refused():
    def falls_back(**tensors):
        _dispatch._warn_once("fused_dynamic_routing_fwd runs without its Triton kernel")
        return (right(**tensors),)

    with pytest.raises(FallbackError, match="without its Triton kernel"):
        Oracle(SMALL, CPU).check(falls_back)


# Networks -----------------------------------------------------------------------------------------


def test_the_port_is_the_same_network(monkeypatch):
    networks.check_networks()
    monkeypatch.setattr(networks, "EinsumCapsNet", partial(networks.EinsumCapsNet, iterations=2))
    with pytest.raises(WrongResultError, match="of the einsum port"):
        networks.check_networks()


def test_a_trainer_whose_loss_is_off_is_refused():
    batch = (torch.rand(2, 1, 28, 28), torch.tensor([3, 7]))
    torch.manual_seed(0)
    small = CapsNet(channels=8, capsule_types=2)
    trainer = step.Trainer(small, networks.tritoncaps_loss, "fp32", batch)
    trainer.check()
    trainer.step()
    with pytest.raises(WrongResultError, match="the loss is off by"):
        trainer.check()
