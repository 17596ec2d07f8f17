"""Detectron2's architectures over our backbones: each trains and is evaluated, from the model zoo's own file."""

import copy
import functools
import importlib
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.evaluation import verify_results
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from torch import nn

from resnet_backbone import detection
from resnet_backbone.detection.config import UNREAD
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.evaluation import evaluate
from resnet_backbone.detection.evaluation.registry import build_evaluator
from resnet_backbone.detection.modeling.layout import use_channels_last
from resnet_backbone.engine.config import ConfigError, flatten, get_key
from resnet_backbone.errors import InputError
from resnet_backbone.weights import read_checkpoint
from tests.reads import another, recorded

FPN = ("MODEL.BACKBONE.NAME", "build_network_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16)
FPN += ("MODEL.ROI_BOX_HEAD.FC_DIM", 32)
MASKS = ("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)
C4 = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
RETINANET = ("MODEL.BACKBONE.NAME", "build_network_retinanet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16)
KEYPOINTS = ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,), "MODEL.ROI_HEADS.NUM_CLASSES", 8)
SCORES = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)  # an untrained detector's are low
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
RUNS = {
    FASTER_RCNN: (*C4, "SOLVER.AMP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml": (*C4, *MASKS),
    MASK_RCNN: (*FPN, *MASKS, "INPUT.CROP.ENABLED", True),
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": (*FPN, *MASKS, "VIS_PERIOD", 1),
    KEYPOINT_RCNN: (*FPN, *KEYPOINTS),
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": (*RETINANET, "MODEL.RETINANET.NUM_CONVS", 1),
    "COCO-Detection/rpn_R_50_FPN_1x.yaml": FPN,
}
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
TASKS = {
    "mask": {"bbox", "segm"},
    "cascade": {"bbox", "segm"},
    "keypoint": {"bbox", "keypoints"},
    "rpn": {"box_proposals"},
}


@pytest.fixture(scope="module")
def annotated(scenes, tmp_path_factory) -> str:
    """The scenes with an outline, and three keypoints, for each object."""
    content = json.loads(Path(scenes).read_text())
    for category in content["categories"]:
        category |= {"keypoints": ["left_ear", "right_ear", "nose"], "skeleton": [[1, 3], [2, 3]]}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        points = [x, y, 2, x + width, y, 2, x + width / 2, y + height, 1]
        annotation |= {"segmentation": [corners], "keypoints": points, "num_keypoints": 3}
    file = tmp_path_factory.mktemp("annotated") / "annotated.json"
    file.write_text(json.dumps(content))
    return f"{file}:{Path(scenes).parent / 'images'}"


@pytest.fixture(scope="module")
def zoo_config(detection_config, classifier, annotated):
    """The function `(zoo file, output folder, KEY, VALUE, …)` that gives a configuration with our names."""

    def load(name, output, *overrides):
        keys = ("DATASETS.TRAIN", annotated, "DATASETS.TEST", annotated, "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3)
        keys += ("MODEL.RETINANET.NUM_CLASSES", 8, "MODEL.WEIGHTS", classifier("resnet18"), "MODEL.NETWORK.NAME")
        keys += ("resnet18", *RUNS.get(name, ()), *overrides)
        return detection_config(model_zoo.get_config_file(name), output, *keys)

    return load


@pytest.fixture(scope="module")
def trained(zoo_config, tmp_path_factory):
    """The function `(zoo file)` that gives a run's folder, its results, and the keys that it read."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("run")
            cfg = zoo_config(name, folder, *SCORES)
            with recorded(cfg) as keys:
                done[name] = folder, detection.run(cfg), keys
        return done[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_is_evaluated(zoo_config, trained, tmp_path, name):
    folder, results, _ = trained(name)
    kind = Path(name).name.partition("_")[0]
    assert set(results) == TASKS.get(kind, {"bbox"})
    first = json.loads((folder / "metrics.json").read_text().splitlines()[0])
    losses = {key: value for key, value in first.items() if "loss" in key}
    assert len(losses) > 2 and all(math.isfinite(value) for value in losses.values())
    final = folder / "model_final.pth"
    again = zoo_config(name, tmp_path / "test", *SCORES, "MODEL.WEIGHTS", final)
    tested = detection.run(again, eval_only=True)
    for task, metrics in results.items():
        assert tested[task] == pytest.approx(metrics, nan_ok=True), task


@pytest.fixture
def panoptic_config(zoo_config, panoptic, tmp_path, monkeypatch):
    """Panoptic FPN. Its panoptic quality is left out: it needs a package that the package index lacks."""
    monkeypatch.setattr(evaluate, "build_evaluator", functools.partial(build_evaluator, whole=False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    keys = ("DATASETS.TRAIN", panoptic, "DATASETS.TEST", panoptic, "MODEL.ROI_HEADS.NUM_CLASSES", 1)
    return zoo_config(PANOPTIC, tmp_path / "panoptic", *FPN, *MASKS, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, *keys)


def test_panoptic_fpn_trains_and_is_evaluated(panoptic_config, tmp_path):
    assert set(detection.run(panoptic_config)) == {"sem_seg", "bbox", "segm"}
    losses = json.loads((tmp_path / "panoptic" / "metrics.json").read_text().splitlines()[0])
    assert {"loss_sem_seg", "loss_mask", "loss_rpn_cls", "loss_cls"} <= set(losses)


@pytest.mark.parametrize("name", [KEYPOINT_RCNN, MASK_RCNN, FASTER_RCNN])
def test_channels_last_where_it_serves(zoo_config, tmp_path, name):
    """The loss and detections are those of torch's own layout, and a head with `view` keeps it."""
    cfg = zoo_config(name, tmp_path, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "MODEL.WEIGHTS", "")
    cfg.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = True
    torch.manual_seed(0)
    plain = build_model(cfg).eval()
    model = copy.deepcopy(plain)
    use_channels_last(model)
    for part, convolution in model.named_modules():
        if isinstance(convolution, nn.Conv2d) and convolution.weight.shape[1] > 1 and convolution.kernel_size != (1, 1):
            expected = torch.contiguous_format if "keypoint_head" in part else torch.channels_last
            assert convolution.weight.is_contiguous(memory_format=expected), part
    image = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}
    with torch.no_grad():
        one, other = (m([image])[0]["instances"] for m in (plain, model))
    assert len(one) == len(other) > 0
    assert torch.allclose(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=0.01)


def test_test_time_augmentation(zoo_config, tmp_path):
    """TEST.AUG gives a second row of results after the last iteration, as Detectron2's own training script does."""
    keys = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64, 80), "TEST.AUG.MAX_SIZE", 128, "SOLVER.MAX_ITER", 2)
    cfg = zoo_config(MASK_RCNN, tmp_path / "run", *keys, "TEST.EVAL_PERIOD", 1, *SCORES)
    results = detection.run(cfg)
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert results["bbox_TTA"] != results["bbox"]
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "bbox/AP" in metrics and "TTA" not in metrics  # in the course of training it would take too long
    for folder in ("inference", "inference_TTA"):
        assert (tmp_path / "run" / folder / "annotated" / "coco_instances_results.json").is_file()
    for name, key in ((KEYPOINT_RCNN, "KEYPOINT_ON"), ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "META_ARCHITECTURE")):
        with pytest.raises(ConfigError, match=rf"TEST.AUG.ENABLED is True .* needs MODEL.{key}"):
            detection.run(zoo_config(name, tmp_path / "no", *keys))


def test_expected_results(zoo_config, tmp_path):
    zero = "[['bbox', 'AP', 0.0, 100.0]]"
    results = detection.run(zoo_config(FASTER_RCNN, tmp_path / "run", "TEST.EXPECTED_RESULTS", zero, *SCORES))
    final = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth", *SCORES)
    wrong = "[['bbox', 'AP', 50.18, 0.02], ['segm', 'AP', 1.0, 0.1]]"
    cfg = zoo_config(FASTER_RCNN, tmp_path / "test", *final, "TEST.EXPECTED_RESULTS", wrong)
    with pytest.raises(InputError, match=r"bbox AP is \d+\.\d+, not 50\.18 ± 0\.02; segm AP is None, not 1\.0"):
        detection.run(cfg, eval_only=True)
    with pytest.raises(SystemExit):  # Detectron2's own judgment
        verify_results(cfg, {**results, "segm": {}})
    for value, words in (("[['bbox', 'AP']]", "expected rows of task"), (zero, "about one data set")):
        tests = cfg.DATASETS.TEST * (2 if value == zero else 1)
        with pytest.raises(ConfigError, match=words):
            detection.run(
                zoo_config(FASTER_RCNN, tmp_path / "no", "TEST.EXPECTED_RESULTS", value, "DATASETS.TEST", tests)
            )


def test_precise_batch_norm(zoo_config, tmp_path):
    """TEST.PRECISE_BN replaces the running averages of a detector that trains its batch norms."""
    keys = (
        "MODEL.RESNETS.NORM",
        "BN",
        "MODEL.BACKBONE.FREEZE_AT",
        0,
        "TEST.PRECISE_BN.NUM_ITER",
        2,
        "SOLVER.BASE_LR",
        0.0,
    )
    found = {}
    for precise in (False, True):
        folder = tmp_path / str(precise)
        detection.run(zoo_config(FASTER_RCNN, folder, *keys, "TEST.PRECISE_BN.ENABLED", precise))
        found[precise] = read_checkpoint(folder / "model_final.pth")
        assert ("precise BN: 20 layers over 2 batches" in (folder / "log.txt").read_text()) == precise
    assert [found[precise].metadata.norm_statistics for precise in (False, True)] == ["running", "precise"]
    different = {key for key, tensor in found[True].model.items() if not torch.equal(tensor, found[False].model[key])}
    assert different and all("running" in key or "num_batches" in key for key in different)


def test_every_key_is_read_by_some_run_or_refused(zoo_config, trained, panoptic_config, annotated, tmp_path):
    """Nothing that a user sets is ignored, except keys of an architecture other than the configured one."""
    read = set().union(*(trained(name)[2] for name in RUNS))
    name = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"
    images = datasets.check(zoo_config(name, tmp_path, *FPN), annotated)
    proposals = {
        "ids": [record["image_id"] for record in images],
        "boxes": [np.array([[4.0, 4.0, 60.0, 60.0]], np.float32) for _ in images],
        "objectness_logits": [np.array([1.0], np.float32) for _ in images],
    }
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(proposals))
    files = ("DATASETS.PROPOSAL_FILES_TRAIN", tmp_path / "proposals.pkl")
    files += ("DATASETS.PROPOSAL_FILES_TEST", tmp_path / "proposals.pkl")
    plateau = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR", "TEST.EVAL_PERIOD", 1, "SOLVER.WARMUP_ITERS", 1)
    plateau += ("MODEL.NETWORK.NAME", "", "MODEL.RESNETS.DEPTH", 18)
    jitter = ("INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96)
    jitter += ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    augmented = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.PRECISE_BN.ENABLED", True)
    for cfg in (
        zoo_config(name, tmp_path / "proposals", *FPN, *files, "TEST.MULTI_SCALE.MIN_SIZES", (48, 64)),
        zoo_config(FASTER_RCNN, tmp_path / "other", *plateau, *augmented, *jitter),
        panoptic_config,
    ):
        with recorded(cfg) as keys:
            detection.run(cfg)
        read |= keys
    # Rotated anchors, which need Detectron2's compiled operators in training.
    cfg = zoo_config(FASTER_RCNN, tmp_path, "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator")
    with recorded(cfg) as keys:
        build_anchor_generator(cfg, [ShapeSpec(stride=16)])
    read |= keys

    every = {key for key, _ in flatten(detection.get_config())} - {"VERSION"}
    refused = {key for key in every if any(f"{key}.".startswith(f"{group}.") for group in UNREAD)}
    assert every - read - refused == set()
    # The engine reads them for both tools.
    assert refused & read <= {"SOLVER.CUDA_GRAPH", "SOLVER.WARMUP_UNTIL_ERROR"}


@pytest.mark.parametrize("key", ["SOLVER.REFERENCE_WORLD_SIZE", "GLOBAL.HACK", "SOLVER.WARMUP_UNTIL_ERROR"])
def test_a_key_that_no_run_reads_is_refused_by_value(zoo_config, tmp_path, key):
    value = another(get_key(detection.get_config(), key))
    with pytest.raises(ConfigError) as error:
        detection.run(zoo_config(FASTER_RCNN, tmp_path, key, value))
    assert f"{key} is {value} (command line), but tools/train_net.py does not read it." in str(error.value)
