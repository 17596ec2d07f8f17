"""Whether annotations can be trained and evaluated on: their boxes, masks, keypoints, crowd marks and areas."""

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from resnet_backbone.data.report import Kind
from resnet_backbone.engine.config import ConfigError

# How far annotations may reach beyond their image, on each side: rounding, coordinates that count from 1, resized
# images. Detectron2 clips what is trained on. What reaches farther belongs to another image, or is in another unit.
BEYOND_PIXELS, BEYOND_SHARE = 2.0, 0.01
# The share of boxes that may have no area: Detectron2 drops them in training, and COCO's own files have two of them.
EMPTY_SHARE = 0.01

NO_BOX = Kind("no_box", True, "annotations without a bbox")
BOX_MODE = Kind("box_mode", True, "boxes of an unknown bbox_mode")
BOX_NOT_FINITE = Kind("box_not_finite", True, "boxes that are not four finite numbers")
BOX_NEGATIVE = Kind("box_negative", True, "boxes of negative size")
BOX_OUTSIDE = Kind("box_outside", True, "boxes outside their image")
BOX_BEYOND = Kind("box_beyond", True, "boxes that reach far beyond their image")
BOX_EMPTY = Kind("box_empty", True, "boxes without area, and there are too many of them")
CROWD_MARK = Kind("crowd_mark", True, "annotations with an iscrowd other than 0 and 1")
MASK = Kind("mask", True, "masks that cannot be used")
KEYPOINTS = Kind("keypoints", True, "keypoints that cannot be used")
# The meanings of what is tolerated are the log's words, too.
BOX_CLIPPED = Kind("box_clipped", False, "boxes reach a little beyond their image (clipped in training)")
BOX_WITHOUT_AREA = Kind("box_without_area", False, "boxes have no area (not trained on)")
SHORT_POLYGON = Kind(
    "short_polygon", False, "polygons have less than three points (dropped; their objects have others)"
)
KINDS = (
    *(NO_BOX, BOX_MODE, BOX_NOT_FINITE, BOX_NEGATIVE, BOX_OUTSIDE, BOX_BEYOND, BOX_EMPTY),
    *(CROWD_MARK, MASK, KEYPOINTS, BOX_CLIPPED, BOX_WITHOUT_AREA, SHORT_POLYGON),
)

Annotation = Mapping[str, Any]


class Found(NamedTuple):
    """A finding: the index of an annotation, or of another item of a list, its kind, and words to follow its name."""

    index: int
    kind: Kind
    words: str = ""


_FORMS = {BoxMode.XYWH_ABS: "x, y, width, height", BoxMode.XYXY_ABS: "x1, y1, x2, y2"}


def check(
    annotations: Sequence[Annotation],
    found: Iterable[Found],
    *,
    entry: str,
    name: Callable[[int], str],
) -> Counter[str]:
    """Return how many findings there are of each kind that is tolerated.

    Args:
        annotations: what was looked at.
        found: in it, by `find` and others; of several about an annotation, the first counts.
        entry: the data set's name for the message.
        name: gives words for an annotation by its index.

    Raises:
        ConfigError: names the first annotation that is unusable, its value, and how many more there are.
    """
    unusable: dict[int, str] = {}
    tolerated: Counter[str] = Counter()
    for index, kind, words in found:
        if kind.stops:
            unusable.setdefault(index, words)
        else:
            tolerated[kind.meaning] += 1
    if unusable:
        first = min(unusable)
        more = f" {len(unusable) - 1} more of {len(annotations)} annotations are unusable." if len(unusable) > 1 else ""
        raise ConfigError(f"{entry}: {name(first)} {unusable[first]}.{more} Correct or remove them.")
    return tolerated


def find(
    annotations: Sequence[Annotation],
    sizes: np.ndarray,
    *,
    modes: Sequence[Any] | None = None,
    dropped_polygons: bool = False,
) -> Iterator[Found]:
    """Yield everything that is wrong or unusual with the values of annotations.

    Args:
        annotations: in COCO's form, or Detectron2's, which has the same keys.
        sizes: `(n, 2)`, width and height of each one's image in pixels; infinite where unknown.
        modes: each one's BoxMode; None: x, y, width, height for all.
        dropped_polygons: whether polygons of less than three points are dropped on reading, if others remain.
    """
    if annotations:
        yield from _find_in_boxes(annotations, sizes, modes)
        yield from _find_in_crowd_marks(annotations)
        yield from _find_in_masks(annotations, sizes, dropped_polygons)
        yield from _find_in_keypoints(annotations)


def _find_in_boxes(
    annotations: Sequence[Annotation], sizes: np.ndarray, modes: Sequence[Any] | None
) -> Iterator[Found]:
    boxes = [annotation.get("bbox") for annotation in annotations]
    kept = np.arange(len(boxes))
    xyxy = np.zeros(len(boxes), bool)
    if modes is not None:
        # There are few different objects, and to look a BoxMode up is slow.
        objects = {id(mode): mode for mode in modes}
        modes_of = np.array(list(map(id, modes)))
        xyxy = np.isin(modes_of, [key for key, mode in objects.items() if _is_mode(mode, BoxMode.XYXY_ABS)])
        xywh = np.isin(modes_of, [key for key, mode in objects.items() if _is_mode(mode, BoxMode.XYWH_ABS)])
        rotated = np.isin(modes_of, [key for key, mode in objects.items() if _is_mode(mode, BoxMode.XYWHA_ABS)])
        for index in np.flatnonzero(~(xyxy | xywh | rotated)).tolist():
            words = f"has the bbox_mode {modes[index]!r}; expected Detectron2's BoxMode.XYXY_ABS or XYWH_ABS"
            yield Found(index, BOX_MODE, words)
        if not (xyxy | xywh).all():  # rotated boxes are left to those who use them
            kept = np.flatnonzero(xyxy | xywh)
            boxes, sizes, xyxy = [boxes[index] for index in kept.tolist()], sizes[kept], xyxy[kept]
    values = as_rows(boxes)
    with np.errstate(invalid="ignore", over="ignore"):
        first, last = values[:, :2], np.where(xyxy[:, None], values[:, 2:], values[:, :2] + values[:, 2:])
        extent = np.where(xyxy[:, None], values[:, 2:] - values[:, :2], values[:, 2:])
        finite = np.isfinite(values).all(1) & np.isfinite(last).all(1)
        beyond = np.maximum(-first, last - sizes)
        too_far = beyond > np.maximum(BEYOND_PIXELS, BEYOND_SHARE * sizes)
    negative = (extent < 0).any(1)
    empty = (extent == 0).any(1)
    outside = ((last < 0) | (first > sizes) | ((extent > 0) & ((last <= 0) | (first >= sizes)))).any(1)
    usable = finite & ~negative & ~outside & ~too_far.any(1)
    many = (usable & empty).sum() > EMPTY_SHARE * len(boxes)

    for index in np.flatnonzero(~usable | (many & empty)).tolist():
        words = f"has the bbox {shortened(boxes[index])}"
        width, height = sizes[index]
        if boxes[index] is None:
            kind, words = NO_BOX, "has no bbox"
        elif not finite[index]:
            kind = BOX_NOT_FINITE
            words += f"; expected four finite numbers {_FORMS[BoxMode(0 if xyxy[index] else 1)]}"
        elif negative[index]:
            kind = BOX_NEGATIVE
            words += ", which ends before it begins"
        elif outside[index]:
            kind = BOX_OUTSIDE
            words += f", which is outside its image of {width:g}×{height:g} pixels"
        elif too_far[index].any():
            kind, pixels = BOX_BEYOND, beyond[index][too_far[index]].max()
            words += f", which reaches {pixels:g} pixels beyond its image of {width:g}×{height:g}"
        else:
            kind = BOX_EMPTY
            words += f", which has no area, like more than {100 * EMPTY_SHARE:g}% of the boxes"
        yield Found(int(kept[index]), kind, words)
    for kind, tolerated in (
        (BOX_CLIPPED, usable & (beyond > 1e-6).any(1)),
        (BOX_WITHOUT_AREA, usable & empty),
    ):
        for index in kept[tolerated].tolist():
            yield Found(index, kind, f"has the bbox {shortened(annotations[index]['bbox'])}")


def _is_mode(value: Any, mode: BoxMode) -> bool:
    return isinstance(value, int) and value == mode


def as_rows(boxes: Sequence[Any]) -> np.ndarray:
    """Return boxes as `(n, 4)` float64; NaN where one is not four numbers."""
    plain = (
        set(map(type, boxes)) <= {list, tuple}
        and set(map(len, boxes)) <= {4}
        and set(map(type, chain.from_iterable(boxes))) <= {int, float}
    )
    if not plain:
        boxes = [box if _are_numbers(box) and len(box) == 4 else (math.nan,) * 4 for box in boxes]
    try:
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # an integer beyond float64
        return np.array([[number if abs(number) < 1e300 else math.nan for number in box] for box in boxes])


def _are_numbers(values: Any) -> bool:
    if not isinstance(values, list | tuple | np.ndarray):
        return False
    return set(map(type, values)) <= {int, float} or all(map(is_number, values))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool | np.bool_))


def _find_in_crowd_marks(annotations: Sequence[Annotation]) -> Iterator[Found]:
    values = [annotation.get("iscrowd", 0) for annotation in annotations]
    if set(map(type, values)) == {int} and set(values) <= {0, 1}:
        return
    for index, value in enumerate(values):
        if not isinstance(value, Real) or value not in (0, 1):
            yield Found(index, CROWD_MARK, f"has the iscrowd {shortened(value)}; expected 0 or 1")


def _find_in_masks(annotations: Sequence[Annotation], sizes: np.ndarray, dropped_polygons: bool) -> Iterator[Found]:
    masks = [annotation.get("segmentation") for annotation in annotations]
    if masks.count(None) == len(masks):
        return
    limits = np.maximum(BEYOND_PIXELS, BEYOND_SHARE * sizes)
    bounds = np.concatenate([-limits, sizes + limits], axis=1).tolist()
    for index, mask in enumerate(masks):
        if mask is None:
            continue
        if isinstance(mask, list):
            short = sum(isinstance(points, list) and len(points) in (0, 2, 4) for points in mask)
            if dropped_polygons and 0 < short < len(mask):
                yield from [Found(index, SHORT_POLYGON, "has a polygon of less than three points")] * short
                mask = [points for points in mask if not isinstance(points, list) or len(points) > 4]
            words = next(filter(None, (_bad_polygon(points, *bounds[index]) for points in mask)), None)
        elif isinstance(mask, Mapping):
            words = bad_encoding(mask, *sizes[index]) if mask else None
        else:
            words = f"has the segmentation {shortened(mask)}; expected a list of polygons or a mask in COCO's RLE"
        if words:
            yield Found(index, MASK, words)


def _bad_polygon(points: Any, left: float, top: float, right: float, bottom: float) -> str | None:
    try:
        # A sum costs a tenth of looking at each number, and is finite and a number only if all are.
        if len(points) >= 6 and not len(points) % 2 and math.isfinite(sum(points)):
            xs, ys = points[::2], points[1::2]
            if left <= min(xs) and max(xs) <= right and top <= min(ys) and max(ys) <= bottom:
                return None
            return f"has the polygon {shortened(points)}, which reaches far beyond its image"
    except (TypeError, OverflowError, ValueError):
        pass
    return f"has the polygon {shortened(points)}; expected x and y of at least three points, all finite"


def bad_encoding(mask: Mapping[str, Any], width: float, height: float) -> str | None:
    """Return what is wrong with a mask in COCO's run lengths, None if nothing is; an infinite size is any."""
    size, counts = mask.get("size"), mask.get("counts")
    known = math.isfinite(width)
    if not _are_numbers(size) or len(size) != 2 or (known and tuple(size) != (height, width)):
        expected = f"[{height:g}, {width:g}], as its image" if known else "height and width"
        return f"has a mask of size {shortened(size)}; expected {expected}"
    runs = _decoded(counts) if isinstance(counts, str | bytes) else counts
    if isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs) and sum(runs) == math.prod(size):
        return None
    pixels = f"{math.prod(size):g} pixels" if known else "all its pixels"  # which may be beyond a float's range
    return f"has a mask with the counts {shortened(counts)}; expected the runs of {pixels}"


def _decoded(counts: str | bytes) -> list[int] | None:
    """Return the run lengths in COCO's compressed form; None if it is malformed.

    A number is written in groups of five bits, the lowest first, each with a sixth bit that says whether another
    follows. From the fourth on, it is the difference from the number before the last one. pycocotools's decoder reads
    on past the end of what is cut off, and takes what is too short for a mask that ends in background.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        group = character - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:  # negative
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs


def _find_in_keypoints(annotations: Sequence[Annotation]) -> Iterator[Found]:
    for index, annotation in enumerate(annotations):
        points = annotation.get("keypoints")
        if points is None:
            continue
        if not (
            _are_numbers(points)
            and not len(points) % 3
            and all(abs(value) < 1e6 for value in points)  # not for NaN
            and all(visible in (0, 1, 2) for visible in points[2::3])
        ):
            words = f"has the keypoints {shortened(points)}; expected x, y and visibility (0, 1, 2), all finite"
            yield Found(index, KEYPOINTS, words)


def shortened(value: Any) -> str:
    """Return a value for a message, abbreviated if it is long."""
    return reprlib.repr(value.tolist() if isinstance(value, np.ndarray) else value)
