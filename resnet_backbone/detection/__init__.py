"""The networks in Detectron2. Importing this module registers backbones and heads by name.

Your own script needs two lines: import `add_network_config` from here, and call it on the config before merging.
"""

from resnet_backbone import engine  # isort: skip  (first: it says how to install a missing Detectron2)
from resnet_backbone.detection.config import add_network_config, get_config
from resnet_backbone.detection.data.datasets import register as register_dataset
from resnet_backbone.detection.inference.detector import Detector, load_detector
from resnet_backbone.detection.modeling import (
    NetworkBackbone,
    NetworkRes5ROIHeads,
    VGGBoxHead,
    accelerate,
    build_network_backbone,
    build_network_fpn_backbone,
    build_network_retinanet_fpn_backbone,
    pretrained_backbone,
    pretrained_input,
    pretrained_res5,
)
from resnet_backbone.detection.task import run
from resnet_backbone.engine.config import get_config_file

__all__ = [
    "Detector",
    "NetworkBackbone",
    "NetworkRes5ROIHeads",
    "VGGBoxHead",
    "accelerate",
    "add_network_config",
    "build_network_backbone",
    "build_network_fpn_backbone",
    "build_network_retinanet_fpn_backbone",
    "get_config",
    "get_config_file",
    "load_detector",
    "pretrained_backbone",
    "pretrained_input",
    "pretrained_res5",
    "register_dataset",
    "run",
]
