"""Read MODEL.WEIGHTS in any format that `weights.read_weights` supports, with overrides from the configuration."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, get_key, origin
from resnet_backbone.engine.network_config import ARGUMENT_KEYS
from resnet_backbone.weights import Checkpoint, MissingMetadata, read_weights

logger = logging.getLogger(__name__)

# What a file may leave unspecified, and the key that sets it.
OVERRIDE_KEYS = {
    "architecture": "MODEL.NETWORK.NAME",
    "channel_order": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": ARGUMENT_KEYS["stride_in_1x1"],
}


def command_line_overrides(cfg: CfgNode) -> dict[str, Any]:
    """What the command line says about the weights, keyed by `read_weights` argument.

    Configuration files don't count: the recipes set their own preprocessing and stride placement, which say nothing
    about a user's file.
    """
    overrides = {name: get_key(cfg, key) for name, key in OVERRIDE_KEYS.items() if origin(cfg, key) == COMMAND_LINE}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}


def read_with_overrides(file: str, overrides: Mapping[str, Any]) -> Checkpoint:
    """Read `file`, whatever library wrote it, and rename its parameters to ours.

    The result's metadata holds what the file or its format's convention says, for `fill_from_metadata` to compare with
    the configuration. `overrides` supplies only what neither says.

    Raises:
        ConfigError: something about the weights is not specified anywhere; the message names the keys that set it.
        CheckpointError: the file cannot be read, or holds no network from the catalogue.
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
