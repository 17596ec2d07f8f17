"""A configuration as text: every key with its value, and who set it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from resnet_backbone.engine.config import COMMAND_LINE, origin


def describe_config(cfg: CfgNode) -> str:
    """`cfg` as YAML that `load_config` reads again; behind each key that is not a default, who set it.

    What a run still fills in, from the weights' metadata or by rescaling for another batch, is not in it.
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
    """A value in one line of YAML."""
    plain = dict(value) if isinstance(value, CfgNode) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=2**31).removesuffix("\n").removesuffix("\n...")


def _source(by: str) -> str:
    return f"from {by}" if by == COMMAND_LINE or Path(by).is_file() else by
