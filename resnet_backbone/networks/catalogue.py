"""The table of all networks by name, and the one function that builds them."""

import inspect
from difflib import get_close_matches
from typing import Any

from resnet_backbone.errors import InputError
from resnet_backbone.networks.blocks import BasicBlock, Bottleneck
from resnet_backbone.networks.resnet import ResNet
from resnet_backbone.networks.stages import StagedNetwork
from resnet_backbone.networks.vgg import VGG

# A row is a class and the arguments that make it this network; the class's other arguments are the user's.
CATALOGUE: dict[str, tuple[type[StagedNetwork], dict[str, Any]]] = {
    # He et al. 2015, Table 1.
    "resnet18": (ResNet, {"block": BasicBlock, "depths": (2, 2, 2, 2)}),
    "resnet34": (ResNet, {"block": BasicBlock, "depths": (3, 4, 6, 3)}),
    "resnet50": (ResNet, {"block": Bottleneck, "depths": (3, 4, 6, 3)}),
    "resnet101": (ResNet, {"block": Bottleneck, "depths": (3, 4, 23, 3)}),
    "resnet152": (ResNet, {"block": Bottleneck, "depths": (3, 8, 36, 3)}),
    # Simonyan, Zisserman 2014, Table 1, column D.
    "vgg16": (VGG, {"plan": (2, 2, 3, 3, 3), "norm": None}),
    "vgg16_bn": (VGG, {"plan": (2, 2, 3, 3, 3)}),
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
    matches = get_close_matches(str(word).lower(), known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
