"""The table of all networks by name, and the one function that builds them."""

import inspect
from difflib import get_close_matches
from typing import Any

from resnet_backbone.errors import InputError
from resnet_backbone.networks.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from resnet_backbone.networks.resnet import CIFAR_STEM, IMAGENET_STEM, ResNet
from resnet_backbone.networks.stages import StagedNetwork
from resnet_backbone.networks.vgg import VGG

# What the rows of a family have in common.
_IMAGENET = {"stem": IMAGENET_STEM, "channels": 64, "groups": 1, "width_per_group": 64}
_CIFAR = {"stem": CIFAR_STEM, "channels": 16, "groups": 1, "width_per_group": 64, "res5_dilation": 1}
_PLAIN = {"shortcut": None, "zero_init_last_norm": False}
# Their projections are bare convolutions, and their branches end in a convolution, not in a norm.
_PREACT = {"shortcut": "B", "zero_init_last_norm": False}

# A row is a class and the arguments that make it this network; the class's other arguments are the user's.
CATALOGUE: dict[str, tuple[type[StagedNetwork], dict[str, Any]]] = {
    # He et al. 2015, Table 1 and Figure 3.
    "resnet18": (ResNet, {**_IMAGENET, "block": BasicBlock, "depths": (2, 2, 2, 2)}),
    "resnet34": (ResNet, {**_IMAGENET, "block": BasicBlock, "depths": (3, 4, 6, 3)}),
    "resnet50": (ResNet, {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 6, 3)}),
    "resnet101": (ResNet, {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 23, 3)}),
    "resnet152": (ResNet, {**_IMAGENET, "block": Bottleneck, "depths": (3, 8, 36, 3)}),
    "plain18": (ResNet, {**_IMAGENET, **_PLAIN, "block": BasicBlock, "depths": (2, 2, 2, 2)}),
    "plain34": (ResNet, {**_IMAGENET, **_PLAIN, "block": BasicBlock, "depths": (3, 4, 6, 3)}),
    # Xie et al. 2016 (arXiv 1611.05431), Table 1; 101 32×8d as released with arXiv 1805.00932.
    "resnext50_32x4d": (
        ResNet,
        {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
    ),
    "resnext101_32x8d": (
        ResNet,
        {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    ),
    # Zagoruyko, Komodakis 2016 (arXiv 1605.07146), Table 8: bottlenecks with twice the inner channels.
    "wide_resnet50_2": (ResNet, {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 6, 3), "width_per_group": 128}),
    "wide_resnet101_2": (ResNet, {**_IMAGENET, "block": Bottleneck, "depths": (3, 4, 23, 3), "width_per_group": 128}),
    # He et al. 2016 (arXiv 1603.05027).
    "preact_resnet50": (ResNet, {**_IMAGENET, **_PREACT, "block": PreActBottleneck, "depths": (3, 4, 6, 3)}),
    "preact_resnet101": (ResNet, {**_IMAGENET, **_PREACT, "block": PreActBottleneck, "depths": (3, 4, 23, 3)}),
    "preact_resnet152": (ResNet, {**_IMAGENET, **_PREACT, "block": PreActBottleneck, "depths": (3, 8, 36, 3)}),
    # Simonyan, Zisserman 2014, Table 1, columns D and E.
    "vgg16": (VGG, {"plan": (2, 2, 3, 3, 3), "norm": None}),
    "vgg16_bn": (VGG, {"plan": (2, 2, 3, 3, 3)}),
    "vgg19": (VGG, {"plan": (2, 2, 4, 4, 4), "norm": None}),
    "vgg19_bn": (VGG, {"plan": (2, 2, 4, 4, 4)}),
    # He et al. 2015, section 4.2: 6n + 2 layers, option A.
    **{
        f"cifar_resnet{6 * n + 2}": (ResNet, {**_CIFAR, "shortcut": "A", "block": BasicBlock, "depths": (n, n, n)})
        for n in (3, 5, 7, 9, 18, 200)
    },
    **{
        f"cifar_plain{6 * n + 2}": (ResNet, {**_CIFAR, **_PLAIN, "block": BasicBlock, "depths": (n, n, n)})
        for n in (3, 5, 7, 9, 18)
    },
    # A common walk-through: ResNet-18's depths at a quarter of its channels, behind a 3×3 stem that pads three pixels.
    "cifar_resnet18": (
        ResNet,
        {**_CIFAR, "stem": CIFAR_STEM._replace(padding=3), "block": BasicBlock, "depths": (2, 2, 2, 2)},
    ),
    # He et al. 2016 (arXiv 1603.05027), Table 2: 110 layers in basic blocks, 164 in bottlenecks.
    "cifar_preact_resnet110": (ResNet, {**_CIFAR, **_PREACT, "block": PreActBasicBlock, "depths": (18, 18, 18)}),
    "cifar_preact_resnet164": (ResNet, {**_CIFAR, **_PREACT, "block": PreActBottleneck, "depths": (18, 18, 18)}),
    # Zagoruyko, Komodakis 2016, Table 5: ten times the channels, without dropout.
    "cifar_wide_resnet28_10": (
        ResNet,
        {**_CIFAR, **_PREACT, "channels": 160, "block": PreActBasicBlock, "depths": (4, 4, 4)},
    ),
}


def list_networks() -> list[str]:
    """Return the names that `build_network` takes."""
    return list(CATALOGUE)


def network_arguments(name: str) -> tuple[str, ...]:
    """Return the keyword arguments that `build_network` takes for this network, besides `num_classes`."""
    network_class, fixed = _find_row(name)
    parameters = inspect.signature(network_class).parameters
    return tuple(parameter for parameter in parameters if parameter not in fixed and parameter != "num_classes")


def build_network(name: str, num_classes: int = 1000, **arguments: Any) -> StagedNetwork:
    """Build the network of this name, with random weights.

    `arguments` are those of the network's class (`ResNet`, `VGG`) that the row leaves open: see `network_arguments`.
    """
    network_class, fixed = _find_row(name)
    accepted = network_arguments(name)
    for argument in arguments:
        if argument not in accepted:
            raise InputError(
                f"{name} takes no argument {argument!r}{_nearest(argument, accepted)}; it takes num_classes, "
                f"{', '.join(accepted)}"
            )
    return network_class(num_classes=num_classes, **fixed, **arguments)


def _find_row(name: str) -> tuple[type[StagedNetwork], dict[str, Any]]:
    if name not in CATALOGUE:
        raise InputError(f"no network is named {name!r}{_nearest(name, CATALOGUE)}; list_networks() gives all names")
    return CATALOGUE[name]


def _nearest(word: str, known) -> str:
    """Return a question that offers the known word nearest to `word`, or nothing where none is near."""
    word = str(word).lower()
    longer = [name for name in known if len(word) > 4 and word in name]  # resnet110 for cifar_resnet110
    matches = longer or get_close_matches(word, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
