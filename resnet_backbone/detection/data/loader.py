"""Training images for Detectron2's models; each batch is a function of seed and iteration."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset

from resnet_backbone.data.corrupt import CorruptCounter, first_readable
from resnet_backbone.data.sampler import BatchSampler, WeightedDraw, seeded_globals
from resnet_backbone.data.workers import Loader
from resnet_backbone.detection.data.annotated import image_size
from resnet_backbone.detection.data.copy_paste import paste, some_objects
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.engine.config import ConfigError, as_config_error

logger = logging.getLogger(__name__)


class PositionDataset(Dataset):
    """Detectron2's data set dicts passed through its mapper, with augmentation determined by seed and position.

    Detectron2's augmentations draw from NumPy's global generator, which is seeded for each image.

    With `on_corrupt` "skip", another image replaces an unreadable one (`corrupt.first_readable`), and the sentences
    about the unreadable ones are in the result's list `replaced`.

    Args:
        copy_paste: probability that objects of a second image are pasted onto an image (`copy_paste`).
        repeats: how often each image comes in an epoch, which is also how often it is the second one; None: equally.
    """

    def __init__(
        self,
        dicts: list[dict[str, Any]],
        mapper: Mapper,
        *,
        seed: int,
        on_corrupt: str = "stop",
        copy_paste: float = 0.0,
        repeats: np.ndarray | None = None,
    ):
        self._dicts = DatasetFromList(dicts)  # serialized, so workers share the memory
        self._mapper = mapper
        self._seed = seed
        self._on_corrupt = on_corrupt
        self._copy_paste = copy_paste
        self._draw = WeightedDraw(np.ones(len(dicts)) if repeats is None else repeats)

    def __len__(self) -> int:
        return len(self._dicts)

    def file_name(self, index: int) -> str:
        return self._dicts[index]["file_name"]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        replaced: list[str] = []

        def read(load: Callable[[int], Any], drawn: int) -> Any:
            if self._on_corrupt == "stop":
                return load(drawn)
            found, sentences = first_readable(load, drawn, size=len(self), seed=self._seed, position=position)
            replaced.extend(sentences)
            return found

        def load(drawn: int) -> dict[str, Any]:
            with seeded_globals(self._seed, position):
                sample = self._mapper(self._dicts[drawn])
                if np.random.random() < self._copy_paste:
                    source = read(self._load_source, int(self._draw(np.random.random())))
                    if source is not None:
                        sample["image"], sample["instances"] = paste(
                            sample["image"], sample["instances"], source["image"], source["instances"]
                        )
                return sample

        sample = read(load, index)
        return sample if self._on_corrupt == "stop" else {**sample, "replaced": replaced}

    def _load_source(self, index: int) -> dict[str, Any] | None:
        """Load an image with the objects to paste from it; None, without reading it, if they are none."""
        record = self._dicts[index]
        objects = some_objects(record)
        return self._mapper({**record, "annotations": objects}) if objects else None


class TrainBatches:
    """This process's batches, starting at any iteration: lists of Detectron2's input dicts.

    Attributes:
        num_images: number of images in an epoch, with repetitions.
    """

    def __init__(self, cfg: CfgNode):
        with as_config_error("DATALOADER.MAX_CORRUPT"):
            self._count_corrupt = CorruptCounter(cfg.DATALOADER.MAX_CORRUPT)
        fewest = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        try:
            dicts = get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=fewest,
                proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            )
        except AssertionError as error:  # Detectron2 filtered every image out
            raise ConfigError(
                f"no image of DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} has {fewest} labeled keypoints. Lower "
                "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE."
            ) from error
        self._cfg = cfg
        self._repeats = None
        if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            self._repeats = repeat_factors(dicts, cfg.DATALOADER.REPEAT_THRESHOLD)
        self._dataset = PositionDataset(
            dicts,
            Mapper(cfg, is_train=True),
            seed=cfg.SEED,
            on_corrupt=cfg.DATALOADER.ON_CORRUPT,
            copy_paste=cfg.INPUT.COPY_PASTE,
            repeats=self._repeats,
        )
        self._groups = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self._groups = np.array([_is_wide(record) for record in dicts], dtype=np.int8)
        self.num_images = self._sampler(0).epoch_length
        if self._repeats is not None:
            logger.info(
                "%d of %d images have a repeat factor above 1, the largest %.3g; an epoch has %d images "
                "(DATALOADER.REPEAT_THRESHOLD %g)",
                np.sum(self._repeats > 1),
                len(dicts),
                self._repeats.max(),
                self.num_images,
                cfg.DATALOADER.REPEAT_THRESHOLD,
            )

    def names(self, iteration: int) -> list[str]:
        """Return the files of this process's images at an iteration."""
        return [self._dataset.file_name(index) for _, index in self._sampler(iteration).batch(iteration)]

    def _sampler(self, start_iteration: int) -> BatchSampler:
        return BatchSampler(
            len(self._dataset),
            self._cfg.SOLVER.IMS_PER_BATCH,
            seed=self._cfg.SEED,
            start_iteration=start_iteration,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            groups=self._groups,
            repeats=self._repeats,
        )

    def __call__(self, start_iteration: int) -> Iterator[list[dict[str, Any]]]:
        workers = self._cfg.DATALOADER.NUM_WORKERS
        loader = Loader(
            self._dataset,
            self._sampler(start_iteration),
            workers=workers,
            collate_fn=_as_list,
            pin_memory=self._cfg.MODEL.DEVICE.startswith("cuda"),
        )
        return self._counted(iter(loader))

    def _counted(self, batches: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        for batch in batches:
            self._count_corrupt(len(batch), [words for record in batch for words in record.pop("replaced", ())])
            yield batch


def repeat_factors(records: list[dict[str, Any]], threshold: float) -> np.ndarray:
    """Return how often each image is to come in an epoch, `(n,)` float64, 1 or more (LVIS, arXiv 1908.03195, app. B.2).

    An image's factor is that of its rarest class: sqrt(threshold / f) for a class in a share f of the images, but at
    least 1.
    """
    annotated = [{"annotations": record.get("annotations", ())} for record in records]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(annotated, threshold)
    return factors.double().numpy()


def _is_wide(record: dict[str, Any]) -> bool:
    if "width" in record:
        return record["width"] > record["height"]
    width, height = image_size(record["file_name"])  # Detectron2's semantic data sets do not say
    return width > height


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch
