"""Object capsules: a set transformer finds them in a set of parts, and each votes for the parts.

Axes: B batch, I parts, J object capsules. These are the upper half of a stacked capsule
autoencoder. `parts` has the lower half.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from tritoncaps import _checks, ops
from tritoncaps.layers._noise import NoisyPresence
from tritoncaps.layers._poses import affine_pose, compose


class ObjectVotes(NamedTuple):
    """What object capsules predict about each part, i, or each of their votes.

    `poses` (B, I, J, 2, 3): affine maps, the product of the pose of the object in the picture and
    that of the part in the object.
    `scales` (B, I, J): the standard deviation of each vote.
    `logits` (B, I, J): logarithm of the presence of each vote, that of its capsule included.
    `capsule_logits` (B, J): the presence of each capsule alone, before the sigmoid.
    `deformation` (B,): half the squared length of the part of the votes that depends on the input.
    A loss keeps it small, so that objects are rigid.
    """

    poses: Tensor
    scales: Tensor
    logits: Tensor
    capsule_logits: Tensor
    deformation: Tensor

    @property
    def presence(self) -> Tensor:
        """How present each object capsule is, (B, J): its most present vote."""
        return self.logits.amax(dim=1).exp()

    def log_prob(
        self, poses: Tensor, presence: Tensor | None = None, *, normalize: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of the parts' poses, and what explains each part.

        Args:
            poses: shape (B, I, 2, 3). Vote ij is for part i.
            presence: how present each part is, shape (B, I).
            normalize: see `tritoncaps.ops.capsule_mixture_log_prob`.

        Returns:
            log p, shape (B,), and the share of each part that each capsule explains, (B, I, J).

        Raises:
            TypeError, ValueError: a tensor has the wrong type, shape or device.
        """
        name = "ObjectVotes.log_prob"
        axes = {"poses": "B I R C", "presence?": "B I", "scales": "B I J"}
        _checks.check_inputs(name, axes, poses=poses, presence=presence, scales=self.scales)
        if poses.shape[2:] != (2, 3):
            raise ValueError(f"{name}: poses must be (B, I, 2, 3), got {_checks.shape_of(poses)}")
        return ops.capsule_mixture_log_prob(
            poses.flatten(2),
            self.poses.flatten(3),
            self.scales,
            self.logits,
            presence,
            normalize=normalize,
            return_posterior=True,
        )

    def set_log_prob(self, points: Tensor, presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of points in any order, and what explains each point.

        Every vote may be for every point. Of its pose, only the translation counts.

        Args:
            points: shape (B, N, 2).
            presence: how present each point is, shape (B, N).

        Returns:
            log p, shape (B,), and the share of each point that the votes of each capsule explain
            together, (B, N, J).

        Raises:
            TypeError, ValueError: a tensor has the wrong type, shape or device.
        """
        name = "ObjectVotes.set_log_prob"
        axes = {"points": "B N C", "presence?": "B N", "scales": "B I J"}
        _checks.check_inputs(name, axes, points=points, presence=presence, scales=self.scales)
        if points.shape[2] != 2:
            raise ValueError(f"{name}: points must be (B, N, 2), got {_checks.shape_of(points)}")

        def every(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(1).expand(-1, points.shape[1], *tensor.shape[1:])

        log_prob, posterior = ops.capsule_mixture_log_prob(
            points,
            every(self.poses[..., 2].flatten(1, 2)),  # (B, N, I·J, 2)
            every(self.scales.flatten(1)),
            every(self.logits.flatten(1)),
            presence,
            return_posterior=True,
        )
        return log_prob, posterior.unflatten(2, self.scales.shape[1:]).sum(dim=2)


# torch.export writes a module's outputs by the names of their types.
_register_namedtuple(ObjectVotes, serialized_type_name="tritoncaps.ObjectVotes")


class SetTransformer(nn.Module):
    """Summarise a set in J vectors by attention (Lee 2019), whatever the order of its members.

    A linear layer, blocks of self-attention with a perceptron each, another linear layer, and J
    learned queries that attend to the result. A member with presence p weighs p times as much in
    each attention, and one with presence 0 nothing. Where all are absent, all weigh alike.

    Args:
        in_dim: components of a member.
        outputs: vectors that summarise the set, J.
        out_dim: their components.
        blocks: blocks of self-attention.
        heads: of each attention. They divide `dim` and `out_dim`.
        dim: components inside the blocks.
        device, dtype: of the parameters.

    Shapes: set (B, I, in_dim), optionally presence (B, I) in [0, 1] → (B, J, out_dim).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, a tensor has
            the wrong type or shape.

    Example:
        >>> import torch
        >>> encoder = SetTransformer(in_dim=7, outputs=32, out_dim=256)
        >>> encoder(torch.rand(2, 40, 7), torch.rand(2, 40)).shape
        torch.Size([2, 32, 256])

    The authors' code for Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019). It
    subtracts 10³²·(1 − p) from the logits, so that only the most present members are seen. Here
    log p is added. For presences of 0 and 1, both are the same.
    """

    def __init__(
        self,
        in_dim: int,
        outputs: int,
        out_dim: int,
        *,
        blocks: int = 3,
        heads: int = 1,
        dim: int = 16,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"in_dim": in_dim, "outputs": outputs, "out_dim": out_dim, "heads": heads}
        for argument, size in {**sizes, "dim": dim}.items():
            _checks.check_size(name, argument, size)
        _checks.check_size(name, "blocks", blocks, 0)
        for argument, size in (("dim", dim), ("out_dim", out_dim)):
            if size % heads:
                raise ValueError(f"{name}: {argument}={size} must be a multiple of heads={heads}")
        self.in_dim = in_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Linear(in_dim, dim, **options)
        self.blocks = nn.ModuleList([_Block(dim, heads, **options) for _ in range(blocks)])
        self.last = nn.Linear(dim, out_dim, **options)
        self.queries = nn.Parameter(torch.empty(outputs, out_dim, **options))
        self.pooling = nn.MultiheadAttention(out_dim, heads, batch_first=True, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries."""
        nn.init.xavier_uniform_(self.queries)

    def forward(self, members: Tensor, presence: Tensor | None = None) -> Tensor:
        """Summarise the sets."""
        name = type(self).__name__
        axes = {"members": "B I D", "presence?": "B I"}
        _checks.check_inputs(name, axes, members=members, presence=presence)
        if members.shape[2] != self.in_dim:
            raise ValueError(
                f"{name}: members must be (B, I, {self.in_dim}), got {_checks.shape_of(members)}"
            )
        _checks.check_layer_dtype(name, "members", members, self.first)
        mask = None if presence is None else _log(presence)
        hidden = self.first(members)
        for block in self.blocks:
            hidden = block(hidden, presence, mask)
        hidden = self.last(hidden)
        queries = self.queries.expand(members.shape[0], -1, -1)
        return _attend(self.pooling, queries, hidden, mask)


class _Block(nn.Module):
    """Self-attention and a perceptron, each with a residual and a normalisation after it."""

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, **options)
        self.norm1 = nn.LayerNorm(dim, **options)
        self.perceptron = nn.Sequential(
            nn.Linear(dim, 2 * dim, **options), nn.ReLU(), nn.Linear(2 * dim, dim, **options)
        )
        self.norm2 = nn.LayerNorm(dim, **options)

    def forward(self, x: Tensor, presence: Tensor | None, mask: Tensor | None) -> Tensor:
        y = x + _attend(self.attention, x, x, mask)
        if presence is not None:
            y = y * presence.unsqueeze(2)
        y = self.norm1(y)
        result: Tensor = self.norm2(y + self.perceptron(y))
        return result


def _attend(
    attention: nn.MultiheadAttention, queries: Tensor, members: Tensor, mask: Tensor | None
) -> Tensor:
    if queries.shape[0] == 0:  # which torch cannot reshape
        return queries
    result: Tensor = attention(
        queries, members, members, key_padding_mask=mask, need_weights=False
    )[0]
    return result


def _log(presence: Tensor) -> Tensor:
    """The logarithm of a presence. Of 0 it is finite, and so is its gradient.

    It is so low that a softmax makes 0 of it, and no denormal number, which a CPU is slow with.
    """
    logarithm = presence.clamp(min=torch.finfo(presence.dtype).tiny).log()
    return logarithm.masked_fill(presence == 0, -1e4)


class ObjectDecoder(NoisyPresence):
    """Let each object capsule vote for the poses of its parts (Kosiorek 2019, section 2.1).

    Each capsule has two perceptrons of its own. The first reduces its encoding to a few
    parameters. The second makes of them the pose of the object in the picture, OV, the pose of each
    part in the object, OP, and how present and how exact each vote is:

        V_ij = OV_j OP_ij,  OP_ij = affine(static_ij + dynamic_ij)
        presence_ij = σ(a_j) σ(a_ij),  scale_ij = softplus(· + 0.5) + 0.01

    Only the dynamic part of OP depends on the input, and it has no bias.

    Args:
        objects: object capsules, J.
        in_dim: components of the encoding of a capsule.
        parts: votes of each capsule, I. For parts that are in no order, it is the number of points
            that a capsule may have.
        params: parameters between the two perceptrons.
        hidden: width of their hidden layers.
        similarity: poses without shear and with one scale, see `affine_pose`.
        noise: in training, a uniform number in ±noise is added to the logits of all presences. It
            pushes them away from 0.5.
        noisy_evaluation: add the noise in evaluation too, as the authors' code does.
        device, dtype: of the parameters.

    Shapes: (B, J, in_dim) → `ObjectVotes`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, the encoding
            has the wrong type or shape.

    Example:
        >>> import torch
        >>> decoder = ObjectDecoder(objects=32, in_dim=256, parts=40)
        >>> votes = decoder(torch.rand(2, 32, 256))
        >>> votes.poses.shape, votes.presence.shape
        (torch.Size([2, 40, 32, 2, 3]), torch.Size([2, 32]))
    """

    def __init__(
        self,
        objects: int,
        in_dim: int,
        parts: int,
        *,
        params: int = 32,
        hidden: int = 128,
        similarity: bool = False,
        noise: float = 2.0,
        noisy_evaluation: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(noise, noisy_evaluation)
        name = type(self).__name__
        sizes = {"objects": objects, "in_dim": in_dim, "parts": parts, "params": params}
        for argument, size in {**sizes, "hidden": hidden}.items():
            _checks.check_size(name, argument, size)
        _checks.check_flag(name, "similarity", similarity)
        self.objects, self.in_dim, self.parts = objects, in_dim, parts
        self.similarity = similarity
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce = nn.Sequential(
            PerCapsuleLinear(objects, in_dim, hidden, **options),
            nn.ReLU(),
            PerCapsuleLinear(objects, hidden, params, **options),
        )
        # Dynamic OP, OV, and for the capsule and each vote a presence, and for each vote a scale.
        self.sizes = (6 * parts, 6, 1, parts, parts)
        self.expand = nn.Sequential(
            # The authors' code adds an input that is always 1. The bias does the same.
            PerCapsuleLinear(objects, params, hidden, **options),
            nn.ReLU(),
            PerCapsuleLinear(objects, hidden, sum(self.sizes), bias=False, **options),
        )
        self.bias = nn.Parameter(torch.empty(objects, sum(self.sizes[1:]), **options))
        self.static = nn.Parameter(torch.empty(objects, parts, 6, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the static poses of the parts, and set the bias to 0."""
        # Glorot's limit, with J·I inputs and J·6 outputs.
        limit = math.sqrt(6 / (self.objects * (self.parts + 6)))
        nn.init.uniform_(self.static, -limit, limit)
        nn.init.zeros_(self.bias)

    def forward(self, encoding: Tensor) -> ObjectVotes:
        """Vote."""
        name = type(self).__name__
        _checks.check_tensor(name, "encoding", encoding, "B J D")
        if encoding.shape[1:] != (self.objects, self.in_dim):
            raise ValueError(
                f"{name}: encoding must be (B, {self.objects}, {self.in_dim}), "
                f"got {_checks.shape_of(encoding)}"
            )
        _checks.check_layer_dtype(name, "encoding", encoding, self.reduce[0])
        numbers = self.expand(self.reduce(encoding))  # (B, J, ...)
        dynamic, rest = numbers.split([self.sizes[0], sum(self.sizes[1:])], dim=2)
        dynamic = dynamic.unflatten(2, (self.parts, 6))
        object_pose, capsule, vote, scale = (rest + self.bias).split(self.sizes[1:], dim=2)
        part_poses = affine_pose(dynamic + self.static, similarity=self.similarity)
        object_pose = affine_pose(object_pose, similarity=self.similarity).unsqueeze(2)
        capsule, vote = self.noisy(capsule), self.noisy(vote)
        log_sigmoid = nn.functional.logsigmoid
        return ObjectVotes(
            poses=compose(object_pose, part_poses).transpose(1, 2),
            scales=(nn.functional.softplus(scale + 0.5) + 0.01).transpose(1, 2),
            logits=(log_sigmoid(capsule) + log_sigmoid(vote)).transpose(1, 2),
            capsule_logits=capsule.squeeze(2),
            deformation=dynamic.square().sum(dim=(1, 2, 3)) / 2,
        )

    def extra_repr(self) -> str:
        """Return the arguments that are not those of a module inside."""
        return f"similarity={self.similarity}, noise={self.noise}"


class PerCapsuleLinear(nn.Module):
    """A linear layer with weights of its own for each capsule, (B, J, in_dim) → (B, J, out_dim).

    Example:
        >>> import torch
        >>> PerCapsuleLinear(3, 4, 5)(torch.rand(2, 3, 4)).shape
        torch.Size([2, 3, 5])
    """

    def __init__(
        self,
        capsules: int,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(capsules, in_dim, out_dim, **options))
        self.bias = nn.Parameter(torch.empty(capsules, out_dim, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights with the variance 1 / in_dim, cut at two deviations, and no bias."""
        std = 1 / math.sqrt(self.weight.shape[1])
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        product = torch.einsum("bji,jio->bjo", x, self.weight)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Return the sizes."""
        capsules, in_dim, out_dim = self.weight.shape
        return f"{capsules}, {in_dim}, {out_dim}, bias={self.bias is not None}"
