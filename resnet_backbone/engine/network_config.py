"""What weights imply for the configuration, and the configuration for the network."""

import functools
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.config import ConfigError, get_key, origin, set_key
from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.networks import ARGUMENTS
from resnet_backbone.weights import Metadata

# Network constructor arguments that the configuration sets, with their keys.
ARGUMENT_KEYS = {name: argument.key for name, argument in ARGUMENTS.items() if argument.key is not None}


def arguments_from_config(cfg: CfgNode, accepted: Sequence[str]) -> dict[str, Any]:
    """The constructor arguments that the configuration sets and this network accepts.

    Args:
        accepted: the argument names of this catalogue row (`networks.accepted_arguments(name)`).

    Raises:
        ConfigError: a key asks for something that this network does not offer.
    """
    values = {argument: get_key(cfg, key) for argument, key in ARGUMENT_KEYS.items()}
    for argument, key in ARGUMENT_KEYS.items():
        default = get_key(_defaults(), key)
        # Detectron2's own configs set stride placement and norm for any network.
        if argument not in (*accepted, "stride_in_1x1", "norm") and values[argument] != default:
            by = f" ({origin(cfg, key)})" if origin(cfg, key) else ""
            raise ConfigError(
                f"{key} is {values[argument]}{by}, but {cfg.MODEL.NETWORK.NAME} does not support that. "
                f"Leave it at {default}."
            )
    return {argument: value for argument, value in values.items() if argument in accepted}


@functools.lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_engine_config(cfg)
    return cfg


def fill_from_metadata(cfg: CfgNode, metadata: Metadata, file: str) -> None:
    """Take the preprocessing and network arguments from the weights; fail if the user set something else.

    Raises:
        ConfigError: a key set by the user differs from the metadata; the message names both values.
    """
    for key, value in preprocessing_keys(metadata).items():
        current = get_key(cfg, key)
        if same_value(current, value):
            continue
        if (by := origin(cfg, key)) is not None:
            raise ConfigError(
                f"{key} is {_plain(current)} ({by}), but the weights in {file} were trained with {_plain(value)}. "
                f"Remove {key} from the configuration, or give weights that were trained with {_plain(current)}."
            )
        set_key(cfg, key, value, f"metadata of {file}")


def preprocessing_keys(metadata: Metadata) -> dict[str, Any]:
    """The configuration that `metadata` implies, by key: the values that must match for the weights to be valid."""
    keys = {
        "INPUT.FORMAT": metadata.channel_order,
        "MODEL.PIXEL_MEAN": list(metadata.pixel_mean),
        "MODEL.PIXEL_STD": list(metadata.pixel_std),
        "MODEL.NETWORK.NAME": metadata.architecture,
        "MODEL.NETWORK.WIDTH": metadata.arguments.get("width", 1.0),
    }
    for name, value in metadata.arguments.items():
        if name not in ARGUMENTS:
            raise ConfigError(
                f"the weights are of a {metadata.architecture} with {name}={value}, which this version does not know. "
                "Use the version that wrote them, or a newer one."
            )
        argument = ARGUMENTS[name]
        # Once trained, batch norm computes the same whether it is frozen, synchronized over processes, or neither.
        if argument.decides == "training" or name == "norm" or (argument.adjustable and metadata.kind == "classifier"):
            continue
        keys[argument.key] = value
    return keys


def fill_adjustable(cfg: CfgNode, metadata: Metadata, file: str) -> None:
    """Take a classifier's adjustable arguments (its weights also work with other values) unless the user set them."""
    for name, value in metadata.arguments.items():
        key = ARGUMENTS[name].key
        if ARGUMENTS[name].adjustable and origin(cfg, key) is None:
            set_key(cfg, key, value, f"metadata of {file}")


def same_value(one: Any, other: Any) -> bool:
    """Equality up to float32 rounding (123.675 equals 123.67500305), treating lists and tuples alike."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return abs(one - other) <= 1e-5 * max(abs(one), abs(other))
    return one == other


def _plain(value: Any) -> str:
    return f"[{', '.join(f'{v:g}' for v in value)}]" if isinstance(value, (list, tuple)) else str(value)
