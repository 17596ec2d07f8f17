"""What is refused, and what is tolerated and counted, in annotations of all forms."""

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from resnet_backbone.detection.data import annotations, datasets
from resnet_backbone.engine.config import ConfigError

SIZE = (100, 80)  # width and height
POLYGON = [10, 10, 40, 10, 40, 30]


def look(*items, modes=None, **options):
    return look_in(np.array([SIZE] * len(items), dtype=np.float64), *items, modes=modes, **options)


def look_in(sizes, *items, modes=None, **options):
    found = annotations.find(items, sizes, modes=modes, **options)
    return annotations.check(items, found, entry="set", name=lambda index: f"number {index}")


def one(**fields):
    return {"bbox": [10, 10, 20, 20], **fields}


def encoded(mask: np.ndarray) -> dict:
    return pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("box", [[0, 0, 100, 80], (1.5, 2.5, 3.5, 4.5), np.array([1, 2, 3, 4], np.float32)])
def test_good_boxes(box):
    assert look(one(bbox=box)) == {}


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([math.nan, 1, 2, 3], "[nan, 1, 2, 3]; expected four finite numbers x, y, width, height"),
        ([1, 1, math.inf, 3], "expected four finite numbers"),
        ([1e308, 1, 1e308, 3], "expected four finite numbers"),
        ([10**400, 1, 2, 3], "expected four finite numbers"),
        ([1, 2, 3], "[1, 2, 3]; expected four finite numbers"),
        (["1", 2, 3, 4], "['1', 2, 3, 4]; expected"),
        ([True, 2, 3, 4], "expected four finite numbers"),
        ("1234", "'1234'; expected four finite numbers"),
        ({}, "{}; expected four finite numbers"),
        (None, "has no bbox"),
        ([5, 5, -1, 3], "ends before it begins"),
        ([5, 5, 0, 3], "has no area, like more than 1%"),
        ([200, 5, 3, 3], "outside its image of 100×80"),
        ([100, 5, 1, 1], "outside its image"),
        ([-3, 5, 30, 30], "reaches 3 pixels beyond its image of 100×80"),
        ([50, 50, 20, 33], "reaches 3 pixels beyond"),
    ],
)
def test_bad_boxes(box, words):
    with pytest.raises(ConfigError) as error:
        look(one(), one(bbox=box), one(), one(bbox=box))
    message = str(error.value)
    assert message.startswith("set: number 1 has ") and words in message and "\n" not in message
    assert "1 more of 4 annotations are unusable" in message


def test_a_box_may_reach_a_little_beyond_its_image():
    """2 pixels, or 1% of the side if that is more."""
    (kind, count), *none = look(one(bbox=[-2, 0, 104, 82]), one(), one(bbox=[0, 70, 5, 11])).items()
    assert "beyond their image" in kind and count == 2 and not none
    wide = np.array([[1000.0, 80.0]])
    assert look_in(wide, one(bbox=[0, 0, 1010, 80]))
    with pytest.raises(ConfigError, match="reaches 3 pixels beyond"):
        look_in(wide, one(bbox=[0, 0, 1010, 83]))


def test_one_box_in_a_hundred_may_have_no_area():
    """COCO's training images have two in 860,000, which Detectron2 drops."""
    (kind, count), *none = look(*[one()] * 199, one(bbox=[5, 5, 0, 3])).items()
    assert "no area" in kind and count == 1 and not none


def test_modes():
    corners, sides, rotated = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS
    good = (one(bbox=[60, 50, 100, 80]), one(), one(bbox=[5, 5, -3, 500, 45]))
    assert look(*good, modes=[corners, sides, rotated]) == {}
    assert look(*good, modes=[0, 1, 4]) == {}  # the values of the enumeration
    with pytest.raises(ConfigError, match=r"number 2 has the bbox .*; expected four finite numbers x1, y1, x2, y2"):
        look(*good[:2], one(bbox=[1, 2]), modes=[corners, sides, corners])
    with pytest.raises(ConfigError, match=r"number 0 has the bbox .*ends before it begins"):
        look(one(bbox=[60, 50, 20, 70]), modes=[corners])
    with pytest.raises(ConfigError, match=r"number 1 .*reaches 20 pixels beyond"):
        look(good[2], one(bbox=[60, 50, 120, 70]), modes=[rotated, corners])
    for mode in (None, BoxMode.XYXY_REL, "XYXY", [0]):
        with pytest.raises(ConfigError, match=r"has the bbox_mode .*expected Detectron2's"):
            look(one(), modes=[mode])


@pytest.mark.parametrize("value", [None, "0", 2, -1, math.nan, [], 0.5])
def test_crowd_marks(value):
    assert look(one(), one(iscrowd=0), one(iscrowd=1), one(iscrowd=True)) == {}
    with pytest.raises(ConfigError, match=r"number 0 has the iscrowd .*; expected 0 or 1"):
        look(one(iscrowd=value))


FULL = np.ones(SIZE[::-1], bool)


@pytest.mark.parametrize(
    "mask",
    [
        *(None, [], {}, [POLYGON], [POLYGON, POLYGON + [9, 9]], [[-2, -2, 102, 0, 0, 82]]),
        *({"size": [80, 100], "counts": [0, 8000]}, encoded(FULL), encoded(np.eye(*SIZE[::-1]))),
        {**encoded(FULL), "counts": encoded(FULL)["counts"].decode()},
    ],
)
def test_good_masks(mask):
    assert look(one(segmentation=mask)) == {}


def test_masks_as_pycocotools_encodes_them():
    rng = np.random.default_rng(0)
    noise = [rng.random(SIZE[::-1]) < share for share in rng.random(50)]
    squares = [np.zeros(SIZE[::-1], bool) for _ in range(50)]
    for square in squares:
        square[slice(*sorted(rng.integers(0, 80, 2))), slice(*sorted(rng.integers(0, 100, 2)))] = True
    assert look(*(one(segmentation=encoded(mask)) for mask in (*noise, *squares))) == {}


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([POLYGON[:5]], "expected x and y of at least three points"),
        ([POLYGON, [1, 2, 3, 4]], "[1, 2, 3, 4]; expected x and y of at least three"),
        ([POLYGON[:5] + [math.nan]], "nan]; expected"),
        ([POLYGON[:5] + [math.inf]], "all finite"),
        ([POLYGON[:5] + [10**400]], "all finite"),
        ([POLYGON[:5] + ["1"]], "all finite"),
        ([POLYGON[:5] + [1e9]], "reaches far beyond its image"),
        ([[1, 2, 104, 4, 5, 6]], "reaches far beyond its image"),
        ([5], "the polygon 5"),
        ("x", "the segmentation 'x'; expected a list of polygons"),
        (7, "the segmentation 7"),
        ({"size": [100, 80], "counts": [8000]}, "a mask of size [100, 80]; expected [80, 100]"),
        ({"size": ["80", 100], "counts": [8000]}, "a mask of size"),
        ({"counts": [8000]}, "a mask of size None"),
        ({"size": [80, 100]}, "the counts None; expected"),
        ({"size": [80, 100], "counts": [7999]}, "expected the runs of 8000 pixels"),
        ({"size": [80, 100], "counts": [8001, -1]}, "expected the runs"),
        ({"size": [80, 100], "counts": "x"}, "expected the runs"),
        ({**encoded(FULL), "counts": encoded(FULL)["counts"][:-1]}, "expected the runs"),
        ({**encoded(FULL), "counts": encoded(np.ones((9, 9)))["counts"]}, "expected the runs"),
        ({**encoded(FULL), "counts": "é"}, "expected the runs"),
        ({**encoded(FULL), "size": [80.5, 100]}, "a mask of size"),
    ],
)
def test_bad_masks(mask, words):
    with pytest.raises(ConfigError) as error:
        look(one(), one(segmentation=mask))
    assert str(error.value).startswith("set: number 1 has ") and words in str(error.value)


def test_a_polygon_that_is_dropped_on_reading_is_counted():
    (kind, count), *none = look(one(segmentation=[[1, 2, 3, 4], POLYGON, []]), dropped_polygons=True).items()
    assert "less than three points" in kind and count == 2 and not none
    with pytest.raises(ConfigError, match="at least three points"):  # nothing would be left
        look(one(segmentation=[[1, 2, 3, 4]]), dropped_polygons=True)


@pytest.mark.parametrize("points", [[1, 2], [1, math.nan, 2], [1, 2, 3], [1, 1e9, 0], ["1", 2, 2], "abc", 5])
def test_keypoints(points):
    assert look(one(keypoints=[]), one(keypoints=[1, 2.5, 2, 0, 0, 0])) == {}
    with pytest.raises(ConfigError, match="number 0 has the keypoints"):
        look(one(keypoints=points))


def test_cocos_boxes_take_two_seconds():
    """860,000 in 118,000 images; the clock is this process's, and the limit leaves room for a slow machine."""
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 200, (860_000, 4)).round(2)
    ends = np.sort(rng.integers(0, len(values), 117_999))
    records = [
        {"file_name": "x.jpg", "width": 640, "height": 480, "annotations": [_box(row) for row in rows.tolist()]}
        for rows in np.split(values, ends)
    ]
    start = time.process_time()
    assert datasets._check_dicts("a data set of that size", records) == {}
    assert time.process_time() - start < 4


def _box(values):
    return {"bbox": values, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3, "iscrowd": 0}


@pytest.fixture
def cfg(detection_config, tmp_path):
    return detection_config("faster_rcnn_R50.yaml", tmp_path / "out")


@pytest.fixture
def coco(scenes, tmp_path):
    """The function `(change)` that writes the scenes' COCO file after a change in place; it returns the entry."""

    def write(change) -> str:
        content = json.loads(Path(scenes).read_text())
        change(content)
        (tmp_path / "a.json").write_text(json.dumps(content))
        return f"{tmp_path / 'a.json'}:{Path(scenes).parent / 'images'}"

    return write


def _set(name, index, /, **fields):
    return lambda content: content[name][index].update(fields)


def _repeat(name, /, **fields):
    return lambda content: content[name].append({**content[name][0], **fields})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("annotations", 2, bbox=[1, 2, math.nan, 4]), ("annotation 3 (", ".jpg) has the bbox [1, 2, nan, 4]")),
        (_set("annotations", 2, id=None), ("annotation number 3 of the file", "has the id None; expected an integer")),
        (_set("annotations", 2, id=1), ("annotation 1 (", "the id of another annotation")),
        (_set("annotations", 2, image_id=999), ("annotation 3 has the image_id 999, which none of the 6 images has",)),
        (_set("annotations", 2, image_id=[1]), ("annotation 3 has the image_id [1]",)),
        (_set("annotations", 2, category_id=77), ("has the category_id 77, which is none of the 8 categories",)),
        (_set("annotations", 2, category_id=1.0), ("has the category_id 1.0",)),
        (_set("annotations", 2, category_id=True), ("has the category_id True",)),
        (_set("annotations", 2, area=-5), ("has the area -5; expected",)),
        (_set("annotations", 2, area=math.nan), ("has the area nan",)),
        (_set("annotations", 2, area=1e9), ("has the area 1000000000.0; expected pixels, at most those of its image",)),
        (_set("annotations", 2, area="5"), ("has the area '5'",)),
        (_set("annotations", 2, num_keypoints="5"), ("has the num_keypoints '5'",)),
        (_set("annotations", 2, ignore=1), ("has ignore 1", "iscrowd")),
        (lambda content: content["annotations"].append(5), ("not in COCO form", "of its annotations is 5")),
        (lambda content: content.update(annotations=None), ("not in COCO form", "annotations is None")),
        (_set("images", 1, id="x"), ("image number 2 of 6 has the id 'x'",)),
        (_set("images", 1, id=None), ("image number 2 of 6 has the id None",)),
        (_set("images", 1, width="96"), ("image number 2 of 6 has width '96' and height 96; expected its size",)),
        (_set("images", 1, height=0), ("height 0",)),
        (_set("images", 1, file_name=5), ("has the file_name 5",)),
        (_repeat("images"), ("image number 7 of 7 has the id", "as another image")),
        (_repeat("categories"), ("category number 9 of 9 has the id 1, as another category",)),
        (_set("categories", 1, id=2.5), ("category number 2 of 8 has the id 2.5",)),
        (_set("categories", 1, name=None), ("category number 2 of 8 has the name None",)),
        (lambda content: content.update(categories=[]), ("categories are empty",)),
        (_set("images", 1, width=9600, height=95), ("9600×95 pixels; expected sides that differ by a factor of 100",)),
    ],
)
def test_a_coco_file_is_refused_with_the_place_and_the_value(cfg, coco, change, words):
    entry = coco(change)
    with pytest.raises(ConfigError) as error:
        datasets.check(cfg, entry)
    message = str(error.value)
    assert entry in message and "\n" not in message and all(word in message for word in words), message


def test_what_is_tolerated_is_counted_in_the_log(cfg, coco, caplog):
    def change(content):
        first, second, third = content["annotations"][:3]
        del first["area"], first["iscrowd"], second["iscrowd"]
        first["segmentation"] = [[1, 2, 3, 4], [1, 1, 9, 1, 9, 9]]
        third["bbox"][0] -= third["bbox"][0] + 1.5

    entry = coco(change)
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        datasets.check(cfg, entry)
    found = [record.getMessage().removeprefix(f"{entry}: ") for record in caplog.records]
    assert sorted(words[:27] for words in found if words[0].isdigit()) == [
        "1 annotations have no area ",
        "1 boxes reach a little beyo",
        "1 polygons have less than t",
        "2 annotations have no iscro",
    ]


@pytest.mark.parametrize("mode", [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bbox": [1, 2, math.nan, 4]}, "object 2 of .*2.jpg has the bbox .*nan"),
        ({"category_id": 8}, "object 2 of .*2.jpg has the category_id 8; expected a class's number"),
        ({"category_id": None}, "has the category_id None"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has the polygon .*three points"),
        ({"bbox": None}, "has no bbox"),
    ],
)
def test_a_registered_data_set_is_checked_in_detectron2s_form(cfg, scenes, tmp_path, mode, fields, words):
    good = {"bbox": [10, 10, 20, 20], "bbox_mode": mode, "category_id": 7, "iscrowd": 0}
    images = sorted((Path(scenes).parent / "images").iterdir())[:2]
    (tmp_path / "2.jpg").write_bytes(images[1].read_bytes())
    records = [
        {"file_name": str(images[0]), "image_id": 1, "width": 96, "height": 96, "annotations": [good] * 3},
        {"file_name": str(tmp_path / "2.jpg"), "image_id": 2, "width": 96, "height": 96, "annotations": [good] * 3},
    ]
    DatasetCatalog.register("by_a_script", lambda: records)
    MetadataCatalog.get("by_a_script").set(thing_classes=[f"c{n}" for n in range(8)])
    try:
        assert datasets.check(cfg, "by_a_script") is records
        records[1]["annotations"] = [good, {**good, **fields}, good]
        with pytest.raises(ConfigError, match=f"by_a_script: .*{words}"):
            datasets.check(cfg, "by_a_script")
    finally:
        DatasetCatalog.remove("by_a_script")
        MetadataCatalog.remove("by_a_script")


def test_an_image_that_is_no_regular_file_counts_as_missing(cfg, scenes, tmp_path):
    shutil.copytree(Path(scenes).parent, tmp_path / "scenes")
    image = sorted((tmp_path / "scenes" / "images").iterdir())[1]
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(ConfigError, match=rf"1 of 6 images of .* no regular files, for instance \S+{image.name}"):
        datasets.check(cfg, str(tmp_path / "scenes" / "annotations.json") + f":{tmp_path / 'scenes' / 'images'}")
