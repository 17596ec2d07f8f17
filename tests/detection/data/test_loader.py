import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from PIL import Image

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.data.loader import TrainBatches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """A COCO file of 7 wide and 4 high images with one box each."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": n, "name": f"c{n}"} for n in range(1, 9)]}
    for number in range(1, 12):
        height, width = (40, 60) if number < 8 else (60, 40)
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "images" / name)
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        box = {"bbox": [5, 6, 20, 10], "area": 200, "iscrowd": 0, "category_id": number % 8 + 1}
        content["annotations"].append({"id": number, "image_id": number, **box})
    (folder / "a.json").write_text(json.dumps(content))
    datasets.register(str(folder / "a.json"))
    return str(folder / "a.json")


@pytest.fixture
def make(detection_config, mixed, tmp_path):
    def batches(*overrides):
        keys = ("DATASETS.TRAIN", mixed, "INPUT.MIN_SIZE_TRAIN", (32, 40, 48), "INPUT.CROP.ENABLED", True, *overrides)
        return TrainBatches(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys))

    return batches


def take(batches, start, count):
    return list(itertools.islice(batches(start), count))


def assert_same(one, other):
    assert len(one) == len(other)
    for batch, again in zip(one, other):
        assert [record["image_id"] for record in batch] == [record["image_id"] for record in again]
        for a, b in zip(batch, again):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
            assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_a_function_of_seed_and_iteration(make, grouping, workers):
    keys = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    whole = take(make(*keys), 0, 9)
    np.random.seed(11)  # what the process drew before does not matter
    torch.manual_seed(12)
    assert_same(take(make(*keys, "DATALOADER.NUM_WORKERS", workers), 4, 5), whole[4:])
    other_seed = take(make(*keys, "SEED", 99), 0, 9)
    assert [r["image_id"] for b in other_seed for r in b] != [r["image_id"] for b in whole for r in b]


def test_an_image_is_augmented_anew_each_time_it_comes(make):
    seen = {}
    for record in itertools.chain(*take(make(), 0, 30)):
        seen.setdefault(record["image_id"], []).append(record["image"])
    assert len(seen) == 11
    for images in seen.values():
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in itertools.pairwise(images))


def test_an_epoch_holds_every_image_once(make):
    batches = take(make("DATALOADER.ASPECT_RATIO_GROUPING", False), 0, 11)
    order = [record["image_id"] for batch in batches for record in batch]
    assert sorted(order[:11]) == sorted(order[11:]) == list(range(1, 12))


def test_grouped_batches_hold_one_orientation(make):
    batches = take(make("DATALOADER.ASPECT_RATIO_GROUPING", True), 0, 64)
    mixed = [batch for batch in batches if len({record["width"] > record["height"] for record in batch}) > 1]
    assert len(mixed) <= 1
    ungrouped = take(make("DATALOADER.ASPECT_RATIO_GROUPING", False), 0, 64)
    assert sum(len({r["width"] > r["height"] for r in b}) > 1 for b in ungrouped) > 5


def test_augmentation_is_detectron2s_mapper(detection_config, mixed, tmp_path):
    """Without anything random the loader gives what Detectron2's mapper gives."""
    keys = ("DATASETS.TRAIN", mixed, "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.RANDOM_FLIP", "none")
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *keys)
    mapper = DatasetMapper(cfg, is_train=True)
    records = {r["image_id"]: r for r in get_detection_dataset_dicts(mixed)}
    assert all(r["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS for r in records.values())
    for batch in take(TrainBatches(cfg), 0, 3):
        assert_same([batch], [[mapper(copy.deepcopy(records[r["image_id"]])) for r in batch]])


def test_two_processes_share_each_batch(make, monkeypatch):
    from resnet_backbone.detection.data import loader

    whole = take(make(), 3, 2)
    monkeypatch.setattr(loader.comm, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(loader.comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(make(), 3, 2))
    assert_same([a + b for a, b in zip(*parts)], whole)


@pytest.mark.parametrize(("damage", "workers"), [("gone", 0), ("cut", 1), ("not an image", 0)])
def test_an_image_that_cannot_be_read_is_named(detection_config, scenes, tmp_path, workers, damage):
    content = json.loads(Path(scenes).read_text())
    (tmp_path / "images").mkdir()
    for record in content["images"]:
        data = (Path(scenes).parent / "images" / record["file_name"]).read_bytes()
        (tmp_path / "images" / record["file_name"]).write_bytes(data)
    (tmp_path / "a.json").write_text(json.dumps(content))
    bad = tmp_path / "images" / content["images"][2]["file_name"]
    keys = ("DATASETS.TRAIN", tmp_path / "a.json", "DATALOADER.NUM_WORKERS", workers)
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path / "out", *keys)
    datasets.register(str(tmp_path / "a.json"))
    batches = TrainBatches(cfg)
    if damage == "gone":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:700] if damage == "cut" else b"hello")
    with pytest.raises(DatasetError) as error:
        take(batches, 0, 3)
    assert str(bad) in str(error.value) and "Replace it" in str(error.value) and "\n" not in str(error.value)


def test_rare_classes_come_as_often_as_in_detectron2(detection_config, tmp_path):
    """Of 40 images, 3 have the rare class: their factor is by hand, and all are those of Detectron2's sampler."""
    content = {"images": [], "annotations": [], "categories": [{"id": n, "name": f"c{n}"} for n in (1, 2)]}
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60})
        for category in (1, 2) if number in (5, 17, 18) else (1,):
            box = {"bbox": [5, 6, 20, 10], "area": 200, "iscrowd": 0, "category_id": category, "image_id": number}
            content["annotations"].append({"id": 2 * number + category, **box})
    file = tmp_path / "rare.json"
    file.write_text(json.dumps(content))
    datasets.register(str(file))
    keys = ("DATASETS.TRAIN", file, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    keys += ("DATALOADER.REPEAT_THRESHOLD", 0.5, "SOLVER.IMS_PER_BATCH", 2)
    batches = TrainBatches(detection_config("faster_rcnn_R50.yaml", tmp_path / "out", *keys))
    records = get_detection_dataset_dicts(str(file))
    theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.5).numpy()
    rare = math.sqrt(0.5 / (3 / 40))
    assert theirs[[4, 5, 17]] == pytest.approx([1, rare, rare])
    assert batches.num_images == round(theirs.sum()) == 45
    drawn = [name for iteration in range(900) for name in batches.names(iteration)]  # 40 epochs
    counts = [drawn.count(record["file_name"]) / 40 for record in records]
    assert counts == pytest.approx(theirs, abs=4 * 0.5 / 40**0.5)


@pytest.fixture
def damaged(detection_config, scenes, tmp_path):
    """The function `(KEY, VALUE, …)` that gives batches of six scenes, of which one is cut off, and its file."""
    (tmp_path / "images").mkdir()
    content = json.loads(Path(scenes).read_text())
    for record in content["images"]:
        data = (Path(scenes).parent / "images" / record["file_name"]).read_bytes()
        (tmp_path / "images" / record["file_name"]).write_bytes(data)
    (tmp_path / "a.json").write_text(json.dumps(content))
    bad = tmp_path / "images" / content["images"][2]["file_name"]
    bad.write_bytes(bad.read_bytes()[:700])
    datasets.register(str(tmp_path / "a.json"))

    def make(*overrides):
        keys = ("DATASETS.TRAIN", tmp_path / "a.json", "DATALOADER.ON_CORRUPT", "skip", *overrides)
        return TrainBatches(detection_config("faster_rcnn_R50.yaml", tmp_path / "out", *keys))

    return make, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_replaces_an_unreadable_one(damaged, workers, caplog):
    """Which one, seed and position say; everything else is as without it."""
    make, bad = damaged
    whole = take(make("DATALOADER.MAX_CORRUPT", 0.9), 0, 12)
    files = [record["file_name"] for batch in whole for record in batch]
    drawn = make()
    expected = [name for iteration in range(12) for name in drawn.names(iteration)]
    replaced = [name == str(bad) for name in expected]
    assert any(replaced) and str(bad) not in files and "replaced" not in whole[0][0]
    assert [name for name, gone in zip(files, replaced) if not gone] == [n for n in expected if n != str(bad)]
    caplog.clear()
    with caplog.at_level("WARNING", logger="resnet_backbone"):
        resumed = take(make("DATALOADER.NUM_WORKERS", workers), 5, 7)
    assert_same(resumed, whole[5:])
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"the image {bad} cannot be read") and said.endswith(
        "annotations. Another image replaced it; 1 so far"
    )


def test_too_many_unreadable_images_stop_the_run(damaged):
    make, bad = damaged
    with pytest.raises(
        DatasetError, match=rf"\d+ of the \d+ images loaded so far .*{bad.name}.*DATALOADER.MAX_CORRUPT"
    ):
        take(make("DATALOADER.MAX_CORRUPT", 0.0), 0, 6)
    with pytest.raises(DatasetError, match=r"\d+ of the \d+ images loaded so far could not be read and were replaced"):
        take(make("DATALOADER.MAX_CORRUPT", 0.01), 0, 60)
    with pytest.raises(DatasetError, match=rf"{bad.name} cannot be read"):
        take(make("DATALOADER.ON_CORRUPT", "stop"), 0, 6)
