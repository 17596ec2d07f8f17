"""Annotation files with random damage: a result, or one sentence, but no other exception and no impossible number."""

import copy
import itertools
import json
import math
import random
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from resnet_backbone.detection.checks import check_datasets
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.evaluation.registry import build_evaluator
from resnet_backbone.errors import InputError

COCO_MINI = Path(__file__).parents[3].parent / "shared" / "data" / "coco_mini"
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        77,
        0.5,
        -7.25,
        1e9,
        1e308,
        -1e308,
        10**12,
        10**400,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *(
        "",
        "x",
        "1",
        "nan",
        [],
        {},
        [1, 2, 3],
        [1, 2, 3, 4],
        [[]],
        [[1, 2]],
        [[1, 2, 3, 4]],
        [[5, 5, 9, 5, 9, 9]],
        [None] * 4,
    ),
    *({"counts": "x"}, {"size": [2, 2], "counts": [4]}, {"size": None, "counts": None}, ["1", "2", "3", "4"]),
)


@pytest.fixture(scope="module")
def clean() -> dict:
    """COCO's annotations of eight images with a crowd region, and all categories."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"{COCO_MINI} is not there")
    content = json.loads((COCO_MINI / "val.json").read_bytes())
    crowded = next(a["image_id"] for a in content["annotations"] if a["iscrowd"])
    images = sorted(content["images"], key=lambda image: image["id"] != crowded)[:8]
    kept = {image["id"] for image in images}
    items = [a for a in content["annotations"] if a["image_id"] in kept]
    assert any(a["iscrowd"] for a in items) and not all(a["iscrowd"] for a in items)
    return {"images": images, "annotations": items, "categories": content["categories"]}


def is_whole(content: dict) -> bool:
    """Return whether there is still something to damage."""
    lists = content.values()
    return all(isinstance(items, list) and items and all(isinstance(i, dict) and i for i in items) for items in lists)


def damage(content: dict, rng: random.Random) -> None:
    """Change one thing: a value, a number in a list, a key, an item, or a whole list."""
    name = rng.choices(["annotations", "images", "categories"], [8, 2, 1])[0]
    items = content[name]
    item = rng.choice(items)
    key = rng.choice(sorted(item))
    what = rng.choices(["value", "number", "remove", "repeat", "drop", "all", "list"], [8, 8, 4, 1, 1, 2, 1])[0]
    if what == "value":
        item[key] = copy.deepcopy(rng.choice(VALUES))
    elif what == "number":
        numbers = item["bbox"] if "bbox" in item and rng.random() < 0.6 else item.get("segmentation", item)
        while isinstance(numbers, list | dict) and numbers:
            place = rng.choice(sorted(numbers) if isinstance(numbers, dict) else range(len(numbers)))
            if not isinstance(numbers[place], list | dict):
                factor = rng.choice([-1, 0, 1.01, 3, 1000, math.nan])
                old = numbers[place]
                scaled = old * factor if type(old) in (int, float) and rng.random() < 0.5 else rng.choice(VALUES)
                numbers[place] = copy.deepcopy(scaled)
                break
            numbers = numbers[place]
    elif what == "remove":
        del item[key]
    elif what == "repeat":
        items.append(copy.deepcopy(item))
    elif what == "drop":
        items.remove(item)
    elif what == "all":  # the same mistake everywhere, as a converter makes it
        value = rng.choice(VALUES)
        for each in items:
            if rng.random() < 0.5:
                each.pop(key, None)
            else:
                each[key] = copy.deepcopy(value)
    else:
        content[name] = copy.deepcopy(rng.choice(VALUES))


class Perfect:
    """Detections that are the objects of an intact file, with their masks."""

    def __init__(self, content: dict, file: Path):
        file.write_text(json.dumps(content))
        truth = COCO(str(file))
        numbers = {category: number for number, category in enumerate(sorted(truth.cats))}
        self.outputs = []
        for image in truth.imgs.values():
            found = [a for a in truth.imgToAnns[image["id"]] if not a["iscrowd"]]
            instances = Instances((image["height"], image["width"]))
            boxes = np.array([a["bbox"] for a in found], dtype=np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            instances.pred_boxes = Boxes(torch.from_numpy(boxes))
            instances.scores = torch.full((len(found),), 0.9)
            instances.pred_classes = torch.tensor([numbers[a["category_id"]] for a in found], dtype=torch.long)
            masks = [truth.annToMask(a) for a in found]
            instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *instances.image_size)).bool()
            self.outputs.append(({"image_id": image["id"]}, {"instances": instances}))

    def evaluate(self, cfg, entry: str) -> dict[str, dict[str, float]]:
        evaluator = build_evaluator(cfg, entry, None)
        evaluator.reset()
        known = {record["image_id"] for record in DatasetCatalog.get(entry)}
        for given, output in self.outputs:
            if given["image_id"] in known:
                evaluator.process([given], [output])
        return evaluator.evaluate()


@pytest.fixture
def attempt(clean, detection_config, tmp_path):
    """The function `(content)` that checks a COCO file, takes two batches and evaluates; it returns the AP by task."""
    perfect = Perfect(clean, tmp_path / "clean.json")

    def run(content: dict) -> dict[str, float]:
        file = tmp_path / "damaged.json"
        file.write_text(json.dumps(content))
        entry = f"{file}:{COCO_MINI / 'images'}"
        for catalog in (DatasetCatalog, MetadataCatalog):
            if entry in catalog.list():
                catalog.remove(entry)
        cfg = detection_config(
            *("faster_rcnn_R50.yaml", tmp_path, "DATASETS.TRAIN", entry, "DATASETS.TEST", entry),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.MASK_ON", True, "SOLVER.IMS_PER_BATCH", 2),
        )
        check_datasets(cfg, training=True)
        for record in itertools.chain(*itertools.islice(TrainBatches(cfg)(0), 2)):
            boxes = record["instances"].gt_boxes
            assert boxes.tensor.isfinite().all() and boxes.nonempty().all()
        return {task: metrics["AP"] for task, metrics in perfect.evaluate(cfg, entry).items()}

    return run


def survive(attempt, clean, seeds: range) -> tuple[list[str], int]:
    """Return what went wrong for each seed's damage, and how many files gave a result."""
    wrong, results = [], 0
    for seed in seeds:
        rng, content = random.Random(seed), copy.deepcopy(clean)
        try:
            for _ in range(rng.choice([1, 1, 1, 2])):
                if is_whole(content):
                    damage(content, rng)
            found = attempt(content)
            results += 1
            if not all(0 <= ap <= 100 + 1e-6 for ap in found.values()) or set(found) != {"bbox", "segm"}:
                wrong.append(f"seed {seed}: {found}")
        except InputError as error:
            if "\n" in str(error) or len(str(error)) > 700:
                wrong.append(f"seed {seed}: {error}")
        except Exception:
            wrong.append(f"seed {seed}: {traceback.format_exc(limit=-4)}")
    return wrong, results


def test_an_intact_file_gives_100(attempt, clean):
    assert attempt(clean) == pytest.approx({"bbox": 100, "segm": 100})


def test_damage_gives_a_result_or_a_sentence(attempt, clean):
    wrong, results = survive(attempt, clean, range(200))
    assert not wrong, "\n".join(wrong)
    assert 20 <= results <= 150  # neither all refused nor all let through


@pytest.mark.slow
def test_much_damage_gives_a_result_or_a_sentence(attempt, clean):
    wrong, _ = survive(attempt, clean, range(200, 2000))
    assert not wrong, "\n".join(wrong)
