import re

import pytest
import yaml
from detectron2.config import get_cfg

from resnet_backbone.engine.config import get_key, load_config
from resnet_backbone.engine.describe import config_hash, describe_config, differences, flat_config
from resnet_backbone.engine.keys import add_engine_config

BRACKETS = str.maketrans("()", "[]")  # YAML has no tuples; where a key holds some inside of one, lists serve as well


def fresh():
    cfg = get_cfg()
    add_engine_config(cfg)
    return cfg


@pytest.fixture
def cfg():
    cfg = fresh()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def loaded(tmp_path):
    base, file = tmp_path / "base.yaml", tmp_path / "a #1: b.yaml"
    base.write_text("SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nMODEL: {MASK_ON: true}\n")
    file.write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 8}\nOUTPUT_DIR: 'out # put: yes'\n")
    words = ["MODEL.DEVICE", "cpu", "SOLVER.STEPS", "(3,5)", "WANDB_PROJECT", "no", "DATASETS.TRAIN"]
    return base, file, load_config(fresh(), file, [*words, "('a, b', \"c'd\")"])


def test_it_can_be_read_again(tmp_path):
    _, _, cfg = loaded(tmp_path)
    again = tmp_path / "again.yaml"
    again.write_text(describe_config(cfg))
    read, written = (
        {key: value.translate(BRACKETS) for key, value in flat_config(config).items()}
        for config in (load_config(fresh(), again), cfg)
    )
    assert read == written
    assert cfg.DATASETS.TRAIN == ("a, b", "c'd")


def test_every_key_is_there_and_no_other(tmp_path):
    _, _, cfg = loaded(tmp_path)
    text = describe_config(cfg)
    assert yaml.safe_load(text) == yaml.safe_load(cfg.dump())  # yacs' own


def test_who_set_a_key(tmp_path):
    base, file, cfg = loaded(tmp_path)
    comments, path = {}, []
    for line in describe_config(cfg).splitlines():
        indent, key, comment = re.fullmatch(r"( *)(\w+):.*?(?:  # (.*))?", line).groups()
        path[len(indent) // 2 :] = [key]
        if comment:
            comments[".".join(path)] = comment
    assert comments == {
        "SOLVER.BASE_LR": f"from {base}",
        "SOLVER.MAX_ITER": f"from {file}",
        "SOLVER.STEPS": "from command line",
        "MODEL.MASK_ON": f"from {base}",
        "MODEL.DEVICE": "from command line",
        "DATASETS.TRAIN": "from command line",
        "OUTPUT_DIR": f"from {file}",
        "WANDB_PROJECT": "from command line",
    }
    assert get_key(cfg, "SOLVER.MAX_ITER") == 8


class TestDifferences:
    def test_what_changed_and_by_whom(self, cfg, write):
        before = flat_config(cfg)
        file = write("a.yaml", "SOLVER: {GAMMA: 0.3, STEPS: [1, 2]}")
        load_config(cfg, file, ["SEED", "7", "OUTPUT_DIR", "elsewhere"])
        cfg.SOLVER.MAX_ITER = 5
        assert differences(before, cfg) == [
            "SEED was -1, is 7 (command line)",
            f"SOLVER.GAMMA was 0.1, is 0.3 ({file})",
            "SOLVER.MAX_ITER was 40000, is 5 (default)",
            f"SOLVER.STEPS was (30000,), is (1, 2) ({file})",
        ]

    def test_nothing_changed(self, cfg):
        assert differences(flat_config(cfg), cfg.clone()) == []

    def test_of_a_checkpoint_that_does_not_say(self, cfg):
        assert differences({}, cfg) == []

    def test_keys_that_one_version_has_and_another_has_not(self, cfg):
        before = flat_config(cfg)
        del before["SOLVER.EMA_DECAY"]
        before["SOLVER.GONE"] = "3"
        assert differences(before, cfg) == [
            "SOLVER.EMA_DECAY was not there, is 0.0 (default)",
            "SOLVER.GONE was 3, is not there (default)",
        ]

    def test_the_hash_is_of_the_values_not_of_their_order(self, cfg):
        flat = flat_config(cfg)
        assert flat["SOLVER.AMP.PRECISION"] == "bf16" and all(isinstance(value, str) for value in flat.values())
        assert config_hash(flat) == config_hash(dict(reversed(flat.items())))
        assert len(config_hash(flat)) == 64
        changed = {**flat, "SEED": "8"}
        assert config_hash(changed) != config_hash(flat)
