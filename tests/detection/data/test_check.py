"""The check of detection data: everything is found and named, and what stops it is what stops a run."""

import copy
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from resnet_backbone.detection.checks import check_datasets
from resnet_backbone.detection.data.check import check_entry, outcome
from resnet_backbone.errors import InputError
from tests.detection.data.test_corrupted import COCO_MINI, clean, damage, is_whole  # noqa: F401 (a fixture)


@pytest.fixture
def copied(scenes, tmp_path):
    """The function `(change(content, images), name=)` that gives a changed copy of the scenes and its folder."""

    def make(change=lambda content, images: None, name: str = "a") -> str:
        images = tmp_path / name / "images"
        shutil.copytree(Path(scenes).parent / "images", images)
        content = json.loads(Path(scenes).read_text())
        change(content, images)
        file = tmp_path / name / "a.json"
        file.write_text(json.dumps(content))
        return str(file)

    return make


def check(entry: str, **named):
    return check_entry(entry, **{"workers": 0, "limit": None, "progress": None, **named})


def found_in(report) -> dict[str, int]:
    """How many findings there are of each kind."""
    counts = {kind.name: len(report.found(kind)) for kind in report.kinds}
    counts |= {kind.name: len(found) for kind, found in report.contents.findings.items()}
    return {name: count for name, count in counts.items() if count}


def a_run_starts(detection_config, tmp_path, entry: str) -> bool:
    """Whether training on an entry, without an evaluation, gets as far as its first iteration."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        if entry in catalog.list():
            catalog.remove(entry)
    keys = ("DATASETS.TRAIN", entry, "DATASETS.TEST", ())
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path / "out", *keys)
    try:
        check_datasets(cfg, training=True)
        return True
    except InputError as error:
        return "NUM_CLASSES" in str(error)  # which says nothing about the data


def test_clean_data(copied):
    entry = copied()
    report = check(entry)
    assert not report.stops and set(found_in(report)) <= {"empty_category"}
    text = outcome([report]).text
    content = json.loads(Path(entry).read_text())
    assert f"6 images, {len(content['annotations'])} objects" in text and "Would stop a run: nothing" in text


def first(content, **fields):
    content["annotations"][0].update(fields)


def turn(content, images):
    file = images / content["images"][0]["file_name"]
    wide = Image.open(file).convert("RGB").resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(file, exif=exif, format="PNG" if file.suffix == ".png" else "JPEG")
    content["images"][0].update(width=96, height=64)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][0]["id"]]


def image_file(content, images, place=0) -> Path:
    return images / content["images"][place]["file_name"]


def cut(content, images):
    file = image_file(content, images)
    file.write_bytes(file.read_bytes()[:600])


def repeat(items, **fields):
    items.append({**copy.deepcopy(items[0]), **fields})


def rle(content, **fields):
    mask = np.zeros((96, 96), np.uint8)
    mask[:40, :50] = 1
    encoded = pycocotools.mask.encode(np.asfortranarray(mask))
    encoded["counts"] = encoded["counts"].decode()
    first(content, segmentation=encoded, **fields)


FAULTS = {  # the kind, whether it stops a run at its first iteration, and what makes one
    "box_outside": lambda c, _: first(c, bbox=[500, 500, 10, 10]),
    "box_beyond": lambda c, _: first(c, bbox=[10, 10, 200, 10]),
    "box_negative": lambda c, _: first(c, bbox=[10, 10, -5, 10]),
    "box_not_finite": lambda c, _: first(c, bbox=[10, float("nan"), 5, 10]),
    "no_box": lambda c, _: c["annotations"][0].pop("bbox"),
    "box_empty": lambda c, _: first(c, bbox=[10, 10, 0, 10]),
    "crowd_mark": lambda c, _: first(c, iscrowd=2),
    "mask": lambda c, _: first(c, segmentation=[[1, 2, 3, 4, 5, float("inf")]]),
    "keypoints": lambda c, _: first(c, keypoints=[1, 2]),
    "id_twice": lambda c, _: repeat(c["annotations"]),
    "id": lambda c, _: first(c, id="x"),
    "unknown_image": lambda c, _: first(c, image_id=12345),
    "unknown_category": lambda c, _: first(c, category_id=12345),
    "area": lambda c, _: first(c, area=1e9),
    "num_keypoints": lambda c, _: first(c, num_keypoints=-1),
    "ignore": lambda c, _: first(c, ignore=1),
    "image_id": lambda c, _: c["images"].append({"file_name": "x.png", "width": 96, "height": 96}),
    "image_id_twice": lambda c, _: repeat(c["images"]),
    "image_name": lambda c, _: repeat(c["images"], id=777, file_name=""),
    "image_size": lambda c, _: repeat(c["images"], id=777, width=0),
    "category_id": lambda c, _: c["categories"].append({"name": "x"}),
    "category_id_twice": lambda c, _: repeat(c["categories"]),
    "category_name": lambda c, _: c["categories"].append({"id": 777}),
    "too_long": lambda c, images: (
        Image.new("L", (1010, 10)).save(images / "long.png"),
        c["images"].append({"id": 777, "file_name": "long.png", "width": 1010, "height": 10}),
    ),
    "missing": lambda c, images: image_file(c, images).unlink(),
    "no_object": lambda c, _: c["annotations"].clear(),
}
NOTES = {
    "box_clipped": lambda c, _: first(c, bbox=[10, 10, 87, 10]),
    "no_crowd_mark": lambda c, _: [a.pop("iscrowd", None) for a in c["annotations"]],
    "no_area": lambda c, _: c["annotations"][0].pop("area"),
    "misfit": lambda c, _: first(c, bbox=[10, 10, 20, 20], segmentation=[[10, 10, 60, 10, 60, 30]]),
    "without_objects": lambda c, images: repeat(c["images"], id=777),
    "listed_twice": lambda c, images: repeat(c["images"], id=777),
    "empty_category": lambda c, _: c["categories"].append({"id": 777, "name": "unicorn"}),
    "crowd_only": lambda c, _: [a.update(iscrowd=1) for a in c["annotations"] if a["image_id"] == c["images"][0]["id"]],
}
IN_PIXELS = {
    "unreadable": cut,
    "empty": lambda c, images: image_file(c, images).write_bytes(b""),
    "size": lambda c, images: c["images"][0].update(width=c["images"][0]["width"] + 1),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_stops_a_run_at_its_start(copied, detection_config, tmp_path, kind):
    entry = copied(FAULTS[kind])
    report = check(entry)
    assert found_in(report)[kind] >= 1 and report.stops
    assert not a_run_starts(detection_config, tmp_path, entry)


@pytest.mark.parametrize("kind", NOTES)
def test_what_is_worth_knowing(copied, detection_config, tmp_path, kind):
    entry = copied(NOTES[kind])
    report = check(entry)
    assert found_in(report)[kind] >= 1 and not report.stops
    assert a_run_starts(detection_config, tmp_path, entry)


@pytest.mark.parametrize("kind", IN_PIXELS)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_stops_a_run_at_an_image(copied, kind, workers):
    report = check(copied(IN_PIXELS[kind]), workers=workers)
    assert {name: n for name, n in found_in(report).items() if name != "empty_category"} == {kind: 1}
    assert report.stops == 1
    (message,) = report.messages.values()
    assert message.endswith(("annotations.", "say 97×96"))


def test_a_size_before_the_exif_orientation_is_applied(copied):
    report = check(copied(turn))
    assert found_in(report)["turned"] == found_in(report)["size"] == 1
    (message,) = report.messages.values()
    assert "has 64×96 pixels, after turning it by its EXIF orientation, but its annotations say 96×64" in message


def test_faults_are_found_together_and_the_first_are_named(copied):
    def change(content, images):
        for number, annotation in enumerate(content["annotations"][:6]):
            annotation["bbox"] = [500 + number, 500, 10, 10]
        cut(content, images)
        repeat(content["categories"])

    report = check(copied(change))
    counts = found_in(report)
    assert (counts["box_outside"], counts["unreadable"], counts["category_id_twice"]) == (6, 1, 1)
    text = outcome([report]).text
    assert "        6  boxes outside their image\n" in text and "[500, 500, 10, 10]" in text
    assert "[502, 500, 10, 10]" in text and "[503, 500, 10, 10]" not in text and "and 3 more" in text
    everything = outcome([report]).found["data_sets"][0]
    assert len(everything["findings"]["box_outside"]) == 6 and everything["would_stop_a_run"] == 8


def test_masks_in_rle_fit_their_boxes_or_not(copied):
    assert "misfit" not in found_in(check(copied(lambda c, _: rle(c, bbox=[0, 0, 50, 40]))))
    report = check(copied(lambda c, _: rle(c, bbox=[0, 0, 50, 60]), name="b"))
    assert found_in(report)["misfit"] == 1
    assert "from (0, 0, 50, 40) in a box from (0, 0, 50, 60)" in outcome([report]).text


def test_the_same_image_under_two_names(copied):
    def change(content, images):
        shutil.copy(image_file(content, images), images / "copy.png")
        repeat(content["images"], id=777, file_name="copy.png")

    report = check(copied(change))
    assert [len(group) for group in report.duplicates()] == [2]
    assert "= copy.png" in outcome([report]).text.replace("copy.png = ", "= copy.png ")


def test_classes_and_sizes_are_counted(copied):
    report = check(copied())
    content = json.loads(Path(report.entry).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = Counter(names[a["category_id"]] for a in content["annotations"])
    images = Counter(names[c] for c, _ in {(a["category_id"], a["image_id"]) for a in content["annotations"]})
    found = report.as_dict()
    assert {name: (n, m) for name, n, m in found["classes"]} == {n: (objects[n], images[n]) for n in names.values()}
    sizes = [(a["bbox"][2] * a["bbox"][3]) ** 0.5 for a in content["annotations"]]
    quantiles = found["quantiles"]["box size (root of the area), pixels"]
    assert quantiles["least"] == pytest.approx(min(sizes)) and quantiles["most"] == pytest.approx(max(sizes))
    an_image = Counter(a["image_id"] for a in content["annotations"])
    assert found["quantiles"]["objects an image"]["most"] == max(an_image.values())
    assert all(f"{name} {count}" in outcome([report]).text for name, count in objects.items())


def swap_names(content, _):
    one, two = content["categories"][:2]
    one["name"], two["name"] = two["name"], one["name"]


def rename(content, _):
    content["categories"][0]["name"] = "unicorn"


def renumber(content, _):
    for item, key in [(c, "id") for c in content["categories"]] + [(a, "category_id") for a in content["annotations"]]:
        item[key] += 100


@pytest.mark.parametrize(
    ("change", "stops", "words"),
    [
        (lambda content, _: None, False, "the same 8 in both, under the same ids"),
        (renumber, False, "under other ids. Training numbers them from 0"),
        (swap_names, True, "the same names in another order: class 0 is"),
        (rename, True, "unicorn only in"),
    ],
)
def test_classes_of_two_data_sets(copied, detection_config, tmp_path, change, stops, words):
    """They agree if a run accepts one for training and the other for tests."""
    entries = [copied(), copied(change, name="b")]
    found = outcome([check(entry) for entry in entries])
    assert words in found.text and found.stops == stops
    keys = ("DATASETS.TRAIN", entries[0], "DATASETS.TEST", entries[1], "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path / "out", *keys)
    if stops:
        with pytest.raises(InputError, match="different classes"):
            check_datasets(cfg, training=True)
    else:
        check_datasets(cfg, training=True)


def test_images_in_two_data_sets(copied):
    def change(content, images):
        kept = content["images"][:2]
        for image in content["images"][2:]:
            Image.effect_noise((96, 96), 50).convert("RGB").save(images / image["file_name"])
        assert len(kept) == 2

    found = outcome([check(copied()), check(copied(change, name="b"))])
    assert len(found.found["in_both"]) == 2 and len(found.found["same_file_name"]) == 6
    assert "In both: 2, such as" in found.text and "Of the same file name, whatever they hold: 6" in found.text


def test_a_registered_data_set(scenes):
    """In Detectron2's own form, with corners for boxes."""
    content = json.loads(Path(scenes).read_text())
    folder = Path(scenes).parent / "images"
    records = []
    for image in content["images"]:
        items = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in items)]
        annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes]
        name = str(folder / image["file_name"])
        records.append(
            {"file_name": name, "width": 96, "height": 96, "image_id": image["id"], "annotations": annotations}
        )
    DatasetCatalog.register("made_up_for_check", lambda: copy.deepcopy(records))
    MetadataCatalog.get("made_up_for_check").set(thing_classes=["thing"])
    try:
        report = check("made_up_for_check")
        assert not report.stops and found_in(report) == {}
        sizes = [(a["bbox"][2] * a["bbox"][3]) ** 0.5 for a in content["annotations"]]
        assert report.as_dict()["quantiles"]["box size (root of the area), pixels"]["most"] == pytest.approx(max(sizes))
        records[0]["annotations"][0]["category_id"] = 1
        assert found_in(check("made_up_for_check")) == {"class_number": 1}
    finally:
        DatasetCatalog.remove("made_up_for_check")
        MetadataCatalog.remove("made_up_for_check")


def test_a_panoptic_data_set(panoptic):
    """Stuff alone is no reason to miss objects; without its labels, a data set does not open."""
    assert not check(panoptic).stops
    assert not check("tiny_stuffonly").stops
    next(Path(MetadataCatalog.get(panoptic).sem_seg_root).iterdir()).unlink()
    with pytest.raises(InputError, match="tiny_separated"):
        check(panoptic)


def test_limit(copied):
    report = check(copied(), limit=2)
    assert report.checked.tolist() == [0, 3] and "2 of them were looked at" in outcome([report]).text
    with pytest.raises(InputError, match="limit is 0"):
        check(copied(name="b"), limit=0)


@pytest.mark.parametrize("seeds", [range(250), pytest.param(range(250, 5000), marks=pytest.mark.slow)])
def test_damage_stops_the_check_if_and_only_if_it_stops_a_run(clean, detection_config, tmp_path, seeds):  # noqa: F811
    outcomes, differences = Counter(), []
    for seed in seeds:
        rng, content = random.Random(seed), copy.deepcopy(clean)
        for _ in range(rng.choice([1, 1, 1, 2])):
            if is_whole(content):
                damage(content, rng)
        file = tmp_path / "damaged.json"
        file.write_text(json.dumps(content))
        entry = f"{file}:{COCO_MINI / 'images'}"
        starts = a_run_starts(detection_config, tmp_path, entry)
        for catalog in (DatasetCatalog, MetadataCatalog):
            if entry in catalog.list():
                catalog.remove(entry)
        try:
            found = outcome([check(entry, limit=1)])
            json.dump(found.found, io.StringIO())
            passes = not found.stops
        except InputError as error:
            passes = False
            assert "\n" not in str(error)
        outcomes[starts] += 1
        if passes != starts:
            differences.append(seed)
    assert not differences
    assert min(outcomes.values()) > len(seeds) / 10
