"""What weights imply for the configuration, and the configuration for the network."""

import functools
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.config import ConfigError, get_key, origin, said, set_key
from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.networks import ARGUMENTS, accepted_arguments, find_resnet
from resnet_backbone.networks.catalogue import find_row
from resnet_backbone.weights import Metadata

NAME = "MODEL.NETWORK.NAME"
# Network constructor arguments that the configuration sets, with their keys.
ARGUMENT_KEYS = {name: argument.key for name, argument in ARGUMENTS.items() if argument.key is not None}
# The keys that choose a row of the catalogue if NAME is empty, with the rows' own names for them.
ROW_KEYS = {
    "MODEL.RESNETS.DEPTH": "depth",
    "MODEL.RESNETS.NUM_GROUPS": "groups",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "width_per_group",
}


def network_name(cfg: CfgNode) -> str:
    """Return the catalogue's name of the configured network: MODEL.NETWORK.NAME, or the one MODEL.RESNETS describes.

    Raises:
        ConfigError: no network of the catalogue is what MODEL.RESNETS describes.
    """
    if cfg.MODEL.NETWORK.NAME:
        return cfg.MODEL.NETWORK.NAME
    wanted = {argument: get_key(cfg, key) for key, argument in ROW_KEYS.items()}
    name = find_resnet(**wanted)
    if name is None:
        described = ", ".join(f"{key.rpartition('.')[2]} {get_key(cfg, key)}" for key in ROW_KEYS)
        raise ConfigError(
            f"MODEL.RESNETS describes no network of the catalogue ({described}). It has ResNets of depth 18, 34, 50, "
            "101 and 152, ResNeXt-50 32×4d and ResNeXt-101 32×8d; for any other, set MODEL.NETWORK.NAME."
        )
    return name


def configured_network(cfg: CfgNode) -> tuple[str, dict[str, Any]]:
    """Return the catalogue's name of the configured network and the constructor arguments that the configuration sets.

    Raises:
        ConfigError: a key asks for something that this network, or any of the catalogue, does not offer.
    """
    name = network_name(cfg)
    accepted = accepted_arguments(name)
    _refuse_foreign_keys(cfg, name)
    values = {argument: get_key(cfg, key) for argument, key in ARGUMENT_KEYS.items()}
    for argument, key in ARGUMENT_KEYS.items():
        # Detectron2's own configs set stride placement and norm for any network.
        default = get_key(_defaults(), key)
        if argument not in (*accepted, "stride_in_1x1", "norm") and values[argument] != default:
            raise ConfigError(f"{said(cfg, key)}, but {name} does not support that. Leave it at {default}.")
    return name, {argument: value for argument, value in values.items() if argument in accepted}


def _refuse_foreign_keys(cfg: CfgNode, name: str) -> None:
    """Raise ConfigError if MODEL.RESNETS asks for a ResNet other than `name`, or for what no network here has."""
    row = find_row(name).arguments
    offered = {
        # DEPTH always holds a number, so it says nothing beside a NAME.
        "NUM_GROUPS": {1, row.get("groups", 1)},
        "WIDTH_PER_GROUP": {64, row.get("width_per_group", 64)},
        "STEM_OUT_CHANNELS": {64},
        # Detectron2 wants 64 for its basic blocks and gives 256 as the default.
        "RES2_OUT_CHANNELS": {256} if "block" not in row else {256, 64 * row["block"].expansion},
        "DEFORM_ON_PER_STAGE": {(False, False, False, False)},
        "DEFORM_MODULATED": {False},
        "DEFORM_NUM_GROUPS": {1},
    }
    used = {"DEPTH", "OUT_FEATURES", "NORM", "STRIDE_IN_1X1", "RES5_DILATION"}
    # A key that Detectron2 does not have asks for something of a project's own, such as DeepLab's stem.
    for key in [key for key in cfg.MODEL.RESNETS if key not in used]:
        value = cfg.MODEL.RESNETS[key]
        if (tuple(value) if isinstance(value, list) else value) not in offered.get(key, ()):
            default = _defaults().MODEL.RESNETS.get(key)
            raise ConfigError(
                f"{said(cfg, f'MODEL.RESNETS.{key}')}, but {name} here does not have that. "
                f"{'Remove it' if default is None else f'Leave it at {default}'}, or take one of Detectron2's own "
                "backbones (MODEL.BACKBONE.NAME)."
            )


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
    fill_keys(cfg, preprocessing_keys(metadata), file)


def fill_keys(cfg: CfgNode, keys: Mapping[str, Any], file: str) -> None:
    """Set the keys that weights imply; fail as `fill_from_metadata` does."""
    for key, value in keys.items():
        by = _set_by(cfg, key)
        # A default says nothing, and MODEL.RESNETS' may even describe another network.
        current = get_key(cfg, key) if by is None else current_value(cfg, key)
        if same_value(current, value):
            continue
        if by is not None:
            stands_in = key == NAME and not cfg.MODEL.NETWORK.NAME
            change = f"Set {key} to {value}" if stands_in else f"Remove {key} from the configuration"
            raise ConfigError(
                f"{key} is {_plain(current)} ({by}), but the weights in {file} were trained with {_plain(value)}. "
                f"{change}, or give weights that were trained with {_plain(current)}."
            )
        set_key(cfg, key, value, f"metadata of {file}")


def current_value(cfg: CfgNode, key: str) -> Any:
    """Return what the configuration says for one of `preprocessing_keys`."""
    return network_name(cfg) if key == NAME else get_key(cfg, key)


def _set_by(cfg: CfgNode, key: str) -> str | None:
    """Return who set `key`; for an empty NAME, who set the keys of MODEL.RESNETS that stand in for it."""
    if key != NAME or cfg.MODEL.NETWORK.NAME:
        return origin(cfg, key)
    setters = [f"{row_key} of {origin(cfg, row_key)}" for row_key in ROW_KEYS if origin(cfg, row_key)]
    return ", ".join(setters) or None


def preprocessing_keys(metadata: Metadata) -> dict[str, Any]:
    """The configuration that `metadata` implies, by key: the values that must match for the weights to be valid."""
    keys = {
        "INPUT.FORMAT": metadata.channel_order,
        "MODEL.PIXEL_MEAN": list(metadata.pixel_mean),
        "MODEL.PIXEL_STD": list(metadata.pixel_std),
        NAME: metadata.architecture,
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
