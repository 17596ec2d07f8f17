"""Large-scale jitter is Detectron2's, except for the color of the padding."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from PIL import Image

from resnet_backbone.data.sampler import seeded_globals
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.data.mapper import Mapper
from resnet_backbone.detection.data.scale_jitter import ScaleJitter

MASKS = ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")


@pytest.fixture
def make(detection_config, outlined, tmp_path):
    """The function `(KEY, VALUE, …)` that gives a configuration with jitter to 96 pixels."""

    def load(*overrides):
        keys = ("DATASETS.TRAIN", outlined, "INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96)
        return detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, *overrides)

    return load


def mapped(mapper, records, count):
    """The records in turn, with the augmentation of the positions 0, 1, …"""
    found = []
    for position in range(count):
        with seeded_globals(1, position):
            found.append(mapper(copy.deepcopy(records[position % len(records)])))
    return found


@pytest.mark.parametrize("masks", [(), MASKS, ("MODEL.MASK_ON", True)], ids=["boxes", "bitmasks", "polygons"])
@pytest.mark.parametrize("accelerate", [False, True])
def test_it_is_detectron2s_with_the_pixel_mean_around(make, outlined, masks, accelerate):
    cfg = make(*masks, "MODEL.ACCELERATE", accelerate)
    augmentations = [T.ResizeScale(0.1, 2.0, 96, 96), T.FixedSizeCrop((96, 96), pad_value=9), T.RandomFlip()]
    kind = {"use_instance_mask": cfg.MODEL.MASK_ON, "instance_mask_format": cfg.INPUT.MASK_FORMAT}
    reference = DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format=cfg.INPUT.FORMAT,
        recompute_boxes=cfg.MODEL.MASK_ON,
        **kind,
    )
    records = get_detection_dataset_dicts(outlined)
    ours, theirs = (mapped(mapper, records, 60) for mapper in (Mapper(cfg), reference))
    mean = np.rint(cfg.MODEL.PIXEL_MEAN)
    padded, differences = 0, []
    for a, b in zip(ours, theirs, strict=True):
        assert a["image"].shape == (3, 96, 96) and a["image"].dtype == torch.uint8
        one, other = (record["image"].permute(1, 2, 0).numpy().astype(int) for record in (a, b))
        outside = (other == 9).all(axis=2) & (one == mean).all(axis=2)
        padded += outside.mean()
        difference = abs(one - other)[~outside]
        # With acceleration, an image to be small is decoded at a fraction of its size.
        assert difference.max(initial=0) == 0 or (accelerate and difference.mean() < 3)
        differences.append(difference.mean() if difference.size else 0)
        for name in ("gt_boxes", "gt_classes", *(["gt_masks"] if masks else [])):
            assert_equal(a["instances"].get(name), b["instances"].get(name))
    assert 0.1 < padded / 60 < 0.6 and np.mean(differences) < 0.5
    assert any(len(record["instances"]) for record in ours)


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif hasattr(one, "polygons"):
        assert len(one) == len(other)
        for a, b in zip(one.polygons, other.polygons):
            assert len(a) == len(b) and all((p == q).all() for p, q in zip(a, b))
    else:
        assert torch.equal(one.tensor, other.tensor)


def test_the_padding_has_the_order_of_the_channels(make, outlined):
    keys = ("INPUT.SCALE_JITTER.RANGE", (0.2, 0.2), "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [10.4, 20.0, 300.0])
    (found,) = mapped(Mapper(make(*keys)), get_detection_dataset_dicts(outlined), 1)
    assert found["image"][:, -1, 50].tolist() == [10, 20, 255]


def test_no_side_vanishes():
    transform = ScaleJitter(0.1, 0.1, 32, 32).get_transform(np.zeros((3, 300, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (1, 3)


def test_it_is_for_training_alone(make, outlined):
    cfg = make("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96)
    found = Mapper(cfg, is_train=False)(get_detection_dataset_dicts(outlined)[0])
    assert min(found["image"].shape[1:]) == 64


def test_an_image_with_crowd_regions_alone_has_no_objects(make, outlined, tmp_path):
    content = json.loads(Path(outlined).read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == content["images"][0]["id"])
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "crowd.json").write_text(json.dumps(content))
    datasets.register(str(tmp_path / "crowd.json"))
    keys = ("DATASETS.TRAIN", tmp_path / "crowd.json", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    batches = TrainBatches(make(*keys, *MASKS, "INPUT.COPY_PASTE", 1.0, "SOLVER.IMS_PER_BATCH", 6))
    counts = [len(record["instances"]) for batch in (next(batches(i)) for i in range(4)) for record in batch]
    assert max(counts) > 0
