"""What an entry is by its form, and that what pretraining takes stays pretraining's."""

import sys

import pytest

from resnet_backbone.data.layouts import is_detection


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("classes/a", "voc/JPEGImages", "voc/Annotations", "yolo/images/train", "yolo/labels/train"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("splits/train/images", "splits/train/labels", "cifar-10-batches-py"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        *("a.json", "no/such.json", "a.json:images", "voc", "voc:trainval", "./voc", "yolo", "yolo:train", "splits"),
        *("splits:train", "coco_2017_train", "voc_2007_trainval", "nobody_knows_this"),
    ],
)
def test_detection(folder, entry):
    assert is_detection(entry)


@pytest.mark.parametrize(
    "entry",
    [
        *("classes", "imagenet_train", "cifar10_test", "train-{000000..000007}.tar", "x.tar", "no/such/folder"),
        *("imagenet_trian", "cifar-10-batches-py/train", "./nothing"),
    ],
)
def test_classification(folder, entry):
    assert not is_detection(entry)


def test_an_unknown_name_is_pretrainings_without_detectron2(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_detection("nobody_knows_this")
    assert is_detection("a.json")
