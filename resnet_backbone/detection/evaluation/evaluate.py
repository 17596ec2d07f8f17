"""Evaluation on DATASETS.TEST, in full and on two images."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.workers import Loader
from resnet_backbone.detection.data.datasets import file_name
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.detection.evaluation.average_precision import Evaluation
from resnet_backbone.detection.evaluation.batches import IMAGES_ON_A_GPU, batch_by_shape
from resnet_backbone.detection.evaluation.made_up import MadeUpDetections
from resnet_backbone.detection.evaluation.pictures import IMAGES, Pictures
from resnet_backbone.detection.evaluation.registry import build_evaluator, evaluations_of
from resnet_backbone.detection.evaluation.report import write_report
from resnet_backbone.errors import InputError

logger = logging.getLogger(__name__)


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    folder: Path,
    *,
    augmented: bool = False,
    report: bool = False,
    show: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Return the metrics of `model` on DATASETS.TEST in Detectron2's format: `{"bbox": {"AP": …, "AP50": …}}`.

    With several data sets, metrics are keyed by data set name; with none, there are none. Only the main process gets
    metrics.

    Args:
        folder: the run's output folder.
        augmented: test once more with test-time augmentation (TEST.AUG), which gives `bbox_TTA` and so on.
        report: write a report about each data set that is evaluated as COCO is.
        show: called on the main process with a name and a picture, `(3, H, W)` uint8, RGB, for each of the first
            images of the first data set (`pictures`).
    """
    results = {}
    for number, name in enumerate(cfg.DATASETS.TEST):
        shown = show if number == 0 and comm.is_main_process() else None
        results[name], evaluations = _test(cfg, model, name, _folder(cfg, name, folder / "inference"), show=shown)
        if report and evaluations:
            several = len(cfg.DATASETS.TEST) > 1
            place = _folder(cfg, name, folder / "evaluation") if several else folder / "evaluation"
            _report(evaluations, place, name)
        if augmented:
            found, _ = _test(
                cfg, GeneralizedRCNNWithTTA(cfg, model), name, _folder(cfg, name, folder / "inference_TTA")
            )
            results[name] |= {f"{task}_TTA": metrics for task, metrics in found.items()}
        logger.info("%s: %s", name, _summary(results[name]))
    return results if len(results) != 1 else next(iter(results.values()))


def _report(evaluations: Mapping[str, Evaluation], folder: Path, name: str) -> None:
    """Write a report; a fault in it costs the report alone, and not the run whose weights are still to be written."""
    try:
        logger.info("%s: report in %s", name, write_report(evaluations, folder, f"Detections on {name}"))
    except OSError:  # a full disk is an error of the run
        raise
    except Exception:
        logger.exception("%s: the report failed; the metrics are complete", name)


def check_expected(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Compare the metrics with TEST.EXPECTED_RESULTS: lists of task, metric, value, and tolerance.

    Raises:
        InputError: a metric is missing or out of its range.
    """
    wrong = []
    for task, metric, value, tolerance in cfg.TEST.EXPECTED_RESULTS:
        found = results.get(task, {}).get(metric)
        if found is None or not abs(found - value) <= tolerance:  # also for NaN
            wrong.append(f"{task} {metric} is {found if found is None else f'{found:.2f}'}, not {value} ± {tolerance}")
    if wrong:
        raise InputError(f"the results are not those of TEST.EXPECTED_RESULTS: {'; '.join(wrong)}.")
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info("all %d metrics are as in TEST.EXPECTED_RESULTS", len(cfg.TEST.EXPECTED_RESULTS))


def try_two_images(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Quietly run inference and evaluation on two images of each data set in DATASETS.TEST, to fail early.

    The evaluator gets a made-up detection besides the model's, since an untrained model finds nothing.

    Returns:
        Metrics as `evaluate` gives them, without panoptic quality; only their names mean anything.

    Raises:
        ConfigError: the evaluation of a detection fails.
    """
    results = {}
    for name in cfg.DATASETS.TEST:
        dicts = _images(cfg, name)[:2]
        with _quiet():
            if MetadataCatalog.get(name).get("json_file") is None:
                # This converts the data set to a COCO file, which is kept for later evaluations.
                build_evaluator(cfg, name, _folder(cfg, name, Path(cfg.OUTPUT_DIR) / "inference"), whole=False)
            evaluator = MadeUpDetections(build_evaluator(cfg, name, None, whole=False), name)
            loader = build_detection_test_loader(dicts, mapper=_mapper(cfg, name))
            results[name] = inference_on_dataset(model, loader, evaluator)
            if cfg.TEST.AUG.ENABLED:
                inference_on_dataset(GeneralizedRCNNWithTTA(cfg, model), loader, evaluator)
    return results if len(results) != 1 else next(iter(results.values()))


def _test(
    cfg: CfgNode,
    model: nn.Module,
    name: str,
    folder: Path,
    *,
    show: Callable[[str, np.ndarray], None] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Evaluation]]:
    """Return the metrics on one data set by task, and COCO's evaluations; both are empty but on the main process."""
    records, evaluator = _images(cfg, name), build_evaluator(cfg, name, folder)
    pictures = None
    if show is not None:
        pictures = Pictures(evaluator, records[:IMAGES], MetadataCatalog.get(name).get("thing_classes", ()))
    with torch.compiler.set_stance("force_eager"):  # shapes differ from training
        found = inference_on_dataset(model, _loader(cfg, name, records), pictures or evaluator)
    if pictures is not None:
        for title, picture in pictures.drawn():
            show(title, picture)
    # Convert to plain floats: the VOC evaluator's NumPy floats cannot be read back from a checkpoint's metadata.
    metrics = {task: {key: float(value) for key, value in metrics.items()} for task, metrics in found.items()}
    return metrics, evaluations_of(evaluator)


def _loader(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> Loader:
    """Return Detectron2's test loader for a data set's images, with the same kind of worker processes as in training.

    On a GPU, it gives batches of images of the same shape.
    """
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    theirs = build_detection_test_loader(records, mapper=_mapper(cfg, name))
    return Loader(
        theirs.dataset,
        batch_by_shape(cfg, records, theirs.sampler, IMAGES_ON_A_GPU if on_gpu else 1),
        workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=theirs.collate_fn,
        pin_memory=on_gpu,
    )


def _images(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    files = [cfg.DATASETS.PROPOSAL_FILES_TEST[cfg.DATASETS.TEST.index(name)]] if cfg.MODEL.LOAD_PROPOSALS else None
    return get_detection_dataset_dicts(name, filter_empty=False, proposal_files=files)


def _mapper(cfg: CfgNode, name: str) -> Mapper:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (name,)  # where Detectron2 looks for the keypoints' names, even for a test
    return Mapper(cfg, is_train=False)


def _folder(cfg: CfgNode, name: str, folder: Path) -> Path:
    """Return the output folder for a data set, named after it, with a number if the name is already taken."""
    stems = [file_name(entry) for entry in cfg.DATASETS.TEST]
    number = cfg.DATASETS.TEST.index(name)
    again = stems[:number].count(stems[number])
    return folder / (f"{stems[number]}_{again + 1}" if again else stems[number])


def _summary(results: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{task} " + ", ".join(f"{key} {value:.2f}" for key, value in metrics.items() if "-" not in key)  # not by class
        for task, metrics in results.items()
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log and pycocotools' tables: accuracy on two images is meaningless."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
