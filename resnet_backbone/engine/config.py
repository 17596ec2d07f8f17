"""Load a configuration and track who set each key.

Every key set by a YAML file or the command line has an origin. A key without an origin holds a default, which the
metadata of weights may replace. A key with one was set by the user and is never overridden (`network_config.py`).
"""

import ast
import contextlib
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode

from resnet_backbone.engine.paths import PATH_KEYS, expand
from resnet_backbone.engine.yaml_file import DuplicateKey, read_yaml
from resnet_backbone.errors import InputError

COMMAND_LINE = "command line"
_ORIGINS = "_resnet_backbone_origins"
_PACKAGE = Path(__file__).resolve().parents[1]
# An installation has the configurations inside the package, a clone beside it.
_SHIPPED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"


class ConfigError(InputError):
    """A configuration key, file or value cannot be used."""


@contextlib.contextmanager
def as_config_error(keys: str) -> Iterator[None]:
    """Turn a ValueError into a ConfigError that names the keys behind the bad values."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}.") from error


def load_config(cfg: CfgNode, config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Merge a YAML file and its `_BASE_` chain, then the command line's `KEY VALUE …`, into `cfg` and return it.

    `~` and environment variables are expanded in the keys that hold paths.

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown (the nearest is suggested), or a value has the
            wrong type.
        InputError: a path has a variable that is not set.
    """
    if config_file:
        for file, content in _yaml_chain(Path(get_config_file(config_file))):
            for key, value in flatten(content):
                if key not in ("_BASE_", "VERSION"):
                    set_key(cfg, key, value, str(file))
    if len(overrides) % 2:
        raise ConfigError(
            f"the command line ends in {overrides[-1]!r}: keys and values come in pairs (KEY VALUE KEY VALUE …)."
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        set_key(cfg, key, value, COMMAND_LINE)
    _expand_paths(cfg)
    _settle_device(cfg)
    return cfg


def set_key(cfg: CfgNode, key: str, value: Any, origin: str) -> None:
    """Set one dotted key, check it against the type of its default, and record its origin.

    Text is parsed as a Python literal (`"(480, 512)"`, `"1e-3"`, `"true"`) unless the key itself holds text. An integer
    is accepted for a float, and a single value for a tuple or list of one.
    """
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or last not in node:
        known = [name for name, _ in flatten(cfg)]
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


def said(cfg: CfgNode, key: str) -> str:
    """Return "KEY is VALUE (who set it)", the start of a message about it; a default is not marked."""
    by = f" ({origin(cfg, key)})" if origin(cfg, key) else ""
    return f"{key} is {shown(get_key(cfg, key))}{by}"


def shown(value: Any) -> str:
    """Return a value on one short line: text as it is, unless that would not show it."""
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:160]} … ({len(text)} characters)"


def _expand_paths(cfg: CfgNode) -> None:
    """Expand `~` and environment variables in the paths that a file or the command line has set."""
    by = {key: origin(cfg, key) for key in PATH_KEYS}
    if by["OUTPUT_DIR"] and not cfg.OUTPUT_DIR:
        raise ConfigError(f"OUTPUT_DIR is empty ({by['OUTPUT_DIR']}), expected a folder; . is the current one.")
    for key in (key for key in PATH_KEYS if by[key]):
        value = get_key(cfg, key)
        if isinstance(value, (tuple, list)):
            value = type(value)(expand(item, key) if isinstance(item, str) else item for item in value)
        elif isinstance(value, str):
            value = expand(value, key)
        set_key(cfg, key, value, by[key])


def _settle_device(cfg: CfgNode) -> None:
    """Fall back to the CPU if there is no GPU and nobody asked for one (Detectron2's default device is a GPU)."""
    by = origin(cfg, "MODEL.DEVICE")
    try:
        kind = torch.device(cfg.MODEL.DEVICE).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{said(cfg, 'MODEL.DEVICE')}, expected cuda or cpu.") from error
    if kind != "cuda" or torch.cuda.is_available():
        return
    if by is not None:
        raise ConfigError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE} ({by}), but torch finds no GPU here. Set it to cpu.")
    set_key(cfg, "MODEL.DEVICE", "cpu", "no GPU here")


def get_config_file(name: str | Path) -> str:
    """Find a configuration: an existing path, or else a name of ours, or else a name of Detectron2's model zoo.

    Raises:
        ConfigError: there is no such file; the nearest of all three is suggested.
    """
    path = Path(expand(str(name), "--config-file"))
    for file in (path, _SHIPPED / name):
        if file.is_file():
            return str(file)
    from detectron2 import model_zoo  # only here, since it imports all of Detectron2's models

    zoo = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
    if (zoo / name).is_file():
        return str(zoo / name)
    known = [str(file) for file in path.parent.glob("*.yaml")]
    known += [file.relative_to(folder).as_posix() for folder in (_SHIPPED, zoo) for file in folder.rglob("*.yaml")]
    near = difflib.get_close_matches(str(path), known, n=1, cutoff=0.0)
    raise ConfigError(
        f"there is no config file {path}, nor one of that name among this package's or in Detectron2's model zoo; the "
        f"nearest is {near[0]}."
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file.read_text()) or {}
    except DuplicateKey as error:
        raise ConfigError(f"{file}, {error}, and only one of the two can count. Merge them.") from error
    except yaml.constructor.ConstructorError as error:
        if not _is_part_of_detectron2(file):
            raise ConfigError(
                f"{file} has something that plain YAML does not ({error.problem}), which was not executed; write the "
                "value itself instead."
            ) from error
        content = yaml.unsafe_load(file.read_text())  # Detectron2's RetinaNet configs compute their anchors
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number out of bounds
        raise ConfigError(f"{file} is not a YAML file: {' '.join(str(error).split())}.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {type(content).__name__}, expected a mapping of configuration keys.")
    return content


def _is_part_of_detectron2(file: Path) -> bool:
    return file.resolve().is_relative_to(Path(detectron2.__file__).resolve().parent)


def _yaml_chain(file: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The chain of `_BASE_` files and their contents, base first and `file` last."""
    chain = [(file, _read_yaml(file))]
    while base := chain[0][1].get("_BASE_"):
        file = chain[0][0]
        if not isinstance(base, str):
            raise ConfigError(f"{file}: _BASE_ is {base!r}, expected the name of one YAML file.")
        path = file.parent / expand(base, f"_BASE_ of {file}")  # an absolute path replaces the folder
        if not path.is_file():
            raise ConfigError(f"{file} is based on {base}, but there is no file {path}.")
        if any(path.samefile(other) for other, _ in chain):
            raise ConfigError(f"{file} is based on itself through {base}.")
        chain.insert(0, (path, _read_yaml(path)))
    return chain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a nested mapping with its value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(text: str) -> Any:
    """Parse text as a Python literal, true or false, or a list of bare words (`(coco_2014_train,)`); else return it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # what Python's parser may raise
        pass
    inner = text.strip()[1:-1]
    if text.strip() in (f"({inner})", f"[{inner}]") and not set(inner) & set("()[]{}"):
        return tuple(_literal(word.strip()) for word in inner.split(",") if word.strip())
    return {"true": True, "false": False}.get(text.lower(), text)


def _coerce(current: Any, value: Any, key: str, origin: str) -> Any:
    """Convert `value` to the type of `current`, the key's present value."""
    if isinstance(current, str):
        # Keep text verbatim (a folder may be called 1e3 or True), minus surrounding quotes.
        if isinstance(value, str):
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            return value[1:-1] if quoted else value
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return "" if value is None else str(value)
    else:
        if isinstance(value, str):
            value = _literal(value)
        if isinstance(current, (tuple, list)):
            # A single word for a tuple key means a tuple of one: `DATASETS.TRAIN my_set`.
            items = value if isinstance(value, (tuple, list)) else [value]
            if not _kinds(current) or _kinds(items) <= _kinds(current):
                return type(current)(items)
        elif current is None:
            if not isinstance(value, Mapping):
                return value
        elif isinstance(current, bool) == isinstance(value, bool):
            if isinstance(current, float) and isinstance(value, int) and abs(value) <= sys.float_info.max:
                return float(value)
            if isinstance(value, type(current)):
                return value
    kind = "a plain value" if current is None else type(current).__name__
    raise ConfigError(f"{key} is {shown(value)} ({origin}), expected {kind} as in its default {shown(current)}.")


def _kinds(items: Sequence[Any]) -> set[str]:
    """The kinds of items in a tuple or list, at any depth."""
    kinds = set()
    for item in items:
        if isinstance(item, (tuple, list)):
            kinds |= _kinds(item)
        else:
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            kinds.add("number" if is_number else type(item).__name__)
    return kinds
