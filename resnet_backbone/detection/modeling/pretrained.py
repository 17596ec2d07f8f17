"""Networks with their pretrained weights by one call, for LazyConfig and for scripts without a configuration."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from resnet_backbone.detection.modeling.backbone import NetworkBackbone
from resnet_backbone.detection.weights import check_frozen_norms, show_log
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.pretrained import read_with_overrides
from resnet_backbone.networks import accepted_arguments, build_network
from resnet_backbone.weights import Checkpoint, Metadata, load_state

logger = logging.getLogger(__name__)


class PretrainedBackbone(NetworkBackbone):
    """A backbone whose weights say how images are fed to it.

    Attributes:
        pixel_mean, pixel_std: three values each, for images in 0…255, channels in the order of `input_format`.
        input_format: "RGB" or "BGR".
    """

    def __init__(self, network: nn.Module, metadata: Metadata, *, out_features: Sequence[str], freeze_at: int):
        super().__init__(network, out_features=out_features, freeze_at=freeze_at)
        fed = _fed(metadata)
        self.pixel_mean, self.pixel_std, self.input_format = fed["pixel_mean"], fed["pixel_std"], fed["input_format"]


def pretrained_backbone(
    *, weights: str, out_features: Sequence[str], freeze_at: int = 0, norm: str = "FrozenBN"
) -> PretrainedBackbone:
    """Build the network in `weights` up to the last of `out_features`, with all its weights, and log their number.

    Args:
        weights: file of a classifier, in any format that MODEL.WEIGHTS takes.
        out_features: names of the features to return, e.g. ["res2", "res3", "res4", "res5"], ["conv5"].
        freeze_at: number of stages to freeze, starting with the stem.
        norm: "FrozenBN", "BN" or "SyncBN" for batch norm; ignored if the network has another norm or none.

    Raises:
        InputError: the file cannot be read, does not hold a classifier or does not cover the network, the network lacks
            a feature, or batch normalization would be frozen without statistics.
    """
    checkpoint = _read(weights)
    stages = _build(checkpoint.metadata, device="meta").stages_up_to(out_features)
    network = _build_stages(checkpoint.metadata, stages, norm)
    backbone = PretrainedBackbone(network, checkpoint.metadata, out_features=out_features, freeze_at=freeze_at)
    _load(backbone.network, checkpoint, weights, part="backbone")  # after freezing, which fixes more statistics
    return backbone


def pretrained_res5(*, weights: str, norm: str = "FrozenBN") -> nn.Module:
    """Build conv5_x of the ResNet in `weights` with its weights: the `res5` of Detectron2's `Res5ROIHeads`.

    Arguments and errors are those of `pretrained_backbone`.
    """
    checkpoint = _read(weights)
    stages = _build(checkpoint.metadata, device="meta").stage_names
    if "res5" not in stages:
        raise ConfigError(f"the {checkpoint.metadata.architecture} in {weights} has no res5, only {', '.join(stages)}.")
    network = _build_stages(checkpoint.metadata, ("res5",), norm)
    _load(network, checkpoint, weights, part="roi_heads.res5")
    return network.layer4


def pretrained_input(weights: str) -> dict[str, Any]:
    """Return how images are fed to the network in `weights`, as the `pixel_mean`, `pixel_std` and `input_format` of
    Detectron2's models. `input_format` is also the mappers' `image_format`."""
    return _fed(_read(weights).metadata)


def _fed(metadata: Metadata) -> dict[str, Any]:
    return {
        "pixel_mean": list(metadata.pixel_mean),
        "pixel_std": list(metadata.pixel_std),
        "input_format": metadata.channel_order,
    }


def _read(weights: str) -> Checkpoint:
    show_log()
    checkpoint = read_with_overrides(weights, {})
    if checkpoint.metadata.kind != "classifier":
        raise ConfigError(f"{weights} holds a {checkpoint.metadata.kind}; give a classifier's checkpoint.")
    return checkpoint


def _build(metadata: Metadata, *, device: str, **arguments: Any) -> nn.Module:
    """Build the network that `metadata` describes, with random weights."""
    accepted = accepted_arguments(metadata.architecture)
    theirs = {name: value for name, value in metadata.arguments.items() if name in accepted}
    with torch.device(device):
        return build_network(metadata.architecture, **theirs | arguments)


def _build_stages(metadata: Metadata, stages: Sequence[str], norm: str) -> nn.Module:
    """Build some stages of the network that `metadata` describes, with `norm` for batch norm."""
    arguments = {}
    has_batch_norm = metadata.arguments.get("norm", "BN") in ("BN", "SyncBN", "FrozenBN")
    if has_batch_norm and "norm" in accepted_arguments(metadata.architecture):
        arguments["norm"] = norm
    return _build(metadata, device="cpu", stages=stages, **arguments)


def _load(network: nn.Module, checkpoint: Checkpoint, file: str, *, part: str) -> None:
    logger.info("%s from %s", load_state(network, checkpoint.model, part=part, source=file), file)
    check_frozen_norms(network, checkpoint, file, part=part)
