"""No rivals beyond its reference."""

from benchmarks.cases import Case


def flops(case: Case, phase: str) -> int:
    """Count a routing that keeps only the weighted sums and recomputes the logits."""
    (I, _, J, D), r = case.shape, case.iterations
    product = 2 * case.B * I * J * D  # û·V; a weighted sum of û, or dû, takes as much
    if phase == "forward":
        return (2 * r - 1) * product
    # Each iteration but the first has û·V, û·ds and Σ db û. In addition, dû has 2r − 1 terms.
    return (3 * (r - 1) + 2 * r - 1) * product
