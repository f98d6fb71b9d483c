"""How large the random weights of a routing are at the start."""

import math

# The gain of an iteration. 10/16 is J/D of the paper's networks. Above 1, routing runs away.
_GAIN = 10 / 16
# How long a prediction vector may be, and so how large the logit that it makes.
_LONGEST_VOTE = 3.2
# How short a first sum may be. The squash makes 0.01 of it.
_SHORTEST_SUM = 0.1


def routing_weight_std(inputs: int, out_capsules: int, out_dim: int) -> float:
    """Return σ of the weight, (…, P, J, D), of a routing from I = `inputs` capsules to J of D.

    For inputs of length 1, a prediction vector û is σ·√D long. With coupling 1/J and I random
    directions, the first sums are σ·√(I·D)/J long. Their length decides σ. It is 1, unless one of
    two limits is lower.

    √(κ·D/J), κ = 10/16: the iterations must not run away. An output v raises the logit of an input
    by û·v, and so its coupling by about û·v/J. In the next sum this adds up to I·E[û (û·v)]/J,
    which is g·v with g = σ²·I/J. Beyond g = 1 all outputs grow to length 1, whatever the input. At
    first sums of length 1, g is J/D: 0.6 for 10 capsules of 16, but 6 for 100. The limit is g ≤ κ.

    3.2·√I/J: no prediction vector is longer than 3.2. Longer ones make logits so large that chance
    gives an input to one output. This happens where few inputs meet many outputs.

    The length is never below 0.1, where the next squash would end the signal. Only hundreds of
    outputs come near it. Ten capsules of 16 have the length 1 exactly.
    """
    length = _first_sum(inputs, out_capsules, out_dim)
    return length * (out_capsules / math.sqrt(inputs * out_dim))


def routed_length(inputs: int, out_capsules: int, out_dim: int) -> float:
    """Return the length of the first outputs of such a routing, for the weight of the next one."""
    square = _first_sum(inputs, out_capsules, out_dim) ** 2
    return square / (1 + square)


def _first_sum(inputs: int, out_capsules: int, out_dim: int) -> float:
    """The length of the first sums."""
    length = min(
        1.0,
        math.sqrt(_GAIN * out_dim / out_capsules),
        _LONGEST_VOTE * math.sqrt(inputs) / out_capsules,
    )
    return max(length, _SHORTEST_SUM)
