"""Ground truth and detections as a detector might give them, the same in every version of NumPy."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

COCO_MINI = Path(__file__).parents[4] / "shared" / "data" / "coco_mini" / "val.json"


def index(content: dict) -> COCO:
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def imitated_truth(seed: int, *, images: int, categories: int, crowds: bool) -> dict:
    """Return up to 8 objects an image, which often overlap, some of them crowds."""
    rng = np.random.default_rng(seed)
    items = []
    for image in range(1, images + 1):
        for _ in range(int(9 * rng.random())):
            width, height = 8 + 150 * rng.random(2) ** 2
            x, y = rng.random(2) * (240 - width, 200 - height)
            box = [round(float(value), 2) for value in (x, y, width, height)]
            category = 1 + int(categories * rng.random() ** 1.5)
            crowd = int(crowds and rng.random() < 0.08)
            items.append({"id": len(items) + 1, "image_id": image, "category_id": category, "bbox": box})
            items[-1] |= {"area": box[2] * box[3], "iscrowd": crowd}
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 200, "width": 240} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": f"category {n}"} for n in range(1, categories + 1)],
        "annotations": items,
    }


def imitated_detections(content: dict, seed: int) -> list[dict]:
    """Return annotations moved, dropped, doubled and confused, and detections of nothing; all scores differ."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in content["categories"]]
    results = []

    def add(image, category, box):
        box = [round(float(value), 3) for value in (*box[:2], *np.maximum(box[2:], 1))]
        results.append({"image_id": image, "category_id": category, "bbox": box, "score": float(rng.random())})

    for item in content["annotations"]:
        box = np.array(item["bbox"], float)
        for _ in range(int(3.2 * rng.random())):
            moved = box + (rng.random(4) - 0.5) * rng.random() * np.tile(box[2:], 2)
            confused = categories[int(len(categories) * rng.random())]
            add(item["image_id"], item["category_id"] if rng.random() < 0.75 else confused, moved)
        if rng.random() < 0.3:
            add(
                item["image_id"],
                categories[int(len(categories) * rng.random())],
                200 * rng.random(4) * (1, 1, 0.4, 0.4),
            )
    return results


def coco_mini() -> dict:
    """Return the annotations of some COCO images, with the categories that occur in them."""
    content = json.loads(COCO_MINI.read_text())
    there = {item["category_id"] for item in content["annotations"] if not item["iscrowd"]}
    content["categories"] = [category for category in content["categories"] if category["id"] in there]
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] in there]
    return content
