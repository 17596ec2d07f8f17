import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def randomize():
    """A function that gives a network's norms non-trivial statistics, scales and shifts, as training would."""

    def randomize(net: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
        return net

    return randomize


@pytest.fixture(scope="session")
def relative_error():
    """A function that returns the largest difference of two tensors, over the reference's largest value."""
    return lambda value, reference: ((value - reference).abs().max() / reference.abs().max()).item()
