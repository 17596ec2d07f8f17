"""Check a detection data set before a run: everything that would stop it, and what is worth knowing.

A run stops at the first error of a kind (`datasets.check`, `coco_file.check`); this goes on, by the same rules, and
decodes every image.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from resnet_backbone.data import report
from resnet_backbone.data.errors import DatasetError, some
from resnet_backbone.data.inspection import (
    Inspection,
    digest_of,
    inspect_all,
    look_closer,
    selected,
    unreadable,
)
from resnet_backbone.data.interface import PackedStrings
from resnet_backbone.data.report import (
    ANIMATED,
    CONVERTED,
    EMPTY,
    NAMED,
    TINY_IMAGE,
    ImageReport,
    Kind,
    Outcome,
    counted,
)
from resnet_backbone.detection.data import contents, datasets
from resnet_backbone.detection.data.contents import Contents
from resnet_backbone.detection.data.mapper import decode_image, of_a_data_set, read_file
from resnet_backbone.detection.data.statistics import class_counts, described, quantiles

KINDS = (
    EMPTY,
    Kind("unreadable", True, "unreadable, or cut off"),
    Kind("size", True, "of another size than the annotations say"),
    *CONVERTED,
    Kind("turned", False, "with an EXIF orientation: it is applied, so the annotations are of the turned image"),
    ANIMATED,
    Kind("damaged", False, "whose header Pillow complains about"),
    TINY_IMAGE,
    Kind("huge", False, "huge: slow to decode"),
)
# Of these the names are names of images or classes; others have sentences.
_NAMES = (contents.MISSING, contents.LISTED_TWICE, contents.WITHOUT_OBJECTS, contents.CROWD_ONLY)


class Report(ImageReport):
    """The findings for a detection data set.

    Attributes:
        contents: its images, classes and objects, and what was found in them besides the pixels.
    """

    def __init__(self, entry: str, found: Contents, checked: np.ndarray) -> None:
        super().__init__(entry, KINDS, checked)
        self.contents = found

    def __len__(self) -> int:
        return len(self.contents.files)

    def describe(self, index: int) -> str:
        return self.contents.files[index] or f"image number {index + 1}, which has no file name"

    def short(self, words: str) -> str:
        return words.replace(os.path.join(self.contents.folder, ""), "") if self.contents.folder else words

    @property
    def stops(self) -> int:
        """How many images and annotations would stop a run."""
        return super().stops + sum(len(found) for kind, found in self.contents.findings.items() if kind.stops)

    def as_dict(self) -> dict[str, Any]:
        names, objects = self.contents.class_names, self.contents.objects
        common = super().as_dict()
        return {
            **common,
            "objects": int((~objects.crowd).sum()),
            "crowd_regions": int(objects.crowd.sum()),
            "classes": [[name, *counts] for name, *counts in zip(names, *class_counts(self.contents), strict=True)],
            "quantiles": quantiles(self.contents),
            "findings": {
                **common["findings"],
                **{kind.name: self.contents.findings.get(kind, []) for kind in contents.KINDS},
            },
        }

    def facts(self) -> list[str]:
        objects, fields = self.contents.objects, self.contents.fields
        crowds = int(objects.crowd.sum())
        count = len(objects.crowd) - crowds
        lines = [
            f"  {len(self):,} images, {count:,} objects ({count / len(self):.1f} an image), "
            f"{len(self.contents.class_names):,} classes" + (f"; {crowds:,} crowd regions" if crowds else "")
        ]
        for field, key in (("segmentation", "MODEL.MASK_ON"), ("keypoints", "MODEL.KEYPOINT_ON")):
            if fields[field]:
                all_of = "all" if fields[field] == count else f"{fields[field]:,} of {count:,}"
                needs = "" if fields[field] == count else f" ({key} needs it for all)"
                lines.append(f"  {field} of {all_of} objects{needs}")
        return [*lines, *(f"  {line}" for line in described(self.contents))]

    def fatal_lines(self) -> Iterator[str]:
        yield from super().fatal_lines()
        yield from self._content_lines(stops=True)

    def note_lines(self) -> Iterator[str]:
        yield from super().note_lines()
        yield from self._content_lines(stops=False)

    def _content_lines(self, *, stops: bool) -> Iterator[str]:
        for kind in contents.KINDS:
            found = self.contents.findings.get(kind, [])
            if kind.stops == stops and found:
                first = map(self.short, found[:NAMED])
                one_line = kind in (*_NAMES, contents.EMPTY_CATEGORY)
                yield counted(len(found), kind.meaning, first, each_on_a_line=not one_line)


class _Images(NamedTuple):
    """A data set's images, to be inspected.

    Attributes:
        files: their paths; "" for what is known to be missing.
        sizes: `(n, 2)` the width and height that each is said to have; 0 where unknown.
    """

    files: PackedStrings
    sizes: np.ndarray

    def inspect(self, index: int) -> Inspection:
        file, data = self.files[index], b""
        if not file:
            return Inspection(frozenset(), 0, 0, 0, "", "")
        try:
            with of_a_data_set():
                data = read_file(file)
                height, width = decode_image(data, file, "RGB").shape[:2]
        except DatasetError as error:
            return unreadable(data, error)
        found, form, message = look_closer(data, file, (height, width), load=False)
        stated = tuple(self.sizes[index].tolist())
        if all(stated) and stated != (width, height):
            found |= {"size"}
            turned = ", after turning it by its EXIF orientation" if "turned" in found else ""
            message = f"{file} has {width}×{height} pixels{turned}, but its annotations say {stated[0]}×{stated[1]}"
        return Inspection(found, height, width, digest_of(data), form, message)

    def describe(self, index: int) -> str:
        return self.files[index]


def check_entry(entry: str, *, workers: int, limit: int | None, progress: TextIO | None) -> Report:
    """Open an entry of DATASETS.TRAIN or TEST, look at all annotations, and at all images or `limit` of them.

    Raises:
        InputError: it cannot be opened.
    """
    # Detectron2's reader warns about what is reported here, or does not matter.
    logging.getLogger("detectron2.data.datasets").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as converted:
        datasets.register(entry, converted)
        found = contents.read(entry)
    report = Report(entry, found, selected(len(found.files), limit))
    bad = {*found.findings.get(contents.MISSING, ()), ""}
    # A name that no file can have is among those that are missing.
    files = PackedStrings("" if file in bad else file for file in found.files)
    images = _Images(files, found.sizes)
    report.add_all(inspect_all(images, report.checked, workers=workers, progress=progress))
    return report


def outcome(reports: Sequence[Report]) -> Outcome:
    """Put one or two data sets' reports together, with the images that are in both, and whether the classes agree."""
    found = report.outcome(reports)
    if len(reports) < 2:
        return found
    names = [{os.path.basename(file): file for file in reversed(each.contents.files) if file} for each in reports]
    alike = sorted(names[0].keys() & names[1].keys())
    words, stops = compare_classes(*reports)
    text = found.text
    if alike:
        example = f"{names[0][alike[0]]}, {names[1][alike[0]]}"
        text += f"\nOf the same file name, whatever they hold: {len(alike):,}, such as {example}"
    alike = [[each[name] for each in names] for name in alike]
    return Outcome(
        f"{text}\n{words}", {**found.found, "same_file_name": alike, "classes_agree": not stops}, found.stops or stops
    )


def compare_classes(one: Report, other: Report) -> tuple[str, bool]:
    """Say whether two data sets' classes agree, and whether a run stops that uses both (`fit.check_same_names`)."""
    first, second = one.contents.class_names, other.contents.class_names
    if first == second:
        if one.contents.class_ids == other.contents.class_ids:
            return f"Classes: the same {len(first):,} in both, under the same ids.", False
        return (
            f"Classes: the same {len(first):,} in the same order in both, under other ids. Training numbers them from "
            "0 in the order of their ids, so that does no harm.",
            False,
        )
    only = [
        f"{some(missing)} only in {report.entry}"
        for report, missing in (
            (one, [name for name in first if name not in second]),
            (other, [name for name in second if name not in first]),
        )
        if missing
    ]
    if not only:
        place = next(
            (n for n, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second))
        )
        names = [names[place] if place < len(names) else "nothing" for names in (first, second)]
        only = [f"the same names in another order: class {place} is {names[0]} in one and {names[1]} in the other"]
    return (
        f"Classes differ, which stops a run that uses both: {'; '.join(only)}. The detector's output number n is the "
        "nth class by id, so both need the same names in the same order.",
        True,
    )
