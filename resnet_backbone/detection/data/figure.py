"""A figure of one or two detection data sets: objects and images of each class, box sizes and aspect ratios."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from resnet_backbone.detection.data.check import Report
from resnet_backbone.detection.data.statistics import LARGE, SMALL, box_sides, class_counts, size_shares
from resnet_backbone.weights import atomic_write

UNEVEN = 20  # a class this many times as frequent as another makes the axis logarithmic
COLORS = ("C0", "C1")


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw the data sets' classes above their box sizes and aspect ratios, as a PNG."""
    classes = list(dict.fromkeys(name for report in reports for name in report.contents.class_names))
    figure = Figure(figsize=(max(12, min(0.22 * len(classes) + 2, 60)), 9), layout="constrained")
    above, sizes, ratios = figure.subplot_mosaic([["classes", "classes"], ["sizes", "ratios"]]).values()
    _draw_classes(above, reports, classes)
    _draw_sizes(sizes, reports)
    _draw_ratios(ratios, reports)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=80)


def _draw_classes(axes: Axes, reports: Sequence[Report], classes: Sequence[str]) -> None:
    """Draw a bar for the objects of each class and a darker one within it for the images, the most frequent first."""
    totals = dict.fromkeys(classes, 0)
    counted = []
    for report in reports:
        names = report.contents.class_names
        objects, images = (dict(zip(names, counts, strict=True)) for counts in class_counts(report.contents))
        counted.append((objects, images))
        for name, count in objects.items():
            totals[name] += count
    order = sorted(classes, key=lambda name: -totals[name])
    width = 0.8 / len(reports)
    for number, (report, both) in enumerate(zip(reports, counted, strict=True)):
        places = np.arange(len(order)) + (number - (len(reports) - 1) / 2) * width
        for word, counts, share, opacity in zip(("objects", "images"), both, (1, 0.6), (0.4, 1)):
            bars = [counts.get(name, 0) for name in order]
            label = f"{word}, {_label(report)}"
            axes.bar(places, bars, width * share, color=COLORS[number], alpha=opacity, label=label)
    counts = [count for objects, _ in counted for count in objects.values() if count]
    largest, smallest = max(counts, default=1), min(counts, default=1)
    if largest > UNEVEN * smallest:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=8 if len(order) > 30 else 10)
    axes.set(title="objects of each class, and images with at least one", xlim=(-1, len(order)))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper right")


def _draw_sizes(axes: Axes, reports: Sequence[Report]) -> None:
    sizes = [np.sqrt(box_sides(report.contents).prod(1)) for report in reports]
    for number, (report, each) in enumerate(zip(reports, sizes, strict=True)):
        if len(each):
            small, medium, large = size_shares(report.contents)
            label = f"{_label(report)}: {small:.0%} small, {medium:.0%} medium, {large:.0%} large"
            _histogram(axes, each, _bins(sizes), COLORS[number], label)
    for limit in (SMALL, LARGE):
        axes.axvline(limit, color="black", linewidth=0.8, linestyle="--")
    above = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 9}
    axes.text(SMALL / 1.1, 1.0, "small", ha="right", **above)
    axes.text((SMALL * LARGE) ** 0.5, 1.0, "medium", ha="center", **above)
    axes.text(LARGE * 1.1, 1.0, "large", ha="left", **above)
    axes.set(xlabel="square root of the box's area (pixels)", ylabel="share of the objects (%)")
    axes.set_title("box sizes", pad=16)
    _finish(axes)


def _draw_ratios(axes: Axes, reports: Sequence[Report]) -> None:
    ratios = [sides[:, 0] / sides[:, 1] for sides in (box_sides(report.contents) for report in reports)]
    for number, (report, each) in enumerate(zip(reports, ratios, strict=True)):
        if len(each):
            _histogram(axes, each, _bins(ratios), COLORS[number], _label(report))
    for ratio in (0.5, 1, 2):
        axes.axvline(ratio, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="width / height; dashed: the usual anchors' 1:2, 1:1 and 2:1", ylabel="share of the objects (%)")
    axes.set_title("aspect ratios", pad=16)
    _finish(axes)


def _histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, color: str, label: str) -> None:
    weights = np.full(len(values), 100 / len(values))
    axes.hist(values, bins, weights=weights, color=color, alpha=0.35)
    axes.hist(values, bins, weights=weights, color=color, histtype="step", label=label)


def _bins(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return 50 bins of the same ratio over all values."""
    together = np.concatenate(values)
    low, high = together.min(), together.max()
    return np.geomspace(low / 1.001, high * 1.001, 51)


def _finish(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _label(report: Report) -> str:
    """Return the end of a data set's name."""
    return report.entry if len(report.entry) <= 40 else f"…{report.entry[-39:]}"
