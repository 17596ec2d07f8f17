import copy
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg

from resnet_backbone import detection, pretraining
from resnet_backbone.engine.config import (
    COMMAND_LINE,
    ConfigError,
    as_config_error,
    get_config_file,
    get_key,
    load_config,
    origin,
    set_key,
)
from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.errors import InputError
from tests.engine.tiny import refusal

CONFIGS = Path(__file__).parents[2] / "configs"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_engine_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


class TestChain:
    def test_order_and_origins(self, cfg, write, tmp_path):
        base = write("base/base.yaml", "SOLVER: {BASE_LR: 0.1, MAX_ITER: 10, GAMMA: 0.5}\nOUTPUT_DIR: a")
        middle = write("middle.yaml", "_BASE_: base/base.yaml\nSOLVER: {BASE_LR: 0.2, MAX_ITER: 20}")
        last = write("last.yaml", f"_BASE_: {tmp_path}/middle.yaml\nSOLVER: {{BASE_LR: 0.3}}")
        assert load_config(cfg, last, ["SOLVER.MOMENTUM", "0.8"]) is cfg
        solver = cfg.SOLVER
        assert (solver.BASE_LR, solver.MAX_ITER, solver.GAMMA, solver.MOMENTUM) == (0.3, 20, 0.5, 0.8)
        assert origin(cfg, "SOLVER.BASE_LR") == last
        assert origin(cfg, "SOLVER.MAX_ITER") == middle
        assert origin(cfg, "SOLVER.GAMMA") == base
        assert origin(cfg, "SOLVER.MOMENTUM") == COMMAND_LINE
        assert origin(cfg, "SOLVER.WEIGHT_DECAY") is None

    def test_command_line_beats_yaml(self, cfg, write):
        load_config(cfg, write("a.yaml", "SEED: 1"), ["SEED", "2"])
        assert cfg.SEED == 2 and origin(cfg, "SEED") == COMMAND_LINE

    @pytest.mark.parametrize("name", ["a.yaml", "../folder/a.yaml", "b.yaml"])
    def test_a_loop_stops(self, cfg, write, name):
        file = write("folder/a.yaml", f"_BASE_: {name}")
        write("folder/b.yaml", "_BASE_: ../folder/a.yaml")
        assert "based on itself" in refusal(load_config, cfg, file)

    def test_a_missing_base_names_both_files(self, cfg, write, tmp_path):
        file = write("a.yaml", "_BASE_: absent.yaml")
        assert f"{file} is based on absent.yaml, but there is no file {tmp_path}/absent.yaml" in refusal(
            load_config, cfg, file
        )

    def test_several_bases_are_refused(self, cfg, write):
        assert "['x.yaml', 'y.yaml']" in refusal(load_config, cfg, write("a.yaml", "_BASE_: [x.yaml, y.yaml]"))

    def test_a_missing_file_offers_the_nearest(self, cfg, write, tmp_path):
        near = write("faster_rcnn_R50.yaml", "")
        assert f"nearest is {near}." in refusal(load_config, cfg, tmp_path / "faster_rcn_R50.yml")

    @pytest.mark.parametrize("text", ["MODEL: [", "just words", "- a\n- b", "a: b: c", "MODEL: !local x"])
    def test_what_is_no_yaml_mapping(self, cfg, write, text):
        file = write("a.yaml", text)
        assert file in refusal(load_config, cfg, file)

    def test_an_empty_file_changes_nothing(self, cfg, write):
        before = cfg.clone()
        assert load_config(cfg, write("a.yaml", "")) == before


class TestNames:
    @pytest.mark.parametrize("name", ["faster_rcnn_R101.yaml", "pretrain/imagenet.yaml"])
    def test_names_of_ours_are_found_from_any_folder(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        assert Path(get_config_file(name)).samefile(CONFIGS / name)
        cfg = pretraining.get_config() if "pretrain" in name else detection.get_config()
        load_config(cfg, name)
        assert origin(cfg, "MODEL.NETWORK.NAME") == get_config_file(name)

    def test_an_existing_path_goes_first(self, write, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("faster_rcnn_R101.yaml", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"):
            write(name, "SEED: 1")
            assert get_config_file(name) == name

    def test_detectron2s_own_loader_takes_the_result(self):
        theirs = detection.get_config()
        theirs.merge_from_file(detection.get_config_file("faster_rcnn_R50.yaml"))
        assert theirs.MODEL.NETWORK.NAME == "resnet50"
        zoo = detection.get_config_file(RETINANET)
        assert zoo == model_zoo.get_config_file(RETINANET)
        theirs.merge_from_file(zoo)
        assert theirs.MODEL.META_ARCHITECTURE == "RetinaNet"

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("faster_rcn_R101.yaml", "faster_rcnn_R101.yaml"),
            ("imagenet.yaml", "pretrain/imagenet.yaml"),
            ("configs/faster_rcnn_VGG16.yaml", "faster_rcnn_VGG16.yaml"),
            ("COCO-Detection/faster_rcnn_R_101_C4.yaml", "COCO-Detection/faster_rcnn_R_101_C4_3x.yaml"),
            ("my_detecter.yml", "my_detector.yaml"),
        ],
    )
    def test_an_unknown_name_offers_the_nearest_of_all(self, write, tmp_path, monkeypatch, name, near):
        write("my_detector.yaml", "")
        monkeypatch.chdir(tmp_path)
        message = refusal(get_config_file, name)
        assert f"no config file {name}," in message and f"the nearest is {near}." in message

    def test_names_of_detectron2s_zoo(self, cfg):
        name = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
        load_config(cfg, name)
        expected = get_cfg()
        add_engine_config(expected)
        expected.merge_from_file(f"{_zoo()}/{name}")
        expected.MODEL.DEVICE = "cpu"
        assert cfg == expected
        assert origin(cfg, "MODEL.WEIGHTS").endswith(name)
        assert origin(cfg, "SOLVER.STEPS").endswith("Base-RCNN-C4.yaml")

    def test_retinanets_python_tag_is_taken_from_detectron2_alone(self, cfg, write, tmp_path):
        load_config(cfg, RETINANET)
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[1] == [64, 64 * 2 ** (1 / 3), 64 * 2 ** (2 / 3)]
        file = write("mine.yaml", f'SEED: !!python/object/apply:os.mkdir ["{tmp_path}/executed"]')
        message = refusal(load_config, cfg, file)
        assert file in message and "not executed" in message
        assert not (tmp_path / "executed").exists()
        yaml.unsafe_load((tmp_path / "mine.yaml").read_text())
        assert (tmp_path / "executed").exists()  # it would have

    def test_a_file_of_ones_own_may_be_based_on_it(self, cfg, write):
        load_config(cfg, write("mine.yaml", f"_BASE_: {_zoo()}/{RETINANET}\nSEED: 3"))
        assert cfg.SEED == 3 and cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


def _zoo() -> str:
    return model_zoo.get_config_file(RETINANET).removesuffix(f"/{RETINANET}")


class TestKeys:
    def test_unknown_keys_offer_the_nearest(self, cfg, write):
        message = refusal(load_config, cfg, None, ["SOLVER.BASE_LRR", "1"])
        assert "SOLVER.BASE_LRR (command line)" in message and "nearest is SOLVER.BASE_LR." in message
        file = write("a.yaml", "MODEL: {NETWORK: {NAMES: x}}")
        assert f"MODEL.NETWORK.NAMES ({file}); the nearest is MODEL.NETWORK.NAME." in refusal(load_config, cfg, file)
        refusal(set_key, cfg, "SEED.X", 1, "test")
        refusal(set_key, cfg, "", 1, "test")

    def test_groups_are_not_set(self, cfg, write):
        assert "WIDTH" in refusal(set_key, cfg, "MODEL.NETWORK", "resnet50", "test")
        assert "group of keys" in refusal(load_config, cfg, write("a.yaml", "SOLVER:"))

    def test_keys_and_values_come_in_pairs(self, cfg):
        assert "'SEED'" in refusal(load_config, cfg, None, ["SOLVER.MAX_ITER", "1", "SEED"])

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("SOLVER.BASE_LR", 1, 1.0),
            ("SOLVER.BASE_LR", "1e-3", 0.001),
            ("SOLVER.MAX_ITER", "100", 100),
            ("SOLVER.NESTEROV", "true", True),
            ("SOLVER.NESTEROV", "False", False),
            ("SOLVER.STEPS", "(3, 5)", (3, 5)),
            ("SOLVER.STEPS", [3, 5], (3, 5)),
            ("SOLVER.STEPS", "7", (7,)),
            ("SOLVER.STEPS", "()", ()),
            ("DATASETS.TRAIN", "my_set", ("my_set",)),
            ("DATASETS.TRAIN", "a/train-{000000..000007}.tar", ("a/train-{000000..000007}.tar",)),
            ("DATASETS.TRAIN", "(coco_2014_train,)", ("coco_2014_train",)),
            ("DATASETS.TRAIN", "('coco_2014_train', 'b')", ("coco_2014_train", "b")),
            ("DATASETS.TRAIN", "(a, b)", ("a", "b")),
            ("MODEL.RESNETS.OUT_FEATURES", "[res4]", ["res4"]),
            ("MODEL.PIXEL_MEAN", (1, 2, 3.5), [1, 2, 3.5]),
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32.5], [64]]", [[32.5], [64]]),
            ("INPUT.CROP.SIZE", "(224, 224)", [224, 224]),
            ("OUTPUT_DIR", "1e3", "1e3"),
            ("OUTPUT_DIR", "True", "True"),
            ("OUTPUT_DIR", "(a)", "(a)"),
            ("OUTPUT_DIR", 2024, "2024"),
            ("MODEL.WEIGHTS", "''", ""),
            ("MODEL.WEIGHTS", '"a b"', "a b"),
            ("SOLVER.WEIGHT_DECAY_BIAS", "0.5", 0.5),
        ],
    )
    def test_values_as_they_are_meant(self, cfg, key, value, expected):
        set_key(cfg, key, value, "test")
        assert get_key(cfg, key) == expected and type(get_key(cfg, key)) is type(expected)

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("SOLVER.MAX_ITER", True, "int"),
            ("SOLVER.MAX_ITER", "1.5", "int"),
            ("SOLVER.MAX_ITER", "many", "int"),
            ("SOLVER.MAX_ITER", None, "int"),
            ("SOLVER.BASE_LR", False, "float"),
            ("SOLVER.BASE_LR", "(1, 2)", "float"),
            ("SOLVER.NESTEROV", 1, "bool"),
            ("SOLVER.NESTEROV", "maybe", "bool"),
            ("SOLVER.STEPS", "soon", "tuple"),
            ("SOLVER.STEPS", [1, "x"], "tuple"),
            ("MODEL.PIXEL_MEAN", "(a, b, c)", "list"),
            ("MODEL.RESNETS.OUT_FEATURES", [4], "list"),
            ("OUTPUT_DIR", ["a"], "str"),
            ("OUTPUT_DIR", True, "str"),
        ],
    )
    def test_values_of_another_type(self, cfg, key, value, expected):
        before = cfg.clone()
        message = refusal(set_key, cfg, key, value, "my.yaml")
        assert key in message and "my.yaml" in message and f"expected {expected}" in message
        assert cfg == before and origin(cfg, key) is None

    def test_copies_keep_the_origins_apart(self, cfg):
        set_key(cfg, "SEED", 3, "me")
        for copied in (cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
            assert origin(copied, "SEED") == "me"
            set_key(copied, "SOLVER.GAMMA", 0.3, "other")
        assert origin(cfg, "SOLVER.GAMMA") is None
        assert "origins" not in cfg.dump()


class TestDevice:
    def test_without_a_gpu_the_default_becomes_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        cfg = get_cfg()
        add_engine_config(cfg)
        assert load_config(cfg, None).MODEL.DEVICE == "cpu"
        assert origin(cfg, "MODEL.DEVICE") == "no GPU here"

    def test_without_a_gpu_asking_for_one_stops(self, cfg, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        message = refusal(load_config, cfg, None, ["MODEL.DEVICE", "cuda"])
        assert "MODEL.DEVICE is cuda (command line)" in message and "cpu" in message

    def test_with_a_gpu_it_stays(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cfg = get_cfg()
        add_engine_config(cfg)
        assert load_config(cfg, None).MODEL.DEVICE == "cuda"
        assert load_config(cfg, None, ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"

    def test_an_unknown_device(self, cfg):
        message = refusal(load_config, cfg, None, ["MODEL.DEVICE", "gpu"])
        assert "MODEL.DEVICE is gpu (command line), expected cuda or cpu" in message


def test_every_shipped_config_names_its_data_sets(pytestconfig, cfg):
    from resnet_backbone import detection, pretraining

    files = sorted((pytestconfig.rootpath / "configs").rglob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        start = pretraining.get_config() if "pretrain" in str(file) else detection.get_config()
        loaded = load_config(start, file)
        for name in (*loaded.DATASETS.TRAIN, *loaded.DATASETS.TEST):
            assert name.isidentifier(), (file, name)


@pytest.mark.parametrize("kind", [ValueError, InputError])
def test_the_keys_are_named_before_the_complaint(kind):
    complaint = "a crop of 0x3 pixels is empty"
    with pytest.raises(ConfigError, match=rf"^INPUT\.CROP: {complaint}\.$"), as_config_error("INPUT.CROP"):
        raise kind(complaint)


def test_what_names_its_keys_already_or_is_no_bad_value_stays():
    for error in (ConfigError("SEED is -1."), TypeError("a bug")):
        with pytest.raises(type(error)) as caught, as_config_error("INPUT"):
            raise error
        assert caught.value is error
