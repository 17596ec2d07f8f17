"""Figures for a finished plan: training curves, and detections next to ground truth."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import matplotlib
from detectron2.data import DatasetCatalog, MetadataCatalog

from coco_transfer.plan import Plan
from resnet_backbone.detection.data import datasets
from resnet_backbone.weights import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN_IMAGES = 5
LOWEST_SCORE = 0.5
TRUTH = "#ffffff"


def draw_curves(plan: Plan, path: Path) -> None:
    """Plot pretraining error and detection loss over iterations, one color per network, controls dashed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for number, net in enumerate(plan.nets):
        _curve(left, plan.folder(net, "pretrain"), "top1_error", label=net, color=f"C{number}")
        for control in (False, True) if plan.control else (False,):
            folder = plan.folder(net, "detection", control=control)
            label, style = (f"{net}, random backbone", "--") if control else (net, "-")
            _curve(right, folder, "total_loss", label=label, color=f"C{number}", linestyle=style)
    left.set(title="pretraining", xlabel="iteration", ylabel="top-1 training error (%)", ylim=(0, 100))
    right.set(title="detection", xlabel="iteration", ylabel="training loss (all four terms)", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    _save(figure, path)


def draw_detections(plan: Plan, path: Path) -> None:
    """Draw test images in rows: ground truth, then each network's detections with scores above 0.5."""
    name = plan.detection_data[1]
    names = datasets.class_names(name, plan.output)
    records = [record for record in DatasetCatalog.get(name) if record.get("annotations")]
    records = records[:: max(1, len(records) // SHOWN_IMAGES)][:SHOWN_IMAGES]
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id", {})
    rows = [
        (
            "ground truth",
            {r["image_id"]: [(a["bbox"], a["category_id"], None) for a in r["annotations"]] for r in records},
        )
    ]
    for net in plan.nets:
        if (found := _detections(plan.folder(net, "detection"), ids)) is not None:
            rows.append((net, found))
    figure, axes = plt.subplots(
        len(rows), len(records), figsize=(2.6 * len(records), 2.7 * len(rows)), constrained_layout=True, squeeze=False
    )
    for (title, boxes), line in zip(rows, axes, strict=True):
        for record, ax in zip(records, line, strict=True):
            ax.imshow(cv2.cvtColor(cv2.imread(record["file_name"]), cv2.COLOR_BGR2RGB))
            for box, category, score in boxes.get(record["image_id"], ()):
                _draw_box(ax, box, names[category] + (f" {score:.2f}" if score else ""), f"C{category % 10}")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=11)
    _save(figure, path)


def _curve(axes: plt.Axes, folder: Path, key: str, **style: Any) -> None:
    """Plot a metric over iterations, as logged; after a resume, an iteration's later reading wins."""
    points = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        if key in record and math.isfinite(record[key]):
            points[record["iteration"]] = record[key]
    axes.plot(sorted(points), [points[i] for i in sorted(points)], linewidth=1.4, **style)


def _detections(folder: Path, ids: dict[int, int]) -> dict[Any, list] | None:
    """Read boxes `[x, y, width, height]`, classes and scores by image id; None if there is no COCO-format output."""
    files = sorted((folder / "inference").glob("*/coco_instances_results.json"))
    if not files:
        return None
    found = defaultdict(list)
    for item in json.loads(files[0].read_text()):
        if item["score"] >= LOWEST_SCORE:
            category = ids.get(item["category_id"], item["category_id"])
            found[item["image_id"]].append((item["bbox"], category, item["score"]))
    return found


def _draw_box(ax: plt.Axes, box: list[float], text: str, color: str) -> None:
    x, y, width, height = box
    ax.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=TRUTH, linewidth=2.4))
    ax.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.4))
    label = {"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.85}
    ax.text(x, y, text, fontsize=6.5, color="white", verticalalignment="bottom", bbox=label, clip_on=True)


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
