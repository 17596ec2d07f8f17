"""Pictures of training images, against the batches that the training task gets."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from resnet_backbone import detection
from resnet_backbone.detection.data.pictures import CAPTION, GAP, LARGEST, NARROWEST, mosaic, write_pictures
from resnet_backbone.detection.drawing import draw
from resnet_backbone.detection.task import Detection
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError

SMALL_CROPS = ("INPUT.CROP.ENABLED", True, "MODEL.MASK_ON", True, "SOLVER.IMS_PER_BATCH", 3)
# The whole detector is narrow, since the task builds it to get at its batches.
NARROW = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", 0.125)
UNTRAINED = ("DATASETS.TEST", (), "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", True)


@pytest.fixture(scope="module")
def masked(scenes, tmp_path_factory) -> str:
    """The scenes with a diamond in each box for its mask."""
    content = json.loads(Path(scenes).read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]]
    file = tmp_path_factory.mktemp("masked") / "masked.json"
    file.write_text(json.dumps(content))
    return f"{file}:{Path(scenes).parent / 'images'}"


@pytest.fixture
def make_cfg(detection_config, masked, tmp_path):
    keys = (*NARROW, *SMALL_CROPS, "DATASETS.TRAIN", masked)
    return lambda *more: detection_config("faster_rcnn_R50.yaml", tmp_path / "run", *keys, *more)


def expected(record: dict, names: list[str], channels: str) -> np.ndarray:
    image = record["image"].numpy().transpose(1, 2, 0)
    return draw(np.ascontiguousarray(image if channels == "RGB" else image[..., ::-1]), record["instances"], names)


def cells(path: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    """The parts of a mosaic where images of these shapes are."""
    pixels = np.array(Image.open(path))
    width, height = max(NARROWEST, *(i.shape[1] for i in images)), max(i.shape[0] for i in images)
    found = []
    for number, image in enumerate(images):
        x, y = GAP + number % 4 * (width + GAP), GAP + number // 4 * (height + CAPTION + GAP)
        found.append(pixels[y : y + image.shape[0], x : x + image.shape[1]])
    return found


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_the_batches_of_the_run(make_cfg, scenes, tmp_path, channels, workers):
    cfg = make_cfg("INPUT.FORMAT", channels, "DATALOADER.NUM_WORKERS", workers)
    said = write_pictures(cfg, tmp_path / "pictures", iteration=5, images=7)
    assert not (tmp_path / "run").exists()
    (path,) = (tmp_path / "pictures").iterdir()
    assert said == f"wrote {path}: 7 images of iterations 5 to 7, seed 4"

    task = Detection(make_cfg(*UNTRAINED, "INPUT.FORMAT", channels))
    task.check(eval_only=False)
    task.build(None, eval_only=False)
    records = list(itertools.islice(itertools.chain.from_iterable(task.batches(5)), 7))
    names = [category["name"] for category in json.loads(Path(scenes).read_text())["categories"]]
    wanted = [expected(record, names, channels) for record in records]
    for found, image in zip(cells(path, wanted), wanted, strict=True):
        assert np.array_equal(found, image)
    # The annotations are on them, and other iterations have other images.
    assert any((image != plain["image"].numpy().transpose(1, 2, 0)).any() for image, plain in zip(wanted, records))
    write_pictures(cfg, tmp_path / "other", iteration=6, images=7)
    assert (tmp_path / "other" / "iteration_6_001.png").read_bytes() != path.read_bytes()


def test_a_picture_in_bgr_and_rgb_is_the_same(make_cfg, tmp_path):
    for channels in ("BGR", "RGB"):
        write_pictures(make_cfg("INPUT.FORMAT", channels), tmp_path / channels, images=2)
    one, other = (Image.open(tmp_path / channels / "iteration_0_001.png") for channels in ("BGR", "RGB"))
    assert np.array_equal(np.array(one), np.array(other))


def test_mosaics_of_sixteen(make_cfg, tmp_path):
    said = write_pictures(make_cfg(), tmp_path / "a", images=33)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"iteration_0_00{n}.png" for n in (1, 2, 3)]
    assert "iteration_0_001.png to iteration_0_003.png: 33 images of iterations 0 to 10" in said


def test_images_are_scaled_down_but_not_up():
    wide = np.zeros((400, 2 * LARGEST, 3), np.uint8)  # becomes 200 high
    small = np.full((30, 20, 3), 255, np.uint8)
    found = mosaic([("wide", wide), ("small", small)])
    assert found.shape == (200 + CAPTION + 2 * GAP, 2 * LARGEST + 3 * GAP, 3)
    assert found.shape[1] == 2 * LARGEST + 3 * GAP and not found[GAP : GAP + 200, GAP : GAP + LARGEST].any()
    left = 2 * GAP + LARGEST
    assert (found[GAP : GAP + 30, left : left + 20] == 255).all()
    assert (found[GAP : GAP + 30, left + 20 : left + LARGEST] == 128).all()


def test_a_long_caption_stays_in_its_cell():
    image = np.zeros((20, 20, 3), np.uint8)
    found = mosaic([("m" * 300, image), ("", image)])
    assert (found[:, GAP + NARROWEST : 2 * GAP + NARROWEST] == 128).all()


def test_a_drawn_seed_is_said(make_cfg, tmp_path):
    said = write_pictures(make_cfg("SEED", -1), tmp_path / "a", images=1)
    assert "SEED is -1, so a seed was drawn, " in said and "OUTPUT_DIR/config.yaml" in said


def test_the_seed_of_a_finished_run_is_in_its_configuration(make_cfg, tmp_path):
    """A run with a drawn seed, and the pictures that its config.yaml gives."""
    from resnet_backbone.engine.config import load_config

    detection.run(make_cfg(*UNTRAINED, "SEED", -1, "SOLVER.MAX_ITER", 0))
    cfg = load_config(detection.get_config(), tmp_path / "run" / "config.yaml")
    assert cfg.SEED >= 0
    assert write_pictures(cfg, tmp_path / "a", images=1).endswith(f"seed {cfg.SEED}")


def test_weights_say_how_images_are_fed(make_cfg, classifier, tmp_path):
    """Their metadata's channel order becomes the detector's, so the colors are true without a key."""
    weights = classifier("resnet18", "INPUT.FORMAT", "BGR")
    keys = ("MODEL.WEIGHTS", weights)
    write_pictures(make_cfg(*keys), tmp_path / "a", images=2)
    write_pictures(make_cfg("INPUT.FORMAT", "RGB"), tmp_path / "b", images=2)
    name = "iteration_0_001.png"
    assert np.array_equal(*(np.array(Image.open(tmp_path / folder / name)) for folder in "ab"))
    with pytest.raises(ConfigError, match=r"INPUT\.FORMAT is RGB .* were trained with BGR"):
        write_pictures(make_cfg(*keys, "INPUT.FORMAT", "RGB"), tmp_path / "c", images=2)


def test_a_folder_is_converted_elsewhere(make_cfg, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "yolo" / part).mkdir(parents=True)
    Image.new("RGB", (64, 48), (200, 0, 0)).save(tmp_path / "yolo" / "images" / "x.png")
    (tmp_path / "yolo" / "labels" / "x.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "yolo" / "classes.txt").write_text("block\n")
    keys = ("DATASETS.TRAIN", tmp_path / "yolo", "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.MASK_ON", False)
    write_pictures(make_cfg(*keys), tmp_path / "a", images=1)
    assert not (tmp_path / "run").exists()


def test_semantic_labels_are_drawn(make_cfg, panoptic, tmp_path, detection_config):
    keys = ("DATASETS.TRAIN", "tiny_stuffonly", "DATASETS.TEST", (), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
    keys += ("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.FORMAT", "RGB")
    cfg = detection_config("Misc/semantic_R_50_FPN_1x.yaml", tmp_path / "run", *keys)
    write_pictures(cfg, tmp_path / "a", images=1)
    pixels = np.array(Image.open(tmp_path / "a" / "iteration_0_001.png"))
    bare = Instances((64, 80), gt_boxes=Boxes(torch.zeros(0, 4)))
    originals = [draw(np.array(Image.open(tmp_path / "images" / f"{n}.jpg")), bare, []) for n in (1, 2, 3)]
    different = [(pixels[GAP : GAP + 64, GAP : GAP + 80] != image).any(axis=2).mean() for image in originals]
    assert min(different) > 0.9  # each pixel is colored by its class


@pytest.mark.parametrize(
    ("keys", "named", "words"),
    [
        ((), {"iteration": -1}, "--iteration is -1"),
        ((), {"images": 0}, "--images 0"),
        (("DATASETS.TRAIN", ()), {}, "DATASETS.TRAIN is empty"),
        (("DATASETS.TRAIN", "no/such.json"), {}, "no COCO file"),
        (("DATALOADER.NUM_WORKERS", -1), {}, "DATALOADER.NUM_WORKERS"),
        (("INPUT.FORMAT", "L"), {}, "INPUT.FORMAT is L"),
        (("INPUT.MIN_SIZE_TRAIN", (200,)), {}, "INPUT.MAX_SIZE_TRAIN"),
        (("MODEL.WEIGHTS", "no/such.pth"), {}, "no/such.pth"),
    ],
)
def test_what_cannot_be_drawn(make_cfg, tmp_path, keys, named, words):
    with pytest.raises(InputError) as error:
        write_pictures(make_cfg(*keys), tmp_path / "a", **named)
    assert words in str(error.value) and "\n" not in str(error.value)
