"""The evaluator for each type of data set, as in Detectron2's own training script."""

import importlib.util
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from resnet_backbone.detection.evaluation.average_precision import Evaluation
from resnet_backbone.detection.evaluation.coco import FastCOCOEvaluator
from resnet_backbone.engine.config import ConfigError

TYPES = ("coco", "coco_panoptic_seg", "sem_seg", "pascal_voc", "lvis")


def build_evaluator(cfg: CfgNode, name: str, folder: Path | None, *, whole: bool = True) -> DatasetEvaluator:
    """Return the evaluator for the data set's type.

    Args:
        name: name of a registered data set.
        folder: output folder for the detections as JSON; None keeps them in memory.
        whole: whether all images will be evaluated; panoptic quality cannot be computed on some of them.
    """
    output_dir = None if folder is None else str(folder)
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")  # custom data sets may not set one
    if kind not in TYPES:
        raise ConfigError(
            f"DATASETS.TEST {name} is evaluated as {kind!r}, which tools/train_net.py does not support; it supports "
            f"{', '.join(TYPES)}. Set DATASETS.TEST to a data set of these types."
        )
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    if kind == "lvis":
        return LVISEvaluator(name, output_dir=output_dir)
    evaluators = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(name, output_dir=output_dir))
    if kind in ("coco", "coco_panoptic_seg"):
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        evaluators.append(FastCOCOEvaluator(name, output_dir=output_dir, kpt_oks_sigmas=sigmas))
    if kind == "coco_panoptic_seg":
        if importlib.util.find_spec("panopticapi") is None:
            raise ConfigError(
                f"DATASETS.TEST {name} is evaluated by panoptic quality, which panopticapi computes, and that is not "
                "installed. Run pip install git+https://github.com/cocodataset/panopticapi.git"
            )
        if whole:
            evaluators.append(COCOPanopticEvaluator(name, output_dir))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def evaluations_of(evaluator: DatasetEvaluator) -> dict[str, Evaluation]:
    """Return a used evaluator's evaluations by COCO's metrics, by task; empty for others, and without detections."""
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    return next((part.evaluations for part in parts if isinstance(part, FastCOCOEvaluator)), {})
