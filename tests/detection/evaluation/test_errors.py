"""TIDE's numbers, which come from its authors' package tidecv 1.0.1 (`TIDE().evaluate`, on the same data)."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest

from resnet_backbone.detection.evaluation.average_precision import evaluate
from resnet_backbone.detection.evaluation.errors import average_precision, find_errors
from resnet_backbone.detection.evaluation.overlaps import find_overlaps
from tests.detection.evaluation.imitated import (
    COCO_MINI,
    coco_mini,
    imitated_detections,
    imitated_truth,
    index,
)

TIDE = json.loads((Path(__file__).parent / "tide.json").read_text())
needs_coco = pytest.mark.skipif(not COCO_MINI.is_file(), reason="no photographs beside the repository")
CASES = {
    "imitated": lambda: (imitated_truth(0, images=300, categories=6, crowds=False), 1),
    "imitated, crowds": lambda: (imitated_truth(2, images=300, categories=6, crowds=True), 3),
    "coco_mini": lambda: (coco_mini(), 4),
}


def errors_of(content, results, task="bbox"):
    return find_errors(find_overlaps(evaluate(index(content), results, task)))


@pytest.mark.parametrize("case", [*list(CASES)[:2], pytest.param("coco_mini", marks=needs_coco)])
def test_the_numbers_are_those_of_the_authors_package(case):
    content, seed = CASES[case]()
    expected = TIDE["cases"][case]
    found = errors_of(content, imitated_detections(content, seed))
    for key in ("ap50", "cost", "false_positives", "false_negatives"):
        assert getattr(found, key) == pytest.approx(expected[key], abs=1e-9), key
    assert found.counts == expected["counts"]  # outside of crowds


def test_masks_that_fill_their_boxes_have_the_errors_of_the_boxes():
    content = imitated_truth(5, images=40, categories=3, crowds=True)
    results = imitated_detections(content, 6)
    for one in [*content["annotations"], *results]:
        x, y, width, height = (int(value) for value in one["bbox"])
        x, y = min(max(x, 0), 230), min(max(y, 0), 190)
        one["bbox"] = [x, y, min(width + 1, 240 - x), min(height + 1, 200 - y)]
        mask = np.zeros((200, 240), np.uint8, order="F")
        mask[y : y + one["bbox"][3], x : x + one["bbox"][2]] = 1
        mask = pycocotools.mask.encode(mask)
        one["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
    by_box, by_mask = errors_of(content, results), errors_of(content, results, "segm")
    assert by_mask.counts == by_box.counts
    assert by_mask.cost == pytest.approx(by_box.cost, abs=1e-9)


SIZE = {"id": 1, "file_name": "1.jpg", "height": 100, "width": 100}


@pytest.mark.parametrize(
    ("category", "box", "error"),
    [
        (2, [10, 10, 40, 40], "classification"),
        (1, [10, 10, 40, 15], "localization"),
        (2, [10, 10, 40, 15], "both"),
        (1, [10, 10, 40, 40], "duplicate"),
        (1, [60, 60, 30, 30], "background"),
    ],
)
def test_each_type(category, box, error):
    """Figure 2 of the paper, beside a detection that is right."""
    item = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    categories = [{"id": number, "name": str(number)} for number in (1, 2)]
    content = {"images": [SIZE], "categories": categories, "annotations": [item]}
    right = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "score": 0.9}
    wrong = {"image_id": 1, "category_id": category, "bbox": box, "score": 0.5}
    found = errors_of(content, [right, wrong])
    assert {name for name, count in found.counts.items() if count} == {error}
    assert errors_of(content, [wrong]).counts["missed"] == (error in ("both", "background"))


def test_average_precision_of_a_few_detections():
    """By hand: recall 1/2 with precision 1, and recall 1 with 2/3; 51 and 50 of the 101 recalls."""
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert average_precision(np.array([True]), 0) == 0


def test_an_image_keeps_its_hundred_best_detections():
    content = imitated_truth(7, images=3, categories=2, crowds=False)
    rng = np.random.default_rng(0)
    results = [
        {"image_id": 2, "category_id": 1, "bbox": [1, 2, 30, 40], "score": score} for score in rng.random(130).tolist()
    ]
    overlaps = find_overlaps(evaluate(index(content), results, "bbox"))
    assert overlaps.score.tolist() == sorted((one["score"] for one in results), reverse=True)[:100]
    assert overlaps.rank.tolist() == list(range(100))
