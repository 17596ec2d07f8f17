"""Folders in PASCAL VOC's and YOLO's layout."""

import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from resnet_backbone.detection.data import datasets, folders
from resnet_backbone.detection.data.annotated import image_size
from resnet_backbone.engine.config import ConfigError

ROTATED = 6  # EXIF orientation of a photograph taken upright


def save_image(path: Path, width: int, height: int, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


def voc_object(name: str, box: tuple[int, int, int, int], difficult: int | None = 0) -> str:
    corners = "\n".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    # A part of a person has a name and a box of its own, as in VOC's layout data.
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object>\n<name>{name}</name>\n{flag}{part}\n<bndbox>\n{corners}\n</bndbox>\n</object>"


@pytest.fixture
def make_voc(tmp_path):
    """The function `(stem=[objects], …, folder=…)` that adds images of 60×40 pixels to a folder, and returns it."""

    def make(folder="VOC", size="<size><width>60</width><height>40</height></size>", **images: list[str]) -> Path:
        root = tmp_path / folder
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "Annotations").mkdir(exist_ok=True)
        for stem, objects in images.items():
            save_image(root / "JPEGImages" / f"{stem}.jpg", 60, 40)
            text = "\n".join(("<annotation>", size, *objects, "</annotation>"))
            (root / "Annotations" / f"{stem}.xml").write_text(text)
        return root

    return make


@pytest.fixture
def make_yolo(tmp_path):
    """The function `(split, image={labels}, …)` that adds images of 50×100 pixels to a YOLO folder, and returns it."""

    def make(split="train", names="names: [cat, dog]\n", layout="images/{}", **images: str | None) -> Path:
        root = tmp_path / "yolo"
        for stem, labels in images.items():
            place = root / layout.format(split)
            save_image(place / f"{stem}.png", 50, 100)
            text = Path(str(place).replace("images", "labels")) / f"{stem}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            if labels is not None:
                text.write_text(labels)
        if names:
            (root / "data.yaml").write_text(names)
        return root

    return make


@pytest.fixture
def opened(tmp_path):
    """The function `(entry)` that registers an entry with a folder for its conversion, and gives its records."""

    def open_entry(entry) -> list[dict]:
        datasets.register(str(entry), tmp_path / "out")
        return DatasetCatalog.get(str(entry))

    return open_entry


def boxes_of(record) -> list[list[float]]:
    return [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]]


def test_voc_is_what_detectron2_reads(make_voc, opened):
    root = make_voc(
        b=[voc_object("cat", (1, 1, 60, 40)), voc_object("person", (11, 12, 30, 31))],
        a=[voc_object("dog", (5, 6, 5, 6))],
        c=[voc_object("tvmonitor", (2, 3, 20, 30), difficult=None)],
    )
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("b\na\n")
    theirs = load_voc_instances(str(root), "trainval", CLASS_NAMES)
    ours = opened(f"{root}:trainval")
    assert len(ours) == len(theirs) == 2
    for mine, reference in zip(ours, theirs):
        assert [mine[k] for k in ("file_name", "width", "height")] == [
            reference[k] for k in ("file_name", "width", "height")
        ]
        assert boxes_of(mine) == [a["bbox"] for a in reference["annotations"]]
        assert [a["category_id"] for a in mine["annotations"]] == [a["category_id"] for a in reference["annotations"]]
    assert boxes_of(ours[0])[0] == [0, 0, 60, 40]  # 1-based and inclusive: the whole image
    assert MetadataCatalog.get(f"{root}:trainval").thing_classes == list(CLASS_NAMES)
    assert [Path(r["file_name"]).stem for r in opened(root)] == ["a", "b", "c"]


def test_difficult_objects_are_neither_trained_on_nor_missed(make_voc, opened, detection_config, tmp_path):
    root = make_voc(a=[voc_object("cat", (1, 1, 20, 20)), voc_object("cat", (31, 1, 60, 30), difficult=1)])
    record = opened(root)[0]
    assert [a["iscrowd"] for a in record["annotations"]] == [0, 1]
    mapper = DatasetMapper(detection_config("faster_rcnn_R50.yaml", tmp_path), is_train=True)
    assert len(mapper(record)["instances"]) == 1

    # Found or not, the difficult one does not change the AP of the other.
    truth = COCO(MetadataCatalog.get(str(root)).json_file)
    easy = {"image_id": 1, "category_id": CLASS_NAMES.index("cat") + 1, "bbox": [0, 0, 20, 20], "score": 0.5}
    for found in ([easy], [{**easy, "bbox": [30, 0, 30, 30], "score": 0.9}, easy]):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("listed", "names", "expected"),
    [
        (None, ["person", "cat"], list(CLASS_NAMES)),
        (None, ["zebra", "cat", "Ant"], ["Ant", "cat", "zebra"]),
        ("zebra\n\ncat\nunused\n", ["cat", "zebra"], ["zebra", "cat", "unused"]),
    ],
)
def test_the_order_of_vocs_classes(make_voc, opened, listed, names, expected):
    root = make_voc(**{f"i{n}": [voc_object(name, (1, 1, 9, 9))] for n, name in enumerate(names)})
    if listed:
        (root / "classes.txt").write_text(listed)
    for split in ("train", "val"):  # the second lacks all classes but the first's
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("i0\n")
    for entry in (str(root), f"{root}:train", f"{root}:val"):
        records = opened(entry)
        found = MetadataCatalog.get(entry).thing_classes
        assert found == expected
        assert [found[r["annotations"][0]["category_id"]] for r in records] == names[: len(records)]


def test_yolo_boxes_are_torchvisions_conversion(make_yolo, opened):
    rows = [(1, 0.5, 0.25, 0.2, 0.1), (0, 0.9, 0.9, 0.2, 0.2)]
    root = make_yolo(a="\n".join(" ".join(map(str, row)) for row in rows), empty="", none=None)
    root = make_yolo("val", b="0 .5 .5 1 1\n")
    for entry in (f"{root}:train", str(root)):
        records = {Path(r["file_name"]).stem: r for r in opened(entry)}
        assert set(records) == ({"a", "empty", "none"} if ":" in entry else {"a", "empty", "none", "b"})
        assert (records["a"]["width"], records["a"]["height"]) == (50, 100)
        expected = box_convert(torch.tensor(rows)[:, 1:] * torch.tensor([50, 100, 50, 100]), "cxcywh", "xyxy")
        np.testing.assert_allclose(boxes_of(records["a"]), expected, atol=1e-5)
        assert [a["category_id"] for a in records["a"]["annotations"]] == [1, 0]
        assert records["empty"]["annotations"] == records["none"]["annotations"] == []
        assert all(Path(r["file_name"]).is_file() for r in records.values())
        assert MetadataCatalog.get(entry).thing_classes == ["cat", "dog"]


def test_yolo_outlines_become_masks(make_yolo, opened):
    root = make_yolo(a="1 0.2 0.1 0.6 0.1 0.6 0.5 0.2 0.5\n")
    annotation = opened(f"{root}:train")[0]["annotations"][0]
    assert annotation["segmentation"] == [pytest.approx([10, 10, 30, 10, 30, 50, 10, 50])]
    assert annotation["bbox"] == pytest.approx([10, 10, 20, 40])
    truth = COCO(MetadataCatalog.get(f"{root}:train").json_file)
    assert truth.annToMask(truth.anns[1]).sum() == truth.anns[1]["area"] == 800


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data.yaml": "nc: 2\nnames: {1: dog, 0: cat}\n", "classes.txt": "a\nb\n"}, ["cat", "dog"]),
        ({"data.yaml": "train: images/train\n", "classes.txt": "cat\ndog\n"}, ["cat", "dog"]),
        ({"labels/classes.txt": "cat\r\ndog\r\n"}, ["cat", "dog"]),
    ],
)
def test_where_yolos_class_names_come_from(make_yolo, opened, files, expected):
    root = make_yolo(names="", a="1 .5 .5 .5 .5\n")
    for name, text in files.items():
        (root / name).write_text(text)
    opened(f"{root}:train")
    assert MetadataCatalog.get(f"{root}:train").thing_classes == expected


def test_files_of_one_stem_share_their_labels(make_yolo, opened):
    root = make_yolo(a="0 .5 .5 .5 .5\n")
    images = root / "images" / "train"
    Image.open(images / "a.png").save(images / "a.bmp")
    assert [len(record["annotations"]) for record in opened(f"{root}:train")] == [1, 1]


def test_splits_of_similar_names_stay_apart(make_yolo, tmp_path):
    root = make_yolo("b/c", b="0 .5 .5 .5 .5\n")
    make_yolo("b_c", a="0 .5 .5 .5 .5\n", b=None)
    files = [folders.convert(root, split, tmp_path)[0] for split in ("b/c", "b_c")]
    assert [len(json.loads(file.read_bytes())["images"]) for file in files] == [1, 2]


def test_labels_without_an_image_are_said(make_yolo, opened, caplog):
    root = make_yolo(a="0 .5 .5 .5 .5\n", b="0 .5 .5 .5 .5\n")
    (root / "images" / "train" / "b.png").rename(root / "images" / "train" / "B.png")
    assert [len(record["annotations"]) for record in opened(f"{root}:train")] == [0, 1]
    assert "1 label files in" in caplog.text and "have no image: b.txt" in caplog.text


def test_a_link_to_nowhere_is_named(make_yolo, opened):
    root = make_yolo(a="0 .5 .5 .5 .5\n")
    (root / "images" / "train" / "b.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ConfigError, match=r"b\.jpg cannot be read"):
        opened(f"{root}:train")


def test_yolos_other_layout(make_yolo, opened):
    make_yolo("valid", layout="{}/images", v="0 .5 .5 .5 .5\n")
    root = make_yolo("train", layout="{}/images", a="0 .5 .5 .5 .5\n", b=None)
    assert [len(opened(f"{root}:{split}")) for split in ("train", "valid")] == [2, 1]
    with pytest.raises(ConfigError, match=rf"Name one: {root}:train\."):
        opened(root)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [None, 3, *range(5, 9)])
def test_image_sizes_are_those_that_detectron2_reads(tmp_path, suffix, orientation):
    save_image(tmp_path / f"a.{suffix}", 30, 20, orientation)
    height, width = read_image(str(tmp_path / f"a.{suffix}"), "RGB").shape[:2]
    assert image_size(tmp_path / f"a.{suffix}") == (width, height)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_image_sizes_come_from_the_header(tmp_path, suffix, monkeypatch):
    save_image(tmp_path / f"a.{suffix}", 30, 20)

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert image_size(tmp_path / f"a.{suffix}") == (30, 20)


def test_a_turned_photograph_in_yolo(make_yolo, opened, detection_config, tmp_path):
    """Labels are fractions of the image as it is seen, and Detectron2 accepts its size."""
    root = make_yolo(a="0 .5 .5 1 1\n")
    (root / "images" / "train" / "a.png").unlink()
    save_image(root / "images" / "train" / "a.jpg", 100, 50, ROTATED)
    record = opened(f"{root}:train")[0]
    assert (record["width"], record["height"], boxes_of(record)) == (50, 100, [[0, 0, 50, 100]])
    DatasetMapper(detection_config("faster_rcnn_R50.yaml", tmp_path), is_train=True)(record)


def test_a_voc_image_of_another_size_than_its_annotation_stops(make_voc, opened):
    root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))])
    save_image(root / "JPEGImages" / "a.jpg", 60, 40, ROTATED)
    with pytest.raises(ConfigError, match=r"a\.xml says .* 60×40 .*reads 40×60 from .*a\.jpg, .*EXIF"):
        opened(root)


def test_a_voc_annotation_without_a_size_takes_the_images(make_voc, opened):
    root = make_voc(size="<size><width>0</width><height>0</height></size>", a=[voc_object("cat", (1, 1, 9, 9))])
    make_voc(size="", b=[voc_object("cat", (1, 1, 9, 9))])
    assert [(r["width"], r["height"]) for r in opened(root)] == [(60, 40)] * 2


def test_conversion_happens_once_and_again_after_a_change(make_yolo, opened, tmp_path):
    root = make_yolo(a="0 .5 .5 .5 .5\n")
    entry = f"{root}:train"
    opened(entry)
    file = Path(MetadataCatalog.get(entry).json_file)
    assert file.parent == tmp_path / "out" / "datasets" and file.name.startswith("yolo_train-")
    before = file.stat().st_mtime_ns, file.read_bytes()
    opened(entry)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before

    make_yolo(names="names: [cat, dog, cow]\n", a="0 .5 .5 .5 .5\n2 .5 .5 .5 .5\n")
    assert len(opened(entry)[0]["annotations"]) == 2
    assert MetadataCatalog.get(entry).thing_classes == ["cat", "dog", "cow"]

    (root / "images" / "train" / "a.png").unlink()
    make_yolo(b="1 .5 .5 .5 .5\n")
    assert [Path(r["file_name"]).name for r in opened(entry)] == ["b.png"]

    file.write_text("{")  # not ours, or cut off by another tool
    assert len(opened(entry)) == 1
    assert sorted(p.suffix for p in file.parent.iterdir()) == [".json", ".lock"]


def test_folders_of_the_same_name_and_other_output_folders_stay_apart(make_voc, tmp_path):
    one = make_voc("one/VOC2007", a=[voc_object("cat", (1, 1, 9, 9))])
    other = make_voc("other/VOC2007", b=[voc_object("dog", (1, 1, 9, 9))])
    files = set()
    for root in (one, other):
        for out in ("x", "y"):
            datasets.register(str(root), tmp_path / out)
            files.add(MetadataCatalog.get(str(root)).json_file)
            assert str(tmp_path / out) in MetadataCatalog.get(str(root)).json_file
    assert len(files) == 4


def _register(entry, out, barrier, queue):
    barrier.wait()
    datasets.register(entry, out)
    queue.put(len(DatasetCatalog.get(entry)))


def test_processes_that_convert_at_the_same_time(make_voc, tmp_path):
    root = make_voc(**{f"i{n:03d}": [voc_object("cat", (1, 1, 9, 9))] * 20 for n in range(60)})
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_register, args=(str(root), tmp_path / "out", barrier, queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [60] * 4
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "out" / "datasets").glob("*.json"))) == 1


def _voc(change):
    def damage(make_voc, make_yolo):
        root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))])
        change(root)
        return root

    return damage


def _edit(name, old, new):
    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


def _yolo(labels="0 .5 .5 .5 .5\n", names="names: [cat, dog]\n", split=":train"):
    return lambda make_voc, make_yolo: f"{make_yolo(names=names, a=labels)}{split}"


XML = "Annotations/a.xml"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_voc(_edit(XML, "</object>", "</objct>")), ("a.xml, line 12", "not XML", "mismatched tag")),
        (_voc(_edit(XML, "</annotation>", "")), ("a.xml, line 1", "not XML")),
        (_voc(lambda root: (root / XML).write_bytes(b"")), ("a.xml, line 1", "not XML")),
        (_voc(_edit(XML, "<xmin>1</xmin>\n<ymin>1</ymin>", "")), ("a.xml, line 6", "<bndbox> has no <xmin>")),
        (_voc(_edit(XML, "<xmax>9<", "<xmax>nine<")), ("a.xml, line 9", "<xmax> is 'nine'", "number")),
        (_voc(_edit(XML, "<xmax>9<", "<xmax>inf<")), ("a.xml, line 9", "<xmax> is 'inf'", "number")),
        (_voc(_edit(XML, "<xmax>9<", "<xmax>0<")), ("a.xml, line 6", "ends before it begins", "xmax 0")),
        (_voc(_edit(XML, "bndbox>", "polygon>")), ("a.xml, line 3", "no <bndbox>")),
        (_voc(_edit(XML, "<name>cat</name>", "")), ("a.xml, line 3", "<object> has no <name>")),
        (_voc(lambda root: (root / "classes.txt").write_text("dog\n")), ("a.xml, line 3", "class cat", "classes.txt")),
        (_voc(lambda root: (root / "classes.txt").write_text("dog\ncat\ndog\n")), ("classes.txt", "dog twice")),
        (_voc(lambda root: (root / "JPEGImages" / "a.jpg").write_bytes(b"x")), ("a.jpg", "cannot be read")),
        (_yolo("0 .5 .5 .5 .5\n1 .5 .5 .5\n"), ("a.txt, line 2", "3 numbers after the class", "4 (center")),
        (_yolo("0 .5 .5 .5 .5 .9\n"), ("a.txt, line 1", "5 numbers")),
        (_yolo("0 .1 .1 .2 .2 .3 .3 .4\n"), ("a.txt, line 1", "7 numbers")),
        (_yolo("\n2 .5 .5 .5 .5\n"), ("a.txt, line 2", "class is 2", "0 to 1 (cat, dog)")),
        (_yolo("0.5 .5 .5 .5 .5\n"), ("a.txt, line 1", "class is 0.5")),
        (_yolo("cat .5 .5 .5 .5\n"), ("a.txt, line 1", "'cat .5 .5 .5 .5'")),
        (_yolo("0 25 50 10 10\n"), ("a.txt, line 1", "number 25", "fractions")),
        (_yolo("0 .5 .5 nan .5\n"), ("a.txt, line 1", "number nan")),
        (_yolo("0 .5 .5 0 .5\n"), ("a.txt, line 1", "no area")),
        (_yolo(names=""), ("nothing names the classes", "data.yaml", "classes.txt")),
        (_yolo(names="names: {1: cat, 2: dog}\n"), ("data.yaml", "1, 2", "expected 0, 1, 2")),
        (_yolo(names="names: cat\n"), ("data.yaml", "'cat'", "list of class names")),
        (_yolo(names="names: [cat\n"), ("data.yaml", "not a YAML file")),
        (_yolo(names="names: []\n"), ("data.yaml", "names no class")),
        (_yolo(names="names: [cat, dog]\nkpt_shape: [17, 3]\n"), ("kpt_shape", "COCO file")),
        (_yolo(split=":vla"), ("yolo:vla", "images/vla", "splits train")),
    ],
)
def test_a_malformed_folder_stops_with_a_sentence(make_voc, make_yolo, opened, damage, words):
    entry = damage(make_voc, make_yolo)
    for _ in range(2):
        with pytest.raises(ConfigError) as error:
            opened(entry)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\n" not in str(error.value)
    assert str(entry) not in DatasetCatalog


def test_a_split_that_is_not_there(make_voc, opened):
    root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))])
    with pytest.raises(ConfigError, match="there is none in that folder"):
        opened(f"{root}:train")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"train\.txt; the nearest there is trainval"):
        opened(f"{root}:train")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a 1\nb -1\n")
    with pytest.raises(ConfigError, match=r"trainval\.txt, line 2: there is no annotation .*b\.xml"):
        opened(f"{root}:trainval")


def test_a_voc_image_that_is_not_there_is_counted(make_voc, detection_config, tmp_path):
    root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))], b=[voc_object("cat", (1, 1, 9, 9))])
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ConfigError, match=r"1 of 2 images .*b\.jpg"):
        datasets.check(detection_config("faster_rcnn_R50.yaml", tmp_path), str(root))


def test_a_voc_image_that_is_not_there_and_has_no_size_is_named(make_voc, opened):
    root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))])
    (root / "JPEGImages" / "a.jpg").unlink()
    annotation = root / "Annotations" / "a.xml"
    annotation.write_text(re.sub(r"<size>.*</size>", "", annotation.read_text(), flags=re.DOTALL))
    with pytest.raises(ConfigError, match=r"a\.jpg cannot be read \(.*No such file"):
        opened(str(root))


def test_another_folder_stops_with_a_sentence(tmp_path, opened):
    (tmp_path / "cats").mkdir()
    with pytest.raises(ConfigError, match=r"cats .*no layout .*JPEGImages and Annotations .*images and labels"):
        opened(tmp_path / "cats")
    with pytest.raises(ConfigError, match=rf"no data set {tmp_path}/dogs.*{tmp_path} exists, with cats in it"):
        opened(f"{tmp_path}/dogs")


def test_a_registered_name_wins_over_a_folder(make_voc, tmp_path, monkeypatch):
    make_voc("scenes_of_mine", a=[voc_object("cat", (1, 1, 9, 9))])
    monkeypatch.chdir(tmp_path)
    DatasetCatalog.register("scenes_of_mine", lambda: [])
    try:
        datasets.register("scenes_of_mine", tmp_path / "out")
        assert DatasetCatalog.get("scenes_of_mine") == [] and not (tmp_path / "out").exists()
    finally:
        DatasetCatalog.remove("scenes_of_mine")
        MetadataCatalog.remove("scenes_of_mine")


def test_an_output_folder_that_cannot_be_written(make_voc, tmp_path):
    root = make_voc(a=[voc_object("cat", (1, 1, 9, 9))])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be converted"):
        datasets.register(str(root), tmp_path / "file")


def test_the_written_file_is_plain_coco(make_voc, opened):
    root = make_voc(a=[voc_object("cat", (1, 1, 20, 10))])
    opened(root)
    content = json.loads(Path(MetadataCatalog.get(str(root)).json_file).read_text())
    assert content["images"] == [{"id": 1, "file_name": f"JPEGImages{os.sep}a.jpg", "width": 60, "height": 40}]
    assert content["annotations"][0] | {"category_id": 0} == {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "bbox": [0, 0, 20, 10],
        "area": 200,
        "iscrowd": 0,
    }
