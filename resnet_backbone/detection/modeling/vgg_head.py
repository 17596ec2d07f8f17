"""VGG's fc6 and fc7 on each region, as a Detectron2 box head: the classifier's layers after the shared features."""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from torch import Tensor, nn

from resnet_backbone.detection.modeling.backbone import build_part
from resnet_backbone.detection.weights import fill
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.network_config import network_name


@ROI_BOX_HEAD_REGISTRY.register()
class VGGBoxHead(nn.Module):
    """VGG's fc6 and fc7 with ReLU and dropout on RoI features (Fast R-CNN, arXiv 1504.08083, section 2.2).

    Args:
        fc6: layer applied to the flattened RoI features.
        fc7: layer applied to fc6's outputs.
        dropout: dropout probability after each layer in training.
    """

    @configurable
    def __init__(self, *, fc6: nn.Linear, fc7: nn.Linear, dropout: float):
        super().__init__()
        self.fc6 = fc6
        self.fc7 = fc7
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        network = build_part(cfg, stages=("fc6", "fc7"))
        fc6, _, dropout, fc7, *_ = network.classifier
        found = input_shape.channels * input_shape.height * input_shape.width
        if found != fc6.in_features:
            raise ConfigError(
                f"VGGBoxHead gets RoI features of {input_shape.channels}×{input_shape.height}×{input_shape.width}, but "
                f"fc6 of {network_name(cfg)} takes {fc6.in_features} values ({fc6.in_features // 49}×7×7). Set "
                "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION to 7 and MODEL.ROI_HEADS.IN_FEATURES to ('conv5',)."
            )
        fill(network, cfg, part="roi_heads.box_head")
        return {"fc6": fc6, "fc7": fc7, "dropout": dropout.p}

    def forward(self, features: Tensor) -> Tensor:
        """Turn RoI features `(R, C, 7, 7)` into `(R, fc7 outputs)`."""
        x = self.dropout(self.fc6(features.flatten(1)).relu())
        return self.dropout(self.fc7(x).relu())

    @property
    def output_shape(self) -> ShapeSpec:
        """Return the number of outputs of fc7."""
        return ShapeSpec(channels=self.fc7.out_features)
