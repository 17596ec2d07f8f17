"""PASCAL VOC by its registered names and by its folder: a run of the shipped configuration, and what each evaluates."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from resnet_backbone import detection
from resnet_backbone.detection.evaluation.evaluate import evaluate
from resnet_backbone.engine.config import ConfigError, load_config
from resnet_backbone.weights import read_checkpoint
from tests.conftest import CONFIGS, DETECTION_SMALL

pytestmark = pytest.mark.skipif("DETECTRON2_DATASETS" in os.environ, reason="VOC would be looked for there")

SMALL = (*DETECTION_SMALL.replace("MODEL.ROI_HEADS.NUM_CLASSES 8", "").split(), "SEED", "1")
BOX = (11, 11, 50, 50)
SPLITS = {"VOC2007": {"trainval": 3, "test": 4}, "VOC2012": {"trainval": 3, "train": 2, "val": 2}}


def write_xml(file: Path, *objects: tuple[str, tuple[int, int, int, int], int]) -> None:
    """Write an annotation of an image of 80×64 pixels; objects are (name, (xmin, ymin, xmax, ymax), difficult)."""
    text = "<annotation><size><width>80</width><height>64</height></size>"
    for name, box, difficult in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        flags = f"<pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        text += f"<object><name>{name}</name>{flags}<bndbox>{corners}</bndbox></object>"
    file.write_text(f"{text}</annotation>")


@pytest.fixture
def voc(tmp_path, monkeypatch) -> Path:
    """The folder `datasets` of a new working directory with both years: an object of each class in each image.

    Detectron2's evaluator remembers annotations by their path, so no two tests name an image alike.
    """
    monkeypatch.chdir(tmp_path)
    for year, splits in SPLITS.items():
        root = tmp_path / "datasets" / year
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / part).mkdir(parents=True)
        for split, count in splits.items():
            stems = [f"{tmp_path.name}_{split}_{number}" for number in range(count)]
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
            for number, stem in enumerate(stems):
                pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), np.uint8)
                Image.fromarray(pixels).save(root / "JPEGImages" / f"{stem}.jpg")
                write_xml(root / "Annotations" / f"{stem}.xml", *((name, BOX, 0) for name in CLASS_NAMES))
    return tmp_path / "datasets"


@pytest.fixture
def load(classifier):
    """The function `(file, KEY, VALUE, …)` that gives a shipped configuration with the data sets that it names."""

    def load(file, *overrides):
        keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), *overrides)
        return load_config(detection.get_config(), CONFIGS / file, [*SMALL, *map(str, keys)])

    return load


def test_the_configuration_trains_and_both_evaluations_take_the_result(voc, load):
    results = detection.run(load("faster_rcnn_R101_VOC2007.yaml", "OUTPUT_DIR", "run"))
    assert set(results["bbox"]) == {"AP", "AP50", "AP75"}
    assert all(0 <= value <= 100 for value in results["bbox"].values())
    assert json.loads(Path("run/results.json").read_text())["bbox"] == results["bbox"]
    trained = read_checkpoint("run/model_final.pth").metadata
    assert trained.class_names == CLASS_NAMES
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 20" in Path("run/log.txt").read_text()
    keys = ("MODEL.WEIGHTS", "run/model_final.pth", "OUTPUT_DIR", "coco", "DATASETS.TEST", "datasets/VOC2007:test")
    results = detection.run(load("faster_rcnn_R101_VOC2007.yaml", *keys), eval_only=True)
    assert {"AP", "AP50", "APs", "APm", "APl"} <= set(results["bbox"])
    assert results["bbox"]["AP50"] >= 0


def test_without_a_test_set_and_with_its_stand_in(voc, load):
    assert detection.run(load("faster_rcnn_R101_VOC2012.yaml", "OUTPUT_DIR", "run")) == {}
    train = "('voc_2007_trainval', 'voc_2007_test', 'voc_2012_train')"
    keys = ("DATASETS.TRAIN", train, "DATASETS.TEST", "voc_2012_val", "OUTPUT_DIR", "stand_in")
    results = detection.run(load("faster_rcnn_R101_VOC2012.yaml", *keys))
    assert all(0 <= value <= 100 for value in results["bbox"].values())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<annotation><object>", "ParseError: no element found"),
        ("<annotation></annotation>", "IndexError: list index out of range"),
        ("zebra", r"ValueError: tuple\.index"),
    ],
)
def test_what_detectron2s_reader_does_not_take_is_said_with_the_way_out(voc, load, tmp_path, text, error):
    file = voc / "VOC2007" / "Annotations" / f"{tmp_path.name}_trainval_1.xml"
    file.write_text(file.read_text().replace("cat", text) if text == "zebra" else text)
    with pytest.raises(
        ConfigError, match=rf"voc_2007_trainval is not in PASCAL VOC's form \({error}.*:trainval names a fault"
    ):
        detection.run(load("faster_rcnn_R101_VOC2007.yaml", "OUTPUT_DIR", "run"))


# Detections of cats by falling score: the number of the image, and whether it is in its object's place. The third
# image's cat is difficult, and so neither found nor missed; the fourth image has a dog as well, which nothing finds.
FOUND = ((0, True), (0, False), (2, True), (1, True), (1, False), (3, True))
HITS = (True, False, True, False, True)  # of those that count, with three cats to find


class Finder(nn.Module):
    """A detector that finds FOUND."""

    def forward(self, inputs):
        return [{"instances": self.detect(int(Path(i["file_name"]).stem.rpartition("_")[2]))} for i in inputs]

    def detect(self, image: int) -> Instances:
        found = [(rank, hit) for rank, (number, hit) in enumerate(FOUND) if number == image]
        boxes = [(BOX[0] - 1, BOX[1] - 1, *BOX[2:]) if hit else (60, 0, 80, 10) for _, hit in found]
        result = Instances((64, 80))
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.scores = torch.tensor([0.9 - 0.1 * rank for rank, _ in found])
        result.pred_classes = torch.full((len(found),), CLASS_NAMES.index("cat"))
        return result


def average_precision(levels: np.ndarray) -> float:
    """The mean over recall levels of the largest precision at that recall or above, in percent."""
    hits = np.cumsum(HITS)
    recall, precision = hits / 3, hits / np.arange(1, len(HITS) + 1)
    return 100 * float(np.mean([precision[recall >= level].max(initial=0) for level in levels - 1e-9]))


def test_vocs_map_and_cocos_ap_of_the_same_detections(voc, load, tmp_path):
    """Everingham et al. (2010), section 4.2: 11 levels of recall; COCO has 101. Difficult objects do not count."""
    for number in range(4):
        file = voc / "VOC2007" / "Annotations" / f"{tmp_path.name}_test_{number}.xml"
        write_xml(file, ("cat", BOX, int(number == 2)), *[("dog", BOX, 0)] * (number == 3))
    cfg = load("faster_rcnn_R101_VOC2007.yaml")
    detection.register_dataset("datasets/VOC2007:test", tmp_path / "out")
    found = {}
    for name in ("voc_2007_test", "datasets/VOC2007:test"):
        cfg.DATASETS.TEST = (name,)
        found[name] = evaluate(cfg, Finder(), tmp_path / "out")["bbox"]
    # VOC's is the mean over all 20 classes, of which 18 have no objects here; COCO's over the two that have.
    of_the_cat = average_precision(np.linspace(0, 1, 11)), average_precision(np.linspace(0, 1, 101))
    assert found["voc_2007_test"]["AP50"] == pytest.approx(of_the_cat[0] / 20)
    assert found["datasets/VOC2007:test"]["AP50"] == pytest.approx(of_the_cat[1] / 2)
    assert of_the_cat[0] != pytest.approx(of_the_cat[1], abs=0.5)
