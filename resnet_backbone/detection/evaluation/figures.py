"""The figures of an evaluation's report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_backbone.detection.evaluation.confusion import Confusion
from resnet_backbone.detection.evaluation.curves import RECALLS, Curves
from resnet_backbone.detection.evaluation.errors import TYPES, Errors
from resnet_backbone.weights.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_CURVES = 12
SHOWN_CATEGORIES = 30  # in the confusion matrix
_LINES = (("at_50", "{} 0.5", "C0"), ("at_75", "{} 0.75", "C1"), ("mean", "mean, 0.5 … 0.95", "black"))
_LONGEST_NAME = 20


def draw_curves(curves: Curves, file: Path, *, measure: str) -> None:
    """Draw precision over recall, the mean over the categories.

    Args:
        measure: what says that a detection is right: IoU or OKS.
    """
    figure = _figure((5.6, 4.2))
    axes = figure.subplots()
    there = curves.worst_first
    for key, label, color in _LINES:
        line = getattr(curves, key)[there].mean(0)
        axes.plot(RECALLS, line, color=color, label=f"{label.format(measure)}: AP {100 * line.mean():.1f}")
    axes.set(title=f"mean of {_number(len(there), 'category', 'categories')}", xlabel="recall", ylabel="precision")
    axes.legend(frameon=False, loc="upper right" if axes.get_lines()[0].get_ydata()[-1] < 0.5 else "lower left")
    _style(axes)
    _save(figure, file)


def draw_categories(curves: Curves, names: Sequence[str], file: Path, *, measure: str) -> None:
    """Draw precision over recall of each category, or of the 6 with the lowest and the 6 with the highest AP."""
    order = curves.worst_first
    if len(order) > SHOWN_CURVES:
        order = np.concatenate([order[: SHOWN_CURVES // 2], order[-(SHOWN_CURVES // 2) :]])
    columns = min(4, len(order))
    rows = -(-len(order) // columns)
    figure = _figure((max(2.5 * columns, 4.5), 2.3 * rows + 0.5))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, k in zip(panels.flat, order):
        for key, label, color in _LINES:
            axes.plot(RECALLS, getattr(curves, key)[k], color=color, label=label.format(measure), linewidth=1.2)
        objects = _number(int(curves.objects[k]), "object")
        axes.set_title(f"{_short(names[k])}\nAP {curves.ap[k]:.1f}, {objects}", fontsize=9)
        _style(axes)
        axes.set_xticks([0, 0.5, 1])
    for axes in panels.flat[len(order) :]:
        axes.set_axis_off()
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, file)


def draw_errors(errors: Errors, file: Path) -> None:
    """Draw what each type of error costs."""
    figure = _figure((7.4, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
    _bars(left, TYPES, [errors.cost[name] for name in TYPES])
    _bars(right, ("false\npositives", "false\nnegatives"), [errors.false_positives, errors.false_negatives])
    figure.supxlabel("points of AP50 to gain", fontsize=10)
    _save(figure, file)


def _bars(axes: "Axes", names: Sequence[str], values: Sequence[float]) -> None:
    bars = axes.barh(names, values, color=[f"C{n}" for n in range(len(names))])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(1, *values))  # room for the numbers
    axes.spines[["top", "right"]].set_visible(False)


def draw_confusion(confusion: Confusion, names: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix, each row as percentages of its objects, or of the detections of background.

    Of many categories, it shows those that are confused most with other categories, in their order in the data set.
    """
    shown = shown_categories(confusion)
    rows = confusion.counts[[*shown, len(names)]]
    others = rows[:, :-1].sum(1) - rows[:, shown].sum(1)
    counts = np.column_stack([rows[:, shown], *([others] if others.any() else []), rows[:, -1]])
    shares = counts / np.maximum(rows.sum(1, keepdims=True), 1)
    labels = [_short(names[k]) for k in shown]
    columns = [*labels, *(["other"] if others.any() else []), "missed"]
    side = max(3.6, 0.3 * len(columns) + 1.6)
    figure = _figure((side, side))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), [*labels, "background"])
    axes.set(xlabel="detected as", ylabel="annotated as")
    axes.tick_params(labelsize=8)
    size = 7 if len(columns) > 12 else 9
    for row, column in zip(*np.nonzero(shares >= 0.005)):
        ink = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=size)
    _save(figure, file)


def shown_categories(confusion: Confusion) -> np.ndarray:
    """Return the categories in the figure: all that occur, or the SHOWN_CATEGORIES confused most with others."""
    counts = confusion.counts[:-1, :-1]
    occurs = np.flatnonzero(confusion.counts.sum(0)[:-1] + confusion.counts.sum(1)[:-1])
    confused = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return np.sort(occurs[np.argsort(-confused[occurs], kind="stable")[:SHOWN_CATEGORIES]])


def _figure(size: tuple[float, float]) -> "Figure":
    """Return an empty figure of a width and height in inches."""
    from matplotlib.figure import Figure  # only here, since it takes long to import

    return Figure(figsize=size, layout="constrained")


def _style(axes: "Axes") -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _short(name: str) -> str:
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$")  # which would begin a formula


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _save(figure: "Figure", file: Path) -> None:
    with atomic_write(file) as target:
        figure.savefig(target, format="png", dpi=110)
