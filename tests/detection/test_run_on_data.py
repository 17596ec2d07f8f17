"""Whole runs on the forms of data: folders, keypoints, masks, semantic and panoptic labels, and without a test set."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from PIL import Image

from resnet_backbone import detection
from resnet_backbone.engine.config import ConfigError, load_config
from resnet_backbone.weights import read_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
MODEL.DEVICE cpu  MODEL.NETWORK.NAME resnet18  MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8  SEED 1
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50  MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.PRE_NMS_TOPK_TEST 50  MODEL.RPN.POST_NMS_TOPK_TEST 10  MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
INPUT.MIN_SIZE_TRAIN (64,)  INPUT.MAX_SIZE_TRAIN 96  INPUT.MIN_SIZE_TEST 64  INPUT.MAX_SIZE_TEST 96
DATALOADER.NUM_WORKERS 0  SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 2  SOLVER.STEPS ()
SOLVER.MAX_ITER 1  SOLVER.WARMUP_ITERS 0  SOLVER.LOG_PERIOD 1  SOLVER.CHECKPOINT_PERIOD 0  TEST.EVAL_PERIOD 0
"""
PYRAMID = """
MODEL.BACKBONE.NAME build_network_fpn_backbone  MODEL.FPN.OUT_CHANNELS 16  MODEL.ROI_BOX_HEAD.FC_DIM 32
MODEL.SEM_SEG_HEAD.CONVS_DIM 32  MODEL.ROI_MASK_HEAD.CONV_DIM 16  MODEL.ROI_MASK_HEAD.NUM_CONV 1
MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (16,)
"""


@pytest.fixture
def make_cfg(classifier, tmp_path):
    """The function `(train, test, KEY, VALUE, …, file=…, folder=…)` that gives a configuration without any number."""

    def make(train, test, *overrides, file="faster_rcnn_R50.yaml", folder="run"):
        file = CONFIGS / file if (CONFIGS / file).is_file() else model_zoo.get_config_file(file)
        keys = ("MODEL.WEIGHTS", classifier("resnet18"), "OUTPUT_DIR", tmp_path / folder)
        words = (*SMALL.split(), *keys, "DATASETS.TRAIN", train, "DATASETS.TEST", test, *overrides)
        return load_config(detection.get_config(), file, list(map(str, words)))

    return make


@pytest.fixture
def yolo(tmp_path) -> Path:
    """A YOLO folder: 4 images to train on with two classes as boxes and outlines, and 2 to test on."""
    root = tmp_path / "yolo"
    for split, count in (("train", 4), ("val", 2)):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.jpg")
            labels = "1 0.5 0.5 0.4 0.4\n0 0.2 0.2 0.3 0.2\n"
            (root / "labels" / split / f"{number}.txt").write_text(labels)
    (root / "data.yaml").write_text("names: [cat, dog]\n")
    return root


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_folder_trains_resumes_and_evaluates(make_cfg, yolo, tmp_path):
    train, test = f"{yolo}:train", f"{yolo}:val"
    keys = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 2)
    results = detection.run(make_cfg(train, test, *keys))
    run = tmp_path / "run"
    assert read_checkpoint(run / "model_final.pth").metadata.class_names == ("cat", "dog")
    text = log(run)
    assert text.count("2 classes, by number, from data.yaml: cat, dog") == 2  # once for each split
    assert f"MODEL.ROI_HEADS.NUM_CLASSES is 2, from the categories of {train}" in text
    files = {file: file.stat().st_mtime_ns for file in (run / "datasets").glob("*.json")}
    assert len(files) == 2
    assert (run / "inference" / "yolo_val" / "coco_instances_results.json").is_file()

    again = detection.run(make_cfg(train, test, *keys, "SOLVER.MAX_ITER", 3), resume=True)
    assert "has not changed since it was converted" in log(run)
    assert "the next iteration is 2" in log(run) and set(again) == set(results)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    final = ("MODEL.WEIGHTS", run / "model_final.pth")
    tested = detection.run(make_cfg(train, test, *final, folder="test"), eval_only=True)
    assert tested["bbox"] == pytest.approx(again["bbox"], nan_ok=True)

    (yolo / "data.yaml").write_text("names: [cat, dog, cow]\n")
    with pytest.raises(ConfigError, match=r"the 2 classes of .*model_final.pth .*are not the 3"):
        detection.run(make_cfg(train, test, *final, folder="test"), eval_only=True)


def test_outlines_train_a_mask_head(make_cfg, yolo, tmp_path):
    for file in (yolo / "labels").rglob("*.txt"):
        file.write_text("1 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n")
    results = detection.run(make_cfg(f"{yolo}:train", f"{yolo}:val", "MODEL.MASK_ON", True))
    assert set(results) == {"bbox", "segm"}


def test_keypoints_of_ones_own_file(make_cfg, scenes, tmp_path):
    content = json.loads(Path(scenes).read_text())
    for category in content["categories"]:
        category |= {"keypoints": ["left_ear", "right_ear", "nose"], "skeleton": [[1, 3], [2, 3]]}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        points = [[x, y, 2], [x + width, y, 2], [x + width / 2, y + height, 1]]
        annotation |= {"keypoints": [value for point in points for value in point], "num_keypoints": 3}
    (tmp_path / "a.json").write_text(json.dumps(content))
    entry = f"{tmp_path / 'a.json'}:{Path(scenes).parent / 'images'}"
    keys = (*PYRAMID.split(), "MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3)
    file = "faster_rcnn_R50_FPN.yaml"
    results = detection.run(make_cfg(entry, entry, *keys, file=file))
    assert set(results) == {"bbox", "keypoints"}
    final = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth", "DATASETS.TRAIN", "coco_2014_train")
    tested = detection.run(make_cfg("-", entry, *keys, *final, file=file, folder="test"), eval_only=True)
    assert tested["keypoints"] == pytest.approx(results["keypoints"], nan_ok=True)
    with pytest.raises(ConfigError, match=r"has 99 labeled keypoints. Lower MODEL.ROI_KEYPOINT_HEAD"):
        most = ("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 99)
        detection.run(make_cfg(entry, entry, *keys, *most, file=file, folder="most"))


def test_without_a_test_set_a_run_trains_and_says_so(make_cfg, scenes, tmp_path):
    keys = ("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
    assert detection.run(make_cfg(scenes, "()", *keys)) == {}
    run = tmp_path / "run"
    assert "DATASETS.TEST is empty: no evaluation" in log(run)
    assert json.loads((run / "results.json").read_text()) == {}
    assert read_checkpoint(run / "model_final.pth").metadata.origin["iterations"] == 2
    assert not (run / "inference").exists() and not (run / "model_best.pth").exists()
    assert not any("AP" in line for line in (run / "metrics.json").read_text().splitlines())
    with pytest.raises(ConfigError, match=r"DATASETS.TEST is empty, so --eval-only has nothing"):
        detection.run(make_cfg(scenes, "()", "MODEL.WEIGHTS", run / "model_final.pth", folder="test"), eval_only=True)
    plateau = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR")
    with pytest.raises(ConfigError, match=r"follows the evaluations.*EVAL_PERIOD is 0 \(DATASETS.TEST is empty\)"):
        detection.run(make_cfg(scenes, "()", *keys, *plateau, folder="plateau"))


def test_a_script_of_ones_own_trains_on_a_folder(make_cfg, yolo, tmp_path, classifier):
    """`register_dataset` alone makes an entry a name that Detectron2 knows."""
    entry = f"{yolo}:train"
    own = get_cfg()
    detection.add_network_config(own)
    own.merge_from_file(str(CONFIGS / "faster_rcnn_R50.yaml"))
    own.merge_from_list([word for word in SMALL.split() if word != "-"])
    own.MODEL.WEIGHTS, own.OUTPUT_DIR = str(classifier("resnet18")), str(tmp_path / "own")
    own.INPUT.FORMAT = "RGB"
    own.MODEL.PIXEL_MEAN, own.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    own.MODEL.NETWORK.WIDTH = 0.125
    own.DATASETS.TRAIN, own.DATASETS.TEST, own.SOLVER.CHECKPOINT_PERIOD = (entry,), (), 1
    detection.register_dataset(entry, own.OUTPUT_DIR)
    own.MODEL.ROI_HEADS.NUM_CLASSES = 2
    Path(own.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = DefaultTrainer(own)
    trainer.resume_or_load()
    trainer.train()
    assert (tmp_path / "own" / "model_final.pth").is_file()
    assert list((tmp_path / "own" / "datasets").glob("yolo_train-*.json"))


PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"


def test_semantic_segmentation_trains_and_is_evaluated(make_cfg, panoptic, tmp_path):
    keys = (*PYRAMID.split(), "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATALOADER.ASPECT_RATIO_GROUPING", True)
    cfg = make_cfg(
        "tiny_stuffonly", "tiny_stuffonly", *keys, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2, file=PANOPTIC
    )
    results = detection.run(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert set(results) == {"sem_seg"} and 0 <= results["sem_seg"]["mIoU"] <= 100
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text())["sem_seg"]["pACC"] == results["sem_seg"]["pACC"]
    assert any("sem_seg/mIoU" in line for line in (run / "metrics.json").read_text().splitlines())


@pytest.mark.skipif(importlib.util.find_spec("panopticapi") is not None, reason="panopticapi is installed")
def test_panoptic_quality_needs_its_package(make_cfg, panoptic, tmp_path):
    cfg = make_cfg(panoptic, panoptic, *PYRAMID.split(), file=PANOPTIC)
    with pytest.raises(ConfigError, match=r"tiny_separated is evaluated by panoptic quality.*pip install git\+https"):
        detection.run(cfg)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_panoptic_segmentation_trains_and_is_evaluated(make_cfg, panoptic, tmp_path):
    pytest.importorskip("panopticapi")
    cfg = make_cfg(panoptic, panoptic, *PYRAMID.split(), file=PANOPTIC)
    results = detection.run(cfg)
    assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (3, 1)
    assert set(results) == {"sem_seg", "bbox", "segm", "panoptic_seg"}
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100
    assert json.loads((tmp_path / "run" / "results.json").read_text())["panoptic_seg"]["PQ"] is not None
