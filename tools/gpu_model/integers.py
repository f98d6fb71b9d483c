"""What instructions do with integers and predicates.

Each function executes one instruction for all threads whose guard holds. A result is unknown if it
needs something unknown.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.gpu_model.registers import HALF, MASK, Flags, Registers, Words, is_predicate
from tools.gpu_model.sass import Instruction

Execute = Callable[[Registers, Instruction, Flags | None], None]
EXECUTES: dict[str, Execute] = {}  # by opcode


def _executes(*opcodes: str) -> Callable[[Execute], Execute]:
    def add(function: Execute) -> Execute:
        EXECUTES.update(dict.fromkeys(opcodes, function))
        return function

    return add


def _split(instruction: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """The operands of arithmetic: destination, carries out, sources, carries in."""
    destination, *rest = instruction.operands
    out: list[str] = []
    while rest and is_predicate(rest[0]):
        out.append(rest.pop(0))
    inside: list[str] = []
    while rest and is_predicate(rest[-1]):
        inside.insert(0, rest.pop())
    return destination, out, rest, inside


def _carry(registers: Registers, instruction: Instruction, inside: list[str]) -> Words | None:
    total = registers.zero
    if "X" in instruction.modifiers:
        for text in inside:
            value = registers.flag(text)
            if value is None:
                return None
            total = total + value
    return total


def _sum(
    registers: Registers,
    guard: Flags | None,
    destination: str,
    out: list[str],
    terms: Sequence[Words | None],
) -> None:
    total: Words | None = registers.zero
    for term in terms:
        total = None if total is None or term is None else total + term
    for n, text in enumerate(out):
        carry = None if total is None else total >> HALF > np.uint64(n)
        registers.set_flag(text, carry, guard)
    registers.set_word(destination, total, guard)


@_executes("IADD3", "UIADD3", "IADD", "VIADD", "UVIADD")
def _iadd3(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A sum, with carries into and out of the next word."""
    destination, out, sources, inside = _split(instruction)
    terms = [registers.word(text) for text in sources]
    terms.append(_carry(registers, instruction, inside))
    _sum(registers, guard, destination, out, terms)


@_executes("IMAD", "UIMAD")
def _imad(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """a · b + c: the low word, the high word (HI) or both (WIDE)."""
    destination, out, (a, b, c), inside = _split(instruction)
    modifiers = instruction.modifiers
    is_wide = "WIDE" in modifiers or "HI" in modifiers
    x, y = registers.word(a), registers.word(b)
    z = registers.pair(c) if is_wide else registers.word(c)
    carry = _carry(registers, instruction, inside)
    if a in ("RZ", "URZ") or b in ("RZ", "URZ"):
        x = y = registers.zero
    total = overflow = None
    if x is not None and y is not None and z is not None and carry is not None:
        if is_wide and "U32" not in modifiers:
            product = (_signed(x) * _signed(y)).view(np.uint64)
        else:
            product = (x & MASK) * (y & MASK)
        total = product + z + carry
        overflow = total < product
    for text in out:
        registers.set_flag(text, overflow, guard)
    high = None if total is None else total >> HALF
    if "HI" in modifiers:
        registers.set_word(destination, high, guard)
        return
    registers.set_word(destination, total, guard)
    if is_wide:
        registers.set_word(destination, high, guard, 1)


@_executes("LEA", "ULEA")
def _lea(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A shifted value plus another. HI takes the high word of the shifted pair."""
    destination, out, sources, inside = _split(instruction)
    modifiers = instruction.modifiers
    if "HI" in modifiers:
        if "SX32" in modifiers:
            a, b, shift = sources
            low = registers.word(a)
            value = None if low is None else _signed(low).view(np.uint64)
        else:
            a, b, c, shift = sources
            low, high = registers.word(a), registers.word(c)
            value = None if low is None or high is None else low | high << HALF
        if value is not None:
            value = value << np.uint64(int(shift, 16)) >> HALF & MASK
    else:
        a, b, shift = sources
        value = registers.word(a)
        if value is not None:
            value = value << np.uint64(int(shift, 16)) & MASK
    terms = [value, registers.word(b), _carry(registers, instruction, inside)]
    _sum(registers, guard, destination, out, terms)


@_executes("SHF", "USHF")
def _shf(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A shift of a pair of words."""
    destination, a, amount, c = instruction.operands
    modifiers = instruction.modifiers
    low, high, shift = registers.word(a), registers.word(c), registers.word(amount)
    if "L" in modifiers and "HI" not in modifiers:
        high = registers.zero
    if "R" in modifiers and "HI" in modifiers:
        low = registers.zero
    if low is None or high is None or shift is None:
        registers.set_word(destination, None, guard)
        return
    value = (low & MASK) | (high & MASK) << HALF
    shift = np.minimum(shift, np.uint64(63))
    if "L" in modifiers:
        value = value << shift
    elif modifiers & {"S32", "S64"}:
        value = (value.view(np.int64) >> shift.astype(np.int64)).view(np.uint64)
    else:
        value = value >> shift
    registers.set_word(destination, value >> HALF if "HI" in modifiers else value, guard)


@_executes("LOP3", "ULOP3")
def _lop3(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A bitwise function of three words."""
    operands = list(instruction.operands)
    out = operands.pop(0) if is_predicate(operands[0]) else "PT"
    destination, a, b, c, table = operands[:5]
    words = [registers.word(text) for text in (a, b, c)]
    value = _look_up(int(table, 16), words, MASK)
    value = None if value is None else registers.zero | value
    registers.set_word(destination, value, guard)
    registers.set_flag(out, None if value is None else value != 0, guard)


@_executes("PLOP3", "UPLOP3")
def _plop3(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The same for predicates."""
    first, second, *sources, table, other = instruction.operands
    flags = [registers.flag(text) for text in sources]
    for text, lut in ((first, table), (second, other)):
        value = _look_up(int(lut, 16), flags, np.bool_(True))
        registers.set_flag(text, None if value is None else registers.true & value, guard)


@_executes("ISETP", "UISETP")
def _isetp(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A comparison. EX continues one of the low words with the high words."""
    first, second, a, b, *inside = instruction.operands
    modifiers = instruction.modifiers
    x, y, also = registers.word(a), registers.word(b), registers.flag(inside[0])
    result: Flags | None = None
    if x is not None and y is not None:
        x, y = x & MASK, y & MASK
        compare = next(_COMPARISONS[name] for name in modifiers if name in _COMPARISONS)
        result = compare(x, y) if "U32" in modifiers else compare(_signed(x), _signed(y))
        if "EX" in modifiers:
            low = registers.flag(inside[1])
            result = None if low is None else np.where(x == y, low, result)
    for text, value in ((first, result), (second, None if result is None else ~result)):
        registers.set_flag(text, _combine(modifiers, value, also), guard)


@_executes("SEL", "USEL")
def _sel(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """One of two words."""
    destination, a, b, choice = instruction.operands
    x, y, flag = registers.word(a), registers.word(b), registers.flag(choice)
    value = None
    if x is not None and y is not None and flag is not None:
        value = np.where(flag, x, y)
    registers.set_word(destination, value, guard)


@_executes("VIMNMX", "UVIMNMX", "IMNMX")
def _vimnmx(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The smaller or the larger of two words."""
    destination, out, sources, inside = _split(instruction)
    x, y = (registers.word(text) for text in sources)
    value = None
    if x is not None and y is not None:
        is_less = x < y if "U32" in instruction.modifiers else _signed(x) < _signed(y)
        value = np.where(is_less == (inside[0] in ("PT", "UPT")), x, y)
    for text in out:
        registers.set_flag(text, None, guard)
    registers.set_word(destination, value, guard)


@_executes("VIADDMNMX")
def _viaddmnmx(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The same for a sum and a word."""
    destination, _out, (a, b, c), inside = _split(instruction)
    terms = [registers.word(text) for text in (a, b, c)]
    if terms[0] is None or terms[1] is None or terms[2] is None:
        registers.set_word(destination, None, guard)
        return
    total, limit = (terms[0] + terms[1]) & MASK, terms[2] & MASK
    is_unsigned = "U32" in instruction.modifiers
    is_less = total < limit if is_unsigned else _signed(total) < _signed(limit)
    is_minimum = inside[0] in ("PT", "UPT")
    registers.set_word(destination, np.where(is_less == is_minimum, total, limit), guard)


@_executes("MOV", "UMOV")
def _mov(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A copy."""
    destination, source, *_ = instruction.operands
    registers.set_word(destination, registers.word(source), guard)


@_executes("HFMA2")
def _hfma2(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A product with zero moves a constant, written as two half-precision numbers."""
    destination, a, b, *halves = instruction.operands
    value = None
    if a.lstrip("-") == b.lstrip("-") == "RZ" and len(halves) == 2:
        high, low = np.array(halves, np.float64).astype(np.float16).view(np.uint16).tolist()
        value = registers.constant(high << 16 | low)
    registers.set_word(destination, value, guard)


@_executes("R2UR")
def _r2ur(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A copy to a register that all threads share."""
    destination, source = instruction.operands[0], instruction.operands[-1]
    registers.set_word(destination, registers.word(source), guard)


@_executes("IABS")
def _iabs(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """An absolute value."""
    destination, source = instruction.operands
    value = registers.word(source)
    known = None if value is None else np.abs(_signed(value)).astype(np.uint64)
    registers.set_word(destination, known, guard)


@_executes("SGXT", "USGXT")
def _sgxt(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The low bits, extended by zeros or by their sign."""
    destination, source, bits = instruction.operands
    value, shift = registers.word(source), np.int64(64 - int(bits, 16))
    if value is not None:
        shifted = value << shift.astype(np.uint64)
        if "U32" in instruction.modifiers:
            value = shifted >> shift.astype(np.uint64)
        else:
            value = (shifted.view(np.int64) >> shift).view(np.uint64)
    registers.set_word(destination, value, guard)


@_executes("S2R", "S2UR")
def _s2r(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A number of the thread or of the program. 0 for what a launch does not set."""
    destination, source = instruction.operands
    registers.set_word(destination, registers.special.get(source, registers.zero), guard)


@_executes("CS2R")
def _cs2r(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The same for two words."""
    destination, source = instruction.operands
    value = registers.zero if source == "SRZ" else None
    for offset in range(1 if "32" in instruction.modifiers else 2):
        registers.set_word(destination, value, guard, offset)


@_executes("LDC", "ULDC", "LDCU")
def _ldc(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A load of constants: the arguments."""
    destination, source = instruction.operands
    for offset in range(max(instruction.bytes_each // 4, 1)):
        registers.set_word(destination, registers.word(source, offset), guard, offset)


@_executes("P2R")
def _p2r(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """Predicates as the bits of a word."""
    destination, _, base, mask = instruction.operands
    value = registers.word(base)
    chosen, first = int(mask, 16), _byte(instruction)
    for bit in range(7):
        if value is not None and chosen >> bit & 1:
            flag = registers.flag(f"P{bit}")
            place = np.uint64(1 << bit + first)
            value = None if flag is None else np.where(flag, value | place, value & ~place)
    registers.set_word(destination, value, guard)


@_executes("R2P")
def _r2p(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """The bits of a word as predicates."""
    _, source, mask = instruction.operands
    value, first = registers.word(source), _byte(instruction)
    for bit in range(7):
        if int(mask, 16) >> bit & 1:
            place = np.uint64(1 << bit + first)
            flag = None if value is None else (value & place) != 0
            registers.set_flag(f"P{bit}", flag, guard)


@_executes("VOTE", "VOTEU")
def _vote(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """Whether all threads agree. Here the program votes, not the warp."""
    first, *_, last = instruction.operands
    flag = registers.flag(last)
    if is_predicate(first):
        any_or_all = np.any if "ANY" in instruction.modifiers else np.all
        value = None if flag is None else registers.true & any_or_all(flag)
        registers.set_flag(first, value, guard)
    else:
        registers.forget(instruction)


@_executes("SYNCS", "UTCATOMSWS")
def _syncs(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A test whether a copy has arrived, or whether tensor memory is free: the answer is yes."""
    registers.forget(instruction)
    if is_predicate(instruction.operands[0]):
        registers.set_flag(instruction.operands[0], registers.true, guard)


@_executes("FCHK")
def _fchk(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """Whether a division needs its slow path: it does not."""
    registers.set_flag(instruction.operands[0], ~registers.true, guard)


@_executes("I2F", "I2FP")
def _i2f(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """To floating point: with the next two, how a division of integers begins."""
    destination, source = instruction.operands
    value = registers.pair(source) if "U64" in instruction.modifiers else registers.word(source)
    registers.set_word(destination, None if value is None else _float_bits(value), guard)


@_executes("MUFU")
def _mufu(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """A reciprocal."""
    destination, source = instruction.operands
    value = registers.word(source) if "RCP" in instruction.modifiers else None
    if value is not None:
        number = value.astype(np.uint32).view(np.float32)
        value = _float_bits(1 / np.where(number == 0, np.inf, number))
    registers.set_word(destination, value, guard)


@_executes("F2I")
def _f2i(registers: Registers, instruction: Instruction, guard: Flags | None) -> None:
    """Back to an integer."""
    destination, source = instruction.operands
    value = registers.word(source)
    if value is not None:
        number = value.astype(np.uint32).view(np.float32).astype(np.float64)
        value = np.clip(np.nan_to_num(number), 0, 2.0**63).astype(np.uint64)
    registers.set_word(destination, value, guard)
    if "U64" in instruction.modifiers:
        high = None if value is None else value >> HALF
        registers.set_word(destination, high, guard, 1)


_COMPARISONS: Mapping[str, Callable[..., Flags]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _signed(value: Words) -> NDArray[np.int64]:
    return (value & MASK).astype(np.uint32).view(np.int32).astype(np.int64)


def _float_bits(value: NDArray[np.generic]) -> Words:
    return value.astype(np.float32).view(np.uint32).astype(np.uint64)


def _byte(instruction: Instruction) -> int:
    return next((8 * n for n in (1, 2, 3) if f"B{n}" in instruction.modifiers), 0)


def _look_up(table: int, values: Sequence[Any], ones: Any) -> Any:
    """The bitwise function of three values whose truth table is given."""
    # A value that the table does not depend on may be unknown.
    needed = [
        any((table >> n ^ table >> (n ^ 4 >> place)) & 1 for n in range(8)) for place in range(3)
    ]
    if any(value is None for value, need in zip(values, needed, strict=True) if need):
        return None
    nothing = ones ^ ones
    result = nothing
    for n in range(8):
        if table >> n & 1:
            term = ones
            for place, value in enumerate(values):
                known = nothing if value is None else value & ones
                term = term & (known if n >> (2 - place) & 1 else known ^ ones)
            result = result | term
    return result


def _combine(modifiers: frozenset[str], value: Flags | None, also: Flags | None) -> Flags | None:
    if "AND" in modifiers:
        if also is not None and not also.any():
            return also
        return None if value is None or also is None else value & also
    if value is None or also is None:
        return None
    return value | also if "OR" in modifiers else value ^ also
