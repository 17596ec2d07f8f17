"""COCO's average precision by faster-coco-eval, with pycocotools' numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pycocotools.mask
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO

TASKS = ("bbox", "segm", "keypoints")
# The order of COCOeval's `stats`.
METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}


class Annotations:
    """Annotations of a data set, with those of `COCO`'s methods that COCOeval calls.

    Attributes:
        items: in COCO form; `image_id` and `category_id` count from 0, `id` from 1.
        images: the number of images.
        imgs: their sizes, `{number: {"height": …, "width": …}}`.
    """

    def __init__(self, items: list[dict[str, Any]], *, sizes: Sequence[dict[str, Any]], categories: int):
        self.items = items
        self.images = len(sizes)
        self.imgs = dict(enumerate(sizes))
        self.cat_img_map: dict[int, list[int]] = {number: [] for number in range(categories)}

    def getImgIds(self) -> list[int]:
        return list(self.imgs)

    def getCatIds(self) -> list[int]:
        return list(self.cat_img_map)

    def getAnnIds(self, **_: Any) -> range:
        return range(len(self.items))

    def loadAnns(self, _: range) -> list[dict[str, Any]]:
        return self.items


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was compared, and what came out.

    Attributes:
        task: one of TASKS.
        names: of the categories.
        truth, found: annotated and detected objects, as `Annotations.items`.
        images: the number of images.
        counted: COCOeval with `stats` and `eval`, whose precisions `(T, R, K, A, M)` go by IoU threshold, recall,
            category, range of areas and number of detections per image.
    """

    task: str
    names: tuple[str, ...]
    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]
    images: int
    counted: COCOeval_faster

    @property
    def metrics(self) -> dict[str, float]:
        """All of COCO's metrics by name, 0…100; NaN where there is no object to find."""
        stats = (float(value) for value in self.counted.stats)
        return {
            name: 100 * value if value >= 0 else float("nan")
            for name, value in zip(METRICS[self.task], stats, strict=True)
        }


def evaluate(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    task: str,
    *,
    sigmas: Sequence[float] = (),
    max_detections: Sequence[int] = (1, 10, 100),
    images: Iterable[Any] | None = None,
) -> Evaluation:
    """Compare detections with the ground truth; neither is changed.

    faster-coco-eval's numbers are pycocotools' own as long as no id is a string, too large for a float64, or 0, and
    every category has an object. So images, categories and annotations are renumbered for it. Masks become run lengths
    by pycocotools.

    Args:
        truth: every annotation has `area` and `iscrowd`, and for keypoints `num_keypoints`.
        results: in COCO's form. Those of other images and categories are left out.
        task: one of TASKS.
        sigmas: of keypoints; empty for COCO's 17.
        max_detections: in an image and category. Keypoints always have COCO's 20.
        images: ids of the images to evaluate; None for all.
    """
    ids = sorted(set(truth.getImgIds() if images is None else images))
    categories = sorted(truth.getCatIds())
    of_image = {key: number for number, key in enumerate(ids)}
    of_category = {key: number for number, key in enumerate(categories)}
    annotated = _annotated(truth, task, of_image, of_category)
    found = _detections(results, task, of_image, of_category)
    sizes = [truth.imgs[key] for key in ids]
    counted = COCOeval_faster(
        Annotations(annotated, sizes=sizes, categories=len(categories)),
        Annotations(found, sizes=sizes, categories=len(categories)),
        task,
        kpt_oks_sigmas=list(sigmas) or None,
        print_function=lambda line: None,
    )
    if task != "keypoints":
        counted.params.maxDets = list(max_detections)
    counted.run()
    names = tuple(category["name"] for category in truth.loadCats(categories))
    return Evaluation(task=task, names=names, truth=annotated, found=found, images=len(ids), counted=counted)


def _annotated(
    truth: COCO, task: str, of_image: Mapping[Any, int], of_category: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Return the ground truth with what COCOeval reads of it; a KeyError says what an annotation lacks."""
    keys = {"bbox": ("bbox",), "segm": ("bbox",), "keypoints": ("bbox", "keypoints", "num_keypoints")}[task]
    items = []
    for number, item in enumerate(truth.loadAnns(truth.getAnnIds(imgIds=list(of_image))), 1):
        one = {key: item[key] for key in ("area", "iscrowd", *keys)}
        one["id"], one["image_id"] = number, of_image[item["image_id"]]
        one["category_id"] = of_category[item["category_id"]]
        if task == "segm":
            one["segmentation"] = truth.annToRLE(item)
        items.append(one)
    return items


def _detections(
    results: Sequence[dict[str, Any]], task: str, of_image: Mapping[Any, int], of_category: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Return the detections with numbers and areas: of the mask for masks, else of the box, else of the keypoints."""
    kept = [one for one in results if one["image_id"] in of_image and one["category_id"] in of_category]
    if task == "segm":
        shapes = [one["segmentation"] for one in kept]
        areas = [int(pycocotools.mask.area(mask)) for mask in shapes]  # of a list, it fails on more than 255
    elif task == "bbox":
        shapes = [one["bbox"] for one in kept]
        areas = [width * height for _, _, width, height in shapes]
    else:
        shapes = [one["keypoints"] for one in kept]
        boxes = [one.get("bbox") or _extent(points) for one, points in zip(kept, shapes)]
        areas = [width * height for _, _, width, height in boxes]
    key = {"segm": "segmentation"}.get(task, task)
    return [
        {
            "id": number,
            "image_id": of_image[one["image_id"]],
            "category_id": of_category[one["category_id"]],
            "score": one["score"],
            "area": area,
            key: shape,
        }
        for number, (one, shape, area) in enumerate(zip(kept, shapes, areas), 1)
    ]


def _extent(keypoints: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the box around keypoints, `x, y, width, height`, as pycocotools has it: also around those not visible."""
    x, y = keypoints[0::3], keypoints[1::3]
    return min(x), min(y), max(x) - min(x), max(y) - min(y)
