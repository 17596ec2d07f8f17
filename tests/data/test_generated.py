import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from resnet_backbone.data import drawing, generated
from resnet_backbone.data.decode import decode
from resnet_backbone.data.drawing import CLASS_NAMES, SHAPES, place_shape, stamp
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.generated import (
    classification_image,
    detection_image,
    write_classification,
    write_detection,
)
from resnet_backbone.data.sources import open_source

OBJECTS = (1, 6)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Drawing


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_stamps_equal_pillows_polygons(name):
    """Coverage against Pillow's polygons, drawn eight times as large; also where the image cuts them off."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        outline = place_shape(name, tuple(rng.uniform(0, 60, 2)), rng.uniform(6, 25), rng)
        place = stamp(outline, 60, 70)
        got = np.zeros((60, 70), np.uint8)
        place.window(got)[:] = place.coverage
        large = Image.new("L", (70 * 8, 60 * 8))
        for contour, value in zip(outline.contours, (255, 0)):
            ImageDraw.Draw(large).polygon([tuple(corner) for corner in contour * 8 + 3.5], fill=value)
        expected = np.asarray(large.resize((70, 60), Image.Resampling.BOX)).astype(float)
        assert np.abs(got - expected).mean() < 2.5  # of 255; both widen an edge by a part of a pixel
        assert got.sum() < 1.09 * expected.sum() and expected.sum() < 1.02 * got.sum()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_areas(name):
    """An outline's area is that of its pixels, rotated and stretched as it may be."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        outline = place_shape(name, (100.0, 100.0), 60.0, rng)
        assert abs((stamp(outline, 200, 200).coverage > 127).sum() / outline.area - 1) < 0.05


def test_what_lies_outside_has_no_stamp():
    rng = np.random.default_rng(0)
    assert stamp(place_shape("disc", (-50.0, 10.0), 10, rng), 40, 40) is None


def test_textures():
    for seed in range(50):
        pattern = drawing.texture(7, 31, np.random.default_rng(seed))
        assert pattern.shape == (7, 31) and pattern.dtype == np.float32
        assert pattern.min() >= 0 and pattern.max() <= 1


# What the images show


def test_an_image_depends_on_seed_and_index_alone():
    first, label = classification_image(3, 17, 72)
    assert first.shape == (72, 72, 3) and first.dtype == np.uint8 and label == 17 % 8
    assert (classification_image(3, 17, 72)[0] == first).all()
    assert (classification_image(4, 17, 72)[0] != first).any() and (classification_image(3, 25, 72)[0] != first).any()
    scene, found, _ = detection_image(3, 17, 160, OBJECTS)
    assert (detection_image(3, 17, 160, OBJECTS)[0] == scene).all() and detection_image(3, 17, 160, OBJECTS)[1] == found


@pytest.fixture(scope="module")
def pictures():
    images, labels = zip(*(classification_image(5, index, 72) for index in range(1200)), strict=True)
    return np.array(images), np.array(labels)


def color_histograms(images: np.ndarray) -> np.ndarray:
    cells = (images // 64).astype(int) @ [16, 4, 1]
    return np.stack([np.bincount(image.ravel(), minlength=64) for image in cells]) / cells[0].size


def edge_symmetry(images: np.ndarray) -> np.ndarray:
    """Fourier magnitudes of the histogram of edge orientations: a shape's symmetry, whatever its rotation."""
    features = []
    for image in images:
        smooth = cv2.GaussianBlur(image, (0, 0), 1.5).astype(np.float32)
        across, down = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
        strongest = (across**2 + down**2).argmax(2)[:, :, None]
        across, down = (np.take_along_axis(part, strongest, 2) for part in (across, down))
        weights = np.hypot(across, down)
        histogram = np.histogram(np.arctan2(down, across) % np.pi, 36, (0, np.pi), weights=weights)[0]
        features.append(np.abs(np.fft.rfft(histogram / histogram.sum()))[1:13])
    return np.array(features)


def logistic_accuracy(features: np.ndarray, labels: np.ndarray, train: int = 800) -> float:
    """Accuracy of a logistic regression on the images after the first `train`."""
    features = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-6)
    inputs, targets = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    weight = torch.zeros(inputs.shape[1], 8, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs[:train] @ weight, targets[:train])
        loss = loss + 1e-2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((inputs @ weight).argmax(1) == targets)[train:].float().mean().item()


def test_colors_do_not_tell_the_classes_apart(pictures):
    """Chance is 12.5%, with a standard error of 1.7 points on 400 images."""
    images, labels = pictures
    assert logistic_accuracy(color_histograms(images), labels) < 0.18


def test_edges_tell_the_classes_apart(pictures):
    images, labels = pictures
    assert logistic_accuracy(edge_symmetry(images), labels) > 0.2


def test_boxes_and_areas_are_those_of_the_visible_pixels():
    for index in range(30):
        _, found, owner = detection_image(0, index, 160, OBJECTS)
        assert len(found) == owner.max() + 1
        for number, item in enumerate(found):
            mask = coco_mask.encode(np.asfortranarray(owner == number).astype(np.uint8))
            assert item["bbox"] == coco_mask.toBbox(mask).tolist() and item["area"] == coco_mask.area(mask)


def test_owners_are_what_is_drawn_and_enough_of_each_is_visible(monkeypatch):
    """Objects painted in flat colors on nothing: the image itself is then the map of objects."""
    whole = []

    def paint_number(image, place, rng, *, vivid):
        whole.append((place.coverage > 127).sum())
        place.window(image)[place.coverage > 127] = len(whole)

    monkeypatch.setattr(generated, "paint", paint_number)
    monkeypatch.setattr(generated, "background", lambda height, width, rng: np.zeros((height, width, 3), np.uint8))
    monkeypatch.setattr(generated, "add_noise", lambda image, rng: image)
    hidden = 0
    for index in range(60):
        whole.clear()
        image, found, owner = detection_image(1, index, 160, (3, 8))
        assert (image[:, :, 0].astype(int) - 1 == owner).all()
        shares = np.array([item["area"] for item in found]) / whole
        assert shares.min() >= 1 / 3 - 0.02  # of the area, of which the pixels are a rounding
        hidden += (shares < 0.9).sum()
    assert hidden > 20  # objects do hide each other


def test_sizes_are_varied():
    found = [item for index in range(100) for item in detection_image(0, index, 160, OBJECTS)[1]]
    areas = np.array([item["area"] for item in found])
    assert 0.25 < (areas < 32**2).mean() < 0.75 and areas.max() < 96**2
    assert areas.max() > 10 * areas.min()
    assert set(np.bincount([item["category_id"] for item in found], minlength=9)[1:] > 0) == {True}


# What is written


def test_classification_set(tmp_path):
    pattern = write_classification(tmp_path / "set", images=26, image_size=48, seed=9, shards=3)
    assert sorted(os.listdir(tmp_path)) == ["set"]
    assert pattern == f"{tmp_path}/set/train-{{000000..000002}}.tar"
    source = open_source(pattern)
    assert len(source) == 26 and source.class_names == CLASS_NAMES == list(SHAPES) and len(CLASS_NAMES) == 8
    assert source.labels.tolist() == [index % 8 for index in range(26)]
    for index in (0, 13, 25):
        pixels = decode(source.read(index), what="").astype(int)
        assert np.abs(pixels - classification_image(9, index, 48)[0]).mean() < 12  # JPEG's loss, noise included


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in "ab":
        write_classification(tmp_path / name, images=8, image_size=40, seed=1, shards=2)
        write_detection(tmp_path / f"detection {name}", images=3, image_size=80, seed=1)
        time.sleep(1.1 if name == "a" else 0)  # whole seconds are what a tar archive stores
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "detection a") == files(tmp_path / "detection b")
    # More images leave the first ones as they are.
    more = open_source(write_classification(tmp_path / "more", images=30, image_size=40, seed=1))
    some = open_source(tmp_path / "a" / "train-{000000..000001}.tar")
    assert [more.read(index) for index in range(8)] == [some.read(index) for index in range(8)]


def test_detection_set_is_valid_coco(tmp_path, capsys):
    path = write_detection(tmp_path / "set", images=12, image_size=120, seed=4, objects=(2, 5))
    coco = COCO(path)
    assert "seed 4" in coco.dataset["info"]["description"]
    assert [(item["id"], item["name"]) for item in coco.dataset["categories"]] == list(enumerate(CLASS_NAMES, 1))
    assert len(coco.imgs) == 12 == len(os.listdir(path.parent / "images"))
    annotations = coco.dataset["annotations"]
    assert len({item["id"] for item in annotations}) == len(annotations) and min(item["id"] for item in annotations) > 0
    for image in coco.dataset["images"]:
        pixels = np.asarray(Image.open(path.parent / "images" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (120, 120, 3)
        assert 1 <= len(coco.getAnnIds(image["id"])) <= 5
    for item in annotations:
        x, y, width, height = item["bbox"]
        assert min(x, y) >= 0 and x + width <= 120 and y + height <= 120 and width > 0 and height > 0
        assert 0 < item["area"] <= width * height and item["iscrowd"] == 0 and 1 <= item["category_id"] <= 8


def test_a_finished_set_is_kept_and_another_is_not_overwritten(tmp_path):
    write_classification(tmp_path / "set", images=8, image_size=40, seed=1)
    before = files(tmp_path / "set")
    stamp_before = os.stat(tmp_path / "set" / "train-000000.tar").st_mtime_ns
    write_classification(tmp_path / "set", images=8, image_size=40, seed=1)
    assert os.stat(tmp_path / "set" / "train-000000.tar").st_mtime_ns == stamp_before
    with pytest.raises(DatasetError, match="generated with images 8, seed 1, not images 9, seed 2; name another"):
        write_classification(tmp_path / "set", images=9, image_size=40, seed=2)
    with pytest.raises(DatasetError, match="name another folder or remove this one"):
        write_detection(tmp_path / "set", images=8, seed=1)
    assert files(tmp_path / "set") == before

    (tmp_path / "mine").mkdir()
    write_detection(tmp_path / "mine", images=1, image_size=60, seed=0)  # an empty folder is filled
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"dear")
    with pytest.raises(DatasetError, match="holds something other than generated data"):
        write_detection(tmp_path / "photos", images=1, seed=0)
    with pytest.raises(DatasetError, match=r"a\.jpg is a file"):
        write_detection(tmp_path / "photos" / "a.jpg", images=1, seed=0)
    assert files(tmp_path / "photos") == {"a.jpg": b"dear"}


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    def fail(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generated, "_jpeg", fail)
    with pytest.raises(OSError, match="No space left"):
        write_classification(tmp_path / "set", images=8, seed=1)
    assert os.listdir(tmp_path) == []


def test_a_killed_generation_leaves_no_half_written_set(tmp_path):
    code = (
        "from resnet_backbone.data.generated import write_classification\n"
        f"write_classification({str(tmp_path / 'set')!r}, images=10**6, seed=0)"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".set.*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert any(tmp_path.glob(".set.*/*.tar")) and not (tmp_path / "set").exists()
    write_classification(tmp_path / "set", images=8, image_size=40, seed=0)
    assert json.loads((tmp_path / "set" / "parameters.json").read_text())["images"] == 8


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="4 images cannot fill 5 shards"):
        write_classification(tmp_path / "x", images=4, seed=0, shards=5)
    with pytest.raises(ValueError, match=r"number of objects is \(0, 3\)"):
        write_detection(tmp_path / "x", images=4, seed=0, objects=(0, 3))


def test_its_processes_end_where_signals_do_nothing(tmp_path):
    """As in a program that handles SIGTERM, whose children inherit that."""
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        for number in range(3):
            write_classification(tmp_path / str(number), images=200, image_size=16, seed=1)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert not multiprocessing.active_children()
