"""What the model assumes about each GPU, with sources. Everything is per SM and in clocks.

[T] NVIDIA, CUDA C++ Programming Guide, "Throughput of native arithmetic instructions".
[W] NVIDIA's whitepapers and data sheets of the A100, H100, H200 and B200.
[L] near what Luo et al. measured on the A100 and H100, with one value for both: "Benchmarking and
    Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499.
[A] assumed: no source was found, or sources disagree.

An SM has four schedulers, each with its own arithmetic units. A warp's instruction occupies a unit
for 32 threads / (results per clock of the unit).
"""

from dataclasses import dataclass, field

SCHEDULERS = 4
REGISTERS = 65536  # of an SM [W]
MOST_WARPS = 64  # of an SM [W]
MOST_PROGRAMS = 32  # of an SM [W]
RESERVED_SHARED = 1024  # bytes that the system takes in each program [W]


@dataclass(frozen=True)
class Machine:
    """One GPU.

    Attributes:
        name: of the product.
        processors: SMs.
        clock: Hz while it works.
        first_parameter: where the arguments lie in the constant bank.
        cache_bytes: first-level cache and shared memory of an SM together.
        shared_bytes: the most that may be shared memory.
        level2_bytes: the second-level cache.
        memory_rate: bytes per second that a copy reaches.
        level2_rate: bytes per clock that an SM gets from the second-level cache.
        launch_seconds: from the end of a kernel to the start of the next, in a graph.
        single: clocks of a scheduler for a float32 operation of a warp [T].
        double: the same for float64 [T].
        tf32: clocks of a scheduler for an `mma` of 16 × 8 × 8 in TF32: the peak rate [W], on Hopper
            about 60 % of it, since only `wgmma` reaches the peak [L].
        tensor_double: the same for one of 8 × 8 × 4 in float64, at the peak rate [W].
        latency: clocks from the start of an access, or of another operation whose end is not fixed,
            to its result.
    """

    name: str
    processors: int
    clock: float
    first_parameter: int
    cache_bytes: int
    shared_bytes: int
    level2_bytes: int
    memory_rate: float
    level2_rate: float
    single: int
    tf32: float
    double: int
    tensor_double: float
    launch_seconds: float = 1.3e-6  # [A]; 1 to 2 µs are usual on an H100
    latency: dict[str, float] = field(
        default_factory=lambda: {
            "level2": 265,  # [L]
            "level1": 40,  # [L]
            "shared": 29,  # [L]
            "shuffle": 24,  # [A]
            "special": 24,  # [A]: exp2, reciprocal, conversions
            "product": 33,  # [A]
            "constant": 30,  # [A]: arguments and thread numbers
            "barrier": 16,  # [A]
            "fence": 25,  # [A]
        },
        hash=False,
    )


MACHINES = {
    "sm80": Machine(
        "A100 80 GB", processors=108, clock=1.41e9, first_parameter=0x160,
        cache_bytes=192 << 10, shared_bytes=164 << 10, level2_bytes=40 << 20,
        memory_rate=1.7e12, level2_rate=26, single=2, tf32=8, double=4, tensor_double=16,
    ),
    # The rates of the second level are assumed [A]. These are 6.5 TB/s.
    "sm90": Machine(
        "H200", processors=132, clock=1.9e9, first_parameter=0x210,
        cache_bytes=256 << 10, shared_bytes=228 << 10, level2_bytes=50 << 20,
        memory_rate=4.0e12, level2_rate=26, single=1, tf32=6.5, double=2, tensor_double=8,
    ),
    # Taken for a larger Hopper [A].
    "sm100": Machine(
        "B200", processors=148, clock=1.85e9, first_parameter=0x380,
        cache_bytes=256 << 10, shared_bytes=228 << 10, level2_bytes=126 << 20,
        memory_rate=6.5e12, level2_rate=26, single=1, tf32=6.5, double=2, tensor_double=8,
    ),
}  # fmt: skip
