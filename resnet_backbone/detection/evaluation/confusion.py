"""Which categories are taken for which, for background, or for nothing."""

from dataclasses import dataclass

import numpy as np

from resnet_backbone.detection.evaluation.errors import FOREGROUND, Errors
from resnet_backbone.detection.evaluation.overlaps import Overlaps, match


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """A confusion matrix of the detections from a score threshold on.

    In each image, detections take objects in the order of their scores, at IoU 0.5: first those of their own category,
    as in the AP at IoU 0.5. Detections that are left then take objects that are left, of any category. What is left
    after that is background, or missed. Crowds, and detections in a crowd of their category, do not count.

    Attributes:
        threshold: the score with the best F1 over all categories.
        counts: `(K + 1, K + 1)`: the row is the object's category, the last one background; the column is the
            detection's, the last one for missed objects.
    """

    threshold: float
    counts: np.ndarray

    @property
    def precision(self) -> float:
        """The share of detections that are right."""
        return _share(np.trace(self.counts), self.counts[:, :-1].sum())

    @property
    def recall(self) -> float:
        """The share of objects that are found, with their category."""
        return _share(np.trace(self.counts), self.counts[:-1].sum())

    def largest(self, number: int) -> list[tuple[int, int, int]]:
        """Return the most frequent confusions of categories: the object's, the detection's, and how often."""
        counts = self.counts[:-1, :-1].copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:number]
        return [
            (int(row), int(column), int(counts[row, column]))
            for row, column in zip(*np.unravel_index(order, counts.shape))
            if counts[row, column]
        ]


def find_confusion(overlaps: Overlaps, errors: Errors) -> Confusion:
    threshold = best_threshold(overlaps.score[~errors.ignored], errors.matched[~errors.ignored] >= 0,
                               len(overlaps.truth_category))  # fmt: skip
    kept = (overlaps.score >= threshold) & ~errors.ignored
    # Detections of lower scores take nothing away from those of higher ones.
    matched = np.where(kept, errors.matched, -1)
    left = np.ones(len(overlaps.truth_category), bool)
    left[matched[matched >= 0]] = False
    pairs = (overlaps.iou >= FOREGROUND) & (kept & (matched < 0))[overlaps.detection]
    others = match(overlaps, pairs, left)
    matched = np.where(matched >= 0, matched, others)

    categories = overlaps.categories
    counts = np.zeros((categories + 1, categories + 1), np.int64)
    truth = np.append(overlaps.truth_category, categories)[matched]  # -1: background, which comes last
    np.add.at(counts, (truth[kept], overlaps.category[kept]), 1)
    left[others[others >= 0]] = False
    np.add.at(counts, (overlaps.truth_category[left], categories), 1)
    return Confusion(threshold=threshold, counts=counts)


def best_threshold(score: np.ndarray, right: np.ndarray, objects: int) -> float:
    """Return the score from which on the detections have the best F1, the highest such score; 0 without detections.

    Args:
        score, right: `(D,)`, of the detections.
        objects: how many there are to find.
    """
    if not len(score):
        return 0.0
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], np.cumsum(right[order])
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + objects)
    last = np.append(score[1:] != score[:-1], True)  # of equal scores: all or none
    return float(score[last][np.argmax(f1[last])])


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
