"""Where the AP is lost, as TIDE defines it (Bolya et al., arXiv 2008.08115, section 2)."""

from dataclasses import dataclass

import numpy as np

from resnet_backbone.detection.evaluation.overlaps import Overlaps, best, is_first, match

# The IoU from which a detection is right, and that up to which it shows background (section 2.2).
FOREGROUND, BACKGROUND = 0.5, 0.1
TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
_NO_ERROR = -1
_RECALLS = np.arange(101) / 100


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The six types of errors, and what each costs.

    Attributes:
        ap50: AP at IoU 0.5 in TIDE's matching, 0…100.
        cost: by type, how many points ap50 would gain without errors of this type alone. The gains do not add up.
        false_positives, false_negatives: the gain if all false positives had the lowest scores, or if all objects
            without a detection were left out.
        counts: by type, wrong detections outside of crowds, and missed objects.
        matched: `(D,)`, the object of each right detection, -1 for the others.
        ignored: `(D,)` bool, detections in crowds, which are neither right nor wrong.
    """

    ap50: float
    cost: dict[str, float]
    false_positives: float
    false_negatives: float
    counts: dict[str, int]
    matched: np.ndarray
    ignored: np.ndarray


def find_errors(overlaps: Overlaps) -> Errors:
    """Name each wrong detection's error and each missed object, and measure what correcting them would give."""
    matched = match(
        overlaps,
        overlaps.same_category & (overlaps.iou >= FOREGROUND),
        np.ones(len(overlaps.truth_category), bool),
    )
    right = matched >= 0
    ignored = ~right & (overlaps.in_crowd > FOREGROUND)
    used = np.isin(np.arange(len(overlaps.truth_category)), matched[right])
    kind, object_of = _classify(overlaps, right, used)

    # An object that several detections failed on is given to the first of them: the one with the highest score.
    claims = np.flatnonzero((object_of >= 0) & ~used[object_of])
    claims = claims[np.argsort(object_of[claims], kind="stable")]
    corrected = claims[is_first(object_of[claims])]
    missed = ~used
    missed[object_of[claims]] = False

    counted = _Points(overlaps, right, ~ignored, np.bincount(overlaps.truth_category, minlength=overlaps.categories))
    ap50 = counted.ap()
    cost = {}
    for number, name in enumerate(TYPES[:-1]):
        of_type = kind == number
        change = np.zeros(len(kind), bool)
        change[corrected] = of_type[corrected]
        category = overlaps.category.copy()
        category[change] = overlaps.truth_category[object_of[change]]
        cost[name] = counted.ap(right=right | change, kept=(~ignored & ~of_type) | change, category=category) - ap50
    per_category = np.bincount(overlaps.truth_category[missed], minlength=overlaps.categories)
    cost["missed"] = counted.ap(objects=counted.objects - per_category) - ap50
    found = np.bincount(overlaps.truth_category[used], minlength=overlaps.categories)
    counts = {name: int(((kind == number) & ~ignored).sum()) for number, name in enumerate(TYPES[:-1])}
    return Errors(
        ap50=ap50,
        cost={name: max(value, 0.0) for name, value in cost.items()},
        false_positives=counted.ap(score=right.astype(float)) - ap50,
        false_negatives=counted.ap(objects=found) - ap50,
        counts=counts | {"missed": int(missed.sum())},
        matched=matched,
        ignored=ignored,
    )


def _classify(overlaps: Overlaps, right: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's type of error, and the object that it would be right about without it, -1 for none.

    A detection in a crowd has a type, too: as in the authors' code, it may be what finds an object once corrected.
    """
    same = overlaps.same_category
    own_iou, own = best(overlaps, same)
    other_iou, other = best(overlaps, ~same)
    used_iou, _ = best(overlaps, same & used[overlaps.truth])
    any_iou, _ = best(overlaps, np.ones(len(same), bool))
    rules = (  # the first that holds
        (right, _NO_ERROR, -1),
        ((own_iou >= BACKGROUND) & (own_iou <= FOREGROUND), _LOCALIZATION, own),
        (other_iou >= FOREGROUND, _CLASSIFICATION, other),
        (used_iou >= FOREGROUND, _DUPLICATE, -1),
        (any_iou <= BACKGROUND, _BACKGROUND, -1),
        (True, _BOTH, -1),
    )
    conditions = [np.broadcast_to(condition, right.shape) for condition, _, _ in rules]
    kind = np.select(conditions, [np.full(right.shape, kind) for _, kind, _ in rules])
    return kind, np.select(conditions, [np.broadcast_to(number, right.shape) for _, _, number in rules])


class _Points:
    """What AP is computed from, and what it would be with some of it changed.

    Args:
        right, kept: `(D,)` bool, whether a detection is right, and whether it counts.
        objects: `(K,)`, of each category.
    """

    def __init__(self, overlaps: Overlaps, right: np.ndarray, kept: np.ndarray, objects: np.ndarray):
        self.objects = objects
        self._given = {
            "right": right, "kept": kept, "objects": objects, "category": overlaps.category, "score": overlaps.score
        }  # fmt: skip

    def ap(self, **changed: np.ndarray) -> float:
        """Return the mean AP of the categories that have objects, 0…100.

        As in the authors' code, a category that has neither objects nor detections after a change is left out.
        """
        values = self._given | changed
        kept, objects = values["kept"], values["objects"]
        right, category, score = (values[key][kept] for key in ("right", "category", "score"))
        order = np.lexsort((-score, category))
        right, bounds = right[order], np.searchsorted(category[order], np.arange(len(objects) + 1))
        found = [
            average_precision(right[bounds[k] : bounds[k + 1]], int(objects[k]))
            for k in np.flatnonzero(self.objects)
            if objects[k] or bounds[k] < bounds[k + 1]
        ]
        return float(np.mean(found)) if found else float("nan")


def average_precision(right: np.ndarray, objects: int) -> float:
    """Return the AP of detections in the order of their scores, 0…100: the mean of 101 precisions, as COCO has it.

    Args:
        right: `(N,)` bool.
        objects: how many there are to find; without any, AP is 0.
    """
    if not objects or not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / objects, _RECALLS, side="left")
    return 100 * float(np.append(precision, 0.0)[places].mean())
