"""What the configuration takes from the data, and what in them stops a run."""

import copy
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from resnet_backbone import detection
from resnet_backbone.data.drawing import CLASS_NAMES
from resnet_backbone.detection.checks import check_datasets
from resnet_backbone.engine.config import ConfigError, load_config, origin, set_key

CONFIGS = Path(__file__).parents[3] / "configs"
KEYPOINTS = ["left_ear", "right_ear", "tail"]


@pytest.fixture
def make_cfg(scenes, tmp_path):
    """The function `(KEY, VALUE, …, file=…)` that gives a configuration on the scenes in which nobody set a number."""

    def make(*overrides, file=CONFIGS / "faster_rcnn_R50.yaml"):
        keys = (
            "DATASETS.TRAIN",
            scenes,
            "DATASETS.TEST",
            scenes,
            "OUTPUT_DIR",
            tmp_path / "out",
            "MODEL.DEVICE",
            "cpu",
        )
        return load_config(detection.get_config(), file, list(map(str, (*keys, *overrides))))

    return make


@pytest.fixture
def coco(scenes, tmp_path):
    """The function `(change, name)` that writes the scenes' COCO file after a change in place; it returns the entry."""

    def write(change=lambda content: None, name="a.json") -> str:
        content = json.loads(Path(scenes).read_text())
        change(content)
        (tmp_path / name).write_text(json.dumps(content))
        return f"{tmp_path / name}:{Path(scenes).parent / 'images'}"

    return write


@pytest.fixture
def own_set():
    """The function `(name, records, metadata=…)` that registers a data set as a user's script does."""
    names = []

    def register(name, records, **metadata) -> str:
        DatasetCatalog.register(name, lambda: copy.deepcopy(records))
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def extra_class(content):
    content["categories"].append({"id": 9, "name": "extra"})


def renamed_class(content):
    content["categories"][0]["name"] = "other"


def with_keypoints(content, names=KEYPOINTS, per_object=3):
    for category in content["categories"]:
        category["keypoints"] = names
    for annotation in content["annotations"]:
        annotation |= {"keypoints": [5, 6, 2] * per_object, "num_keypoints": per_object}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("architecture", "key"),
    [("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"), ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES")],
)
def test_the_number_of_classes_is_the_datas(make_cfg, caplog, scenes, architecture, key, training):
    caplog.set_level(logging.INFO)
    cfg = make_cfg("MODEL.META_ARCHITECTURE", architecture)
    if not training:
        cfg.DATASETS.TRAIN = ("coco_2014_train",)  # which is not there
    check_datasets(cfg, training=training)
    expected = (8, 80) if "ROI" in key else (80, 8)
    assert expected == (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES)
    assert origin(cfg, key) == f"categories of {scenes}"
    assert f"{key} is 8, from the categories of {scenes}" in caplog.text
    check_datasets(cfg, training=training)  # again, as a script may


def test_a_number_that_the_user_set_is_compared(make_cfg, scenes, coco):
    check_datasets(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 8), training=True)
    with pytest.raises(ConfigError) as error:
        check_datasets(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 80), training=True)
    words = ("MODEL.ROI_HEADS.NUM_CLASSES is 80 (command line)", f"{scenes} has 8 categories", "to 8")
    assert all(word in str(error.value) for word in words)
    zoo = model_zoo.get_config_file("PascalVOC-Detection/faster_rcnn_R_50_C4.yaml")
    with pytest.raises(
        ConfigError, match=r"NUM_CLASSES is 20 \(.*PascalVOC-Detection/faster_rcnn_R_50_C4\.yaml\).*to 8"
    ):
        check_datasets(make_cfg(file=zoo), training=True)
    check_datasets(
        make_cfg("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.ROI_HEADS.NUM_CLASSES", 80), training=True
    )


@pytest.mark.parametrize("overrides", [(), ("MODEL.ROI_HEADS.NUM_CLASSES", 9)])
def test_data_sets_that_differ_are_both_named(make_cfg, coco, scenes, overrides):
    """Whatever the configuration says, the sets are what is wrong."""
    other = coco(extra_class)
    for train, test in (((scenes, other), (scenes,)), ((scenes,), (other,))):
        cfg = make_cfg(*overrides)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
        with pytest.raises(ConfigError) as error:
            check_datasets(cfg, training=True)
        words = (f"{scenes} and {other} have different classes", "(8) against", "(9)")
        assert all(word in str(error.value) for word in words), str(error.value)
    cfg.DATASETS.TEST = (coco(renamed_class, "renamed.json"),)
    with pytest.raises(ConfigError, match="different classes"):
        check_datasets(cfg, training=True)


def test_ids_give_the_order_not_the_place_in_the_list(make_cfg, coco, scenes):
    cfg = make_cfg()
    cfg.DATASETS.TEST = (coco(lambda content: content["categories"].reverse()),)
    check_datasets(cfg, training=True)


def test_keypoints_without_pairs_are_said_before_they_are_flipped(make_cfg, coco, caplog):
    def unpaired(content):
        with_keypoints(content, ["nose", "tail", "back"])

    for flip, said in (("horizontal", True), ("none", False)):
        cfg = make_cfg(*("MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3, "INPUT.RANDOM_FLIP", flip))
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(unpaired),)
        check_datasets(cfg, training=True)
        assert ("so that a flip swaps none" in caplog.text) == said
        caplog.clear()


def test_keypoints_are_counted_and_checked(make_cfg, coco):
    cfg = make_cfg("MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(with_keypoints),)
    check_datasets(cfg, training=True)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    set_key(cfg, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17, "command line")
    with pytest.raises(ConfigError, match=r"NUM_KEYPOINTS is 17 \(command line\).* has 3 keypoints .*to 3"):
        check_datasets(cfg, training=True)


def some_without_keypoints(content):
    with_keypoints(content)
    content["annotations"][0].pop("keypoints")


def unlabeled_keypoints(content):
    with_keypoints(content)
    for annotation in content["annotations"]:
        annotation["keypoints"] = [5, 6, 0] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: None, ("MODEL.KEYPOINT_ON is True (command line)", "no keypoints", "to False")),
        (some_without_keypoints, ("1 of", "no keypoints")),
        (lambda content: with_keypoints(content, names=[]), ("does not name its keypoints", "keypoint_names")),
        (lambda content: with_keypoints(content, per_object=2), ("names 3 keypoints", "9 numbers", "has 6")),
        (unlabeled_keypoints, ("not one keypoint", "labeled")),
        (with_keypoints, ("TEST.KEYPOINT_OKS_SIGMAS has 2 numbers (command line)", "3 keypoints")),
    ],
)
def test_keypoints_that_cannot_be_used(make_cfg, coco, change, words):
    cfg = make_cfg("MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(change),)
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=True)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sigmas_are_needed_unless_the_keypoints_are_cocos(make_cfg, coco):
    cfg = make_cfg("MODEL.KEYPOINT_ON", True)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(with_keypoints),)
    with pytest.raises(ConfigError, match="SIGMAS is empty, but there are 3"):
        check_datasets(cfg, training=True)
    cfg.DATASETS.TEST = ()
    check_datasets(cfg, training=True)
    cfg = make_cfg("MODEL.KEYPOINT_ON", True)
    many = [str(number) for number in range(17)]
    entry = coco(lambda content: with_keypoints(content, many, 17), "many.json")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (entry,)
    check_datasets(cfg, training=True)


def without_masks(content):
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)


def with_masks(content, encoded=False):
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        size = sizes[annotation["image_id"]]
        annotation["segmentation"] = (
            {"size": size, "counts": [0, 9, size[0] * size[1] - 9]} if encoded else [[1, 1, 5, 1, 5, 5]]
        )


def test_masks(make_cfg, coco):
    cfg = make_cfg("MODEL.MASK_ON", True)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(without_masks),)
    with pytest.raises(
        ConfigError, match=r"MODEL.MASK_ON is True \(command line\), but (\d+) of \1 objects of .*a\.json"
    ):
        check_datasets(cfg, training=True)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(with_masks, "b.json"),)
    check_datasets(cfg, training=True)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (coco(lambda content: with_masks(content, True), "c.json"),)
    check_datasets(cfg, training=False)
    with pytest.raises(ConfigError, match=r"INPUT.MASK_FORMAT is polygon \(default\).*no polygons.*bitmask"):
        check_datasets(cfg, training=True)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_datasets(cfg, training=True)


@pytest.mark.parametrize("crowd_needs", ["segmentation", "keypoints"])
def test_a_test_set_needs_masks_and_keypoints_for_crowd_regions_too(make_cfg, coco, crowd_needs):
    """COCO's evaluation compares with them; training does not."""

    def change(content):
        with_masks(content)
        with_keypoints(content)
        content["annotations"][0]["iscrowd"] = 1
        del content["annotations"][0][crowd_needs]

    key = {"segmentation": "MODEL.MASK_ON", "keypoints": "MODEL.KEYPOINT_ON"}[crowd_needs]
    cfg = make_cfg(key, True, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 3)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (coco(change),), ()
    check_datasets(cfg, training=True)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    with pytest.raises(ConfigError, match=f"1 of .* have no {crowd_needs}, which COCO's evaluation needs"):
        check_datasets(cfg, training=True)


@pytest.mark.parametrize("architecture", ["PanopticFPN", "SemanticSegmentor"])
def test_semantic_labels(make_cfg, own_set, scenes, tmp_path, architecture):
    cfg = make_cfg("MODEL.META_ARCHITECTURE", architecture)
    with pytest.raises(ConfigError, match=rf"{architecture} \(command line\), .*6 of 6 images .*sem_seg_file_name"):
        check_datasets(cfg, training=True)
    records = DatasetCatalog.get(scenes)
    for record in records:
        record["sem_seg_file_name"] = str(tmp_path / f"{record['image_id']}.png")
    metadata = {"thing_classes": list(CLASS_NAMES), "stuff_classes": ["things", "sky", "sea"]}
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (own_set("labeled_scenes", records, **metadata),)
    with pytest.raises(ConfigError, match=r"6 of 12 images of labeled_scenes do not exist.*\.png"):
        check_datasets(cfg, training=True)
    for record in records:
        Path(record["sem_seg_file_name"]).write_bytes(b"")
    check_datasets(cfg, training=True)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert origin(cfg, "MODEL.ROI_HEADS.NUM_CLASSES") == (
        "categories of labeled_scenes" if architecture == "PanopticFPN" else None
    )


def test_proposals(make_cfg, scenes, tmp_path):
    precomputed = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    with pytest.raises(ConfigError, match=r"PrecomputedProposals \(command line\), but MODEL.LOAD_PROPOSALS is False"):
        check_datasets(make_cfg(*precomputed), training=True)
    cfg = make_cfg(*precomputed, "MODEL.LOAD_PROPOSALS", True)
    with pytest.raises(ConfigError, match=r"PROPOSAL_FILES_TRAIN has 0 files for the 1 data sets"):
        check_datasets(cfg, training=True)
    with pytest.raises(ConfigError, match=r"PROPOSAL_FILES_TEST has 0 files"):
        check_datasets(cfg, training=False)
    file = tmp_path / "proposals.pkl"
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(file),)
    with pytest.raises(ConfigError, match=r"PROPOSAL_FILES_TRAIN: .*proposals.pkl cannot be read \(No such file"):
        check_datasets(cfg, training=True)
    ids = [record["image_id"] for record in DatasetCatalog.get(scenes)]
    for count in (len(ids) - 1, len(ids)):
        content = {
            "ids": ids[:count],
            "boxes": [np.array([[1.0, 1, 9, 9]])] * count,
            "objectness_logits": [np.array([1.0])] * count,
            "bbox_mode": BoxMode.XYXY_ABS,
        }
        file.write_bytes(pickle.dumps(content))
        if count < len(ids):
            with pytest.raises(ConfigError, match="does not hold proposals for every image"):
                check_datasets(cfg, training=True)
    check_datasets(cfg, training=True)
    file.write_bytes(b"hello")
    with pytest.raises(ConfigError, match="does not hold proposals"):
        check_datasets(cfg, training=True)
    cfg.DATASETS.TEST = ()
    file.write_bytes(pickle.dumps(content))
    check_datasets(cfg, training=True)
