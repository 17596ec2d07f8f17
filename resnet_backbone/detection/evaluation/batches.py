"""Test images in batches of one shape: nothing is padded, so each is detected on as if it were alone."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

IMAGES_ON_A_GPU = 8


def batch_by_shape(
    cfg: CfgNode, records: Sequence[Mapping[str, Any]], indices: Iterable[int], most: int
) -> list[list[int]]:
    """Return all of `indices` in batches of at most `most` images that have the same shape once they are resized.

    An image whose record does not say its size is alone.
    """
    if most == 1:
        return [[index] for index in indices]
    shapes = {index: _resized_shape(cfg, records[index]) for index in indices}
    known = [index for index, shape in shapes.items() if shape is not None]
    batches = [[index] for index, shape in shapes.items() if shape is None]
    for _, group in itertools.groupby(sorted(known, key=shapes.get), key=shapes.get):
        group = list(group)
        batches += [group[start : start + most] for start in range(0, len(group), most)]
    return batches


def _resized_shape(cfg: CfgNode, record: Mapping[str, Any]) -> tuple[int, int] | None:
    if "height" not in record or "width" not in record:
        return None
    size, shape = cfg.INPUT.MIN_SIZE_TEST, (record["height"], record["width"])
    return ResizeShortestEdge.get_output_shape(*shape, size, cfg.INPUT.MAX_SIZE_TEST) if size else shape
