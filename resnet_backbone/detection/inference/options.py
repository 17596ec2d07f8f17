"""The ResNet paper's test-time options (appendix B, Table 9) around a two-stage detector."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from resnet_backbone.detection.inference.ensemble import Member, average, unite
from resnet_backbone.detection.inference.multiscale import Pyramid
from resnet_backbone.detection.inference.refinement import regressed_regions
from resnet_backbone.detection.inference.voting import find_candidates, vote


def as_tested(cfg: CfgNode, model: nn.Module, members: Sequence[Member] = ()) -> nn.Module:
    """Return a detector with the options of TEST that wrap it; itself if none is on.

    `combinations.check_test_options` says which detectors can have them.

    Args:
        members: of TEST.ENSEMBLE, from `detector.load_members`.
    """
    test = cfg.TEST
    if not (test.BOX_REFINEMENT or test.BOX_VOTING or test.FLIP or test.MULTI_SCALE.MIN_SIZES or members):
        return model
    return RCNNWithOptions(
        model,
        refinement=test.BOX_REFINEMENT,
        voting=test.BOX_VOTING,
        flip=test.FLIP,
        scales=[side / cfg.INPUT.MIN_SIZE_TEST for side in test.MULTI_SCALE.MIN_SIZES],
        region_size=test.MULTI_SCALE.REGION_SIZE,
        members=members,
    )


class RCNNWithOptions(nn.Module):
    """A detector with test-time options, for inference; it takes and returns what `GeneralizedRCNN` does.

    - Multi-scale testing: regions take their features from two scales of the image (`multiscale.Pyramid`). They are
      proposed on the image as given.
    - Flip: the mirror image is seen by a detector of its own, as in an ensemble.
    - Ensemble: proposals are united, and each region's scores and boxes are averaged.
    - Box refinement: each region is predicted once more, from its regressed box, and the new predictions (boxes and
      scores of all classes) are united with the first ones. Non-maximum suppression runs on the union. As in the
      paper, all regions are refined, even those that score highest as background.
    - Box voting: each box that is kept becomes the average of those around it (`voting.vote`); its score and class
      stay.

    Masks and keypoints are predicted by the first detector in the final boxes. With no option, detections are the
    model's own. Thresholds are the model's: predictions with a score of at most SCORE_THRESH_TEST neither become
    detections nor vote, NMS_THRESH_TEST (0.3 in the paper) suppresses, and DETECTIONS_PER_IMAGE cuts off what is left.

    Args:
        scales: at least two, ascending; 1 is the image as given. Empty: no multi-scale testing.
        region_size: side of a region, in pixels, between whose scales it is pooled (`multiscale.lower_scales`).
        members: detectors besides `model`.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        refinement: bool = False,
        voting: bool = False,
        flip: bool = False,
        scales: Sequence[float] = (),
        region_size: float = 224,
        members: Sequence[Member] = (),
    ):
        super().__init__()
        self.model = model
        self.others = nn.ModuleList(member.model for member in members)  # so that they change modes with it
        self.refinement = refinement
        self.voting = voting
        self.flip = flip
        self.scales = tuple(scales)
        self.region_size = region_size
        self.members = (Member(model), *members)
        self.training = model.training  # to which an evaluation returns

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return `{"instances": …}` of each image, in the pixels of its `height` and `width`."""
        views = [
            Pyramid(
                model,
                batched_inputs,
                scales=self.scales or (scale,),
                proposal_scale=scale,
                region_size=self.region_size,
                mirrored=mirrored,
                swapped=swapped,
            )
            for mirrored in ((False, True) if self.flip else (False,))
            for model, scale, swapped in self.members
        ]
        first, sizes = views[0], views[0].sizes
        if self.model.proposal_generator is None:
            device = self.model.device
            regions = [record["proposals"].proposal_boxes.tensor.to(device) for record in batched_inputs]
        else:
            regions = unite([view.propose() for view in views])
        predictions = average([view.predict(regions) for view in views])
        if self.refinement:
            regions = [regressed_regions(*each, size) for each, size in zip(predictions, sizes, strict=True)]
            again = average([view.predict(regions) for view in views])
            predictions = [tuple(map(torch.cat, zip(*both))) for both in zip(predictions, again, strict=True)]
        found = [self._detections(*each, size) for each, size in zip(predictions, sizes, strict=True)]
        _, features = first.level(1.0)
        found = self.model.roi_heads.forward_with_given_boxes(features, found)
        return [
            {"instances": detector_postprocess(each, record.get("height", size[0]), record.get("width", size[1]))}
            for each, record, size in zip(found, batched_inputs, sizes, strict=True)
        ]

    def _detections(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Instances:
        predictor = self.model.roi_heads.box_predictor
        candidates = find_candidates(boxes, scores, image_size, predictor.test_score_thresh)
        kept = batched_nms(*candidates, predictor.test_nms_thresh)
        if predictor.test_topk_per_image >= 0:
            kept = kept[: predictor.test_topk_per_image]
        return Instances(
            image_size,
            pred_boxes=Boxes(vote(kept, candidates) if self.voting else candidates.boxes[kept]),
            scores=candidates.scores[kept],
            pred_classes=candidates.classes[kept],
        )
