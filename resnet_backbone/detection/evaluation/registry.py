"""The evaluator for each type of data set."""

from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from resnet_backbone.engine.config import ConfigError


def build_evaluator(name: str, folder: Path | None) -> DatasetEvaluator:
    """Return the evaluator for the data set's type.

    Args:
        name: name of a registered data set.
        folder: output folder for the detections as JSON; None keeps them in memory.
    """
    output_dir = None if folder is None else str(folder)
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")  # custom data sets may not set one
    if kind == "coco":
        return COCOEvaluator(name, output_dir=output_dir, use_fast_impl=False)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    if kind == "lvis":
        return LVISEvaluator(name, output_dir=output_dir)
    raise ConfigError(
        f"DATASETS.TEST {name} is evaluated as {kind!r}, which tools/train_net.py does not support; it supports "
        "coco, pascal_voc and lvis. Set DATASETS.TEST to a data set of these types."
    )
