"""Detectron2's region proposal network, with less work after its head."""

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from resnet_backbone.ops import batched_nms


class FastRPN(RPN):
    """Detectron2's RPN, but only the best anchors are decoded, and suppression stops at the proposals wanted."""

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
            levels.append(torch.full_like(best[0], level))
        level = torch.cat(levels)
        images = zip(torch.cat(boxes, dim=1), torch.cat(scores, dim=1), image_sizes, strict=True)
        return [self._best_of_image(box, score, level, size) for box, score, size in images]

    def _best_of_image(self, boxes: Tensor, scores: Tensor, levels: Tensor, size: tuple[int, int]) -> Instances:
        usable = boxes.isfinite().all(dim=1) & scores.isfinite()
        if not usable.all():
            if self.training:
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
            boxes, scores, levels = boxes[usable], scores[usable], levels[usable]
        boxes = Boxes(boxes)
        boxes.clip(size)
        usable = boxes.nonempty(self.min_box_size)
        boxes, scores, levels = boxes[usable], scores[usable], levels[usable]
        keep = batched_nms(boxes.tensor, scores, levels, self.nms_thresh, top=self.post_nms_topk[self.training])
        return Instances(size, proposal_boxes=boxes[keep], objectness_logits=scores[keep])
