import json
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
    KEYPOINT_CONNECTION_RULES,
)
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from pycocotools.coco import COCO

from resnet_backbone.data.drawing import CLASS_NAMES
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.detection.checks import check_datasets
from resnet_backbone.detection.data import datasets
from resnet_backbone.engine.config import ConfigError


@pytest.fixture
def cfg(detection_config, tmp_path):
    return detection_config("faster_rcnn_R50.yaml", tmp_path / "out")


@pytest.fixture
def coco(scenes, tmp_path):
    """The function that writes a COCO file, changed by a function, with its images beside it; returns its path."""
    shutil.copytree(Path(scenes).parent / "images", tmp_path / "images")

    def write(change=lambda content: content, name="a.json") -> str:
        content = json.loads(Path(scenes).read_text())
        content = change(content) or content
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


def test_both_spellings_of_a_coco_file_give_its_images_and_boxes(cfg, scenes):
    reference = COCO(scenes)
    for entry in (scenes, f"{scenes}:{Path(scenes).parent / 'images'}"):
        dicts = datasets.check(cfg, entry)
        assert [record["image_id"] for record in dicts] == sorted(reference.imgs)
        for record in dicts:
            assert Path(record["file_name"]).is_file()
            boxes = [a["bbox"] for a in reference.imgToAnns[record["image_id"]]]
            assert [a["bbox"] for a in record["annotations"]] == boxes
        assert datasets.class_names(entry) == tuple(CLASS_NAMES)
        assert MetadataCatalog.get(entry).evaluator_type == "coco"


def test_class_names_of_a_file_that_nobody_has_read(coco):
    assert datasets.class_names(coco(name="unread.json")) == tuple(CLASS_NAMES)


def test_a_registered_name_is_left_alone():
    datasets.register("coco_2014_train")
    datasets.register("voc_2007_trainval")


def _without(key):
    return lambda content: {k: v for k, v in content.items() if k != key}


def _set(key, value):
    return lambda content: {**content, key: value}


def _foreign_category(content):
    content["annotations"][0]["category_id"] = 77


def _lost_image(content):
    content["images"][3]["file_name"] = "lost.jpg"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: json.dumps(content)[:-40], ("not a complete JSON file", "COCO")),
        (lambda content: [content], ("form", "images, annotations and categories")),
        (_without("categories"), ("form", "categories")),
        (_without("images"), ("no images",)),
        (_without("annotations"), ("not one annotated object", "6 images")),
        (_set("images", []), ("no images",)),
        (_set("annotations", []), ("not one annotated object", "6 images")),
        (_foreign_category, ("77", "categories")),
        (_lost_image, ("1 of 6 images", "lost.jpg")),
    ],
)
def test_a_file_that_cannot_be_used_stops_with_a_sentence(cfg, coco, change, words):
    with pytest.raises(ConfigError) as error:
        datasets.check(cfg, coco(change))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("coco_2014_trian", ("coco_2014_train", "FILE.json")),
        ("{folder}/b.json", ("no COCO file", "a.json")),
        ("{folder}/no/b.json", ("no COCO file", "does not exist")),
        ("{folder}/a.json:{folder}/pictures", ("no folder of images", "pictures")),
        ("coco_2014_minival", ("coco_2014_minival", "DETECTRON2_DATASETS")),
    ],
)
def test_an_entry_that_is_not_there_stops_with_a_sentence(cfg, coco, tmp_path, entry, words):
    coco()
    with pytest.raises(ConfigError) as error:
        datasets.check(cfg, entry.format(folder=tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_only_crowd_regions_are_no_objects(cfg, coco):
    def crowd(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    with pytest.raises(ConfigError, match=r"not one annotated object\. Crowd"):
        datasets.check(cfg, coco(crowd))


def _with_keypoints(names, skeleton=(), per_object=None, **fields):
    """A change that gives every object keypoints at (1, 2), all labeled, and every category their names."""

    def change(content):
        for category in content["categories"]:
            category |= {"keypoints": names, "skeleton": skeleton} if names else {}
        for annotation in content["annotations"]:
            annotation |= {"keypoints": [1, 2, 2] * (per_object or len(names)), "num_keypoints": len(names), **fields}

    return change


def test_keypoints_are_named_as_in_the_file(coco):
    """COCO's own names give Detectron2's own flip map and skeleton."""
    names = COCO_PERSON_KEYPOINT_NAMES
    pairs = [[names.index(word) + 1 for word in rule[:2]] for rule in KEYPOINT_CONNECTION_RULES]
    entry = coco(_with_keypoints(list(names), pairs))
    datasets.register(entry)
    DatasetCatalog.get(entry)
    metadata = MetadataCatalog.get(entry)
    assert tuple(metadata.keypoint_names) == names
    assert tuple(metadata.keypoint_flip_map) == COCO_PERSON_KEYPOINT_FLIP_MAP
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [rule[:2] for rule in KEYPOINT_CONNECTION_RULES]
    assert all(0 <= c <= 255 and type(c) is int for rule in metadata.keypoint_connection_rules for c in rule[2])
    assert len(create_keypoint_hflip_indices(entry)) == 17


@pytest.mark.parametrize(
    ("names", "swapped"),
    [
        (["left_eye", "right_eye", "nose"], [1, 0, 2]),
        (["Right Eye", "Left Eye"], [1, 0]),
        (["l_eye", "r_eye", "l_ear", "r_ear"], [1, 0, 3, 2]),
        (["eye.L", "eye.R"], [1, 0]),
        (["ELBOW LEFT", "ELBOW RIGHT"], [1, 0]),
        (["heel", "reer"], [0, 1]),
        (["left_eye", "nose"], [0, 1]),
    ],
)
def test_a_flip_swaps_the_sides_of_a_pair_however_they_are_named(coco, names, swapped):
    entry = coco(_with_keypoints(names))
    datasets.register(entry)
    DatasetCatalog.get(entry)
    assert create_keypoint_hflip_indices(entry) == swapped


def test_two_categories_of_one_name_are_said(cfg, coco, caplog):
    def rename(content):
        content["categories"][1]["name"] = content["categories"][0]["name"]

    with caplog.at_level("INFO"):
        datasets.check(cfg, coco(rename))
    assert "1 categories have another's name" in caplog.text


def test_a_file_without_keypoints_names_none(scenes):
    datasets.register(scenes)
    DatasetCatalog.get(scenes)
    assert "keypoint_names" not in MetadataCatalog.get(scenes).as_dict()


def test_a_broken_data_set_stays_unharmed(cfg, coco):
    path = coco(lambda content: json.dumps(content)[:-40])
    before = Path(path).read_bytes()
    for _ in range(2):  # the second time it is registered already
        with pytest.raises(ConfigError):
            datasets.check(cfg, path)
    assert Path(path).read_bytes() == before
    assert path in DatasetCatalog


def test_a_cut_off_test_image_is_found_before_training(cfg, coco, scenes, tmp_path):
    """Of the test data; a whole file with something behind its end is none."""
    entry, images = coco(), sorted((tmp_path / "images").iterdir())
    cfg.DATASETS.TEST = (entry,)
    images[0].write_bytes(images[0].read_bytes() + bytes(100))
    check_datasets(cfg, training=True)
    images[-1].write_bytes(images[-1].read_bytes()[:900])
    with pytest.raises(DatasetError, match=rf"{images[-1].name} cannot be read"):
        check_datasets(cfg, training=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entry,), (scenes,)
    check_datasets(cfg, training=True)  # training stops at it, or skips it, as ON_CORRUPT says
