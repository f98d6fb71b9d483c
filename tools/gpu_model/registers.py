"""The registers of all threads of a program, as far as they are known."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tools.gpu_model.sass import Instruction

Words = NDArray[np.uint64]  # a 32-bit register of every thread
Flags = NDArray[np.bool_]
MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


class Registers:
    """Registers and predicates by name. None is unknown.

    What was never written may hold anything, so it is 0 here: the compiler packs flags into
    registers that it clears bit by bit.
    """

    def __init__(
        self, constants: Mapping[int, int], threads: int, program: tuple[int, int, int]
    ) -> None:
        self.constants, self.threads = constants, threads
        self.zero = np.zeros(threads, np.uint64)
        self.true = np.ones(threads, np.bool_)
        thread = np.arange(threads, dtype=np.uint64)
        self.special = {"SR_TID.X": thread, "SR_LANEID": thread % HALF}
        for axis, number in zip("XYZ", program, strict=True):
            self.special[f"SR_CTAID.{axis}"] = self.constant(number)
        self._words: dict[str, Words | None] = {}
        self._flags: dict[str, Flags | None] = {}

    def constant(self, value: int) -> Words:
        """The same word in every thread."""
        return np.full(self.threads, value & 0xFFFFFFFF, np.uint64)

    def word(self, text: str, offset: int = 0) -> Words | None:
        """The value of an operand, or of the register `offset` after it. None if it is unknown."""
        if text[0] in "-~":
            value = self.word(text[1:], offset)
            if value is None:
                return None
            # Not cut to 32 bits: -0 carries into the next word.
            return np.uint64(1 << 32) - value if text[0] == "-" else MASK - value
        text = text.removesuffix(".64")
        if text in ("RZ", "URZ", "SRZ"):
            return self.zero
        if text.startswith(("R", "UR")):
            return self._words.get(_name(text, offset), self.zero)
        if text.startswith("0x"):
            return self.constant(int(text, 16)) if offset == 0 else self.zero
        if text.startswith("c[0x0][0x"):
            known = self.constants.get(int(text[7:-1], 16) + 4 * offset)
            return None if known is None else self.constant(known)
        return None

    def pair(self, text: str) -> Words | None:
        """A 64-bit value."""
        low, high = self.word(text), self.word(text, 1)
        return None if low is None or high is None else low | high << HALF

    def flag(self, text: str) -> Flags | None:
        """The value of a predicate. None if it is unknown."""
        if text.startswith("!"):
            value = self.flag(text[1:])
            return None if value is None else ~value
        return self.true if text in ("PT", "UPT") else self._flags.get(text, ~self.true)

    def set_word(
        self, text: str, value: Words | None, guard: Flags | None, offset: int = 0
    ) -> None:
        """Write a register in the threads whose guard holds."""
        if text in ("RZ", "URZ"):
            return
        name = _name(text, offset)
        if value is not None and guard is not None and guard is not self.true:
            old = self._words.get(name, self.zero)
            # If the other threads' value is unknown, assume that they do not use it.
            value = value if old is None else np.where(guard, value, old)
        self._words[name] = None if value is None or guard is None else value & MASK

    def set_flag(self, text: str, value: Flags | None, guard: Flags | None) -> None:
        """Write a predicate in the threads whose guard holds."""
        if text in ("PT", "UPT"):
            return
        if value is not None and guard is not None and guard is not self.true:
            old = self._flags.get(text, ~self.true)
            value = None if old is None else np.where(guard, value, old)
        self._flags[text] = None if guard is None else value

    def forget(self, instruction: Instruction) -> None:
        """Make unknown what an instruction writes: predicates, then one destination."""
        for text in instruction.operands:
            if is_predicate(text):
                self.set_flag(text, None, None)
                continue
            is_register = text.lstrip("U")[:1] == "R" and text.lstrip("UR").isdigit()
            if is_register and not _writes_nothing(instruction):
                for offset in range(_words_written(instruction)):
                    self.set_word(text, None, None, offset)
            return


def _name(text: str, offset: int) -> str:
    """The register that lies `offset` after one."""
    number = text.lstrip("UR")
    return f"{text.removesuffix(number)}{int(number) + offset}"


def is_predicate(text: str) -> bool:
    """Whether an operand is a predicate, such as !P0 or UPT."""
    bare = text.lstrip("!").removeprefix("U")
    return bare == "PT" or (bare[:1] == "P" and bare[1:].isdigit())


def _writes_nothing(instruction: Instruction) -> bool:
    stores = ("STG", "STS", "STSM", "STL", "STTM", "RED", "LDGSTS", "UTCHMMA", "UTCBAR")
    opcode = instruction.opcode
    return instruction.kind in ("sync", "branch") or opcode in stores or "SETP" in opcode


def _words_written(instruction: Instruction) -> int:
    """How many registers an instruction writes whose result is unknown."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode == "HGMMA":
        shape = next(name for name in modifiers if name.startswith("64x"))
        return int(shape.split("x")[1]) // 2
    if opcode == "LDTM":
        return next((int(name[1:]) for name in modifiers if name[:1] == "x"), 1)
    if opcode == "LDSM":
        return next((n for n in (4, 2) if str(n) in modifiers), 1)
    if opcode in ("HMMA", "DMMA"):
        return 4
    if opcode in ("LDG", "LDS", "LDL"):
        return max(instruction.bytes_each // 4, 1)
    return 2 if opcode[0] == "D" or opcode[-1] == "2" or "F64" in modifiers else 1
