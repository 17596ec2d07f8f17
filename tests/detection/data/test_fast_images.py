"""Photographs as Detectron2 reads and resizes them, by Pillow."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from PIL import Image

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.detection.data.fast_images import FastResize, FastResizeShortestEdge, Photograph, accelerated
from resnet_backbone.detection.data.mapper import Mapper

PHOTOGRAPHS = Path(__file__).parents[4] / "shared" / "data" / "coco_mini"


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colors with some noise."""
    rows, columns = np.mgrid[:height, :width] / 40
    smooth = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=2) * 100 + 128
    return (smooth + np.random.default_rng(0).normal(0, 15, smooth.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def decode(data: bytes, channels: str = "RGB", **options) -> np.ndarray | None:
    photograph = Photograph.open(data)
    return None if photograph is None else photograph.decode(channels, **options)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class TestDecoding:
    @pytest.mark.parametrize("size", [(48, 64), (37, 53), (1, 1), (8, 300)])
    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    @pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 20}, {"progressive": True}, {"optimize": True}])
    def test_gives_pillows_values(self, size, subsampling, options):
        data = jpeg(Image.fromarray(picture(*size)), subsampling=subsampling, **options)
        assert np.array_equal(decode(data), by_pillow(data))
        assert np.array_equal(decode(data, "BGR"), by_pillow(data)[:, :, ::-1])

    def test_of_gray_ones_too(self):
        data = jpeg(Image.fromarray(picture(40, 50)[:, :, 0]))
        assert np.array_equal(decode(data), by_pillow(data))

    def test_of_photographs(self):
        if not PHOTOGRAPHS.is_dir():
            pytest.skip("no photographs beside the repository (shared/data/coco_mini)")
        files = sorted((PHOTOGRAPHS / "images").iterdir())[::4]
        read = [(decode(file.read_bytes()), by_pillow(file.read_bytes())) for file in files]
        assert len(read) > 50 and all(np.array_equal(one, other) for one, other in read)

    def test_leaves_the_rest_to_pillow(self):
        image = Image.fromarray(picture(40, 50))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        turned = Image.Exif()
        turned[274] = 6
        whole = jpeg(image)
        others = [
            buffer.getvalue(),
            jpeg(image.convert("CMYK")),
            jpeg(image, exif=turned),
            whole[:-200],
            b"",
            b"\xff\xd8",
        ]
        others += [jpeg(image.resize((500, 3)))]
        assert all(decode(data) is None for data in others)

    @pytest.mark.parametrize(
        ("at_least", "shape"),
        [
            ((120, 160), (120, 160)),
            ((60, 80), (60, 80)),
            ((61, 1), (120, 160)),
            ((20, 18), (30, 40)),
            ((1, 1), (15, 20)),
            ((500, 900), (120, 160)),
        ],
    )
    def test_at_a_fraction_of_the_size(self, at_least, shape):
        data = jpeg(Image.fromarray(picture(120, 160)))
        found = decode(data, at_least=at_least)
        assert found.shape == (*shape, 3)
        expected = np.asarray(Image.fromarray(by_pillow(data)).resize(shape[::-1], Image.BOX))
        assert np.abs(found.astype(int) - expected).mean() < 3
        odd = jpeg(Image.fromarray(picture(121, 160)))  # a half would shift it
        assert np.array_equal(decode(odd, at_least=(1, 1)), by_pillow(odd))


class TestResizing:
    @pytest.mark.parametrize("size", [(60, 90), (250, 333), (31, 47), (125, 700), (1, 1), (124, 2)])
    def test_is_pillows_to_within_a_level(self, size):
        image = picture(125, 167)
        found = FastResize(125, 167, *size).apply_image(image)
        expected = T.ResizeTransform(125, 167, *size).apply_image(image)
        difference = np.abs(found.astype(int) - expected)
        assert found.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 0.02

    @pytest.mark.parametrize("view", [np.s_[:, ::-1], np.s_[::-1], np.s_[:, :, ::-1], np.s_[10:60, 20:80]])
    def test_of_views(self, view):
        image = picture(125, 167)[view]
        shape = image.shape[:2]
        found, expected = (kind(*shape, 70, 80).apply_image(image) for kind in (FastResize, T.ResizeTransform))
        assert np.abs(found.astype(int) - expected).max() <= 1

    def test_of_masks_and_other_pixels_is_pillows(self):
        resize, plain = (kind(50, 60, 33, 71) for kind in (FastResize, T.ResizeTransform))
        mask, image = np.random.default_rng(0).integers(0, 5, (50, 60), np.uint8), picture(50, 60)
        assert np.array_equal(resize.apply_segmentation(mask), plain.apply_segmentation(mask))
        for other in (image[:, :, :1], image.astype(np.float32)):
            assert np.array_equal(resize.apply_image(other), plain.apply_image(other))

    def test_only_detectron2s_own_class_is_replaced(self):
        class Theirs(T.ResizeShortestEdge):
            pass

        assert type(accelerated(T.ResizeShortestEdge(100))) is FastResizeShortestEdge
        for left in (Theirs(100), T.RandomFlip(), T.ResizeShortestEdge(100, interp=Image.NEAREST)):
            assert type(accelerated(left)) is type(left)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "keys",
    [(), ("MODEL.MASK_ON", True, "INPUT.CROP.ENABLED", True), ("INPUT.FORMAT", "RGB", "INPUT.RANDOM_FLIP", "vertical")],
)
def test_the_mapper_gives_what_detectron2s_gives(detection_config, tmp_path, keys, is_train):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("no photographs beside the repository (shared/data/coco_mini)")
    sizes = "INPUT.MIN_SIZE_TRAIN", (440, 500), "INPUT.MAX_SIZE_TRAIN", 900, "INPUT.MIN_SIZE_TEST", 440
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *sizes, "INPUT.MAX_SIZE_TEST", 900, *keys)
    name = str(tmp_path)
    records = load_coco_json(str(PHOTOGRAPHS / "val.json"), str(PHOTOGRAPHS / "images"), name)[:12]
    MetadataCatalog.remove(name)
    stock, ours = DatasetMapper(cfg, is_train), Mapper(cfg, is_train)
    for seed, record in enumerate(records):
        before, found = copy.deepcopy(record), []
        for mapper in (stock, ours):
            np.random.seed(seed)
            found.append(mapper(record))
        assert record == before
        expected, got = found
        assert got.keys() == expected.keys() and got["image"].dtype == torch.uint8 and got["image"].is_contiguous()
        assert got["image"].shape == expected["image"].shape
        difference = (got["image"].int() - expected["image"].int()).abs()
        assert difference.max() <= 2 and (difference > 0).float().mean() < 0.02
        if is_train:
            one, other = got["instances"], expected["instances"]
            assert one.get_fields().keys() == other.get_fields().keys()
            assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor) and len(one) == len(other)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_a_large_photograph(detection_config, tmp_path, channels):
    """Decoded at a half: about the same pixels, the same boxes and masks."""
    file = tmp_path / "one.jpg"
    file.write_bytes(jpeg(Image.fromarray(picture(900, 1200))))
    box = {
        "bbox": [100, 200, 500, 600],
        "bbox_mode": 1,
        "category_id": 0,
        "segmentation": [[100, 200, 600, 200, 300, 800]],
    }
    record = {"file_name": str(file), "height": 900, "width": 1200, "annotations": [box]}
    keys = "INPUT.FORMAT", channels, "MODEL.MASK_ON", True, "INPUT.MIN_SIZE_TRAIN", (300, 350, 400)
    if channels == "L":
        keys += "MODEL.PIXEL_MEAN", [120.0], "MODEL.PIXEL_STD", [60.0]
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, "INPUT.MAX_SIZE_TRAIN", 600)
    for seed in range(4):
        found = []
        for mapper in (DatasetMapper(cfg, True), Mapper(cfg, True)):
            np.random.seed(seed)
            found.append(mapper(copy.deepcopy(record)))
        expected, got = found
        assert got["image"].shape == expected["image"].shape
        assert (got["image"].int() - expected["image"].int()).abs().float().mean() < 2
        assert torch.equal(got["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
        assert np.array_equal(got["instances"].gt_masks.polygons[0], expected["instances"].gt_masks.polygons[0])


@pytest.mark.parametrize("accelerate", [True, False])
def test_a_file_that_is_not_what_it_should_be_is_an_error(detection_config, tmp_path, accelerate):
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "MODEL.ACCELERATE", accelerate)
    whole = jpeg(Image.fromarray(picture(200, 300)))
    for name, data, size, words in (
        ("cut", whole[:-500], (200, 300), "image file is truncated"),
        ("other", whole, (200, 301), "Mismatched image shape"),
        ("none", b"", (200, 300), "no image of a known format"),
    ):
        (tmp_path / f"{name}.jpg").write_bytes(data)
        record = {"file_name": str(tmp_path / f"{name}.jpg"), "height": size[0], "width": size[1], "annotations": []}
        with pytest.raises(DatasetError, match=rf"{name}\.jpg cannot be read \(.*{words}"):
            Mapper(cfg, True)(record)


def test_without_acceleration_every_value_is_detectron2s(detection_config, tmp_path):
    file = tmp_path / "one.jpg"
    file.write_bytes(jpeg(Image.fromarray(picture(120, 160))))
    record = {"file_name": str(file), "height": 120, "width": 160, "annotations": []}
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "MODEL.ACCELERATE", False)
    images = []
    for mapper in (DatasetMapper(cfg, True), Mapper(cfg, True)):
        np.random.seed(0)
        images.append(mapper(record)["image"])
    assert torch.equal(*images)
