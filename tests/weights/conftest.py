import pytest
import torch

from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, Metadata
from tests.weights.networks import randomized


@pytest.fixture
def metadata():
    """A function that makes metadata of a quarter-width ResNet-50, with the entries given replaced."""

    def metadata(**entries) -> Metadata:
        plain = dict(
            kind="classifier",
            architecture="resnet50",
            arguments={"width": 0.25, "stride_in_1x1": False},
            channel_order="RGB",
            pixel_mean=(123.675, 116.28, 103.53),
            pixel_std=(58.395, 57.12, 57.375),
            norm_statistics="precise",
            norm_epsilon=1e-5,
            class_names=("cat", "dog", "Å\n'quoted'"),
            crop=(64, 96),
            origin={"seed": 3, "top1": 79.25, "nested": {"versions": ["a", None, True]}},
        )
        return Metadata(**{**plain, **entries})

    return metadata


@pytest.fixture
def checkpoint(metadata) -> Checkpoint:
    """Tensors of several types and layouts, the optimizer's state, and metadata."""
    generator = torch.Generator().manual_seed(0)
    model = {
        "weight": torch.randn(4, 3, 5, 5, generator=generator),
        "channels_last": torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
        "half": torch.randn(7, generator=generator).half(),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(7, generator=generator, dtype=torch.float64),
        "count": torch.tensor(2**40),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "empty": torch.zeros(0, 3),
    }
    trainer = {"optimizer": {"state": {0: {"momentum_buffer": model["weight"].clone()}}, "param_groups": [{"lr": 0.1}]}}
    return Checkpoint(model, metadata(), iteration=41, trainer={**trainer, "seed": 7})


@pytest.fixture
def narrow(metadata):
    """The function `(name, …)` that gives a checkpoint of a randomized narrow network."""

    def make(name, **arguments) -> Checkpoint:
        arguments = {"width": 1.0 if name == "resnet18" else 0.125, **arguments}
        net = randomized(build_network(name, 3, **arguments))
        return Checkpoint(net.state_dict(), metadata(architecture=name, arguments=arguments))

    return make
