"""YAML files that give a key twice, beside what PyYAML makes of them."""

import pytest
import yaml

from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.yaml_file import read_yaml
from tests.engine.tiny import refusal

TWICE = "SOLVER:\n  MAX_ITER: 10\nSEED: 1\nSOLVER:\n  BASE_LR: 0.1\n"


def test_a_section_given_twice(cfg, write):
    assert yaml.safe_load(TWICE)["SOLVER"] == {"BASE_LR": 0.1}  # MAX_ITER is lost
    file = write("a.yaml", TWICE)
    message = refusal(load_config, cfg, file)
    assert message.startswith(f"{file}, line 4 gives SOLVER a second time, after line 1") and "Merge them" in message


@pytest.mark.parametrize(
    "text", ["SOLVER:\n  MAX_ITER: 1\n  STEPS: [1]\n  MAX_ITER: 2", "MODEL: {MASK_ON: True, MASK_ON: True}"]
)
def test_a_key_given_twice(cfg, write, text):
    assert " a second time" in refusal(load_config, cfg, write("a.yaml", text))


def test_in_a_base(cfg, write):
    base = write("base.yaml", TWICE)
    assert refusal(load_config, cfg, write("a.yaml", "_BASE_: base.yaml")).startswith(f"{base}, line 4")


@pytest.mark.parametrize(
    "text",
    [
        "A: {X: 1, Y: 2}\nB: {X: 1}",
        "A: &a {X: 1}\nB:\n  <<: *a\n  X: 2",
        "- {X: 1}\n- {X: 2}",
        "? [1, 2]\n: 3",
        "",
    ],
)
def test_anything_else_is_read_as_pyyaml_does(text):
    if text.startswith("?"):
        for read in (read_yaml, yaml.safe_load):
            with pytest.raises(yaml.constructor.ConstructorError):
                read(text)
    else:
        assert read_yaml(text) == yaml.safe_load(text)
