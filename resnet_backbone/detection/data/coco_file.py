"""A COCO file before anything else reads it: its images, categories and annotations, and what refers to what."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_backbone.detection.data import annotations
from resnet_backbone.detection.data.annotations import is_number, shortened
from resnet_backbone.engine.config import ConfigError

# How much larger than its image's an annotated area may be: rounding, and inclusive pixels.
AREA_ROUNDING = 1.1


def check(entry: str, file: Path) -> Counter[str]:
    """Check a COCO file's images, categories and annotations; return how much there is of each kind that is tolerated.

    Detectron2's and pycocotools' readers drop what they cannot use, or fail on it without saying where it is.

    Raises:
        ConfigError: the file has another form, or names the first unusable item and how many more there are.
    """
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise _not_coco(entry, f"it is a {type(content).__name__}")
    images, items, categories = (_listed(entry, content, key) for key in ("images", "annotations", "categories"))
    if not images:
        return Counter()  # `datasets.check` has a message for it
    _check_images(entry, images)
    _check_categories(entry, categories)
    by_id = {image["id"]: image for image in images}

    def image_of(item: Mapping[str, Any]) -> dict[str, Any] | None:
        return by_id.get(item.get("image_id")) if _is_id(item.get("image_id")) else None

    def name(index: int) -> str:
        number, image = items[index].get("id"), image_of(items[index])
        words = f"annotation {number}" if _is_id(number) else f"annotation number {index + 1} of the file"
        return f"{words} ({image['file_name']})" if image else words

    places = {key: number for number, key in enumerate(by_id)}
    sizes = np.array([*((image["width"], image["height"]) for image in by_id.values()), (math.inf,) * 2])
    owners = (item.get("image_id") for item in items)
    sizes = sizes[[places.get(key, -1) if _is_id(key) else -1 for key in owners]].astype(np.float64)
    known = {category["id"] for category in categories}
    bad = _bad_references(items, by_id, known, repeated="minival" in str(file))  # as Detectron2 excepts these
    bad = (*bad, *_bad_numbers(items, sizes))
    tolerated = annotations.check(items, sizes, entry=entry, name=name, bad=bad, dropped_polygons=True)
    tolerated["annotations have no area (taken from the mask, else the box)"] = sum(
        item.get("area") is None for item in items
    )
    tolerated["annotations have no iscrowd (taken as 0)"] = sum("iscrowd" not in item for item in items)
    return +tolerated


def _listed(entry: str, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = content.get(key, [] if key != "categories" else None)
    if not isinstance(found, list):
        raise _not_coco(entry, f"{key} is {shortened(found)}" if key in content else f"it has no {key}")
    for number, item in enumerate(found, 1):
        if not isinstance(item, dict):
            raise _not_coco(entry, f"number {number} of its {key} is {shortened(item)}")
    return found


def _check_images(entry: str, images: Sequence[dict[str, Any]]) -> None:
    seen: set[Hashable] = set()
    for number, image in enumerate(images, 1):
        words = None
        if not _is_id(image.get("id")) or type(image["id"]) is not type(images[0]["id"]):
            words = f"has the id {shortened(image.get('id'))}; expected an integer"
        elif image["id"] in seen:
            words = f"has the id {image['id']}, as another image; expected different ones"
        elif not isinstance(image.get("file_name"), str) or not image["file_name"] or "\0" in image["file_name"]:
            words = f"has the file_name {shortened(image.get('file_name'))}; expected a file in the folder of images"
        elif any(type(image.get(side)) is not int or not 0 < image[side] < 2**31 for side in ("width", "height")):
            sides = " and ".join(f"{side} {shortened(image.get(side))}" for side in ("width", "height"))
            words = f"has {sides}; expected its size in pixels"
        if words:
            raise ConfigError(f"{entry}: image number {number} of {len(images)} {words}. Correct the file.")
        seen.add(image["id"])


def _check_categories(entry: str, categories: Sequence[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for number, category in enumerate(categories, 1):
        words = None
        if type(category.get("id")) is not int:
            words = f"has the id {shortened(category.get('id'))}; expected an integer"
        elif category["id"] in seen:
            words = f"has the id {category['id']}, as another category; expected different ones"
        elif not isinstance(category.get("name"), str):
            words = f"has the name {shortened(category.get('name'))}; expected a string"
        if words:
            raise ConfigError(f"{entry}: category number {number} of {len(categories)} {words}. Correct the file.")
        seen.add(category["id"])
    if not categories:
        raise _not_coco(entry, "its categories are empty")


def _bad_references(
    items: Sequence[dict[str, Any]], images: Mapping[Hashable, Any], categories: set[int], *, repeated: bool
) -> Iterator[tuple[int, str]]:
    """Yield annotations whose id, image or category is wrong.

    Args:
        repeated: whether ids may occur more than once.
    """
    seen: set[int] = set()
    for index, item in enumerate(items):
        number, image, category = item.get("id"), item.get("image_id"), item.get("category_id")
        if type(number) is not int or abs(number) >= 2**53:  # pycocotools keeps them as float64
            yield index, f"has the id {shortened(number)}; expected an integer"
        elif number in seen and not repeated:
            yield index, "has the id of another annotation; expected different ones"
        elif not _is_id(image) or image not in images:
            yield index, f"has the image_id {shortened(image)}, which none of the {len(images)} images has"
        elif type(category) is not int or category not in categories:
            yield index, f"has the category_id {shortened(category)}, which is none of the {len(categories)} categories"
        elif item.get("ignore", 0) != 0:  # as Detectron2
            yield index, f"has ignore {shortened(item['ignore'])}, which Detectron2 does not know; it knows iscrowd"
        else:
            seen.add(number)


def _bad_numbers(items: Sequence[dict[str, Any]], sizes: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield annotations with numbers that only the evaluation reads, and cannot be right."""
    largest = (AREA_ROUNDING * sizes.prod(1)).tolist()
    areas = [item.get("area") for item in items]
    for index, (area, most) in enumerate(zip(areas, largest, strict=True)):
        if area is not None and not (is_number(area) and 0 <= area <= most):  # not for NaN
            yield index, f"has the area {shortened(area)}; expected pixels, at most those of its image"
    for index, count in enumerate([item.get("num_keypoints", 0) for item in items]):
        if type(count) is not int or count < 0:
            yield index, f"has the num_keypoints {shortened(count)}; expected how many are labeled"


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _not_coco(entry: str, what: str) -> ConfigError:
    return ConfigError(
        f"the data set {entry} is not in COCO form: {what}. A COCO file holds images, annotations and categories, and "
        "each annotation one of these images and categories."
    )
