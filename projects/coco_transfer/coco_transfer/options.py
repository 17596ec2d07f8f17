"""The ResNet paper's Table 9: one network's detector, with one more option in each row."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from tabulate import tabulate

from coco_transfer.plan import CONTEXT, Plan, Step
from coco_transfer.results import average_precision
from coco_transfer.stages import run_stage
from resnet_backbone import detection
from resnet_backbone.detection import load_detector
from resnet_backbone.detection.data.mapper import read_image
from resnet_backbone.detection.inference.detector import Detector
from resnet_backbone.engine.config import get_key, set_key
from resnet_backbone.engine.output import FINAL, versions
from resnet_backbone.weights import atomic_write, write_json

TIMED_IMAGES, ROUNDS = 10, 3
CONTEXT_KEY = "MODEL.ROI_HEADS.GLOBAL_CONTEXT"
# Shorter sides of the paper's {200, 400, 600, 800, 1000} over its usual one.
SCALES = (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)

WHAT_IT_IS = (
    "The options of the ResNet paper's Table 9, each added to those above it. Box refinement comes with box voting and "
    "non-maximum suppression at 0.3, as in the paper. The detector with global context is trained like the baseline, "
    "from the same classifier; the ensemble is it and the same with another seed (in the paper: three networks). "
    "Flips are not in the paper. The paper's numbers are from COCO val; those of its ensemble (†) are from test-dev, "
    "after training on trainval, where its single model has 55.7 / 34.9."
)


class Row(NamedTuple):
    """An option that is added to those of the rows above.

    Attributes:
        title: in the table.
        folder: its name.
        paper: AP50 / AP.
        keys: configuration keys and values.
    """

    title: str
    folder: str
    paper: str
    keys: dict[str, Any]


def measure_options(plan: Plan) -> str:
    """Evaluate and time every row for the network `plan.options`; write the table and return it.

    Finished evaluations are kept.
    """
    net, keys, measured, detectors = plan.options, {}, [], []
    folder = plan.output / net / "options"
    for row in _rows(plan, net):
        keys |= row.keys
        step = Step(stage=CONTEXT if CONTEXT_KEY in keys else "detection", seed=plan.seed)
        weights = plan.folder(net, step) / FINAL
        cfg = plan.config(net, step)
        for key, value in {**keys, "MODEL.WEIGHTS": str(weights), "OUTPUT_DIR": str(folder / row.folder)}.items():
            set_key(cfg, key, value, "coco_transfer")
        found = average_precision(run_stage(cfg, evaluate, processes=plan.processes, parallel=1)["bbox"])
        measured.append({"option": row.title, "paper": row.paper, "AP50": found["AP50"], "AP": found["AP"]})
        as_evaluated = {**keys, **{key: get_key(cfg, key) for key in ("MODEL.DEVICE", "MODEL.ACCELERATE")}}
        detectors.append(load_detector(weights, opts=[str(word) for pair in as_evaluated.items() for word in pair]))
    for row, seconds in zip(measured, _seconds(detectors, plan.detection_data[1]), strict=True):
        row["seconds"] = seconds
    results = {"network": net, "versions": versions(), "rows": measured, "plan": plan.fixed()}
    write_json(plan.output / "options.json", results)
    text = _table(plan, measured)
    with atomic_write(plan.output / "options.md") as file:
        file.write(text.encode())
    return text


def evaluate(cfg: CfgNode, *, resume: bool = False) -> None:
    """Evaluate MODEL.WEIGHTS and keep the metrics as a training's are kept."""
    results = detection.run(cfg, resume=resume, eval_only=True)
    if comm.is_main_process():
        write_json(Path(cfg.OUTPUT_DIR) / "results.json", results)


def _rows(plan: Plan, net: str) -> list[Row]:
    shorter = plan.config(net, Step(stage="detection", seed=plan.seed)).INPUT.MIN_SIZE_TEST
    crop = plan.config(net, Step(stage="pretrain", seed=plan.seed)).INPUT.CROP.SIZE[0]
    refinement = {"TEST.BOX_REFINEMENT": True, "TEST.BOX_VOTING": True, "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3}
    scales = {
        "TEST.MULTI_SCALE.MIN_SIZES": tuple(round(scale * shorter) for scale in SCALES),
        "TEST.MULTI_SCALE.REGION_SIZE": crop,
    }
    other = plan.folder(net, plan.context_steps()[1]) / FINAL
    return [
        Row("baseline", "1_baseline", "48.4 / 27.2", {}),
        Row("+ box refinement and voting", "2_refinement", "49.9 / 29.9", refinement),
        Row("+ global context", "3_context", "51.1 / 30.0", {CONTEXT_KEY: True}),
        Row("+ multi-scale testing", "4_multi_scale", "53.8 / 32.5", scales),
        Row("+ ensemble", "5_ensemble", "59.0 / 37.4 †", {"TEST.ENSEMBLE": (str(other),)}),
        Row("+ flips", "6_flips", "", {"TEST.FLIP": True}),
    ]


def _seconds(detectors: Sequence[Detector], test_set: str) -> list[float]:
    """Return each detector's seconds per image: the median over rounds in which they take turns."""
    records = DatasetCatalog.get(test_set)
    files = [record["file_name"] for record in records[:: max(1, len(records) // TIMED_IMAGES)][:TIMED_IMAGES]]
    images = [read_image(file, "RGB") for file in files]
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([])
        for detector in detectors:
            start = time.perf_counter()
            for image in images:
                detector(image)
            rounds[-1].append((time.perf_counter() - start) / len(images))
    return [statistics.median(of_one) for of_one in zip(*rounds, strict=True)]


def _table(plan: Plan, measured: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            row["option"],
            f"{row['AP50']:.1f}",
            f"{row['AP']:.1f}",
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / measured[0]['seconds']:.1f}",
            row["paper"],
        ]
        for row in measured
    ]
    headers = ["option", "AP50", "AP", "seconds per image", "× baseline", "paper AP50 / AP"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 5)
    width = plan.config(plan.options, Step(stage="detection", seed=plan.seed)).MODEL.NETWORK.WIDTH
    setup = (
        f"{plan.options}, width {width:g}, scale {plan.scale}, seed {plan.seed}; {versions()}, "
        f"threads: {torch.get_num_threads()}. Seconds: resizing and detecting on one image at a time, the median of "
        f"{ROUNDS} rounds over {TIMED_IMAGES} images, in which the rows take turns."
    )
    return f"# The options of Table 9: {plan.options}, {plan.scale}\n\n{WHAT_IT_IS}\n\n{table}\n\n{setup}\n"
