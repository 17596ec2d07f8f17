"""The networks in plain torch. The same modules classify in pretraining and extract features in detection."""

from resnet_backbone.networks.catalogue import (
    ARGUMENTS,
    HIDDEN_ARGUMENTS,
    accepted_arguments,
    build_network,
    find_resnet,
    list_networks,
)
from resnet_backbone.networks.norms import FrozenBatchNorm2d
from resnet_backbone.networks.resnet import ResNet
from resnet_backbone.networks.stages import FeatureInfo
from resnet_backbone.networks.vgg import VGG

__all__ = [
    "ARGUMENTS",
    "HIDDEN_ARGUMENTS",
    "VGG",
    "FeatureInfo",
    "FrozenBatchNorm2d",
    "ResNet",
    "accepted_arguments",
    "build_network",
    "find_resnet",
    "list_networks",
]
