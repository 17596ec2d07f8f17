"""Figures for a finished plan: training curves, detections next to ground truth, and AP over depth."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from coco_transfer.plan import Plan
from coco_transfer.results import detection_files, summarize
from resnet_backbone.detection.data import datasets
from resnet_backbone.weights import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CURVE_POINTS = 100
SHOWN_IMAGES = 5
LOWEST_SCORE = 0.5
TRUTH = "#ffffff"
ARROW = "#777777"
# Color, marker and label by whether a network has norms and shortcuts.
TRAITS = {
    (False, False): ("#555555", "o", "no batch norm, no shortcuts"),
    (True, False): ("C1", "s", "{norm}, no shortcuts"),
    (False, True): ("C2", "v", "no batch norm, shortcuts"),
    (True, True): ("C0", "D", "{norm}, shortcuts"),
}


def draw_curves(plan: Plan, path: Path) -> None:
    """Plot pretraining error and detection loss over iterations, one color per network, controls dashed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for number, net in enumerate(plan.nets):
        for step in plan.steps(net, plan.seed):
            folder = plan.folder(net, step)
            if step.stage == "detection":
                _curve(right, folder, "total_loss", color=f"C{number}", linestyle="--" if step.control else "-")
            elif step.stage == "pretrain" and not step.control:
                _curve(left, folder, "top1_error", label=net, color=f"C{number}")
    left.set(title="pretraining", xlabel="iteration", ylabel="top-1 training error (%)", ylim=(0, 100))
    title = "detection" + (" (dashed: random backbone)" if plan.control else "")
    right.set(title=title, xlabel="iteration", ylabel="training loss (all four terms)", ylim=(0, None))
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_detections(plan: Plan, path: Path) -> None:
    """Draw test images in rows: ground truth, then each network's detections.

    Those with a score of at least 0.5, or an image's best one if there are none.
    """
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
        if (file := next(detection_files(plan, net))) is not None:
            rows.append((net, _detections(file, ids)))
    images = [cv2.cvtColor(cv2.imread(record["file_name"]), cv2.COLOR_BGR2RGB) for record in records]
    height = 2.6 * max(image.shape[0] / image.shape[1] for image in images) + 0.1
    figure, axes = plt.subplots(
        len(rows), len(records), figsize=(2.6 * len(records), height * len(rows)), layout="constrained", squeeze=False
    )
    for (title, boxes), line in zip(rows, axes, strict=True):
        for record, image, ax in zip(records, images, line, strict=True):
            ax.imshow(image)
            for box, category, score in boxes.get(record["image_id"], ()):
                text = names[category] + ("" if score is None else f" {score:.2f}")
                _draw_box(ax, box, text, f"C{category % 10}")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=11)
    _save(figure, path)


def draw_factors(results: dict[str, Any], path: Path) -> None:
    """Plot AP50 and AP over depth, in a style for each set of traits; controls are hollow.

    A line connects networks of a family with the same traits; an arrow shows what is added at the same depth.
    """
    networks, traits = results["networks"], results["traits"]
    alike = defaultdict(list)
    for net in sorted(networks, key=lambda net: traits[net]["layers"]):
        alike[tuple(traits[net][key] for key in ("family", "norm", "shortcuts"))].append(net)
    repeated = any("repeats" in row for row in networks.values())
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    legend = {}
    for axes, key in zip(panels, ("AP50", "AP"), strict=True):
        for (_, norm, shortcuts), nets in alike.items():
            color, marker, label = TRAITS[norm is not None, shortcuts]
            label = label.format(norm=norm)
            style = {"color": color, "marker": marker, "markersize": 7}
            depths = [traits[net]["layers"] for net in nets]
            found = [summarize(networks[net], key) for net in nets]
            deviations = [one.deviation or 0 for one in found]
            legend[label] = axes.errorbar(depths, [one.mean for one in found], deviations, capsize=3, **style)
            for net, depth, one, following in zip(nets, depths, found, [*found[1:], None], strict=True):
                # On the side of the line that leads on where it does not cross the name.
                height = -13 if following is not None and following.mean > one.mean else 4
                axes.annotate(net, (depth, one.mean), xytext=(7, height), textcoords="offset points", color=color)
            if all("control" in networks[net] for net in nets):
                values = [networks[net]["control"][key] for net in nets]
                axes.plot(depths, values, "--", markerfacecolor="white", **style)
        for one in results["comparisons"]:
            _draw_arrow(axes, results, one, key)
        title = f"{key}, mean ± standard deviation over seeds" if repeated else key
        axes.set(title=title, xlabel="depth (convolutions and fully connected layers)", ylabel=f"{key} (%)")
        ticks = sorted({one["layers"] for one in traits.values()})
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.set_xticks([], minor=True)
        axes.margins(y=0.1)
        axes.set(xlim=(ticks[0] / 1.4, ticks[-1] * 1.6), ylim=(0, None))
        axes.grid(alpha=0.3)
    if any("control" in row for row in networks.values()):
        legend["random backbone"] = plt.Line2D([], [], color=ARROW, linestyle="--", marker="o", markerfacecolor="white")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    _save(figure, path)


def _draw_arrow(axes: plt.Axes, results: dict[str, Any], comparison: dict[str, Any], key: str) -> None:
    """Draw an arrow between two networks of the same depth, with what the second has more."""
    nets = comparison["first"], comparison["second"]
    (depth, start), (other_depth, end) = (
        (results["traits"][net]["layers"], summarize(results["networks"][net], key).mean) for net in nets
    )
    if depth != other_depth:
        return
    arrow = {"arrowstyle": "->", "color": ARROW, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", (depth, end), (depth, start), arrowprops=arrow)
    place = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(comparison["factor"], (depth, (start + end) / 2), fontsize=8, color=ARROW, rotation=90, **place)


def _curve(axes: plt.Axes, folder: Path, key: str, **style: Any) -> None:
    """Plot a metric over iterations, averaged to 100 points; after a resume, an iteration's later reading wins."""
    points = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        if key in record and math.isfinite(record[key]):
            points[record["iteration"]] = record[key]
    readings = np.array(sorted(points.items())).reshape(-1, 2)
    groups = np.array_split(readings, min(len(readings), CURVE_POINTS) or 1)
    means = np.array([group.mean(axis=0) for group in groups if len(group)]).reshape(-1, 2)
    axes.plot(*means.T, linewidth=1.4, **style)


def _detections(file: Path, ids: dict[int, int]) -> dict[Any, list]:
    """Read the boxes `[x, y, width, height]`, classes and scores that are shown, by image id."""
    found = defaultdict(list)
    for item in sorted(json.loads(file.read_text()), key=lambda item: -item["score"]):
        if item["score"] >= LOWEST_SCORE or item["image_id"] not in found:
            category = ids.get(item["category_id"], item["category_id"])
            found[item["image_id"]].append((item["bbox"], category, item["score"]))
    return found


def _draw_box(ax: plt.Axes, box: list[float], text: str, color: str) -> None:
    x, y, width, height = box
    ax.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=TRUTH, linewidth=2.4))
    ax.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.4))
    label = {"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.85}
    above = "bottom" if y > 0.08 * ax.get_ylim()[0] else "top"  # a label that the image's edge would cut goes inside
    ax.text(x, y, text, fontsize=6.5, color="white", verticalalignment=above, bbox=label, clip_on=True)


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=80)
    plt.close(figure)
