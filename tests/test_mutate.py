"""The mutation check: its mutants change one thing each, and leave alone what does not run."""

import ast

import pytest

from tools.mutate import FILES, ROOT, mutants_of

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
    assert len(mutants) > (1 if file.endswith("/_precision.py") else 10)  # which is one function
    for mutant in mutants[::20] + mutants[-1:]:
        ast.parse(mutant.apply(source))
