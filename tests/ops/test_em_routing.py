"""EM routing: its convolution, and where other implementations go wrong."""

import math

import pytest
import torch

from tritoncaps import reference
from tritoncaps.testing import normal


def grid_inputs(B=2, H=7, W=6, C=3, R=4, P=4, J=5, Q=4, K=3):
    """A grid of matrix capsules and the weights of a convolution."""
    return {
        "poses": normal(B, H, W, C, R, P),
        "activations": normal(B, H, W, C, seed=1).sigmoid(),
        "weight": normal(K, K, C, P, J, Q) / P**0.5,
        "beta_u": normal(J),
        "beta_a": normal(J, seed=1),
    }


def convolution_by_loops(inputs, iterations, stride, competition, temperature, min_variance=1e-4):
    """The paper's procedure, position by position and vote by vote, for one image after another."""
    poses, activations, weight, beta_u, beta_a = inputs.values()
    B, H, W, C = activations.shape
    K, J = len(weight), len(beta_u)
    corners = [(y, x) for y in range(0, H - K + 1, stride) for x in range(0, W - K + 1, stride)]
    results = []
    for b in range(B):
        # The votes for each output capsule (corner, j), by the input capsule (y, x, c).
        votes = {
            ((y, x), j): {
                (y + ky, x + kx, c): poses[b, y + ky, x + kx, c] @ weight[ky, kx, c, :, j]
                for ky in range(K)
                for kx in range(K)
                for c in range(C)
            }
            for y, x in corners
            for j in range(J)
        }
        rivals = {}  # the output capsules that compete for an input capsule
        for output, of in votes.items():
            for i in of:
                key = (i, output[0] if competition == "position" else None)
                rivals.setdefault(key, []).append(output)
        shares = {(i, output): 1 / len(r) for (i, _), r in rivals.items() for output in r}
        for t in range(iterations):
            if t > 0:
                scores = {}
                for output, of in votes.items():
                    mean, variance, logit = fitted[output]
                    for i, vote in of.items():
                        p = (vote - mean) ** 2 / variance + (2 * math.pi * variance).log()
                        scores[i, output] = logit.sigmoid().log() - p.sum() / 2
                for (i, _), r in rivals.items():
                    of_rivals = torch.stack([scores[i, output] for output in r]).softmax(0)
                    shares.update(zip([(i, output) for output in r], of_rivals, strict=True))
            fitted = {}
            for output, of in votes.items():
                share = torch.stack([shares[i, output] * activations[b][i] for i in of])
                stacked = torch.stack(list(of.values()))
                mass, share = share.sum(), share[:, None, None] / share.sum()
                mean = (share * stacked).sum(0)
                variance = (share * (stacked - mean) ** 2).sum(0) + min_variance
                cost = (beta_u[output[1]] + variance.log() / 2).sum() * mass
                logit = temperature * (beta_a[output[1]] - cost)
                fitted[output] = mean, variance, logit
        results.append([fitted[output] for output in votes])
    return tuple(torch.stack([torch.stack([f[n] for f in r]) for r in results]) for n in (0, 2))


@pytest.mark.parametrize("competition", ["children", "position"])
def test_the_convolution_is_that_of_loops_over_positions_and_votes(competition):
    inputs = grid_inputs(B=1, H=6, W=5, C=2, J=2, P=2, Q=2, R=2)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    v, _, logits = reference.conv_em_routing(
        **inputs,
        iterations=3,
        stride=2,
        competition=competition,
        temperature=0.3,
        return_logits=True,
    )
    v_loops, logits_loops = convolution_by_loops(inputs, 3, 2, competition, 0.3)
    torch.testing.assert_close(v.flatten(1, 3), v_loops)
    torch.testing.assert_close(logits.flatten(1), logits_loops)
    actual, expected = (
        torch.autograd.grad(v.square().sum() + logits.sin().sum(), list(inputs.values()))
        for v, logits in ((v, logits), (v_loops, logits_loops))
    )
    torch.testing.assert_close(actual, expected)
