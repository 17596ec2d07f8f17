"""How detections overlap the annotated objects of their images, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask

from resnet_backbone.detection.evaluation.average_precision import Evaluation

MAX_DETECTIONS = 100  # of an image, or of each category in it


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """Detections, objects, and their IoUs, by box or by mask.

    Attributes:
        image, category: `(D,)`, of the detections, sorted by image, then by score from the highest; with equal scores,
            they stay in their order.
        score: `(D,)`.
        rank: `(D,)`, within the image, from 0.
        in_crowd: `(D,)`, the largest share of the detection that lies in a crowd of its category.
        truth_image, truth_category: `(G,)`, of the objects that are no crowds, sorted by image.
        detection, truth, iou: `(P,)`, for each pair that overlaps; sorted by detection, then by IoU from the largest,
            then by object.
        categories: the number of them.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    in_crowd: np.ndarray
    truth_image: np.ndarray
    truth_category: np.ndarray
    detection: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    categories: int

    @property
    def same_category(self) -> np.ndarray:
        """`(P,)`, whether a pair's detection has its object's category."""
        return self.category[self.detection] == self.truth_category[self.truth]


def find_overlaps(evaluation: Evaluation, *, limit_each_category: bool = False) -> Overlaps:
    """Return the overlaps of an evaluation's detections and objects, which have boxes or masks.

    Each image keeps the 100 detections with the highest scores, as Detectron2's detectors give them.

    Args:
        limit_each_category: keep as many of each category, as COCO's AP does.
    """
    key = {"segm": "segmentation"}.get(evaluation.task, evaluation.task)
    truth = [item for item in evaluation.truth if not item["iscrowd"]]
    crowds = [item for item in evaluation.truth if item["iscrowd"]]
    truth_image, truth_order = _by_image(truth)
    crowd_image, crowd_order = _by_image(crowds)
    image, order = _by_image(evaluation.found)
    first = np.searchsorted(image, image)
    rank = np.arange(len(image)) - first
    counted = rank
    if limit_each_category:
        counted = _places(image, _column([evaluation.found[i] for i in order], "category_id"))
    kept = counted < MAX_DETECTIONS
    image, order, rank = image[kept], order[kept], rank[kept]
    truth, crowds = [truth[i] for i in truth_order], [crowds[i] for i in crowd_order]
    found = [evaluation.found[i] for i in order]
    category = _column(found, "category_id")
    shapes, truth_shapes, crowd_shapes = ([one[key] for one in items] for items in (found, truth, crowds))

    images = np.arange(evaluation.images + 1)
    starts, truth_starts, crowd_starts = (
        np.searchsorted(of, images).tolist() for of in (image, truth_image, crowd_image)
    )
    in_crowd = np.zeros(len(found))
    crowd_category = _column(crowds, "category_id")
    pairs = [[np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]]
    for number in range(evaluation.images):
        mine = slice(starts[number], starts[number + 1])
        theirs = slice(truth_starts[number], truth_starts[number + 1])
        crowd = slice(crowd_starts[number], crowd_starts[number + 1])
        if shapes[mine] and truth_shapes[theirs]:
            iou = _iou(shapes[mine], truth_shapes[theirs], crowd=False)
            rows, columns = np.nonzero(iou)
            for column, values in zip(pairs, (rows + mine.start, columns + theirs.start, iou[rows, columns])):
                column.append(values)
        if shapes[mine] and crowd_shapes[crowd]:
            share = _iou(shapes[mine], crowd_shapes[crowd], crowd=True)
            in_crowd[mine] = (share * (category[mine, None] == crowd_category[crowd])).max(1)
    detection, of_truth, iou = (np.concatenate(column) for column in pairs)
    by_iou = np.lexsort((of_truth, -iou, detection))
    return Overlaps(
        image=image,
        category=category,
        score=_column(found, "score", float),
        rank=rank,
        in_crowd=in_crowd,
        truth_image=truth_image,
        truth_category=_column(truth, "category_id"),
        detection=detection[by_iou],
        truth=of_truth[by_iou],
        iou=iou[by_iou],
        categories=len(evaluation.names),
    )


def match(overlaps: Overlaps, pairs: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Give each detection, from an image's highest score on, the free object that it overlaps most.

    Args:
        pairs: `(P,)` bool, the pairs that may match.
        free: `(G,)` bool, the objects that may be given away.

    Returns:
        `(D,)`, numbers of objects, -1 for none.
    """
    matched, free = np.full(len(overlaps.image), -1), free.copy()
    rows = np.flatnonzero(pairs)
    rows = rows[np.argsort(overlaps.rank[overlaps.detection[rows]], kind="stable")]
    ranks = overlaps.rank[overlaps.detection[rows]]
    # All images take their turns at once: no two detections of the same rank are in the same image.
    turns = np.arange(ranks.max(initial=-1) + 1)
    for start, stop in zip(*(np.searchsorted(ranks, turns, side) for side in ("left", "right"))):
        turn = rows[start:stop]
        turn = turn[free[overlaps.truth[turn]]]
        turn = turn[is_first(overlaps.detection[turn])]
        matched[overlaps.detection[turn]] = overlaps.truth[turn]
        free[overlaps.truth[turn]] = False
    return matched


def best(overlaps: Overlaps, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's largest IoU among some pairs, `(D,)`, 0 without one, and its object, -1 without one.

    Args:
        pairs: `(P,)` bool.
    """
    iou, truth = np.zeros(len(overlaps.image)), np.full(len(overlaps.image), -1)
    rows = np.flatnonzero(pairs)
    rows = rows[is_first(overlaps.detection[rows])]
    iou[overlaps.detection[rows]], truth[overlaps.detection[rows]] = overlaps.iou[rows], overlaps.truth[rows]
    return iou, truth


def is_first(values: np.ndarray) -> np.ndarray:
    """Return where a value differs from the one before it, `(N,)` bool."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _by_image(items: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, in order, and the items' order: by image, then by score, which objects do not have."""
    image = _column(items, "image_id")
    order = np.lexsort((-np.array([item.get("score", 0) for item in items], float), image))
    return image[order], order


def _places(image: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Return each item's place among those of its image and category, from 0, for items that are sorted by image."""
    order = np.lexsort((category, image))
    groups = np.cumsum(is_first(image[order]) | is_first(category[order]))
    places = np.empty(len(image), int)
    places[order] = np.arange(len(image)) - np.searchsorted(groups, groups)
    return places


def _column(items: Sequence[dict[str, Any]], key: str, kind: type = int) -> np.ndarray:
    return np.array([item[key] for item in items], kind)


def _iou(found: Sequence[Any], truth: Sequence[Any], *, crowd: bool) -> np.ndarray:
    """Return IoUs `(D, G)`, of crowds the share of the detection; 0 for a detection and an object without an area."""
    return np.nan_to_num(pycocotools.mask.iou(found, truth, [crowd] * len(truth)))
