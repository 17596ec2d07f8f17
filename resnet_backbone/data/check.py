"""Check a data set before a run, and report the findings.

Every image is decoded the way training decodes it, and again by Pillow, which is strict about missing data. Only a few
numbers are kept per image, about 30 bytes, so memory stays small.
"""

import hashlib
import io
import itertools
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TextIO

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.workers import prepare_worker
from resnet_backbone.errors import InputError


class Kind(NamedTuple):
    """A kind of finding: its name in the JSON file, whether it would stop a run, and its meaning."""

    name: str
    stops: bool
    meaning: str


KINDS = (
    Kind("empty", True, "empty: 0 bytes"),
    Kind("unreadable", True, "unreadable"),
    Kind("damaged", False, "damaged or truncated, but decoded: a part may be missing"),
    Kind("wrong_extension", False, "named as another format than they are: decoded by their content"),
    Kind("grayscale", False, "grayscale: become RGB"),
    Kind("palette", False, "with a palette: become RGB"),
    Kind("transparent", False, "with transparency: it is dropped"),
    Kind("sixteen_bit", False, "with 16 bits a channel: reduced to 8"),
    Kind("cmyk", False, "CMYK: converted to RGB"),
    Kind("turned", False, "with an EXIF orientation: it is ignored, so they are seen turned"),
    Kind("animated", False, "animated: the first picture is taken"),
    Kind("tiny", False, "tiny: a side of less than 8 pixels"),
    Kind("huge", False, "huge: slow to decode, and too large to be checked for missing data"),
)
_BIT = {kind.name: 1 << number for number, kind in enumerate(KINDS)}
_STOPS = sum(_BIT[kind.name] for kind in KINDS if kind.stops)
TINY = 8

_FORMATS = {  # Pillow's names; MPO is a JPEG followed by more pictures, as written by phones
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP", "DIB"),
    ".webp": ("WEBP",),
    ".ppm": ("PPM",),
}
_CHUNK = 32  # images handed to a process at once
_MESSAGES = 1000  # error messages kept
_NAMED = 3  # images named per summary line


class Inspection(NamedTuple):
    """One image's finding bits, height and width, first 8 bytes of a hash, format, and message.

    Height, width and format are 0, 0 and "" if the image cannot be decoded.
    """

    findings: int
    height: int
    width: int
    digest: int
    form: str
    message: str


def inspect(data: bytes, name: str) -> Inspection:
    """Inspect one encoded image."""
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
    try:
        height, width = decode(data, what=name).shape[:2]
    except DatasetError as error:
        return Inspection(_BIT["unreadable" if data else "empty"], 0, 0, digest, "", str(error))
    found, form, message = _look_closer(data)
    expected = _FORMATS.get(os.path.splitext(name)[1].lower())
    if form and expected and form not in expected:
        found.add("wrong_extension")
    if min(height, width) < TINY:
        found.add("tiny")
    if message:
        message = f"{name} is damaged ({message})"
    return Inspection(sum(_BIT[kind] for kind in found), height, width, digest, form, message)


def _look_closer(data: bytes) -> tuple[set[str], str, str]:
    """Return the findings, format and Pillow's complaint for a decodable image."""
    found, form = set(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                form, mode = image.format or "", image.mode
                found |= {
                    kind
                    for kind, is_so in (
                        ("grayscale", mode in ("1", "L", "LA", "La") or mode.startswith(("I", "F"))),
                        ("palette", mode in ("P", "PA")),
                        ("transparent", mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info),
                        # Pillow silently reduces 16-bit colors; a PNG's header has the depth at byte 24.
                        ("sixteen_bit", mode.startswith("I") or (form == "PNG" and data[24] == 16)),
                        ("cmyk", mode == "CMYK"),
                        ("animated", form != "MPO" and getattr(image, "n_frames", 1) > 1),
                        ("turned", image.getexif().get(0x0112, 1) not in (0, 1)),
                    )
                    if is_so
                }
                image.seek(0)
                image.load()
    except Image.DecompressionBombError:
        found.add("huge")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        return found | {"damaged"}, form, str(error) or type(error).__name__
    return found, form, ""


class Report:
    """The findings for a data set.

    Attributes:
        entry: the user's name for the data set.
        checked: the indices of the inspected images.
        findings: `(len(checked),)` uint16, one bit per entry of KINDS.
        sizes: `(len(checked), 2)` int32, height and width, zeros where unreadable.
        digests: `(len(checked),)` uint64, equal for equal files.
        formats: the number of images in each format.
        messages: index to message, for the first thousand unreadable or damaged images.
        ignored: files not treated as images, by extension: their number, and the first names.
    """

    def __init__(self, entry: str, source: ClassificationSource, checked: np.ndarray) -> None:
        self.entry = entry
        self.source = source
        self.checked = checked
        self.findings = np.zeros(len(checked), np.uint16)
        self.sizes = np.zeros((len(checked), 2), np.int32)
        self.digests = np.zeros(len(checked), np.uint64)
        self.formats: Counter[str] = Counter()
        self.messages: dict[int, str] = {}
        self.ignored: Counter[str] = Counter()
        self.ignored_names: dict[str, list[str]] = {}

    def add(self, place: int, inspection: Inspection) -> None:
        """Record the findings for the image `checked[place]`."""
        self.findings[place] = inspection.findings
        self.sizes[place] = inspection.height, inspection.width
        self.digests[place] = inspection.digest
        if inspection.form:
            self.formats[inspection.form] += 1
        if inspection.message and len(self.messages) < _MESSAGES:
            self.messages[int(self.checked[place])] = inspection.message

    @property
    def stops(self) -> int:
        """The number of images that would stop a run."""
        return int(np.count_nonzero(self.findings & _STOPS))

    def found(self, kind: Kind) -> np.ndarray:
        """The indices of the images with this finding."""
        return self.checked[np.flatnonzero(self.findings & _BIT[kind.name])]

    def names(self, indices: Iterable[int]) -> list[str]:
        return [self.source.describe(int(index)) for index in indices]

    def class_sizes(self) -> np.ndarray:
        """The number of images per class in the whole data set."""
        return np.bincount(self.source.labels, minlength=len(self.source.class_names))

    def duplicates(self) -> list[np.ndarray]:
        """Groups of indices of byte-identical images."""
        readable = np.flatnonzero(self.findings & _STOPS == 0)
        order = readable[np.argsort(self.digests[readable], kind="stable")]
        begins = np.concatenate([[0], np.flatnonzero(np.diff(self.digests[order])) + 1, [len(order)]])
        several = np.flatnonzero(np.diff(begins) > 1)
        # With 64-bit hashes, a million different images contain a collision with probability 3e-8.
        groups = [self.checked[order[begins[number] : begins[number + 1]]] for number in several]
        return sorted(groups, key=lambda group: group[0])

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        counts = self.class_sizes().tolist()
        return {
            "entry": self.entry,
            "images": len(self.source),
            "checked": len(self.checked),
            "would_stop_a_run": self.stops,
            "classes": [[name, count] for name, count in zip(self.source.class_names, counts, strict=True)],
            "sides": _sides(self.sizes),
            "formats": dict(self.formats),
            "findings": {kind.name: self.names(self.found(kind)) for kind in KINDS},
            "messages": list(self.messages.values()),
            "duplicates": [self.names(group) for group in self.duplicates()],
            "ignored_files": dict(self.ignored),
        }

    def text(self) -> str:
        """Return a human-readable summary; names omit their common folder."""
        lines = [self.entry, f"  {len(self.source):,} images, {self._describe_classes()}"]
        if len(self.checked) < len(self.source):
            lines.append(f"  {len(self.checked):,} of them were looked at, spread evenly")
        if sides := _sides(self.sizes):
            words = (f"{side} side {low} to {high} pixels, median {mid}" for side, (low, mid, high) in sides.items())
            lines.append("  " + "; ".join(words))
        if self.formats:
            lines.append("  " + ", ".join(f"{form} {count:,}" for form, count in self.formats.most_common()))
        seen = [kind for kind in KINDS if len(self.found(kind))]
        fatal = [self._line(kind) for kind in seen if kind.stops]
        notes = [self._line(kind) for kind in seen if not kind.stops]
        notes += [*self._duplicate_lines(), *self._ignored_lines()]
        lines += ["", "  Would stop a run" + ("" if fatal else ": nothing"), *fatal]
        return "\n".join([*lines, "", "  Notes" + ("" if notes else ": none"), *notes])

    def _describe_classes(self) -> str:
        counts, names = self.class_sizes(), self.source.class_names
        least, most = int(counts.argmin()), int(counts.argmax())
        if counts[least] == counts[most]:
            return f"{len(names):,} classes with {counts[least]:,} each" if len(names) > 1 else f"1 class ({names[0]})"
        empty = f"; {np.count_nonzero(counts == 0):,} are empty" if counts[least] == 0 else ""
        words = f"{counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
        return f"{len(names):,} classes with {words}{empty}"

    def _line(self, kind: Kind) -> str:
        found = self.found(kind)
        if kind.stops or kind.name == "damaged":
            why = [self.messages[index] for index in found[:_NAMED].tolist() if index in self.messages]
            return _counted(len(found), kind.meaning, map(self._short, why), each_on_a_line=True)
        return _counted(len(found), kind.meaning, self._shorts(found[:_NAMED]))

    def _duplicate_lines(self) -> Iterator[str]:
        groups, labels = self.duplicates(), self.source.labels
        if groups:
            example = " = ".join(self._shorts(groups[0][:2]))
            yield _counted(sum(len(group) - 1 for group in groups), "copies of others", [example])
        # Each group's first image and its first image of another class.
        across = [(group[0], *group[labels[group] != labels[group[0]]][:1]) for group in groups]
        across = [pair for pair in across if len(pair) > 1]
        if across:
            example = " = ".join(self._shorts(across[0]))
            yield _counted(len(across), "images with copies in more than one class", [example])

    def _ignored_lines(self) -> Iterator[str]:
        for extension, count in self.ignored.most_common():
            meaning = f"files {extension}" if extension else "files without an extension"
            names = [self._short(name) for name in self.ignored_names[extension]]
            yield _counted(count, f"{meaning}: not taken for images, ignored", names)

    def _shorts(self, indices: Iterable[int]) -> list[str]:
        return [self._short(name) for name in self.names(indices)]

    def _short(self, words: str) -> str:
        folders = [os.path.dirname(name) for name in self.names((0, len(self.source) - 1))]
        return words.removeprefix(os.path.join(os.path.commonpath(folders), ""))


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
        workers: number of inspecting processes; 0: use this one.
        progress: where to show a bar with progress and remaining time; None: no bar.
    """
    if workers < 0 or (limit is not None and limit < 1):
        raise InputError(f"workers is {workers} and limit {limit}; expected at least 0, and at least 1")
    total = len(source) if limit is None else min(limit, len(source))
    report = Report(entry, source, np.arange(total) * len(source) // total)
    _count_ignored(report)
    on_terminal = progress is not None and progress.isatty()
    inspections = tqdm(
        itertools.chain.from_iterable(_inspect_all(source, report.checked, workers)),
        total=total,
        unit="image",
        file=progress,
        disable=progress is None,
        leave=False,
        # In a log, show nothing for jobs done within ten seconds.
        delay=0 if on_terminal else 10,
        mininterval=0.2 if on_terminal else 10,
    )
    for place, inspection in enumerate(inspections):
        report.add(place, inspection)
    return report


def in_both(one: Report, other: Report) -> list[tuple[int, int]]:
    """Pairs of indices, one into each data set, of byte-identical images."""
    places = [np.flatnonzero(report.findings & _STOPS == 0) for report in (one, other)]
    _, first, second = np.intersect1d(one.digests[places[0]], other.digests[places[1]], return_indices=True)
    pairs = zip(one.checked[places[0][first]].tolist(), other.checked[places[1][second]].tolist(), strict=True)
    return sorted(pairs)


def in_both_text(one: Report, other: Report, pairs: Sequence[tuple[int, int]]) -> str:
    """Describe in one sentence the images that two data sets share."""
    if not pairs:
        return "Of the images that were looked at, none is in both."
    example = f"{one.source.describe(pairs[0][0])} = {other.source.describe(pairs[0][1])}"
    return f"In both: {len(pairs):,}, such as {example}"


def _inspect_all(source: ClassificationSource, indices: np.ndarray, workers: int) -> Iterator[list[Inspection]]:
    """Yield all images' inspections in order, several at a time."""
    chunks = (indices[begin : begin + _CHUNK] for begin in range(0, len(indices), _CHUNK))
    if workers == 0:
        _begin(source)
        yield from map(_inspect_chunk, chunks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(source,))
    waiting, done = deque(), 0
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_inspect_chunk, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
                done += _CHUNK
        while waiting:
            yield waiting.popleft().result()
            done += _CHUNK
    except BrokenProcessPool:
        raise DatasetError(
            f"a process that was looking at images died, {done} images from the start or soon after (at "
            f"{source.describe(int(indices[done]))}): out of memory, or a decoder crashes on an image; try again with "
            "fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_source: ClassificationSource


def _begin_worker(source: ClassificationSource) -> None:
    prepare_worker(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # its warnings name no file
    _begin(source)


def _begin(source: ClassificationSource) -> None:
    global _source
    _source = source


def _inspect_chunk(indices: np.ndarray) -> list[Inspection]:
    return [_inspect_one(int(index)) for index in indices]


def _inspect_one(index: int) -> Inspection:
    try:
        data = _source.read(index)
    except DatasetError as error:
        return Inspection(_BIT["unreadable"], 0, 0, 0, "", str(error))
    return inspect(data, _source.describe(index))


def _count_ignored(report: Report) -> None:
    for name in report.source.ignored():
        extension = os.path.splitext(name)[1].lower()
        report.ignored[extension] += 1
        names = report.ignored_names.setdefault(extension, [])
        if len(names) < _NAMED:
            names.append(name)


def _sides(sizes: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Smallest, median and largest length in pixels of the shorter and the longer sides."""
    readable = sizes[sizes[:, 0] > 0]
    if not len(readable):
        return {}
    sides = {"shorter": readable.min(axis=1), "longer": readable.max(axis=1)}
    return {side: (int(v.min()), int(np.median(v)), int(v.max())) for side, v in sides.items()}


def _counted(count: int, meaning: str, examples: Iterable[str], *, each_on_a_line: bool = False) -> str:
    """Format a summary line, followed by the first examples."""
    examples = list(examples)
    more = f" and {count - len(examples):,} more" if count > len(examples) else ""
    indent = "\n" + 15 * " "
    return f"    {count:>9,}  {meaning}{indent}{(indent if each_on_a_line else ', ').join(examples)}{more}"
