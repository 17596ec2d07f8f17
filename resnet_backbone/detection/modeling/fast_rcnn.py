"""Detectron2's two-stage detector, fed without waiting for the device."""

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances

from resnet_backbone.detection.modeling.torchscript import NotScripted


class FastGeneralizedRCNN(NotScripted, GeneralizedRCNN):
    """Detectron2's GeneralizedRCNN with one batch for all images, in channels_last, from pinned memory if they are."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return losses in training, else detections; see Detectron2's."""
        if self.training and "instances" in batched_inputs[0]:
            batched_inputs = [
                {**record, "instances": _without_waiting(record["instances"], self.device)} for record in batched_inputs
            ]
        return super().forward(batched_inputs)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Return the normalized images, padded with zeros at the right and the bottom."""
        if torch.jit.is_tracing():
            return super().preprocess_image(batched_inputs)
        images = [record["image"].to(self.device, non_blocking=True) for record in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]  # floats, even if all three are not
        sizes = [tuple(image.shape[1:]) for image in images]
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = (-(-max(size[d] for size in sizes) // divisor) * divisor for d in (0, 1))
        batch = images[0].new_zeros(len(images), height, width, len(images[0])).permute(0, 3, 1, 2)
        for place, image, (rows, columns) in zip(batch, images, sizes, strict=True):
            place[:, :rows, :columns] = image
        return ImageList(batch, sizes)


def _without_waiting(instances: Instances, device: torch.device) -> Instances:
    """Copy boxes and classes to a device; Detectron2's own copy of them waits. Masks and the like follow its way."""
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, torch.Tensor):
            moved.set(name, value.to(device, non_blocking=True))
        elif type(value) is Boxes:
            moved.set(name, Boxes(value.tensor.to(device, non_blocking=True)))
        else:
            moved.set(name, value.to(device))
    return moved
