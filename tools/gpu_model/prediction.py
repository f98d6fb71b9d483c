"""Puts it together: what each step of a call takes, and the call as a whole."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tools.gpu_model.compiling import Footprint, compile_launch, footprint
from tools.gpu_model.launches import TARGETS, Buffer, LibraryCall, Recording, Start, Step
from tools.gpu_model.machine import MACHINES, SCHEDULERS, Machine
from tools.gpu_model.sass import Instruction, cuobjdump, parse
from tools.gpu_model.timing import Bounds, Waves, bounds
from tools.gpu_model.traffic import Span, Traffic
from tools.gpu_model.walk import walk

Key = TypeVar("Key", int, str)
Factors = Mapping[str, float]  # measured / predicted time, by kernel


@dataclass(frozen=True)
class Program:
    """What one program of a launch executes and moves."""

    footprint: Footprint
    warps: int
    instructions: Mapping[str, int]
    bounds: Bounds
    traffic: Traffic

    def beyond(self, other: "Program", share: float) -> "Program":
        """The program that is `share` as far from this one as the other is."""

        def between(a: float, b: float) -> int:
            return round(a + (b - a) * share)

        def each(a: Mapping[Key, float], b: Mapping[Key, float]) -> dict[Key, Any]:
            return {key: between(a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

        mine, its = self.traffic, other.traffic
        return Program(
            self.footprint,
            self.warps,
            each(self.instructions, other.instructions),
            Bounds(
                each(self.bounds.units, other.bounds.units),
                between(self.bounds.latency, other.bounds.latency),
            ),
            Traffic(
                between(mine.level2_bytes, its.level2_bytes),
                set(),
                each(mine.read, its.read),
                each(mine.written, its.written),
                between(mine.unknown, its.unknown),
            ),
        )


@dataclass(frozen=True)
class Predicted:
    """One step of a call. Times are in seconds, sizes in bytes.

    Attributes:
        name: of the kernel or of the operator of torch.
        program: None for an operator of torch.
        programs: in the grid.
        waves: how they are spread over the SMs.
        level2_bytes, memory_bytes: moved from and to the second-level cache, and the memory.
        throughput, latency: both bounds, over all waves.
        seconds: the prediction, with the gap before the next step.
    """

    name: str
    program: Program | None
    programs: int
    waves: float
    level2_bytes: int
    memory_bytes: int
    throughput: float
    latency: float
    seconds: float


def measure_program(start: Start, target_name: str) -> Program:
    """Compile a launch and walk through its program in the middle of the grid.

    With a thousand output capsules a walk would take minutes. What a program does is then affine
    in J: the same loop runs more often, or not at all if J is in the grid. So two smaller J, with
    the same rest in unrolled loops, tell the cost of the real one.
    """
    compiled = compile_launch(start.launch, TARGETS[target_name][0])
    J = start.extent("J") or 0
    # A kernel with a run length walks over no more output capsules than that.
    if J <= _MOST_J or start.extent("run_length"):
        return _measure(start, compiled, target_name, 1)
    few, more = 24 + J % 8, 48 + J % 8
    near, far = (
        _measure(start.with_extent("J", n), compiled, target_name, n / J) for n in (few, more)
    )
    return near.beyond(far, (J - few) / (more - few))


_MOST_J = 64


def _measure(start: Start, compiled: Any, target_name: str, share: float) -> Program:
    """Walk through the program in the middle of a grid of which only a share may exist."""
    machine = MACHINES[target_name]
    taken, warps = footprint(compiled), compiled.metadata.num_warps
    code = parse(cuobjdump(compiled.asm["cubin"], "-sass"))
    constants, spans = place(start, machine)
    x, y, z = (int(extent * share) // 2 for extent in start.grid)
    way = walk(code, constants, threads=32 * warps, program=(x, y, z))
    waves = Waves.of(start.programs, warps, taken, machine)
    # What its neighbours on the SM leave of the first-level cache.
    share = machine.cache_bytes // waves.resident - taken.shared_memory
    traffic = Traffic.of(code, way, spans, share)
    return Program(
        taken,
        warps,
        _by_kind(code, way.path),
        bounds(code, way, traffic, machine, warps),
        traffic,
    )


def _by_kind(code: list[Instruction], path: Iterable[int]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for position, count in Counter(path).items():
        counts[code[position].kind] += count
    return dict(counts)


def place(start: Start, machine: Machine) -> tuple[dict[int, int], list[Span]]:
    """Lay the arguments out in the constant bank, and the tensors in an address space."""
    constants: dict[int, int] = {}
    spans: list[Span] = []
    bases: dict[int, int] = {}
    address = machine.first_parameter
    kinds = [kind for _, kind in start.launch.signature if kind != "constexpr"]
    for position, (kind, argument) in enumerate(zip(kinds, start.arguments, strict=True)):
        size = 8 if kind.startswith("*") or kind == "i64" else 4
        address = -(-address // size) * size
        if isinstance(argument, int):
            value = argument
        else:
            base = bases.setdefault(argument.storage, (len(bases) + 1) << 40)
            value = base + argument.offset
            spans.append(Span(value, argument.nbytes, position))
        for word in range(size // 4):
            constants[address + 4 * word] = value >> 32 * word & 0xFFFFFFFF
        address += size
    return constants, spans


@dataclass
class _Level2:
    """Which tensors the second-level cache still holds. The oldest go first."""

    machine: Machine
    held: "OrderedDict[int, int]" = field(default_factory=OrderedDict)

    def move(self, read: Mapping[int, int], written: Mapping[int, int]) -> int:
        """Bytes that reads and writes, by storage, cost in memory."""
        nbytes = sum(written.values())
        for storage, size in read.items():
            nbytes += 0 if storage in self.held else size
        for storage, size in (*read.items(), *written.items()):
            self.held.pop(storage, None)
            if size <= self.machine.level2_bytes:
                self.held[storage] = size
        while sum(self.held.values()) > self.machine.level2_bytes:
            self.held.popitem(last=False)
        return nbytes


def predict(
    steps: Iterable[Step],
    programs: Mapping[Start, Program],
    machine: Machine,
    *,
    is_float32: bool = False,
    factors: Factors | None = None,
) -> list[Predicted]:
    """Predict steps that run one after the other and find nothing in the caches.

    Args:
        steps: of a recording.
        programs: what `measure_program` found for each start of a kernel.
        machine: the GPU.
        is_float32: whether the library multiplies float32 without its matrix units.
        factors: measured / predicted time of some kernels.
    """
    cache = _Level2(machine)
    found = []
    for step in steps:
        if isinstance(step, LibraryCall):
            found.append(_library(step, cache, machine, is_float32))
        else:
            factor = (factors or {}).get(step.launch.name, 1.0)
            found.append(_kernel(step, programs[step.canonical], cache, machine, factor))
    return found


def _kernel(
    start: Start, program: Program, cache: _Level2, machine: Machine, factor: float
) -> Predicted:
    waves = Waves.of(start.programs, program.warps, program.footprint, machine)

    def of_all(touched: Mapping[int, int]) -> dict[int, int]:
        """Bytes by storage, if every program touches as much of each argument as one does."""
        sizes: Counter[int] = Counter()
        for position, nbytes in touched.items():
            buffer = start.arguments[position]
            assert isinstance(buffer, Buffer)
            sizes[buffer.storage] += min(nbytes * start.programs, buffer.nbytes)
        return sizes

    traffic = program.traffic
    memory_bytes = cache.move(of_all(traffic.read), of_all(traffic.written))
    each = max(program.bounds.units.values())
    computed = waves.clocks(program.bounds) / machine.clock
    return Predicted(
        start.launch.name,
        program,
        start.programs,
        waves.count,
        traffic.level2_bytes * start.programs,
        memory_bytes,
        (waves.full * waves.resident + waves.rest) * each / machine.clock,
        (waves.full + (waves.rest > 0)) * program.bounds.latency / machine.clock,
        factor * max(computed, memory_bytes / machine.memory_rate) + machine.launch_seconds,
    )


def _library(step: LibraryCall, cache: _Level2, machine: Machine, is_float32: bool) -> Predicted:
    """A product of the library reaches half the rate of the units that it uses (assumed)."""
    read = {buffer.storage: buffer.nbytes for buffer in step.reads}
    written = {buffer.storage: buffer.nbytes for buffer in step.writes}
    memory_bytes = cache.move(read, written)
    level2_bytes = sum(read.values()) + sum(written.values())
    flops_per_clock = 2 * 32 / machine.single if is_float32 else 2 * 1024 / machine.tf32
    rate = flops_per_clock * SCHEDULERS * machine.processors * machine.clock
    throughput = step.flops / (0.5 * rate)
    seconds = max(throughput, memory_bytes / machine.memory_rate) + machine.launch_seconds
    return Predicted(step.name, None, 0, 0, level2_bytes, memory_bytes, throughput, 0, seconds)


def measure_programs(
    recordings: Iterable[Recording], target_name: str, apply: Callable[..., Iterable[Program]] = map
) -> dict[Start, Program]:
    """Measure each distinct start of some recordings. The keys are canonical.

    `apply` is `map`, or that of a pool.
    """
    steps = [step for one in recordings for step in (*one.forward, *one.backward)]
    starts = list(dict.fromkeys(s.canonical for s in steps if isinstance(s, Start)))
    work = partial(measure_program, target_name=target_name)
    return dict(zip(starts, apply(work, starts), strict=True))
