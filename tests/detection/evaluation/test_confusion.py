"""The confusion matrix beside its rule, written out as loops."""

import numpy as np
import pytest
from torch import tensor
from torchvision.ops import box_convert, box_iou

from resnet_backbone.detection.evaluation.average_precision import evaluate
from resnet_backbone.detection.evaluation.confusion import best_threshold, find_confusion
from resnet_backbone.detection.evaluation.errors import find_errors
from resnet_backbone.detection.evaluation.overlaps import find_overlaps
from tests.detection.evaluation.imitated import imitated_detections, imitated_truth, index


def confusion_of(content, results):
    overlaps = find_overlaps(evaluate(index(content), results, "bbox"))
    return find_confusion(overlaps, find_errors(overlaps))


def by_the_rule(content, results, threshold) -> np.ndarray:
    number = len(content["categories"])
    counts = np.zeros((number + 1, number + 1), int)
    for image in content["images"]:
        items = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        truth = [item for item in items if not item["iscrowd"]]
        found = [one for one in results if one["image_id"] == image["id"] and one["score"] >= threshold]
        found.sort(key=lambda one: -one["score"])
        taken, left = set(), []
        for same in (True, False):
            remaining, found = found if same else left, []
            for one in remaining:
                free = [k for k in range(len(truth)) if k not in taken]
                if same:
                    free = [k for k in free if truth[k]["category_id"] == one["category_id"]]
                iou, best = max(((overlap(one, truth[k]), k) for k in free), default=(0, None))
                if iou >= 0.5:
                    taken.add(best)
                    counts[truth[best]["category_id"] - 1, one["category_id"] - 1] += 1
                elif same and not any(in_crowd(one, item) for item in items if item["iscrowd"]):
                    left.append(one)
                elif not same:
                    counts[-1, one["category_id"] - 1] += 1
        for k, item in enumerate(truth):
            if k not in taken:
                counts[item["category_id"] - 1, -1] += 1
    return counts


def overlap(one, item) -> float:
    boxes = [box_convert(tensor([x["bbox"]]).double(), "xywh", "xyxy") for x in (one, item)]
    return float(box_iou(*boxes))


def in_crowd(one, crowd) -> bool:
    left, top = np.maximum(one["bbox"][:2], crowd["bbox"][:2])
    right, bottom = np.minimum(np.add(one["bbox"][:2], one["bbox"][2:]), np.add(crowd["bbox"][:2], crowd["bbox"][2:]))
    share = max(right - left, 0) * max(bottom - top, 0) / (one["bbox"][2] * one["bbox"][3])
    return one["category_id"] == crowd["category_id"] and share > 0.5


def test_the_matrix_is_as_its_rule():
    content = imitated_truth(10, images=40, categories=4, crowds=True)
    assert any(item["iscrowd"] for item in content["annotations"])
    results = imitated_detections(content, 11)
    found = confusion_of(content, results)
    assert 0 < found.threshold < max(one["score"] for one in results)
    np.testing.assert_array_equal(found.counts, by_the_rule(content, results, found.threshold))
    objects = sum(not item["iscrowd"] for item in content["annotations"])
    assert found.counts[:-1].sum() == objects
    assert found.recall == pytest.approx(np.trace(found.counts) / objects)
    assert found.precision == pytest.approx(np.trace(found.counts) / found.counts[:, :-1].sum())


def test_the_largest_confusions():
    content = imitated_truth(10, images=60, categories=4, crowds=False)
    found = confusion_of(content, imitated_detections(content, 11))
    largest = found.largest(3)
    assert len(largest) == 3 and all(row != column for row, column, _ in largest)
    assert [count for _, _, count in largest] == sorted((count for _, _, count in largest), reverse=True)
    others = found.counts[:-1, :-1] * (1 - np.eye(4, dtype=int))
    assert largest[0][2] == others.max() == found.counts[largest[0][:2]]
    assert len(found.largest(1000)) == np.count_nonzero(others)


def test_the_threshold_has_the_best_f1():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score, right = rng.integers(1, 12, 30) / 12, rng.random(30) < 0.5
        objects = int(right.sum()) + 5
        f1 = {t: 2 * right[score >= t].sum() / ((score >= t).sum() + objects) for t in score}
        assert f1[best_threshold(score, right, objects)] == max(f1.values())
    assert best_threshold(np.zeros(0), np.zeros(0, bool), 3) == 0
