"""Check a classification data set before a run, and report the findings.

Every image is decoded the way training decodes it, and again by Pillow, which is strict about missing data.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.inspection import Inspection, inspect, inspect_all, selected
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.report import (
    ANIMATED,
    CONVERTED,
    EMPTY,
    NAMED,
    TINY_IMAGE,
    ImageReport,
    Kind,
    counted,
    outcome,
)
from resnet_backbone.data.sources import open_source

__all__ = ["KINDS", "Report", "check", "check_entry", "outcome"]

KINDS = (
    EMPTY,
    Kind("unreadable", True, "unreadable"),
    Kind("damaged", False, "damaged or truncated, but decoded: a part may be missing"),
    *CONVERTED,
    Kind("turned", False, "with an EXIF orientation: it is ignored, so they are seen turned"),
    ANIMATED,
    TINY_IMAGE,
    Kind("huge", False, "huge: slow to decode, and too large to be checked for missing data"),
)


class Report(ImageReport):
    """The findings for a classification data set.

    Attributes:
        ignored: files not treated as images, by extension: their number, and the first names.
    """

    def __init__(self, entry: str, source: ClassificationSource, checked: np.ndarray) -> None:
        super().__init__(entry, KINDS, checked)
        self.source = source
        self.ignored: Counter[str] = Counter()
        self.ignored_names: dict[str, list[str]] = {}
        for name in source.ignored():
            extension = os.path.splitext(name)[1].lower()
            self.ignored[extension] += 1
            names = self.ignored_names.setdefault(extension, [])
            if len(names) < NAMED:
                names.append(name)

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def class_sizes(self) -> np.ndarray:
        """The number of images per class in the whole data set."""
        return np.bincount(self.source.labels, minlength=len(self.source.class_names))

    def as_dict(self) -> dict[str, Any]:
        counts = self.class_sizes().tolist()
        return {
            **super().as_dict(),
            "classes": [[name, count] for name, count in zip(self.source.class_names, counts, strict=True)],
            "ignored_files": dict(self.ignored),
        }

    def facts(self) -> list[str]:
        return [f"  {len(self):,} images, {self._describe_classes()}"]

    def _describe_classes(self) -> str:
        counts, names = self.class_sizes(), self.source.class_names
        least, most = int(counts.argmin()), int(counts.argmax())
        if counts[least] == counts[most]:
            return f"{len(names):,} classes with {counts[least]:,} each" if len(names) > 1 else f"1 class ({names[0]})"
        empty = f"; {np.count_nonzero(counts == 0):,} are empty" if counts[least] == 0 else ""
        words = f"{counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
        return f"{len(names):,} classes with {words}{empty}"

    def note_lines(self) -> Iterator[str]:
        yield from super().note_lines()
        groups, labels = self.duplicates(), self.source.labels
        # Each group's first image and its first image of another class.
        across = [(group[0], *group[labels[group] != labels[group[0]]][:1]) for group in groups]
        across = [pair for pair in across if len(pair) > 1]
        if across:
            example = " = ".join(self.shorts(across[0]))
            yield counted(len(across), "images with copies in more than one class", [example])
        for extension, count in self.ignored.most_common():
            meaning = f"files {extension}" if extension else "files without an extension"
            names = [self.short(name) for name in self.ignored_names[extension]]
            yield counted(count, f"{meaning}: not taken for images, ignored", names)


class _Images(NamedTuple):
    """A source's images, to be inspected."""

    source: ClassificationSource

    def inspect(self, index: int) -> Inspection:
        try:
            data = self.source.read(index)
        except DatasetError as error:
            return Inspection(frozenset({"unreadable"}), 0, 0, 0, "", str(error))
        return inspect(data, self.describe(index))

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def check(
    source: ClassificationSource,
    *,
    entry: str,
    workers: int = 0,
    limit: int | None = None,
    progress: TextIO | None = None,
) -> Report:
    """Inspect every image of a data set, or `limit` evenly spaced ones.

    Arguments:
        entry: the user's name for the data set.
        workers, progress: as `inspection.inspect_all` takes them.
    """
    report = Report(entry, source, selected(len(source), limit))
    report.add_all(inspect_all(_Images(source), report.checked, workers=workers, progress=progress))
    return report


def check_entry(entry: str, *, workers: int, limit: int | None, progress: TextIO | None) -> Report:
    """Open an entry of DATASETS.TRAIN or TEST, and check it."""
    return check(open_source(entry), entry=entry, workers=workers, limit=limit, progress=progress)
