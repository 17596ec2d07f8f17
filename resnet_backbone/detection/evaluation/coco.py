"""COCO's evaluation as Detectron2 has it, many times as fast, also on ground truth that lacks what can be derived."""

import contextlib
import gc
import io
import itertools
import json
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pycocotools.mask
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools.coco import COCO

from resnet_backbone.detection.evaluation.average_precision import Evaluation, evaluate
from resnet_backbone.errors import InputError
from resnet_backbone.weights.files import atomic_write

COCO_KEYPOINTS = 17

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """A COCOEvaluator with the same metrics, tables and files, which counts by faster-coco-eval.

    Its ground truth is completed in memory; the file stays as it is. Proposals are evaluated by Detectron2 itself.

    Attributes:
        evaluations: after `evaluate`, what was compared and found, by task; empty but on the main process.
    """

    def __init__(self, name: str, *, output_dir: str | None, kpt_oks_sigmas: Sequence[float]):
        super().__init__(name, output_dir=output_dir, kpt_oks_sigmas=kpt_oks_sigmas)
        if self._do_evaluation:
            complete(self._coco_api)

    def reset(self) -> None:
        super().reset()
        self.evaluations: dict[str, Evaluation] = {}

    def process(self, inputs: Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            prediction = {"image_id": image["image_id"]}
            if "instances" in output:
                prediction["instances"] = _compact(output["instances"].to(self._cpu_device))
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def evaluate(self, img_ids: Iterable[Any] | None = None) -> dict[str, Any]:
        comm.synchronize()
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        predictions = list(itertools.chain(*gathered))
        if not predictions:
            logger.warning("the evaluator received no predictions")
            return {}
        with _no_garbage_collection():
            return self._evaluate_gathered(predictions, img_ids)

    def _evaluate_gathered(
        self, predictions: Sequence[dict[str, Any]], img_ids: Iterable[Any] | None
    ) -> dict[str, Any]:
        for prediction in predictions:
            if "instances" in prediction:
                prediction["instances"] = to_results(prediction["image_id"], **prediction["instances"])
        if self._output_dir:
            with atomic_write(Path(self._output_dir) / "instances_predictions.pth") as file:
                torch.save(predictions, file, pickle_module=pickle if "proposals" in predictions[0] else _NoTensors)
        self._results = {}
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            self._eval_predictions(predictions, img_ids)
        return self._results

    def _eval_predictions(self, predictions: Sequence[dict[str, Any]], img_ids: Iterable[Any] | None = None) -> None:
        results = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        self._name_categories(results)
        if self._output_dir:
            with atomic_write(Path(self._output_dir) / "coco_instances_results.json") as file:
                file.write(json.dumps(results).encode())
        if not self._do_evaluation:
            logger.info("the test set has no annotations to evaluate with")
            return
        for task in self._tasks_from_predictions(results):
            counted = None
            if results:
                self.evaluations[task] = self._evaluate(results, task, img_ids)
                counted = self.evaluations[task].counted
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(counted, task, class_names=names)

    def _name_categories(self, results: Iterable[dict[str, Any]]) -> None:
        """Replace the numbers of classes by the categories' ids in the file."""
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if numbers is None:
            return
        ids = {number: key for key, number in numbers.items()}
        for result in results:
            result["category_id"] = ids[result["category_id"]]

    def _evaluate(self, results: Sequence[dict[str, Any]], task: str, images: Iterable[Any] | None) -> Evaluation:
        if task == "keypoints":
            check_keypoints(self._coco_api, results, self._kpt_oks_sigmas)
        evaluation = evaluate(self._coco_api, results, task, sigmas=self._kpt_oks_sigmas, images=images)
        lines = (f"{name:>6} {value:6.2f}" for name, value in evaluation.metrics.items() if name.startswith("AR"))
        logger.info("Average recall for %s:\n%s", task, "\n".join(lines))
        return evaluation


class _NoTensors:
    """For `torch.save(pickle_module=…)`, of values without tensors: it does not ask of each whether it is one."""

    class Pickler:
        def __init__(self, file: BinaryIO, protocol: int):
            self._pickler = pickle.Pickler(file, protocol)

        def dump(self, value: Any) -> None:
            self._pickler.dump(value)


def _compact(instances: Instances) -> dict[str, Any]:
    """Return an image's detections as arrays, and its masks as run lengths: what is kept until all are there.

    Args:
        instances: on the CPU, with `pred_boxes`, `pred_classes`, `scores`, and maybe `pred_masks` and `pred_keypoints`.
    """
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    kept = {"boxes": boxes.numpy(), "scores": instances.scores.numpy(), "classes": instances.pred_classes.numpy()}
    if instances.has("pred_masks"):
        masks = instances.pred_masks.to(torch.uint8).permute(1, 2, 0).numpy()
        kept["masks"] = pycocotools.mask.encode(np.asfortranarray(masks)) if len(instances) else []
    if instances.has("pred_keypoints"):
        # COCO's integers are pixels, whose centers the network has at half of one.
        shift = instances.pred_keypoints.new_tensor([0.5, 0.5, 0])
        kept["keypoints"] = (instances.pred_keypoints - shift).flatten(1).numpy()
    return kept


def to_results(
    image_id: Any,
    *,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    masks: Sequence[dict[str, Any]] | None = None,
    keypoints: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return an image's detections in COCO's result form, as Detectron2's `instances_to_coco_json` does.

    Args:
        boxes: `(N, 4)`, x, y, width, height.
        masks: as run lengths.
        keypoints: `(N, 3·K)`.
    """
    results = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for box, score, category in zip(boxes.tolist(), scores.tolist(), classes.tolist())
    ]
    if masks is not None:
        for result, mask in zip(results, masks):
            result["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
    if keypoints is not None:
        for result, points in zip(results, keypoints.tolist()):
            result["keypoints"] = points
    return results


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from looking for garbage each time that a few thousand of a million dicts have been made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_keypoints(truth: COCO, results: Sequence[dict[str, Any]], sigmas: Sequence[float]) -> None:
    """Check that detections, ground truth and sigmas are about the same number of keypoints.

    Raises:
        InputError: they are not.
    """
    found = {len(result["keypoints"]) // 3 for result in results}
    annotated = {len(item["keypoints"]) // 3 for item in truth.anns.values()}
    expected = len(sigmas) or COCO_KEYPOINTS
    if found | annotated != {expected}:
        raise InputError(
            f"detections have {_listed(found)} keypoints, annotations have {_listed(annotated)}, and there are "
            f"{expected} sigmas to compare them by. Give one sigma for each keypoint (TEST.KEYPOINT_OKS_SIGMAS, or "
            "--oks-sigmas)."
        )


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))


def complete(truth: COCO) -> None:
    """Derive `area`, `iscrowd` and `num_keypoints` where they are missing, and drop polygons of less than three points.

    An area is that of the mask, else of the box. Ids are renumbered from 1 if one is 0, which pycocotools takes for
    "not matched": it would count the object as missed. Boxes stay as they are, also beyond the image, so that other
    ground truth gives the numbers that pycocotools gives.
    """
    items = truth.dataset["annotations"]
    for item in items:
        mask = item.get("segmentation")
        if isinstance(mask, list) and any(len(points) < 6 for points in mask):
            item["segmentation"] = [points for points in mask if len(points) >= 6]
        if item.get("area") is None:
            item["area"] = _area(truth, item)
        item.setdefault("iscrowd", 0)
        if "keypoints" in item and "num_keypoints" not in item:
            item["num_keypoints"] = sum(visible > 0 for visible in item["keypoints"][2::3])
    if any(item["id"] == 0 for item in items):
        for number, item in enumerate(items, 1):
            item["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()


def _area(truth: COCO, item: dict[str, Any]) -> float:
    if item.get("segmentation"):
        return float(pycocotools.mask.area(truth.annToRLE(item)))
    return item["bbox"][2] * item["bbox"][3]
