"""A trained detector as an object that takes images and returns what is on them."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor, nn

from resnet_backbone.data.decode import too_long
from resnet_backbone.detection import config
from resnet_backbone.detection.build import build_detector
from resnet_backbone.detection.checks import check_names
from resnet_backbone.detection.combinations import TEST_OPTIONS, check_combinations, why_no_options
from resnet_backbone.detection.config import get_config
from resnet_backbone.detection.data.datasets import class_names
from resnet_backbone.detection.data.mapper import read_image
from resnet_backbone.detection.evaluation.batches import IMAGES_ON_A_GPU
from resnet_backbone.detection.inference.ensemble import Member
from resnet_backbone.detection.inference.options import as_tested
from resnet_backbone.detection.weights import adopt, read
from resnet_backbone.engine import ranges
from resnet_backbone.engine.config import ConfigError, load_config, said, set_key
from resnet_backbone.engine.paths import expand
from resnet_backbone.engine.ranges import check_ranges
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Checkpoint, Metadata
from resnet_backbone.weights.checkpoint import ForeignFile, read_checkpoint

logger = logging.getLogger(__name__)

Image = str | Path | np.ndarray | Tensor

# `opts` for a detector without the test-time options that its checkpoint may have.
NO_OPTIONS = tuple(str(word) for pair in TEST_OPTIONS.items() for word in pair)


class Detector:
    """A trained detector: `detector(image)` returns the image's `Instances`, `detector(images)` a list of them.

    An image is a file, an array `(H, W, 3)` or a tensor `(3, H, W)`, both uint8. It is resized as in an evaluation
    (INPUT.MIN_SIZE_TEST). Boxes, masks and keypoints are in the pixels of the image as given, on the CPU, and
    `pred_classes` are indices into `class_names`.

    Attributes:
        model: Detectron2's model, in evaluation mode, with the test-time options of TEST around it.
        cfg: its configuration.
        class_names: in the order of the model's outputs; their numbers where nothing says the names.
        metadata: of the checkpoint; None for a file of Detectron2's trainer.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode, class_names: Sequence[str], metadata: Metadata | None):
        self.model = model.eval()
        self.cfg = cfg
        self.class_names = tuple(class_names)
        self.metadata = metadata
        self.batch_size = IMAGES_ON_A_GPU if cfg.MODEL.DEVICE.startswith("cuda") else 1
        size = cfg.INPUT.MIN_SIZE_TEST
        self._resize = T.ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST) if size else None

    def __call__(self, images: Image | Sequence[Image], *, channel_order: str = "RGB") -> Instances | list[Instances]:
        """Detect objects on one image, or on several.

        Args:
            channel_order: of arrays and tensors: "RGB", or "BGR" for what `cv2.imread` returns.

        Raises:
            DatasetError: a file cannot be read.
            InputError: an image is of another shape or type.
        """
        if isinstance(images, (str, Path, np.ndarray, Tensor)):
            return self([images], channel_order=channel_order)[0]
        return self.detect([self.prepare(_as_rgb(image, channel_order)) for image in images])

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Return the model's input for an image `(H, W, 3)` uint8, RGB: resized, in INPUT.FORMAT, with its size."""
        height, width = image.shape[:2]
        pixels = image if self._resize is None else self._resize.get_transform(image).apply_image(image)
        if self.cfg.INPUT.FORMAT == "BGR":
            pixels = pixels[:, :, ::-1]
        return {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "height": height, "width": width}

    def detect(self, inputs: Sequence[dict[str, Any]]) -> list[Instances]:
        """Return the objects on prepared images; those of one shape are batched, so nothing is padded."""
        by_shape = defaultdict(list)
        for place, each in enumerate(inputs):
            by_shape[each["image"].shape].append(place)
        found = {}
        for places in by_shape.values():
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                with torch.no_grad():
                    outputs = self.model([inputs[place] for place in some])
                found |= {place: output["instances"].to("cpu") for place, output in zip(some, outputs, strict=True)}
        return [found[place] for place in range(len(inputs))]


def load_detector(weights: str | Path, *, config_file: str | Path | None = None, opts: Sequence[str] = ()) -> Detector:
    """Return the detector in a checkpoint, on a GPU if there is one.

    A checkpoint of `tools/train_net.py` says what the detector is, how it is fed and what its classes are called. For
    a file of Detectron2's trainer, the run's configuration says it: `config_file`, or else `config.yaml` beside the
    file.

    Args:
        opts: `KEY, VALUE, …` as on the tools' command lines, such as `MODEL.ROI_HEADS.SCORE_THRESH_TEST`, `0.5`, or
            `MODEL.DEVICE`, `cpu`.

    Raises:
        ConfigError: a key contradicts the weights, or cannot be used.
        InputError: the file cannot be read, is no detector, or nothing says how it is configured.
    """
    weights = Path(expand(str(weights), "the checkpoint"))
    checkpoint = _checkpoint(weights)
    cfg = get_config()
    if config_file is None and checkpoint is not None and checkpoint.metadata.config:
        for key, value in checkpoint.metadata.config.items():
            set_key(cfg, key, value, f"metadata of {weights}")
        load_config(cfg, None, opts)
    else:
        load_config(cfg, config_file or _config_beside(weights), opts)
    set_key(cfg, "MODEL.WEIGHTS", str(weights), "the checkpoint")
    _check(cfg)
    if checkpoint is None:
        checkpoint, _ = read(cfg, None, weights.parent)
        _check_detector(checkpoint, weights)
    else:
        adopt(cfg, checkpoint, str(weights))
    names, metadata = _class_names(cfg, checkpoint), None if checkpoint is None else checkpoint.metadata
    model = build_detector(cfg, checkpoint, str(weights))
    return Detector(as_tested(cfg, model, load_members(cfg, names)), cfg, names, metadata)


def load_members(cfg: CfgNode, class_names: Sequence[str]) -> list[Member]:
    """Return the detectors of TEST.ENSEMBLE, each configured as its own checkpoint says, without test-time options.

    Args:
        class_names: which theirs must be; empty if nothing says them.

    Raises:
        InputError: a file is no detector, or none that can be in an ensemble with this one.
    """
    members = []
    for file in cfg.TEST.ENSEMBLE:
        try:
            other = load_detector(file, opts=("MODEL.DEVICE", cfg.MODEL.DEVICE, *NO_OPTIONS))
        except InputError as error:
            raise InputError(f"{said(cfg, 'TEST.ENSEMBLE')}, of which one cannot be used: {error}") from error
        named = f"{said(cfg, 'TEST.ENSEMBLE')}, but "
        if reason := why_no_options(other.cfg):
            raise InputError(f"{named}in {file}, {reason}. Leave it out.")
        count, theirs = other.cfg.MODEL.ROI_HEADS.NUM_CLASSES, other.class_names
        if count != cfg.MODEL.ROI_HEADS.NUM_CLASSES or not _are_same(theirs, class_names):
            raise InputError(
                f"{named}the {count} classes of {file} ({', '.join(theirs[:3])} …) are not this detector's "
                f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} ({', '.join(class_names[:3])} …). An ensemble averages scores, so "
                "its detectors need the same classes in the same order. Leave it out."
            )
        sizes = other.cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST
        if bool(sizes[0]) != bool(sizes[1]):
            raise InputError(
                f"{named}INPUT.MIN_SIZE_TEST of {file} is {sizes[0]}, and this detector's {sizes[1]}; with 0, images "
                "keep their own sizes, which only works if all do. Leave it out."
            )
        scale = sizes[0] / sizes[1] if all(sizes) else 1.0
        members.append(Member(other.model, scale, swapped=other.cfg.INPUT.FORMAT != cfg.INPUT.FORMAT))
    return members


def _are_same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Return whether class names agree; where nothing says them, they are missing or numbers."""
    numbers = list(map(str, range(len(theirs))))
    return not ours or list(theirs) == list(ours) or numbers in (list(theirs), list(ours))


def _checkpoint(file: Path) -> Checkpoint | None:
    """Return the content of a detector's checkpoint; None for a file that is not of this project."""
    try:
        checkpoint = read_checkpoint(file)
    except ForeignFile:
        return None
    _check_detector(checkpoint, file)
    return checkpoint


def _check_detector(checkpoint: Checkpoint | None, file: Path) -> None:
    if checkpoint is not None and checkpoint.metadata.kind != "detector":
        raise InputError(
            f"{file} holds a classifier ({checkpoint.metadata.architecture}), which detects nothing. Give a detector, "
            "as tools/train_net.py writes it."
        )


def _config_beside(weights: Path) -> Path:
    file = weights.parent / "config.yaml"
    if not file.is_file():
        raise InputError(
            f"{weights} does not say how its detector is configured, and there is no config.yaml beside it. Put the "
            "config.yaml of its training there, or name it (--config-file; config_file in a script)."
        )
    logger.info("the configuration is %s", file)
    return file


def _check(cfg: CfgNode) -> None:
    """Refuse values that cannot be used, and models that return no objects or need more than an image."""
    check_names(cfg)
    for table in (ranges.RANGES, config.RANGES):
        read = {key: values for key, values in table.items() if key.startswith(("MODEL.", "INPUT.", "TEST."))}
        check_ranges(cfg, read)
    check_combinations(cfg)
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError(
            f"{said(cfg, 'TEST.AUG.ENABLED')}, but Detectron2's test-time augmentation works in evaluations alone. Set "
            "it to False."
        )
    if cfg.MODEL.META_ARCHITECTURE in ("SemanticSegmentor", "ProposalNetwork"):
        raise InputError(f"{said(cfg, 'MODEL.META_ARCHITECTURE')}, which gives no objects with classes and scores.")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(f"{said(cfg, 'MODEL.LOAD_PROPOSALS')}: this detector needs proposals from a file.")


def _class_names(cfg: CfgNode, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """Return the checkpoint's class names, else those of the data that the configuration names."""
    if checkpoint is not None and checkpoint.metadata.class_names:
        return checkpoint.metadata.class_names
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if names := MetadataCatalog.get(name).get("thing_classes", ()):  # Detectron2's own, without their files
            return tuple(names)
        if ".json" in name:
            with contextlib.suppress(InputError, OSError, KeyError, ValueError):  # it may be on another machine
                return class_names(name)
    logger.warning("nothing says what the classes are called; they are numbered")
    node = cfg.MODEL.RETINANET if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else cfg.MODEL.ROI_HEADS
    return tuple(map(str, range(node.NUM_CLASSES)))


def _as_rgb(image: Image, channel_order: str) -> np.ndarray:
    """Return `(H, W, 3)` uint8 RGB."""
    if isinstance(image, (str, Path)):
        return read_image(expand(str(image), "the image"), "RGB")
    if channel_order not in ("RGB", "BGR"):
        raise InputError(f"channel_order is {channel_order!r}, expected RGB or BGR.")
    array, form = image, "(H, W, 3)"
    if isinstance(image, Tensor):
        array, form = np.moveaxis(image.detach().cpu().numpy(), 0, -1), "(3, H, W)"
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"an image has the shape {tuple(image.shape)}, expected {form}.")
    if array.dtype != np.uint8:
        raise InputError(
            f"an image is of {array.dtype}, expected uint8 (0…255). Multiply one in 0…1 by 255, round and convert it."
        )
    if found := too_long(*array.shape[1::-1]):
        raise InputError(f"an image has {found}.")
    return array[:, :, ::-1] if channel_order == "BGR" else array
