"""The model of the kernels' cost: what it counts is right, and the committed tables still hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tritoncaps._operators import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton", reason="there is no Triton for this platform")

import triton
import triton.language as tl

from tools import compile_report
from tools.gpu_model import prediction, tables
from tools.gpu_model.compiling import Footprint, compile_launch, footprint
from tools.gpu_model.launches import (
    MATRICES,
    SHAPES,
    TARGETS,
    Buffer,
    LibraryCall,
    Matrices,
    Recorder,
    Start,
    record_launches,
)
from tools.gpu_model.machine import MACHINES
from tools.gpu_model.prediction import measure_program, place, predict
from tools.gpu_model.rival import matrices_bytes, rival_bytes
from tools.gpu_model.sass import cuobjdump, parse
from tools.gpu_model.timing import Bounds, Waves, bounds
from tools.gpu_model.traffic import Span, Traffic
from tools.gpu_model.walk import Access, Walk, walk
from tritoncaps.testing import OPERATORS

FP32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# Machine code that is written by hand -------------------------------------------------------------


def listing(*lines):
    """Read one instruction a line, with its stall, the board it sets and the boards it awaits."""
    text = ""
    for n, line in enumerate(lines):
        code, _, control = line.partition("#")
        stall, sets, waits = map(int, control.split()) if control else (1, 7, 0)
        high = (stall | sets << 5 | 7 << 8 | waits << 11) << 41
        text += f"        /*{16 * n:04x}*/    {code.strip()} ;    /* 0x{0:016x} */\n"
        text += f"                              /* 0x{high:016x} */\n"
    return parse(text)


LOOP = listing(
    "MOV R0, RZ",
    "IADD3 R0, R0, 0x2, RZ",
    "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
    "@!P0 BRA 0x10",
    "NOP",
    "EXIT",
)


@pytest.mark.parametrize("limit, trips", [(1, 1), (10, 5), (11, 6), (-3, 1)])
def test_a_loop_runs_as_often_as_its_argument_says(limit, trips):
    path = walk(LOOP, {0x210: limit & 0xFFFFFFFF}, threads=32).path
    assert path == [0, *[1, 2, 3] * trips, 5]


def test_a_loop_runs_until_its_last_thread_leaves():
    code = listing(
        "S2R R0, SR_TID.X",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.LT.AND P0, PT, R0, 0x24, PT",
        "@P0 BRA 0x10",
        "ISETP.EQ.AND P1, PT, R0, 0x24, PT",
        "@P1 EXIT",
        "EXIT",
    )
    path = walk(code, {}, threads=32).path
    assert path == [0, *[1, 2, 3] * 36, 4, 5, 6]


def test_a_loop_that_depends_on_data_is_refused():
    code = listing("LDG.E R0, [R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x0", "EXIT")
    with pytest.raises(RuntimeError, match="the loop that ends at 0x20 depends on data"):
        walk(code, {}, threads=32)


def test_a_wait_ends_at_once():
    """The Blackwells ask for tensor memory, and all since Hopper for a copy's arrival, in loops."""
    for question in (
        "UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4",
        "SYNCS.TRYWAIT UP0, [UR4], UR5",
    ):
        code = listing("UMOV UR4, 0x4", question, "BRA.U !UP0, 0x0", "EXIT")
        assert walk(code, {}, threads=32).path == [0, 1, 2, 3]


def test_a_branch_that_depends_on_data_is_taken_only_past_a_call():
    load = ("LDG.E R0, [R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT")
    slow = listing(*load, "@P0 BRA 0x40", "CALL.REL.NOINC 0x50", "EXIT", "RET.REL.NODEC R4")
    assert walk(slow, {}, threads=32).path == [0, 1, 2, 4]
    plain = listing(*load, "@P0 BRA 0x40", "MOV R1, R2", "EXIT")
    assert walk(plain, {}, threads=32).path == [0, 1, 2, 3, 4]


def test_a_call_returns():
    code = listing("CALL.REL.NOINC 0x20", "EXIT", "RET.REL.NODEC R4")
    assert walk(code, {}, threads=32).path == [0, 2, 1]


def test_a_program_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr("tools.gpu_model.walk._LIMIT", 100)
    with pytest.raises(RuntimeError, match="no end after 100 instructions"):
        walk(listing("MOV R0, RZ", "BRA 0x0", "EXIT"), {}, threads=32)


# Compiled kernels ---------------------------------------------------------------------------------


@triton.jit
def fill_kernel(out_ptr, J, steps, BLOCK: tl.constexpr):
    first = tl.program_id(0) * J * steps
    for j in range(J):
        for step in range(steps):
            offsets = (first + j * steps + step) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + offsets, j)


@triton.jit
def scatter_kernel(out_ptr, n, divisor, BLOCK: tl.constexpr):
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = x * 40503 % n // divisor
    tl.store(out_ptr + tl.where(place % 2 == 1, place, n - 1 - x), 1.0, mask=x < n - 40)


def started(kernel, *arguments, target="sm90", grid=(3,), **constants) -> Start:
    """Record one launch."""
    with Recorder(TARGETS[target][1]) as recorder:
        kernel[grid](*arguments, **constants)
    (start,) = recorder.steps
    return start


def followed(start, target, program=1):
    """The code of a launch, and a program's way through it."""
    compiled = compile_launch(start.launch, TARGETS[target][0])
    code = parse(cuobjdump(compiled.asm["cubin"], "-sass"))
    constants, spans = place(start, MACHINES[target])
    threads = 32 * compiled.metadata.num_warps
    return code, walk(code, constants, threads=threads, program=(program, 0, 0)), spans


def stored(code, way, spans):
    """The elements that a program stores to its only tensor, in the order of execution."""
    addresses = [access.address[access.mask] for access in way.accesses.values()]
    return (np.concatenate(addresses).astype(np.int64) - spans[0].first) // 4


@pytest.mark.parametrize("target", MACHINES)
def test_every_step_of_nested_loops_is_counted(target):
    J, steps, block = 13, 5, 128
    out = torch.empty(3 * J * steps * block, dtype=torch.float32, device="meta")
    start = started(fill_kernel, out, J, steps, target=target, BLOCK=block)
    code, way, spans = followed(start, target)
    kinds = [code[position].kind for position in way.path]
    assert kinds.count("global") == J * steps
    first = J * steps * block
    assert sorted(stored(code, way, spans)) == list(range(first, 2 * first))


@pytest.mark.parametrize("target", MACHINES)
def test_addresses_are_those_of_the_arithmetic(target):
    n, divisor, block = 1000, 7, 256
    out = torch.empty(n, dtype=torch.float32, device="meta")
    start = started(scatter_kernel, out, n, divisor, target=target, grid=(4,), BLOCK=block)
    for program in (0, 3):
        code, way, spans = followed(start, target, program)
        x = np.arange(program * block, (program + 1) * block)
        place = x * 40503 % n // divisor
        expected = np.where(place % 2 == 1, place, n - 1 - x)[x < n - 40]
        assert sorted(stored(code, way, spans)) == sorted(expected)


def test_counts_of_many_output_capsules_are_extrapolated_exactly(monkeypatch):
    out = torch.empty(3 * 203 * 2 * 128, dtype=torch.float32, device="meta")
    start = started(fill_kernel, out, 203, 2, BLOCK=128)
    near = measure_program(start, "sm90")
    monkeypatch.setattr(prediction, "_MOST_J", 1000)
    exact = measure_program(start, "sm90")
    assert near.instructions == exact.instructions
    assert near.traffic.level2_bytes == exact.traffic.level2_bytes == 203 * 2 * 512
    assert near.traffic.written == exact.traffic.written
    assert near.bounds.latency == pytest.approx(exact.bounds.latency, rel=1e-3)
    assert near.bounds.units == pytest.approx(exact.bounds.units, rel=1e-3)


# The model ----------------------------------------------------------------------------------------


def test_alone_a_warp_waits_for_what_it_needs():
    machine = MACHINES["sm90"]
    chain = listing(
        "LDG.E R0, [R2.64] # 4 0 0",
        "LDG.E R4, [R0.64] # 4 1 1",
        "FADD R4, R4, R4 # 5 7 2",
        "EXIT",
    )
    way = walk(chain, {}, threads=32)
    traffic = Traffic.of(chain, way, [Span(0, 64, 0)], 0)
    found = bounds(chain, way, traffic, machine, warps=1)
    # Each load starts in one wavefront and arrives after the second level's latency.
    assert found.latency == 2 * (1 + machine.latency["level2"]) + 5 + 1
    assert found.units["issue"] == 4 / 4
    assert found.units["single"] == machine.single / 4
    assert found.units["shared"] == 2


def test_copies_and_barriers_hold_a_warp_up():
    machine = MACHINES["sm90"]
    copy = ("LDGSTS.E [R0], [R2.64]", "LDGDEPBAR")
    code = listing(*copy, *copy, "DEPBAR.LE SB0, 0x1", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT")
    way = walk(code, {}, threads=32)
    traffic = Traffic.of(code, way, [Span(0, 64, 0)], 0)
    found = bounds(code, way, traffic, machine, warps=1).latency
    # One group may be under way: only the first is awaited.
    assert found == 1 + machine.latency["level2"] + 1 + machine.latency["barrier"] + 1 + 1


def test_the_prediction_lies_between_the_larger_bound_and_the_sum():
    found = Bounds({"issue": 100.0, "shared": 60.0}, latency=300.0)
    assert found.together(0) == 0
    assert 300 < found.together(1) < 400
    assert 600 < found.together(6) < 900


@pytest.mark.parametrize(
    "programs, resident, full, rest",
    [(1, 2, 0, 1), (133, 2, 0, 2), (264, 2, 1, 0), (265, 2, 1, 1), (600, 2, 2, 1)],
)
def test_programs_fill_the_processors_evenly(programs, resident, full, rest):
    taken = Footprint(registers=121, stack=0, shared_memory=20000)
    assert Waves.of(programs, 8, taken, MACHINES["sm90"]) == Waves(resident, full, rest)


def test_shared_memory_and_warps_limit_the_programs_of_a_processor():
    machine = MACHINES["sm90"]
    assert Waves.of(1, 4, Footprint(32, 0, 100_000), machine).resident == 2
    assert Waves.of(1, 4, Footprint(32, 0, 0), machine).resident == 16
    assert Waves.of(1, 1, Footprint(16, 0, 0), machine).resident == 32


def accessed(*rows, name="LDG.E"):
    """A walk of loads by 32 threads, each from a list of addresses."""
    code = listing(*[f"{name} R0, [R2.64]"] * len(rows))
    mask = np.ones(32, np.bool_)
    accesses = {n: Access(np.array(row, np.uint64), mask) for n, row in enumerate(rows)}
    return code, Walk(32, list(range(len(rows))), accesses)


def test_traffic_is_counted_in_sectors_that_are_not_in_the_cache():
    row, far = 4096 + 4 * np.arange(32), 8192 + 64 * np.arange(32)
    code, way = accessed(row, row, far, row)
    spans = [Span(4096, 128, 0), Span(8192, 2048, 2)]
    small = Traffic.of(code, way, spans, cache_bytes=1024)
    assert small.level2_bytes == 128 + 0 + 32 * 32 + 128
    assert small.cached == {1}
    assert small.read == {0: 128, 2: 1024}
    large = Traffic.of(code, way, spans, cache_bytes=4096)
    assert large.level2_bytes == 128 + 32 * 32
    assert large.cached == {1, 3}
    with pytest.raises(ValueError, match="an access at 0x1000 lies outside every tensor"):
        Traffic.of(code, way, spans[1:], 4096)


def test_an_unknown_address_counts_as_gapless():
    code = listing("LDG.E.128 R0, [R2.64]")
    way = Walk(64, [0], {0: Access(None, None)})
    found = Traffic.of(code, way, [], 1024)
    assert (found.level2_bytes, found.unknown, found.cached) == (64 * 16, 1, set())


def test_bank_conflicts_of_shared_memory_are_counted():
    code = listing("S2R R0, SR_TID.X", "IMAD R1, R0, c[0x0][0x210], RZ", "LDS R2, [R1]", "EXIT")
    for stride, wavefronts in ((4, 1), (8, 2), (132, 1), (128, 32), (0, 1)):
        assert walk(code, {0x210: stride}, threads=64).wavefronts[2] == wavefronts


def test_what_the_second_level_holds_is_not_read_again():
    """A tensor costs memory once, then again only after as much as the cache holds."""
    machine = MACHINES["sm90"]
    small, large = Buffer(1, 0, machine.level2_bytes // 4), Buffer(2, 0, machine.level2_bytes - 1)
    result = Buffer(3, 0, 1000)

    def read(*buffers):
        return LibraryCall("read", buffers, (result,), 0)

    steps = predict([read(small), read(small), read(large), read(small)], {}, machine)
    moved = [step.memory_bytes - result.nbytes for step in steps]
    assert moved == [small.nbytes, 0, large.nbytes, small.nbytes]
    gap = machine.launch_seconds
    assert steps[2].seconds - gap == steps[2].memory_bytes / machine.memory_rate


def test_a_kernel_takes_its_bounds_and_a_measured_factor():
    machine = MACHINES["sm90"]
    out = torch.empty(3 * 2 * 2 * 128, dtype=torch.float32, device="meta")
    start = started(fill_kernel, out, 2, 2, BLOCK=128)
    program = measure_program(start, "sm90")
    programs = {start.canonical: program}
    (step,) = predict([start], programs, machine)
    assert (step.programs, step.level2_bytes, step.memory_bytes) == (3, out.nbytes, out.nbytes)
    gap = machine.launch_seconds
    assert step.seconds - gap == pytest.approx(program.bounds.together(1) / machine.clock)
    (slower,) = predict([start], programs, machine, factors={"fill_kernel": 2.0})
    assert slower.seconds - gap == pytest.approx(2 * (step.seconds - gap))


def test_the_rival_reads_u_hat_six_times_forward_and_writes_it_once():
    sizes = dict(zip("BIPJD", (128, *SHAPES["MNIST"]), strict=True))
    u_hat = 4 * 128 * 1152 * 10 * 16
    operator = OPERATORS["fused_dynamic_routing"]
    passes = [rival_bytes(operator, sizes, FP32, backward=b) / u_hat for b in (False, True)]
    # Besides û: u, W, and the couplings and logits, each a sixteenth of û.
    assert 6 < passes[0] < 7
    assert 13 < passes[1] < 14.5


def test_votes_in_memory_are_written_once_and_read_eight_times_forward():
    sizes = MATRICES["big-conv1"].sizes
    votes = 4 * 2304 * 288 * 32 * 16
    operator = OPERATORS["em_routing"]
    of_phase = [matrices_bytes(operator, sizes, FP32, backward=b) for b in (False, True)]
    assert [rival / votes for _, rival in of_phase] == [9, 20]
    # The inputs, and the poses and activations of the outputs: the poses are the most.
    assert 4 * 2304 * 288 * 16 < of_phase[0][0] < 4 * 2304 * 288 * 20 < of_phase[1][0]


# The tables ---------------------------------------------------------------------------------------


TINY = tables.Section("sm90", "highest", "squash", ("tiny",))


@pytest.fixture(scope="module")
def tiny_section():
    return tables.write_section(TINY)


def test_a_section_can_be_read_back(tiny_section):
    found = tables.read_sections(tiny_section)
    (read,) = found.values()
    assert list(read) == ["", "tiny"]
    calls, launches = read[""], read["tiny"]
    assert [row[0] for row in calls] == ["shape", "---", "tiny"]
    names = [row[0] for row in launches[2:]]
    assert names == ["`_squash_fwd_kernel`", "*backward*", "`_squash_bwd_kernel`"]
    forward = dict(zip(launches[0], launches[2], strict=True))
    assert int(forward["instructions"]) == sum(int(forward[kind]) for kind in tables._KINDS)
    assert not tables.differences(found, found)


def test_a_difference_is_named(tiny_section):
    found = tables.read_sections(tiny_section)
    row = tiny_section.splitlines()[-1]
    instructions = int(row.split("|")[7])
    worse = row.replace(f"| {instructions} |", f"| {instructions * 2} |")
    grown = tables.read_sections(tiny_section.replace(row, worse))
    (line,) = tables.differences(found, grown)
    assert f"instructions was {instructions}, is {instructions * 2}" in line
    gone = tables.read_sections(tiny_section.replace(row, ""))
    assert "other rows" in tables.differences(found, gone)[0]
    assert tables.differences({}, found)


def test_numbers_may_be_off_by_the_tolerance_or_the_last_digit():
    assert tables._is_close("100", "105", 0.05)
    assert not tables._is_close("100", "107", 0.05)
    assert tables._is_close("0.1", "0.2", 0.05)
    assert not tables._is_close("", "3", 0.05)


def test_a_page_without_a_version_is_an_error():
    assert tables.triton_version("Triton 3.6.0, B = 128.") == "3.6.0"
    with pytest.raises(ValueError, match="names no version"):
        tables.triton_version("Tables")


def test_the_page_says_what_the_compiler_gives():
    """More instructions than on the page are a regression. After an intended change, write it."""
    page = compile_report.PAGE.read_text(encoding="utf-8")
    assert page.splitlines()[0].startswith("# Predicted")
    assert set(tables.read_sections(page)) == {section.title for section in tables.PAGE_SECTIONS}
    made_with = tables.triton_version(page)
    if triton.__version__ != made_with:
        pytest.skip(f"the page was made with Triton {made_with}, this is {triton.__version__}")
    first = tables.PAGE_SECTIONS[0]
    section = tables.Section(first.target, first.precision, first.operator, ("second stage",))
    made = tables.read_sections(tables.write_section(section))
    of_page = tables.read_sections(page)
    calls = of_page[section.title][""]
    calls[:] = [row for row in calls if row[0] in ("shape", "---", "second stage")]
    assert tables.differences(of_page, made) == []


def test_the_command_prints_writes_and_checks(tmp_path, monkeypatch, capsys, tiny_section):
    page = tmp_path / "page.md"
    page.write_text("Text\n<!-- predictions: start -->\n<!-- predictions: end -->\n")
    monkeypatch.setattr(compile_report, "PAGE", page)
    monkeypatch.setattr(compile_report, "PAGE_SECTIONS", (TINY,))
    sections = []

    def write_section(section, apply, factors=None):
        sections.append((section, factors))
        return tiny_section

    monkeypatch.setattr(compile_report, "write_section", write_section)
    (tmp_path / "check.json").write_text('{"factors": {"_squash_fwd_kernel": 1.5}}')
    assert compile_report.main(["--factors", str(tmp_path / "check.json"), "--shape", "tiny"]) == 0
    assert tiny_section in capsys.readouterr().out
    section, factors = sections[0]
    assert section.shapes == ("tiny",) and factors == {"_squash_fwd_kernel": 1.5}
    assert compile_report.main(["--check"]) == 1
    assert compile_report.main(["--write"]) == 0
    assert compile_report.main(["--check"]) == 0
    assert page.read_text().startswith("Text\n<!-- predictions: start -->\nTriton ")


@pytest.mark.parametrize(
    ("operator", "shape"), [("em_routing", "MNIST"), ("routing_pass", "big-conv1")]
)
def test_a_shape_of_other_operators_is_refused(operator, shape, capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--operator", operator, "--shape", shape])
    message = capsys.readouterr().err
    assert f"argument --shape: {operator} has no shape '{shape}'; choose from '" in message


def test_each_operator_has_a_first_shape():
    first = {
        operator: compile_report.parse_arguments(["--operator", operator]).shape
        for operator in ("routing_pass", "em_routing")
    }
    assert first == {"routing_pass": ["MNIST"], "em_routing": ["small-conv1"]}


def test_layers_of_matrices_have_their_positions_in_the_batch():
    assert MATRICES["big-conv1"] == Matrices(64 * 36, 288, 32, (6, 6, 3, 2))
    assert MATRICES["small-conv2"] == Matrices(64 * 16, 144, 16, (4, 4, 3, 1))
    assert MATRICES["big-class"] == Matrices(64, 512, 5)


# Footprints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_name", ["sm90", "gfx942"])
def test_footprint_is_read_off_the_compiled_kernel(target_name):
    gpu, target = TARGETS[target_name]
    launch = next(iter(record_launches(SHAPES["tiny"], FP32, target)))
    cost = footprint(compile_launch(launch, gpu))
    assert 0 < cost.registers <= 512
    assert cost.shared_memory <= target.shared_memory


def test_a_footprint_that_cannot_be_read_is_an_error():
    assembly = SimpleNamespace(asm={"amdgcn": ".vgpr_count: 12"})
    with pytest.raises(ValueError, match=r"no register count in '\.vgpr_count: 12'"):
        footprint(assembly)
