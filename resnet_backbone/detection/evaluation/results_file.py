"""Detections in COCO's result form and their ground truth, from files that anybody wrote."""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from resnet_backbone.detection.data import coco_file
from resnet_backbone.detection.data.annotations import bad_encoding, is_number, shortened
from resnet_backbone.detection.evaluation.average_precision import TASKS, Evaluation, evaluate
from resnet_backbone.detection.evaluation.coco import check_keypoints, complete
from resnet_backbone.errors import InputError

# What describes a detection, by task.
_KEYS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def evaluate_files(results_file: Path, truth_file: Path, *, sigmas: Sequence[float]) -> dict[str, Evaluation]:
    """Compare detections in a file with ground truth in another; return the evaluations by task.

    Args:
        sigmas: of keypoints; empty for COCO's 17.

    Raises:
        InputError: a file cannot be used, or the two do not belong together.
    """
    results, content = _read_json(results_file), _read_json(truth_file)
    if isinstance(results, dict) and "images" in results and isinstance(content, list):
        raise InputError(
            f"{results_file} is ground truth, and {truth_file} is a list, as detections are. Give the detections first."
        )
    truth = _ground_truth(truth_file, content)
    tasks = _check_results(results_file, results, truth)
    for task in tasks:
        lacking = sum(not item.get(_KEYS[task]) for item in truth.anns.values())
        if lacking:
            raise InputError(
                f"{lacking:,} of {len(truth.anns):,} annotations in {truth_file} have no {_KEYS[task]}, and the "
                f"detections in {results_file} have one. Leave it out of the detections, or give other ground truth."
            )
    if "keypoints" in tasks:
        check_keypoints(truth, results, sigmas)
    return {task: evaluate(truth, results, task, sigmas=sigmas) for task in tasks}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"there is no file {file}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a complete JSON file ({error}). Write or copy it again.") from error


def _ground_truth(file: Path, content: Any) -> COCO:
    parsed = coco_file.as_content(str(file), content)
    coco_file.check_content(str(file), parsed, repeated=coco_file.ids_may_repeat(file))
    for key in ("images", "annotations"):
        if not content.get(key):
            raise InputError(f"the ground truth {file} has no {key}. Give a COCO file with what is to be found.")
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    complete(truth)
    return truth


def _check_results(file: Path, results: Any, truth: COCO) -> tuple[str, ...]:
    """Check each detection; return the tasks that they are about.

    Raises:
        InputError: names the first detection that cannot be used, and how many more there are.
    """
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        found = f"a {type(results).__name__}" if not isinstance(results, list) else "a list with other things"
        raise InputError(f"{file} is {found}; expected a list of detections, each with image_id, category_id, score.")
    if not results:
        raise InputError(f"{file} holds no detections. Without any, AP is 0 wherever there is something to find.")
    tasks = tuple(task for task in TASKS if _KEYS[task] in results[0])
    if not tasks:
        raise InputError(
            f"the detections in {file} have {shortened(list(results[0]))}; expected one of {', '.join(_KEYS.values())}."
        )
    bad = list(_bad(results, tasks, truth))
    if bad:
        number, words = bad[0]
        more = f" {len(bad) - 1:,} more detections cannot be used, either." if len(bad) > 1 else ""
        raise InputError(f"{file}: detection number {number} of {len(results):,} {words}.{more}")
    return tasks


def _bad(results: Sequence[Mapping[str, Any]], tasks: Sequence[str], truth: COCO) -> Iterator[tuple[int, str]]:
    """Yield the numbers of detections that cannot be used, from 1, and what is wrong."""
    images, categories = truth.imgs, truth.cats
    for number, one in enumerate(results, 1):
        image, category, score = one.get("image_id"), one.get("category_id"), one.get("score")
        if type(image) not in (int, str) or image not in images:
            yield number, f"has the image_id {shortened(image)}, which none of the {len(images)} annotated images has"
        elif type(category) is not int or category not in categories:
            expected = f"none of the {len(categories)} categories of the ground truth"
            yield number, f"has the category_id {shortened(category)}, which is {expected}"
        elif not _are_finite([score]):
            yield number, f"has the score {shortened(score)}; expected a finite number"
        else:
            for task in tasks:
                if words := _CHECKS[task](one.get(_KEYS[task]), images[image]):
                    yield number, words
                    break


def _bad_box(box: Any, _: Mapping[str, Any]) -> str | None:
    if isinstance(box, list) and len(box) == 4 and _are_finite(box) and box[2] >= 0 and box[3] >= 0:
        return None
    return f"has the box {shortened(box)}; expected x, y, width and height in pixels"


def _bad_mask(mask: Any, image: Mapping[str, Any]) -> str | None:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        return f"has the segmentation {shortened(mask)}; expected run lengths as pycocotools.mask.encode gives them"
    return bad_encoding(mask, image["width"], image["height"])


def _bad_points(points: Any, _: Mapping[str, Any]) -> str | None:
    if isinstance(points, list) and points and not len(points) % 3 and _are_finite(points):
        return None
    return f"has the keypoints {shortened(points)}; expected x, y and a third number for each"


def _are_finite(values: Sequence[Any]) -> bool:
    return all(is_number(value) and math.isfinite(value) for value in values)


_CHECKS = {"bbox": _bad_box, "segm": _bad_mask, "keypoints": _bad_points}
