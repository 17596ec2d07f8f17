"""Reading a YAML file in which no key is given twice."""

from typing import Any

import yaml


class DuplicateKey(yaml.YAMLError):
    """A mapping gives a key twice, of which PyYAML would silently drop the first, a whole section with it.

    The message is "line N gives KEY a second time, after line M".
    """


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise DuplicateKey(f"line {line} gives {key.value} a second time, after line {lines[key.value]}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Parse YAML of plain values, as `yaml.safe_load` does.

    Raises:
        DuplicateKey: a key is given twice.
        yaml.YAMLError: anything else that is not plain YAML.
    """
    return yaml.load(text, Loader=_Loader)
