"""Configuration: the keys that both training tools share, and a loader that remembers who set what.

Every key that a YAML file or the command line sets has an origin. A key without one holds a default, which the weights'
metadata may replace; a key with one is the user's word, which a contradiction never overrides (`fill_from_metadata`).
"""

import ast
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from resnet_backbone.errors import InputError
from resnet_backbone.weights import Metadata

COMMAND_LINE = "command line"
_ORIGINS = "_resnet_backbone_origins"


class ConfigError(InputError):
    """A configuration key, file or value cannot be used."""


def add_engine_config(cfg: CfgNode) -> None:
    """Add what Detectron2 has no key for and both training tools read."""
    # Mixed precision is switched on by Detectron2's SOLVER.AMP.ENABLED; this names the type: bf16, fp16 or fp32.
    cfg.SOLVER.AMP.PRECISION = "bf16"
    # Parts that a batch is computed in, one after the other, before a step. A part's batch norm sees that part alone.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay, an iteration, of the moving average of the weights, which is evaluated and saved; 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Compile the network with torch.compile; on a GPU, record the whole step as one CUDA graph.
    cfg.SOLVER.COMPILE = False
    cfg.SOLVER.CUDA_GRAPH = False
    # Checkpoints of CHECKPOINT_PERIOD to keep, the newest; 0: all. The best (model_best.pth) is kept besides.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # WarmupPlateauLR: evaluations without an improvement of more than the threshold (in the metric's unit) before the
    # learning rate is multiplied by GAMMA.
    cfg.SOLVER.PLATEAU_PATIENCE = 3
    cfg.SOLVER.PLATEAU_THRESHOLD = 0.1
    # Above 0: a constant warm-up that ends when the training error (in per cent, averaged over LOG_PERIOD iterations)
    # is below it, instead of after WARMUP_ITERS (ResNet paper, section 4.2: 80).
    cfg.SOLVER.WARMUP_UNTIL_ERROR = 0.0
    # Report to this project of Weights & Biases too, which must be installed.
    cfg.WANDB_PROJECT = ""
    # Metrics are averaged on the device and read, printed and written every so many iterations.
    cfg.SOLVER.LOG_PERIOD = 20
    # The batch that BASE_LR, MAX_ITER, STEPS and the periods were written for. Where IMS_PER_BATCH differs, they are
    # rescaled linearly. 0: they are meant as they stand.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    cfg.MODEL.NETWORK = CfgNode()
    # A name of resnet_backbone.list_networks().
    cfg.MODEL.NETWORK.NAME = "resnet101"
    # Multiplies the number of channels, of VGG's fully connected layers too.
    cfg.MODEL.NETWORK.WIDTH = 1.0
    # ResNets: "A", "B" or "C", the kind of shortcut (ResNet paper, section 4.1).
    cfg.MODEL.NETWORK.SHORTCUT = "B"
    # ResNets: start the last norm of every residual branch at zero.
    cfg.MODEL.NETWORK.ZERO_INIT_LAST_NORM = False
    # VGG as a classifier: False leaves out the last max pooling, for crops of about 112 pixels and smaller.
    cfg.MODEL.NETWORK.POOL5 = True
    # Prefixes of parameter names that may be missing in MODEL.WEIGHTS.
    cfg.MODEL.NETWORK.ALLOW_MISSING = ()
    # Frozen batch normalisation on weights whose statistics were never estimated stops the run unless this is True.
    cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = False


# The constructor arguments of networks that the configuration decides, and the keys that decide them.
ARGUMENT_KEYS = {
    "width": "MODEL.NETWORK.WIDTH",
    "shortcut": "MODEL.NETWORK.SHORTCUT",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "norm": "MODEL.RESNETS.NORM",
    "zero_init_last_norm": "MODEL.NETWORK.ZERO_INIT_LAST_NORM",
    "res5_dilation": "MODEL.RESNETS.RES5_DILATION",
    "pool5": "MODEL.NETWORK.POOL5",
}


def network_arguments(cfg: CfgNode, accepted: Sequence[str]) -> dict[str, Any]:
    """The constructor arguments of a network that the configuration decides, as far as the network takes them.

    Args:
        accepted: the argument names of this row of the catalogue (`networks.accepted_arguments(name)`).

    Raises:
        ConfigError: a key asks for something that this network does not have.
    """
    values = {argument: get_key(cfg, key) for argument, key in ARGUMENT_KEYS.items()}
    for argument, key in ARGUMENT_KEYS.items():
        default = get_key(_defaults(), key)
        # Stride placement and norm stand in Detectron2's own configs whatever the network.
        if argument not in (*accepted, "stride_in_1x1", "norm") and values[argument] != default:
            by = f" ({origin(cfg, key)})" if origin(cfg, key) else ""
            raise ConfigError(
                f"{key} is {values[argument]}{by}, but {cfg.MODEL.NETWORK.NAME} leaves no choice there. "
                f"Leave it at {default}."
            )
    return {argument: value for argument, value in values.items() if argument in accepted}


@functools.lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_engine_config(cfg)
    return cfg


def load_config(cfg: CfgNode, config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Merge a YAML file with its `_BASE_` chain, then `KEY VALUE …` of the command line, into `cfg` and return it.

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown (the nearest is offered), a value has another type.
    """
    if config_file:
        for file, content in _yaml_chain(_find_file(config_file)):
            for key, value in _flatten(content):
                if key not in ("_BASE_", "VERSION"):
                    set_key(cfg, key, value, str(file))
    if len(overrides) % 2:
        raise ConfigError(
            f"the command line ends in {overrides[-1]!r}: keys and values come in pairs (KEY VALUE KEY VALUE …)."
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        set_key(cfg, key, value, COMMAND_LINE)
    _settle_device(cfg)
    return cfg


def set_key(cfg: CfgNode, key: str, value: Any, origin: str) -> None:
    """Set one dotted key, checked against the type of its default, and remember its origin.

    Text stands for the Python literal that it spells (`"(480, 512)"`, `"1e-3"`, `"true"`), except for a key that holds
    text. An integer may stand for a float, and a single value for a tuple or list of one.
    """
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or last not in node:
        known = [name for name, _ in _flatten(cfg)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ConfigError(f"there is no configuration key {key} ({origin}); the nearest is {near[0]}.")
    if isinstance(node[last], CfgNode):
        raise ConfigError(f"{key} ({origin}) is a group of keys: {', '.join(node[last])}. Set one of them.")
    node[last] = _coerce(node[last], value, key, origin)
    cfg.__dict__.setdefault(_ORIGINS, {})[key] = origin


def get_key(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def origin(cfg: CfgNode, key: str) -> str | None:
    """Who set `key`: a YAML file's path, "command line", "metadata of …", "rescaled …"; None for a default."""
    return cfg.__dict__.get(_ORIGINS, {}).get(key)


def fill_from_metadata(cfg: CfgNode, metadata: Metadata, file: str) -> None:
    """Take the preprocessing and the network's arguments from the weights; stop where the user said otherwise.

    Raises:
        ConfigError: a key that the user set differs from the metadata; both values are named.
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


def flat_config(cfg: CfgNode) -> dict[str, str]:
    """Every key with its value as text, for a checkpoint or a report."""
    return {key: str(value) for key, value in _flatten(cfg)}


def config_hash(flat: Mapping[str, str]) -> str:
    """SHA-256 of a configuration, by which two can be told apart; of `flat_config`."""
    return hashlib.sha256(json.dumps(dict(sorted(flat.items()))).encode()).hexdigest()


def differences(before: Mapping[str, str], cfg: CfgNode) -> list[str]:
    """What differs between the configuration of a checkpoint (`flat_config`) and `cfg`: "KEY was A, is B (origin)".

    OUTPUT_DIR, which may have been moved, does not count.
    """
    now = flat_config(cfg)
    if not before or config_hash(before) == config_hash(now):
        return []
    return [
        f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')} ({origin(cfg, key) or 'default'})"
        for key in sorted({*before, *now})
        if key != "OUTPUT_DIR" and before.get(key) != now.get(key)
    ]


def preprocessing_keys(metadata: Metadata) -> dict[str, Any]:
    """The configuration that `metadata` implies, by key: what must agree for the weights to mean what they meant."""
    keys = {
        "INPUT.FORMAT": metadata.channel_order,
        "MODEL.PIXEL_MEAN": list(metadata.pixel_mean),
        "MODEL.PIXEL_STD": list(metadata.pixel_std),
        "MODEL.NETWORK.NAME": metadata.architecture,
        "MODEL.NETWORK.WIDTH": metadata.arguments.get("width", 1.0),
    }
    for argument in ("stride_in_1x1", "shortcut"):
        if argument in metadata.arguments:
            keys[ARGUMENT_KEYS[argument]] = metadata.arguments[argument]
    return keys


def same_value(one: Any, other: Any) -> bool:
    """Equality that takes 123.675 and a float32's 123.67500305 for the same and lists and tuples alike."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return abs(one - other) <= 1e-5 * max(abs(one), abs(other))
    return one == other


def _settle_device(cfg: CfgNode) -> None:
    """Detectron2's default device is a GPU; where there is none and nobody asked for one, use the CPU."""
    by = origin(cfg, "MODEL.DEVICE")
    try:
        kind = torch.device(cfg.MODEL.DEVICE).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} ({by}), expected cuda or cpu.") from error
    if kind != "cuda" or torch.cuda.is_available():
        return
    if by is not None:
        raise ConfigError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE} ({by}), but torch finds no GPU here. Set it to cpu.")
    set_key(cfg, "MODEL.DEVICE", "cpu", "no GPU here")


def _find_file(config_file: str | Path) -> Path:
    path = Path(config_file).expanduser()
    if path.is_file():
        return path
    from detectron2 import model_zoo  # only for names such as COCO-Detection/faster_rcnn_R_50_C4_1x.yaml

    try:
        return Path(model_zoo.get_config_file(str(config_file)))
    except RuntimeError:
        folder = path.parent
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1, cutoff=0.0)
        hint = f"the nearest in {folder} is {near[0]}" if near else f"{folder} has no .yaml file"
        raise ConfigError(
            f"there is no config file {path}, nor one of that name in Detectron2's zoo; {hint}."
        ) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.constructor.ConstructorError as error:
        if not _is_part_of_detectron2(file):
            raise ConfigError(
                f"{file} has something that plain YAML does not ({error.problem}), which was not executed; write the "
                "value itself instead."
            ) from error
        content = yaml.unsafe_load(file.read_text())  # Detectron2's RetinaNet configs compute their anchors
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file: {' '.join(str(error).split())}.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {type(content).__name__}, expected a mapping of configuration keys.")
    return content


def _is_part_of_detectron2(file: Path) -> bool:
    return file.resolve().is_relative_to(Path(detectron2.__file__).resolve().parent)


def _yaml_chain(file: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file, with its content, behind the files that it is based on."""
    chain = [(file, _read_yaml(file))]
    while base := chain[0][1].get("_BASE_"):
        file = chain[0][0]
        if not isinstance(base, str):
            raise ConfigError(f"{file}: _BASE_ is {base!r}, expected the name of one YAML file.")
        path = file.parent / Path(base).expanduser()  # an absolute path replaces the folder
        if not path.is_file():
            raise ConfigError(f"{file} is based on {base}, but there is no file {path}.")
        if any(path.samefile(other) for other, _ in chain):
            raise ConfigError(f"{file} is based on itself through {base}.")
        chain.insert(0, (path, _read_yaml(path)))
    return chain


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(text: str) -> Any:
    """What text stands for: a Python literal, true or false, a list of bare words (`(coco_2014_train,)`), or itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    inner = text.strip()[1:-1]
    if text.strip() in (f"({inner})", f"[{inner}]") and not set(inner) & set("()[]{}"):
        return tuple(_literal(word.strip()) for word in inner.split(",") if word.strip())
    return {"true": True, "false": False}.get(text.lower(), text)


def _coerce(current: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the type of `current`, the key's value so far."""
    if isinstance(current, str):
        # Text is taken as it stands (a folder may be called 1e3 or True), without quotes around it.
        if isinstance(value, str):
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            return value[1:-1] if quoted else value
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value if value is None else str(value)
    else:
        if isinstance(value, str):
            value = _literal(value)
        if isinstance(current, (tuple, list)):
            # A single word for a tuple key means a tuple of one: `DATASETS.TRAIN my_set`.
            items = value if isinstance(value, (tuple, list)) else [value]
            if not _kinds(current) or _kinds(items) <= _kinds(current):
                return type(current)(items)
        elif current is None:
            return value
        elif isinstance(current, bool) == isinstance(value, bool):
            if isinstance(current, float) and isinstance(value, int):
                return float(value)
            if isinstance(value, type(current)):
                return value
    raise ConfigError(
        f"{key} is {value!r} ({origin}), expected {type(current).__name__} as in its default {current!r}."
    )


def _kinds(items: Sequence[Any]) -> set[str]:
    """What a tuple or list holds, at any depth."""
    kinds = set()
    for item in items:
        if isinstance(item, (tuple, list)):
            kinds |= _kinds(item)
        else:
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            kinds.add("number" if is_number else type(item).__name__)
    return kinds


def _plain(value: Any) -> str:
    return f"[{', '.join(f'{v:g}' for v in value)}]" if isinstance(value, (list, tuple)) else str(value)
