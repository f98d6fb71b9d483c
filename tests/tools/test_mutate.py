"""The mutation check: a mutant changes one piece of code that runs, never the working tree."""

import ast

import pytest

from tools import mutate
from tools.mutate import FILES, ROOT, TESTS, mutants_of, selection

SOURCE = b'''"""Text."""

@decorated(1, 2)
def function(a: int = 1, *, b: float | None = None) -> int | None:
    """Text."""
    total = -a  # \xc3\xbb stands before what is replaced
    for n in range(a, 10):
        if 0 < n <= a and not b:
            continue
        total += n // 2
    check(total, a)
    if b is None:
        raise ValueError(f"{a + 1}")
    return total if a == 3 else True
'''

CHANGES = [
    ("-a", "(a)"),
    ("range(a, 10)", "(range(10, a))"),
    ("10", "(11)"),
    ("0 < n <= a", "(0 <= n <= a)"),
    ("0 < n <= a", "(0 >= n <= a)"),
    ("0 < n <= a", "(0 < n < a)"),
    ("0 < n <= a", "(0 < n > a)"),
    ("0 < n <= a and (not b)", "(0 < n <= a or not b)"),
    ("not b", "(b)"),
    ("continue", "pass"),
    ("total += n // 2", "total -= n // 2"),
    ("total += n // 2", "pass"),
    ("n // 2", "(n * 2)"),
    ("check(total, a)", "(check(a, total))"),
    ("check(total, a)", "pass"),
    ("b is None", "(b is not None)"),
    ("raise ValueError(f'{a + 1}')", "pass"),
    ("total if a == 3 else True", "(True if a == 3 else total)"),
    ("a == 3", "(a != 3)"),
    ("True", "(False)"),
]


def test_every_change_of_one_thing_that_runs():
    mutants = mutants_of("file.py", SOURCE)
    found = {(mutant.before, mutant.after) for mutant in mutants}
    assert found == {*CHANGES, ("0", "(1)"), ("1", "(2)"), ("2", "(3)"), ("3", "(4)")}


def test_a_mutant_is_the_source_with_one_piece_replaced():
    for mutant in mutants_of("file.py", SOURCE):
        changed = mutant.apply(SOURCE)
        ast.parse(changed)
        assert changed[: mutant.start] == SOURCE[: mutant.start]
        assert changed.endswith(SOURCE[mutant.end :])
        assert SOURCE.count(b"\n", 0, mutant.start) == mutant.line - 1
        assert ast.unparse(ast.parse(changed)) != ast.unparse(ast.parse(SOURCE))


@pytest.mark.parametrize("file", FILES)
def test_mutants_of_the_files_can_be_parsed(file):
    source = (ROOT / file).read_bytes()
    mutants = mutants_of(file, source)
    assert mutants
    for mutant in mutants[::20] + mutants[-1:]:
        ast.parse(mutant.apply(source))


def test_every_file_has_tests():
    assert all((ROOT / place).exists() for places in TESTS.values() for place in places)
    assert selection("kernels/squash.py") == ["tests/kernels"]
    assert selection("tritoncaps/data/idx.py") == ["tests/data"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one function, whose tests notice one of two changes."""
    root = tmp_path / "project"
    for folder in ("tritoncaps/data", "kernels", "models", "examples", "tests/data"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (root / "tritoncaps/__init__.py").touch()
    (root / "tritoncaps/data/area.py").write_text("def area(a, b):\n    return a * b, a + b\n")
    (root / "tests/data/test_area.py").write_text(
        "from tritoncaps.data.area import area\n\n\n"
        "def test_area():\n    assert area(2, 3)[0] == 6\n"
    )
    monkeypatch.setattr(mutate, "ROOT", root)
    # Every mutant starts pytest, and the tests of this project need none of its plugins.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return root


def test_a_survivor_is_reported_and_the_tree_is_left_alone(project, capsys):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert mutate.main(["--files", "tritoncaps/data/area.py", "--least", "0.6"]) == 1
    output = capsys.readouterr().out
    assert "killed   tritoncaps/data/area.py:2: a * b  ->  (a / b)" in output
    assert "FAILED tests/data/test_area.py::test_area" in output
    assert "SURVIVED tritoncaps/data/area.py:2: a + b  ->  (a - b)" in output
    assert "1 of 2 mutants killed" in output
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert mutate.main(["--files", "tritoncaps/data/area.py", "--least", "0.5"]) == 0


def test_a_mutant_that_never_ends_is_killed(project, capsys):
    (project / "tritoncaps/data/area.py").write_text(
        "def area(a, b):\n    while a * b == 0:\n        pass\n    return a * b, 0\n"
    )
    arguments = ["--only", "tritoncaps/data/area.py:2", "--cpu-seconds", "3"]
    mutate.main(["--files", "tritoncaps/data/area.py", *arguments])
    assert "a * b == 0  ->  (a * b != 0)" in (output := capsys.readouterr().out)
    assert "ended by SIG" in output


def test_tests_that_fail_unchanged_end_the_check(project):
    (project / "tests/data/test_area.py").write_text("def test_area():\n    assert False\n")
    with pytest.raises(SystemExit, match=r"tests of tritoncaps/data/area\.py fail unchanged"):
        mutate.main(["--files", "tritoncaps/data/area.py"])
