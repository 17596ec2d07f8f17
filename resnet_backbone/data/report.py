"""What the inspection of a data set's images found, for classification and detection alike."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_backbone.data.inspection import TINY, Inspection

_MESSAGES = 1000  # error messages kept
NAMED = 3  # images named per summary line


class Kind(NamedTuple):
    """A kind of finding: its name in the JSON file, whether it would stop a run, and its meaning."""

    name: str
    stops: bool
    meaning: str


# Of what is decoded all the same, and how; pretraining and detection alike.
CONVERTED = (
    Kind("wrong_extension", False, "named as another format than they are: decoded by their content"),
    Kind("grayscale", False, "grayscale: become RGB"),
    Kind("palette", False, "with a palette: become RGB"),
    Kind("transparent", False, "with transparency: it is dropped"),
    Kind("sixteen_bit", False, "with 16 bits a channel: reduced to 8"),
    Kind("cmyk", False, "CMYK: converted to RGB"),
)
EMPTY = Kind("empty", True, "empty: 0 bytes")
ANIMATED = Kind("animated", False, "animated: the first picture is taken")
TINY_IMAGE = Kind("tiny", False, f"tiny: a side of less than {TINY} pixels")


class Outcome(NamedTuple):
    """What the check of one or two data sets gives.

    Attributes:
        text: for a human reader.
        found: everything, for a JSON file.
        stops: whether something would stop a run.
    """

    text: str
    found: dict[str, Any]
    stops: bool


class ImageReport(ABC):
    """The findings in images; only a few numbers are kept of each, about 30 bytes.

    Attributes:
        entry: the user's name for the data set.
        kinds: what may be found in an image.
        checked: the indices of the inspected images.
        findings: `(len(checked),)` uint16, one bit per kind.
        sizes: `(len(checked), 2)` int32, height and width, zeros where unreadable.
        digests: `(len(checked),)` uint64, equal for equal files.
        formats: the number of images in each format.
        messages: index to message, for the first thousand unreadable or damaged images.
    """

    def __init__(self, entry: str, kinds: Sequence[Kind], checked: np.ndarray) -> None:
        self.entry = entry
        self.kinds = kinds
        self.checked = checked
        self.findings = np.zeros(len(checked), np.uint16)
        self.sizes = np.zeros((len(checked), 2), np.int32)
        self.digests = np.zeros(len(checked), np.uint64)
        self.formats: Counter[str] = Counter()
        self.messages: dict[int, str] = {}
        self._bits = {kind.name: 1 << number for number, kind in enumerate(kinds)}

    @abstractmethod
    def __len__(self) -> int:
        """The number of images in the whole data set."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name an image."""

    @abstractmethod
    def facts(self) -> list[str]:
        """Lines that say what the data set is."""

    def add_all(self, inspections: Iterable[Inspection]) -> None:
        """Record the findings in the images `checked`, in order."""
        for place, inspection in enumerate(inspections):
            self.findings[place] = sum(self._bits[name] for name in inspection.findings)
            self.sizes[place] = inspection.height, inspection.width
            self.digests[place] = inspection.digest
            if inspection.form:
                self.formats[inspection.form] += 1
            if inspection.message and len(self.messages) < _MESSAGES:
                self.messages[int(self.checked[place])] = inspection.message

    @property
    def stops(self) -> int:
        """The number of images that would stop a run."""
        return int(np.count_nonzero(self.findings & self._stopping))

    @property
    def _stopping(self) -> int:
        return sum(self._bits[kind.name] for kind in self.kinds if kind.stops)

    @property
    def decoded(self) -> np.ndarray:
        """The places, in `checked`, of the images that can be decoded."""
        return np.flatnonzero(self.sizes[:, 0] > 0)

    def found(self, kind: Kind) -> np.ndarray:
        """The indices of the images with this finding."""
        return self.checked[np.flatnonzero(self.findings & self._bits[kind.name])]

    def names(self, indices: Iterable[int]) -> list[str]:
        return [self.describe(int(index)) for index in indices]

    def duplicates(self) -> list[np.ndarray]:
        """Groups of indices of byte-identical images."""
        order = self.decoded[np.argsort(self.digests[self.decoded], kind="stable")]
        begins = np.concatenate([[0], np.flatnonzero(np.diff(self.digests[order])) + 1, [len(order)]])
        several = np.flatnonzero(np.diff(begins) > 1)
        # With 64-bit hashes, a million different images contain a collision with probability 3e-8.
        groups = [self.checked[order[begins[number] : begins[number + 1]]] for number in several]
        return sorted(groups, key=lambda group: group[0])

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        return {
            "entry": self.entry,
            "images": len(self),
            "checked": len(self.checked),
            "would_stop_a_run": self.stops,
            "sides": sides(self.sizes),
            "formats": dict(self.formats),
            "findings": {kind.name: self.names(self.found(kind)) for kind in self.kinds},
            "messages": list(self.messages.values()),
            "duplicates": [self.names(group) for group in self.duplicates()],
        }

    def text(self) -> str:
        """Return a human-readable summary; names omit their common folder."""
        lines = [self.entry, *self.facts()]
        if len(self.checked) < len(self):
            lines.append(f"  {len(self.checked):,} of them were looked at, spread evenly")
        if found := sides(self.sizes):
            words = (f"{side} side {low} to {high} pixels, median {mid}" for side, (low, mid, high) in found.items())
            lines.append("  " + "; ".join(words))
        if self.formats:
            lines.append("  " + ", ".join(f"{form} {count:,}" for form, count in self.formats.most_common()))
        fatal, notes = list(self.fatal_lines()), list(self.note_lines())
        lines += ["", "  Would stop a run" + ("" if fatal else ": nothing"), *fatal]
        return "\n".join([*lines, "", "  Notes" + ("" if notes else ": none"), *notes])

    def fatal_lines(self) -> Iterator[str]:
        """Yield a summary of each kind of finding that would stop a run."""
        return self._lines(stops=True)

    def note_lines(self) -> Iterator[str]:
        """Yield a summary of each kind of finding that would not."""
        yield from self._lines(stops=False)
        groups = self.duplicates()
        if groups:
            example = " = ".join(self.shorts(groups[0][:2]))
            yield counted(sum(len(group) - 1 for group in groups), "copies of others", [example])

    def _lines(self, *, stops: bool) -> Iterator[str]:
        for kind in self.kinds:
            found = self.found(kind)
            if kind.stops != stops or not len(found):
                continue
            if stops or kind.name == "damaged":
                why = [self.messages[index] for index in found[:NAMED].tolist() if index in self.messages]
                yield counted(len(found), kind.meaning, map(self.short, why), each_on_a_line=True)
            else:
                yield counted(len(found), kind.meaning, self.shorts(found[:NAMED]))

    def shorts(self, indices: Iterable[int]) -> list[str]:
        return [self.short(name) for name in self.names(indices)]

    def short(self, words: str) -> str:
        """Return a name, or a sentence that begins with one, without the images' common folder."""
        folders = [os.path.dirname(name) for name in self.names((0, len(self) - 1))]
        return words.removeprefix(os.path.join(os.path.commonpath(folders), ""))


def in_both(one: ImageReport, other: ImageReport) -> list[tuple[int, int]]:
    """Pairs of indices, one into each data set, of byte-identical images."""
    places = [report.decoded for report in (one, other)]
    _, first, second = np.intersect1d(one.digests[places[0]], other.digests[places[1]], return_indices=True)
    pairs = zip(one.checked[places[0][first]].tolist(), other.checked[places[1][second]].tolist(), strict=True)
    return sorted(pairs)


def in_both_text(one: ImageReport, other: ImageReport, pairs: Sequence[tuple[int, int]]) -> str:
    """Describe in one sentence the images that two data sets share."""
    if not pairs:
        return "Of the images that were looked at, none is in both."
    example = f"{one.describe(pairs[0][0])} = {other.describe(pairs[0][1])}"
    return f"In both: {len(pairs):,}, such as {example}"


def outcome(reports: Sequence[ImageReport]) -> Outcome:
    """Put one or two data sets' reports together, with the images that are in both."""
    text = "\n\n".join(report.text() for report in reports)
    found: dict[str, Any] = {"data_sets": [report.as_dict() for report in reports]}
    if len(reports) > 1:
        pairs = in_both(*reports)
        text += f"\n\n{in_both_text(*reports, pairs)}"
        found["in_both"] = [[report.describe(i) for report, i in zip(reports, pair)] for pair in pairs]
    return Outcome(text, found, any(report.stops for report in reports))


def sides(sizes: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Smallest, median and largest length in pixels of the shorter and the longer sides."""
    readable = sizes[sizes[:, 0] > 0]
    if not len(readable):
        return {}
    found = {"shorter": readable.min(axis=1), "longer": readable.max(axis=1)}
    return {side: (int(v.min()), int(np.median(v)), int(v.max())) for side, v in found.items()}


def counted(count: int, meaning: str, examples: Iterable[str], *, each_on_a_line: bool = False) -> str:
    """Format a summary line, followed by the first examples."""
    examples = list(examples)
    more = f" and {count - len(examples):,} more" if count > len(examples) else ""
    indent = "\n" + 15 * " "
    return f"    {count:>9,}  {meaning}{indent}{(indent if each_on_a_line else ', ').join(examples)}{more}"
