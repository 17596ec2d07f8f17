"""Detectron2's mapper, with images read by the rules that hold for pretraining too."""

import copy
import os
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image

from resnet_backbone.data.decode import to_eight_bits, too_long
from resnet_backbone.data.errors import DatasetError


class Mapper(DatasetMapper):
    """A DatasetMapper that raises DatasetError, with the file's name, for an image or labels that cannot be read.

    Images are read by `read_image`. Everything else is Detectron2's, in the same order.
    """

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(record)
        image = read_image(record["file_name"], self.image_format)
        try:
            utils.check_image_size(record, image)
        except utils.SizeMismatchError as error:
            raise _unreadable(record["file_name"], error) from error
        labels = None
        if "sem_seg_file_name" in record:
            labels = _read_labels(record.pop("sem_seg_file_name"), image.shape[:2])
        both = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(both)
        size = both.image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(both.image.transpose(2, 0, 1)))
        if both.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(both.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(record, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, size)
        return record


def read_image(file: str, channels: str) -> np.ndarray:
    """Return an image as Detectron2's `read_image` does, turned by its EXIF orientation; but 16 bits become 8.

    Args:
        channels: INPUT.FORMAT.

    Raises:
        DatasetError: the file is no image, cut off, or has a shape or pixels that are not supported.
    """
    image, form = _open(file)
    try:
        if found := too_long(*image.size):
            raise ValueError(found)
        # Turned first: a converted image has lost the orientation.
        image = to_eight_bits(utils._apply_exif_orientation(image), form)
        return utils.convert_PIL_to_numpy(image, channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise _unreadable(file, error) from error


def _read_labels(file: str, size: tuple[int, int]) -> np.ndarray:
    """Return semantic labels `(H, W)` uint8, which must have the image's size."""
    image, _ = _open(file)
    try:
        labels = utils.convert_PIL_to_numpy(utils._apply_exif_orientation(image), "L").squeeze(2)
        if labels.shape != tuple(size):
            raise ValueError(f"{labels.shape[1]}×{labels.shape[0]} labels for {size[1]}×{size[0]} pixels")
        return labels
    except Exception as error:
        raise _unreadable(file, error) from error


def _open(file: str) -> tuple[Image.Image, str | None]:
    if os.path.exists(file) and not os.path.isfile(file):  # opening a FIFO would wait forever
        raise _unreadable(file, "it is no regular file")
    try:
        with PathManager.open(file, "rb") as opened:
            image = Image.open(opened)
            form = image.format
            image.load()
            return image, form
    except Exception as error:  # also Pillow's DecompressionBombError, for more than 179 million pixels
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: object) -> DatasetError:
    return DatasetError(
        f"the image {file} cannot be read ({' '.join(str(error).split())}). Replace it or remove it from the "
        "annotations."
    )
