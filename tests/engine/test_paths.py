"""Homes and environment variables in paths."""

import os
from pathlib import Path

import pytest

from resnet_backbone import detection, pretraining
from resnet_backbone.engine.config import flatten, get_key, load_config, origin
from resnet_backbone.engine.paths import PATH_KEYS, expand
from resnet_backbone.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/set")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    "path",
    ["~/x", "~", "$DATA/x", "${DATA}/x", "a/${DATA}x$DATA", "~/$DATA", "plain/name", "a~b/~c", "./~x", "", "f:train"],
)
def test_as_the_standard_library_and_the_shell_do(path):
    assert expand(path, "OUTPUT_DIR") == os.path.expandvars(os.path.expanduser(path))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/a.json:~/images", "/home/me/a.json:/home/me/images"),
        ("$DATA/voc:trainval", "/data/set/voc:trainval"),
        ("~/train-{000000..000007}.tar", "/home/me/train-{000000..000007}.tar"),
        ("s3://bucket/$NOWHERE/~", "s3://bucket/$NOWHERE/~"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"),
    ],
)
def test_data_sets_and_addresses(path, expected):
    assert expand(path, "DATASETS.TRAIN") == expected


@pytest.mark.parametrize("path", ["$NOWHERE/x", "${NOWHERE}/x", "~/$NOWHERE"])
def test_a_variable_that_is_not_set(path):
    with pytest.raises(InputError, match=r"MODEL.WEIGHTS is .*the environment variable NOWHERE is not set"):
        expand(path, "MODEL.WEIGHTS")


def test_a_home_that_is_not_there():
    with pytest.raises(InputError, match=r"no home folder ~nobody_of_that_name.*\./~nobody"):
        expand("~nobody_of_that_name/x", "OUTPUT_DIR")


class TestConfig:
    def test_every_key_in_a_file_and_on_the_command_line(self, write):
        data = "DATASETS: {TRAIN: [~/t, name], TEST: ['${DATA}']}"
        file = write("a.yaml", f"OUTPUT_DIR: ~/x\nMODEL: {{WEIGHTS: $DATA/w.pth}}\n{data}")
        cfg = load_config(pretraining.get_config(), file, ["TEST.ENSEMBLE", "('~/1.pth','$DATA/2.pth')"])
        assert cfg.OUTPUT_DIR == "/home/me/x" and cfg.MODEL.WEIGHTS == "/data/set/w.pth"
        assert cfg.DATASETS.TRAIN == ("/home/me/t", "name") and cfg.DATASETS.TEST == ("/data/set",)
        assert cfg.TEST.ENSEMBLE == ("/home/me/1.pth", "/data/set/2.pth")
        assert origin(cfg, "OUTPUT_DIR") == file and origin(cfg, "TEST.ENSEMBLE") == "command line"
        assert origin(cfg, "DATASETS.PROPOSAL_FILES_TRAIN") is None

    def test_all_keys_that_hold_paths_are_listed(self):
        """Of both tools, by the default's form: text or a tuple of text, and a name that speaks of files."""
        keys = {key for cfg in (pretraining.get_config(), detection.get_config()) for key, _ in flatten(cfg)}
        words = ("_DIR", "WEIGHTS", "FILE", "PATH", "FOLDER", "ENSEMBLE", "DATASETS.TRAIN", "DATASETS.TEST")
        named = {key for key in keys if any(word in key for word in words)}
        assert {key for key in named if not key.endswith("_REG_WEIGHTS")} == set(PATH_KEYS)

    @pytest.mark.parametrize("line", ["OUTPUT_DIR:", "OUTPUT_DIR: ''"])
    def test_a_blank_output_folder(self, cfg, write, line):
        file = write("a.yaml", line)
        with pytest.raises(InputError, match=f"OUTPUT_DIR is empty .{file}., expected a folder"):
            load_config(cfg, file)

    def test_blank_weights_are_none(self, cfg, write):
        assert not load_config(cfg, write("a.yaml", "MODEL: {WEIGHTS: }")).MODEL.WEIGHTS

    def test_the_file_and_its_base(self, cfg, write, monkeypatch, tmp_path):
        monkeypatch.setenv("HERE", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        write("base.yaml", "SEED: 7")
        for base in ("$HERE/base.yaml", "~/base.yaml", "base.yaml"):
            write("a.yaml", f"_BASE_: {base}")
            assert load_config(cfg.clone(), "${HERE}/a.yaml").SEED == 7
        write("a.yaml", "_BASE_: $NOWHERE/base.yaml")
        with pytest.raises(InputError, match=rf"_BASE_ of {tmp_path}/a.yaml is .NOWHERE/base.yaml, .* NOWHERE is not"):
            load_config(cfg, "~/a.yaml")
        with pytest.raises(InputError, match=r"--config-file is .NOWHERE/a.yaml"):
            load_config(cfg, "$NOWHERE/a.yaml")

    def test_what_a_script_of_ones_own_merges_stays(self, cfg, write):
        cfg.merge_from_file(write("a.yaml", "OUTPUT_DIR: ~/x"))
        assert get_key(cfg, "OUTPUT_DIR") == "~/x" and not Path("~").exists()
