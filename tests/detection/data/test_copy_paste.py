"""Pasted objects against a painter who puts one pixel over another."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.data.copy_paste import paste, some_objects
from resnet_backbone.detection.data.loader import TrainBatches

COCO_MINI = Path(__file__).parents[3].parent / "shared" / "data" / "coco_mini"
HEIGHT, WIDTH = 40, 50


def scene(rng, count):
    """An image and `count` rectangles in it, as an image of the mapper."""
    image = torch.from_numpy(rng.integers(0, 256, (3, HEIGHT, WIDTH), np.uint8))
    masks = np.zeros((count, HEIGHT, WIDTH), bool)
    for mask in masks:
        top, left = rng.integers(0, HEIGHT - 2), rng.integers(0, WIDTH - 2)
        mask[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = True
    instances = Instances((HEIGHT, WIDTH))
    if count:
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = Boxes(torch.tensor([box_of(mask) for mask in masks]).reshape(-1, 4))
    instances.gt_classes = torch.from_numpy(rng.integers(0, 100, count))
    return image, instances


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize(("own", "pasted"), [(6, 4), (1, 30), (0, 3), (5, 0), (0, 0)])
def test_every_pixel_is_the_topmost_objects(own, pasted):
    dropped = 0
    for seed in range(20):
        rng = np.random.default_rng((seed, own, pasted))
        (image, instances), (source_image, source) = scene(rng, own), scene(rng, pasted)
        before = [value.clone() for value in (image, instances.gt_boxes.tensor, instances.gt_classes)]
        result, found = paste(image, instances, source_image, source)

        expected, visible, classes = image.clone(), [], []
        theirs = source.gt_masks.tensor.numpy() if pasted else np.zeros((0, HEIGHT, WIDTH), bool)
        ours = instances.gt_masks.tensor.numpy() if own else theirs[:0]
        for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
            if theirs[:, y, x].any():
                expected[:, y, x] = source_image[:, y, x]
        for mask, number in zip(ours, instances.gt_classes.tolist()):
            left = mask & ~theirs.sum(axis=0, dtype=bool)
            if left.sum():
                visible.append(left)
                classes.append(number)
            dropped += not left.sum()
        visible += list(theirs)
        classes += source.gt_classes.tolist()

        assert torch.equal(result, expected) and result.dtype == torch.uint8
        assert found.gt_classes.tolist() == classes and found.image_size == (HEIGHT, WIDTH)
        assert found.gt_boxes.tensor.tolist() == [box_of(mask) for mask in visible]
        if classes:
            assert (found.gt_masks.tensor.numpy() == np.array(visible)).all()
        after = (image, instances.gt_boxes.tensor, instances.gt_classes)
        assert all(torch.equal(a, b) for a, b in zip(before, after))  # what came in is as it was
    assert dropped > 0 or pasted < 20


def test_each_object_but_crowds_is_pasted_half_of_the_time():
    np.random.seed(3)
    record = {"annotations": [{"name": n, "iscrowd": int(n == 2)} for n in range(4)]}
    drawn = [tuple(item["name"] for item in some_objects(record)) for _ in range(2000)]
    subsets = [names for size in range(4) for names in itertools.combinations((0, 1, 3), size)]
    counts = np.array([drawn.count(names) for names in subsets])
    assert counts.sum() == 2000
    assert ((counts - 250) ** 2 / 250).sum() < 29.9  # chi-square of 7 degrees of freedom, at a level of 1e-4


KEYS = ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask", "INPUT.COPY_PASTE", 1.0)
KEYS += ("INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96, "INPUT.SCALE_JITTER.RANGE", (0.5, 1.5))


@pytest.fixture
def make(detection_config, outlined, tmp_path):
    def batches(*overrides):
        return TrainBatches(
            detection_config("faster_rcnn_R50.yaml", tmp_path, "DATASETS.TRAIN", outlined, *KEYS, *overrides)
        )

    return batches


def take(batches, start, count):
    return list(itertools.chain(*itertools.islice(batches(start), count)))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a["image_id"] == b["image_id"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        assert a["instances"].has("gt_masks") == b["instances"].has("gt_masks")
        if a["instances"].has("gt_masks"):
            assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_a_function_of_seed_and_iteration(make, workers):
    keys = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 1.0)
    whole = take(make(*keys), 0, 12)
    np.random.seed(11)  # what the process drew before does not matter
    assert_same(take(make(*keys, "DATALOADER.NUM_WORKERS", workers), 7, 5), whole[14:])


def test_the_image_below_is_the_one_without_pasting(make):
    """Pixels differ inside of the pasted masks alone, which come last."""
    plain, pasted = (take(make("INPUT.COPY_PASTE", share), 0, 20) for share in (0.0, 1.0))
    more = 0
    for a, b in zip(plain, pasted, strict=True):
        changed = (a["image"] != b["image"]).any(dim=0)
        before = {tuple(box) for box in a["instances"].gt_boxes.tensor.tolist()}
        new = [tuple(box) not in before for box in b["instances"].gt_boxes.tensor.tolist()]
        if any(new):
            changed &= ~b["instances"].gt_masks.tensor[torch.tensor(new)].any(dim=0)
            more += 1
        assert not changed.any()
    assert more > 10
    half = take(make("INPUT.COPY_PASTE", 0.5), 0, 20)
    same = sum(torch.equal(a["image"], b["image"]) for a, b in zip(half, pasted, strict=True))
    assert 10 < same < 40


def test_boxes_are_those_of_the_masks(make):
    for record in take(make(), 0, 20):
        if len(record["instances"]):
            masks = record["instances"].gt_masks.tensor.numpy()
            assert record["instances"].gt_boxes.tensor.tolist() == [box_of(mask) for mask in masks]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"{COCO_MINI} is not there")
def test_photographs_with_outlines_and_crowds(detection_config, tmp_path):
    entry = f"{COCO_MINI / 'train.json'}"
    datasets.register(entry)
    keys = ("DATASETS.TRAIN", entry, *KEYS, "INPUT.SCALE_JITTER.SIZE", 256, "SOLVER.IMS_PER_BATCH", 16)
    keys += ("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    for record in take(TrainBatches(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys)), 0, 2):
        assert record["image"].shape == (3, 256, 256)
        if len(record["instances"]):
            masks = record["instances"].gt_masks.tensor.numpy()
            assert record["instances"].gt_boxes.tensor.tolist() == [box_of(mask) for mask in masks]


def test_an_unreadable_second_image_is_replaced_and_the_first_one_stays(make, outlined, tmp_path):
    """Each scene is there four times; one file is then cut off."""
    content, scenes = {"images": [], "annotations": []}, json.loads(Path(outlined).read_text())
    (tmp_path / "images").mkdir()
    for copy in range(0, 400, 100):
        for image in scenes["images"]:
            name = f"{copy}_{image['file_name']}"
            data = (Path(outlined).parent / "images" / image["file_name"]).read_bytes()
            (tmp_path / "images" / name).write_bytes(data)
            content["images"].append({**image, "id": copy + image["id"], "file_name": name})
        for annotation in scenes["annotations"]:
            ids = {"id": len(content["annotations"]) + 1, "image_id": copy + annotation["image_id"]}
            content["annotations"].append({**annotation, **ids})
    file, bad = tmp_path / "copies.json", tmp_path / "images" / content["images"][2]["file_name"]
    file.write_text(json.dumps({**scenes, **content}))
    datasets.register(str(file))
    keys = ("DATASETS.TRAIN", file, "DATALOADER.MAX_CORRUPT", 0.5)
    skipping, names = make(*keys, "DATALOADER.ON_CORRUPT", "skip"), []
    for iteration in range(40):
        names += skipping.names(iteration)
    intact = take(skipping, 0, 40)
    bad.write_bytes(bad.read_bytes()[:700])
    found = take(skipping, 0, 40)
    changed = [
        name
        for name, one, other in zip(names, intact, found, strict=True)
        if not torch.equal(one["image"], other["image"])
    ]
    replaced = [name for name, record in zip(names, found) if record["file_name"] != name]
    assert set(replaced) == {str(bad)}
    assert 1 <= len(changed) - len(replaced) <= 10  # of 80, those whose second image it was
    assert_same(take(make(*keys, "DATALOADER.ON_CORRUPT", "skip", "DATALOADER.NUM_WORKERS", 1), 5, 7), found[10:24])
    with pytest.raises(DatasetError, match="cannot be read"):
        take(make(*keys, "DATALOADER.ON_CORRUPT", "stop"), 0, 40)
