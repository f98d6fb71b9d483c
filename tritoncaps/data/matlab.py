"""Read numeric arrays from a Matlab file of version 5, the format of SVHN and affNIST.

After a header of 128 bytes come elements: a type, a number of bytes, and that many bytes, filled up
to a multiple of 8. An element of at most 4 bytes may stand in the tag itself. An array is an
element of elements: flags, sizes, a name, the values column by column. A structure has, in place of
values, the names of its fields and an array for each. All that may be inside of another element
that is compressed. scipy.io reads such files too, but some damaged ones crash it.
"""

import math
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tritoncaps.data.files import DataFile, check_content, opened, refuse

_HEADER = 128
_VERSION = b"\x00\x01IM"  # 5, little-endian
_MATRIX, _COMPRESSED = 14, 15
_INT8, _INT32, _UINT32 = 1, 5, 6
_TYPES = {
    **{1: torch.int8, 2: torch.uint8, 3: torch.int16, 5: torch.int32},
    **{7: torch.float32, 9: torch.float64, 12: torch.int64},
}
_NUMERIC = range(6, 16)  # the classes of arrays that hold numbers
_STRUCTURE = 2
_COMPLEX = 0x0800
_LONGEST_NAME, _MOST_AXES, _MOST_FIELDS = 63, 32, 64
# The widest numbers take so many. The names and the labels of an image are among the rest.
_MOST_BYTES, _MORE_BYTES = 8, 1 << 16


def read_matlab(
    path: Path, file: DataFile, names: Collection[str], verify: bool
) -> dict[str, Tensor]:
    """Read the numeric arrays of some names. Those that are not there are left out.

    A field of a structure is called "structure.field". With `verify`, the content must have the
    checksum of the published file, if that is known. It may unpack to `_MOST_BYTES` for each value
    of `file.shape`, so a hostile file cannot fill the memory.

    Raises:
        DatasetError: the file is truncated, foreign or altered.
    """
    most = _MOST_BYTES * math.prod(file.shape) + _MORE_BYTES if verify else 0
    with opened(path, file) as stream:
        content = stream.read(most + 1 if verify else -1)
    if verify:
        if len(content) > most:
            refuse(path, file, f"at most {most} bytes", "more")
        check_content(path, file, content)
    if len(content) < _HEADER or content[_HEADER - 4 : _HEADER] != _VERSION:
        refuse(path, file, "a Matlab file of version 5", f"the header {content[:20]!r}...")
    elements = _Bytes(path, file, content, most, _HEADER)
    found: dict[str, Tensor] = {}
    while elements.left:
        # Nothing is compressed twice.
        packed = elements.packed()
        _read_array(elements if packed is None else packed, names, found)
    return found


def _read_array(
    elements: "_Bytes", names: Collection[str], found: dict[str, Tensor], name: str = ""
) -> None:
    """Read the next element. If it is an array of one of the names, add it to `found`.

    `name` is that of a field. In a structure, the name of an array is empty.
    """
    kind, size = elements.tag()
    if size > elements.left:
        elements.refuse(f"{size} more bytes", f"{elements.left}")
    end = elements.position + size
    if kind == _MATRIX and size:
        flags = elements.numbers(_UINT32, 2)
        shape = elements.numbers(_INT32, _MOST_AXES)
        own_name = elements.text(_LONGEST_NAME)[0]
        name = name or own_name
        kind = flags[0] & 0xFF if flags else 0
        if kind in _NUMERIC and not flags[0] & _COMPLEX and name in names:
            found[name] = elements.values(shape)
        elif kind == _STRUCTURE and any(wanted.startswith(f"{name}.") for wanted in names):
            _read_fields(elements, names, found, name)
    elements.position = min(end + -end % 8, len(elements.content))


def _read_fields(
    elements: "_Bytes", names: Collection[str], found: dict[str, Tensor], name: str
) -> None:
    """Read the fields of a structure of one entry."""
    length = elements.numbers(_INT32, 1)
    if not length or not 0 < length[0] <= _LONGEST_NAME + 1:
        elements.refuse("the length of a structure's names", f"{length}")
    for field in elements.text(_MOST_FIELDS * length[0], length[0]):
        _read_array(elements, names, found, f"{name}.{field}")


@dataclass
class _Bytes:
    """The content of a file, or of a compressed element, and the place up to which it was read."""

    path: Path
    file: DataFile
    content: bytes
    most: int  # bytes that an element may unpack to, or 0 for any number
    position: int = 0

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def refuse(self, expected: str, found: str) -> NoReturn:
        refuse(self.path, self.file, expected, found)

    def take(self, size: int) -> bytes:
        """Read some bytes."""
        if size > self.left:
            self.refuse(f"{size} more bytes", f"{self.left}")
        self.position += size
        return self.content[self.position - size : self.position]

    def tag(self) -> tuple[int, int]:
        """Read the type and the size of an element that does not stand in its tag."""
        kind, size = struct.unpack("<II", self.take(8))
        return kind, size

    def packed(self) -> "_Bytes | None":
        """Read and decompress the next element, or return None if it is not compressed."""
        kind, size = self.tag()
        if kind != _COMPRESSED:
            self.position -= 8
            return None
        packing = zlib.decompressobj()
        try:
            content = packing.decompress(self.take(size), self.most)
        except zlib.error as error:
            self.refuse("whole compressed arrays", f"an error in one ({error})")
        if packing.unconsumed_tail:
            self.refuse(f"arrays of at most {self.most} bytes", "more")
        if not packing.eof:
            self.refuse("whole compressed arrays", "the beginning of one")
        return _Bytes(self.path, self.file, content, self.most)

    def element(self) -> tuple[int, bytes]:
        """Read the type and the content of an element."""
        kind, size = self.tag()
        if kind >> 16:  # it stands in its tag
            self.position -= 4
            kind, size, filled = kind & 0xFFFF, kind >> 16, 4
        else:
            filled = size + -size % 8
        content = self.take(size)
        self.position = min(self.position + filled - size, len(self.content))
        return kind, content

    def numbers(self, expected: int, most: int) -> tuple[int, ...]:
        """Read an element of at most `most` integers of a type."""
        kind, content = self.element()
        width = 1 if expected == _INT8 else 4
        if kind != expected or len(content) % width or len(content) > width * most:
            self.refuse(
                f"at most {most} numbers of type {expected}",
                f"{len(content)} bytes of type {kind}",
            )
        letter = {_INT8: "b", _INT32: "i", _UINT32: "I"}[expected]
        return struct.unpack(f"<{len(content) // width}{letter}", content)

    def text(self, most: int, length: int = 0) -> list[str]:
        """Read an element of names, each filled up with zeros to `length` bytes, or of one name."""
        content = bytes(number % 256 for number in self.numbers(_INT8, most))
        length = length or len(content) or 1
        starts = range(0, max(len(content), 1), length)
        return [content[at : at + length].split(b"\0")[0].decode("latin-1") for at in starts]

    def values(self, shape: tuple[int, ...]) -> Tensor:
        """Read an element that fills an array of this shape."""
        kind, content = self.element()
        if kind not in _TYPES:
            known = ", ".join(map(str, _TYPES))
            self.refuse(f"values of a type among {known}", f"type {kind}")
        count = len(content) // _TYPES[kind].itemsize
        if min(shape, default=0) < 1 or math.prod(shape) != count or not count:
            self.refuse(f"the values of an array {shape}", f"{len(content)} bytes of type {kind}")
        values = torch.frombuffer(bytearray(content), dtype=_TYPES[kind])[:count]
        return values.reshape(shape[::-1]).permute(*range(len(shape))[::-1])
