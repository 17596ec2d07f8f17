"""Detectron2's mapper, with images read by the rules that hold for pretraining too."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from resnet_backbone.data.decode import to_eight_bits, too_long
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.detection.data.fast_images import FastAugmentation, Photograph, accelerated
from resnet_backbone.detection.data.scale_jitter import scale_jitter


class Mapper(DatasetMapper):
    """A DatasetMapper that raises DatasetError, with the file's name, for an image or labels that cannot be read.

    Images are read by `read_image`. Everything else is Detectron2's, in the same order, except that
    INPUT.SCALE_JITTER takes the place of the resizing. With MODEL.ACCELERATE, photographs are decoded and resized
    faster (`fast_images.py`), with the same random numbers.
    """

    def __init__(self, cfg: CfgNode, is_train: bool = True):
        super().__init__(cfg, is_train)
        if cfg.MODEL.ACCELERATE:
            self.augmentations = T.AugmentationList([accelerated(each) for each in self.augmentations.augs])

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.SCALE_JITTER.ENABLED:
            arguments["augmentations"] = [*scale_jitter(cfg), *arguments["augmentations"][1:]]
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # of objects that the crop cuts
        return arguments

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        with of_a_data_set():
            return self._map(dict(record))

    def _map(self, record: dict[str, Any]) -> dict[str, Any]:
        if "annotations" in record:  # their values are replaced, not changed
            record["annotations"] = [dict(annotation) for annotation in record["annotations"]]
        data = read_file(record["file_name"])
        both, transforms = self._augmented_photograph(data, record) or self._augmented(data, record)
        size = both.image.shape[:2]
        record["image"] = _planes(both.image)
        if both.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(both.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(record, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, size)
        return record

    def _augmented(self, data: bytes, record: dict[str, Any]) -> tuple[T.AugInput, T.TransformList]:
        """Return the augmented image, with semantic labels if the record has some, and what was done to it."""
        image = decode_image(data, record["file_name"], self.image_format)
        _check_size(record, image)
        labels = None
        if "sem_seg_file_name" in record:
            labels = _read_labels(record.pop("sem_seg_file_name"), image.shape[:2])
        both = T.AugInput(image, sem_seg=labels)
        return both, self.augmentations(both)

    def _augmented_photograph(self, data: bytes, record: dict[str, Any]) -> tuple[T.AugInput, T.TransformList] | None:
        """Return the same for an ordinary photograph, faster; None for anything else, or a crop before the resizing.

        It is resized first, to a size that is drawn before it is decoded.
        """
        resize, *others = self.augmentations.augs
        if not isinstance(resize, FastAugmentation) or "sem_seg_file_name" in record:
            return None
        photograph = Photograph.open(data)
        if photograph is None or self.image_format not in ("RGB", "BGR"):
            return None
        whole = np.broadcast_to(np.uint8(0), (*photograph.shape, 3))
        _check_size(record, whole)
        transform = resize.get_transform(whole)
        size = (transform.new_h, transform.new_w) if isinstance(transform, T.ResizeTransform) else None
        image = photograph.decode(self.image_format, at_least=size)
        if image is None:
            return None
        both = T.AugInput(transform.apply_image(image))
        return both, T.TransformList([transform, *T.AugmentationList(others)(both).transforms])

    def _transform_annotations(
        self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        if all(annotation.get("iscrowd", 0) for annotation in record["annotations"]):
            # Detectron2's would look for the boxes of masks that there are not.
            record.pop("annotations")
            record["instances"] = utils.annotations_to_instances([], size)
        else:
            super()._transform_annotations(record, transforms, size)


def _check_size(record: dict[str, Any], image: np.ndarray) -> None:
    try:
        utils.check_image_size(record, image)
    except utils.SizeMismatchError as error:
        raise _unreadable(record["file_name"], error) from error


def _planes(image: np.ndarray) -> torch.Tensor:
    """Return `(H, W, C)` as a contiguous tensor `(C, H, W)`."""
    planes = image.transpose(2, 0, 1)
    if planes.strides[2] < 0:  # mirrored, which torch does faster than NumPy
        return torch.from_numpy(np.ascontiguousarray(planes[:, :, ::-1])).flip(2)
    return torch.from_numpy(np.ascontiguousarray(planes))


@contextlib.contextmanager
def of_a_data_set() -> Iterator[None]:
    """Add what to do to the message of a DatasetError about an image that a data set names."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{error} Replace it or remove it from the annotations.") from error.__cause__


def read_image(file: str, channels: str) -> np.ndarray:
    """Return an image as Detectron2's `read_image` does, turned by its EXIF orientation; but 16 bits become 8.

    Args:
        channels: INPUT.FORMAT.

    Raises:
        DatasetError: the file is no image, cut off, or has a shape or pixels that are not supported.
    """
    return decode_image(read_file(file), file, channels)


def decode_image(data: bytes, file: str, channels: str) -> np.ndarray:
    """Return what `read_image` does from the file's bytes."""
    image, form = _decode(data, file)
    try:
        if found := too_long(*image.size):
            raise ValueError(found)
        # Turned first: a converted image has lost the orientation.
        image = to_eight_bits(utils._apply_exif_orientation(image), form)
        return utils.convert_PIL_to_numpy(image, channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise _unreadable(file, error) from error


def _read_labels(file: str, size: tuple[int, int]) -> np.ndarray:
    """Return semantic labels `(H, W)` uint8, which must have the image's size; of a palette image, the indices."""
    image, _ = _decode(read_file(file), file)
    try:
        image = utils._apply_exif_orientation(image)
        # Detectron2's evaluator reads indices, too.
        labels = np.array(image) if image.mode == "P" else utils.convert_PIL_to_numpy(image, "L").squeeze(2)
        if labels.shape != tuple(size):
            raise ValueError(f"{labels.shape[1]}×{labels.shape[0]} labels for {size[1]}×{size[0]} pixels")
        return labels
    except Exception as error:
        raise _unreadable(file, error) from error


def read_file(file: str) -> bytes:
    """Return a file's bytes; raise DatasetError if it cannot be read."""
    if os.path.exists(file) and not os.path.isfile(file):  # opening a FIFO would wait forever
        raise _unreadable(file, "it is no regular file")
    try:
        with PathManager.open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise _unreadable(file, error) from error


def _decode(data: bytes, file: str) -> tuple[Image.Image, str | None]:
    """Decode all pixels by Pillow; return them with the file's form."""
    try:
        image = Image.open(io.BytesIO(data))
        form = image.format
        image.load()
        return image, form
    except UnidentifiedImageError as error:  # whose own words are about an object in memory
        raise _unreadable(file, f"its {len(data)} bytes are no image of a known format") from error
    except Exception as error:  # also Pillow's DecompressionBombError, for more than 179 million pixels
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: object) -> DatasetError:
    return DatasetError(f"the image {file} cannot be read ({' '.join(str(error).split())}).")
