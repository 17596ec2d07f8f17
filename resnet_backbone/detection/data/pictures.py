"""Pictures of what a detector is trained on: a run's own batches, after augmentation, with their annotations."""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Instances
from PIL import Image, ImageDraw

from resnet_backbone.data.workers import explained_deaths
from resnet_backbone.detection import config
from resnet_backbone.detection.checks import check_datasets
from resnet_backbone.detection.combinations import check_combinations
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.drawing import draw, font
from resnet_backbone.detection.weights import read
from resnet_backbone.engine import ranges
from resnet_backbone.engine.config import ConfigError, origin, set_key
from resnet_backbone.engine.ranges import check_ranges
from resnet_backbone.engine.train import check_batch, choose_seed
from resnet_backbone.weights import atomic_write

COLUMNS = 4  # and rows of a mosaic
LARGEST = 512  # pixels: the longest side of an image in a mosaic
NARROWEST = 160  # pixels: the least width of a cell, for the caption
CAPTION = 18  # pixels: the height of a caption
GAP = 6  # pixels between cells
BACKGROUND, INK = (128, 128, 128), (255, 255, 255)


def write_pictures(cfg: CfgNode, folder: Path, *, iteration: int = 0, images: int = COLUMNS**2) -> str:
    """Write mosaics of the images that training on DATASETS.TRAIN gets from an iteration on; say what was written.

    An image is drawn as the network gets it, then scaled down if it is larger than LARGEST. No model is built, and
    nothing is written but `folder/iteration_N_001.png` and so on.

    Args:
        cfg: loaded by `engine.config.load_config`.
        folder: created if it is missing.
        iteration: the first one, from 0.
        images: how many to draw.

    Raises:
        InputError: the configuration or the data cannot be used.
    """
    if iteration < 0 or images < 1:
        raise ConfigError(f"--iteration is {iteration} and --images {images}, expected at least 0 and at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    cfg = cfg.clone()
    written = []
    with tempfile.TemporaryDirectory() as converted, explained_deaths():
        batches = _open(cfg, Path(converted))
        names = _class_names(cfg)
        pictures = ((caption, _drawn(record, cfg, names)) for caption, record in _records(batches, iteration))
        pictures = itertools.islice(pictures, images)
        while several := list(itertools.islice(pictures, COLUMNS**2)):
            written.append(folder / f"iteration_{iteration}_{len(written) + 1:03}.png")
            with atomic_write(written[-1]) as file:
                Image.fromarray(mosaic(several)).save(file, "PNG")
    last = iteration + math.ceil(images / cfg.SOLVER.IMS_PER_BATCH) - 1
    iterations = f"iteration {iteration}" if last == iteration else f"iterations {iteration} to {last}"
    files = f"{written[0]}" + (f" to {written[-1].name}" if len(written) > 1 else "")
    drawn = ""
    if origin(cfg, "SEED") == "drawn":
        drawn = (
            f"\nSEED is -1, so a seed was drawn, {cfg.SEED}, and each run draws its own. For the images of a run, set "
            "SEED to the one in its OUTPUT_DIR/config.yaml."
        )
    return f"wrote {files}: {images} images of {iterations}, seed {cfg.SEED}{drawn}"


def mosaic(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Return images with captions side by side, on cells of one size, as `(H, W, 3)` uint8.

    An image is in the upper left corner of its cell, above its caption.

    Args:
        pictures: at most COLUMNS² of them: a caption and `(H, W, 3)` uint8, RGB.
    """
    scaled = [(caption, _fitted(image)) for caption, image in pictures]
    height = max(image.shape[0] for _, image in scaled)
    width = max(NARROWEST, *(image.shape[1] for _, image in scaled))
    columns = min(COLUMNS, len(scaled))
    rows = math.ceil(len(scaled) / columns)
    cell = (width + GAP, height + CAPTION + GAP)
    canvas = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, (caption, image) in enumerate(scaled):
        x, y = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        canvas.paste(Image.fromarray(image), (x, y))
        pen.text((x, y + image.shape[0] + 1), _shortened(caption, width), fill=INK, font=font(CAPTION - 6))
    return np.array(canvas)


def _open(cfg: CfgNode, converted: Path) -> TrainBatches:
    """Return training's batches, after those checks of a run that concern its training data.

    Args:
        cfg: gets what a run takes from weights and data.
        converted: where folders are converted, as a run does in OUTPUT_DIR.
    """
    check_ranges(cfg, ranges.RANGES)
    check_ranges(cfg, config.RANGES)
    check_combinations(cfg)
    check_batch(cfg)
    choose_seed(cfg, None)
    read(cfg, None, Path(cfg.OUTPUT_DIR))  # the metadata of weights says what INPUT.FORMAT is
    set_key(cfg, "OUTPUT_DIR", str(converted), "pictures")
    set_key(cfg, "DATASETS.TEST", (), "pictures")
    check_datasets(cfg, training=True)
    return TrainBatches(cfg)


def _records(batches: TrainBatches, iteration: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the images from an iteration on, each with a caption."""
    for number, batch in enumerate(batches(iteration), iteration):
        for record in batch:
            yield f"iteration {number}: {os.path.basename(record['file_name'])}", record


def _class_names(cfg: CfgNode) -> list[str]:
    """Return the names of the objects' classes, or of semantic classes if the model knows no objects."""
    semantic = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    return list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("stuff_classes" if semantic else "thing_classes", ()))


def _drawn(record: dict[str, Any], cfg: CfgNode, names: Sequence[str]) -> np.ndarray:
    planes = record["image"].flip(0) if cfg.INPUT.FORMAT == "BGR" else record["image"]
    image = planes.permute(1, 2, 0).contiguous().numpy()
    return draw(image, record["instances"] if "instances" in record else _regions(record), names)


def _regions(record: dict[str, Any]) -> Instances:
    """Return the semantic classes of an image as objects, each with its mask."""
    labels = record["sem_seg"]
    classes = [number for number in labels.unique().tolist() if number != 255]  # 255 is not trained on
    masks = torch.stack([labels == number for number in classes]) if classes else labels.new_zeros(0, *labels.shape)
    return Instances(tuple(labels.shape), gt_masks=BitMasks(masks), gt_classes=torch.tensor(classes))


def _fitted(image: np.ndarray) -> np.ndarray:
    """Scale an image down, never up, so that its longer side has LARGEST pixels."""
    height, width = image.shape[:2]
    scale = LARGEST / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _shortened(caption: str, width: int) -> str:
    """Cut a caption in its middle to fit in `width` pixels."""
    kept = caption
    while font(CAPTION - 6).getlength(kept) > width and len(kept) > 3:
        half = (len(kept) - 2) // 2
        kept = f"{kept[:half]}…{kept[-half:]}"
    return kept
