"""The ids that results are written with: consecutive ones, or those of a COCO file, to be evaluated against it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from resnet_backbone.data.errors import some
from resnet_backbone.detection.inference.sources import Source
from resnet_backbone.errors import InputError


class Ids(NamedTuple):
    """Ids of images, by file, and of categories, in the order of the detector's outputs; images may be numbered."""

    images: Mapping[Path, int] | None
    categories: Sequence[int]


def consecutive(class_names: Sequence[str]) -> Ids:
    """Number images and categories from 1."""
    return Ids(None, range(1, len(class_names) + 1))


def ids_of(file: Path, sources: Sequence[Source], class_names: Sequence[str]) -> Ids:
    """Return the ids that a COCO file gives to the images, found by the end of their path, and categories, by name.

    Of several names that a path ends with, the longest counts.

    Raises:
        InputError: the file is not in COCO's form, lacks an image or a category, or has one name for two images.
    """
    try:
        content = json.loads(file.read_bytes())
        images = {Path(image["file_name"]): image["id"] for image in content["images"]}
        categories = {category["name"]: category["id"] for category in content["categories"]}
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a COCO file with images and categories ({error!r}).") from error
    if missing := [name for name in class_names if name not in categories]:
        raise InputError(f"{file} has no category {some(missing)}, which the detector detects.")
    found, owners = {}, {}
    for source in sources:
        ends = (Path(*source.file.parts[-count:]) for count in range(len(source.file.parts), 0, -1))
        match = next((end for end in ends if end in images), None)
        if match is None:
            raise InputError(f"{source.file} is not among the {len(images)} images of {file}. Give only its images.")
        owner = owners.setdefault(images[match], source.file)
        if owner != source.file:
            raise InputError(
                f"{owner} and {source.file} would both be {match} of {file}, with the same id. Give only its images."
            )
        found[source.file] = images[match]
    return Ids(found, [categories[name] for name in class_names])
