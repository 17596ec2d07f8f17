"""COCO's evaluation on ground truth that lacks what pycocotools needs and can be derived."""

import contextlib
import io
from typing import Any

import pycocotools.mask
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO


class CompletingCOCOEvaluator(COCOEvaluator):
    """A COCOEvaluator that completes its ground truth in memory; the file stays as it is."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._do_evaluation:
            complete(self._coco_api)


def complete(truth: COCO) -> None:
    """Derive `area`, `iscrowd` and `num_keypoints` where they are missing, and drop polygons of less than three points.

    An area is that of the mask, else of the box. Ids are renumbered from 1 if one is 0, which pycocotools takes for
    "not matched": it would count the object as missed. Boxes stay as they are, also beyond the image, so that other
    ground truth gives the numbers that pycocotools gives.
    """
    items = truth.dataset["annotations"]
    for item in items:
        mask = item.get("segmentation")
        if isinstance(mask, list) and any(len(points) < 6 for points in mask):
            item["segmentation"] = [points for points in mask if len(points) >= 6]
        if item.get("area") is None:
            item["area"] = _area(truth, item)
        item.setdefault("iscrowd", 0)
        if "keypoints" in item and "num_keypoints" not in item:
            item["num_keypoints"] = sum(visible > 0 for visible in item["keypoints"][2::3])
    if any(item["id"] == 0 for item in items):
        for number, item in enumerate(items, 1):
            item["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()


def _area(truth: COCO, item: dict[str, Any]) -> float:
    if item.get("segmentation"):
        return float(pycocotools.mask.area(truth.annToRLE(item)))
    return item["bbox"][2] * item["bbox"][3]
