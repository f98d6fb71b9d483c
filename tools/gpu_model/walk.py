"""Walks through machine code as one program of a launch does, to count what it executes.

The integers of a kernel are known without data: they come from the arguments, the program's number
and the thread's number. So its loops, branches, masks and addresses can be followed exactly. All
threads of the program are followed at once. What is loaded or computed in floating point is
unknown, and so is whatever depends on it.

A branch whose condition is unknown is taken only if it jumps over a call, because calls are slow
paths for rare values. Where the threads disagree, some thread runs what follows. So a branch
forward is taken only if all threads take it, and a branch back if any does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.gpu_model.integers import EXECUTES
from tools.gpu_model.registers import MASK, Flags, Registers, Words, is_predicate
from tools.gpu_model.sass import Instruction

_LIMIT = 20_000_000


@dataclass(frozen=True)
class Access:
    """What one instruction does in memory: the bytes' first address for each thread, and its mask.

    The address is None where it depends on data.
    """

    address: Words | None
    mask: Flags | None


@dataclass
class Walk:
    """What a program executes.

    Attributes:
        path: positions of the instructions in the listing, in the order of execution.
        threads: of the program.
        accesses: by step of the path, what a global access touches.
        wavefronts: by position in the listing, the wavefronts of a shared access of a warp.
    """

    threads: int
    path: list[int] = field(default_factory=list)
    accesses: dict[int, Access] = field(default_factory=dict)
    wavefronts: dict[int, float] = field(default_factory=dict)


def walk(
    code: Sequence[Instruction],
    constants: Mapping[int, int],
    *,
    threads: int,
    program: tuple[int, int, int] = (0, 0, 0),
) -> Walk:
    """Follow one program from its start to its exit.

    Args:
        code: the kernel.
        constants: the 32-bit words of the constant bank that the kernel may read, by address.
        threads: of a program.
        program: its number along each axis of the grid.

    Raises:
        RuntimeError: the program does not end.
    """
    return _Walker(code, Registers(constants, threads, program)).run()


class _Walker:
    def __init__(self, code: Sequence[Instruction], registers: Registers) -> None:
        self.code, self.registers = code, registers
        self.position = {instruction.address: n for n, instruction in enumerate(code)}
        self.returns: list[int] = []
        self.alive = registers.true  # the threads that have not left
        self.walk = Walk(registers.threads)

    def run(self) -> Walk:
        n: int | None = 0
        while n is not None and n < len(self.code):
            if self.code[n].opcode != "NOP":
                self.walk.path.append(n)
            if len(self.walk.path) > _LIMIT:
                raise RuntimeError(f"no end after {_LIMIT} instructions")
            n = self._step(n)
        return self.walk

    # Steps ----------------------------------------------------------------------------------------

    def _step(self, n: int) -> int | None:
        """Execute one instruction. Return the position of the next one, or None at the end."""
        instruction = self.code[n]
        guard = self.registers.flag(instruction.guard) if instruction.guard else self.registers.true
        opcode = instruction.opcode
        if opcode in ("BRA", "CALL", "RET", "EXIT"):
            return self._branch(n, instruction, guard)
        if opcode in ("LDG", "STG", "LDGSTS"):
            self._access(instruction, guard)
        elif opcode in ("LDS", "STS"):
            self._shared(instruction, guard)
        if opcode in EXECUTES:
            EXECUTES[opcode](self.registers, instruction, guard)
        else:
            self.registers.forget(instruction)
        return n + 1

    def _branch(self, n: int, instruction: Instruction, guard: Flags | None) -> int | None:
        opcode = instruction.opcode
        if "DIV" in instruction.modifiers:
            return n + 1
        for operand in instruction.operands[:-1]:
            if is_predicate(operand):
                more = self.registers.flag(operand)
                guard = None if guard is None or more is None else guard & more
        if guard is None:
            if opcode == "BRA" and (instruction.target or 0) <= instruction.address:
                raise RuntimeError(
                    f"the loop that ends at {instruction.address:#x} depends on data, or on an "
                    "instruction that the walk does not know"
                )
            target = self.position.get(instruction.target or -1, 0) if opcode == "BRA" else 0
            skips_call = any(self.code[k].opcode == "CALL" for k in range(n + 1, target))
            return target if skips_call else n + 1
        if opcode == "EXIT":
            self.alive = self.alive & ~guard
            return n + 1 if self.alive.any() else None
        taken = guard[self.alive]
        is_loop = instruction.target is not None and instruction.target <= instruction.address
        if not (taken.any() if is_loop else taken.all()):
            return n + 1
        if opcode == "RET":
            return self.returns.pop()
        if instruction.target is None:
            raise RuntimeError(f"a {instruction.name} to {instruction.operands} cannot be followed")
        if opcode == "CALL":
            self.returns.append(n + 1)
        if instruction.target == instruction.address:
            return None  # the padding after the last instruction
        return self.position[instruction.target]

    # Memory ---------------------------------------------------------------------------------------

    def _address(self, text: str, *, is_wide: bool) -> Words | None:
        """The value of an address such as desc[UR4][R2.64+UR6+0x10]."""
        registers = self.registers
        total = registers.zero
        for term in text[text.rindex("[") + 1 : text.rindex("]")].split("+"):
            name, _, modifier = term.partition(".")
            value: Words | None
            if not name.startswith(("R", "UR")):
                value = np.full(registers.threads, int(name, 16), np.int64).view(np.uint64)
            elif is_wide and modifier == "64":
                value = registers.pair(name)
            else:
                value = registers.word(name)
            if value is None:
                return None
            if modifier.startswith("X"):
                value = value * np.uint64(int(modifier[1:]))
            total = total + value
        return total

    def _access(self, instruction: Instruction, guard: Flags | None) -> None:
        operands = instruction.operands
        text = operands[1] if instruction.opcode in ("LDG", "LDGSTS") else operands[0]
        for operand in operands[2:]:  # a second guard of asynchronous copies
            if is_predicate(operand):
                more = self.registers.flag(operand)
                guard = None if guard is None or more is None else guard & more
        guard = None if guard is None else guard & self.alive
        address = self._address(text, is_wide=True)
        self.walk.accesses[len(self.walk.path) - 1] = Access(address, guard)

    def _shared(self, instruction: Instruction, guard: Flags | None) -> None:
        """Count the wavefronts the first time. Later addresses differ by what no bank sees."""
        position = self.walk.path[-1]
        if position in self.walk.wavefronts:
            return
        text = next(operand for operand in instruction.operands if operand.endswith("]"))
        address = self._address(text, is_wide=False)
        size = instruction.bytes_each
        if address is None or guard is None:
            count = max(size / 4, 1.0)
        else:
            count = _wavefronts(address & MASK, guard, size)
        self.walk.wavefronts[position] = count


def _wavefronts(address: Words, mask: Flags, size: int) -> float:
    """Wavefronts of a shared access: the most words of one bank that a group of threads needs.

    A group is as many threads as 32 banks serve in one go: all 32 for 4 bytes, 8 for 16 bytes.
    """
    group = min(32, 128 // size)
    words = (address // np.uint64(4)).reshape(-1, group)
    mask = mask.reshape(-1, group)
    total = 0
    for row, active in zip(words, mask, strict=True):
        unique = np.unique(row[active])
        if size > 4:
            unique = np.unique(unique[:, None] + np.arange(size // 4, dtype=np.uint64))
        if len(unique):
            total += int(np.bincount((unique % np.uint64(32)).astype(np.int64)).max())
    return total / (address.size / 32)
