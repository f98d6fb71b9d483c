"""The likelihood of parts under votes: torch's own mixture, absent parts, distant parts."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tritoncaps import ops

DUMMY = -2 * math.log(10)


def draw(B=2, I=4, J=3, D=5, dtype=torch.float64):
    torch.manual_seed(0)
    x, votes = torch.randn(B, I, D, dtype=dtype), torch.randn(B, I, J, D, dtype=dtype)
    scales = torch.rand(B, I, J, dtype=dtype) + 0.5
    return x, votes, scales, torch.randn(B, I, J, dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_mixture_part_by_part(device, normalize):
    """A loop over images, parts and votes, with densities instead of their logarithms."""
    x, votes, scales, logits = (tensor.to(device) for tensor in draw())
    presence = torch.rand(2, 4, dtype=torch.float64, device=device)
    expected = []
    for b in range(2):
        total = 0.0
        for i in range(4):
            weights = [math.exp(logit) for logit in (*logits[b, i].tolist(), -0.5)]
            whole = sum(weights) if normalize else 1.0
            density = weights[-1] / whole * math.exp(-1.5)
            for j in range(3):
                normal = Normal(votes[b, i, j], scales[b, i, j])
                density += weights[j] / whole * normal.log_prob(x[b, i]).sum().exp().item()
            total += presence[b, i].item() * math.log(density)
        expected.append(total)
    actual = ops.capsule_mixture_log_prob(
        *(x, votes, scales, logits, presence),
        normalize=normalize,
        dummy_logit=-0.5,
        dummy_log_prob=-1.5,
    )
    torch.testing.assert_close(actual.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_without_the_dummy_component_it_is_torchs_mixture(device):
    x, votes, scales, logits = (tensor.to(device) for tensor in draw())
    normals = Independent(Normal(votes, scales[..., None].expand_as(votes)), 1)
    mixture = MixtureSameFamily(Categorical(logits=logits), normals)
    actual, posterior = ops.capsule_mixture_log_prob(
        x, votes, scales, logits, dummy_logit=-1e4, return_posterior=True
    )
    torch.testing.assert_close(actual, mixture.log_prob(x).sum(dim=1))
    torch.testing.assert_close(posterior.sum(dim=2), torch.ones_like(x[..., 0]))


def test_the_dummy_component_explains_a_distant_part(device):
    """As far away as float32 goes and further. No value and no gradient is NaN."""
    x, votes, scales, logits = (tensor.float().to(device) for tensor in draw(I=1))
    for distance in (1e3, 1e19, 1e30, math.inf):
        inputs = [torch.full_like(x, distance), votes, scales, logits]
        if distance != math.inf:
            inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        log_prob, posterior = ops.capsule_mixture_log_prob(*inputs, return_posterior=True)
        rest = torch.cat([logits, torch.full_like(logits[..., :1], DUMMY)], 2).log_softmax(2)
        torch.testing.assert_close(log_prob, rest[:, 0, -1] + DUMMY)
        assert not posterior.any()
        if log_prob.requires_grad:
            for grad in torch.autograd.grad(log_prob.sum(), inputs):
                assert grad.isfinite().all()


def test_an_absent_part_counts_nothing(device):
    x, votes, scales, logits = (tensor.to(device) for tensor in draw())
    presence = torch.tensor([[1.0, 0, 1, 0]], dtype=torch.float64, device=device).expand(2, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, votes, scales, logits)]
    actual = ops.capsule_mixture_log_prob(*leaves, presence)
    kept = ops.capsule_mixture_log_prob(*(tensor[:, ::2] for tensor in leaves))
    torch.testing.assert_close(actual, kept)
    for grad in torch.autograd.grad(actual.sum(), leaves):
        assert grad.isfinite().all() and not grad[:, 1::2].any()


def test_a_vote_may_be_switched_off(device):
    """All of them too: then the dummy component explains everything."""
    x, votes, scales, logits = (tensor.to(device) for tensor in draw())
    off = logits.clone()
    off[..., 1] = -math.inf
    leaves = [tensor.clone().requires_grad_() for tensor in (x, votes, scales, off)]
    log_prob, posterior = ops.capsule_mixture_log_prob(*leaves, return_posterior=True)
    others = [0, 2]
    fewer = (x, votes[:, :, others], scales[..., others], logits[..., others])
    torch.testing.assert_close(log_prob, ops.capsule_mixture_log_prob(*fewer))
    assert not posterior[..., 1].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), leaves))
    nothing = torch.full_like(logits, -math.inf)
    log_prob = ops.capsule_mixture_log_prob(x, votes, scales, nothing)
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, 4 * DUMMY))


def test_votes_for_any_part_are_expanded(device):
    """The points of a constellation are in any order. Another order changes nothing."""
    x, votes, scales, logits = (tensor.to(device) for tensor in draw())
    shared = [tensor[:, :1].expand_as(tensor) for tensor in (votes, scales, logits)]
    order = torch.tensor([2, 0, 3, 1], device=device)
    torch.testing.assert_close(
        ops.capsule_mixture_log_prob(x[:, order], *shared), ops.capsule_mixture_log_prob(x, *shared)
    )


def test_a_dummy_component_without_a_number_is_refused():
    inputs = draw()
    for name in ("dummy_logit", "dummy_log_prob"):
        for value in (math.inf, -math.inf):
            words = f"capsule_mixture_log_prob: {name} must be finite, got {value}"
            with pytest.raises(ValueError, match=words):
                ops.capsule_mixture_log_prob(*inputs, **{name: value})
