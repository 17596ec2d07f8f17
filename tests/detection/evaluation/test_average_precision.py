"""The numbers are pycocotools' own."""

import contextlib
import copy
import io
import json

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnet_backbone.detection.evaluation.average_precision import METRICS, evaluate
from resnet_backbone.detection.evaluation.coco import complete
from tests.detection.evaluation.imitated import COCO_MINI, index


def by_pycocotools(truth: COCO, results: list[dict], task: str, *, sigmas=(), max_detections=(1, 10, 100)) -> COCOeval:
    """As Detectron2 calls it."""
    results = copy.deepcopy(results)
    if task == "segm":
        for one in results:
            one.pop("bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        counted = COCOeval(truth, truth.loadRes(results), task)
        if task != "keypoints":
            counted.params.maxDets = list(max_detections)
        elif len(sigmas):
            counted.params.kpt_oks_sigmas = np.array(sigmas)
        counted.evaluate()
        counted.accumulate()
        if max_detections[-1] == 100:
            counted.summarize()
    return counted


def compare(content: dict, results: list[dict], task: str, **options) -> None:
    complete(truth := index(content))
    found = evaluate(truth, results, task, **options)
    complete(truth := index(content))
    theirs = by_pycocotools(truth, results, task, **options)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_allclose(found.counted.eval[key], theirs.eval[key], rtol=0, atol=1e-12, err_msg=key)
    if len(theirs.stats):
        expected = np.where(theirs.stats < 0, np.nan, 100 * theirs.stats)
        np.testing.assert_allclose(list(found.metrics.values()), expected, rtol=0, atol=1e-12)
        assert len(METRICS[task]) == len(expected) == (10 if task == "keypoints" else 12)


def boxes(rng, count: int, size: int) -> np.ndarray:
    """Return boxes of all of COCO's sizes, a few of them without an area, on a coarse grid: IoUs of 0.5 occur."""
    sides = np.exp(rng.uniform(np.log(2), np.log(size / 1.2), (count, 2))).round()
    sides[rng.random((count, 2)) < 0.04] = 0
    corners = (rng.random((count, 2)) * np.maximum(size - sides, 0)).round()
    return np.concatenate([corners, sides], 1)


def jittered(rng, found: np.ndarray, size: int) -> np.ndarray:
    moved = found + (rng.normal(0, 0.15, found.shape) * np.tile(found[:, 2:], 2)).round()
    exact = rng.random(len(found)) < 0.2
    moved[exact] = found[exact]
    moved[:, 2:] = np.maximum(moved[:, 2:], 0)
    return moved


def shape(rng, task: str, box: np.ndarray, size: int, keypoints: int, *, crowd: bool) -> dict:
    """Return a mask (a detection's and a crowd's as run lengths) or keypoints to a box."""
    left, top, right, bottom = np.clip([box[0], box[1], box[0] + box[2], box[1] + box[3]], 0, size)
    if task == "segm":
        outline = [float(v) for v in (left, top, right, top, right, bottom, (left + right) / 2, bottom, left, bottom)]
        mask = pycocotools.mask.merge(pycocotools.mask.frPyObjects([outline], size, size))
        return {"segmentation": {"size": mask["size"], "counts": mask["counts"].decode()} if crowd else [outline]}
    if task == "keypoints":
        x = (left + rng.random(keypoints) * box[2]).round()
        y = (top + rng.random(keypoints) * box[3]).round()
        seen = rng.integers(0, 3, keypoints) * int(rng.random() < 0.85)
        points = np.stack([x, y, seen], 1).reshape(-1).tolist()
        return {"keypoints": points, "num_keypoints": int((seen > 0).sum())}
    return {}


def case(seed: int, task: str, keypoints: int = 3, size: int = 240) -> tuple[dict, list[dict]]:
    """Return ground truth and detections with everything that a rule of COCO's is about."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(50)[: rng.integers(1, 6)].tolist()
    if rng.random() < 0.2:
        ids = [f"image {number}" for number in ids]
    categories = (rng.permutation(30)[: rng.integers(1, 5)] + 1).tolist()
    annotated = categories[: rng.integers(1, len(categories) + 1)]  # the others have no ground truth
    content = {
        "images": [{"id": key, "file_name": f"{key}.jpg", "height": size, "width": size} for key in ids],
        "categories": [{"id": key, "name": f"category {key}"} for key in categories],
        "annotations": [],
    }
    results = []
    digits = int(rng.integers(1, 4))  # one digit: many ties
    for key in ids:
        count = int(rng.integers(0, 7))
        truth = boxes(rng, count, size)
        for box in truth:
            item = {"id": len(content["annotations"]) + int(seed % 2), "image_id": key, "bbox": box.tolist()}
            item |= {"category_id": int(rng.choice(annotated)), "iscrowd": int(rng.random() < 0.15)}
            item["area"] = float(box[2] * box[3]) if rng.random() < 0.7 else float(rng.choice([32**2, 96**2, 500]))
            content["annotations"].append(item | shape(rng, task, box, size, keypoints, crowd=item["iscrowd"]))
        found = [boxes(rng, int(rng.integers(not results, 12)), size)]
        if count:
            near = 260 if rng.random() < 0.03 else int(rng.integers(0, 12))  # more than are counted
            found.append(jittered(rng, truth[rng.integers(0, count, near)], size))
        # pycocotools cannot do without any detection.
        detections = np.concatenate(found) if rng.random() < 0.85 else boxes(rng, int(not results), size)
        for box in detections:
            one = {"image_id": key, "category_id": int(rng.choice(categories)), "bbox": box.tolist()}
            one["score"] = round(float(rng.random()), digits)
            results.append(one | shape(rng, task, box, size, keypoints, crowd=True))
    rng.shuffle(results)
    return content, results


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_boxes(start):
    for seed in range(start, start + 250):
        compare(*case(seed, "bbox"), "bbox")


def test_masks():
    for seed in range(120):
        compare(*case(seed, "segm"), "segm")


@pytest.mark.parametrize(("keypoints", "sigmas"), [(17, ()), (3, (0.02, 0.1, 0.3))], ids=["COCO's 17", "3"])
def test_keypoints(keypoints, sigmas):
    for seed in range(120):
        compare(*case(seed, "keypoints", keypoints), "keypoints", sigmas=sigmas)


def test_another_number_of_detections():
    for seed in range(60):
        compare(*case(seed, "bbox"), "bbox", max_detections=(1, 3, 7))


def test_keypoints_without_boxes_have_the_area_around_them():
    for seed in range(60):
        content, results = case(seed, "keypoints")
        for one in results:
            del one["bbox"]
        compare(content, results, "keypoints", sigmas=(0.02, 0.1, 0.3))


def like_a_detector(content: dict, seed: int) -> list[dict]:
    """Return annotations jittered, dropped, duplicated, confused and scored."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in content["categories"]]
    truth, results = index(content), []
    for item in truth.dataset["annotations"]:
        mask = truth.annToRLE(item)
        mask = {"size": mask["size"], "counts": mask["counts"].decode()}
        for _ in range(rng.poisson(2)):
            box = np.array(item["bbox"], dtype=float)
            box += rng.normal(0, 0.12, 4) * np.tile(box[2:], 2)
            category = item["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
            results.append(
                {
                    "image_id": item["image_id"],
                    "category_id": category,
                    "bbox": np.maximum(box, 0.5).tolist(),
                    "score": float(rng.random()),
                    "segmentation": mask,
                }
            )
    return results


@pytest.mark.skipif(not COCO_MINI.is_file(), reason="needs COCO images beside the repository")
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_on_annotations_of_coco(task):
    content = json.loads(COCO_MINI.read_text())
    assert any(item["iscrowd"] for item in content["annotations"])
    compare(content, like_a_detector(content, 0), task)


def test_what_ground_truth_lacks_is_said():
    content, results = case(3, "bbox")
    for item in content["annotations"]:
        del item["iscrowd"]
    with pytest.raises(KeyError, match="iscrowd"):
        evaluate(index(content), results, "bbox")


def test_nothing_that_is_compared_changes():
    content, results = case(3, "segm")
    truth = index(content)  # a copy
    before = copy.deepcopy((truth.dataset, results))
    evaluate(truth, results, "segm")
    assert (truth.dataset, results) == before


def test_some_images_only():
    content, results = case(3, "bbox")
    assert len(content["images"]) > 1
    one = content["images"][0]["id"]
    found = evaluate(index(content), results, "bbox", images=[one])
    for key in ("images", "annotations"):
        content[key] = [item for item in content[key] if item.get("image_id", item["id"]) == one]
    alone = evaluate(index(content), results, "bbox")
    assert found.images == 1 and len(found.found) == sum(item["image_id"] == one for item in results)
    np.testing.assert_array_equal(found.counted.stats, alone.counted.stats)
