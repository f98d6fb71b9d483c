"""Settings shared by all tests: hypothesis profiles and the device."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

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
# Interpreted, a shrink takes many minutes; the first failing example is printed as it is.
phases = [phase for phase in Phase if not (INTERPRETED and phase in (Phase.shrink, Phase.explain))]
for _profile in ("dev", "ci", "nightly"):
    settings.register_profile(_profile, settings.get_profile(_profile), phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture
def device() -> torch.device:
    """The device under test: CUDA where there is one, which runs the kernels compiled."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
