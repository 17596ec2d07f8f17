"""A report about a detector's AP: how high it is, where it is lost, and on which categories."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from resnet_backbone.detection.evaluation.advice import advise
from resnet_backbone.detection.evaluation.average_precision import Evaluation
from resnet_backbone.detection.evaluation.confusion import Confusion, find_confusion
from resnet_backbone.detection.evaluation.curves import Curves, by_size, find_curves
from resnet_backbone.detection.evaluation.errors import BACKGROUND, FOREGROUND, TYPES, Errors, find_errors
from resnet_backbone.detection.evaluation.figures import (
    SHOWN_CATEGORIES,
    SHOWN_CURVES,
    draw_categories,
    draw_confusion,
    draw_curves,
    draw_errors,
    shown_categories,
)
from resnet_backbone.detection.evaluation.overlaps import MAX_DETECTIONS, find_overlaps
from resnet_backbone.weights.files import atomic_write

TITLES = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
MEASURES = {"bbox": "IoU", "segm": "IoU", "keypoints": "OKS"}
CONFUSIONS = 15
_MEANINGS = {
    "classification": f"IoU of at least {FOREGROUND} with an object of another category",
    "localization": f"IoU of {BACKGROUND} to {FOREGROUND} with an object of its category",
    "both": "neither the category nor the box fits, but it is not background either",
    "duplicate": "right, but another detection of the object has a higher score",
    "background": f"IoU of at most {BACKGROUND} with any object",
    "missed": "an object without any detection that is right, or would be with its category or box corrected",
}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What there is to say about an evaluation.

    Attributes:
        errors, confusion: None for keypoints, about which TIDE says nothing, and where there is no object to find.
    """

    evaluation: Evaluation
    curves: Curves
    errors: Errors | None = None
    confusion: Confusion | None = None


def analyze(evaluation: Evaluation) -> Analysis:
    curves = find_curves(evaluation)
    if evaluation.task == "keypoints" or not curves.objects.any():
        return Analysis(evaluation=evaluation, curves=curves)
    overlaps = find_overlaps(evaluation)
    errors = find_errors(overlaps)
    confusion = find_confusion(overlaps, errors)
    return Analysis(evaluation=evaluation, curves=curves, errors=errors, confusion=confusion)


def write_report(evaluations: Mapping[str, Evaluation], folder: Path, title: str) -> Path:
    """Write report.md and its figures, and return the report's path.

    Args:
        evaluations: by task, at least one, of the same ground truth.
        folder: is created.
        title: what was evaluated.
    """
    analyses = [analyze(evaluation) for evaluation in evaluations.values()]
    for analysis in analyses:
        _draw(analysis, folder)
    with atomic_write(folder / "report.md") as file:
        file.write(format_report(analyses, title).encode())
    return folder / "report.md"


def format_report(analyses: Sequence[Analysis], title: str) -> str:
    """Return the report as Markdown."""
    curves = analyses[0].curves
    parts = [
        f"# {_line(title)}",
        f"{analyses[0].evaluation.images:,} images with {curves.objects.sum():,} objects of "
        f"{np.count_nonzero(curves.objects):,} categories; {curves.detections.sum():,} detections.",
        *(part for analysis in analyses for part in _section(analysis)),
    ]
    return "\n\n".join(parts) + "\n"


def _draw(analysis: Analysis, folder: Path) -> None:
    task, names, curves = analysis.evaluation.task, analysis.evaluation.names, analysis.curves
    if len(curves.worst_first):
        draw_curves(curves, folder / f"{task}_curves.png", measure=MEASURES[task])
    if len(curves.worst_first) > 1:
        draw_categories(curves, names, folder / f"{task}_categories.png", measure=MEASURES[task])
    if analysis.errors is not None and analysis.confusion is not None:
        draw_errors(analysis.errors, folder / f"{task}_errors.png")
        draw_confusion(analysis.confusion, names, folder / f"{task}_confusion.png")


def _section(analysis: Analysis) -> Iterable[str]:
    evaluation, task = analysis.evaluation, analysis.evaluation.task
    yield f"## {TITLES[task]}"
    sizes = by_size(evaluation)
    objects = {name: count for name, _, _, count in sizes}
    yield advise(evaluation.metrics, objects, analysis.errors, measure=MEASURES[task])
    headline = {name: value for name, value in evaluation.metrics.items() if name[-1] not in "sml"}
    yield _table([headline.values()], headline)
    yield "### By size"
    yield _table(sizes, ["area", "AP", "AR", "objects"], first="left")
    if categories := len(analysis.curves.worst_first):
        yield "### Precision and recall"
        yield f"![precision over recall]({task}_curves.png)"
        if categories > SHOWN_CURVES:
            half = SHOWN_CURVES // 2
            yield f"The {half} categories with the lowest AP, and the {half} with the highest:"
        if categories > 1:
            yield f"![precision over recall of categories]({task}_categories.png)"
    if analysis.errors is not None and analysis.confusion is not None:
        yield from _errors(task, analysis.errors)
        yield from _confusion(evaluation, analysis.confusion)
    yield "### By category"
    yield _categories(evaluation.names, analysis.curves)


def _errors(task: str, errors: Errors) -> Iterable[str]:
    yield "### Where the AP is lost"
    yield (
        "By [TIDE](https://arxiv.org/abs/2008.08115): what AP50 would gain if all errors of one type were corrected "
        f"and nothing else, from {errors.ap50:.1f} on. The gains do not add up, because a corrected error can make way "
        f"for another one. It counts the {MAX_DETECTIONS} detections of an image with the highest scores."
    )
    rows = [(name, errors.cost[name], errors.counts[name], _MEANINGS[name]) for name in TYPES]
    yield _table(rows, ["error", "points", "number", "a detection, or object, is that"], first="left", last="left")
    yield (
        f"If all false positives had the lowest scores, AP50 would gain {errors.false_positives:.1f} points; if all "
        f"objects that no detection is right about were left out, {errors.false_negatives:.1f}."
    )
    yield f"![cost of the errors]({task}_errors.png)"


def _confusion(evaluation: Evaluation, confusion: Confusion) -> Iterable[str]:
    counts, names = confusion.counts, evaluation.names
    yield "### What is taken for what"
    yield (
        f"From a score of {confusion.threshold:.3g} on, the detections have the best F1: "
        f"{_percent(confusion.precision)} of them are right, and {_percent(confusion.recall)} of the objects are "
        "found. These detections are compared here. In the order of their scores, they take the objects of their "
        f"category with an IoU of at least {FOREGROUND}; those that are left then take objects of any category that "
        "are left. "
        f"{counts[-1, :-1].sum():,} detections remain as background, and {counts[:-1, -1].sum():,} objects are missed."
    )
    if largest := confusion.largest(CONFUSIONS):
        totals = counts[:-1].sum(1)
        rows = [(names[i], names[j], n, _percent(n / totals[i])) for i, j, n in largest]
        yield _table(rows, ["annotated as", "detected as", "times", "of the objects"], first="left", second="left")
    shown, there = len(shown_categories(confusion)), np.count_nonzero(counts.sum(0)[:-1] + counts.sum(1)[:-1])
    selection = f" The {SHOWN_CATEGORIES} categories that are confused most with others." if shown < there else ""
    yield f"![confusion matrix]({evaluation.task}_confusion.png)"
    yield f"In percent of the row: of a category's objects, or of the detections of background.{selection}"


def _categories(names: Sequence[str], curves: Curves) -> str:
    order = np.concatenate([curves.worst_first, np.flatnonzero(curves.objects == 0)])
    columns = (curves.ap, curves.ap50, curves.objects, curves.detections)
    rows = [(names[k], *(column[k] for column in columns)) for k in order]
    return _table(rows, ["category", "AP", "AP50", "objects", "detections"], first="left")


def _table(rows: Iterable[Iterable[Any]], header: Iterable[str], **align: str) -> str:
    """Return a Markdown table, floats with one digit.

    Args:
        align: of the first, second and last column, right without.
    """
    rows, header = [[_cell(value) for value in row] for row in rows], list(header)
    columns = ["right"] * len(header)
    for place, name in ((0, "first"), (1, "second"), (-1, "last")):
        columns[place] = align.get(name, columns[place])
    return tabulate(rows, header, tablefmt="github", colalign=columns, disable_numparse=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.1f}"
    return _line(value).replace("|", "\\|") if isinstance(value, str) else f"{value:,}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.0%}"
