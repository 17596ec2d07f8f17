"""Record which keys of a configuration are read."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from yacs.config import CfgNode

PATH = "_recorded_path"


@contextlib.contextmanager
def recorded(cfg: CfgNode) -> Iterator[set[str]]:
    """Yield a set that fills with the dotted keys read from `cfg` and its clones, one by one.

    What takes all keys alike, such as dumping a configuration, goes through `items` and does not count.
    """
    found: set[str] = set()
    attribute, node_class = CfgNode.__getattr__, CfgNode

    def note(node: CfgNode, name: str, value: object) -> object:
        if PATH in node.__dict__ and not isinstance(value, CfgNode):
            found.add(node.__dict__[PATH] + name)
        return value

    with (
        mock.patch.object(node_class, "__getattr__", lambda node, name: note(node, name, attribute(node, name))),
        mock.patch.object(
            node_class, "__getitem__", lambda node, name: note(node, name, dict.__getitem__(node, name)), create=True
        ),
    ):
        _mark(cfg, "")
        yield found


def another(value: Any) -> Any:
    """Return a value of the same type other than `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else type(value)([*value, 7])


def _mark(node: CfgNode, path: str) -> None:
    node.__dict__[PATH] = path
    for name, value in node.items():
        if isinstance(value, CfgNode):
            _mark(value, f"{path}{name}.")
