"""Training images for Detectron2's models; each batch is a function of seed and iteration."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import Dataset

from resnet_backbone.data.corrupt import CorruptCounter, first_readable
from resnet_backbone.data.sampler import BatchSampler, seeded_globals
from resnet_backbone.data.workers import Loader
from resnet_backbone.detection.data.annotated import image_size
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.engine.config import ConfigError, as_config_error


class PositionDataset(Dataset):
    """Detectron2's data set dicts passed through its mapper, with augmentation determined by seed and position.

    Detectron2's augmentations draw from NumPy's global generator, which is seeded for each image.

    With `on_corrupt` "skip", another image replaces an unreadable one (`corrupt.first_readable`), and the sentences
    about the unreadable ones are in the result's list `replaced`.
    """

    def __init__(self, dicts: list[dict[str, Any]], mapper: Mapper, *, seed: int, on_corrupt: str = "stop"):
        self._dicts = DatasetFromList(dicts)  # serialized, so workers share the memory
        self._mapper = mapper
        self._seed = seed
        self._on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self._dicts)

    def file_name(self, index: int) -> str:
        return self._dicts[index]["file_name"]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key

        def load(drawn: int) -> dict[str, Any]:
            with seeded_globals(self._seed, position):
                return self._mapper(self._dicts[drawn])

        if self._on_corrupt == "stop":
            return load(index)
        sample, replaced = first_readable(load, index, size=len(self), seed=self._seed, position=position)
        return {**sample, "replaced": replaced}


class TrainBatches:
    """This process's batches, starting at any iteration: lists of Detectron2's input dicts."""

    def __init__(self, cfg: CfgNode):
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ConfigError(
                f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, but the only sampler whose runs resume "
                "exactly is TrainingSampler. Set it to TrainingSampler."
            )
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
        self.num_images = len(dicts)
        self._cfg = cfg
        self._dataset = PositionDataset(
            dicts, Mapper(cfg, is_train=True), seed=cfg.SEED, on_corrupt=cfg.DATALOADER.ON_CORRUPT
        )
        self._groups = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self._groups = np.array([_is_wide(record) for record in dicts], dtype=np.int8)

    def names(self, iteration: int) -> list[str]:
        """Return the files of this process's images at an iteration."""
        return [self._dataset.file_name(index) for _, index in self._sampler(iteration).batch(iteration)]

    def _sampler(self, start_iteration: int) -> BatchSampler:
        return BatchSampler(
            self.num_images,
            self._cfg.SOLVER.IMS_PER_BATCH,
            seed=self._cfg.SEED,
            start_iteration=start_iteration,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            groups=self._groups,
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


def _is_wide(record: dict[str, Any]) -> bool:
    if "width" in record:
        return record["width"] > record["height"]
    width, height = image_size(record["file_name"])  # Detectron2's semantic data sets do not say
    return width > height


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch
