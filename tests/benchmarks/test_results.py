"""Where results go: JSON files, the tables of the pages, and pictures."""

import json

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import operators, report, tables
from benchmarks.cases import SHAPES, Case
from benchmarks.session import axes

CPU = torch.device("cpu")


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    results = report.Report("ops", CPU, {}, tmp_path)
    for number in range(3):
        results.add([{"value": number}], "value")
        rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
        assert [row["value"] for row in rows] == list(range(number + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["ops.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.1111, "3.11 s"), (0.0387, "38.7 ms"), (0.000162, "162 µs"), (2e-7, "0.20 µs")],
)
def test_durations_have_three_digits(value: float, text):
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(603979776, "604 MB"), (2567430144, "2.57 GB"), (12.0, "12.0 B")]
)
def test_sizes_have_three_digits(value: float, text):
    assert report.quantity(value, "B") == text


@pytest.fixture
def results(tmp_path):
    """Results of a device, with figures that are obviously made up."""
    folder = tmp_path / "results"
    made_up_results(folder / "slide-rule")
    return folder


def timing(median):
    return {"median_s": median, "p20_s": 0.9 * median, "p80_s": 1.2 * median, "samples": 9}


def call(op, shape, B=64):
    """The part of a row that describes its call."""
    case = Case(op, SHAPES[shape], B, name=shape)
    return {**axes(case), "shape": shape, "case": str(case)}


def made_up_results(directory):
    directory.mkdir(parents=True)
    environment = report.describe_environment(CPU) | {"device": "Slide Rule", "commit": "abc"}
    routing = call("fused_dynamic_routing", "mnist")
    seconds = {"eager": 0.4, "compile": 0.2, "broadcast": 1.0, "torch path": 0.1}
    calls = [call("fused_dynamic_routing", shape) for shape in ("mnist", "cifar", "classes100")]
    calls.append(call("squash", "mnist"))
    one_image = call("fused_dynamic_routing", "mnist", B=1)
    many_images = call("fused_dynamic_routing", "mnist", B=256)
    loaded = {**routing, "case": f"{routing['case']} under load", "loaded_cores": 2}
    (directory / "launch_table.json").write_text('{"fused_dynamic_routing_fwd": {"BLOCK_B": 8}}')
    ops_rows = [
        {**facts, "phase": phase, "rival": rival, "floor_s": 0.01}
        | timing(0.05 if facts is one_image and rival == "compile" else median)
        for facts in [*calls, one_image, many_images, loaded]
        for phase in operators.PHASES
        for rival, median in seconds.items()
    ]
    memory_rows = [
        {**routing, "rival": rival, "u_hat_bytes": 47185920, "peak_bytes": peak}
        for rival, peak in (("eager", 2e8), ("torch path", 1.5e7))
    ]
    memory_rows.append({**routing, "rival": "broadcast", "left_out": "killed"})
    step_rows = [
        {"model": "CapsNet", "rival": rival, "precision": precision, "B": 64}
        | {"speedup": 1 / median, "images_per_second": 64 / median, **timing(median)}
        for precision in ("fp32", "bf16")
        for rival, median in (("einsum port", 1.0), ("tritoncaps", 0.5))
    ]
    scaling_rows = [
        {**routing, "axis": axis, "value": value, "rival": rival, "peak_bytes": 1e6 * value}
        | timing(0.001 * value)
        for axis in "IJBr"
        for rival in ("eager", "torch path")
        for value in (2, 8, 40)
    ]
    fits = [
        {"axis": axis, "rival": rival, "time_exponent": 1.0, "memory_exponent": None}
        for axis in "IJBr"
        for rival in ("eager", "torch path")
    ]
    grid_rows = [
        {**routing, "phase": phase, "rival": rival, "u_hat_bytes": 47185920}
        | ({"peak_bytes": 3.1e7, "formula_bytes": 3e7} if rival != "eager" else {"peak_bytes": 2e8})
        for phase in ("forward", "both")
        for rival in ("eager", "torch path")
    ]
    grid_rows[0] = {**grid_rows[0], "peak_bytes": 4096}
    rows = {"ops": ops_rows, "memory": memory_rows, "step": step_rows, "scaling": scaling_rows}
    rows["memory-grid"] = grid_rows
    for benchmark, own in rows.items():
        data = {"format": 1, "environment": environment, "rows": own, "fits": fits}
        (directory / f"{benchmark}.json").write_text(json.dumps(data))


def test_the_readme_shows_six_rows_and_how_many_are_slower(results):
    block = tables.readme_block(results)
    rows = [line for line in block.splitlines() if line.startswith("| ")]
    assert rows == [
        "|  | einsum | compiled einsum | tritoncaps |",
        "| --- | ---: | ---: | ---: |",
        "| mnist (1152 → 10 capsules), batch 64, forward | 400 ms | 200 ms | 100 ms |",
        "| mnist (1152 → 10 capsules), batch 64, forward + backward | 400 ms | 200 ms | 100 ms |",
        "| cifar (2048 → 10 capsules), batch 64, forward + backward | 400 ms | 200 ms | 100 ms |",
        "| classes100 (1152 → 100 capsules), batch 64, forward + backward "
        "| 400 ms | 200 ms | 100 ms |",
        "| CapsNet, one training step, batch 64, fp32 | 1.00 s |  | 500 ms |",
        "| CapsNet, one training step, batch 64, bf16 | 1.00 s |  | 500 ms |",
    ]
    assert "slower than einsum in 0 of 21 calls and than compiled einsum in 3 of 21 calls." in block
    assert "**Slide Rule, " in block
    assert "commit abc" in block


def test_the_page_on_speed_shows_every_row_even_if_tritoncaps_is_slower(results):
    block = tables.speed_block(results)
    for line in (
        "| mnist 1152x8->10x16, B=64, fp32, forward "
        "| 400 ms | 200 ms | 1.00 s | 100 ms | 4.0 | 2.0 | 10.0 |",
        "| mnist 1152x8->10x16, B=1, fp32, backward "
        "| 400 ms | 50.0 ms | 1.00 s | 100 ms | 4.0 | **0.50** | 10.0 |",
        "| mnist 1152x8->10x16, B=64, fp32, forward, under load "
        "| 400 ms | 200 ms | 1.00 s | 100 ms | 4.0 | 2.0 | 10.0 |",
        "| mnist 1152x8->10x16, B=64 | 47.2 MB | 200 MB | 15.0 MB |",
        "| CapsNet, tritoncaps, fp32 | 500 ms | 128 | 2.00 |",
        "| `squash` | einsum | compiled einsum | broadcast | tritoncaps "
        "| × einsum | × compiled einsum | × broadcast |",
    ):
        assert line in block
    assert "than compiled einsum in 3 of 21 calls" in block
    lines = [line for line in block.splitlines() if "backward" in line or ", forward" in line]
    assert len([line for line in lines if ", fp32, " in line]) == 21


def test_the_page_on_speed_has_all_committed_figures():
    """Each timed call and phase is a row, with the time of every rival."""
    page = (tables.ROOT / "docs" / "speed.md").read_text()
    for path in sorted(report.RESULTS.glob("*/ops.json")):
        for row in json.loads(path.read_text())["rows"]:
            if "median_s" in row:
                title = tables.call_title(row)
                lines = [x for x in page.splitlines() if x.startswith(f"| {title} |")]
                assert any(f" {report.seconds(row['median_s'])} |" in line for line in lines), row


def test_the_page_on_memory_shows_the_figures_of_the_grid(results):
    block = tables.memory_block(results)
    assert "**Slide Rule, " in block
    assert "Batch 64:" in block
    assert (
        "| 1152 | 10 | 47.2 MB | < 1 MB | 31.0 MB | 30.0 MB | 200 MB | 31.0 MB | 30.0 MB |" in block
    )


def test_a_page_names_the_commits_of_its_own_figures(results):
    path = results / "slide-rule" / "memory-grid.json"
    path.write_text(path.read_text().replace('"abc"', '"xyz"'))
    assert "xyz" not in tables.readme_block(results) + tables.speed_block(results)
    assert "xyz" in tables.memory_block(results)


@pytest.mark.parametrize("page", [str(page) for page in tables.PAGES])
def test_the_table_command_writes_what_its_check_accepts(results, tmp_path, page):
    for path in tables.PAGES:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    command = ["table", "--results", str(results), "--root", str(tmp_path)]
    figure = "31.0 MB" if page == "docs/memory.md" else "400 ms"
    assert command_line.main([*command, "--check"]) == 1
    assert "old" in (tmp_path / page).read_text()
    assert command_line.main(command) == 0
    written = (tmp_path / page).read_text()
    assert written.startswith("before\n\n" + tables.BEGIN)
    assert written.endswith(tables.END + "\n\nafter\n")
    assert command_line.main([*command, "--check"]) == 0
    assert command_line.main(command) == 0
    assert (tmp_path / page).read_text() == written
    assert figure in written
    (tmp_path / page).write_text(written.replace(figure, "401 ms", 1))
    assert command_line.main([*command, "--check"]) == 1


@pytest.mark.parametrize(
    "text", ["", tables.BEGIN, tables.END + tables.BEGIN, 2 * (tables.BEGIN + tables.END)]
)
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected one"):
        tables.replace_block(text, "block")


@pytest.mark.parametrize("page", tables.PAGES, ids=str)
def test_a_page_agrees_with_the_results(page):
    text = (tables.ROOT / page).read_text()
    block = tables.PAGES[page](report.RESULTS)
    assert tables.replace_block(text, block) == text, "run `python -m benchmarks table`"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"cpu_backend": "avx2"}, "Slide Rule, 2 threads, AVX2"),
        ({"cpu_backend": "torch", "threads": 1}, "Slide Rule, 1 thread, plain torch"),
        ({}, "Slide Rule, 2 threads"),
        ({"device_type": "cuda", "cpu_backend": "avx2"}, "Slide Rule"),
    ],
    ids=str,
)
def test_a_machine_has_a_name(facts, name):
    usual = {"device": "Slide Rule", "device_type": "cpu", "threads": 2}
    assert report.machine(usual | facts) == name


def test_committed_results_name_their_device_and_commit():
    paths = sorted(report.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        if path.stem == "launch_table":
            continue
        assert data["benchmark"] == path.stem
        assert data["settings"] == {"quick": False}
        assert data["environment"]["device"]
        assert data["environment"]["commit"]


def test_plots_are_drawn_from_the_results(results):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    from benchmarks import plots

    directory = results / "slide-rule"
    paths = list(plots.draw(directory))
    assert [path.name for path in paths] == ["ops.png", "memory.png", "step.png", "scaling.png"]
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        check_picture(path)
    assert {path: path.read_bytes() for path in plots.draw(directory)} == before
    changed = json.loads((directory / "step.json").read_text())
    changed["rows"][0]["median_s"] *= 2
    (directory / "step.json").write_text(json.dumps(changed))
    after = {path: path.read_bytes() for path in plots.draw(directory)}
    assert [path.name for path in paths if after[path] != before[path]] == ["step.png"]


def check_picture(path):
    from matplotlib.image import imread

    assert path.stat().st_size < 300_000
    pixels = imread(path)[..., :3]
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((edge == 1).all() for edge in border), "something touches the edge"
    assert 0.01 < (pixels < 0.95).any(axis=-1).mean() < 0.5
    return pixels


def test_the_plot_of_the_readme_shows_its_rows_on_white(results, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    from benchmarks import plots

    texts = []
    seconds = plots.seconds
    monkeypatch.setattr(plots, "seconds", lambda value: texts.append(seconds(value)) or texts[-1])
    path = results / "speed.png"
    plots.draw_speed(tables.load_devices(results), path)
    pixels = check_picture(path)
    assert pixels.shape[1] == 1600  # twice the 800 pixels that it takes in the README
    assert texts == [*(4 * ["400 ms", "200 ms", "100 ms"]), *(2 * ["1.00 s", "500 ms"])]
    before = path.read_bytes()
    changed = json.loads((results / "slide-rule" / "step.json").read_text())
    changed["rows"][1]["median_s"] *= 1.5
    (results / "slide-rule" / "step.json").write_text(json.dumps(changed))
    plots.draw_speed(tables.load_devices(results), path)
    assert path.read_bytes() != before


def test_a_rival_without_a_mark_of_its_own_is_drawn_and_listed(results):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    from benchmarks import plots

    path = results / "slide-rule" / "ops.json"
    path.write_text(path.read_text().replace('"broadcast"', '"a newcomer"'))
    assert "| a newcomer | tritoncaps |" in tables.speed_block(results)
    next(plots.draw(results / "slide-rule"))
    check_picture(results / "slide-rule" / "ops.png")
