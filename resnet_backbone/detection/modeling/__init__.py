"""The networks as Detectron2 backbones and heads, registered by name."""

from resnet_backbone.detection.modeling.backbone import (
    NetworkBackbone,
    build_network_backbone,
    build_network_fpn_backbone,
    build_network_retinanet_fpn_backbone,
)
from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.modeling.pretrained import pretrained_backbone, pretrained_input, pretrained_res5
from resnet_backbone.detection.modeling.res5_heads import NetworkRes5ROIHeads
from resnet_backbone.detection.modeling.vgg_head import VGGBoxHead
