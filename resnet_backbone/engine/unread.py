"""Refuse keys that a tool never reads, instead of ignoring them silently."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.engine.config import ConfigError, flatten, said


def refuse_unread(cfg: CfgNode, defaults: CfgNode, unread: Mapping[str, str], *, tool: str) -> None:
    """Raise ConfigError if a key that `tool` does not read has another value than its default.

    Args:
        defaults: the tool's configuration before anybody set a key.
        unread: maps keys, or groups of keys such as "MODEL.RPN", to why, or what to do instead; "" if there is nothing
            to say.
    """
    expected = dict(flatten(defaults))
    for key, value in flatten(cfg):
        reason = next((unread[group] for group in unread if f"{key}.".startswith(f"{group}.")), None)
        if reason is not None and _as_lists(value) != _as_lists(expected.get(key)):
            raise ConfigError(
                f"{said(cfg, key)}, but {tool} does not read it. {f'{reason} ' if reason else ''}"
                f"Leave it at {expected.get(key)!r}."
            )


def _as_lists(value: Any) -> Any:
    """Turn tuples inside of a value into lists, as YAML does."""
    return [_as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value
