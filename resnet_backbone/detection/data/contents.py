"""What is in a data set: images, classes, objects as arrays, and all findings in its annotations."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from resnet_backbone.data.decode import too_long
from resnet_backbone.data.errors import some
from resnet_backbone.data.report import Kind
from resnet_backbone.detection.data import coco_file, datasets
from resnet_backbone.detection.data.annotations import Found, as_rows
from resnet_backbone.detection.data.coco_file import Content, has_name, has_size
from resnet_backbone.engine.config import ConfigError

OTHER_CLASSES = Kind("other_classes", True, "file whose categories are not those that are registered under its name")
NO_OBJECT = Kind("no_object", True, "data set without one object; crowd regions and difficult objects do not count")
MISSING = Kind("missing", True, "images that do not exist, or are no regular files")
TOO_LONG = Kind("too_long", True, "images with one side much longer than the other")
LISTED_TWICE = Kind("listed_twice", False, "images that are listed again")
WITHOUT_OBJECTS = Kind(
    "without_objects", False, "images without objects: not trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
)
CROWD_ONLY = Kind("crowd_only", False, "images with crowd regions alone: not trained on, either")
MISFIT = Kind("misfit", False, "masks that do not fit their boxes")
EMPTY_CATEGORY = Kind("empty_category", False, "categories without objects")
KINDS = (
    *(NO_OBJECT, OTHER_CLASSES, *coco_file.IMAGE_KINDS, MISSING, TOO_LONG, *coco_file.CATEGORY_KINDS),
    *(*coco_file.ANNOTATION_KINDS, datasets.CLASS_NUMBER),
    *(LISTED_TWICE, WITHOUT_OBJECTS, CROWD_ONLY, MISFIT, EMPTY_CATEGORY),
)

# How far a mask may end from its box: rounding, and boxes drawn by hand.
MISFIT_PIXELS, MISFIT_SHARE = 5.0, 0.1


class Objects(NamedTuple):
    """Annotations that have an image and a class, as arrays.

    Attributes:
        image: `(n,)` int64, places in the list of images.
        category: `(n,)` int64, class numbers.
        size: `(n, 2)` float64, width and height of the boxes in pixels; NaN where unknown.
        crowd: `(n,)` bool, whether it is neither trained on nor counted as missed.
    """

    image: np.ndarray
    category: np.ndarray
    size: np.ndarray
    crowd: np.ndarray


class Contents(NamedTuple):
    """A data set, as far as it can be used.

    Attributes:
        folder: of the images.
        files: the images' paths; "" where there is none.
        sizes: `(n, 2)` int64, each image's stated width and height; 0 where unknown.
        class_names: in the order of the detector's outputs.
        class_ids: the data set's own numbers for them; empty if it has none.
        objects: with class numbers as training has them.
        fields: how many objects, without crowd regions, have a segmentation and keypoints.
        findings: each kind with the names and words of what was found.
    """

    folder: str
    files: list[str]
    sizes: np.ndarray
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    objects: Objects
    fields: dict[str, int]
    findings: dict[Kind, list[str]]


def read(entry: str) -> Contents:
    """Read a registered data set, and find what is wrong or unusual in it besides its images' pixels.

    What stops here is what stops a run (`datasets.check`), by the same rules; but everything is found, not the first.

    Raises:
        ConfigError: it does not open, has no images, or is in a form that cannot be looked at.
    """
    with datasets.explained(entry):
        file, content, records = datasets.coco_json(entry), None, []
        if file is not None:
            content = coco_file.read(entry, file)
        if file is None or MetadataCatalog.get(entry).get("evaluator_type") == "coco_panoptic_seg":
            records = DatasetCatalog.get(entry)
    if not (records if content is None else content.images):
        raise ConfigError(f"the data set {entry} has no images.")
    contents = _of_records(entry, records) if content is None else _of_file(entry, file, content)
    _add(contents.findings, _found_in_contents(contents, records))
    return contents


def _add(findings: dict[Kind, list[str]], found: Iterator[tuple[Kind, str]] | Sequence[tuple[Kind, str]]) -> None:
    for kind, words in found:
        findings.setdefault(kind, []).append(words)


def _of_file(entry: str, file: Path, content: Content) -> Contents:
    """Return what is in a COCO file, as Detectron2's reader would, and what it would stop at."""
    metadata, findings = MetadataCatalog.get(entry), {}
    for what, found in (
        ("image", coco_file.find_in_images(content.images)),
        ("category", coco_file.find_in_categories(content.categories)),
    ):
        _add(findings, ((kind, f"{what} number {index + 1} {words}") for index, kind, words in found))
    found = list(coco_file.find_in_annotations(content, repeated=coco_file.ids_may_repeat(file)))
    usable = content.owners >= 0
    usable[[index for index, kind, _ in found if kind.stops]] = False
    found += find_misfits(content.annotations, np.flatnonzero(usable).tolist())
    _add(findings, ((kind, f"{content.name(index)} {words}") for index, kind, words in found))

    known = {c["id"]: c.get("name") for c in content.categories if type(c.get("id")) is int}
    ids = sorted(known)  # the order of the classes
    names = tuple(name if isinstance(name := known[key], str) else f"category {key}" for key in ids)
    registered = metadata.get("thing_classes", names)
    if list(registered) != list(names):
        _add(findings, [(OTHER_CLASSES, f"{some(list(names))}; registered are {some(list(registered))}")])
    numbers = {key: number for number, key in enumerate(ids)}
    categories = (item.get("category_id") for item in content.annotations)
    classes = np.array([numbers.get(key, -1) if type(key) is int else -1 for key in categories], np.int64)
    extent = as_rows([item.get("bbox") for item in content.annotations])[:, 2:]
    objects, fields = _objects(content.annotations, content.owners, classes, extent)
    folder = metadata.get("image_root") or ""
    files = [os.path.join(folder, image["file_name"]) if has_name(image) else "" for image in content.images]
    sizes = [(image["width"], image["height"]) if has_size(image) else (0, 0) for image in content.images]
    return Contents(folder, files, _as_sizes(sizes), names, tuple(ids), objects, fields, findings)


def _of_records(entry: str, records: Sequence[dict[str, Any]]) -> Contents:
    """Return what is in a registered data set of another form."""
    findings, (items, owners) = {}, datasets.annotations_of(records)
    name = datasets.namer(records, owners)
    found = datasets.find_in_records(entry, records, items, owners)
    _add(findings, ((kind, f"{name(index)} {words}") for index, kind, words in found))
    boxes = as_rows([item.get("bbox") for item in items])
    corners = np.array([item.get("bbox_mode") == BoxMode.XYXY_ABS for item in items], bool).reshape(-1, 1)
    extent = np.where(corners, boxes[:, 2:] - boxes[:, :2], boxes[:, 2:])
    names = tuple(MetadataCatalog.get(entry).get("thing_classes", ()))
    categories, known = (item.get("category_id") for item in items), len(names) or np.inf
    classes = np.array([key if type(key) is int and 0 <= key < known else -1 for key in categories], np.int64)
    names += tuple(map(str, range(len(names), int(classes.max(initial=-1)) + 1)))
    objects, fields = _objects(items, owners, classes, extent)
    files = [record["file_name"] for record in records]
    sizes = [(record.get("width", 0), record.get("height", 0)) for record in records]
    return Contents(os.path.dirname(files[0]), files, _as_sizes(sizes), names, (), objects, fields, findings)


def _as_sizes(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(sizes, np.int64).reshape(-1, 2)


def _objects(
    items: Sequence[Mapping[str, Any]], owners: np.ndarray, classes: np.ndarray, extent: np.ndarray
) -> tuple[Objects, dict[str, int]]:
    crowd = np.array([item.get("iscrowd", 0) in (1, True) for item in items], bool)
    usable = (owners >= 0) & (classes >= 0)
    objects = Objects(owners[usable], classes[usable], extent[usable], crowd[usable])
    trained = [item for item, is_object in zip(items, (usable & ~crowd).tolist(), strict=True) if is_object]
    fields = ("segmentation", "keypoints")
    return objects, {field: sum(bool(item.get(field)) for item in trained) for field in fields}


def _found_in_contents(contents: Contents, records: Sequence[dict[str, Any]]) -> Iterator[tuple[Kind, str]]:
    """Yield findings that are about images, classes, or the whole.

    Args:
        records: in Detectron2's form, if there may be semantic labels.
    """
    labels = [record["sem_seg_file_name"] for record in records if "sem_seg_file_name" in record]
    objects = contents.objects
    if objects.crowd.all() and len(labels) < len(contents.files):
        yield NO_OBJECT, f"{len(contents.files):,} images, {len(objects.crowd):,} crowd regions"
    yield from ((MISSING, name) for name in datasets.missing_files([*filter(None, contents.files), *labels]))
    for file, (width, height) in zip(contents.files, contents.sizes.tolist(), strict=True):
        if width and (found := too_long(width, height)):
            yield TOO_LONG, f"{file} has {found}"
    seen: set[str] = set()
    for file in map(os.path.normpath, filter(None, contents.files)):
        if file in seen:
            yield LISTED_TWICE, file
        seen.add(file)
    if labels:  # semantic labels are in files of their own
        return
    annotated = np.bincount(objects.image, minlength=len(contents.files))
    trained = np.bincount(objects.image[~objects.crowd], minlength=len(contents.files))
    yield from ((WITHOUT_OBJECTS, contents.files[place]) for place in np.flatnonzero(annotated == 0))
    yield from ((CROWD_ONLY, contents.files[place]) for place in np.flatnonzero((annotated > 0) & (trained == 0)))
    counts = np.bincount(objects.category[~objects.crowd], minlength=len(contents.class_names))
    yield from ((EMPTY_CATEGORY, contents.class_names[place]) for place in np.flatnonzero(counts == 0))


def find_misfits(items: Sequence[Mapping[str, Any]], usable: Sequence[int]) -> Iterator[Found]:
    """Yield annotations in COCO's form whose mask ends elsewhere than their box.

    Args:
        usable: the indices of those to look at, in which `annotations.find` finds nothing that stops a run.
    """
    boxes = as_rows([item.get("bbox") for item in items])
    spans = np.full((len(items), 4), np.nan)  # of the masks: left, top, right, bottom
    outlines = {}
    for index in usable:
        mask = items[index].get("segmentation")
        if isinstance(mask, list):
            outlines[index] = list(chain.from_iterable(points for points in mask if len(points) > 4))
        elif mask:
            runs = mask if isinstance(mask["counts"], str) else pycocotools.mask.frPyObjects(mask, *mask["size"])
            x, y, width, height = pycocotools.mask.toBbox(runs)
            spans[index] = x, y, x + width, y + height
    outlines = {index: points for index, points in outlines.items() if points}
    if outlines:
        indices = list(outlines)
        begins = np.cumsum([0, *(len(points) // 2 for points in outlines.values())])[:-1]
        numbers = np.fromiter(chain.from_iterable(outlines.values()), np.float64)
        for axis in (0, 1):
            spans[indices, axis] = np.minimum.reduceat(numbers[axis::2], begins)
            spans[indices, axis + 2] = np.maximum.reduceat(numbers[axis::2], begins)
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        allowed = np.maximum(MISFIT_PIXELS, MISFIT_SHARE * np.tile(boxes[:, 2:], 2))
        misfits = (np.abs(spans - corners) > allowed).any(1)  # not for NaN
    for index in np.flatnonzero(misfits).tolist():
        span, box = (", ".join(f"{value:.0f}" for value in row[index]) for row in (spans, corners))
        yield Found(index, MISFIT, f"has a mask from ({span}) in a box from ({box}): left, top, right, bottom")
