"""What a program moves: bytes from the second-level cache, and which tensors it touches."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.gpu_model.sass import Instruction
from tools.gpu_model.walk import Walk

_SECTOR = 32  # bytes: what a cache reads at once
_WARP = 32


@dataclass(frozen=True)
class Span:
    """The addresses of a tensor, and the position of the argument that it is."""

    first: int
    nbytes: int
    argument: int


@dataclass
class Traffic:
    """What one program moves.

    Attributes:
        level2_bytes: read from the second-level cache and written to it.
        cached: the steps of a walk whose loads find all in the first-level cache.
        read, written: by argument, the bytes that the program touches.
        unknown: the accesses whose address depends on data. They count as gapless.
    """

    level2_bytes: int
    cached: set[int]
    read: dict[int, int]
    written: dict[int, int]
    unknown: int

    @staticmethod
    def of(
        code: Sequence[Instruction], walk: Walk, spans: Sequence[Span], cache_bytes: int
    ) -> "Traffic":
        """Follow a program's accesses through a first-level cache that forgets the oldest.

        Args:
            code, walk: the kernel and the program's way through it.
            spans: the tensors. An access outside of them is an error of the walk.
            cache_bytes: what the program has of the first-level cache.

        Raises:
            ValueError: an access lies outside every tensor.
        """
        cache: OrderedDict[int, None] = OrderedDict()
        most = cache_bytes // _SECTOR
        traffic = Traffic(0, set(), {}, {}, 0)
        touched: dict[str, list[np.ndarray]] = {"read": [], "written": []}
        for step, access in walk.accesses.items():
            instruction = code[walk.path[step]]
            is_store = instruction.opcode == "STG"
            if access.address is None or access.mask is None:
                traffic.unknown += 1
                traffic.level2_bytes += walk.threads * instruction.bytes_each
                continue
            first = access.address // np.uint64(_SECTOR)
            last = (access.address + np.uint64(instruction.bytes_each - 1)) // np.uint64(_SECTOR)
            sectors = np.stack([first, last], 1)
            missed = 0
            for warp in range(0, len(sectors), _WARP):
                mask = access.mask[warp : warp + _WARP]
                for sector in np.unique(sectors[warp : warp + _WARP][mask]).tolist():
                    if is_store or "BYPASS" in instruction.modifiers or sector not in cache:
                        missed += 1
                    if not is_store:
                        cache[sector] = None
                        cache.move_to_end(sector)
                        if len(cache) > most:
                            cache.popitem(last=False)
            traffic.level2_bytes += missed * _SECTOR
            if not missed:
                traffic.cached.add(step)
            touched["written" if is_store else "read"].append(sectors[access.mask].ravel())
        for name, lists in touched.items():
            if lists:
                count = _by_argument(np.unique(np.concatenate(lists)), spans)
                getattr(traffic, name).update(count)
        return traffic


def _by_argument(sectors: np.ndarray, spans: Sequence[Span]) -> dict[int, int]:
    """Bytes by argument. A sector belongs to the first tensor that it overlaps."""
    found: dict[int, int] = {}
    left = np.ones(len(sectors), np.bool_)
    first = sectors * np.uint64(_SECTOR)
    for span in spans:
        low, high = span.first // _SECTOR * _SECTOR, span.first + span.nbytes
        inside = left & (first >= np.uint64(low)) & (first < np.uint64(high))
        left &= ~inside
        if inside.any():
            found[span.argument] = found.get(span.argument, 0) + int(inside.sum()) * _SECTOR
    if left.any():
        raise ValueError(f"an access at {int(first[left][0]):#x} lies outside every tensor")
    return found
