"""What the tests of exported models share."""

import torch
from torch import Tensor


def tensors_of(result):
    """The tensors of a result, by name: of a named tuple, a dict, a tuple, or one tensor."""
    if isinstance(result, Tensor):
        return {"output": result.detach()}
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if not isinstance(result, dict):
        result = {f"output_{index}": tensor for index, tensor in enumerate(result)}
    return {name: tensor.detach() for name, tensor in result.items() if tensor is not None}


def difference(results, expected):
    """The largest difference between two sets of tensors with the same names."""
    assert results.keys() == expected.keys()
    for name, tensor in results.items():
        assert tensor.shape == expected[name].shape, name
    return max(float((results[name] - expected[name]).detach().abs().max()) for name in results)


class Call(torch.nn.Module):
    """An operator of the table with fixed options, as a module of its inputs."""

    def __init__(self, operator, options):
        super().__init__()
        self.operator, self.options = operator, options

    def forward(self, *inputs):
        return self.operator.call(dict(zip(self.operator.axes, inputs, strict=True)), self.options)
