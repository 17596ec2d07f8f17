"""Pictures of an evaluation for TensorBoard: an image with its annotations, and beside it with the detections."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances, RotatedBoxes

from resnet_backbone.detection.data.datasets import objects_of
from resnet_backbone.detection.data.mapper import read_image
from resnet_backbone.detection.drawing import draw

IMAGES = 4  # so many of a data set are drawn, its first ones
SIDE = 480  # pixels of the longer side; larger images are reduced
SCORE = 0.5  # detections from here on are drawn
FEWEST = 5  # so many of the highest scores are drawn if all are below SCORE, as early in training

_FIELDS = ("pred_boxes", "pred_classes", "scores", "pred_masks", "pred_keypoints")


class Pictures(DatasetEvaluator):
    """An evaluator that passes everything to another one, and keeps the detections on some images to draw them.

    Args:
        evaluator: the evaluator that measures.
        records: the images to draw, in Detectron2's form.
        names: of the classes.
    """

    def __init__(self, evaluator: DatasetEvaluator, records: Sequence[Mapping[str, Any]], names: Sequence[str]):
        self._evaluator = evaluator
        self._records = {record["file_name"]: record for record in records}
        self._names = names
        self._found: dict[str, Instances] = {}

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        self._evaluator.process(inputs, outputs)
        for given, output in zip(inputs, outputs):
            if given["file_name"] in self._records and "instances" in output:
                self._found[given["file_name"]] = confident(output["instances"]).to("cpu")

    def evaluate(self) -> dict[str, Any] | None:
        return self._evaluator.evaluate()

    def drawn(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a name and a picture, `(3, H, W)` uint8, RGB, of each image that this process has seen."""
        for number, (file, record) in enumerate(self._records.items(), 1):
            if file in self._found:
                yield f"predictions/{number}_{Path(file).stem}", side_by_side(record, self._found[file], self._names)


def confident(detections: Instances) -> Instances:
    """Return the detections to draw, without the fields that are not drawn."""
    fields = {name: value for name, value in detections.get_fields().items() if name in _FIELDS}
    chosen = detections.scores >= SCORE
    if not chosen.any():
        chosen = detections.scores.argsort(descending=True)[:FEWEST]
    return Instances(detections.image_size, **fields)[chosen]


def side_by_side(record: Mapping[str, Any], detections: Instances, names: Sequence[str]) -> np.ndarray:
    """Return one image twice, left with its annotated objects and right with `detections`: `(3, H, W)` uint8, RGB.

    Of the annotations, masks and keypoints are drawn if the detections have them.
    """
    image = read_image(record["file_name"], "RGB")
    height, width = image.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    resize = T.ResizeTransform(height, width, *size)
    small = resize.apply_image(image)
    truth = _truth(record, resize, masks=detections.has("pred_masks"), keypoints=detections.has("pred_keypoints"))
    line = np.full((size[0], 4, 3), 255, np.uint8)
    both = np.hstack([draw(small, truth, names), line, draw(small, _resized(detections, size), names)])
    return np.ascontiguousarray(both.transpose(2, 0, 1))


def _truth(record: Mapping[str, Any], resize: T.ResizeTransform, *, masks: bool, keypoints: bool) -> Instances:
    left_out = {name for name, drawn in (("segmentation", masks), ("keypoints", keypoints)) if not drawn}
    size = resize.new_h, resize.new_w
    objects = [
        utils.transform_instance_annotations(
            {key: value for key, value in annotation.items() if key not in left_out}, T.TransformList([resize]), size
        )
        for annotation in objects_of(record)
    ]
    return utils.annotations_to_instances(objects, size, mask_format="bitmask")


def _resized(detections: Instances, size: tuple[int, int]) -> Instances:
    """Return detections in the pixels of the image resized to `size`, height and width."""
    height, width = detections.image_size
    x, y = size[1] / width, size[0] / height
    resized = Instances(size)
    for name, value in detections.get_fields().items():
        if isinstance(value, Boxes | RotatedBoxes):
            value = value.clone()
            value.scale(x, y)
        elif name == "pred_masks":
            rows, columns = (torch.arange(new) * old // new for old, new in ((height, size[0]), (width, size[1])))
            value = value[:, rows][:, :, columns]
        elif name == "pred_keypoints":
            value = value * value.new_tensor([x, y, 1])
        resized.set(name, value)
    return resized
