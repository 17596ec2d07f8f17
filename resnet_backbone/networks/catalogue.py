"""The table of all networks by name, and the function that builds them."""

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from resnet_backbone.errors import InputError
from resnet_backbone.networks.blocks import BasicBlock, Block, Bottleneck, PreActBasicBlock, PreActBottleneck
from resnet_backbone.networks.resnet import CIFAR_STEM, IMAGENET_STEM, ResNet
from resnet_backbone.networks.stages import StagedNetwork
from resnet_backbone.networks.vgg import VGG


class Argument(NamedTuple):
    """A constructor argument that catalogue rows leave to the user.

    Attributes:
        default: the constructors' default.
        decides: "tensors" if the value can be inferred from weights, from a tensor's presence or shape; "computation"
            if it changes what is computed from the same tensors, so weights do not reveal it; "training" if it does
            not affect what trained weights compute.
        key: the configuration key that sets it; None if there is none.
        adjustable: whether a classifier's weights also work with another value: without pool5 they take smaller crops,
            and a detector may dilate res5. A detector's weights only work with the value they were trained with.
    """

    default: Any
    decides: Literal["tensors", "computation", "training"]
    key: str | None = None
    adjustable: bool = False


ARGUMENTS: dict[str, Argument] = {
    "num_classes": Argument(1000, "tensors"),
    "width": Argument(1.0, "tensors", "MODEL.NETWORK.WIDTH"),
    "shortcut": Argument("B", "tensors", "MODEL.NETWORK.SHORTCUT"),
    "stride_in_1x1": Argument(False, "computation", "MODEL.RESNETS.STRIDE_IN_1X1"),
    # Tensors show the norm, except SyncBN versus BN, which compute the same. Detectors freeze it.
    "norm": Argument("BN", "tensors", "MODEL.RESNETS.NORM"),
    "zero_init_last_norm": Argument(False, "training", "MODEL.NETWORK.ZERO_INIT_LAST_NORM"),
    "res5_dilation": Argument(1, "computation", "MODEL.RESNETS.RES5_DILATION", adjustable=True),
    "pool5": Argument(True, "computation", "MODEL.NETWORK.POOL5", adjustable=True),
    "dropout": Argument(0.5, "training"),
    "stages": Argument(None, "tensors"),
}


class Row(NamedTuple):
    """A network in the catalogue.

    Attributes:
        network_class: the class that builds it.
        arguments: the arguments that define this network; the class's other arguments are left to the user.
        image_size: side, in pixels, of the images it was published for.
        num_classes: number of classes in the data set it was published for.
    """

    network_class: type[StagedNetwork]
    arguments: dict[str, Any]
    image_size: int
    num_classes: int


def _imagenet(block: type[Block], depths: Sequence[int], **arguments: Any) -> Row:
    family = {"stem": IMAGENET_STEM, "channels": 64, "groups": 1, "width_per_group": 64}
    return Row(ResNet, {**family, "block": block, "depths": depths, **arguments}, image_size=224, num_classes=1000)


def _cifar(block: type[Block], depths: Sequence[int], **arguments: Any) -> Row:
    family = {"stem": CIFAR_STEM, "channels": 16, "groups": 1, "width_per_group": 64, "res5_dilation": 1}
    return Row(ResNet, {**family, "block": block, "depths": depths, **arguments}, image_size=32, num_classes=10)


def _vgg(plan: Sequence[int], **arguments: Any) -> Row:
    return Row(VGG, {"plan": plan, **arguments}, image_size=224, num_classes=1000)


_PLAIN = {"shortcut": None, "zero_init_last_norm": False}
# Pre-activation projections are bare convolutions, and residual branches end in a convolution, not a norm.
_PREACT = {"shortcut": "B", "zero_init_last_norm": False}

CATALOGUE: dict[str, Row] = {
    # He et al. 2015, Table 1 and Figure 3.
    "resnet18": _imagenet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _imagenet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _imagenet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _imagenet(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _imagenet(Bottleneck, (3, 8, 36, 3)),
    "plain18": _imagenet(BasicBlock, (2, 2, 2, 2), **_PLAIN),
    "plain34": _imagenet(BasicBlock, (3, 4, 6, 3), **_PLAIN),
    # Xie et al. 2016 (arXiv 1611.05431), Table 1; 101-32×8d as released with arXiv 1805.00932.
    "resnext50_32x4d": _imagenet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": _imagenet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    # Zagoruyko, Komodakis 2016 (arXiv 1605.07146), Table 8: bottlenecks with twice the inner channels.
    "wide_resnet50_2": _imagenet(Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": _imagenet(Bottleneck, (3, 4, 23, 3), width_per_group=128),
    # He et al. 2016 (arXiv 1603.05027).
    "preact_resnet50": _imagenet(PreActBottleneck, (3, 4, 6, 3), **_PREACT),
    "preact_resnet101": _imagenet(PreActBottleneck, (3, 4, 23, 3), **_PREACT),
    "preact_resnet152": _imagenet(PreActBottleneck, (3, 8, 36, 3), **_PREACT),
    # Simonyan, Zisserman 2014, Table 1, columns D and E.
    "vgg16": _vgg((2, 2, 3, 3, 3), norm=None),
    "vgg16_bn": _vgg((2, 2, 3, 3, 3)),
    "vgg19": _vgg((2, 2, 4, 4, 4), norm=None),
    "vgg19_bn": _vgg((2, 2, 4, 4, 4)),
    # He et al. 2015, section 4.2: 6n + 2 layers, option A.
    **{f"cifar_resnet{6 * n + 2}": _cifar(BasicBlock, (n, n, n), shortcut="A") for n in (3, 5, 7, 9, 18, 200)},
    **{f"cifar_plain{6 * n + 2}": _cifar(BasicBlock, (n, n, n), **_PLAIN) for n in (3, 5, 7, 9, 18)},
    # A common tutorial network: ResNet-18's depths, a quarter of its channels, and a 3×3 stem with padding 3.
    "cifar_resnet18": _cifar(BasicBlock, (2, 2, 2, 2), stem=CIFAR_STEM._replace(padding=3)),
    # He et al. 2016 (arXiv 1603.05027), Table 2: 110 layers with basic blocks, 164 with bottlenecks.
    "cifar_preact_resnet110": _cifar(PreActBasicBlock, (18, 18, 18), **_PREACT),
    "cifar_preact_resnet164": _cifar(PreActBottleneck, (18, 18, 18), **_PREACT),
    # Zagoruyko, Komodakis 2016, Table 5: ten times the channels, without dropout.
    "cifar_wide_resnet28_10": _cifar(PreActBasicBlock, (4, 4, 4), channels=160, **_PREACT),
}


# Defaults of the arguments that change the computation but leave no trace in the tensors.
HIDDEN_ARGUMENTS = {name: argument.default for name, argument in ARGUMENTS.items() if argument.decides == "computation"}


def list_networks() -> list[str]:
    """Return the names that `build_network` accepts."""
    return list(CATALOGUE)


def find_row(name: str) -> Row:
    """Return the row named `name`; raise an InputError that suggests the closest match if there is none."""
    if name not in CATALOGUE:
        raise InputError(
            f"no network is named {name[:80]!r}{_nearest(name, CATALOGUE)}; list_networks() gives all names"
        )
    return CATALOGUE[name]


def find_resnet(depth: int, *, groups: int = 1, width_per_group: int = 64) -> str | None:
    """Return the name of the ImageNet ResNet or ResNeXt with this many layers, groups, and channels per group of the
    first stage's 3×3 convolutions; None if the catalogue has none."""
    layers = {BasicBlock: 2, Bottleneck: 3}
    for name, row in CATALOGUE.items():
        given = row.arguments
        if given.get("block") not in layers or given["stem"] != IMAGENET_STEM or "shortcut" in given:
            continue
        own_depth = 2 + layers[given["block"]] * sum(given["depths"])
        if (own_depth, given["groups"], given["width_per_group"]) == (depth, groups, width_per_group):
            return name
    return None


def accepted_arguments(name: str) -> tuple[str, ...]:
    """Return the keyword arguments that `build_network` accepts for this network, besides `num_classes`."""
    row = find_row(name)
    parameters = inspect.signature(row.network_class).parameters
    return tuple(parameter for parameter in parameters if parameter not in (*row.arguments, "num_classes"))


def build_network(name: str, num_classes: int = 1000, **arguments: Any) -> StagedNetwork:
    """Build the network named `name` with random weights.

    `arguments` are the arguments of its class (`ResNet`, `VGG`) that the row leaves open; see `accepted_arguments`.
    """
    row, accepted = find_row(name), accepted_arguments(name)
    for argument in arguments:
        if argument not in accepted:
            raise InputError(
                f"{name} takes no argument {argument!r}{_nearest(argument, accepted)}; it takes num_classes, "
                f"{', '.join(accepted)}"
            )
    return row.network_class(num_classes=num_classes, **row.arguments, **arguments)


def _nearest(word: str, known) -> str:
    """Return a "did you mean" suffix with the known word closest to `word`, or "" if none is close."""
    word = str(word).lower()
    longer = [name for name in known if len(word) > 4 and word in name]  # resnet110 for cifar_resnet110
    matches = longer or get_close_matches(word, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
