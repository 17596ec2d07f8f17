"""Images per second of COCO's evaluation: from a detector's outputs to the metrics, and of the counting alone."""

import contextlib
import gc
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.timing import Clock, Comparison, Side
from resnet_backbone.detection.evaluation.average_precision import evaluate
from resnet_backbone.detection.evaluation.coco import FastCOCOEvaluator

OURS, STOCK = "ours", "Detectron2"
COUNTING, REFERENCE = "ours, counting", "pycocotools"
MEANING = {
    OURS: "the evaluator of tools/train_net.py, from a detector's outputs to metrics and files",
    STOCK: "its COCOEvaluator, which counts by pycocotools: the same numbers and files",
    COUNTING: "faster-coco-eval and the preparation of its input",
    REFERENCE: "its COCOeval on results that it has already loaded",
}
UNIT = "images/s"
HEIGHT, WIDTH = 480, 640
# COCO has 7.3 objects of 2.9 categories in an image.
OBJECTS, CATEGORIES = 7.3, 2.9
_NAME = "benchmark_evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluationWork:
    """What is evaluated.

    Attributes:
        images, detections: the number of images, and of detections in each.
        categories: of the data set.
        rounds: turns per side.
        cpu_time: measure CPU seconds, as in `Clock`.
    """

    images: int
    detections: int
    categories: int
    rounds: int
    cpu_time: bool


def compare_evaluation(work: EvaluationWork, report: Callable[[str], object]) -> Iterator[Comparison]:
    """Compare the whole evaluation of boxes, then the counting alone; `report` gets a line before each."""
    size = f"{work.images}×{work.detections} detections"
    with tempfile.TemporaryDirectory() as folder, _registered(work, Path(folder) / "truth.json") as truth:
        outputs = made_up_detections(truth, work)
        report(f"evaluating {size}")
        evaluators = {
            OURS: FastCOCOEvaluator(_NAME, output_dir=f"{folder}/ours", kpt_oks_sigmas=()),
            STOCK: COCOEvaluator(_NAME, output_dir=f"{folder}/stock", use_fast_impl=False),
        }
        inputs = [{"image_id": image["id"]} for image in truth["images"]]

        def whole(evaluator: COCOEvaluator) -> Callable[[], Any]:
            def run() -> None:
                evaluator.reset()
                for image, output in zip(inputs, outputs, strict=True):
                    evaluator.process([image], [output])
                evaluator.evaluate()
                evaluator.reset()

            return run

        sides = {side: whole(evaluator) for side, evaluator in evaluators.items()}
        yield _compare(f"evaluation, {size}", sides, work)

        report(f"counting {size}")
        results = json.loads((Path(folder) / "ours" / "coco_instances_results.json").read_bytes())
        with contextlib.redirect_stdout(io.StringIO()):
            index = COCO(f"{folder}/truth.json")
            loaded = index.loadRes([dict(one) for one in results])

        def reference() -> None:
            counted = COCOeval(index, loaded, "bbox")
            counted.evaluate()
            counted.accumulate()
            counted.summarize()

        sides = {COUNTING: lambda: evaluate(index, results, "bbox"), REFERENCE: reference}
        yield _compare(f"counting, {size}", sides, work)


def _compare(task: str, sides: dict[str, Callable[[], Any]], work: EvaluationWork) -> Comparison:
    clock = Clock(cpu_time=work.cpu_time)
    for _ in range(work.rounds):
        for side, run in sides.items():
            gc.collect()  # what the side before has left
            with contextlib.redirect_stdout(io.StringIO()):
                clock.time(side, run)
    shape = (work.images, work.detections)
    return Comparison.of(
        clock,
        task=task,
        unit=UNIT,
        first=next(iter(sides)),
        sides={side: Side(MEANING[side], shape) for side in sides},
        work=work.images,
    )


@contextlib.contextmanager
def _registered(work: EvaluationWork, file: Path) -> Iterator[dict[str, Any]]:
    truth = made_up_truth(work)
    file.write_text(json.dumps(truth))
    MetadataCatalog.get(_NAME).set(
        json_file=str(file),
        thing_classes=[category["name"] for category in truth["categories"]],
        thing_dataset_id_to_contiguous_id={category["id"]: category["id"] - 1 for category in truth["categories"]},
    )
    try:
        yield truth
    finally:
        MetadataCatalog.remove(_NAME)


def made_up_truth(work: EvaluationWork) -> dict[str, Any]:
    """Return ground truth in COCO's form with as many objects and categories in an image as COCO has."""
    rng = np.random.default_rng(0)
    frequent = 1 / np.arange(1, work.categories + 1)
    items = []
    for image in range(1, work.images + 1):
        here = rng.choice(work.categories, 1 + rng.poisson(CATEGORIES - 1), p=frequent / frequent.sum())
        for _ in range(rng.poisson(OBJECTS)):
            sides = np.exp(rng.uniform(np.log(8), np.log(400), 2))
            corner = rng.random(2) * (WIDTH - sides[0], HEIGHT - sides[1])
            x, y, width, height = (round(float(value), 2) for value in (*corner, *sides))
            item = {"id": len(items) + 1, "image_id": image, "category_id": int(rng.choice(here)) + 1}
            item |= {"bbox": [x, y, width, height], "area": 0.7 * width * height, "iscrowd": int(rng.random() < 0.01)}
            items.append(item)
    return {
        "images": [
            {"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH}
            for image in range(1, work.images + 1)
        ],
        "annotations": items,
        "categories": [{"id": key, "name": f"category {key}"} for key in range(1, work.categories + 1)],
    }


def made_up_detections(truth: dict[str, Any], work: EvaluationWork) -> list[dict[str, Instances]]:
    """Return a detector's outputs: of each object several detections, more or less exact, many of a wrong category."""
    rng = np.random.default_rng(1)
    by_image = {image["id"]: [] for image in truth["images"]}
    for item in truth["annotations"]:
        by_image[item["image_id"]].append(item)
    outputs = []
    for items in by_image.values():
        boxes = np.array([item["bbox"] for item in items] or [[100, 100, 200, 200]])
        categories = np.array([item["category_id"] - 1 for item in items] or [0])
        of = rng.integers(0, len(boxes), work.detections)
        quality = rng.random((work.detections, 1))
        shift = rng.normal(0, 0.02 + 0.5 * (1 - quality) ** 2, (work.detections, 4))
        found = boxes[of] + shift * np.tile(boxes[of][:, 2:], 2)
        found[:, 2:] = found[:, :2] + np.maximum(found[:, 2:], 1)
        wrong = rng.random(work.detections) < 0.4
        scores = quality[:, 0] * rng.random(work.detections)
        order = np.argsort(-scores)
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.from_numpy(found[order]).float())
        instances.scores = torch.from_numpy(scores[order]).float()
        confused = rng.integers(0, work.categories, work.detections)
        instances.pred_classes = torch.from_numpy(np.where(wrong, confused, categories[of])[order])
        outputs.append({"instances": instances})
    return outputs
