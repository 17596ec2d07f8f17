"""Regions of a batch of images, proposed and classified by one detector that sees the images at one or more scales."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

Predictions = tuple[Tensor, Tensor]  # of an image's R regions: boxes (R, 4K) or (R, 4), and scores (R, K + 1)


class Pyramid:
    """A batch of images as one detector sees it: at several scales, perhaps mirrored.

    Regions and boxes, `(R, 4)`, are in the pixels of the images as given, whatever the detector sees. Feature maps are
    computed when they are needed first.

    Several scales (ResNet paper, appendix B): each region takes its features, up to the predictor's input, from two
    adjacent scales, and the larger one of each channel (maxout). `lower_scales` says which scales.

    Args:
        records: Detectron2's, with `image` `(3, H, W)`.
        scales: of the images whose features regions take, ascending; 1 is the image as given.
        proposal_scale: of the images on which regions are proposed.
        region_size: see `lower_scales`.
        mirrored: whether the detector sees the images' mirror images.
        swapped: whether it takes the channels in the opposite order.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        records: Sequence[dict[str, Any]],
        *,
        scales: Sequence[float] = (1.0,),
        proposal_scale: float = 1.0,
        region_size: float = 224,
        mirrored: bool = False,
        swapped: bool = False,
    ):
        self.sizes = [tuple(record["image"].shape[-2:]) for record in records]
        self._model = model
        self._records = records
        self._scales = tuple(scales)
        self._proposal_scale = proposal_scale
        self._region_size = region_size
        self._mirrored = mirrored
        self._swapped = swapped
        self._levels: dict[float, tuple[ImageList, dict[str, Tensor]]] = {}

    def propose(self) -> list[Tensor]:
        """Return the regions that the detector proposes in each image."""
        images, features = self.level(self._proposal_scale)
        proposals, _ = self._model.proposal_generator(images, features, None)
        return [
            self._mirror(each.proposal_boxes.tensor / _factors(each.image_size, size, each.proposal_boxes.tensor), size)
            for each, size in zip(proposals, self.sizes, strict=True)
        ]

    def predict(self, regions: Sequence[Tensor]) -> list[Predictions]:
        """Return boxes and scores of each image's regions, none suppressed."""
        regions = [self._mirror(boxes, size) for boxes, size in zip(regions, self.sizes, strict=True)]
        predictor = self._model.roi_heads.box_predictor
        output = predictor(self._features(regions))
        proposals = [_instances(*each) for each in zip(self.sizes, regions, strict=True)]
        boxes, scores = predictor.predict_boxes(output, proposals), predictor.predict_probs(output, proposals)
        boxes = [
            self._mirror(each.unflatten(1, (-1, 4)), size).flatten(1)
            for each, size in zip(boxes, self.sizes, strict=True)
        ]
        return list(zip(boxes, scores, strict=True))

    def level(self, scale: float) -> tuple[ImageList, dict[str, Tensor]]:
        """Return the images at a scale, as a normalized batch, and their feature maps."""
        if scale not in self._levels:
            records = [{**record, "image": self._seen(record["image"], scale)} for record in self._records]
            images = self._model.preprocess_image(records)
            self._levels[scale] = images, self._model.backbone(images.tensor)
        return self._levels[scale]

    def _seen(self, image: Tensor, scale: float) -> Tensor:
        """Return an image as the detector takes it at a scale; resized as Detectron2's data mapper resizes it."""
        if self._mirrored:
            image = image.flip(2)
        if self._swapped:
            image = image.flip(0)
        if scale == 1:
            return image
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = image.to(self._model.device).float()[None]
        return F.interpolate(image, size, mode="bilinear", antialias=True)[0].round()

    def _mirror(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Return boxes `(…, 4)` from a mirror image's pixels in the image's, or the other way round."""
        if not self._mirrored:
            return boxes
        left, top, right, bottom = boxes.unbind(-1)
        return torch.stack([size[1] - right, top, size[1] - left, bottom], dim=-1)

    def _features(self, regions: Sequence[Tensor]) -> Tensor:
        """Return what the predictor is given for the regions of all images."""
        if len(self._scales) == 1:
            return self._features_at(self._scales[0], regions)
        lower = [lower_scales(boxes, self._scales, self._region_size) for boxes in regions]
        merged = None
        for number, scale in enumerate(self._scales):
            mine = [(each == number) | (each == number - 1) for each in lower]
            places = torch.cat(mine)
            if not places.any():
                continue
            found = self._features_at(scale, [boxes[those] for boxes, those in zip(regions, mine, strict=True)])
            if merged is None:
                merged = found.new_full((len(places), *found.shape[1:]), -torch.inf)
            merged[places] = torch.maximum(merged[places], found)
        return self._features_at(self._scales[0], regions) if merged is None else merged

    def _features_at(self, scale: float, regions: Sequence[Tensor]) -> Tensor:
        images, features = self.level(scale)
        proposals = [
            _instances(seen, boxes * _factors(seen, size, boxes))
            for boxes, size, seen in zip(regions, self.sizes, images.image_sizes, strict=True)
        ]
        return pool(self._model.roi_heads, images, features, proposals)


def lower_scales(regions: Tensor, scales: Sequence[float], region_size: float) -> Tensor:
    """Return the index of the smaller one of the two adjacent scales that each region takes, `(R,)`.

    They are those between which the region's side, the root of its area, passes `region_size` pixels, at best the size
    of the objects on which the network was pretrained; for regions that are smaller or larger at all scales, the two
    largest or the two smallest.

    Args:
        regions: `(R, 4)` corners.
        scales: ascending.
    """
    sides = Boxes(regions).area().clamp(min=0).sqrt()
    scaled = sides[:, None] * sides.new_tensor(scales)
    return ((scaled <= region_size).sum(dim=1) - 1).clamp(0, len(scales) - 2)


def pool(heads: ROIHeads, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]) -> Tensor:
    """Return the features that the heads give their predictor, a row for each proposal.

    The heads run as they are, up to their predictor, so that their way of pooling is their own business.
    """

    def stop(_module: nn.Module, inputs: tuple[Tensor]) -> NoReturn:
        raise _Pooled(inputs[0])

    hook = heads.box_predictor.register_forward_pre_hook(stop)
    try:
        heads(images, features, proposals, None)
    except _Pooled as pooled:
        return pooled.args[0]
    finally:
        hook.remove()


class _Pooled(Exception):
    """The predictor was given what this holds."""


def _instances(size: tuple[int, int], boxes: Tensor) -> Instances:
    return Instances(size, proposal_boxes=Boxes(boxes))


def _factors(seen: tuple[int, int], size: tuple[int, int], boxes: Tensor) -> Tensor:
    """Return what takes corners from an image of one size to one of another, `(4,)`."""
    height, width = (ours / given for ours, given in zip(seen, size, strict=True))
    return boxes.new_tensor([width, height, width, height])
