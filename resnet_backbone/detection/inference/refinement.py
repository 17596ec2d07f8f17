"""Iterative box refinement and box voting (ResNet paper, appendix B) around a two-stage detector."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from resnet_backbone.detection.inference.voting import find_candidates, vote


def as_tested(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Return a detector with the options of TEST that wrap it; itself if none is on.

    `combinations.check_refinement` says which detectors can have them.
    """
    refinement, voting = cfg.TEST.BOX_REFINEMENT, cfg.TEST.BOX_VOTING
    return RefinedRCNN(model, refinement=refinement, voting=voting) if refinement or voting else model


class RefinedRCNN(nn.Module):
    """A detector with box refinement and box voting, for inference; it takes and returns what `GeneralizedRCNN` does.

    Refinement: the heads run once more, on each proposal's regressed box, and their new predictions (boxes and scores
    of all classes) are united with the first ones. Non-maximum suppression runs on the union. Voting: each box that it
    keeps becomes the average of the united boxes around it (`voting.vote`); its score and class stay. Masks and
    keypoints are predicted in the final boxes. With neither, detections are the model's own.

    Thresholds are the model's: predictions with a score of at most SCORE_THRESH_TEST neither become detections nor
    vote, NMS_THRESH_TEST (0.3 in the paper) suppresses, and DETECTIONS_PER_IMAGE cuts off what is left. As in the
    paper, all proposals are refined, even those that score highest as background.
    """

    def __init__(self, model: GeneralizedRCNN, *, refinement: bool, voting: bool):
        super().__init__()
        self.model = model
        self.refinement = refinement
        self.voting = voting
        self.training = model.training  # to which an evaluation returns

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return `{"instances": …}` of each image, in the pixels of its `height` and `width`."""
        model, heads = self.model, self.model.roi_heads
        images = model.preprocess_image(batched_inputs)
        features = model.backbone(images.tensor)
        if model.proposal_generator is None:
            proposals = [record["proposals"].to(model.device) for record in batched_inputs]
        else:
            proposals, _ = model.proposal_generator(images, features, None)
        predictions = predict(heads, images, features, proposals)
        if self.refinement:
            sizes = [each.image_size for each in proposals]
            regressed = [_proposals(*each, size) for each, size in zip(predictions, sizes, strict=True)]
            again = predict(heads, images, features, regressed)
            predictions = [
                (torch.cat([boxes, more_boxes]), torch.cat([scores, more_scores]))
                for (boxes, scores), (more_boxes, more_scores) in zip(predictions, again, strict=True)
            ]
        found = [self._detections(*each, one.image_size) for each, one in zip(predictions, proposals, strict=True)]
        found = heads.forward_with_given_boxes(features, found)
        return [
            {"instances": detector_postprocess(each, record.get("height", size[0]), record.get("width", size[1]))}
            for each, record, size in zip(found, batched_inputs, images.image_sizes, strict=True)
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


def best_boxes(boxes: Tensor, scores: Tensor) -> Tensor:
    """Return the regressed box of each region's best class, `(R, 4)`, even of a region that is rather background.

    Args:
        boxes: one for each class, `(R, 4K)`, or one for all classes, `(R, 4)`.
        scores: one for each class and one for the background, `(R, K + 1)`.
    """
    by_class = boxes.unflatten(1, (-1, 4))
    if by_class.shape[1] == 1:
        return by_class[:, 0]
    best = scores[:, :-1].argmax(dim=1)
    return by_class[torch.arange(len(best), device=best.device), best]


def predict(
    heads: ROIHeads, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]
) -> list[tuple[Tensor, Tensor]]:
    """Return the boxes, `(R, 4K)` or `(R, 4)`, and scores, `(R, K + 1)`, of each image's proposals, none suppressed.

    The heads run as they are, up to their predictor's output, so that their way of pooling is their own business.
    """

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> NoReturn:
        raise _Predicted(output)

    predictor = heads.box_predictor
    hook = predictor.register_forward_hook(stop)
    try:
        heads(images, features, proposals, None)
    except _Predicted as predicted:
        output = predicted.args[0]
    finally:
        hook.remove()
    return list(
        zip(predictor.predict_boxes(output, proposals), predictor.predict_probs(output, proposals), strict=True)
    )


class _Predicted(Exception):
    """The predictor has returned what this holds."""


def _proposals(boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Instances:
    """Return regressed boxes as proposals, clipped to the image, without those that are not finite or have no area."""
    regressed = best_boxes(boxes, scores)
    clipped = Boxes(regressed[regressed.isfinite().all(dim=1) & scores.isfinite().all(dim=1)])
    clipped.clip(image_size)
    return Instances(image_size, proposal_boxes=clipped[clipped.nonempty()])
