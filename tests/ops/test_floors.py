"""An operator has one name on every floor, and is registered with torch as its row says."""

import inspect
from pathlib import Path

import pytest
from torch.utils.flop_counter import flop_registry

import tritoncaps
from tritoncaps import _native, _torch_path, ops, reference
from tritoncaps.testing import OPERATORS

PACKAGE = Path(tritoncaps.__file__).parent
ROOMS = {name: PACKAGE / name for name in ("ops", "_operators", "_torch_path", "_native")}
REGISTERED = {name: row for name, row in OPERATORS.items() if row.registered is not None}
DIRECTIONS = ("fwd", "bwd")
# Files of the two paths of a CPU that are named after no operator.
SHARED = {
    "_call",
    "_competition",
    "_dynamic",
    "_images",
    "_library",
    "_loop",
    "_passes",
    "_precision",
    "_slices",
}

# Inputs and outputs that only the function has. `em_routing` puts the offset into poses and weight.
# It makes the activations from the logits, which the registered operator always returns.
OF_THE_FUNCTION = {
    "em_routing": ({"offset?": "I R Q"}, {"a": "B J", "logits?": "B J"}),
    "conv_em_routing": ({}, {"a": "B H' W' J", "logits?": "B H' W' J"}),
}


def modules(room):
    """The files of a room that are named after an operator."""
    return {path.stem for path in ROOMS[room].glob("*.py")} - SHARED - {"__init__"}


def exported(module):
    """The operators for which a backend has functions."""
    functions = [name for name in module.__all__ if name.endswith(("_fwd", "_bwd"))]
    names = {name[:-4] for name in functions}
    assert sorted(functions) == sorted(f"{name}_{way}" for name in names for way in DIRECTIONS)
    return names


def test_every_operator_is_in_the_table():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == set(OPERATORS)


def test_every_operator_has_a_file_on_every_floor():
    assert modules("ops") == {f"_{name}" for name in OPERATORS}
    shared = {"_autograd", "_dispatch", "_formulas", "_register", "_vmap"}
    assert modules("_operators") == {*shared, *REGISTERED}
    assert modules("_torch_path") == set(REGISTERED)


def test_the_reference_has_each_operator_and_no_more():
    functions = {name for name, value in vars(reference).items() if inspect.isfunction(value)}
    assert functions == set(OPERATORS)


def test_the_torch_path_has_each_operator_and_no_more():
    assert exported(_torch_path) == set(REGISTERED)


def check_twins(backend):
    """Names and arguments match, because a call goes to one or the other."""
    for name in exported(backend):
        for way in DIRECTIONS:
            arguments = [
                list(inspect.signature(getattr(module, f"{name}_{way}")).parameters)
                for module in (backend, _torch_path)
            ]
            assert arguments[0] == arguments[1], f"{name}_{way}"


def test_the_kernels_are_those_of_the_torch_path():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from tritoncaps import kernels

    assert exported(kernels) == set(REGISTERED)
    check_twins(kernels)


def test_the_native_kernels_are_some_of_the_torch_path():
    operators = exported(_native)
    assert operators == modules("_native")
    assert operators < set(REGISTERED)
    check_twins(_native)


@pytest.mark.parametrize("name", REGISTERED)
def test_the_row_agrees_with_the_registration(name):
    row = REGISTERED[name]
    assert row.registered.forward._qualname == f"tritoncaps::{name}"
    assert row.registered.backward._qualname == f"tritoncaps::{name}_backward"
    if name == "squash":  # registered along the last axis of any shape
        return
    inputs, outputs = OF_THE_FUNCTION.get(name, ({}, {}))
    assert row.inputs == {**row.registered.inputs, **inputs}
    assert row.outputs.items() <= {**row.registered.outputs, **outputs}.items()


@pytest.mark.parametrize("name", OPERATORS)
def test_the_function_and_its_reference_are_called_alike(name):
    """They have the same arguments, order and defaults, and the row names them all."""
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (ops, reference))
    assert list(ours.parameters) == list(theirs.parameters)
    for argument, parameter in ours.parameters.items():
        assert parameter.default == theirs.parameters[argument].default, argument
        assert parameter.kind == theirs.parameters[argument].kind, argument
    row = OPERATORS[name]
    unnamed = set(ours.parameters) - set(row.axes) - set(row.options)
    # Not in the table. test_squash_operator.py and the tests of the losses have these.
    special = {
        "squash": {"dim"},
        "margin_loss": {"target", "m_pos", "m_neg", "down_weight", "class_weight"},
        "spread_loss": {"target", "margin"},
    }
    assert unnamed == special.get(name, set())


def test_all_products_are_counted():
    counted = {str(getattr(operator, "_qualified_op_name", "")) for operator in flop_registry}
    for name in REGISTERED.keys() - {"squash"}:  # which has no product
        assert {f"tritoncaps::{name}", f"tritoncaps::{name}_backward"} <= counted
