"""ResNet's conv5_x on each region, as in Detectron2's C4 heads: the classifier's layers after the shared features."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, FastRCNNOutputLayers
from detectron2.modeling.roi_heads import Res5ROIHeads, select_foreground_proposals
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from resnet_backbone.detection.modeling.backbone import build_part
from resnet_backbone.detection.modeling.global_context import whole_images, with_context
from resnet_backbone.detection.weights import fill


@ROI_HEADS_REGISTRY.register()
class NetworkRes5ROIHeads(Res5ROIHeads):
    """Detectron2's C4 heads with conv5_x of the same network as the backbone (ResNet paper, appendix A).

    Detectron2's `Res5ROIHeads` builds its own conv5_x from MODEL.RESNETS. This class uses the network's last stage, of
    the same name, width, stride placement and norm, and loads its weights from the same file.

    With MODEL.ROI_HEADS.GLOBAL_CONTEXT, classes and boxes are predicted from a region's feature and the whole image's,
    which goes through the same pooling and conv5_x (appendix B). Masks need no context.
    """

    @configurable
    def __init__(self, *, global_context: bool = False, **of_detectron2: Any):
        super().__init__(**of_detectron2)
        self.global_context = global_context

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        if cfg.MODEL.ROI_HEADS.GLOBAL_CONTEXT:
            channels = arguments["box_predictor"].cls_score.in_features
            arguments["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=2 * channels, height=1, width=1))
            arguments["global_context"] = True
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        network = build_part(cfg, stages=("res5",))
        fill(network, cfg, part="roi_heads.res5")
        return network.layer4, network.feature_info["res5"].channels

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return detections, none in training, and losses, none in inference; see Detectron2's."""
        if not self.global_context:
            return super().forward(images, features, proposals, targets)
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        maps = [features[name] for name in self.in_features]
        regions = self._shared_roi_transform(maps, [each.proposal_boxes for each in proposals])
        whole = self._shared_roi_transform(maps, whole_images(proposals))
        predictions = self.box_predictor(with_context(regions.mean(dim=(2, 3)), whole.mean(dim=(2, 3)), proposals))
        if not self.training:
            found, _ = self.box_predictor.inference(predictions, proposals)
            return self.forward_with_given_boxes(features, found), {}
        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            foreground, selected = select_foreground_proposals(proposals, self.num_classes)
            losses |= self.mask_head(regions[torch.cat(selected)], foreground)
        return [], losses
