"""A COCO file before anything else reads it: its images, categories and annotations, and what refers to what."""

import functools
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_backbone.data.report import Kind
from resnet_backbone.detection.data import annotations
from resnet_backbone.detection.data.annotations import Found, is_number, shortened
from resnet_backbone.engine.config import ConfigError

# How much larger than its image's an annotated area may be: rounding, and inclusive pixels.
AREA_ROUNDING = 1.1


IMAGE_ID = Kind("image_id", True, "images whose id is no integer")
IMAGE_TWICE = Kind("image_id_twice", True, "images with the id of another")
IMAGE_NAME = Kind("image_name", True, "images without a usable file_name")
IMAGE_SIZE = Kind("image_size", True, "images without a usable width and height")
IMAGE_KINDS = (IMAGE_ID, IMAGE_TWICE, IMAGE_NAME, IMAGE_SIZE)

CATEGORY_ID = Kind("category_id", True, "categories whose id is no integer")
CATEGORY_TWICE = Kind("category_id_twice", True, "categories with the id of another")
CATEGORY_NAME = Kind("category_name", True, "categories without a name")
SAME_NAME = Kind("category_name_twice", False, "categories have another's name (tables by name show one of them)")
CATEGORY_KINDS = (CATEGORY_ID, CATEGORY_TWICE, CATEGORY_NAME, SAME_NAME)

ID = Kind("id", True, "annotations whose id is no integer")
ID_TWICE = Kind("id_twice", True, "annotations with the id of another")
UNKNOWN_IMAGE = Kind("unknown_image", True, "annotations of images that the file does not list")
UNKNOWN_CATEGORY = Kind("unknown_category", True, "annotations of categories that the file does not list")
IGNORE = Kind("ignore", True, "annotations with ignore, which Detectron2 does not know")
AREA = Kind("area", True, "annotations with an impossible area")
NUM_KEYPOINTS = Kind("num_keypoints", True, "annotations with an impossible num_keypoints")
NO_AREA = Kind("no_area", False, "annotations have no area (taken from the mask, else the box)")
NO_CROWD_MARK = Kind("no_crowd_mark", False, "annotations have no iscrowd (taken as 0)")
ANNOTATION_KINDS = (
    *(ID, ID_TWICE, UNKNOWN_IMAGE, UNKNOWN_CATEGORY, *annotations.KINDS[:-3]),
    *(IGNORE, AREA, NUM_KEYPOINTS, *annotations.KINDS[-3:], NO_AREA, NO_CROWD_MARK),
)


@dataclass(frozen=True)
class Content:
    """The lists of a COCO file; whatever is in their dicts."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """The place of each annotation's image in the list of images; -1 where there is no such image."""
        places: dict[Hashable, int] = {}
        for place, image in enumerate(self.images):
            if _is_id(image.get("id")):
                places.setdefault(image["id"], place)
        ids = [item.get("image_id") for item in self.annotations]
        if set(map(type, ids)) <= {int, str}:
            return np.fromiter((places.get(key, -1) for key in ids), np.int64, len(ids))
        return np.array([places.get(key, -1) if _is_id(key) else -1 for key in ids], dtype=np.int64)

    def name(self, index: int) -> str:
        """Return words for an annotation by its index."""
        number, owner = self.annotations[index].get("id"), self.owners[index]
        words = f"annotation {number}" if _is_id(number) else f"annotation number {index + 1} of the file"
        return words if owner < 0 else f"{words} ({self.images[owner].get('file_name')})"


def check(entry: str, file: Path) -> Counter[str]:
    """Check a COCO file's images, categories and annotations; return how much there is of each kind that is tolerated.

    Raises:
        ConfigError: the file has another form; see also `check_content`.
    """
    return check_content(entry, read(entry, file), repeated=ids_may_repeat(file))


def check_content(entry: str, content: Content, *, repeated: bool) -> Counter[str]:
    """Check what a COCO file holds, as `check` does.

    Detectron2's and pycocotools' readers drop what they cannot use, or fail on it without saying where it is.

    Args:
        repeated: whether several annotations may have the same id.

    Raises:
        ConfigError: names the first unusable item and how many more there are.
    """
    if not content.images:
        return Counter()  # `datasets.check` has a message for it
    tolerated: Counter[str] = Counter()
    for what, items, found in (
        ("image", content.images, find_in_images(content.images)),
        ("category", content.categories, find_in_categories(content.categories)),
    ):
        for index, kind, words in found:
            if kind.stops:
                raise ConfigError(f"{entry}: {what} number {index + 1} of {len(items)} {words}. Correct the file.")
            tolerated[kind.meaning] += 1
    found = find_in_annotations(content, repeated=repeated)
    return tolerated + annotations.check(content.annotations, found, entry=entry, name=content.name)


def read(entry: str, file: Path) -> Content:
    """Read a COCO file.

    Raises:
        ConfigError: it is JSON of another form.
        OSError, ValueError, RecursionError: it cannot be read, or is no JSON.
    """
    return as_content(entry, json.loads(file.read_bytes()))


def as_content(entry: str, content: Any) -> Content:
    """Return the lists of a COCO file that has been parsed; raise ConfigError if it is JSON of another form."""
    if not isinstance(content, dict):
        raise _not_coco(entry, f"it is a {type(content).__name__}")
    found = Content(*(_listed(entry, content, key) for key in ("images", "annotations", "categories")))
    if found.images and not found.categories:
        raise _not_coco(entry, "its categories are empty")
    return found


def ids_may_repeat(file: Path) -> bool:
    return "minival" in str(file)  # as Detectron2 excepts these


def _listed(entry: str, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = content.get(key, [] if key != "categories" else None)
    if not isinstance(found, list):
        raise _not_coco(entry, f"{key} is {shortened(found)}" if key in content else f"it has no {key}")
    for number, item in enumerate(found, 1):
        if not isinstance(item, dict):
            raise _not_coco(entry, f"number {number} of its {key} is {shortened(item)}")
    return found


def find_in_images(images: Sequence[dict[str, Any]]) -> Iterator[Found]:
    """Yield what is wrong with images."""
    seen: set[Hashable] = set()
    kind_of_id = next((type(image["id"]) for image in images if _is_id(image.get("id"))), int)
    for index, image in enumerate(images):
        if type(image.get("id")) is not kind_of_id:
            yield Found(index, IMAGE_ID, f"has the id {shortened(image.get('id'))}; expected an integer")
        elif image["id"] in seen:
            yield Found(index, IMAGE_TWICE, f"has the id {image['id']}, as another image; expected different ones")
        elif not has_name(image):
            words = f"has the file_name {shortened(image.get('file_name'))}; expected a file in the folder of images"
            yield Found(index, IMAGE_NAME, words)
        elif not has_size(image):
            words = " and ".join(f"{side} {shortened(image.get(side))}" for side in ("width", "height"))
            yield Found(index, IMAGE_SIZE, f"has {words}; expected its size in pixels")
        if _is_id(image.get("id")):
            seen.add(image["id"])


def find_in_categories(categories: Sequence[dict[str, Any]]) -> Iterator[Found]:
    """Yield what is wrong with categories."""
    seen: set[int] = set()
    names: set[str] = set()
    for index, category in enumerate(categories):
        if type(category.get("id")) is not int:
            yield Found(index, CATEGORY_ID, f"has the id {shortened(category.get('id'))}; expected an integer")
            continue
        if category["id"] in seen:
            words = f"has the id {category['id']}, as another category; expected different ones"
            yield Found(index, CATEGORY_TWICE, words)
        elif not isinstance(category.get("name"), str):
            words = f"has the name {shortened(category.get('name'))}; expected a string"
            yield Found(index, CATEGORY_NAME, words)
        elif category["name"] in names:
            yield Found(index, SAME_NAME, f"has the name {shortened(category['name'])}, as another category")
        seen.add(category["id"])
        names.add(str(category.get("name")))


def find_in_annotations(content: Content, *, repeated: bool) -> Iterator[Found]:
    """Yield what is wrong or unusual with annotations, in themselves and as parts of the file.

    Args:
        repeated: whether ids may occur more than once.
    """
    items = content.annotations
    sizes = np.array([*map(_size, content.images), (math.inf,) * 2], dtype=np.float64)[content.owners]
    yield from _find_in_references(content, repeated=repeated)
    yield from _find_in_numbers(items, sizes)
    yield from annotations.find(items, sizes, dropped_polygons=True)
    yield from (Found(index, NO_AREA, "has no area") for index, a in enumerate(items) if a.get("area") is None)
    yield from (Found(index, NO_CROWD_MARK, "has no iscrowd") for index, a in enumerate(items) if "iscrowd" not in a)


def has_name(image: Mapping[str, Any]) -> bool:
    name = image.get("file_name")
    return isinstance(name, str) and bool(name) and "\0" not in name


def has_size(image: Mapping[str, Any]) -> bool:
    return all(type(image.get(side)) is int and 0 < image[side] < 2**31 for side in ("width", "height"))


def _size(image: Mapping[str, Any]) -> tuple[float, float]:
    return (image["width"], image["height"]) if has_size(image) else (math.inf, math.inf)


def _find_in_references(content: Content, *, repeated: bool) -> Iterator[Found]:
    """Yield annotations whose id, image or category is wrong."""
    categories = {category["id"] for category in content.categories if type(category.get("id")) is int}
    seen: set[int] = set()
    for index, (item, owner) in enumerate(zip(content.annotations, content.owners.tolist(), strict=True)):
        number, category = item.get("id"), item.get("category_id")
        if type(number) is not int or abs(number) >= 2**53:  # pycocotools keeps them as float64
            yield Found(index, ID, f"has the id {shortened(number)}; expected an integer")
        elif number in seen and not repeated:
            yield Found(index, ID_TWICE, "has the id of another annotation; expected different ones")
        elif owner < 0:
            image, images = shortened(item.get("image_id")), len(content.images)
            yield Found(index, UNKNOWN_IMAGE, f"has the image_id {image}, which none of the {images} images has")
        elif type(category) is not int or category not in categories:
            words = f"has the category_id {shortened(category)}, which is none of the {len(categories)} categories"
            yield Found(index, UNKNOWN_CATEGORY, words)
        elif item.get("ignore", 0) != 0:  # as Detectron2
            words = f"has ignore {shortened(item['ignore'])}, which Detectron2 does not know; it knows iscrowd"
            yield Found(index, IGNORE, words)
        else:
            seen.add(number)


def _find_in_numbers(items: Sequence[dict[str, Any]], sizes: np.ndarray) -> Iterator[Found]:
    """Yield annotations with numbers that only the evaluation reads, and cannot be right."""
    largest = (AREA_ROUNDING * sizes.prod(1)).tolist()
    areas = [item.get("area") for item in items]
    for index, (area, most) in enumerate(zip(areas, largest, strict=True)):
        if area is not None and not (is_number(area) and 0 <= area <= most):  # not for NaN
            yield Found(index, AREA, f"has the area {shortened(area)}; expected pixels, at most those of its image")
    for index, count in enumerate([item.get("num_keypoints", 0) for item in items]):
        if type(count) is not int or count < 0:
            words = f"has the num_keypoints {shortened(count)}; expected how many are labeled"
            yield Found(index, NUM_KEYPOINTS, words)


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _not_coco(entry: str, what: str) -> ConfigError:
    return ConfigError(
        f"the data set {entry} is not in COCO form: {what}. A COCO file holds images, annotations and categories, and "
        "each annotation one of these images and categories."
    )
