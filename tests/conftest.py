"""What all tests share: hypothesis profiles, the device, small models, fuzzing by the clock."""

import itertools
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from interpreter import patch_once

from tritoncaps import _native
from tritoncaps._operators import INTERPRETED
from tritoncaps.models import create_model

if INTERPRETED:
    patch_once()

# Deadlines are off, because a first call compiles or interprets a kernel. The same examples are
# drawn every time, so no test fails by chance. HYPOTHESIS_PROFILE=nightly draws many new ones. The
# interpreter takes about a millisecond per program of a kernel's grid, so it gets fewer.
EXAMPLES = 8 if INTERPRETED else 25
settings.register_profile("dev", max_examples=EXAMPLES, deadline=None, derandomize=True)
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
# Shrinking takes many minutes in the interpreter, and on a GPU, which compiles each new size. There
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

CASES_A_SEED = 50
# The number of cases that each fuzz test has tried.
FUZZED = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("fuzzing")
    group.addoption("--fuzz-seconds", type=float, default=2.0, help="for each fuzz test")
    group.addoption("--fuzz-seed", type=int, default=0, help="the first seed of the cases")


def pytest_configure(config):
    config.stash[FUZZED] = {}
    config.addinivalue_line("markers", "fuzz: draws cases by the clock; see --fuzz-seconds")
    config.addinivalue_line("markers", "browser: needs Chromium, Playwright and npm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "fuzz" in getattr(item, "fixturenames", ()):
            item.add_marker("fuzz")


def pytest_terminal_summary(terminalreporter):
    if counts := terminalreporter.config.stash[FUZZED]:
        terminalreporter.section("fuzzing")
        for name, count in counts.items():
            terminalreporter.line(f"{name}: {count:,} cases")


@pytest.fixture
def fuzz(request, tmp_path):
    """Draw cases from consecutive seeds and check them, for --fuzz-seconds.

    A case that crashes the process is left in the file `case` of the test's temporary directory.
    """
    config = request.config
    options = settings(
        max_examples=CASES_A_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def run(strategy, check):
        end = time.monotonic() + config.getoption("--fuzz-seconds")
        count = 0
        with (tmp_path / "case").open("w") as journal:

            def one(case):
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
def one_thread():
    """Let torch compute in one thread, so that bits do not depend on the machine.

    This applies to a whole module, including its other fixtures.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain_torch():
    """Let CPU tensors take the torch path, as without native kernels, in a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "library", lambda: None)
        yield


@pytest.fixture
def device(monkeypatch):
    """The device under test: CUDA if there is one, which runs the compiled kernels.

    There, convolutions compute in full float32, as they do on a CPU.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_model():
    """Build a network by name with few channels, always from the same seed."""
    usual = {
        "capsnet": {"channels": 4, "capsule_types": 2},
        "conv_capsnet": {
            **{"in_channels": 1, "image_size": 28},
            **{"channels": (4, 6), "capsule_types": 2, "iterations": 2},
        },
        "deep_capsnet": {"channels": (4, 6), "capsule_types": 2},
        "efficient_capsnet": {"primary_capsules": 4, "decoder_hidden": (8, 8)},
        "inverted_capsnet": {
            **{"in_channels": 1, "image_size": 28},
            **{"channels": (4, 6), "blocks": (1, 1), "capsule_types": 2},
        },
        "matrix_capsnet": {"channels": (4, 2, 2, 3)},
        "scae": {
            **{"in_channels": 1, "image_size": 14, "channels": (4, 5), "strides": (2, 1)},
            **{"parts": 3, "template_size": 5, "features": 2, "objects": 4, "attention_dim": 4},
            **{"attention_blocks": 1, "encoding_dim": 6, "params": 3, "hidden": 5},
        },
    }

    def build(name, seed=0, **arguments):
        torch.manual_seed(seed)
        return create_model(name, **(usual[name] | arguments))

    return build


@pytest.fixture
def without_shrinking():
    """For tests that expect a hypothesis test to fail: the first failing example is enough."""
    before = settings.get_current_profile_name()
    settings.load_profile("mutants")
    yield
    settings.load_profile(before)
