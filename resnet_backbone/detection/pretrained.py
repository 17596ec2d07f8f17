"""Initialise parts of a detector from a classifier's weights, while they are built.

The builders call this, not the training tool alone, so that a network named in anybody's Detectron2 script gets its
weights whole and fed as they were trained, or an error. `DetectionCheckpointer`, which such a script calls afterwards,
finds no name of its own in the classifier's file and changes nothing (it then warns that it found none of the names).
"""

import functools
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d as Detectron2FrozenBatchNorm2d
from torch import nn

from resnet_backbone.engine.config import ConfigError, get_key, preprocessing_keys, same_value
from resnet_backbone.engine.pretrained import command_line_overrides, read_with_overrides
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state, read_checkpoint
from resnet_backbone.weights.loading import SAME_KEYS

logger = logging.getLogger(__name__)


def load_pretrained(module: nn.Module, cfg: CfgNode, *, part: str, key_mapping: Mapping[str, str] = SAME_KEYS) -> None:
    """Fill `module` from MODEL.WEIGHTS, where that is a classifier, and log how much was loaded.

    A detector's checkpoint is loaded after the whole model is built; here it is only checked to fit the configuration,
    or, where Detectron2's own trainer wrote it, accepted with a warning, because nothing in it says how it was fed.

    Args:
        module: a part of the detector.
        part: its name in messages.
        key_mapping: prefixes of the file's keys to prefixes of the module's.

    Raises:
        ConfigError: the preprocessing or the network differs from the weights', the stock C4 heads would leave conv5_x
            untrained, or batch normalisation would be frozen without statistics.
        CheckpointError: the file cannot be read or does not cover the module.
    """
    if cfg.MODEL.WEIGHTS and _is_detectron2_detector(cfg.MODEL.WEIGHTS):
        logger.warning(
            "%s: %s was written by Detectron2's trainer and does not say how it was fed; INPUT.FORMAT, "
            "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and MODEL.RESNETS.STRIDE_IN_1X1 are taken from the "
            "configuration as they stand",
            part,
            cfg.MODEL.WEIGHTS,
        )
        return
    checkpoint = read_pretrained(cfg)
    if checkpoint is not None:
        _check_configuration(cfg, checkpoint)
        if checkpoint.metadata.kind == "classifier":
            report = load_state(
                module,
                checkpoint.model,
                part=part,
                source=cfg.MODEL.WEIGHTS,
                key_mapping=key_mapping,
                may_miss=cfg.MODEL.NETWORK.ALLOW_MISSING,
            )
            logger.info("%s from %s", report, cfg.MODEL.WEIGHTS)
    check_frozen_norms(cfg, module, checkpoint, part=part)


def read_pretrained(cfg: CfgNode) -> Checkpoint | None:
    """What is in MODEL.WEIGHTS, read once for all who ask in turn; None if the key is empty."""
    return _read(cfg.MODEL.WEIGHTS, tuple(command_line_overrides(cfg).items())) if cfg.MODEL.WEIGHTS else None


def forget_pretrained() -> None:
    """Free the memory of the file that was read last."""
    _read_unchanged.cache_clear()


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether `module` is batch normalisation with fixed statistics, this package's or Detectron2's."""
    return isinstance(module, (FrozenBatchNorm2d, Detectron2FrozenBatchNorm2d))


def check_frozen_norms(cfg: CfgNode, module: nn.Module, checkpoint: Checkpoint | None, *, part: str) -> None:
    """Raise ConfigError if `module` has frozen batch normalisation whose statistics nobody ever estimated."""
    frozen = sum(is_frozen_norm(m) for m in module.modules())
    estimated = checkpoint is not None and checkpoint.metadata.norm_statistics != "never"
    if frozen and not estimated and not cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN:
        weights = f"{cfg.MODEL.WEIGHTS} never estimated them" if cfg.MODEL.WEIGHTS else "MODEL.WEIGHTS is empty"
        raise ConfigError(
            f"{part} has {frozen} frozen batch normalisations without statistics ({weights}): they would be the "
            "identity, and activations would grow without bound. Give pretrained weights in MODEL.WEIGHTS, set "
            "MODEL.RESNETS.NORM to BN and MODEL.BACKBONE.FREEZE_AT to 0, or set "
            "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN True to do it anyway."
        )


def _check_configuration(cfg: CfgNode, checkpoint: Checkpoint) -> None:
    for key, value in preprocessing_keys(checkpoint.metadata).items():
        if not same_value(get_key(cfg, key), value):
            raise ConfigError(
                f"{key} is {get_key(cfg, key)} in the configuration, but {cfg.MODEL.WEIGHTS} was trained with {value}. "
                f"Set {key} to {value}, or give weights that were trained with {get_key(cfg, key)}."
            )
    if checkpoint.metadata.kind == "classifier" and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and _has_roi_heads(cfg):
        raise ConfigError(
            "MODEL.ROI_HEADS.NAME is Res5ROIHeads, which builds a res5 of its own that no tensor of "
            f"{cfg.MODEL.WEIGHTS} would cover. Set MODEL.ROI_HEADS.NAME to NetworkRes5ROIHeads."
        )


def _has_roi_heads(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")


def _read(path: str, overrides: tuple[tuple[str, Any], ...]) -> Checkpoint:
    """The builders of backbone and heads read the same file in turn: keep the last one, while it is unchanged."""
    if not Path(path).is_file():
        if "://" in path:
            raise CheckpointError(
                f"MODEL.WEIGHTS is {path}, and nothing is downloaded here. Download it, and give the file's path."
            )
        return read_checkpoint(path)  # raises, naming what is near
    return _read_unchanged(path, os.stat(path).st_mtime_ns, overrides)


@functools.lru_cache(maxsize=1)
def _read_unchanged(path: str, modified: int, overrides: tuple[tuple[str, Any], ...]) -> Checkpoint:
    return read_with_overrides(path, dict(overrides))


def _is_detectron2_detector(path: str) -> bool:
    """Whether `path` is what Detectron2's own trainer writes for a model with one of this package's backbones."""
    try:
        payload = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        return False  # read_checkpoint says what is wrong with it
    if not isinstance(payload, dict) or "metadata" in payload or not isinstance(payload.get("model"), dict):
        return False
    return any(name.startswith(("backbone.network.", "backbone.bottom_up.network.")) for name in payload["model"])
