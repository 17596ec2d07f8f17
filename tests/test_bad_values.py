"""Whatever is set for whatever key: a model is built, or one sentence says why not."""

import itertools
import random
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo

from resnet_backbone import detection, pretraining
from resnet_backbone.detection.build import build_detector
from resnet_backbone.detection.checks import REGISTRIES, check_names
from resnet_backbone.detection.combinations import check_combinations
from resnet_backbone.detection.task import Detection
from resnet_backbone.engine.config import flatten, load_config, set_key
from resnet_backbone.engine.ranges import RANGES, check_ranges
from resnet_backbone.engine.schedule import check_schedule
from resnet_backbone.engine.train import check_batch, check_solver
from resnet_backbone.errors import InputError
from resnet_backbone.pretraining.network import build_classifier
from resnet_backbone.pretraining.task import Classification

CONFIGS = Path(__file__).parents[1] / "configs"
DETECTRON2_FILES = sorted((Path(model_zoo.__file__).parent / "configs").glob("[!q]*/*.yaml"))
C4 = ("build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
FPN = ("build_network_fpn_backbone",)
DETECTORS = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": C4,
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": ("build_resnet_fpn_backbone",),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": FPN,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": FPN,
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml": FPN,
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": ("build_network_retinanet_fpn_backbone",),
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": FPN,
}
NUMBERS = ["0", "-1", "1", "2", "3", "7", "33", "16384", "100000000", "9" * 400, "0.5", "1.5", "1e30", "1e999"]
LISTS = ["()", "[[]]", "[[0]]", "[[[1]]]", "(0,)", "[-1, -1, -1]", "(1, 2)", "[0.3, 0.7]", "[0.7, 0.3, 0.1]", "[1e999]"]
LISTS += ["[0, 1]", "[64]", "[[32, 64], [128]]", "(1, 1, 1, 1)", "[(1, 2, 3, 4)]", "(5, 3)", str([*range(2000)])]
NAMES = ["", "x", "x" * 5000, "nan", "'a\nb'", "None", "[res2]", "[res3, res9]", "(p2, p4)", "[p2, p3, p4, p5]", "GN"]
NAMES += ["SyncBN", "rgb", "giou", "norm", "Res5ROIHeads", "StandardROIHeads", "RROIHeads", "ROIAlignRotated"]
NAMES += ["absolute", "RetinaNet", "PanopticFPN", "build_resnet_backbone", "build_network_backbone", "vgg16", "\x00"]
OTHERS = ["True", "False", "{}", "{[]: 1}", "[" * 3000, "-" * 20000, "lambda: 1"]
OF_TYPE = {bool: OTHERS, int: NUMBERS, float: NUMBERS, str: NAMES, tuple: [*LISTS, *NAMES], list: [*LISTS, *NAMES]}
FROM_YAML = [float("nan"), float("inf"), None, -1, 0, 10**30, [], [None], [float("nan")] * 3, {"a": 1}, "", "é", [[]]]
KEYS = [key for tool in (pretraining, detection) for key, _ in flatten(tool.get_config())]
KEYS += ["MODEL.RESNETS", "there is no configuration key"]


def build(tool, keys, file=None, *, base=None):
    """Take the tools' way from words to a model, without data or memory."""
    load = detection.get_config if tool is Detection else pretraining.get_config
    words = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SOLVER.AMP.ENABLED", "True"]
    if tool is Detection:
        words += ["MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", "True", "MODEL.BACKBONE.NAME", *DETECTORS[base]]
    cfg = load_config(load(), model_zoo.get_config_file(base) if base else "pretrain/imagenet.yaml", words)
    cfg = load_config(cfg, file, keys)
    check_solver(cfg)
    check_batch(cfg)
    check_schedule(cfg)
    tool(cfg).check(eval_only=False)
    if cfg.MODEL.WEIGHTS:
        return
    set_key(cfg, "MODEL.DEVICE", "meta", "no memory")
    with torch.device("meta"):
        if tool is Detection:
            build_detector(cfg, None, "")
        else:
            build_classifier(cfg, 10)


def draws(tool, count, rng):
    """Yield (words or a YAML file's content, base): `count` values of each key, most of them of its type."""
    keys = dict(flatten((detection if tool is Detection else pretraining).get_config()))
    bases = itertools.cycle(DETECTORS if tool is Detection else [None])
    for key, default in keys.items():
        fitting = OF_TYPE.get(type(default), NUMBERS)
        for value in rng.sample(fitting, min(count, len(fitting))):
            yield {key: value}, False, next(bases)
        yield {key: rng.choice([*NUMBERS, *LISTS, *NAMES, *OTHERS])}, False, next(bases)
        yield {key: rng.choice(FROM_YAML)}, True, next(bases)
    for _ in range(30 * count):  # two at a time
        pair = {key: rng.choice(OF_TYPE.get(type(keys[key]), NUMBERS)) for key in rng.sample(sorted(keys), 2)}
        yield pair, False, next(bases)


@pytest.mark.parametrize("tool", [Detection, Classification])
@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_model_or_one_sentence(tool, count, tmp_path):
    rng, built, refused, problems = random.Random(5), 0, 0, []
    file = tmp_path / "config.yaml"
    for values, in_yaml, base in draws(tool, count, rng):
        words = [word for pair in values.items() for word in pair]
        if in_yaml:
            tree = {}
            for key, value in values.items():
                *path, last = key.split(".")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = value
            file.write_text(yaml.safe_dump(tree))
        what = f"{ {key: str(value)[:60] for key, value in values.items()} } over {base}"
        try:
            build(tool, *(((), file) if in_yaml else (words,)), base=base)
            built += 1
        except InputError as error:
            refused += 1
            message = str(error)
            # What comes from Detectron2's depths, or names no key, does not tell a user what to change.
            named = any(key in message for key in KEYS)
            if "\n" in message or len(message) > 1200 or "Detectron2 cannot build" in message or not named:
                problems.append(f"{what}: {message[:600]}")
        except Exception as error:
            problems.append(f"{what} ended in {type(error).__name__}: {str(error)[:300]}")
    assert not problems, "\n".join(problems)
    assert min(built, refused) > 60


# Keys of text that is checked elsewhere, or free.
FREE = {
    "MODEL.WEIGHTS": "a path",
    "OUTPUT_DIR": "a path",
    "WANDB_PROJECT": "any name",
    "MODEL.NETWORK.NAME": "engine.train.check_solver, which suggests the nearest",
    **dict.fromkeys(REGISTRIES, "detection.checks.check_names"),
}
DETECTIONS = {"TEST.BEST_METRIC": "engine.hooks, by the metrics that an evaluation gives"}


@pytest.mark.parametrize("tool", [detection, pretraining])
def test_every_key_that_a_tool_reads_has_a_range(tool):
    """Other tests show that runs read every key, except those in UNREAD."""
    module = detection.config if tool is detection else pretraining.config
    keys = dict(flatten(tool.get_config()))
    read = {key for key in keys if not any(f"{key}.".startswith(f"{group}.") for group in module.UNREAD)}
    ranges = RANGES | module.RANGES
    free = FREE | (DETECTIONS if tool is detection else {})
    typed = {key for key in read if isinstance(keys[key], bool)}
    assert read - set(ranges) - set(free) - typed == {"VERSION"}
    assert not set(ranges) & set(free) and not RANGES.keys() & module.RANGES.keys()
    assert set(ranges) <= set(keys) and all(isinstance(value, str) for key, value in keys.items() if key in free)


@pytest.mark.parametrize(
    "file", [*DETECTRON2_FILES, *(CONFIGS.rglob("*.yaml"))], ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_every_configuration_of_detectron2_and_this_package_is_in_range(file):
    tool = pretraining if "pretrain" in file.parts else detection
    cfg = load_config(tool.get_config(), file, ["MODEL.DEVICE", "cpu"])
    module = detection.config if tool is detection else pretraining.config
    check_ranges(cfg, RANGES | module.RANGES)
    if tool is detection:
        check_names(cfg)
        check_combinations(cfg)
