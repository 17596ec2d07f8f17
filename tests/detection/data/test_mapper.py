"""Both pipelines read images of all kinds alike, and say why they cannot read one."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image, PngImagePlugin

from resnet_backbone import detection
from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.detection.data.annotated import image_size
from resnet_backbone.detection.data.mapper import Mapper, _read_labels, read_image
from resnet_backbone.engine.config import ConfigError

DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # every value of 16 bits


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, color: int) -> bytes:
    """A PNG of 16 bits by the specification; Pillow writes only gray ones."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def both(data: bytes, path) -> tuple[np.ndarray, np.ndarray]:
    """What pretraining and detection read, as RGB."""
    path.write_bytes(data)
    return decode(data, what=str(path)), read_image(str(path), "RGB")


OPAQUE = np.full_like(DEEP, 65535)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(DEEP), "PNG"),
        saved(Image.fromarray(DEEP), "TIFF"),
        b"P5 256 256 65535\n" + DEEP.astype(">u2").tobytes(),
        png(DEEP, 0),
        png(np.stack([DEEP] * 3, 2), 2),
        png(np.stack([DEEP, OPAQUE // 2], 2), 4),
        png(np.stack([DEEP] * 3 + [OPAQUE], 2), 6),
    ],
    ids=["gray PNG", "gray TIFF", "PGM", "PNG 0", "PNG RGB", "PNG LA", "PNG RGBA"],
)
def test_sixteen_bits_become_their_upper_byte(data, tmp_path):
    expected = np.repeat((DEEP // 256)[:, :, None], 3, axis=2)
    pretraining, detection = both(data, tmp_path / "a")
    assert (pretraining == expected).all() and (detection == expected).all()


def test_sixteen_bits_of_ppm_differ_by_one_level_at_most(tmp_path):
    data = b"P6 256 256 65535\n" + np.stack([DEEP] * 3, 2).astype(">u2").tobytes()
    pretraining, detection = both(data, tmp_path / "a")
    assert abs(pretraining.astype(int) - detection).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "transparent"])
def test_other_modes_are_as_detectron2_reads_them(mode, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    image = picture.convert("P" if mode == "transparent" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    options = {"transparency": 3} if mode == "transparent" else {}
    pretraining, detection = both(saved(image, "PNG", **options), tmp_path / "a.png")
    assert (pretraining == detection).all()
    for channels in ("RGB", "BGR", "L"):
        theirs = detection_utils.read_image(str(tmp_path / "a.png"), channels)
        assert (read_image(str(tmp_path / "a.png"), channels) == theirs).all()


def test_cmyk_and_orientation(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 40))
    pretraining, detection = both(saved(picture.convert("CMYK"), "JPEG"), tmp_path / "a.jpg")
    assert abs(pretraining.astype(int) - detection).max() <= 3  # two decoders of JPEG
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "b.jpg").write_bytes(saved(picture, "JPEG", exif=exif))
    found = read_image(str(tmp_path / "b.jpg"), "BGR")
    assert found.shape == (60, 40, 3)
    assert (found == detection_utils.read_image(str(tmp_path / "b.jpg"), "BGR")).all()


@pytest.mark.parametrize("values", [np.linspace(0, 1, 100, dtype=np.float32), np.arange(100, dtype=np.int32)])
def test_thirty_two_bits_are_refused_by_both(values, tmp_path):
    data = saved(Image.fromarray(values.reshape(10, 10)), "TIFF")
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(DatasetError, match=r"a\.tif is unreadable .*32-bit pixels"):
        decode(data, what="a.tif")
    with pytest.raises(DatasetError, match=r"a\.tif cannot be read \(32-bit pixels"):
        read_image(str(tmp_path / "a.tif"), "RGB")


@pytest.mark.parametrize(("width", "height"), [(20000, 1), (2000, 1), (3, 400), (101, 1)])
def test_a_line_of_pixels_is_refused_by_both(width, height, tmp_path):
    """Its shorter side resized to 256, one of 20000×1 would have 4 GB."""
    data = saved(Image.new("RGB", (width, height)), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    words = f"{width}×{height} pixels; expected sides that differ by a factor of 100 at most"
    with pytest.raises(DatasetError, match=words):
        decode(data, what="a.png")
    with pytest.raises(DatasetError, match=words):
        read_image(str(tmp_path / "a.png"), "RGB")
    assert both(saved(Image.new("RGB", (100, 1)), "PNG"), tmp_path / "b.png")[1].shape == (1, 100, 3)


def _long_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return saved(Image.new("RGB", (9, 9)), "PNG", pnginfo=text)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no image of a known format"),
        (b"<html>", "no image of a known format"),
        (saved(Image.linear_gradient("L"), "PNG")[:300], "truncated|broken"),
        (saved(Image.linear_gradient("L"), "JPEG")[:900], "truncated"),
        (_long_text(), "too large"),
    ],
    ids=["empty", "no image", "cut PNG", "cut JPEG", "text"],
)
def test_what_cannot_be_read_is_named(data, words, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    file = str(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=rf"the image \S+a\.png cannot be read \(.*({words}).*\)\.$") as error:
        read_image(file, "RGB")
    assert "\n" not in str(error.value)
    with pytest.raises(DatasetError, match=r"\)\. Replace it or remove it from the annotations\.$"):
        Mapper(detection.get_config(), is_train=False)({"file_name": file, "height": 9, "width": 9})


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # twice as many are an error
    Image.new("RGB", (9, 10)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read \(Image size \(90 pixels\) exceeds"):
        read_image(str(tmp_path / "a.png"), "RGB")
    with pytest.raises(ConfigError, match=r"a\.png cannot be read"):
        image_size(tmp_path / "a.png")


def test_a_fifo_is_not_opened(tmp_path):
    """Opening one waits for somebody to write to it."""
    (tmp_path / "class").mkdir()
    fifo = tmp_path / "class" / "a.jpg"
    os.mkfifo(fifo)
    with pytest.raises(DatasetError, match=r"a\.jpg cannot be read \(it is no regular file\)"):
        read_image(str(fifo), "RGB")
    with pytest.raises(ConfigError, match=r"a\.jpg cannot be read \(it is no regular file\)"):
        image_size(fifo)
    with pytest.raises(DatasetError, match=r"a\.jpg is no regular file; rename or remove it"):
        FolderSource(tmp_path)


def test_semantic_labels_of_a_palette_image_are_its_indices(tmp_path):
    """As Detectron2's evaluator reads them; its mapper would train on the colors' brightness."""
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    gray, palette = tmp_path / "gray.png", tmp_path / "palette.png"
    Image.fromarray(indices).save(gray)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette([255 - value for value in range(12) for _ in range(3)])
    image.save(palette)
    assert Image.open(palette).mode == "P"
    for file in (gray, palette):
        assert np.array_equal(_read_labels(str(file), (3, 4)), indices)
        assert np.array_equal(np.array(Image.open(file)), indices)
