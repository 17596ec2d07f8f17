"""Detectron2's region proposal network, with less work after its head, and without waiting for a GPU."""

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.detection.modeling.fixed_size import FixedSize, box_losses, is_time_to_log
from resnet_backbone.ops import nms, sample


class FastRPN(FixedSize, RPN):
    """Detectron2's RPN, but only the best anchors are decoded, and suppression stops at the proposals wanted.

    With `fixed_size`, a training step asks the device for no value. Each image then has the same number of proposals:
    those whose field `valid` is False stand for the ones that are missing.
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return each image's proposals and, in training, the losses."""
        proposals, losses = super().forward(images, features, gt_instances)
        if losses and self.is_fixed(losses["loss_rpn_loc"]):
            # In place of an exception: whoever looks at the loss learns that a proposal is infinite or NaN.
            finite = torch.stack([p.finite.all() for p in proposals]).all()
            losses["loss_rpn_loc"] = losses["loss_rpn_loc"].masked_fill(~finite, torch.nan)
        return proposals, losses

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Return the proposals of each image, with their scores, the best first.

        Args:
            anchors: `(A, 4)` for each level.
            pred_objectness_logits: `(N, A)` for each level.
            pred_anchor_deltas: `(N, A, 4)` for each level.
            image_sizes: height and width of each image in pixels.

        Raises:
            FloatingPointError: in training, a proposal is infinite or NaN.
        """
        if torch.jit.is_tracing():
            return super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        scores, boxes, levels = [], [], []
        for level, (anchor, logits, deltas) in enumerate(
            zip(anchors, pred_objectness_logits, pred_anchor_deltas, strict=True)
        ):
            # Sorting all, as Detectron2 does, decides ties its way.
            logits, best = (part[:, : self.pre_nms_topk[self.training]] for part in logits.sort(dim=1, descending=True))
            chosen = deltas.gather(1, best[:, :, None].expand(-1, -1, 4))
            decoded = self.box2box_transform.apply_deltas(chosen.flatten(0, 1), anchor.tensor[best].flatten(0, 1))
            scores.append(logits)
            boxes.append(decoded.view(chosen.shape))
            levels.append(torch.full_like(best, level))
        scores, boxes, levels = (torch.cat(parts, dim=1) for parts in (scores, boxes, levels))
        finite = boxes.isfinite().all(dim=2) & scores.isfinite()
        fixed = self.is_fixed(scores)
        if self.training and not fixed and not finite.all():
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        boxes = torch.stack([_clip(box, size) for box, size in zip(boxes, image_sizes, strict=True)])
        usable = finite & ((boxes[:, :, 2:] - boxes[:, :, :2]) > self.min_box_size).all(dim=2)
        scores = scores.masked_fill(~usable, -torch.inf)
        top = min(self.post_nms_topk[self.training], scores.shape[1])
        indices, valid = nms(boxes, scores, levels, self.nms_thresh, top)
        proposals = []
        for image, size in enumerate(image_sizes):
            chosen = indices[image] if fixed else indices[image][valid[image]]
            found = Instances(size, proposal_boxes=Boxes(boxes[image][chosen]), objectness_logits=scores[image][chosen])
            if fixed:
                found.valid = valid[image]
                found.finite = finite[image].all().expand(top)
            proposals.append(found)
        return proposals

    def _subsample_labels(self, label: Tensor) -> Tensor:
        if not self.is_fixed(label):
            return super()._subsample_labels(label)
        indices, drawn = sample(label == 1, label == 0, self.batch_size_per_image, self.positive_fraction)
        kept = label[indices].masked_fill(~drawn, -1)
        # An index that was not drawn may be one that was, too.
        return torch.full_like(label, -1).scatter_reduce(0, indices, kept, "amax")

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return Detectron2's two losses."""
        labels = torch.stack(gt_labels)
        if not self.is_fixed(labels):
            return super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        positive = labels == 1
        if is_time_to_log():
            storage = get_event_storage()
            storage.put_scalar("rpn/num_pos_anchors", positive.sum().item() / len(labels))
            storage.put_scalar("rpn/num_neg_anchors", (labels == 0).sum().item() / len(labels))
        logits, deltas = torch.cat(pred_objectness_logits, dim=1), torch.cat(pred_anchor_deltas, dim=1)
        errors = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
        boxes = Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)
        regression = box_losses(
            deltas, boxes, torch.stack(gt_boxes), positive, self.box2box_transform, self.smooth_l1_beta
        )
        number = self.batch_size_per_image * len(labels)
        losses = {
            "loss_rpn_cls": errors.masked_fill(labels < 0, 0).sum() / number,
            "loss_rpn_loc": regression / number,
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Limit corners `(…, 4)` to an image of height and width `size`; Detectron2's `Boxes.clip` waits for the device."""
    height, width = size
    return torch.stack([boxes[..., d].clamp(0, (width, height)[d % 2]) for d in range(4)], dim=-1)
