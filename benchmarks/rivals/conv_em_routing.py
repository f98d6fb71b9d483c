"""The broadcast form, whose output capsules compete at one position only."""

from typing import Any

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.rivals import em_routing


def broadcast(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    stride: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Gather patches, and route each position by itself, as most implementations do."""
    K = len(weight)
    windows = [x.unfold(1, K, stride).unfold(2, K, stride) for x in (poses, activations)]
    places = [x.movedim((-2, -1), (3, 4)) for x in windows]
    patches, of_patches = (x.flatten(0, 2).flatten(1, 3) for x in places)
    weight = weight.flatten(0, 2)
    results = em_routing.broadcast(patches, of_patches, weight, beta_u, beta_a, **options)
    return tuple(x.unflatten(0, places[0].shape[:3]) for x in results)


RIVALS = {"broadcast": broadcast}


def takes(case: Case) -> bool:
    """Nothing competes between patches that are routed one by one, and none is padded."""
    return case.options["competition"] == "position" and not case.options["padding"]
