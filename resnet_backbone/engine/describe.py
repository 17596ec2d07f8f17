"""A configuration as text: every key, its value, who set it, and how it differs from another configuration."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from resnet_backbone.engine.config import COMMAND_LINE, flatten, origin


def describe_config(cfg: CfgNode) -> str:
    """`cfg` as YAML that `load_config` can read back, with a comment saying who set each non-default key.

    Values that a run fills in later, from the weights' metadata or by rescaling for another batch size, are not shown.
    """
    return "\n".join(_lines(cfg, cfg, ()))


def _lines(cfg: CfgNode, node: Mapping, path: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield f"{indent}{key}:"
            yield from _lines(cfg, value, (*path, key))
        else:
            by = origin(cfg, ".".join((*path, key)))
            yield f"{indent}{key}: {_flow(value)}" + (f"  # {_source(by)}" if by else "")


def _flow(value: object) -> str:
    """A value as one line of YAML."""
    plain = dict(value) if isinstance(value, CfgNode) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=2**31).removesuffix("\n").removesuffix("\n...")


def _source(by: str) -> str:
    return f"from {by}" if by == COMMAND_LINE or Path(by).is_file() else by


def flat_config(cfg: CfgNode) -> dict[str, str]:
    """Every key and its value as text, for a checkpoint or a report."""
    return {key: str(value) for key, value in flatten(cfg)}


def config_hash(flat: Mapping[str, str]) -> str:
    """SHA-256 of a `flat_config`, to tell configurations apart."""
    return hashlib.sha256(json.dumps(dict(sorted(flat.items()))).encode()).hexdigest()


def differences(before: Mapping[str, str], cfg: CfgNode) -> list[str]:
    """List how `cfg` differs from a checkpoint's configuration (`flat_config`), as "KEY was A, is B (origin)".

    OUTPUT_DIR is ignored, since the folder may have been moved.
    """
    now = flat_config(cfg)
    if not before or config_hash(before) == config_hash(now):
        return []
    return [
        f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')} ({origin(cfg, key) or 'default'})"
        for key in sorted({*before, *now})
        if key != "OUTPUT_DIR" and before.get(key) != now.get(key)
    ]
