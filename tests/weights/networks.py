"""Networks with random weights, and what the tests of conversion compare."""

import pickle

import numpy as np
import torch
from torch import nn

from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, load_state

STAGES = ["res2", "res3", "res4", "res5"]
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def randomized(net: nn.Module) -> nn.Module:
    """`net` in evaluation mode with random values in every parameter and statistic, of a plausible size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() > 1:
                bound = (6 / tensor[0].numel()) ** 0.5
                tensor.uniform_(-bound, bound, generator=generator)
            elif name.endswith(("bias", "mean")):
                tensor.uniform_(-0.3, 0.3, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


def made(build, *arguments, **named) -> nn.Module:
    """A library's network with random weights, without its slow initialization."""
    with torch.device("meta"):
        net = build(*arguments, **named)
    return randomized(net.to_empty(device="cpu"))


def rebuilt(checkpoint: Checkpoint) -> nn.Module:
    """Our network of the metadata with all its weights, in float64."""
    metadata = checkpoint.metadata
    net = build_network(metadata.architecture, len(metadata.class_names), **metadata.arguments)
    load_state(net, checkpoint.model, part="network", source="the checkpoint")
    return net.double().eval()


def difference(value, reference) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def assert_same_bits(state, expected, *, without_counts: bool = False) -> None:
    if without_counts:
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith("num_batches_tracked")}
    assert set(state) == set(expected)  # safetensors has its own order
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def save_pickle(path, payload, protocol=2):
    path.write_bytes(pickle.dumps(payload, protocol=protocol))
    return path


def arrays(state) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}
