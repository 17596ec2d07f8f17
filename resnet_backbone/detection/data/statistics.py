"""How many objects a data set has of each class, and of which sizes."""

import textwrap
from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from resnet_backbone.detection.data.contents import Contents

# COCO's limits between small, medium and large objects: the square root of the area in pixels. COCO takes the area of
# the mask; here it is the box's.
SMALL, LARGE = 32, 96
MOST = 2**31  # pixels: beyond any image
MANY = 24  # classes; of more, the text gives the first and the last
QUANTILES = {"least": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "most": 1.0}


def class_counts(contents: Contents) -> tuple[list[int], list[int]]:
    """Return the number of objects of each class, and of images with at least one; crowd regions do not count."""
    objects, classes = contents.objects, len(contents.class_names)
    kept = ~objects.crowd
    pairs = np.unique(objects.image[kept] * max(classes, 1) + objects.category[kept])
    return (
        np.bincount(objects.category[kept], minlength=classes).tolist(),
        np.bincount(pairs % max(classes, 1), minlength=classes).tolist()[:classes],
    )


def box_sides(contents: Contents) -> np.ndarray:
    """Return `(n, 2)`: width and height of the boxes of all objects, in pixels, where both are possible."""
    sides = contents.objects.size[~contents.objects.crowd]
    with np.errstate(invalid="ignore"):
        return sides[((sides > 0) & (sides < MOST)).all(1)]


def quantiles(contents: Contents) -> dict[str, dict[str, float]]:
    """Return quantiles of the objects an image, the boxes' sizes and their aspect ratios; empty without objects."""
    sides = box_sides(contents)
    if not len(sides):
        return {}
    an_image = np.bincount(contents.objects.image[~contents.objects.crowd], minlength=len(contents.files))
    values = {
        "objects an image": an_image,
        "box size (root of the area), pixels": np.sqrt(sides.prod(1)),
        "box width / height": sides[:, 0] / sides[:, 1],
    }
    levels = list(QUANTILES.values())
    return {
        name: dict(zip(QUANTILES, np.quantile(each, levels, method="nearest").tolist(), strict=True))
        for name, each in values.items()
    }


def size_shares(contents: Contents) -> tuple[float, float, float]:
    """Return which shares of the boxes are small, medium and large."""
    sizes = np.sqrt(box_sides(contents).prod(1))
    small, large = np.mean(sizes < SMALL), np.mean(sizes >= LARGE)
    return float(small), float(1 - small - large), float(large)


def described(contents: Contents) -> list[str]:
    """Return lines about the objects' sizes and classes; of many classes, the most and the least frequent."""
    lines = []
    if found := quantiles(contents):
        rows = [(name, *map(_short, row.values())) for name, row in found.items()]
        align = ("left", *["right"] * len(QUANTILES))
        table = tabulate(rows, ("", *QUANTILES), tablefmt="plain", disable_numparse=True, colalign=align)
        small, medium, large = size_shares(contents)
        lines += table.splitlines()
        lines.append(f"{small:.0%} small (below {SMALL} pixels), {medium:.0%} medium, {large:.0%} large (from {LARGE})")
    counts, _ = class_counts(contents)
    order = np.argsort(-np.array(counts, np.int64), kind="stable").tolist()
    words = [f"{contents.class_names[number]} {counts[number]:,}" for number in order]
    if len(words) <= MANY:
        return lines + _wrapped("objects of each class: ", words)
    half = MANY // 2
    lines += _wrapped(f"the {half} most frequent classes: ", words[:half])
    return lines + _wrapped(f"the {half} least frequent classes: ", words[-half:])


def _wrapped(start: str, words: Sequence[str]) -> list[str]:
    text = start + ", ".join(word.replace(" ", "\xa0") for word in words)  # a class and its number stay on a line
    lines = textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
