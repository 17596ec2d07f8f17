"""The comparison as Markdown: a table, what it says, and how it was run."""

from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate

from coco_transfer.factor_section import factor_section
from coco_transfer.plan import STAGES
from coco_transfer.results import METRICS, seeds_of, signed, summarize
from resnet_backbone.weights import atomic_write

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

OVER_SEEDS = (
    " Over several seeds: mean ± sample standard deviation; seconds are means. A control has the first seed alone, and "
    "so have the figures of training and detections."
)


def write_report(results: dict[str, Any], path: Path) -> str:
    """Write the comparison as Markdown and return it."""
    networks = results["networks"]
    rows = []
    for net, row in networks.items():
        seeds = len(seeds_of(row))
        rows.append(_row(net if seeds == 1 else f"{net} ({seeds} seeds)", net, row))
        if "control" in row:
            rows.append(_row("↳ control", None, row["control"]))
    factors = factor_section(results)
    repeated = any("repeats" in row for row in networks.values())
    headers = ["network", "top-1 %", *METRICS, "paper AP50 / AP", "seconds"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 9)
    parts = [
        f"# Backbones in Faster R-CNN: {results['scale']}",
        _what_it_is(results),
        table,
        "Top-1 accuracy of the pretrained classifier, box AP of the detector, all in percent. A control is the same "
        "detector and schedule on the network's initial weights (He initialization, batch norm statistics estimated on "
        "training images and fixed, no stage frozen). Seconds: pretraining + detection, evaluation included. The "
        "paper's column is COCO val (Table 8) and comparable only at full scale." + (OVER_SEEDS if repeated else ""),
        _sentences(results, intervals=not factors),
        "![training curves](curves.png)",
        "![detections](detections.jpg)",
        *factors,
        "## How it was run",
        _setup(results),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
    return text


def _what_it_is(results: dict[str, Any]) -> str:
    """Describe the scale and how the networks differ from the paper's."""
    text = WHAT_IT_IS[results["scale"]]
    widths = {f"{row['width']:g}" for row in results["networks"].values()} - {"1"}
    if widths and results["scale"] not in ("demo", "quarter"):  # their descriptions already say so
        text += f" The networks have {' and '.join(sorted(widths))} of their channels."
    return text


def _row(title: str, net: str | None, row: dict[str, Any]) -> list[str]:
    paper = PAPER.get(net)
    pretrain, detect = (fmean(one["seconds"][stage] for one in seeds_of(row)) for stage in STAGES)
    resumed = any(one["resumed"] for one in seeds_of(row))
    return [
        title,
        str(summarize(row, "top1")) if net else "",
        *(str(summarize(row, key) or "–") for key in METRICS),
        f"{paper['AP50']} / {paper['AP']}" if paper else "",
        f"{pretrain:.0f} + {detect:.0f}" + (" (resumed)" if resumed else ""),
    ]


def _sentences(results: dict[str, Any], *, intervals: bool) -> str:
    """Summarize the table in words, with `intervals` where no section does it."""
    lines = []
    networks = results["networks"]
    for net, row in networks.items():
        if "control" in row:
            gain = summarize(row, "AP50").mean - row["control"]["AP50"]
            lines.append(f"- {net}: pretraining is worth {signed(gain)} points of AP50 over the random backbone.")
    if {"vgg16", "resnet101"} <= set(networks):
        ap50, ap = (
            summarize(networks["resnet101"], key).mean - summarize(networks["vgg16"], key).mean
            for key in ("AP50", "AP")
        )
        lines.append(
            f"- ResNet-101 against VGG-16: {signed(ap50)} points of AP50 and {signed(ap)} of AP here; in the paper "
            f"+6.9 and +6.0.{_interval_words(results) if intervals else ''}"
        )
    return "\n".join(lines)


def _interval_words(results: dict[str, Any]) -> str:
    """Tell the intervals of the one pair of networks, if there are any."""
    (comparison,) = results["comparisons"]
    if "intervals" not in comparison:
        return ""
    (low, high), (low_ap, high_ap) = (comparison["intervals"][key] for key in ("AP50", "AP"))
    return (
        f" Of {results['resamples']:,} resamples of the {results['test_images']:,} test images, 95% give differences "
        f"from {signed(low)} to {signed(high)} and from {signed(low_ap)} to {signed(high_ap)}."
    )


def _setup(results: dict[str, Any]) -> str:
    lines = []
    for one in (conditions := results["conditions"]):
        which = f"{one['stages']} of {sum(each['stages'] for each in conditions)} stages: " if conditions[1:] else ""
        shared = f", shared by {one['parallel']} networks at a time" if one["parallel"] > 1 else ""
        lines += [f"- {which}{one['versions']}", f"- {one['machine']}{shared}; seed {results['seed']}"]
    for net, row in results["networks"].items():
        pretrain, detect = row["schedule"]["pretrain"], row["schedule"]["detection"]
        lines.append(
            f"- {net}, width {row['width']:g}: pretraining {pretrain['iterations']:,} iterations of "
            f"{pretrain['batch']} images at crops of {row['crop'][0]} pixels, learning rate {pretrain['lr']:g}; "
            f"detection {detect['iterations']:,} iterations of {detect['batch']} images with a shorter side of "
            f"{row['shorter_side']}, learning rate {detect['lr']:g}, {row['pooler']} of "
            f"{row['roi_size']}×{row['roi_size']}{_further_seeds(row)}."
        )
    plan = results["plan"]
    for key in ("pretrain_data", "detection_data"):
        if plan[key]:
            lines.append(f"- {key.replace('_', ' ')}: `{'`, `'.join(plan[key])}`")
    for key in ("pretrain_keys", "detection_keys"):
        if plan[key]:
            lines.append(f"- {key.replace('_', ' ')} set over the scale's own: `{' '.join(plan[key])}`")
    return "\n".join(lines)


def _further_seeds(row: dict[str, Any]) -> str:
    seeds = [str(one["seed"]) for one in row.get("repeats", ())]
    return f"; also with seed {' and '.join(seeds)}" if seeds else ""
