"""Draw objects on an image: annotations as the network gets them, or a detector's predictions."""

import functools
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, RotatedBoxes
from detectron2.utils.colormap import colormap
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_COLORS = colormap(rgb=True).astype(int)
_OPACITY = 0.4  # of masks
_VISIBLE = 0.05  # keypoints of a lower score, or without a label, are not drawn


def draw(image: np.ndarray, instances: Instances, names: Sequence[str]) -> np.ndarray:
    """Return a copy of an image with the outlines, masks, keypoints and class names of objects on it.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        instances: in the image's pixels, with fields named as a detector's output (`pred_boxes`, `pred_classes`,
            `scores`, …) or as a training image's (`gt_boxes`, `gt_classes`, …); each is optional.
        names: of the classes; a class without a name is drawn with its number.
    """
    found = {name.removeprefix("pred_").removeprefix("gt_"): value for name, value in instances.get_fields().items()}
    classes = found["classes"].tolist() if "classes" in found else [0] * len(instances)
    colors = [tuple(_COLORS[number % len(_COLORS)].tolist()) for number in classes]
    if "masks" in found:
        image = _with_masks(image, found["masks"], colors)
    canvas = Image.fromarray(np.ascontiguousarray(image))
    pen, width = ImageDraw.Draw(canvas), max(1, round(min(canvas.size) / 240))
    outlines = _outlines(found["boxes"]) if "boxes" in found else []
    for outline, color in zip(outlines, colors):
        pen.line([*outline, outline[0]], fill=color, width=width)
    for points, color in zip(found["keypoints"].tolist() if "keypoints" in found else [], colors):
        for x, y, visible in points:
            if visible > _VISIBLE:
                pen.ellipse([x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width], fill=color)
    if "classes" in found:
        scores = found["scores"].tolist() if "scores" in found else [None] * len(classes)
        for outline, color, number, score in zip(outlines, colors, classes, scores):
            name = names[number] if number < len(names) else str(number)
            _label(pen, outline, name if score is None else f"{name} {score:.0%}", color)
    return np.array(canvas)


def _with_masks(image: np.ndarray, masks: Tensor | BitMasks | PolygonMasks, colors: Sequence[tuple]) -> np.ndarray:
    height, width = image.shape[:2]
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    image = image.astype(np.float32)
    for mask, color in zip(masks.cpu().numpy().astype(bool), colors):
        image[mask] += _OPACITY * (np.float32(color) - image[mask])
    return image.round().astype(np.uint8)


def _outlines(boxes: Boxes | RotatedBoxes) -> list[list[tuple[float, float]]]:
    """Return each box's four corners, `(x, y)` in pixels."""
    if isinstance(boxes, RotatedBoxes):
        return [[tuple(p) for p in cv2.boxPoints(((x, y), (w, h), -a))] for x, y, w, h, a in boxes.tensor.tolist()]
    return [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in boxes.tensor.tolist()]


def _label(pen: ImageDraw.ImageDraw, outline: Sequence[tuple[float, float]], text: str, color: tuple) -> None:
    """Write above an outline's topmost corner, or inside of it where the image ends, but within the image."""
    letters = font(max(10, round(min(pen.im.size) / 32)))
    right, bottom = pen.textbbox((0, 0), text, font=letters)[2:]
    x, y = min(outline, key=lambda corner: (corner[1], corner[0]))
    x = max(0, min(x, pen.im.size[0] - right))
    y = y - bottom if y >= bottom else max(0, y)
    pen.rectangle([x, y, x + right, y + bottom], fill=color)
    ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
    pen.text((x, y), text, fill=ink, font=letters)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return a font of any script with letters of about this many pixels."""
    from matplotlib import font_manager  # only here, since it takes long to import

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)  # comes with matplotlib
