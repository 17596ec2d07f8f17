import re

import yaml
from detectron2.config import get_cfg

from resnet_backbone.engine.config import add_engine_config, flat_config, get_key, load_config
from resnet_backbone.engine.describe import describe_config

BRACKETS = str.maketrans("()", "[]")  # YAML has no tuples; where a key holds some inside of one, lists serve as well


def fresh():
    cfg = get_cfg()
    add_engine_config(cfg)
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
