"""Arguments and files that nobody meant to give: a result as documented or a documented error.

Cases are drawn by hypothesis from consecutive seeds until the time of --fuzz-seconds is over, so
that the same cases come first on every run, and their number is printed at the end. A case that
ends the process is left in the file `case` of the test's temporary directory.

    pytest tests/test_fuzz.py --fuzz-seconds 120 --fuzz-seed 1000
"""

import functools
import io
import itertools
import os
import pickletools
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FUZZED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointError
from tritoncaps import (
    CapsuleLoss,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
)
from tritoncaps.models import CapsNet, DeepCapsNet, create_model

CASES_A_SEED = 50
Fuzz = Callable[[st.SearchStrategy[Any], Callable[[Any], None]], None]


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> Fuzz:
    """Draw cases and check them until the time is over."""
    config = request.config
    options = settings(
        max_examples=CASES_A_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def run(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        end = time.monotonic() + config.getoption("--fuzz-seconds")
        count = 0
        with (tmp_path / "case").open("w") as journal:

            def one(case: Any) -> None:
                nonlocal count
                journal.seek(0)
                journal.truncate()
                journal.write(repr(case))
                journal.flush()
                check(case)
                count += 1

            for number in itertools.count(config.getoption("--fuzz-seed")):
                seed(number)(options(given(strategy)(one)))()
                if time.monotonic() >= end:
                    break
        config.stash[FUZZED][request.node.name] = count

    return run


# arguments ----------------------------------------------------------------------------------------


def creatable_dtypes() -> list[torch.dtype]:
    """Every dtype of torch of which there can be a tensor."""
    found = []
    for value in vars(torch).values():
        if isinstance(value, torch.dtype) and value not in found:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    torch.empty(2, dtype=value)
                except (RuntimeError, TypeError):
                    continue
            found.append(value)
    return found


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
ANY_DTYPE = creatable_dtypes()
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
SCALES = (1.0, 0.0, 1e-20, 1e30, float("inf"), float("nan"))


@dataclass(frozen=True)
class Array:
    """A tensor as data."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str = "contiguous"
    requires_grad: bool = False
    scale: float = 1.0
    largest: int = 1  # of integers

    def build(self) -> Tensor:
        """Make the tensor: a view of a buffer in which it lies as its layout says."""
        shape = self.shape
        if self.dtype not in (*FLOATING, *INTEGERS, *COMPLEX):
            # Of quantised types torch can make no view.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.empty(shape, dtype=self.dtype, device=self.device)
        if self.layout == "transposed":
            tensor = self._buffer(shape[::-1]).permute(tuple(range(len(shape))[::-1]))
        elif self.layout == "strided":
            tensor = self._buffer((*shape, 2))[..., 0]
        elif self.layout == "offset":
            size = functools.reduce(lambda a, b: a * b, shape, 1)
            tensor = self._buffer((size + 3,))[3:].view(shape)
        elif self.layout == "expanded" and shape and shape[0] > 0:
            tensor = self._buffer((1, *shape[1:])).expand(shape)
        else:
            tensor = self._buffer(shape)
            if self.layout == "sparse" and self.dtype in FLOATING and self.device == "cpu":
                tensor = tensor.to_sparse()
        if self.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.detach().requires_grad_()
        return tensor

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(sum(shape))
        if self.dtype in INTEGERS:
            drawn = torch.randint(self.largest + 1, shape, generator=generator)
        else:
            drawn = torch.randn(shape, generator=generator) * self.scale
        return drawn.to(self.dtype)


def built(value: Any) -> Any:
    """The argument that a drawn value stands for."""
    return value.build() if isinstance(value, Array) else value


JUNK = (
    *(None, True, False, 0, 1, -1, 2, 1.5, float("nan"), float("inf"), 1j, "3", "full", b"x"),
    *(2**31, 2**63, 2**70, -(2**70), 10**400, [], [3], (2, 3), (2, 3, 4), "abc", {}, object),
    *(Array(()), Array((2,)), Array((2, 2), torch.int64)),
)
junk = st.sampled_from(JUNK)


@dataclass(frozen=True)
class Call:
    """A call by name; `meant` is false once an argument was replaced by something else."""

    name: str
    arguments: dict[str, Any]
    meant: bool = True


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], **fields: Any) -> Array:
    """Right tensors of a shape."""
    return Array(
        shape,
        layout=draw(st.sampled_from(LAYOUTS)),
        requires_grad=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
        **fields,
    )


@st.composite
def spoilt(draw: st.DrawFn, call: Call) -> Call:
    """The call with up to two arguments replaced, or as it is."""
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(call.arguments)))
        value: Any = call.arguments[name]
        how = draw(st.sampled_from(("junk", "dtype", "device", "axis", "rank", "sparse")))
        if not isinstance(value, Array) or how == "junk":
            value = draw(junk)
        elif how == "dtype":
            value = replace(value, dtype=draw(st.sampled_from(ANY_DTYPE)))
        elif how == "device":
            value = replace(value, device="meta" if value.device == "cpu" else "cpu")
        elif how == "axis" and value.shape:
            axis = draw(st.integers(0, len(value.shape) - 1))
            size = draw(st.integers(0, 5))
            value = replace(value, shape=(*value.shape[:axis], size, *value.shape[axis + 1 :]))
        elif how == "sparse":
            value = replace(value, layout="sparse")
        else:
            value = replace(value, shape=draw(st.sampled_from(((), (3,), (2, 2, 2, 2, 2)))))
        call = Call(call.name, {**call.arguments, name: value}, False)
    return call


@st.composite
def operator_calls(draw: st.DrawFn) -> Call:
    """Calls of the functions of `tritoncaps.ops`."""
    B, (I, P, J, D) = draw(st.integers(0, 3)), draw(st.tuples(*[st.integers(1, 4)] * 4))
    kind = {
        "dtype": draw(st.sampled_from(FLOATING)),
        "device": draw(st.sampled_from(("cpu", "cpu", "cpu", "meta"))),
    }
    name = draw(st.sampled_from(ops.__all__))
    arguments: dict[str, Any] = {}
    if name == "squash":
        shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple))
        arguments = {
            "s": draw(arrays(shape, **kind)),
            "dim": draw(st.integers(-len(shape), len(shape) - 1)),
        }
    elif name == "margin_loss":
        multi_hot = draw(st.booleans())
        dtype = draw(st.sampled_from((torch.bool, torch.uint8, torch.int64)))
        target = Array((B, J), dtype) if multi_hot else Array((B,), torch.int64, largest=J - 1)
        arguments = {
            "activations": draw(arrays((B, J), **kind)),
            "target": replace(target, device=kind["device"]),
            "m_pos": draw(st.floats(0, 1)),
            "m_neg": draw(st.floats(0, 1)),
            "down_weight": draw(st.sampled_from((0, 0.5, 1))),
            "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        }
    else:
        if name == "dynamic_routing":
            arguments = {"u_hat": draw(arrays((B, I, J, D), **kind))}
        else:
            arguments = {
                "u": draw(arrays((B, I, P), **kind)),
                "weight": draw(arrays((I, P, J, D), **kind)),
            }
        if name != "prediction_vectors":
            prior = st.none() | arrays((I, J), **kind)
            arguments |= {
                "iterations": draw(st.integers(1, 3)),
                "prior": draw(prior),
                "gradient": draw(st.sampled_from(("full", "last"))),
                "return_coupling": draw(st.booleans()),
            }
    return draw(spoilt(Call(name, arguments)))


def documented_results(name: str, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes that a call of an operator returns."""
    if name == "squash":
        return [tuple(arguments["s"].shape)]
    if name == "margin_loss":
        return [(len(arguments["activations"]),) if arguments["reduction"] == "none" else ()]
    if name == "dynamic_routing":
        B, I, J, D = arguments["u_hat"].shape
    else:
        B, I, J, D = (*arguments["u"].shape[:2], *arguments["weight"].shape[2:])
    if name == "prediction_vectors":
        return [(B, I, J, D)]
    return [(B, J, D), (B, I, J)][: 1 + arguments["return_coupling"]]


def outcome(function: Callable[..., Any], call: Call, arguments: dict[str, Any]) -> Any:
    """What the call returns, or None after a documented error; anything else is passed on."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if call.meant or not str(error).startswith(f"{call.name}: "):
            raise
        return None


def check_operator(call: Call) -> None:
    """The result has the documented shapes, dtype and device, and so have the gradients."""
    arguments = {name: built(value) for name, value in call.arguments.items()}
    results = outcome(getattr(ops, call.name), call, arguments)
    if results is None:
        return
    first = next(iter(arguments.values()))
    results = results if isinstance(results, tuple) else (results,)
    assert [tuple(r.shape) for r in results] == documented_results(call.name, arguments)
    assert all(r.dtype == first.dtype and r.device == first.device for r in results)
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    with_gradient = [result.sum() for result in results if result.requires_grad]
    assert bool(leaves) == bool(with_gradient)
    if leaves:
        for leaf, grad in zip(
            leaves, torch.autograd.grad(with_gradient, leaves, allow_unused=True), strict=True
        ):
            assert grad is None or (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_operators(fuzz: Fuzz) -> None:
    fuzz(operator_calls(), check_operator)


MODULES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    # name: constructor, right arguments
    "PrimaryCapsules": (
        PrimaryCapsules,
        {"in_channels": 2, "capsule_types": 3, "dim": 4, "kernel_size": 3, "stride": 2},
    ),
    "RoutedCapsules": (
        RoutedCapsules,
        {
            **{"in_capsules": 3, "in_dim": 4, "out_capsules": 2, "out_dim": 5, "iterations": 2},
            **{"gradient": "last", "learned_prior": True, "input_length": 0.5},
        },
    ),
    "ReconstructionDecoder": (
        ReconstructionDecoder,
        {"num_classes": 3, "dim": 2, "image_shape": (1, 4, 5), "hidden": (3, 4)},
    ),
    "MarginLoss": (
        MarginLoss,
        {"m_pos": 0.9, "m_neg": 0.1, "down_weight": 0.5, "reduction": "sum"},
    ),
    "CapsuleLoss": (CapsuleLoss, {"reconstruction_weight": 0.1}),
    "CapsNet": (
        CapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": 18, "iterations": 1},
            **{"channels": 2, "capsule_types": 1, "class_dim": 3, "gradient": "full"},
            "reconstruction": False,
        },
    ),
    "DeepCapsNet": (
        DeepCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (17, 19), "channels": (2, 3)},
            **{"hidden_capsules": 2, "hidden_dim": 3, "primary_iterations": 1},
            **{"secondary_iterations": 2, "capsule_types": 1, "class_dim": 3},
            **{"gradient": "full", "reconstruction": False},
        },
    ),
    "create_model": (create_model, {"name": "capsnet"}),
}


@st.composite
def module_calls(draw: st.DrawFn) -> Call:
    """Calls of the constructors."""
    name = draw(st.sampled_from(sorted(MODULES)))
    return draw(spoilt(Call(name, MODULES[name][1])))


def check_module(call: Call) -> None:
    """What is built keeps its arguments, and runs on what it was built for."""
    arguments = {name: built(value) for name, value in call.arguments.items()}
    if call.name == "create_model":  # the default networks are large
        with torch.device("meta"):
            assert outcome(create_model, call, arguments) is None or call.meant
        return
    module = outcome(MODULES[call.name][0], call, arguments)
    if module is None:
        return
    for name, value in arguments.items():
        kept = getattr(module, name, value)
        assert kept is value or kept == value or value != value or name == "reconstruction"
    a = arguments
    if call.name == "PrimaryCapsules":
        size = a["kernel_size"]
        capsules = module(torch.ones(2, a["in_channels"], size, size))
        assert capsules.shape == (2, a["capsule_types"], a["dim"])
    elif call.name == "RoutedCapsules":
        v = module(torch.ones(2, a["in_capsules"], a["in_dim"]))
        assert v.shape == (2, a["out_capsules"], a["out_dim"])
    elif call.name == "ReconstructionDecoder":
        images = module(torch.ones(2, a["num_classes"], a["dim"]))
        assert images.shape == (2, *a["image_shape"])
    elif call.name in ("CapsNet", "DeepCapsNet"):
        output = module(torch.ones(2, *module.image_shape))
        assert output.poses.shape == (2, a["num_classes"], a["class_dim"])
        assert (output.reconstruction is not None) == a["reconstruction"]
    elif call.name == "MarginLoss":
        loss = module(torch.ones(2, 3), torch.tensor([0, 2]))
        assert loss.shape == ((2,) if a["reduction"] == "none" else ())
    else:
        images = torch.ones(2, 1, 3, 3)
        assert module(torch.ones(2, 3), torch.tensor([0, 2]), images, images).shape == ()


def test_modules(fuzz: Fuzz) -> None:
    fuzz(module_calls(), check_module)


# files --------------------------------------------------------------------------------------------

# Numbers that a header may claim, in all widths.
CLAIMS = (0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Edit:
    """A change of some bytes; positions are taken modulo the length of what is changed."""

    kind: str
    first: int
    second: int
    number: int
    content: bytes = b""

    def apply(self, content: bytes) -> bytes:
        """Return the changed bytes."""
        start = self.first % (len(content) + 1)
        end = min(start + 1 + self.second % 64, len(content))
        if self.kind == "flip":
            flipped = bytes(byte ^ (1 << self.number % 8) for byte in content[start : start + 1])
            return content[:start] + flipped + content[start + 1 :]
        if self.kind == "truncate":
            return content[:start]
        if self.kind == "delete":
            return content[:start] + content[end:]
        if self.kind == "splice":  # a range again, elsewhere
            at = self.second % (len(content) + 1)
            return content[:at] + content[start:end] + content[at:]
        if self.kind == "claim":
            width = (1, 2, 4, 8)[self.second % 4]
            order = "big" if self.second & 4 else "little"
            claim = (CLAIMS[self.number % len(CLAIMS)] % 2 ** (8 * width)).to_bytes(width, order)
            return content[:start] + claim + content[start + width :]
        return content[:start] + self.content + content[start:]  # insert


positions = st.integers(0, 2**16)
edits = st.builds(
    Edit,
    kind=st.sampled_from(("flip", "truncate", "delete", "splice", "claim", "claim", "insert")),
    # The headers of all formats lie at an end of the file.
    first=st.integers(0, 64) | positions,
    second=positions,
    number=st.integers(0, 255),
    content=st.binary(max_size=16),
)


def edited(content: bytes, changes: list[Edit]) -> bytes:
    """The content after all changes."""
    for change in changes:
        content = change.apply(content)
    return content


@contextmanager
def little_memory() -> Iterator[None]:
    """Let no more than 1 GiB be allocated, so that a size that is only claimed is an error."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    import resource  # which is where /proc is

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_nothing_was_claimed(error: BaseException | None) -> None:
    """No error in the chain is one of memory: nothing tried to allocate what a header claims."""
    while error is not None:
        assert not isinstance(error, MemoryError), error
        assert "allocate memory" not in str(error), error
        error = error.__cause__ or error.__context__


STATE: dict[str, Any] = {
    "epoch": 3,
    "weights": {"a": torch.arange(40.0).view(5, 8).T, "b": torch.ones(7, dtype=torch.bfloat16)},
    "rows": [{"loss": 0.5, "name": "x"}, (1, None, True)],
}


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in every bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def touch(value: Any) -> None:
    """Read every byte that a loaded value claims to have."""
    if isinstance(value, dict):
        for key, entry in value.items():
            touch(key)
            touch(entry)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            touch(entry)
    elif isinstance(value, Tensor) and value.layout == torch.strided:
        bytes(value.untyped_storage())


# Pieces of pickle that a file of ours has no use for: calls of what must not be called, claims of
# sizes, and steps that leave the stack in a state that nobody expects.
CALL = b"(X\x05\x00\x00\x00tracetR"
PIECES = (
    b"cos\nmkdir\n" + CALL,
    b"cposix\nsystem\n(X\x0b\x00\x00\x00mkdir tracetR",
    b"cbuiltins\nexec\n(X\x1f\x00\x00\x00__import__('os').mkdir('trace')tR",
    b"(ios\nmkdir\n" + CALL[1:-2] + b"o",
    b"X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93" + CALL,
    b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR",
    b"c__builtin__\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x01tR",
    b"ctorch\nTensor\n(\x8a\x05\x00\x00\x00\x00\x02tR",
    b"ctorch\nFloatTensor\n(\x8a\x05\x00\x00\x00\x00\x02tR",
    b"\x8d" + (2**40).to_bytes(8, "little"),
    b"\x96" + (2**40).to_bytes(8, "little"),
    b"\x8e" + (2**33).to_bytes(8, "little"),
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"\x95" + (2**40).to_bytes(8, "little"),
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    *(bytes([code]) for code in b"(.0012NR\x81QbdehlopstuaE)]}\x85\x86\x87\x88\x89\x8f\x90\x91"),
    *(b"K\x00", b"J\xff\xff\xff\x7f", b"\x8a\x05\x00\x00\x00\x00\x02", b"(J\x00\x00\x00\x10t"),
)


@functools.cache
def valid_checkpoint() -> bytes:
    """The bytes that `save` writes."""
    buffer = io.BytesIO()
    marker = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION}
    torch.save({**marker, **STATE}, buffer)
    return buffer.getvalue()


@functools.cache
def valid_members() -> tuple[tuple[str, bytes], ...]:
    """Names and contents of the parts of that archive."""
    with zipfile.ZipFile(io.BytesIO(valid_checkpoint())) as archive:
        return tuple((name, archive.read(name)) for name in archive.namelist())


@dataclass(frozen=True)
class Rewritten:
    """A checkpoint written again by another program: its checksums are right, its parts are not."""

    parts: list[tuple[str, int, list[Edit], str]]
    operations: list[tuple[str, int, int]]

    def content(self) -> bytes:
        """Return the bytes of the archive."""
        members = list(valid_members())
        pickled = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        members[pickled] = (members[pickled][0], self._pickle(members[pickled][1]))
        compressed = set()
        for what, position, changes, name in self.parts:
            index = position % len(members)
            own, content = members[index]
            if what == "change":
                members[index] = own, edited(content, changes)
            elif what == "twice":
                members.insert(position % 7, (own, edited(content, changes)))
            elif what == "other-case":
                members.append((own.upper(), edited(content, changes)))
            elif what == "drop" and len(members) > 1:
                del members[index]
            elif what == "rename":
                members[index] = name or own, content
            elif what == "bomb":
                compressed.add(own)
                members[index] = own, bytes(1 << 20)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two parts of one name
            for name, content in members:
                member = zipfile.ZipInfo(name)
                archive.writestr(
                    member,
                    content,
                    zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED,
                )
                member.external_attr = 0
        return buffer.getvalue()

    def _pickle(self, pickled: bytes) -> bytes:
        starts = [position for _, _, position in pickletools.genops(pickled)]
        steps = [pickled[a:b] for a, b in itertools.pairwise([*starts, len(pickled)])]
        for what, first, second in self.operations:
            index, other = first % len(steps), second % len(steps)
            if what == "remove" and len(steps) > 1:
                del steps[index]
            elif what == "repeat":
                steps.insert(other, steps[index])
            elif what == "swap":
                steps[index], steps[other] = steps[other], steps[index]
            elif what == "replace":
                steps[index] = PIECES[second % len(PIECES)]
            else:
                steps.insert(index, PIECES[second % len(PIECES)])
        return b"".join(steps)


rewritten = st.builds(
    Rewritten,
    parts=st.lists(
        st.tuples(
            st.sampled_from(("change", "twice", "other-case", "drop", "rename", "bomb")),
            st.integers(0, 63),
            st.lists(edits, max_size=2),
            st.text(max_size=6),
        ),
        max_size=2,
    ),
    operations=st.lists(
        st.tuples(
            st.sampled_from(("remove", "repeat", "swap", "replace", "insert", "insert")),
            positions,
            positions,
        ),
        max_size=3,
    ),
)
damaged = st.lists(edits, min_size=1, max_size=3)


def test_checkpoints(fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged one is refused or loads as it was saved; a foreign one never runs or claims."""
    monkeypatch.chdir(tmp_path)  # where the payloads would leave their trace
    trace, last = tmp_path / "trace", tmp_path / "last.pt"
    previous = checkpoint.previous_path(last)
    checkpoint.save(previous, {**STATE, "epoch": 2})

    def check(case: list[Edit] | Rewritten) -> None:
        is_foreign = isinstance(case, Rewritten)
        last.write_bytes(case.content() if is_foreign else edited(valid_checkpoint(), case))
        problem = None
        with little_memory():
            try:
                state = checkpoint.load(last)
            except CheckpointError as error:
                problem = error
        assert not trace.exists(), "the file has run code"
        if problem is None and is_foreign:
            # Its checksums are its own, so it may hold anything, but it holds it all.
            touch(state)
        elif problem is None:
            assert_same(state, STATE)
        else:
            assert str(problem).startswith(f"{last} ")
            assert_nothing_was_claimed(problem)
            state, path, warning = checkpoint.load_latest(tmp_path)
            assert state["epoch"] == 2
            assert path == previous
            assert warning is not None

    checkpoint.save(last, STATE)
    assert_same(checkpoint.load(last), STATE)
    fuzz(damaged | rewritten, check)


def test_weights(fuzz: Fuzz, tmp_path: Path) -> None:
    """The format has no checksum, so the contents may change, but never beyond the file's."""
    tensors = {"a": torch.arange(24.0).view(2, 3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    content = safetensors_bytes(tensors, {"format": "pt"})
    path = tmp_path / "weights.safetensors"

    def check(changes: list[Edit]) -> None:
        path.write_bytes(edited(content, changes))
        problem = None
        with little_memory():
            try:
                loaded, metadata = checkpoint.load_weights(path)
            except CheckpointError as error:
                problem = error
        if problem is None:
            touch(loaded)
            assert sum(tensor.nbytes for tensor in loaded.values()) <= path.stat().st_size
            assert all(isinstance(value, str) for value in metadata.values())
        else:
            assert str(problem).startswith(f"{path} ")
            assert_nothing_was_claimed(problem)

    fuzz(damaged, check)
