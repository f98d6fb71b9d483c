"""Arguments and files that nobody meant to give: a result as documented or a documented error.

Cases are drawn by hypothesis from consecutive seeds until the time of --fuzz-seconds is over, so
that the same cases come first on every run, and their number is printed at the end. A case that
ends the process is left in the file `case` of the test's temporary directory.

    pytest tests/reliability/test_fuzz.py --fuzz-seconds 120 --fuzz-seed 1000
"""

import functools
import gzip
import hashlib
import io
import itertools
import os
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from test_data_files import idx_bytes, make_set
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
    reference,
)
from tritoncaps.data import DatasetError
from tritoncaps.data.idx import IdxFile, read_image_set
from tritoncaps.models import CapsNet, DeepCapsNet, create_model
from tritoncaps.testing import LAYOUTS, OPERATORS, Call, Operator, check_call, fuzzed_calls
from tritoncaps.testing._fuzz import Array, spoilt

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (1.0, 0.0, 1e-20, 1e30, float("inf"), float("nan"))

# arguments ----------------------------------------------------------------------------------------


@st.composite
def squash_calls(draw):
    """Squash along any axis of any shape; the table has three axes and the last one alone."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple))
    arguments = {
        "s": draw(arrays(shape)),
        "dim": draw(st.integers(-len(shape), len(shape) - 1)),
        "form": draw(st.sampled_from(("quadratic", "exponential"))),
    }
    return draw(spoilt(Call("squash", arguments)))


@st.composite
def margin_loss_calls(draw):
    """Margin loss with every argument; in the table the target is a fixed one."""
    B, K = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    activations = draw(arrays((B, K)))
    multi_hot = draw(st.booleans())
    dtype = draw(st.sampled_from((torch.bool, torch.uint8, torch.int64)))
    target = Array((B, K), dtype) if multi_hot else Array((B,), torch.int64, largest=K - 1)
    arguments = {
        "activations": activations,
        "target": replace(target, device=activations.device),
        "m_pos": draw(st.floats(0, 1)),
        "m_neg": draw(st.floats(0, 1)),
        "down_weight": draw(st.sampled_from((0, 0.5, 1))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
    }
    return draw(spoilt(Call("margin_loss", arguments)))


@st.composite
def arrays(draw, shape):
    return Array(
        shape,
        dtype=draw(st.sampled_from(FLOATING)),
        device=draw(st.sampled_from(("cpu", "cpu", "cpu", "meta"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        requires_grad=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
    )


def loss_shapes(arguments):
    return [(len(arguments["activations"]),) if arguments["reduction"] == "none" else ()]


WHOLE_LOSS = Operator(
    ops.margin_loss, reference.margin_loss, {"activations": "B K", "target": "B"}, {"loss": "B"}
)


def check_operator(call):
    """Check a call of an operator with any of its arguments."""
    if call.name == "margin_loss" and "target" in call.arguments:
        check_call(WHOLE_LOSS, call, loss_shapes)
    else:
        check_call(OPERATORS[call.name], call)


def test_operators(fuzz):
    rows = [fuzzed_calls(operator) for operator in OPERATORS.values()]
    fuzz(st.one_of(*rows, squash_calls(), margin_loss_calls()), check_operator)


# The constructor, and right arguments.
MODULES = {
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


def outcome(function, call, arguments):
    """What the call returns, or None after a documented error; anything else is passed on."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if call.meant or not str(error).startswith(f"{call.name}: "):
            raise
        return None


@st.composite
def module_calls(draw):
    """Calls of the constructors."""
    name = draw(st.sampled_from(sorted(MODULES)))
    return draw(spoilt(Call(name, MODULES[name][1])))


def check_module(call):
    """What is built keeps its arguments, and runs on what it was built for."""
    arguments = call.build()
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


def test_modules(fuzz):
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


def test_checkpoints(fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_weights(fuzz, tmp_path: Path) -> None:
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


@dataclass(frozen=True)
class IdxCase:
    """Changes of a file of images, of its labels, and of what they are packed into."""

    images: list[Edit]
    labels: list[Edit]
    packed: bool
    packing: list[Edit]
    verify: bool


def test_idx_files(fuzz, tmp_path: Path) -> None:
    """Verified, the published content or an error; else what the files say, of any shape."""
    expected = make_set(6, height=4, width=3)
    contents = [
        idx_bytes(expected.images.squeeze(1)),
        idx_bytes(expected.labels.to(torch.uint8)),
    ]
    files = [
        IdxFile(name, shape, hashlib.sha256(content).hexdigest())
        for name, shape, content in zip(
            ("images", "labels"), ((6, 4, 3), (6,)), contents, strict=True
        )
    ]

    def check(case: IdxCase) -> None:
        for file, content, changes in zip(files, contents, (case.images, case.labels), strict=True):
            for name in (file.name, f"{file.name}.gz"):
                (tmp_path / name).unlink(missing_ok=True)
            changed = edited(content, changes)
            if case.packed:
                packed = edited(gzip.compress(changed, mtime=0), case.packing)
                (tmp_path / f"{file.name}.gz").write_bytes(packed)
            else:
                (tmp_path / file.name).write_bytes(changed)
        problem = None
        with little_memory():
            try:
                found = read_image_set(tmp_path, *files, 10, verify=case.verify)
            except DatasetError as error:
                problem = error
        if problem is not None:
            assert str(problem).startswith(str(tmp_path))
            assert_nothing_was_claimed(problem)
        elif case.verify:
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
        else:
            assert found.images.dtype == torch.uint8
            assert found.images.ndim == 4
            assert len(found.images) == len(found.labels) > 0
            assert int(found.labels.max()) < 10

    fuzz(
        st.builds(
            IdxCase,
            images=st.lists(edits, max_size=2),
            labels=st.lists(edits, max_size=2),
            packed=st.booleans(),
            packing=st.lists(edits, max_size=2),
            verify=st.booleans(),
        ),
        check,
    )
