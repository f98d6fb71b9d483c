"""The model: how long a kernel takes on one SM, and on all.

Two bounds come straight from the machine code.

- Throughput: a scheduler starts one instruction a clock. So an SM needs at least (instructions of
  all its warps) / 4 clocks. The same holds for each arithmetic unit, for the shared memory, and for
  the bytes from the second-level cache.
- Latency: a warp starts its instructions in order. Each waits for the clocks that the assembler
  set, and for the scoreboards of the results that it needs. So a program takes at least as long as
  one of its warps would if it were alone on the SM.

Warps hide each other's latency, but not perfectly: the time lies between the larger bound and the
sum of both. The prediction is the norm (throughput^p + latency^p)^(1/p) with p = 1.5. A simulation,
clock by clock, of the in-order warps of one SM chose that p: over the kernels of this package it
gave 0.8 to 1.3 times the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.gpu_model.compiling import Footprint
from tools.gpu_model.machine import (
    MOST_PROGRAMS,
    MOST_WARPS,
    REGISTERS,
    RESERVED_SHARED,
    SCHEDULERS,
    Machine,
)
from tools.gpu_model.sass import Instruction
from tools.gpu_model.traffic import Traffic
from tools.gpu_model.walk import Walk


@dataclass(frozen=True)
class Cost:
    """What one execution of an instruction takes from its SM.

    Attributes:
        unit: the arithmetic unit that it occupies, or "".
        clocks: for how long it occupies it.
        wavefronts: of the shared memory and the first-level cache, which all schedulers share.
        latency: clocks to its result, if a scoreboard tells when that is there.
    """

    unit: str = ""
    clocks: float = 0
    wavefronts: float = 0
    latency: float = 0


@dataclass(frozen=True)
class Bounds:
    """Clocks that a program needs.

    Attributes:
        units: by name, clocks for which one program occupies a part of the SM: "issue", each
            arithmetic unit of a scheduler, "shared" memory, and "level 2".
        latency: clocks that it takes even if it has the SM to itself.
    """

    units: dict[str, float]
    latency: float

    def together(self, programs: int) -> float:
        """Clocks until as many programs, started at once on one SM, are done."""
        throughput = programs * max(self.units.values())
        return (throughput**_NORM + self.latency**_NORM) ** (1 / _NORM) if programs else 0.0


_NORM = 1.5


@dataclass(frozen=True)
class Waves:
    """How the programs of a launch are spread over the SMs.

    Attributes:
        resident: programs that an SM holds at once.
        full: how often all SMs are filled.
        rest: programs of the busiest SM after that.
    """

    resident: int
    full: int
    rest: int

    @staticmethod
    def of(programs: int, warps: int, footprint: Footprint, machine: Machine) -> "Waves":
        """Fill the SMs evenly, with as many programs as registers and shared memory allow."""
        # A warp takes registers in blocks of 256, 8 for each thread.
        of_registers = REGISTERS // (-(-footprint.registers // 8) * 8 * 32 * warps)
        of_shared = machine.shared_bytes // (footprint.shared_memory + RESERVED_SHARED)
        resident = max(min(of_registers, of_shared, MOST_WARPS // warps, MOST_PROGRAMS), 1)
        full, rest = divmod(programs, resident * machine.processors)
        return Waves(resident, full, -(-rest // machine.processors))

    def clocks(self, bounds: Bounds) -> float:
        """Clocks until the last program is done."""
        return self.full * bounds.together(self.resident) + bounds.together(self.rest)

    @property
    def count(self) -> float:
        """The number of waves. A last one that is not full counts in part."""
        return self.full + self.rest / self.resident


def cost_of(instruction: Instruction, machine: Machine) -> Cost:
    """Look up what an instruction costs. The clocks are those of [T] in machine.py."""
    opcode, modifiers, latency = instruction.opcode, instruction.modifiers, machine.latency
    if opcode in ("HMMA", "DMMA", "HGMMA", "UTCHMMA", "UTCQMMA"):
        clocks = _product_clocks(instruction, machine)
        return Cost("tensor", clocks, 0, clocks + latency["product"])
    if opcode in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        matrices = next((n for n in (4, 2) if str(n) in modifiers), 1)
        return Cost("", 0, matrices, latency["shared"])
    if opcode == "SHFL":
        return Cost("", 0, 1, latency["shuffle"])
    if opcode in ("LDG", "LDGSTS", "STG", "RED", "ATOMG"):
        return Cost("", 0, instruction.bytes_each / 4, latency["level2"])
    if opcode == "MUFU" or opcode in ("I2F", "F2I", "F2F", "POPC", "FLO"):
        return Cost("special", 8, 0, latency["special"])
    if opcode in ("DFMA", "DADD", "DMUL", "DSETP"):
        return Cost("double", machine.double, 0, latency["special"])
    if opcode in ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"):
        return Cost("single", machine.single * (2 if opcode[-1] == "2" else 1))
    if opcode == "IMAD":
        return Cost("multiplier", 2)
    if opcode in ("LDC", "ULDC", "LDCU", "S2R", "S2UR"):
        return Cost("", 0, 0, latency["constant"])
    if opcode.startswith("U"):
        return Cost("uniform", 2, 0, latency["special"])
    if instruction.kind in ("integer", "float", "move"):
        return Cost("logic", 2, 0, latency["special"])
    return Cost("", 0, 0, latency["special"])


def _product_clocks(instruction: Instruction, machine: Machine) -> float:
    modifiers = instruction.modifiers
    if instruction.opcode == "HGMMA":  # a warp group's 64 × N, at the full rate
        columns = next(int(name.split("x")[1]) for name in modifiers if name.startswith("64x"))
        return max(columns / 2, 16)
    if instruction.opcode.startswith("UTC"):
        return 32  # its size is not in the code; assumed
    if instruction.opcode == "DMMA":
        return machine.tensor_double
    # A shape such as 1684, 1688 or 16816 ends in K. 16-bit numbers have twice the rate of TF32.
    depth = 4 if "1684" in modifiers else 16 if "16816" in modifiers else 8
    return machine.tf32 * depth / 8 / (1 if "TF32" in modifiers else 2)


def bounds(
    code: Sequence[Instruction], walk: Walk, traffic: Traffic, machine: Machine, warps: int
) -> Bounds:
    """Add up what a program takes, and follow one of its warps alone."""
    costs = [cost_of(instruction, machine) for instruction in code]
    counts = np.bincount(np.array(walk.path), minlength=len(code)).tolist()
    units = {
        "issue": sum(counts) * warps / SCHEDULERS,
        "shared": 0.0,
        "level 2": traffic.level2_bytes / machine.level2_rate,
    }
    for n, (count, cost) in enumerate(zip(counts, costs, strict=True)):
        if cost.unit:
            spent = count * cost.clocks * warps / SCHEDULERS
            units[cost.unit] = units.get(cost.unit, 0) + spent
        units["shared"] += count * warps * walk.wavefronts.get(n, cost.wavefronts)
    return Bounds(units, _alone(code, costs, walk, traffic, machine))


def _alone(
    code: Sequence[Instruction],
    costs: Sequence[Cost],
    walk: Walk,
    traffic: Traffic,
    machine: Machine,
) -> float:
    """Clocks until a warp that is alone has started its last instruction."""
    steps = [
        (
            _role(instruction),
            max(instruction.stall, 1),
            instruction.waits,
            instruction.sets,
            cost.unit,
            cost.clocks,
            walk.wavefronts.get(n, cost.wavefronts),
            cost.latency,
        )
        for n, (instruction, cost) in enumerate(zip(code, costs, strict=True))
    ]
    level1 = machine.latency["level1"]
    now = shared = copied = multiplied = 0.0
    boards = [0.0] * 6
    busy: dict[str, float] = {}
    groups: list[float] = []
    for step, n in enumerate(walk.path):
        role, stall, waits, (result, read), unit, clocks, wavefronts, latency = steps[n]
        for board in waits:
            now = max(now, boards[board])
        if role == "wait for copies":
            left = int(code[n].operands[-1], 16)
            if len(groups) > left:
                now = max(now, groups[-1 - left])
        elif role == "wait for products":
            now = max(now, multiplied)
        start = now
        if unit:
            start = max(now, busy.get(unit, 0.0))
            busy[unit] = start + clocks
        if wavefronts:
            start = shared = max(now, shared) + wavefronts
        if step in traffic.cached:
            latency = level1
        if result is not None:
            boards[result] = max(boards[result], start + latency)
        if read is not None:
            boards[read] = max(boards[read], start + 6)
        if role == "copy":
            copied = max(copied, start + latency)
        elif role == "commit copies":
            groups.append(copied)
        elif role == "product":
            multiplied = start + latency
        elif role == "pause":
            now += machine.latency["fence" if code[n].opcode == "MEMBAR" else "barrier"]
        now += stall
    return now


def _role(instruction: Instruction) -> str:
    """What an instruction means to those that follow, beyond scoreboards."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode == "WARPGROUP":
        return "wait for products" if "DEPBAR" in modifiers else ""
    if opcode == "BAR":
        return "pause" if modifiers & {"SYNC", "RED"} else ""
    roles = {
        "LDGSTS": "copy",
        "LDGDEPBAR": "commit copies",
        "DEPBAR": "wait for copies",
        "HGMMA": "product",
        "UTCHMMA": "product",
        "SYNCS": "wait for products",
        "MEMBAR": "pause",
    }
    return roles.get(opcode, "")
