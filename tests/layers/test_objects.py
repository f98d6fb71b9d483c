"""Object capsules: attention over a set, votes of each capsule, and what they explain."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal
from torch.nn import functional as F

from tritoncaps import reference
from tritoncaps.layers import ObjectDecoder, SetTransformer, affine_pose
from tritoncaps.layers.objects import PerCapsuleLinear

SMALL = {"params": 3, "hidden": 5}


def small_encoder(**options):
    torch.manual_seed(0)
    options = {"blocks": 2, "heads": 2, "dim": 4, **options}
    return SetTransformer(3, outputs=2, out_dim=6, **options).double()


def small_decoder(**options):
    torch.manual_seed(0)
    decoder = ObjectDecoder(3, 4, 2, **SMALL, **options).double().eval()
    with torch.no_grad():
        decoder.bias.normal_()
    return decoder


def drawn(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def attended(attention, queries, members, presence):
    """Attention head by head, with each weight multiplied by the presence of its member."""
    E, heads = attention.embed_dim, attention.num_heads
    projected = [
        F.linear(x, weight, bias).unflatten(-1, (heads, E // heads))
        for x, weight, bias in zip(
            (queries, members, members),
            attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3),
            strict=True,
        )
    ]
    q, k, v = projected
    results = []
    for head in range(heads):
        weights = (q[:, head] @ k[:, head].T / math.sqrt(E // heads)).exp() * presence
        results.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, head])
    return F.linear(torch.cat(results, dim=1), attention.out_proj.weight, attention.out_proj.bias)


@pytest.mark.parametrize("soft", [False, True])
def test_the_transformer_is_attention_block_by_block(soft):
    encoder, members = small_encoder(), drawn(2, 5, 3)
    presence = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.float64)
    if soft:
        presence = drawn(2, 5).sigmoid()
    for image in range(2):
        p, hidden = presence[image], encoder.first(members[image])
        for block in encoder.blocks:
            hidden = hidden + attended(block.attention, hidden, hidden, p)
            hidden = block.norm1(hidden * p[:, None])
            hidden = block.norm2(hidden + block.perceptron(hidden))
        expected = attended(encoder.pooling, encoder.queries, encoder.last(hidden), p)
        torch.testing.assert_close(encoder(members, presence)[image], expected)


def test_an_absent_member_and_the_order_change_nothing():
    encoder, members = small_encoder(), drawn(2, 5, 3)
    presence = torch.ones(2, 5, dtype=torch.float64)
    presence[:, 3:] = 0
    expected = encoder(members[:, :3])
    torch.testing.assert_close(encoder(members, presence), expected)
    order = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(encoder(members[:, order], presence[:, order]), expected)
    assert encoder(members, 0 * presence).isfinite().all()


def test_the_gradient_of_the_transformer():
    encoder = small_encoder(blocks=1)
    members, presence = drawn(1, 3, 3).requires_grad_(), drawn(1, 3).sigmoid().requires_grad_()
    parameters = tuple(encoder.parameters())
    assert gradcheck(lambda x, p, *_: encoder(x, p), (members, presence, *parameters))
    absent = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder(members, absent).sum(), absent)
    assert grad.isfinite().all()


@pytest.mark.parametrize("similarity", [False, True])
def test_a_vote_is_the_pose_of_the_object_times_that_of_the_part(similarity):
    """Capsule by capsule and vote by vote, with the perceptrons written out."""
    decoder, encoding = small_decoder(similarity=similarity), drawn(2, 3, 4)
    votes = decoder(encoding)
    assert votes.poses.shape == (2, 2, 3, 2, 3)
    last = torch.tensor([[0.0, 0, 1]], dtype=torch.float64)
    deformation = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for j in range(3):
            x = encoding[b, j]
            for sequence in (decoder.reduce, decoder.expand):
                first, _, second = sequence
                x = (x @ first.weight[j] + first.bias[j]).relu() @ second.weight[j]
                x = x if second.bias is None else x + second.bias[j]
            dynamic, rest = x[:12].view(2, 6), x[12:] + decoder.bias[j]
            deformation[b] += dynamic.square().sum() / 2
            pose = torch.cat([affine_pose(rest[:6], similarity=similarity), last])
            torch.testing.assert_close(votes.capsule_logits[b, j], rest[6])
            for i in range(2):
                part = affine_pose(dynamic[i] + decoder.static[j, i], similarity=similarity)
                expected = pose @ torch.cat([part, last])
                torch.testing.assert_close(votes.poses[b, i, j], expected[:2])
                scale = (1 + (rest[9 + i] + 0.5).exp()).log() + 0.01
                torch.testing.assert_close(votes.scales[b, i, j], scale)
                presence = rest[6].sigmoid() * rest[7 + i].sigmoid()
                torch.testing.assert_close(votes.logits[b, i, j].exp(), presence)
    torch.testing.assert_close(votes.deformation, deformation)
    torch.testing.assert_close(votes.presence, votes.logits.exp().amax(dim=1))


def test_the_decoder_is_noisy_in_training_alone_unless_told():
    decoder, encoding = small_decoder(noise=0.5), drawn(2, 3, 4)
    quiet = decoder(encoding)
    assert torch.equal(decoder(encoding).logits, quiet.logits)
    decoder.train()
    noisy = [decoder(encoding) for _ in range(100)]
    shifts = torch.stack([votes.capsule_logits - quiet.capsule_logits for votes in noisy])
    assert 0.45 < shifts.max() < 0.5001 and -0.5001 < shifts.min() < -0.45
    assert torch.equal(noisy[0].poses, quiet.poses)
    assert torch.equal(noisy[0].scales, quiet.scales)
    assert len({votes.logits.sum().item() for votes in noisy}) == 100
    told = small_decoder(noisy_evaluation=True)
    assert not torch.equal(told(encoding).logits, told(encoding).logits)


def test_the_gradient_of_the_decoder():
    decoder = small_decoder()
    encoding = drawn(1, 3, 4).requires_grad_()
    parameters = tuple(decoder.parameters())
    assert gradcheck(lambda x, *_: tuple(decoder(x)), (encoding, *parameters))


def test_the_likelihood_of_parts_is_that_of_their_poses():
    votes, poses = small_decoder()(drawn(2, 3, 4)), affine_pose(drawn(2, 2, 6))
    presence = drawn(2, 2).sigmoid()
    for normalize in (True, False):
        actual = votes.log_prob(poses, presence, normalize=normalize)
        expected = reference.capsule_mixture_log_prob(
            *(poses.flatten(2), votes.poses.flatten(3), votes.scales, votes.logits, presence),
            normalize=normalize,
            return_posterior=True,
        )
        torch.testing.assert_close(actual, expected)


def test_the_likelihood_of_a_set_tries_every_vote_for_every_point():
    votes, points = small_decoder()(drawn(2, 3, 4)), drawn(2, 5, 2)
    presence = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    log_prob, posterior = votes.set_log_prob(points, presence)
    dummy = -2 * math.log(10)
    for b in range(2):
        total = torch.zeros((), dtype=torch.float64)
        whole = votes.logits[b].exp().sum() + math.exp(dummy)
        for n in range(5):
            density = torch.zeros(4, dtype=torch.float64)
            density[3] = math.exp(2 * dummy) / whole
            for i in range(2):
                for j in range(3):
                    normal = Normal(votes.poses[b, i, j, :, 2], votes.scales[b, i, j])
                    weight = votes.logits[b, i, j].exp() / whole
                    density[j] += weight * normal.log_prob(points[b, n]).sum().exp()
            total = total + presence[b, n] * density.sum().log()
            torch.testing.assert_close(posterior[b, n], density[:3] / density.sum())
        torch.testing.assert_close(log_prob[b], total)


def test_each_capsule_has_weights_of_its_own():
    layer, x = PerCapsuleLinear(3, 4, 5), torch.rand(2, 3, 4)
    for j in range(3):
        torch.testing.assert_close(layer(x)[:, j], F.linear(x[:, j], layer.weight[j].T))


def some_votes():
    """Votes of three capsules for two parts of two images."""
    return ObjectDecoder(3, 4, 2)(torch.ones(2, 3, 4))


CASES = {
    "heads": (
        lambda: SetTransformer(3, 2, 6, heads=4, dim=8),
        "SetTransformer: out_dim=6 must be a multiple of heads=4",
    ),
    "members": (
        lambda: SetTransformer(3, 2, 6)(torch.ones(2, 5, 4)),
        "SetTransformer: members must be (B, I, 3), got (2, 5, 4)",
    ),
    "presence": (
        lambda: SetTransformer(3, 2, 6)(torch.ones(2, 5, 3), torch.ones(2, 4)),
        "SetTransformer: presence has I=4 but members has I=5 (members: (2, 5, 3), "
        "presence: (2, 4))",
    ),
    "encoding": (
        lambda: ObjectDecoder(3, 4, 2)(torch.ones(2, 4, 4)),
        "ObjectDecoder: encoding must be (B, 3, 4), got (2, 4, 4)",
    ),
    "poses": (
        lambda: some_votes().log_prob(torch.ones(2, 2, 6)),
        "ObjectVotes.log_prob: poses must have 4 axes (B, I, R, C), got 3 (poses: (2, 2, 6))",
    ),
    "pose": (
        lambda: some_votes().log_prob(torch.ones(2, 2, 3, 2)),
        "ObjectVotes.log_prob: poses must be (B, I, 2, 3), got (2, 2, 3, 2)",
    ),
    "points": (
        lambda: some_votes().set_log_prob(torch.ones(2, 5, 3)),
        "ObjectVotes.set_log_prob: points must be (B, N, 2), got (2, 5, 3)",
    ),
    "noise": (
        lambda: ObjectDecoder(3, 4, 2, noise=-1),
        "ObjectDecoder: noise must be >= 0 and finite, got -1",
    ),
}


@pytest.mark.parametrize(("call", "words"), CASES.values(), ids=CASES)
def test_errors_name_the_argument_and_both_numbers(call, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        call()
