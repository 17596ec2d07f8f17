"""AP by category and size, and precision over recall."""

from dataclasses import dataclass

import numpy as np

from resnet_backbone.detection.evaluation.average_precision import Evaluation

RECALLS = np.linspace(0, 1, 101)
IOU_50, IOU_75 = 0, 5  # of COCO's ten thresholds
ALL_SIZES, MOST_DETECTIONS = 0, -1


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision at RECALLS, 0…1; NaN where a category has no object.

    Attributes:
        at_50, at_75: `(K, 101)`, at an IoU of 0.5 and 0.75. Its mean is the AP.
        mean: `(K, 101)`, over COCO's ten IoUs.
        objects, detections: `(K,)`, of each category; objects without crowds.
    """

    at_50: np.ndarray
    at_75: np.ndarray
    mean: np.ndarray
    objects: np.ndarray
    detections: np.ndarray

    @property
    def ap(self) -> np.ndarray:
        """`(K,)`, 0…100."""
        return 100 * self.mean.mean(1)

    @property
    def ap50(self) -> np.ndarray:
        """`(K,)`, 0…100."""
        return 100 * self.at_50.mean(1)

    @property
    def worst_first(self) -> np.ndarray:
        """Categories in the order of their AP, those without objects left out."""
        ap = self.ap
        order = np.lexsort((-self.objects, ap))
        return order[~np.isnan(ap[order])]


def find_curves(evaluation: Evaluation) -> Curves:
    precision = evaluation.counted.eval["precision"][..., ALL_SIZES, MOST_DETECTIONS]
    precision = np.where(precision < 0, np.nan, precision).transpose(0, 2, 1)
    number = len(evaluation.names)
    objects = [item["category_id"] for item in evaluation.truth if _counts(evaluation, item)]
    detections = [item["category_id"] for item in evaluation.found]
    return Curves(
        at_50=precision[IOU_50],
        at_75=precision[IOU_75],
        mean=precision.mean(0),
        objects=np.bincount(np.array(objects, int), minlength=number),
        detections=np.bincount(np.array(detections, int), minlength=number),
    )


def by_size(evaluation: Evaluation) -> list[tuple[str, float, float, int]]:
    """Return name, AP, AR and number of objects for each of COCO's ranges of areas; of keypoints, none is small."""
    params = evaluation.counted.params
    areas = np.array([item["area"] for item in evaluation.truth if _counts(evaluation, item)])
    rows = []
    for name, (low, high) in list(zip(params.areaRngLbl, params.areaRng))[1:]:
        letter = name[0]
        objects = int(((areas >= low) & (areas <= high)).sum())
        rows.append((name, evaluation.metrics[f"AP{letter}"], evaluation.metrics[f"AR{letter}"], objects))
    return rows


def _counts(evaluation: Evaluation, item: dict) -> bool:
    """Return whether an annotation is an object to find: not a crowd, and with keypoints where these are compared."""
    return not item["iscrowd"] and (evaluation.task != "keypoints" or item["num_keypoints"] > 0)
