"""The experiment: signal and gradient at every block's output, at initialization (over seeds) and after training."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.data.drawing import CLASS_NAMES
from resnet_backbone.data.generated import classification_image
from resnet_backbone.networks import build_network
from resnet_backbone.networks.blocks import Block

# Images are numbered; the measured batch does not overlap the training images.
MEASURED_FROM = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Family:
    """Networks of several depths, each with and without shortcuts, and their input images."""

    title: str
    residual: tuple[str, ...]
    plain: tuple[str, ...]
    image_size: int
    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All settings; training uses SGD with momentum 0.9 and weight decay 1e-4, as in the paper."""

    families: tuple[Family, ...]
    seed: int = 1
    initializations: int = 5
    measured_images: int = 64
    training_images: int = 1024
    iterations: int = 300
    batch_size: int = 32
    # At 0.05, deep residual networks do not start learning in so few iterations; at 0.01, all residual networks do.
    learning_rate: float = 0.01
    warmup_iterations: int = 20


EXPERIMENT = Experiment(
    families=(
        Family(
            title="CIFAR networks",
            residual=("cifar_resnet20", "cifar_resnet56", "cifar_resnet110"),
            plain=("cifar_plain20", "cifar_plain56", "cifar_plain110"),
            image_size=16,
        ),
        Family(
            title="ImageNet networks, quarter width",
            residual=("resnet18", "resnet34"),
            plain=("plain18", "plain34"),
            image_size=64,
            width=0.25,
        ),
    )
)


class Profile(NamedTuple):
    """Measurements at the blocks' outputs, first block first.

    Attributes:
        signal: RMS of the values.
        gradient: norm of the loss gradient, relative to the last block's.
    """

    signal: list[float]
    gradient: list[float]


def propagate(net: nn.Module, images: Tensor, labels: Tensor) -> Profile:
    """Run a batch forward and its loss backward, with batch norm in training mode, and measure every block."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in net.modules() if isinstance(module, Block)]
    F.cross_entropy(net.train()(images), labels).backward()
    for handle in handles:
        handle.remove()
    net.zero_grad()
    norms = [output.grad.norm().item() for output in outputs]
    return Profile(
        signal=[output.detach().square().mean().sqrt().item() for output in outputs],
        gradient=[norm / norms[-1] for norm in norms],
    )


def train(net: nn.Module, images: Tensor, labels: Tensor, experiment: Experiment) -> list[float]:
    """Train for a fixed number of iterations on batches drawn with replacement; return their losses."""
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(experiment.seed)
    losses = []
    net.train()
    for iteration in range(experiment.iterations):
        for group in optimizer.param_groups:
            group["lr"] = experiment.learning_rate * min(1, (iteration + 1) / experiment.warmup_iterations)
        batch = torch.randint(len(images), (experiment.batch_size,), generator=generator)
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(experiment: Experiment, report: Callable[[str], None]) -> dict[str, dict]:
    """Run the experiment; return each network's curves and final loss, by name."""
    results = {}
    for family in experiment.families:
        measured = generate(experiment.seed, MEASURED_FROM, experiment.measured_images, family.image_size)
        training = generate(experiment.seed, 0, experiment.training_images, family.image_size)
        for name in (*family.plain, *family.residual):
            profiles = []
            # The last one uses the experiment's own seed and continues into training.
            for seed in reversed(range(experiment.seed, experiment.seed + experiment.initializations)):
                torch.manual_seed(seed)
                net = build_network(name, len(CLASS_NAMES), width=family.width)
                profiles.append(propagate(net, *measured))
            losses = train(net, *training, experiment)
            final = statistics.fmean(losses[-max(1, experiment.iterations // 10) :])
            trained = propagate(net, *measured)
            results[name] = {
                "initial": {key: _spread([getattr(profile, key) for profile in profiles]) for key in Profile._fields},
                "trained": {key: _rounded(getattr(trained, key)) for key in Profile._fields},
                "final_loss": round(final, 3),
            }
            report(f"{name}: training loss {losses[0]:.2f} at first, {final:.2f} over the last tenth")
    return results


def generate(seed: int, first: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Generate `(count, 3, size, size)` images, with mean 0 and standard deviation 1 per channel, and labels."""
    images, labels = zip(*(classification_image(seed, first + i, size) for i in range(count)), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return (pixels - mean) / std, torch.tensor(labels)


def _spread(curves: list[list[float]]) -> dict[str, list[float]]:
    """Median, min and max of several curves, block by block."""
    blocks = list(zip(*curves, strict=True))
    return {name: _rounded(map(of, blocks)) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def _rounded(values) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
