"""Settings shared by all tests: hypothesis profiles, the device and how long is fuzzed."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tritoncaps._operators import INTERPRETED

# Deadlines are off: a first call compiles or interprets a kernel. CI draws the same examples every
# time; HYPOTHESIS_PROFILE=nightly draws many new ones. The interpreter takes about a millisecond a
# program of a kernel's grid, so it gets fewer.
EXAMPLES = 8 if INTERPRETED else 25
settings.register_profile("dev", max_examples=EXAMPLES, deadline=None)
settings.register_profile(
    "ci",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# A shrink takes many minutes interpreted, and on a GPU, for which every new size is compiled: there
# the first failing example is printed as it is.
IS_SLOW = INTERPRETED or torch.cuda.is_available()
phases = [phase for phase in Phase if not (IS_SLOW and phase in (Phase.shrink, Phase.explain))]
for _profile in ("dev", "ci", "nightly"):
    settings.register_profile(_profile, settings.get_profile(_profile), phases=phases)
# The mutation check, tools/mutate.py, asks only whether anything fails.
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

# How many cases each fuzz test has tried.
FUZZED = pytest.StashKey[dict[str, int]]()
CASES_A_SEED = 50
Fuzz = Callable[[st.SearchStrategy[Any], Callable[[Any], None]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register how long, and from which seed, the fuzz tests draw their cases."""
    group = parser.getgroup("fuzzing")
    group.addoption("--fuzz-seconds", type=float, default=2.0, help="for each fuzz test")
    group.addoption("--fuzz-seed", type=int, default=0, help="the first seed of the cases")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[FUZZED] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases were tried."""
    if counts := terminalreporter.config.stash[FUZZED]:
        terminalreporter.section("fuzzing")
        for name, count in counts.items():
            terminalreporter.line(f"{name}: {count:,} cases")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> Fuzz:
    """Draw cases and check them until the time is over.

    A case that ends the process is left in the file `case` of the test's temporary directory.
    """
    config = request.config
    options = settings(
        max_examples=CASES_A_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def run(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        end = time.monotonic() + config.getoption("--fuzz-seconds")
        count = 0
        with (tmp_path / "case").open("w") as journal:

            def one(case: Any) -> None:
                nonlocal count
                journal.seek(0)
                journal.truncate()
                journal.write(repr(case))
                journal.flush()
                check(case)
                count += 1

            for number in itertools.count(config.getoption("--fuzz-seed")):
                seed(number)(options(given(strategy)(one)))()
                if time.monotonic() >= end:
                    break
        config.stash[FUZZED][request.node.name] = count

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Have torch compute in one thread, so that bits do not depend on the machine.

    For a whole module, so that it holds for the module's other fixtures too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device under test: CUDA where there is one, which runs the kernels compiled.

    Convolutions compute in full float32 there, as they do on a CPU.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
