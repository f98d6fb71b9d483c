"""Damaged files: changes to their bytes, and a limit on the memory that reading them may take."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

# Numbers that a header may claim, in all widths.
CLAIMS = (0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Edit:
    """A change to some bytes. Positions are taken modulo the length of the content."""

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
        if self.kind == "splice":  # repeat a range elsewhere
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
    # The headers of all formats are at one end of the file.
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
def little_memory():
    """Limit allocations to 1 GiB, so that allocating a merely claimed size is an error."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    import resource  # exists wherever /proc does

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_nothing_was_claimed(error: BaseException | None) -> None:
    """Assert that no error in the chain is about memory: nobody allocated what a header claims."""
    while error is not None:
        assert not isinstance(error, MemoryError), error
        assert "allocate memory" not in str(error), error
        error = error.__cause__ or error.__context__
