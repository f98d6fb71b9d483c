"""Atomic writes and the sealed format: a read returns what was written, or refuses the file."""

import json
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tritoncaps import _files
from tritoncaps._files import CheckpointError, atomic_write, read_sealed, write_sealed


def names_in(directory):
    return sorted(entry.name for entry in directory.iterdir())


class TestAtomicWrite:
    def test_the_name_appears_with_the_whole_content(self, tmp_path):
        path = tmp_path / "config.json"
        with atomic_write(path) as file:
            file.write(b"{}")
            file.flush()
            assert not path.exists()
        assert path.read_bytes() == b"{}"
        assert names_in(tmp_path) == ["config.json"]

    def test_an_error_in_the_block_keeps_the_old_content(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_bytes(b"old")
        with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
            file.write(b"half of the n")
            raise ZeroDivisionError
        assert path.read_bytes() == b"old"
        assert names_in(tmp_path) == ["config.json"]

    def test_leftovers_of_a_killed_process_are_removed(self, tmp_path):
        ours, others = ".config[1].json.0123abcd.tmp", ".other.json.0123abcd.tmp"
        for name in (ours, others):
            (tmp_path / name).write_bytes(b"half")
            assert _files.is_temporary(tmp_path / name)
        with atomic_write(tmp_path / "config[1].json") as file:
            file.write(b"{}")
        assert names_in(tmp_path) == [others, "config[1].json"]
        assert not _files.is_temporary(tmp_path / "config[1].json")

    @pytest.mark.skipif(os.name == "nt", reason="Windows does not remove open files")
    def test_two_writers_do_not_mix(self, tmp_path):
        path = tmp_path / "config.json"
        with pytest.raises(FileNotFoundError), atomic_write(path) as first:
            first.write(b"first")
            with atomic_write(path) as second:
                second.write(b"second")
        assert path.read_bytes() == b"second"

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
    def test_permissions_are_those_of_an_ordinary_file(self, tmp_path):
        (tmp_path / "ordinary").touch()
        with atomic_write(tmp_path / "config.json"):
            pass
        assert (tmp_path / "config.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    def test_an_error_without_a_name_gets_one(self, tmp_path):
        with pytest.raises(OSError) as error, _files.naming(tmp_path / "file"):
            raise OSError(28, "No space left on device")
        assert error.value.filename == str(tmp_path / "file")
        path = tmp_path / "none" / "file"
        with pytest.raises(FileNotFoundError) as missing, atomic_write(path):
            pass  # its directory is not there, and the name of the temporary file means nothing
        assert missing.value.filename == str(path)
        with pytest.raises(OSError, match="other"), _files.naming(tmp_path / "file"):
            raise OSError(28, "No space left on device", "other")


def round_trip(path, header, tensors=None):
    write_sealed(path, tensors or {}, header)
    return read_sealed(path)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, -3, 2**127, 0.1, -0.0, 5e-324, float("inf"), float("-inf")),
            *("text, ünïcode", "\ud800", [1, [2.5]], (1, (2, None)), [], (), {}),
            {"a": {0: 2, None: 3, 0.5: 4, True: 5, float("inf"): 6}},
            {"$tuple": [1], "format": 2, "version": 3},
            {"b": 1, "a": {"$": ({},)}},
            random.Random(3).getstate(),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_plain_values_keep_value_type_and_order(self, tmp_path, value):
        tensors, header = round_trip(tmp_path / "file", {"value": value})
        # Unlike ==, repr tells 1 from True and 1.0, 0.0 from -0.0, and one order from another.
        assert repr(header) == repr({"value": value})
        assert tensors == {}

    def test_not_a_number_stays_one(self, tmp_path):
        _, header = round_trip(tmp_path / "file", {"value": float("nan")})
        assert repr(header["value"]) == "nan"

    def test_an_ordered_dict_becomes_a_dict(self, tmp_path):
        _, header = round_trip(tmp_path / "file", OrderedDict(b=OrderedDict(d=1, c=2), a=3))
        assert repr(header) == "{'b': {'d': 1, 'c': 2}, 'a': 3}"

    @pytest.mark.parametrize("dtype", _files._DTYPES, ids=str)
    def test_tensors_come_back_bit_for_bit(self, tmp_path, dtype):
        base = torch.arange(24).reshape(2, 3, 2, 2).to(dtype)
        state = {
            "channels_last": base.to(memory_format=torch.channels_last),
            "tied": base,
            "also_tied": base,
            "view": base[1:, 0],
            "transposed": base.transpose(0, 3),
            "expanded": base[:, :1].expand(2, 3, 2, 2),
            "parameter": nn.Parameter(base, requires_grad=dtype.is_floating_point),
            "scalar": base[1, 2, 1, 1],
            "empty": torch.empty(0, 4, dtype=dtype),
        }
        for place in ("tensors", "header"):
            tensors, header = round_trip(
                tmp_path / "file",
                state if place == "header" else {},
                state if place == "tensors" else {},
            )
            loaded = header or tensors
            assert loaded.keys() == state.keys()
            for name, tensor in loaded.items():
                assert type(tensor) is torch.Tensor
                assert tensor.dtype == dtype
                assert tensor.is_contiguous()
                assert torch.equal(tensor, state[name]), name

    def test_what_is_stored_is_not_touched(self, tmp_path):
        model = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        write_sealed(tmp_path / "file", model.state_dict(), {"model": model.state_dict()})
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_names_of_tensors_that_would_coincide(self, tmp_path):
        state = {
            "a.b": torch.tensor(1),
            "a": {"b": torch.tensor(2), "b'": torch.tensor(3)},
            "rows": [torch.tensor(4), (torch.tensor(5),)],
        }
        tensors, header = round_trip(tmp_path / "file", state, {"a.b": torch.tensor(0)})
        assert header == state
        assert tensors == {"a.b": 0}

    def test_other_programs_read_it_as_safetensors(self, tmp_path):
        state = {"model": {"conv.weight": torch.rand(2, 3)}, "epoch": 3}
        write_sealed(tmp_path / "file", {"free": torch.ones(1)}, state)
        loaded = load_file(tmp_path / "file")
        assert loaded.keys() == {"free", "model.conv.weight"}
        assert torch.equal(loaded["model.conv.weight"], state["model"]["conv.weight"])

    def test_equal_contents_are_equal_bytes(self, tmp_path):
        for name in ("a", "b"):
            tensors = {"w": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int64)}
            write_sealed(tmp_path / name, tensors, {"epoch": 3})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        # The data start at a multiple of 8 bytes, for programs that map the file into memory.
        assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0


class TestRefusalToWrite:
    @pytest.mark.parametrize(
        "value",
        [
            *(Path("runs"), np.float64(0.5), np.zeros(2), torch.__version__, frozenset()),
            *(nn.Linear(1, 1), b"bytes", 1j, torch.Size((2,)), torch.float32, torch.device("cpu")),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_could_not_be_read_back_is_named(self, tmp_path, value):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        with pytest.raises(TypeError) as error:
            write_sealed(tmp_path / "file", {}, {"args": {"list": [0, value]}})
        assert f"write_sealed: header['args']['list'][1] is a {kind}" in str(error.value)
        with pytest.raises(TypeError, match=f"write_sealed: weight is a {kind}"):
            write_sealed(tmp_path / "file", {"weight": value}, {})
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("key", [Path("runs"), (1, 2), np.float64(1)], ids=repr)
    def test_keys_are_checked_too(self, tmp_path, key):
        with pytest.raises(TypeError, match=r"header\['args'\] has the key .*, a "):
            write_sealed(tmp_path / "file", {}, {"args": {key: 1}})

    @pytest.mark.parametrize(
        ("tensor", "kind"),
        [
            (torch.ones(2).to_sparse(), "sparse_coo tensor of torch.float32"),
            (torch.ones(2, device="meta"), "meta tensor of torch.float32"),
            (torch.ones(2, dtype=torch.complex64), "strided tensor of torch.complex64"),
        ],
        ids=["sparse", "meta", "complex"],
    )
    def test_tensors_that_the_format_does_not_know(self, tmp_path, tensor, kind):
        with pytest.raises(TypeError, match=rf"header\['a'\]\[0\] is a {kind}"):
            write_sealed(tmp_path / "file", {}, {"a": [tensor]})
        with pytest.raises(TypeError, match=f"write_sealed: weight is a {kind}"):
            write_sealed(tmp_path / "file", {"weight": tensor}, {})

    def test_the_reserved_name(self, tmp_path):
        with pytest.raises(ValueError, match="no tensor may be called '__metadata__'"):
            write_sealed(tmp_path / "file", {}, {"__metadata__": torch.ones(1)})


WEIGHT = torch.arange(1.0, 5.0)


@pytest.fixture
def sealed(tmp_path):
    """A small sealed file."""
    path = tmp_path / "last.safetensors"
    write_sealed(path, {"weight": WEIGHT}, {"epoch": 3, "rate": float("inf")})
    return path


def assert_refused(path, message):
    """Both ways of reading refuse the file, and the message starts with its name."""
    for allow_unsealed in (False, True):
        with pytest.raises(CheckpointError, match=message) as error:
            read_sealed(path, allow_unsealed=allow_unsealed)
        assert str(error.value).startswith(f"{path} ")


def forge(path, table, data=b"", header=None):
    """Write a file as another program might, with a valid seal if it has a header."""
    if header is not None:
        metadata = {"tritoncaps": _files.VERSION, "header": header}
        seal = _files._seal(metadata, table, memoryview(data))
        table = {"__metadata__": {**metadata, "sha256": seal}, **table}
    start = json.dumps(table).encode()
    path.write_bytes(len(start).to_bytes(8, "little") + start + data)


class TestDamage:
    def test_missing(self, tmp_path):
        assert_refused(tmp_path / "last.safetensors", "does not exist")

    def test_a_directory(self, tmp_path):
        assert_refused(tmp_path, "cannot be read")

    def test_empty(self, sealed):
        sealed.write_bytes(b"")
        assert_refused(sealed, "is empty; use an earlier copy")

    def test_cut_off_anywhere(self, sealed):
        content = sealed.read_bytes()
        for length in range(1, len(content)):
            sealed.write_bytes(content[:length])
            assert_refused(sealed, "is truncated or damaged .*; use an earlier copy")

    def test_something_appended(self, sealed):
        sealed.write_bytes(sealed.read_bytes() + b"\0")
        assert_refused(sealed, "is truncated or damaged")

    def test_a_flipped_bit_of_a_weight(self, sealed):
        content = bytearray(sealed.read_bytes())
        content[content.index(WEIGHT.numpy().tobytes()) + 3] ^= 1
        sealed.write_bytes(content)
        # This is the reason for the seal: safetensors returns a different weight.
        assert not torch.equal(load_file(sealed)["weight"], WEIGHT)
        assert_refused(sealed, "its contents do not match its SHA-256")

    def test_a_flipped_bit_anywhere(self, sealed):
        content = sealed.read_bytes()
        draw = random.Random(0)
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << draw.randrange(8)
            sealed.write_bytes(flipped)
            assert_refused(sealed, "truncated or damaged|not a safetensors file|format version")


class Bomb:
    """An object whose unpickling makes a directory."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


class TestForeignFiles:
    @pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
    def test_code_is_never_run(self, tmp_path, write):
        path, trace = tmp_path / "last.safetensors", tmp_path / "trace"
        with path.open("wb") as file:
            write(Bomb(trace), file)
        assert_refused(path, "is not a safetensors file")
        assert not trace.exists()
        with path.open("rb") as file:
            pickle.load(file) if write is pickle.dump else torch.load(file, weights_only=False)
        assert trace.exists(), "the file was harmless, so the test proves nothing"

    def test_unsealed_weights_are_read_where_they_are_allowed(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"weight": WEIGHT}, path, {"format": "pt", "author": "somebody"})
        tensors, header = read_sealed(path, allow_unsealed=True)
        assert torch.equal(tensors["weight"], WEIGHT)
        assert header == {}
        with pytest.raises(CheckpointError, match="not written by tritoncaps: it has no seal"):
            read_sealed(path)

    @pytest.mark.parametrize("key", ["tritoncaps", "sha256"])
    def test_half_a_seal_is_damage(self, tmp_path, key):
        path = tmp_path / "weights.safetensors"
        save_file({"weight": WEIGHT}, path, {key: "1", "header": "{}"})
        assert_refused(path, "do not match its SHA-256")

    def test_another_version(self, sealed):
        sealed.write_bytes(sealed.read_bytes().replace(b'"tritoncaps": "1"', b'"tritoncaps": "2"'))
        assert_refused(sealed, "has format version 2, but this program reads version 1; use the")

    def test_a_claimed_header_is_not_allocated(self, tmp_path):
        path = tmp_path / "last.safetensors"
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        assert_refused(path, f"it has 10 bytes and claims {2**62 + 8} or more")

    @pytest.mark.parametrize(
        ("shape", "offsets"),
        [([2**40], [0, 2**42]), ([2**40], [0, 8]), ([2**40, 2**40], [0, 8]), ([2], [8, 16])],
        ids=["more-than-the-file", "more-than-its-bytes", "overflow", "hole"],
    )
    @pytest.mark.parametrize("header", [None, "{}"], ids=["unsealed", "sealed"])
    def test_claimed_tensors_are_not_allocated(self, tmp_path, header, shape, offsets):
        path = tmp_path / "last.safetensors"
        table = {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        forge(path, table, bytes(8), header)
        assert_refused(path, "is truncated or damaged")

    @pytest.mark.parametrize(
        "header",
        [
            *("", "{", "3", "[1]", "[" * 10**5, '{"$tuple": 3}', '{"a": {"$code": "1"}}'),
            *('{"a": {"$float": "x"}}', '{"a": {"$dict": [[[], 1]]}}', '{"a": {"$dict": [1]}}'),
            *('{"a": {"$tensor": "none"}}', '{"a": {"$tensor": []}}'),
            '{"a": {"$tensor": "w"}, "b": {"$tensor": "w"}}',
        ],
        ids=lambda header: header[:30],
    )
    def test_a_header_that_we_would_not_write(self, tmp_path, header):
        path = tmp_path / "last.safetensors"
        forge(path, {"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, bytes(2), header)
        assert_refused(path, "its header cannot be read")
