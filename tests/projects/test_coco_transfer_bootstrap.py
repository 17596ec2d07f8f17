"""The bootstrap over test images gives pycocotools' numbers of a set in which the drawn images are there that often."""

import contextlib
import io
import time
from pathlib import Path

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from resnet_backbone.detection.evaluation.average_precision import evaluate
from tests.detection.evaluation.imitated import imitated_detections, imitated_truth, index

PROJECT = Path(__file__).parents[2] / "projects" / "coco_transfer"


@pytest.fixture(scope="module")
def bootstrap(run):
    from coco_transfer import bootstrap

    return bootstrap


def case(seed: int) -> tuple[dict, list[dict]]:
    """Return ground truth and detections on a coarse grid: with equal scores, equal IoUs, IoUs of exactly 0.5."""
    rng = np.random.default_rng(seed)
    images, categories = int(rng.integers(2, 9)), int(rng.integers(1, 5))

    def box() -> list[float]:
        width, height = rng.choice([10, 20, 40], 2)
        x, y = 10 * rng.integers(0, 5, 2)
        return [float(value) for value in (x, y, width, height)]

    truth = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 100, "width": 100} for n in range(1, images + 1)],
        "categories": [{"id": 3 * n, "name": f"category {n}"} for n in range(1, categories + 2)],  # one has no object
        "annotations": [],
    }
    results = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 6)) * (image > 1)):  # the first image has no object
            item = {"id": len(truth["annotations"]) + 1, "image_id": image, "bbox": box()}
            item |= {"category_id": 3 * int(rng.integers(1, categories + 1)), "iscrowd": int(rng.random() < 0.2)}
            truth["annotations"].append(item | {"area": item["bbox"][2] * item["bbox"][3]})
        own = [item for item in truth["annotations"] if item["image_id"] == image]
        for _ in range(int(rng.integers(0, 12))):
            near = own[rng.integers(len(own))] if own and rng.random() < 0.7 else None
            category = near["category_id"] if near else 3 * int(rng.integers(1, categories + 2))
            score = round(float(rng.random()), 1)
            found = near["bbox"] if near and rng.random() < 0.5 else box()
            results.append({"image_id": image, "category_id": category, "bbox": found, "score": score})
    rng.shuffle(results)
    return truth, results


def duplicated(truth: dict, results: list[dict], counts: np.ndarray) -> tuple[dict, list[dict]]:
    """Return the sets with every image as often as `counts` says, each copy with an id of its own."""
    images, annotations, found = [], [], []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            key = len(images) + 1
            images.append({**image, "id": key})
            for item in truth["annotations"]:
                if item["image_id"] == image["id"]:
                    annotations.append({**item, "id": len(annotations) + 1, "image_id": key})
            found += [{**one, "image_id": key} for one in results if one["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found


def by_pycocotools(truth: dict, results: list[dict]) -> tuple[float, float]:
    """Return AP50 and AP in percent; NaN where there is no object to find."""
    content = index(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        counted = COCOeval(content, content.loadRes(results), "bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    ap, ap50 = np.where(counted.stats[:2] < 0, np.nan, 100 * counted.stats[:2])
    return float(ap50), float(ap)


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_ap_of_resamples_is_pycocotools_of_the_duplicated_set(bootstrap, start):
    compared = 0
    for seed in range(start, start + 10):
        truth, results = case(seed)
        counts = bootstrap.draw_images(len(truth["images"]), resamples=4, seed=seed)
        counts[0] = 1  # the test set itself
        found = bootstrap.resampled_ap(bootstrap.find_matches(evaluate(index(truth), results, "bbox")), counts)
        assert found.shape == (4, 10)
        for row, drawn in zip(found, counts, strict=True):
            copied = duplicated(truth, results, drawn)
            if not copied[1]:  # pycocotools cannot do without any detection
                continue
            expected = by_pycocotools(*copied)
            np.testing.assert_allclose((row[0], row.mean()), expected, rtol=0, atol=1e-9, err_msg=f"{seed}, {drawn}")
            compared += not np.isnan(expected[0])
    assert compared > 30


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_objects_that_are_overlapped_equally_a_detection_takes_the_one_that_coco_takes(bootstrap, order):
    boxes = ([0.0, 0.0, 20.0, 20.0], [10.0, 0.0, 20.0, 20.0])
    truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1 + n, "image_id": 1, "category_id": 1, "bbox": boxes[place], "area": 400.0, "iscrowd": 0}
            for n, place in enumerate(order)
        ],
    }
    found = (([5.0, 0.0, 20.0, 20.0], 0.9), (boxes[0], 0.8))  # the first has an IoU of 0.6 with both
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in found]
    aps = bootstrap.resampled_ap(bootstrap.find_matches(evaluate(index(truth), results, "bbox")), np.ones((1, 1), int))
    expected = by_pycocotools(truth, results)
    np.testing.assert_allclose((aps[0, 0], aps.mean()), expected, rtol=0, atol=1e-9)
    assert (expected[0] == 100) == (order == (0, 1))


def test_an_image_keeps_100_detections_of_each_category(bootstrap):
    truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": number, "name": str(number)} for number in (1, 2)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": [0.0, 0.0, 20.0, 20.0], "area": 400.0, "iscrowd": 0}
            for n in (1, 2)
        ],
    }
    # The first category's object is found by its 100th detection, the second's by its 101st.
    results = [
        {"image_id": 1, "category_id": category, "bbox": [x, 0.0, 20.0, 20.0], "score": 1 - number / 1000}
        for category, last in ((1, 99), (2, 100))
        for number in range(last + 1)
        for x in [0.0 if number == last else 50.0]
    ]
    aps = bootstrap.resampled_ap(bootstrap.find_matches(evaluate(index(truth), results, "bbox")), np.ones((1, 1), int))
    expected = by_pycocotools(truth, results)
    np.testing.assert_allclose((aps[0, 0], aps.mean()), expected, rtol=0, atol=1e-9)
    assert 0 < expected[0] < 1


def test_without_detections_ap_is_zero(bootstrap):
    truth, _ = case(2)
    counts = np.ones((1, len(truth["images"])), int)
    assert (bootstrap.resampled_ap(bootstrap.find_matches(evaluate(index(truth), [], "bbox")), counts) == 0).all()


def test_each_resample_has_as_many_images_as_the_set_and_draws_all_alike(bootstrap):
    counts = bootstrap.draw_images(20, resamples=2000, seed=1)
    assert (counts.sum(1) == 20).all()
    # Binomial: 20 draws with a probability of 1/20 have a mean of 1 and a variance of 19/20.
    np.testing.assert_allclose(counts.mean(0), 1, atol=5 * np.sqrt(0.95 / 2000))
    assert abs(counts.var() - 0.95) < 0.03
    assert (counts == bootstrap.draw_images(20, resamples=2000, seed=1)).all()
    assert (counts != bootstrap.draw_images(20, resamples=2000, seed=2)).any()


def test_the_interval_holds_the_middle_95_percent(bootstrap):
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert bootstrap.interval(values) == (25.0, 975.0)
    assert bootstrap.interval(np.append(values, np.nan)) == (25.0, 975.0), "a resample without any object says nothing"


def test_the_interval_of_independent_images_is_that_of_their_mean(bootstrap):
    """With one object in each image, one detection of it and equal scores, AP is about the share found, squared."""
    rng = np.random.default_rng(3)
    images = 400
    box = [10.0, 10.0, 20.0, 20.0]
    truth = {
        "images": [{"id": n, "height": 100, "width": 100} for n in range(1, images + 1)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": box, "area": 400.0, "iscrowd": 0}
            for n in range(1, images + 1)
        ],
    }

    def detector(share: float) -> list[dict]:
        found = rng.random(images) < share
        return [
            {"image_id": n, "category_id": 1, "bbox": box, "score": float(rng.random())}
            for n in range(1, images + 1)
            if found[n - 1]
        ]

    counts = bootstrap.draw_images(images, resamples=1000, seed=0)
    aps = [
        bootstrap.resampled_ap(bootstrap.find_matches(evaluate(index(truth), detector(share), "bbox")), counts)[:, 0]
        for share in (0.5, 0.7)
    ]
    # Precision is 1 throughout, so AP is the recall: a mean of 400 values of 0 or 1, for each detector.
    low, high = bootstrap.interval(aps[1] - aps[0])
    expected = 2 * 1.96 * 100 * np.sqrt((0.5 * 0.5 + 0.7 * 0.3) / images)
    assert abs((high - low) / expected - 1) < 0.15
    assert low < 20 < high


def test_a_thousand_resamples_of_five_hundred_images_take_seconds(bootstrap):
    truth = imitated_truth(0, images=500, categories=20, crowds=False)
    rng = np.random.default_rng(1)
    results = imitated_detections(truth, 0)
    while len(results) < 50_000:
        width, height, x, y = 100 * rng.random(4)
        found = {"image_id": int(rng.integers(1, 501)), "category_id": int(rng.integers(1, 21))}
        results.append(found | {"bbox": [x, y, width, height], "score": float(rng.random())})
    start = time.perf_counter()
    matches = bootstrap.find_matches(evaluate(index(truth), results, "bbox"))
    found = bootstrap.resampled_ap(matches, bootstrap.draw_images(500, resamples=1000, seed=0))
    assert found.shape == (1000, 10) and not np.isnan(found).any()
    assert time.perf_counter() - start < 30, "it takes 3 s on an idle core"
