"""The backward of the passes of `_two_products.py`: dpose, and what else needs a sum over all j.

    dc_ij = û_ij·ds_j (+ grad_coupling_ij),  δ_i = Σ_j c̃_ij dc_ij,  db_ij = c̃_ij (dc_ij - δ_i)
    dpose_j = Σ_i db_ij û_ij

The kernels are those of the forward. The first forms W pose and W ds while it has W. It keeps the
logits and dc, and sums exp(logit - maximum) dc over a run. So joining the runs gives δ as well. The
second has db in place of c. As with one product, log Σ_j exp and δ are left for
`_vote_gradient.py`.
"""

import triton
from torch import Tensor

from tritoncaps.kernels._launch import dot_precision, target_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels._prepared import prepare
from tritoncaps.kernels._two_products import TwoProducts
from tritoncaps.kernels._vote_gradient import Contraction


class TwoProductsBackward:
    """The backward passes of one call, and the contraction after them."""

    def __init__(
        self, u: Tensor | Patches, weight: Tensor, contraction: Contraction, *, steps: int
    ) -> None:
        B, I, _ = u.shape
        self._u, self._weight, self._contraction = u, weight, contraction
        self._passes = TwoProducts(u, weight, pairs=2)
        self.slots = self._passes.slots
        # As many rows as `prepare` gives u. Those that do not exist take no part in any sum.
        self._saved = self.slots.new_empty(2, steps, I, triton.cdiv(B, 16) * 16)
        self._saved[0, ..., B:] = float("inf")
        self._saved[1, ..., B:] = 0.0

    def run(self, step: int, pose: Tensor | None, ds: Tensor, grad_coupling: Tensor | None) -> None:
        """Write the shares of dpose of a step to the slots. See `TwoSweeps.run`."""
        prior, full = self._contraction.prior, self._contraction.full
        if pose is None and prior is None:
            return
        has_dpose = pose is not None and full
        for chunk in self._passes.chunks():
            self._passes.write_softmax(
                chunk, pose, prior, ds if full else None, grad_coupling,
                self._saved[:, step],
                save_pairs=has_dpose,
                leaky=self._contraction.leaky,
            )  # fmt: skip
            if has_dpose:
                self._passes.write_weighted_sum(chunk, with_dc=True)

    def contract(
        self,
        poses: Tensor,
        ds: Tensor,
        grad_coupling: Tensor | None,
        *,
        uniform: bool,
    ) -> None:
        """Write the gradients of all steps. See `TwoSweeps.contract`."""
        del self._passes  # The contraction needs its memory.
        launch = self._contraction.launch
        prepared = prepare(
            self._u, self._weight, dot_precision(self._u.dtype, target_of(self._u)),
            block_b=16, block_p=launch["BLOCK_P"], block_d=launch["BLOCK_D"],
        )  # fmt: skip
        self._contraction.write(prepared, poses, ds, grad_coupling, self._saved, uniform=uniform)
