"""The catalogue's networks as Detectron2 backbones."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from resnet_backbone.detection.weights import fill
from resnet_backbone.engine.config import ConfigError, as_config_error, shown
from resnet_backbone.engine.network_config import configured_network
from resnet_backbone.networks import build_network


class NetworkBackbone(Backbone):
    """A network from the catalogue, cut after its last output feature, with Detectron2's backbone interface.

    Args:
        network: a network built with the stages up to the last of `out_features`.
        out_features: names of the features to return, e.g. ("res4",) or ("conv5",).
        freeze_at: number of stages to freeze, starting with the stem (Detectron2's MODEL.BACKBONE.FREEZE_AT).
    """

    def __init__(self, network: nn.Module, *, out_features: Sequence[str], freeze_at: int = 0):
        super().__init__()
        # As in Detectron2, a number beyond the last stage freezes all stages.
        self.network = network.freeze(min(max(freeze_at, 0), len(network.stage_names)))
        self._out_features = list(out_features)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features by name, `(N, C, H / stride, W / stride)` each, for normalized images `(N, 3, H, W)`."""
        return self.network.forward_features(images, self._out_features)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and stride of each output feature."""
        info = self.network.feature_info
        return {name: ShapeSpec(channels=info[name].channels, stride=info[name].stride) for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_network_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NetworkBackbone:
    """Build the configured network up to the last of MODEL.RESNETS.OUT_FEATURES, initialized from MODEL.WEIGHTS."""
    out_features = cfg.MODEL.RESNETS.OUT_FEATURES
    network = build_part(cfg, out_features=out_features)
    backbone = NetworkBackbone(network, out_features=out_features, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    fill(backbone.network, cfg, part="backbone")  # after freezing, which fixes the statistics of more norms
    return backbone


@BACKBONE_REGISTRY.register()
def build_network_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the network with a feature pyramid and a max-pooled last level, as in Detectron2's Faster R-CNN FPN."""
    return _pyramid(cfg, build_network_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_network_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the network with a feature pyramid and convolutional levels 6 and 7, as in Detectron2's RetinaNet."""
    bottom_up = build_network_backbone(cfg, input_shape)
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    top = LastLevelP6P7(bottom_up.output_shape()[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return _pyramid(cfg, bottom_up, top)


def build_part(
    cfg: CfgNode, *, out_features: Sequence[str] | None = None, stages: Sequence[str] | None = None
) -> nn.Module:
    """Build a run of stages of the configured network: those up to the last of `out_features`, or `stages`.

    Raises:
        ConfigError: the network is unknown, or lacks what MODEL.RESNETS asks for, or a requested feature or stage.
    """
    with as_config_error("MODEL.NETWORK"):
        name, arguments = configured_network(cfg)
        with torch.device("meta"):
            whole = build_network(name, **arguments)
    if stages is None:
        if unknown := [feature for feature in out_features if feature not in whole.feature_info]:
            raise ConfigError(
                f"MODEL.RESNETS.OUT_FEATURES has {shown(', '.join(unknown))}, but {name} has the features "
                f"{', '.join(whole.feature_info)}."
            )
        stages = whole.stages_up_to(out_features)
    elif unknown := [stage for stage in stages if stage not in whole.stage_names]:
        raise ConfigError(
            f"the RoI heads of this configuration need {', '.join(unknown)} of the network, but {name} has the stages "
            f"{', '.join(whole.stage_names)}. Take MODEL.ROI_HEADS.NAME NetworkRes5ROIHeads for a ResNet, and "
            "StandardROIHeads with MODEL.ROI_BOX_HEAD.NAME VGGBoxHead for a VGG."
        )
    return build_network(name, stages=stages, **arguments)


def _pyramid(cfg: CfgNode, bottom_up: NetworkBackbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
