"""The runs, and the two versions of one trained detector on the same images."""

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from torch import nn

from resnet_backbone import detection
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.task import Detection
from resnet_backbone.engine.config import CfgNode, load_config
from resnet_backbone.engine.output import FINAL, versions

SIDES = {"Detectron2's modules": False, "accelerated": True}  # MODEL.ACCELERATE


def compare(file: str, keys: Sequence[str], output: Path, *, seeds: Sequence[int], images: int) -> dict[str, Any]:
    """Train each side with each seed; compare detections of one of the trained detectors.

    A run that is done already is not done again.

    Args:
        file: configuration, as `--config-file`.
        keys: KEY, VALUE, … on top of it.
        output: gets a folder for each run.
        images: test images for the comparison of detections.
    """
    runs = []
    for seed, (side, accelerated) in itertools.product(seeds, SIDES.items()):
        folder = output / f"{'accelerated' if accelerated else 'stock'}_{seed}"
        if not (folder / FINAL).exists():
            detection.run(_load(file, keys, folder, seed, accelerated))
        metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        results = json.loads((folder / "results.json").read_text())
        runs.append({"side": side, "seed": seed, "losses": _losses(metrics), "AP50": results["bbox"]["AP50"]})
    folder = output / f"stock_{seeds[0]}"
    cfg = _load(file, [*keys, "MODEL.WEIGHTS", str(folder / FINAL)], output / "detections", seeds[0], False)
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "iterations": cfg.SOLVER.MAX_ITER,
        "runs": runs,
        "detections": compare_detections(cfg, images),
    }


def _load(file: str, keys: Sequence[str], folder: Path, seed: int, accelerated: bool) -> CfgNode:
    words = [*keys, "OUTPUT_DIR", str(folder), "SEED", str(seed), "MODEL.ACCELERATE", str(accelerated)]
    return load_config(detection.get_config(), file, words)


def _losses(metrics: Sequence[dict[str, float]]) -> dict[int, float]:
    return {line["iteration"] + 1: line["total_loss"] for line in metrics if "total_loss" in line}


def compare_detections(cfg: CfgNode, images: int) -> dict[str, Any]:
    """Detect with the trained detector in cfg.MODEL.WEIGHTS, as it is and accelerated, in float32."""
    cfg.SOLVER.AMP.ENABLED = False
    plain = Detection(cfg).build(None, eval_only=True).eval()
    faster = accelerate(copy.deepcopy(plain))
    mapper = Mapper(cfg, is_train=False)
    found = {"images": 0, "detections": 0, "box": 0.0, "score": 0.0, "classes": 0, "unmatched": 0}
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:images]:
        one, other = (_detect(model, mapper(record)) for model in (plain, faster))
        found["images"] += 1
        found["detections"] += len(one["scores"])
        unmatched = abs(len(one["scores"]) - len(other["scores"]))
        found["unmatched"] += unmatched
        if not unmatched and len(one["scores"]):
            found["box"] = max(found["box"], (one["boxes"] - other["boxes"]).abs().max().item())
            found["score"] = max(found["score"], (one["scores"] - other["scores"]).abs().max().item())
            found["classes"] += int((one["classes"] != other["classes"]).sum())
    return found


@torch.no_grad()
def _detect(model: nn.Module, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return detections in the order of class, then score: equal scores of two classes may swap their places."""
    instances = model([record])[0]["instances"]
    order = (instances.pred_classes * 2 - instances.scores).argsort(stable=True)
    return {
        "boxes": instances.pred_boxes.tensor[order],
        "scores": instances.scores[order],
        "classes": instances.pred_classes[order],
    }
