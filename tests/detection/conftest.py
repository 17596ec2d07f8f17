"""Data for several tests of detection."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def outlined(scenes, tmp_path_factory) -> str:
    """The COCO file of the scenes, registered, with the octagon in its box as each object's outline."""
    from resnet_backbone.detection import register_dataset

    folder = tmp_path_factory.mktemp("outlined")
    (folder / "images").symlink_to(Path(scenes).parent / "images")
    content = json.loads(Path(scenes).read_text())
    angles = np.pi * (np.arange(8) + 0.5) / 4
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], axis=1)
        annotation["segmentation"] = [corners.ravel().tolist()]
    (folder / "outlined.json").write_text(json.dumps(content))
    register_dataset(str(folder / "outlined.json"))
    return str(folder / "outlined.json")


@pytest.fixture
def panoptic(tmp_path) -> Iterator[str]:
    """A registered panoptic data set of 3 images with one thing and two kinds of stuff, and its half tiny_stuffonly."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_panoptic_separated

    for folder in ("images", "semantic", "panoptic"):
        (tmp_path / folder).mkdir()
    instances = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "ball"}]}
    whole = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": number, "name": name, "isthing": int(number == 1)}
            for number, name in ((1, "ball"), (2, "sky"), (3, "sea"))
        ],
    }
    for number in range(1, 4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg")
        segments = np.full((64, 80), 2, np.uint8)
        segments[40:] = 3
        segments[10:30, 20:50] = 1
        # Things are semantic class 0, and stuff follows.
        Image.fromarray(segments - 1).save(tmp_path / "semantic" / f"{number}.png")
        Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], 2)).save(
            tmp_path / "panoptic" / f"{number}.png"
        )
        image = {"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 80}
        instances["images"].append(image)
        whole["images"].append(image)
        box = {"bbox": [20, 10, 30, 20], "area": 600, "iscrowd": 0, "image_id": number, "category_id": 1}
        outline = [[20, 10, 50, 10, 50, 30, 20, 30]]
        instances["annotations"].append({"id": number, "segmentation": outline, **box})
        info = [
            {"id": n, "category_id": n, "area": int((segments == n).sum()), "bbox": [0, 0, 80, 64], "iscrowd": 0}
            for n in (1, 2, 3)
        ]
        whole["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": info})
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "panoptic.json").write_text(json.dumps(whole))
    metadata = {
        "thing_classes": ["ball"],
        "stuff_classes": ["things", "sky", "sea"],
        "thing_dataset_id_to_contiguous_id": {1: 0},
        "stuff_dataset_id_to_contiguous_id": {0: 0, 2: 1, 3: 2},
    }
    files = ("images", "panoptic", "panoptic.json", "semantic", "instances.json")
    register_coco_panoptic_separated("tiny", metadata, *(str(tmp_path / name) for name in files))
    yield "tiny_separated"
    for name in ("tiny_separated", "tiny_stuffonly"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
