"""Training of RoI heads with samples of a fixed size, so that no step waits to learn how many there are.

A sample that is missing has the class -1 and counts in no loss. Values are replaced by `masked_fill`, since
`torch.where` copies a number to the device, and waits.
"""

import torch
from detectron2.modeling import FastRCNNOutputLayers
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.detection.modeling.torchscript import NotScripted
from resnet_backbone.ops import match, sample

LOG_PERIOD = 20  # iterations between two that log counts, which wait for the device


class FixedSize(NotScripted):
    """Something that has a way of training without waiting.

    Attributes:
        fixed_size: whether to go that way; None on a GPU only. It takes random numbers other than Detectron2's, and
            computes what is missing, too.
    """

    fixed_size: bool | None = False

    def is_fixed(self, tensor: Tensor) -> bool:
        """Return whether to avoid waiting for the device of `tensor` now."""
        return self.training and (tensor.is_cuda if self.fixed_size is None else self.fixed_size)


class FastMatcher(Matcher):
    """Detectron2's matcher, which asks the device for no value."""

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return `ops.match` of overlaps `(G, A)`."""
        return match(
            match_quality_matrix, self.thresholds, self.labels, allow_low_quality=self.allow_low_quality_matches
        )


def is_time_to_log() -> bool:
    """Return whether this iteration is one of those that log counts."""
    return get_event_storage().iter % LOG_PERIOD == 0


def box_losses(
    deltas: Tensor, boxes: Tensor, truth: Tensor, positive: Tensor, transform: Box2BoxTransform, beta: float
) -> Tensor:
    """Return the sum of smooth L1 losses (Fast R-CNN, equation 3) of the boxes that are positive.

    Args:
        deltas: predicted, `(…, 4)`.
        boxes, truth: corners, `(…, 4)`; those of boxes that are not positive may be anything.
        positive: `(…)` bool.
        transform: says the weights of the deltas.
        beta: difference at which the loss becomes linear.
    """
    boxes, truth = (_where(positive, corners) for corners in (boxes, truth))
    sizes, true_sizes = boxes[..., 2:] - boxes[..., :2], truth[..., 2:] - truth[..., :2]
    shifts = truth[..., :2] + 0.5 * true_sizes - (boxes[..., :2] + 0.5 * sizes)
    x, y, width, height = transform.weights
    targets = [x * shifts[..., 0] / sizes[..., 0], y * shifts[..., 1] / sizes[..., 1]]
    growth = torch.log(true_sizes / sizes)
    targets += [width * growth[..., 0], height * growth[..., 1]]
    errors = smooth_l1_loss(deltas, torch.stack(targets, dim=-1), beta, reduction="none")
    return errors.masked_fill(~positive[..., None], 0).sum()


def _where(mask: Tensor, boxes: Tensor) -> Tensor:
    """Put boxes of one pixel where the mask is False."""
    unit = torch.zeros_like(boxes)
    unit[..., 2:] = 1
    return torch.where(mask[..., None], boxes, unit)


class FixedSizeSamples(FixedSize):
    """RoI heads that train on the same number of RoIs in each image, of which some may be missing."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Return `batch_size_per_image` RoIs of each image with their classes and ground truth.

        Args:
            proposals: with the fields `proposal_boxes` and `valid`.
            targets: the ground truth.
        """
        if not self.is_fixed(proposals[0].proposal_boxes.tensor):
            return super().label_and_sample_proposals(proposals, targets)
        return [self._sample(*each) for each in zip(proposals, targets, strict=True)]

    def _sample(self, proposals: Instances, targets: Instances) -> Instances:
        boxes, valid = proposals.proposal_boxes.tensor, proposals.valid
        if self.proposal_append_gt:
            boxes = torch.cat([boxes, targets.gt_boxes.tensor])
            valid = torch.cat([valid, valid.new_ones(len(targets))])
        background = self.num_classes
        matched, labels = self.proposal_matcher(pairwise_iou(targets.gt_boxes, Boxes(boxes)))
        if len(targets):
            classes = targets.gt_classes[matched].masked_fill(labels == 0, background).masked_fill(labels == -1, -1)
        else:
            classes = torch.full_like(matched, background)
        classes = classes.masked_fill(~valid, -1)
        indices, drawn = sample(
            (classes >= 0) & (classes < background),
            classes == background,
            self.batch_size_per_image,
            self.positive_fraction,
        )
        sampled = Instances(proposals.image_size)
        sampled.proposal_boxes = Boxes(_where(drawn, boxes[indices]))
        sampled.gt_classes = classes[indices].masked_fill(~drawn, -1)
        if len(targets):
            for name, value in targets.get_fields().items():
                if name.startswith("gt_") and name != "gt_classes":
                    sampled.set(name, value[matched[indices]])
        return sampled


class FixedSizeStandardROIHeads(FixedSizeSamples, StandardROIHeads):
    """Detectron2's heads with a feature pyramid or a network's last features."""


class FixedSizeOutputLayers(FixedSize, FastRCNNOutputLayers):
    """Detectron2's predictor of classes and boxes, whose losses leave out what is missing."""

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """Return Detectron2's two losses."""
        scores, deltas = predictions
        if not self.is_fixed(scores):
            return super().losses(predictions, proposals)
        classes = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        truth = torch.cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        drawn, positive = classes >= 0, (classes >= 0) & (classes < self.num_classes)
        if is_time_to_log():
            storage, images = get_event_storage(), len(proposals)
            storage.put_scalar("roi_head/num_fg_samples", positive.sum().item() / images)
            storage.put_scalar("roi_head/num_bg_samples", (drawn & ~positive).sum().item() / images)
            _log_classification_stats(scores[drawn], classes[drawn])
        if deltas.shape[1] > 4:  # one for each class
            kind = classes.clamp(0, self.num_classes - 1)[:, None, None].expand(-1, 1, 4)
            deltas = deltas.view(len(deltas), -1, 4).gather(1, kind)[:, 0]
        number = drawn.sum().clamp(min=1)
        losses = {
            "loss_cls": F.cross_entropy(scores, classes, ignore_index=-1, reduction="sum") / number,
            "loss_box_reg": box_losses(deltas, boxes, truth, positive, self.box2box_transform, self.smooth_l1_beta)
            / number,
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}
