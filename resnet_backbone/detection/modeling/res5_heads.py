"""ResNet's conv5_x on each region, as in Detectron2's C4 heads: the classifier's layers after the shared features."""

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from resnet_backbone.detection.modeling.backbone import build_part
from resnet_backbone.detection.weights import fill


@ROI_HEADS_REGISTRY.register()
class NetworkRes5ROIHeads(Res5ROIHeads):
    """Detectron2's C4 heads with conv5_x of the same network as the backbone (ResNet paper, appendix A).

    Detectron2's `Res5ROIHeads` builds its own conv5_x from MODEL.RESNETS. This class uses the network's last stage, of
    the same name, width, stride placement and norm, and loads its weights from the same file.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        network = build_part(cfg, stages=("res5",))
        fill(network, cfg, part="roi_heads.res5")
        return network.layer4, network.feature_info["res5"].channels
