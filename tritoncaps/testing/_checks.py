"""The checks that every operator has to pass. Each takes a row of the table and a device.

A check raises AssertionError, or lets torch's own error through. It skips what does not apply to an
operator, such as the FLOPs of a function that is not registered with torch.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps._operators._dispatch import INTERPRETED
from tritoncaps.testing._agreement import compare, gradients
from tritoncaps.testing._cases import DTYPES, Case, cases, draw_inputs, normal
from tritoncaps.testing._fuzz import check_call, fuzzed_calls
from tritoncaps.testing._table import Operator


def check_agreement(operator: Operator, device: torch.device) -> None:
    """Results and gradients obey the 2x rule for any size, option, dtype and memory layout."""
    from hypothesis import given

    @given(cases(operator))
    def agrees(case: Case) -> None:
        compare(operator, case, device)

    agrees()


def check_every_option(operator: Operator, device: torch.device) -> None:
    """Results and gradients obey it for every combination of options and optional inputs.

    Interpreted, it takes none of the optional inputs and all of them. tests/kernels gives
    each of them to the launchers.
    """
    subsets = _extreme_subsets(operator) if INTERPRETED else list(_subsets(operator.optional))
    for options in _combinations(operator):
        for optional in subsets:
            compare(operator, Case(operator.small_sizes, options, optional, torch.float32), device)


def check_single_results(operator: Operator, device: torch.device) -> None:
    """Gradients are right if the loss uses only one of several results."""
    for options, optional in product(_some(operator), _extreme_subsets(operator)):
        names = operator.output_names(options)
        for index, name in enumerate(names if len(names) > 1 else []):

            def only(function: Callable[..., Any], index: int = index) -> Callable[..., Any]:
                return lambda **arguments: function(**arguments)[index]

            inputs = draw_inputs(operator, device=device, optional=optional)
            call = operator.bound(options, only(operator.function))
            leaves = {name: x.requires_grad_() for name, x in inputs.items()}
            if not any(result.requires_grad for result in call(**leaves)):
                continue  # a constant, such as the coupling with gradient="last"
            oracle = operator.bound(options, only(operator.reference))
            _, actual = gradients(call, inputs)
            for key, expected in gradients(oracle, inputs)[1].items():
                torch.testing.assert_close(actual[key], expected, msg=f"{operator}: {name}, {key}")


def check_empty_batch(operator: Operator, device: torch.device) -> None:
    """An empty batch gives empty results, and zero gradients for inputs that all images share."""
    for options, dtype in product(_combinations(operator), DTYPES):
        inputs = draw_inputs(operator, {**operator.small_sizes, "B": 0}, dtype=dtype, device=device)
        outputs, grads = gradients(operator.bound(options), inputs)
        shapes = operator.output_shapes(inputs, options)
        assert [tuple(output.shape) for output in outputs] == list(shapes.values())
        for name, grad in grads.items():
            assert grad.shape == inputs[name].shape
            assert not grad.any(), f"{operator}: gradient of {name} is not zero"


def check_gradients(operator: Operator, device: torch.device) -> None:
    """Derivatives agree with finite differences, also through a result with other strides.

    `gradient="last"` is left out: its derivative intentionally differs from the function's.
    """
    from torch.autograd import gradcheck

    for options, optional in product(_some(operator), _extreme_subsets(operator)):
        if options.get("gradient") == "last":
            continue
        inputs = draw_inputs(operator, device=device, optional=optional)
        names, leaves = list(inputs), [x.requires_grad_() for x in inputs.values()]

        def outputs(*tensors: Tensor, options: Any = options, names: Any = names) -> Any:
            return operator.call(dict(zip(names, tensors, strict=True)), options)

        def transposed(*tensors: Tensor, outputs: Any = outputs) -> Any:
            return tuple(x.transpose(0, -1) for x in outputs(*tensors))

        assert gradcheck(outputs, leaves, fast_mode=True)
        assert gradcheck(transposed, leaves, fast_mode=True)


def check_registration(operator: Operator, device: torch.device, *, traced: bool = True) -> None:
    """torch's own check of a custom operator: schema, fake, autograd, and dynamic shapes if traced.

    The last is slow, because it traces the second derivative. So only the second call is traced,
    which has all optional inputs and all results.
    """
    if operator.registered is None:
        return
    from torch.library import opcheck

    quick = ("test_schema", "test_autograd_registration", "test_faketensor")

    with warnings.catch_warnings():
        # opcheck reads .grad of tensors that need not be leaves.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        for number, (forward, backward) in enumerate(_registered_calls(operator, device)):
            tests = (*quick, "test_aot_dispatch_dynamic") if traced and number == 1 else quick
            opcheck(*forward, test_utils=tests)
            opcheck(*backward, test_utils=tests)


def check_vmap(operator: Operator, device: torch.device) -> None:
    """`torch.func.vmap` gives the results and gradients of a loop, whatever it maps.

    The check maps each input, the first one along another axis, and all along different axes.
    """
    names = list(operator.axes)
    mapped_sets = [{name: 0} for name in names] + [{names[0]: 1}]
    mapped_sets.append({name: number % 2 for number, name in enumerate(names)})
    if INTERPRETED:
        mapped_sets = [mapped_sets[0], mapped_sets[-1]]
    for options, mapped in product(_some(operator), mapped_sets):
        slices = [draw_inputs(operator, device=device, seed=seed) for seed in (1, 2)]
        loop = [
            [slices[index if name in mapped else 0][name].requires_grad_() for name in names]
            for index in range(2)
        ]
        stacked = [
            torch.stack([first, second], mapped[name]).detach().requires_grad_()
            if name in mapped
            else first.detach().requires_grad_()
            for name, first, second in zip(names, *loop, strict=True)
        ]

        def call(*tensors: Tensor, options: Any = options) -> tuple[Tensor, ...]:
            return operator.call(dict(zip(names, tensors, strict=True)), options)

        in_dims = tuple(mapped.get(name) for name in names)
        together = torch.func.vmap(call, in_dims=in_dims)(*stacked)
        for result, *singles in zip(together, *(call(*inputs) for inputs in loop), strict=True):
            torch.testing.assert_close(result, torch.stack(singles))
        grads = torch.autograd.grad(together[0].square().sum(), stacked)
        singles = [torch.autograd.grad(call(*inputs)[0].square().sum(), inputs) for inputs in loop]
        for name, grad, first, second in zip(names, grads, *singles, strict=True):
            is_mapped = name in mapped
            expected = torch.stack([first, second], mapped[name]) if is_mapped else first + second
            torch.testing.assert_close(grad, expected)


def check_batched_gradients(operator: Operator, device: torch.device) -> None:
    """A Jacobian, which torch computes by a vmap of the backward, has the rows of a loop."""
    for options, optional in product(_some(operator), _extreme_subsets(operator)):
        inputs = draw_inputs(operator, device=device, optional=optional)
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        result = operator.call(inputs, options)[0]
        rows = normal(2, *result.shape).to(result)

        def gradient(row: Tensor, result: Tensor = result, leaves: Any = leaves, **how: Any) -> Any:
            return torch.autograd.grad(result, leaves, row, retain_graph=True, **how)

        together = gradient(rows, is_grads_batched=True)
        for grad, *singles in zip(together, *(gradient(row) for row in rows), strict=True):
            torch.testing.assert_close(grad, torch.stack(singles))


def check_compile(operator: Operator, device: torch.device) -> None:
    """`torch.compile(fullgraph=True)` works with gradients. Other batch sizes do not recompile."""
    from torch._dynamo.testing import CompileCounterWithBackend

    for options in _extremes(operator):
        torch._dynamo.reset()
        frames = CompileCounterWithBackend("aot_eager")

        def loss(inputs: dict[str, Tensor], options: Any = options) -> Tensor:
            return sum((x.square().sum() for x in operator.call(inputs, options)), torch.zeros(()))

        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=frames)
        counts = []
        for batch in (3, 8, 11):
            inputs = draw_inputs(operator, {**operator.small_sizes, "B": batch}, device=device)
            leaves = {name: x.requires_grad_() for name, x in inputs.items()}
            for name, leaf in leaves.items():
                if "B" in operator.axes[name].split():
                    torch._dynamo.mark_dynamic(leaf, 0)
            results = [
                torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True)
                for function in (compiled, loss)
            ]
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)
            counts.append(frames.frame_count)
        assert counts[0] == counts[-1], f"{operator}: each batch size is compiled anew"


def check_export(operator: Operator, device: torch.device) -> None:
    """`torch.export` with a dynamic batch gives one node, which is right for other batch sizes."""
    for options in _extremes(operator):
        inputs = draw_inputs(operator, device=device)
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {name: {0: batch} if "B" in operator.axes[name] else None for name in inputs}
        program = torch.export.export(
            _Module(operator, options), (inputs,), dynamic_shapes={"inputs": shapes}
        )
        if operator.registered is not None:
            targets = [str(node.target) for node in program.graph.nodes]
            assert f"tritoncaps.{operator}.default" in targets
        more = draw_inputs(operator, {**operator.small_sizes, "B": 5}, device=device)
        for result, expected in zip(
            program.module()(more), operator.call(more, options), strict=True
        ):
            torch.testing.assert_close(result, expected)


def check_autocast(operator: Operator, device: torch.device) -> None:
    """Under autocast, 16-bit inputs are raised to float32, and nothing inside is lowered.

    They may be mixed with float32. The backward may run under autocast or after it.
    """
    names = list(operator.axes)
    low_dtypes = (torch.bfloat16, torch.float16)[: 1 if INTERPRETED else 2]
    for options, low in product(_some(operator), low_dtypes):
        for lowered in (names, names[:1], []):
            inputs = draw_inputs(operator, dtype=torch.float32, device=device)
            inputs |= {name: inputs[name].to(low) for name in lowered}
            raised = {name: tensor.float() for name, tensor in inputs.items()}
            exact, exact_grads = gradients(operator.bound(options), raised)

            def autocast(options: Any = options, low: Any = low, **inputs: Tensor) -> Any:
                with torch.autocast(device.type, dtype=low):
                    return operator.call(inputs, options)

            results, grads = gradients(autocast, inputs)
            with torch.autocast(device.type, dtype=low):
                _, grads_inside = gradients(operator.bound(options), inputs)
            for result, expected in zip(results, exact, strict=True):
                assert result.dtype == torch.float32
                assert torch.equal(result, expected)
            for name, expected in exact_grads.items():
                expected = expected.to(inputs[name].dtype)
                assert torch.equal(grads[name], expected), name
                assert torch.equal(grads_inside[name], expected), name


def check_meta(operator: Operator, device: torch.device) -> None:
    """Meta tensors give results of the right shape, dtype and device."""
    for options, dtype in product(_combinations(operator), (torch.float16, torch.float64)):
        inputs = draw_inputs(operator, dtype=dtype, device="meta")
        shapes = operator.output_shapes(inputs, options)
        for result, shape in zip(operator.call(inputs, options), shapes.values(), strict=True):
            assert (tuple(result.shape), result.dtype, result.device.type) == (shape, dtype, "meta")


def check_flops(operator: Operator, device: torch.device) -> None:
    """torch's FLOP counter finds the same as for the reference, forward and backward."""
    if operator.registered is None or operator.registered.forward._qualname not in _counted():
        return
    from torch.utils.flop_counter import FlopCounterMode

    # An input that only the function has becomes a part of others, at the price of products.
    known = [name for name in operator.optional if f"{name}?" in operator.registered.inputs]
    for options, optional in product(_some(operator), _subsets(known)):
        counts = []
        for function in (operator.function, operator.reference):
            inputs = draw_inputs(operator, device=device, optional=optional)
            with FlopCounterMode(display=False) as counter:
                gradients(operator.bound(options, function), inputs)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], (
            f"{operator}: {counts[0]} FLOPs, the reference has {counts[1]} ({options}, {optional})"
        )


def check_repeatability(operator: Operator, device: torch.device) -> None:
    """A second call gives the same bits, and no call changes its inputs."""
    for options in _some(operator):
        inputs = draw_inputs(operator, dtype=torch.float32, device=device)
        kept = {name: tensor.clone() for name, tensor in inputs.items()}
        versions = [tensor._version for tensor in inputs.values()]
        first, second = (gradients(operator.bound(options), inputs) for _ in range(2))
        assert [tensor._version for tensor in inputs.values()] == versions
        assert all(torch.equal(tensor, kept[name]) for name, tensor in inputs.items())
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def check_higher_derivatives(operator: Operator, device: torch.device) -> None:
    """`gradgradcheck` passes, and second derivatives are those of the reference.

    With `gradient="last"` only the latter holds: they are derivatives of what the backward
    computes, with the coupling of the last iteration constant.
    """
    from torch.autograd import gradgradcheck

    for options, optional in _few(operator):
        inputs = draw_inputs(operator, _smallest(operator), device=device, optional=optional)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        if options.get("gradient") != "last":
            call = _positional(operator, list(leaves), options)
            assert gradgradcheck(call, tuple(leaves.values()), fast_mode=True)
        actual, expected = (
            _second_gradients(operator.call(leaves, options, function), list(leaves.values()))
            for function in (operator.function, operator.reference)
        )
        torch.testing.assert_close(actual, expected, msg=f"{operator}: {options}")


def check_transforms(operator: Operator, device: torch.device) -> None:
    """The transforms of `torch.func`, and nests of them, give what they give for the reference."""
    for options, optional in _few(operator):
        drawn = [
            draw_inputs(operator, _smallest(operator), device=device, optional=optional, seed=seed)
            for seed in (1, 2)
        ]
        names = list(drawn[0])
        first, second = (tuple(inputs.values()) for inputs in drawn)
        with _forward_mode():
            actual, expected = (
                _transformed(_positional(operator, names, options, function), first, second)
                for function in (operator.function, operator.reference)
            )
        for name, result in actual.items():
            torch.testing.assert_close(result, expected[name], msg=f"{operator}: {name}, {options}")


def check_sample_gradients(operator: Operator, device: torch.device) -> None:
    """`vmap(grad(...))` over the images of a batch gives the gradients of a loop over them."""
    for options, optional in _few(operator):
        inputs = draw_inputs(operator, _smallest(operator), device=device, optional=optional)
        names = list(inputs)
        has_batch = ["B" in operator.axes[name].split() for name in names]

        def loss(*tensors: Tensor, options: Any = options, names: Any = names) -> Tensor:
            batches = (
                tensor[None] if mapped else tensor
                for tensor, mapped in zip(tensors, has_batch, strict=True)  # noqa: B023
            )
            return _squares(operator.call(dict(zip(names, batches, strict=True)), options))

        every = tuple(range(len(names)))
        in_dims = tuple(0 if mapped else None for mapped in has_batch)
        together = torch.func.vmap(torch.func.grad(loss, every), in_dims)(*inputs.values())
        for image in range(_SMALL["B"]):
            leaves = [
                (tensor[image] if mapped else tensor).detach().requires_grad_()
                for tensor, mapped in zip(inputs.values(), has_batch, strict=True)
            ]
            alone = torch.autograd.grad(loss(*leaves), leaves)
            torch.testing.assert_close(tuple(grads[image] for grads in together), alone)


def check_forward_mode(operator: Operator, device: torch.device) -> None:
    """Tangents agree with finite differences, and outside of `torch.func` with those inside."""
    from torch.autograd import forward_ad, gradcheck

    for options, optional in _few(operator):
        inputs = draw_inputs(operator, _smallest(operator), device=device, optional=optional)
        tangents = draw_inputs(
            operator, _smallest(operator), device=device, optional=optional, seed=1
        )
        call = _positional(operator, list(inputs), options)
        with _forward_mode():
            inside = torch.func.jvp(call, tuple(inputs.values()), tuple(tangents.values()))[1]
            with forward_ad.dual_level():
                duals = map(forward_ad.make_dual, inputs.values(), tangents.values())
                outside = [forward_ad.unpack_dual(result).tangent for result in call(*duals)]
            for tangent, expected in zip(outside, inside, strict=True):
                # A constant, such as the coupling with gradient="last", has none.
                torch.testing.assert_close(
                    torch.zeros_like(expected) if tangent is None else tangent, expected
                )
            if options.get("gradient") != "last":
                leaves = tuple(tensor.requires_grad_() for tensor in inputs.values())
                assert gradcheck(
                    call, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
                )


def check_errors(operator: Operator, device: torch.device) -> None:
    """Each wrong argument raises TypeError or ValueError, which names it and the numbers."""
    right = draw_inputs(operator, dtype=torch.float32, device=device)
    defaults = operator.defaults
    # The right call comes first. It shows that the others fail only for their wrong argument.
    operator.call(right, defaults)
    for kind, name, words, wrong in [*_wrong_tensors(operator, right), *_wrong_options(operator)]:
        call = partial(operator.function, **{**right, **defaults, **wrong})
        message = _assert_raises(kind, f"^{operator}: .*{name}", call)
        for word in words:
            assert word in message, f"{operator}: {message!r} does not say {word!r}"


def check_fuzz(operator: Operator, device: torch.device) -> None:
    """Arbitrary arguments end in a documented result or a documented error."""
    from hypothesis import HealthCheck, given, settings

    @settings(suppress_health_check=list(HealthCheck))
    @given(fuzzed_calls(operator))
    def fuzz(call: Any) -> None:
        check_call(operator, call)

    with warnings.catch_warnings():
        if INTERPRETED:  # kernels compute with NumPy, which warns of the infinities that are drawn
            warnings.simplefilter("ignore", RuntimeWarning)
        fuzz()


CHECKS: dict[str, Callable[[Operator, torch.device], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_agreement,
        check_every_option,
        check_single_results,
        check_empty_batch,
        check_gradients,
        check_registration,
        check_vmap,
        check_batched_gradients,
        check_compile,
        check_export,
        check_autocast,
        check_meta,
        check_flops,
        check_repeatability,
        check_higher_derivatives,
        check_transforms,
        check_sample_gradients,
        check_forward_mode,
        check_errors,
        check_fuzz,
    )
}


# What the checks share ----------------------------------------------------------------------------

# Sizes for derivatives of a second order, which have as many numbers as all inputs squared.
_SMALL = {
    **{"B": 2, "I": 5, "P": 3, "J": 4, "D": 3},
    **{"R": 1, "Q": 2, "H": 2, "W": 3, "C": 2, "K": 2},
}


def _smallest(operator: Operator) -> dict[str, int]:
    return {**_SMALL, **operator.own_sizes}


class _Module(torch.nn.Module):
    """An operator with fixed options, for functions of torch that only take modules."""

    def __init__(self, operator: Operator, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.operator, self.options = operator, options

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self.operator.call(inputs, self.options)


def _positional(
    operator: Operator,
    names: list[str],
    options: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator, or another function, with the named inputs in order."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return operator.call(dict(zip(names, tensors, strict=True)), options, function)

    return call


def _squares(results: Iterable[Tensor]) -> Tensor:
    """A loss that is not linear in any result."""
    return torch.stack([result.square().sum() for result in results]).sum()


def _second_gradients(results: Iterable[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a gradient penalty, 0 for a leaf that it does not depend on."""
    unused: Any = {"allow_unused": True, "materialize_grads": True}
    slopes = torch.autograd.grad(_squares(results), leaves, create_graph=True, **unused)
    return torch.autograd.grad(_squares(slopes), leaves, **unused)


def _transformed(
    call: Callable[..., tuple[Tensor, ...]], x: tuple[Tensor, ...], t: tuple[Tensor, ...]
) -> dict[str, Any]:
    """What the transforms make of a function at x. Tangents, cotangents and second slices are t."""
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

    def loss(*tensors: Tensor) -> Tensor:
        return _squares(call(*tensors))

    slopes = grad(loss, tuple(range(len(x))))
    both = tuple(torch.stack(pair) for pair in zip(x, t, strict=True))
    results, pull, *_ = vjp(call, *x)
    return {
        "grad": slopes(*x),
        "vjp": pull(tuple(result.cos() for result in results)),
        "jacrev": jacrev(call)(*x),
        "jvp": jvp(call, x, t),
        "jacfwd": jacfwd(call)(*x),
        "hessian": hessian(loss)(*x),
        "jvp of grad": jvp(slopes, x, t),
        "grad of jvp": grad(lambda *a: _squares(jvp(call, a, t)[1]))(*x),
        "vmap of grad": vmap(slopes)(*both),
        "grad of vmap": grad(lambda *a: _squares(vmap(call)(*a)))(*both),
        "jvp of vmap": jvp(vmap(call), both, both),
        "grad of grad of grad": grad(
            lambda *a: _squares(grad(lambda *b: _squares(slopes(*b)))(*a))
        )(*x),
    }


@contextmanager
def _forward_mode() -> Iterator[None]:
    """When torch enters forward mode, it calls its own deprecated functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated")
        yield


def _combinations(operator: Operator) -> list[dict[str, Any]]:
    """The usual options, then each other value of each option in turn."""
    found = [operator.defaults]
    for name, values in operator.options.items():
        found += [operator.defaults | {name: value} for value in values[1:]]
    # With all results, the most can go wrong.
    found += [options | _all_results(operator) for options in found[1:]]
    return [options for n, options in enumerate(found) if options not in found[:n]]


def _some(operator: Operator) -> list[dict[str, Any]]:
    """The combinations; interpreted, where a call takes a tenth of a second, the usual one.

    All results are returned then. `check_every_option` has all combinations there too.
    """
    found = _combinations(operator)
    if not INTERPRETED:
        return found
    return [found[0] | _all_results(operator)]


def _all_results(operator: Operator) -> dict[str, bool]:
    """The options that return every result."""
    return {name: True for name in operator.options if name.startswith("return_")}


def _worded(operator: Operator) -> list[dict[str, Any]]:
    """The usual options and each other word or flag in turn, with all results.

    Neither a graph nor a transform depends on numbers such as the iterations.
    """
    fixed = {n: x for n, x in operator.defaults.items() if not isinstance(x, (str, bool))}
    fixed |= _all_results(operator)
    return [options for options in _combinations(operator) if fixed.items() <= options.items()]


def _fewest_steps(operator: Operator) -> dict[str, int]:
    """The iterations that hold every kind of step, if the operator has any."""
    return {"iterations": 2} if "iterations" in operator.options else {}


def _few(operator: Operator) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Options and optional inputs for slow checks of derivatives.

    They are each word and flag with all inputs and results, and the usual call with the fewest.
    """
    counts = _fewest_steps(operator)
    found = _worded(operator)[: 1 if INTERPRETED else None]
    full = [(options | counts, tuple(operator.optional)) for options in found]
    return [(operator.defaults | counts, ()), *full]


def _extreme_subsets(operator: Operator) -> list[tuple[str, ...]]:
    """None of the optional inputs, and all of them."""
    return list(dict.fromkeys([(), tuple(operator.optional)]))


def _extremes(operator: Operator) -> list[dict[str, Any]]:
    """The usual options and the last combination, for slow checks."""
    first, *others = _some(operator)
    return [first, *others[-1:]]


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for kept in product((False, True), repeat=len(names)):
        yield tuple(name for name, keep in zip(names, kept, strict=True) if keep)


def _counted() -> set[str]:
    """The names of the operators that torch's FLOP counter knows."""
    from torch.utils.flop_counter import flop_registry

    return {str(getattr(operator, "_qualified_op_name", "")) for operator in flop_registry}


def _registered_calls(operator: Operator, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The arguments of the registered forward and backward, as pairs (operator, arguments).

    Each word is seen once. Two kinds of call alternate. Without optional inputs, all tensors are
    contiguous. With all of them, none is. So the results must have the strides that their fakes
    promise, whatever the strides of the inputs.
    """
    kinds = cycle([("contiguous", ()), ("transposed", tuple(operator.optional))])
    varied = [operator.defaults, *_worded(operator)]
    for options, (layout, optional) in zip(varied, kinds, strict=False):
        options = options | _fewest_steps(operator)
        inputs = draw_inputs(
            operator, dtype=torch.float32, device=device, layout=layout, optional=optional
        )
        with _Recorded(operator) as recorded:
            gradients(operator.bound(options), inputs, layout=layout)
        forward, backward = (
            tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in call)
            for call in recorded.calls
        )
        registered = operator.registered
        yield (registered.forward, forward), (registered.backward, backward)


class _Recorded(TorchDispatchMode):
    """The arguments of each call of a registered operator, forward or backward."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        registered = operator.registered
        self._wanted = {registered.forward._opoverload, registered.backward._opoverload}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._wanted:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def _assert_raises(kind: type[Exception], pattern: str, call: Callable[[], Any]) -> str:
    """Assert that the call raises an error, and return its message."""
    import re

    try:
        call()
    except kind as error:
        assert re.search(pattern, str(error)), f"{str(error)!r} does not match {pattern!r}"
        return str(error)
    raise AssertionError(f"no {kind.__name__} that matches {pattern!r}")


Wrong = tuple[type[Exception], str, list[str], dict[str, Any]]


def _wrong_tensors(operator: Operator, right: Mapping[str, Tensor]) -> Iterator[Wrong]:
    """The error, the argument, words of the message, and what replaces the right argument."""
    for name, tensor in right.items():
        axes = operator.axes[name].split()
        if name not in operator.optional:
            yield TypeError, name, ["torch.Tensor", "NoneType"], {name: None}
        yield TypeError, name, ["torch.Tensor", "list"], {name: tensor.tolist()}
        yield TypeError, name, ["int64"], {name: tensor.long()}
        yield TypeError, name, ["sparse"], {name: tensor.to_sparse()}
        if operator.is_elementwise:
            continue
        rank = "1 axis" if len(axes) == 1 else f"{len(axes)} axes"
        yield ValueError, name, [rank, str(tensor.ndim + 1)], {name: tensor[None]}
        for position, axis in enumerate(axes):
            if axis != "B":
                empty = tensor.narrow(position, 0, 0)
                yield ValueError, name, [f"{axis}=0"], {name: empty}
            if any(axis in other.split() for n, other in operator.axes.items() if n != name):
                size = tensor.shape[position]
                fewer = tensor.narrow(position, 0, size - 1)
                yield ValueError, "", [f"{axis}={size}", f"{axis}={size - 1}"], {name: fewer}
        if len(right) > 1:
            yield ValueError, "", ["meta", str(tensor.device)], {name: tensor.to("meta")}
            yield TypeError, "", ["float32", "float64"], {name: tensor.double()}


def _wrong_options(operator: Operator) -> Iterator[Wrong]:
    for name, values in operator.options.items():
        usual = next(value for value in values if value is not None)
        if isinstance(usual, bool):
            yield TypeError, name, ["bool", "int"], {name: 1}
        elif isinstance(usual, str):
            yield ValueError, name, [f'"{usual}"', "'none such'"], {name: "none such"}
            yield ValueError, name, ["3"], {name: 3}
        elif isinstance(usual, float):
            yield TypeError, name, ["number", "str"], {name: "3"}
            yield TypeError, name, ["number", "bool"], {name: True}
            yield ValueError, name, ["nan"], {name: math.nan}
        elif isinstance(usual, int):  # a count
            smallest = min(values)
            yield TypeError, name, ["int", "str"], {name: "3"}
            yield TypeError, name, ["int", "bool"], {name: True}
            yield TypeError, name, ["int", "float"], {name: 1.5}
            yield ValueError, name, [f">= {smallest}", f"{smallest - 1}"], {name: smallest - 1}
            yield ValueError, name, ["2147483648"], {name: 2**31}
