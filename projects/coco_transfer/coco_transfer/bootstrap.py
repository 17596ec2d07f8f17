"""How far a detector's AP depends on which images the test set happens to have: the bootstrap over images.

Test images are drawn with replacement, as many as there are, again and again; the spread of a difference over these
resamples shows how far it depends on the images (Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). Detections are matched with objects once, by COCO's rules. In a resample, they only count as often as their image
was drawn.
"""

from dataclasses import dataclass, replace

import numpy as np

from resnet_backbone.detection.evaluation.average_precision import Evaluation
from resnet_backbone.detection.evaluation.curves import RECALLS
from resnet_backbone.detection.evaluation.overlaps import find_overlaps, is_first, match

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
CONFIDENCE = 95  # percent
_AT_ONCE = 100  # resamples, so that an array of them fits a core's cache


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Which detections are right, in the order in which COCO counts them: by category, then score, then image.

    Attributes:
        image, category: `(D,)`.
        tied: `(D,)`, a number that detections of the same image, category and score share; it rises.
        right: `(T, D)` bool, whether a detection finds an object, by IoU threshold.
        ignored: `(T, D)` bool, whether it is of a crowd and does not count.
        objects: `(N, K)`, the number of objects to find, by image and category.
    """

    image: np.ndarray
    category: np.ndarray
    tied: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


def draw_images(images: int, *, resamples: int, seed: int) -> np.ndarray:
    """Return how often each resample has each image, `(R, N)`."""
    rng = np.random.default_rng(seed)
    counts = (np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(resamples))
    return np.stack([one.astype(np.int32) for one in counts])


def find_matches(evaluation: Evaluation) -> Matches:
    """Match an evaluation's detections with objects as COCO does."""
    overlaps = find_overlaps(evaluation, limit_each_category=True)
    # Of objects that a detection overlaps equally, COCO takes the last.
    order = np.lexsort((-overlaps.truth, -overlaps.iou, overlaps.detection))
    columns = {key: getattr(overlaps, key)[order] for key in ("detection", "truth", "iou")}
    overlaps = replace(overlaps, **columns)
    free = np.ones(len(overlaps.truth_image), bool)
    right = np.stack(
        [match(overlaps, overlaps.same_category & (overlaps.iou >= iou), free) >= 0 for iou in IOU_THRESHOLDS]
    )
    ignored = ~right & (overlaps.in_crowd >= IOU_THRESHOLDS[:, None])
    objects = np.zeros((evaluation.images, overlaps.categories))
    np.add.at(objects, (overlaps.truth_image, overlaps.truth_category), 1)
    # The detections are sorted by image and score already, which stays where categories and scores are equal.
    by_score = np.lexsort((-overlaps.score, overlaps.category))
    keys = [values[by_score] for values in (overlaps.category, overlaps.score, overlaps.image)]
    return Matches(
        image=keys[2],
        category=keys[0],
        tied=np.cumsum(np.any([is_first(values) for values in keys], axis=0)),
        right=right[:, by_score],
        ignored=ignored[:, by_score],
        objects=objects,
    )


def resampled_ap(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """Return the AP of each resample at each of COCO's IoU thresholds, `(R, T)`, 0…100.

    The first column is AP50, the mean of all is AP. As in COCO, categories without objects are left out; a resample
    without any object is NaN.

    Args:
        counts: `(R, N)`, how often a resample has each image.
    """
    columns, copy = _with_copies(matches.tied, int(counts.max()))
    image, category = matches.image[columns], matches.category[columns]
    right, ignored = matches.right[:, columns], matches.ignored[:, columns]
    bounds = np.searchsorted(category, np.arange(matches.objects.shape[1] + 1))
    found = []
    for drawn in np.split(counts, range(_AT_ONCE, len(counts), _AT_ONCE)):
        objects = drawn @ matches.objects
        total = np.zeros((len(drawn), len(IOU_THRESHOLDS)))
        for number in np.flatnonzero(matches.objects.any(0)):
            own = slice(bounds[number], bounds[number + 1])
            times = drawn[:, image[own]]
            times = np.where(copy[own] < 0, times, times > copy[own])
            total += _average_precision(times, right[:, own], ignored[:, own], objects[:, number])
        with np.errstate(invalid="ignore"):
            found.append(100 * total / (objects > 0).sum(1, keepdims=True))
    return np.concatenate(found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of a number over resamples, which holds the middle 95 percent of them."""
    outside = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values, (outside, 100 - outside))
    return float(low), float(high)


def _with_copies(tied: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of detections in a resample, and which copy of its image each belongs to, -1 for all copies.

    A detection counts as often as its image was drawn. But where several have the same image, category and score, all
    of the first copy come before those of the second, so there is a column for each of up to `most` copies.
    """
    alone = is_first(tied) & np.append(is_first(tied)[1:], True)[: len(tied)]
    columns = np.repeat(np.arange(len(tied)), np.where(alone, 1, most))
    copy = np.arange(len(columns)) - np.searchsorted(columns, columns)
    order = np.lexsort((columns, copy, tied[columns]))
    return columns[order], np.where(alone[columns], -1, copy)[order]


def _average_precision(times: np.ndarray, right: np.ndarray, ignored: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return a category's AP in each resample at each threshold, `(R, T)`, 0…1; 0 without objects.

    Args:
        times: `(R, D)`, how often each detection counts.
        right, ignored: `(T, D)`.
        objects: `(R,)`.
    """
    detections = times.cumsum(1)
    found = np.zeros((len(times), len(right)))
    for number in range(len(right)):
        # Precision is greatest, and a recall reached, where a detection is right: no other need be looked at.
        hits, crowds = np.flatnonzero(right[number]), np.flatnonzero(ignored[number])
        positives = times[:, hits].cumsum(1)
        in_crowds = np.pad(times[:, crowds].cumsum(1), ((0, 0), (1, 0)))[:, np.searchsorted(crowds, hits)]
        precision = positives / (detections[:, hits] - in_crowds + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, positives / np.maximum(objects, 1)[:, None], side="right")
        found[:, number] = (np.diff(reached, axis=1, prepend=0) * highest).sum(1) / len(RECALLS)
    return np.where(objects[:, None] > 0, found, 0)
