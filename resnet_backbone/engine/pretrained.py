"""MODEL.WEIGHTS in any format that `weights.read_weights` knows, with what the configuration says about it."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, get_key, origin
from resnet_backbone.engine.network_config import ARGUMENT_KEYS
from resnet_backbone.weights import Checkpoint, MissingMetadata, read_weights

logger = logging.getLogger(__name__)

# What a file may leave open, and the key with which a user says it.
OVERRIDE_KEYS = {
    "architecture": "MODEL.NETWORK.NAME",
    "channel_order": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": ARGUMENT_KEYS["stride_in_1x1"],
}


def command_line_overrides(cfg: CfgNode) -> dict[str, Any]:
    """What the command line says about weights, by the arguments of `read_weights`.

    A configuration file does not count: the recipes set a preprocessing and a stride placement of their own, which
    were not written with anybody's file in view.
    """
    overrides = {name: get_key(cfg, key) for name, key in OVERRIDE_KEYS.items() if origin(cfg, key) == COMMAND_LINE}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}


def read_with_overrides(file: str, overrides: Mapping[str, Any]) -> Checkpoint:
    """What is in `file`, under our names, whatever library wrote it.

    What the file or its format's convention says is in the result's metadata, for `fill_from_metadata` to compare with
    the configuration. Only what neither says is taken from `overrides`.

    Raises:
        ConfigError: something about the weights is known by nobody; the keys that would say it are named.
        CheckpointError: the file cannot be read, or holds no network of the catalogue.
    """
    needed: dict[str, Any] = {}
    while True:
        try:
            conversion = read_weights(file, **needed)
        except MissingMetadata as error:
            if silent := [OVERRIDE_KEYS[name] for name in error.missing if name not in overrides]:
                raise ConfigError(
                    f"MODEL.WEIGHTS: {error.fact} Set {', '.join(silent)} on the command line to what the weights were "
                    "trained with, or convert the file with tools/convert_weights.py."
                ) from error
            needed |= {name: overrides[name] for name in error.missing}
        else:
            for line in conversion.summary().splitlines():
                logger.info(line)
            return conversion.checkpoint
