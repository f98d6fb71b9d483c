"""Capsules routed by attention."""

import math

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps._tracing import concrete, one_node


class AttentionCapsules(nn.Module):
    """Route input capsules to output capsules by self-attention (Mazzia 2021, section 3.2).

    One pass, without iterations. The output is squashed with the exponential form. Squash the input
    capsules with it, too.

    Args:
        in_capsules: input capsules, I.
        in_dim: components of an input capsule, P.
        out_capsules: output capsules, J.
        out_dim: components of an output capsule, D.
        bias: learn a bias, (I, J), that is added to the coupling after the softmax.
        device, dtype: of the parameters.

    Shapes: (B, I, P) → (B, J, D).

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `bias` is not a bool. In
            `forward`, whatever `ops.attention_routing` raises.

    Example:
        >>> import torch
        >>> routing = AttentionCapsules(in_capsules=16, in_dim=8, out_capsules=10, out_dim=16)
        >>> v, coupling = routing(torch.rand(2, 16, 8), return_coupling=True)
        >>> v.shape, coupling.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 16, 10]))
    """

    calibrated_weight = "weight"

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes("AttentionCapsules", in_capsules, in_dim, out_capsules, out_dim)
        _checks.check_flag("AttentionCapsules", "bias", bias)
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(in_capsules, in_dim, out_capsules, out_dim)
        self.bias = parameter(in_capsules, out_capsules) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight that makes short outputs, and set the bias to 0.

        For inputs of length 1, a prediction vector is σ·√D long, and the first sums are σ·√(I·D)/J.
        They start 0.1 long, where an absent class costs nothing by the margin loss. The exponential
        squash passes them almost unchanged. No prediction vector starts longer than 1, as they
        would be with few inputs and many outputs.
        """
        vote = min(1.0, 0.1 * self.out_capsules / math.sqrt(self.in_capsules))
        nn.init.normal_(self.weight, std=vote / math.sqrt(self.out_dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, u: Tensor, *, return_coupling: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Route input capsules, (B, I, P), to output capsules, (B, J, D).

        With `return_coupling`, the coupling, (B, I, J), is returned too.
        """
        return_coupling = concrete("return_coupling", return_coupling, False)
        _checks.check_flag("AttentionCapsules", "return_coupling", return_coupling)
        if not return_coupling:
            s = ops.attention_routing(u, self.weight, self.bias)
            return ops.squash(s, form="exponential")
        s, coupling = ops.attention_routing(u, self.weight, self.bias, return_coupling=True)
        return ops.squash(s, form="exponential"), coupling

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, "
            f"bias={self.bias is not None}"
        )


class InvertedAttentionCapsules(nn.Module):
    """Route input capsules to output capsules by inverted dot-product attention (Tsai 2020).

    The output is normalised by a LayerNorm, which all output capsules and iterations share, and is
    not squashed. How present a capsule is must therefore be read from its pose, as a linear layer
    does, and not from its length.

    Args:
        in_capsules: input capsules, I.
        in_dim: components of an input capsule, P.
        out_capsules: output capsules, J.
        out_dim: components of an output capsule, D.
        iterations: the number of weighted sums, at least 1. With 1, every coupling is 1/J.
        rows: poses are matrices of so many rows, row by row, and one matrix W_ij multiplies each of
            the rows. The weight is then rows² times smaller: (I, P/rows, J, D/rows).
        device, dtype: of the parameters.

    Shapes: (B, I, P) → (B, J, D).

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `rows` does not divide
            `in_dim` and `out_dim`. In `forward`, whatever `ops.inverted_attention_routing` raises.

    Example:
        >>> import torch
        >>> routing = InvertedAttentionCapsules(288, 16, 32, 16, rows=4)
        >>> u = torch.randn(2, 288, 16)
        >>> v = routing(u)
        >>> v.shape, routing.weight.shape
        (torch.Size([2, 32, 16]), torch.Size([288, 4, 32, 4]))

        One iteration at a time, as layers that are routed concurrently take them:

        >>> torch.equal(v, routing(u, routing(u, iterations=1), iterations=1))
        True
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int = 2,
        *,
        rows: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "InvertedAttentionCapsules"
        _check_sizes(name, in_capsules, in_dim, out_capsules, out_dim)
        _checks.check_size(name, "iterations", iterations)
        _checks.check_size(name, "rows", rows)
        for argument, size in (("in_dim", in_dim), ("out_dim", out_dim)):
            if size % rows:
                raise ValueError(f"{name}: {argument}={size} must be a multiple of rows={rows}")
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.iterations = iterations
        self.rows = rows
        shape = in_capsules, in_dim // rows, out_capsules, out_dim // rows
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight that keeps the scale of the poses, and reset the normalisation.

        Prediction vectors then have components about as large as the inputs. After a normalisation,
        logits are therefore about 1.
        """
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_dim // self.rows))
        self.norm.reset_parameters()

    def forward(
        self,
        u: Tensor,
        pose: Tensor | None = None,
        *,
        iterations: int | None = None,
        return_coupling: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Route input capsules, (B, I, P), to output capsules, (B, J, D).

        Args:
            u: input capsules, shape (B, I, P).
            pose: the output capsules of an earlier call, to go on from, shape (B, J, D).
            iterations: used for this call instead of the layer's own number.
            return_coupling: also return the coupling of the last iteration, (B, I, J).
        """
        iterations = concrete("iterations", iterations, None)
        return_coupling = concrete("return_coupling", return_coupling, False)
        weight: Tensor = self.weight
        if self.rows > 1:
            weight = _for_each_row(weight, self.rows)
        return ops.inverted_attention_routing(
            u,
            weight,
            self.iterations if iterations is None else iterations,
            pose=pose,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            return_coupling=return_coupling,
        )

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, "
            f"iterations={self.iterations}, rows={self.rows}"
        )


@one_node
def _for_each_row(weight: Tensor, rows: int) -> Tensor:
    """Repeat (I, p, J, d) for each row of a matrix pose: (I, rows·p, J, rows·d), 0 elsewhere."""
    same_row = torch.eye(rows, device=weight.device, dtype=weight.dtype)
    repeated = weight[:, None, :, :, None] * same_row[:, None, None, :, None]
    return repeated.flatten(1, 2).flatten(3)


def _check_sizes(
    layer: str, in_capsules: int, in_dim: int, out_capsules: int, out_dim: int
) -> None:
    for name, value in (
        ("in_capsules", in_capsules),
        ("in_dim", in_dim),
        ("out_capsules", out_capsules),
        ("out_dim", out_dim),
    ):
        _checks.check_size(layer, name, value)
