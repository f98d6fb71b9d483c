"""Reads machine code: instructions from a disassembled cubin, with what the scheduler is told.

Since Volta, every instruction carries control bits that the assembler sets: how many clocks to wait
before the next instruction, which of six scoreboards it sets when its result or its operands are
free, and which scoreboards it waits for. Their layout is described in Jia et al., "Dissecting the
NVIDIA Volta GPU architecture via microbenchmarking" (arXiv 1804.06826), section 2.1. It has stayed
the same up to Blackwell.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

_FIRST = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_NO_BARRIER = 7

# The classes that a report counts, with their mnemonics. Anything else is "other".
CLASSES = {
    "tensor": "HMMA HGMMA DMMA UTCHMMA UTCQMMA WARPGROUP UTCBAR UTCATOMSWS LDTM STTM",
    "float": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FMNMX FMNMX3 FSEL FSETP FCHK FSET HADD2 HFMA2 HMUL2 "
    "DFMA DADD DMUL DSETP F2FP F2F MUFU",
    "integer": "IADD3 IMAD LEA SHF LOP3 ISETP IABS VIADD VIMNMX IMNMX IADD SGXT BMSK FLO POPC "
    "I2F F2I I2FP UIADD3 UIMAD ULEA USHF ULOP3 UISETP USGXT UFLO UVIADD UVIMNMX",
    "move": "MOV UMOV SEL USEL PRMT UPRMT CS2R S2R S2UR R2UR LDC ULDC LDCU P2R R2P PLOP3 UPLOP3 "
    "VOTE VOTEU ELECT REDUX",
    "shared": "LDS LDSM STS STSM ATOMS",
    "shuffle": "SHFL",
    "global": "LDG STG LDGSTS RED ATOMG UTMALDG UTMASTG",
    "stack": "LDL STL",
    "sync": "BAR WARPSYNC BSYNC BSSY MEMBAR FENCE ERRBAR CCTL SYNCS LDGDEPBAR DEPBAR NANOSLEEP",
    "branch": "BRA EXIT RET CALL BRX BREAK BPT",
}
_CLASS_OF = {name: cls for cls, names in CLASSES.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: in the kernel, in bytes.
        guard: the predicate without which it does nothing, such as "!P0", or "".
        name: the mnemonic with its modifiers, such as "LDG.E.128".
        operands: as they are written.
        stall: clocks before the warp's next instruction.
        sets: the scoreboards that it sets: until its result is there, until its operands are read.
        waits: the scoreboards that must be clear before it starts.
    """

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    stall: int
    sets: tuple[int | None, int | None]
    waits: tuple[int, ...]

    @cached_property
    def opcode(self) -> str:
        """The mnemonic without modifiers."""
        return self.name.partition(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        """What follows the mnemonic, separated by dots."""
        return frozenset(self.name.split(".")[1:])

    @cached_property
    def kind(self) -> str:
        """A key of `CLASSES`, or "other"."""
        return _CLASS_OF.get(self.opcode, "other")

    @cached_property
    def bytes_each(self) -> int:
        """Bytes that a memory access moves for one thread."""
        widths = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((size for name, size in widths.items() if name in self.modifiers), 4)

    @cached_property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        last = self.operands[-1] if self.operands else ""
        return int(last, 16) if last.startswith("0x") else None


def cuobjdump(cubin: bytes, flag: str) -> str:
    """Run the disassembler that comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """Read the output of `cuobjdump -sass`."""
    instructions: list[Instruction] = []
    first: re.Match[str] | None = None
    for line in listing.splitlines():
        if match := _FIRST.match(line):
            first = match
        elif first is not None and (match := _SECOND.match(line)):
            instructions.append(_instruction(int(first[1], 16), first[2], int(match[1], 16)))
            first = None
    return instructions


def _instruction(address: int, text: str, high_word: int) -> Instruction:
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
    name, _, rest = text.partition(" ")
    operands = tuple(part.strip().replace(".reuse", "") for part in rest.split(",") if part.strip())
    control = high_word >> 41
    result, read = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        address,
        guard,
        name,
        operands,
        stall=control & 15,
        sets=(
            None if result == _NO_BARRIER else result,
            None if read == _NO_BARRIER else read,
        ),
        waits=tuple(n for n in range(6) if control >> 11 >> n & 1),
    )
