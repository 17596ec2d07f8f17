"""A finished plan's numbers and the table that shows them."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from coco_transfer.plan import Plan
from resnet_backbone.engine.output import versions
from resnet_backbone.weights import atomic_write

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# He et al. 2015, Table 8, COCO val: mAP@.5 and mAP@[.5, .95] in percent.
PAPER = {"vgg16": {"AP50": 41.5, "AP": 21.2}, "resnet101": {"AP50": 48.4, "AP": 27.2}}

WHAT_IT_IS = {
    "demo": "Generated shapes at a quarter of the width and small images: it shows that every stage works and that "
    "what was learned in pretraining is carried into the detector. The order of the networks need not be the paper's "
    "at this size.",
    "quarter": "The paper's method at a quarter of the width, on small photographs, with a short schedule. The order "
    "of the networks need not be the paper's at this size.",
    "subset": "The paper's method on other data than the paper's, with a short schedule. The order of the networks "
    "need not be the paper's at this size.",
    "paper": "ImageNet and COCO 2014 with the paper's schedule. Different from the paper: RPN and Fast R-CNN are "
    "trained jointly, not in turns.",
}


def collect_results(plan: Plan) -> dict[str, Any]:
    """Collect all measurements and what it takes to reproduce them."""
    networks = {}
    for net in plan.nets:
        networks[net] = _network(plan, net, control=False)
        if plan.control:
            networks[net]["control"] = _network(plan, net, control=True)
    return {
        "scale": plan.scale,
        "seed": plan.seed,
        "versions": versions(),
        "machine": f"{os.cpu_count()} CPU cores, threads: {torch.get_num_threads()}, {platform.machine()}, "
        f"{platform.system()} {platform.release()}",
        "parallel": plan.parallel,
        "networks": networks,
    }


def write_report(results: dict[str, Any], path: Path) -> str:
    """Write the comparison as Markdown and return it."""
    networks = results["networks"]
    rows = []
    for net, row in networks.items():
        rows.append(_row(net, net, row))
        if "control" in row:
            rows.append(_row("↳ control", None, row["control"]))
    headers = ["network", "top-1 %", *METRICS, "paper AP50 / AP", "seconds"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 9)
    parts = [
        f"# VGG-16 and ResNet-101 in Faster R-CNN: {results['scale']}",
        _what_it_is(results),
        table,
        "Top-1 accuracy of the pretrained classifier, box AP of the detector, all in per cent. A control is the same "
        "detector and schedule on the network's initial weights (He initialization, batch norm statistics estimated on "
        "training images and fixed, no stage frozen). Seconds: pretraining + detection, evaluation included. The "
        "paper's column is COCO val (Table 8) and comparable only at full scale.",
        *_sentences(networks),
        "![training curves](curves.png)",
        "![detections](detections.png)",
        "## How it was run",
        _setup(results),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
    return text


def _network(plan: Plan, net: str, *, control: bool) -> dict[str, Any]:
    pretrain, detect = (
        json.loads((plan.folder(net, stage, control=control) / "stage.json").read_text())
        for stage in ("pretrain", "detection")
    )
    cfgs = plan.pretrain_config(net, control=control), plan.detection_config(net, control=control)
    return {
        "top1": pretrain["top1"],
        **_average_precision(detect["bbox"]),
        "seconds": {"pretrain": pretrain["seconds"], "detection": detect["seconds"]},
        "resumed": pretrain["resumed"] or detect["resumed"],
        "schedule": {
            stage: {"iterations": cfg.SOLVER.MAX_ITER, "batch": cfg.SOLVER.IMS_PER_BATCH, "lr": cfg.SOLVER.BASE_LR}
            for stage, cfg in zip(("pretrain", "detection"), cfgs, strict=True)
        },
        "width": cfgs[0].MODEL.NETWORK.WIDTH,
        "crop": list(cfgs[0].INPUT.CROP.SIZE),
        "shorter_side": cfgs[1].INPUT.MIN_SIZE_TEST,
        "pooler": cfgs[1].MODEL.ROI_BOX_HEAD.POOLER_TYPE,
        "roi_size": cfgs[1].MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
    }


def _what_it_is(results: dict[str, Any]) -> str:
    """Describe the scale and how the networks differ from the paper's."""
    text = WHAT_IT_IS[results["scale"]]
    widths = {f"{row['width']:g}" for row in results["networks"].values()} - {"1"}
    if widths and results["scale"] not in ("demo", "quarter"):  # their descriptions already say so
        text += f" The networks have {' and '.join(sorted(widths))} of their channels."
    return text


def _average_precision(bbox: dict[str, float | None]) -> dict[str, float | None]:
    """A detector's metrics; with no detections, AP is 0 instead of Detectron2's NaN (null in JSON)."""
    found = {key: bbox[key] for key in METRICS if key in bbox}
    return {key: 0.0 if value is None and bbox["AP"] is None else value for key, value in found.items()}


def _row(title: str, net: str | None, row: dict[str, Any]) -> list[str]:
    paper = PAPER.get(net)
    metrics = [f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in METRICS]
    seconds = row["seconds"]
    return [
        title,
        f"{row['top1']:.1f}" if net else "",
        *metrics,
        f"{paper['AP50']} / {paper['AP']}" if paper else "",
        f"{seconds['pretrain']:.0f} + {seconds['detection']:.0f}" + (" (resumed)" if row["resumed"] else ""),
    ]


def _sentences(networks: dict[str, Any]) -> list[str]:
    """Summarize the table in words."""
    lines = []
    for net, row in networks.items():
        if "control" in row:
            gain = row["AP50"] - row["control"]["AP50"]
            lines.append(f"- {net}: pretraining is worth {gain:+.1f} points of AP50 over the random backbone.")
    if {"vgg16", "resnet101"} <= set(networks):
        vgg, resnet = networks["vgg16"], networks["resnet101"]
        lines.append(
            f"- ResNet-101 against VGG-16: {resnet['AP50'] - vgg['AP50']:+.1f} points of AP50 and "
            f"{resnet['AP'] - vgg['AP']:+.1f} of AP here; in the paper +6.9 and +6.0."
        )
    return ["\n".join(lines)]


def _setup(results: dict[str, Any]) -> str:
    shared = f"shared by {results['parallel']} networks at a time; " if results["parallel"] > 1 else ""
    lines = [f"- {results['versions']}", f"- {results['machine']}; {shared}seed {results['seed']}"]
    for net, row in results["networks"].items():
        pretrain, detect = row["schedule"]["pretrain"], row["schedule"]["detection"]
        lines.append(
            f"- {net}, width {row['width']:g}: pretraining {pretrain['iterations']:,} iterations of "
            f"{pretrain['batch']} images at crops of {row['crop'][0]} pixels, learning rate {pretrain['lr']:g}; "
            f"detection {detect['iterations']:,} iterations of {detect['batch']} images with a shorter side of "
            f"{row['shorter_side']}, learning rate {detect['lr']:g}, {row['pooler']} of "
            f"{row['roi_size']}×{row['roi_size']}."
        )
    plan = results["plan"]
    for key in ("pretrain_data", "detection_data"):
        if plan[key]:
            lines.append(f"- {key.replace('_', ' ')}: `{'`, `'.join(plan[key])}`")
    for key in ("pretrain_keys", "detection_keys"):
        if plan[key]:
            lines.append(f"- {key.replace('_', ' ')} set over the scale's own: `{' '.join(plan[key])}`")
    return "\n".join(lines)
