import io

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours, 53 by 41 pixels."""
    cells = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(cells).resize((53, 41), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "form, mode",
    [
        *(("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
        *(("PPM", mode) for mode in ("RGB", "L", "1")),
    ],
)
def test_lossless_forms_equal_pillow(picture, form, mode):
    image = picture.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image, form)
    pixels = decode(data, what="x")
    assert pixels.dtype == np.uint8 and pixels.shape == (41, 53, 3) and pixels.flags.c_contiguous
    assert (pixels == reference(data)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [dict(quality=90), dict(quality=60, progressive=True)])
def test_jpeg_equals_pillow(picture, mode, options):
    """Within 3 levels: two JPEG decoders may round differently."""
    data = encoded(picture.convert(mode), "JPEG", **options)
    assert abs(decode(data, what="x") - reference(data)).max() <= 3


def test_webp_equals_pillow(picture):
    data = encoded(picture, "WEBP", lossless=True)
    assert (decode(data, what="x") == reference(data)).all()


def test_sixteen_bits_are_reduced_to_eight():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(values * 257), "PNG")
    assert (decode(data, what="x") == values[:, :, None]).all()


def test_orientation_is_ignored(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(picture, "JPEG", quality=95, exif=exif)
    assert decode(data, what="x").shape == (41, 53, 3)
    assert abs(decode(data, what="x") - reference(data)).max() <= 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.2, 0.6])
def test_truncated(picture, form, kept):
    data = encoded(picture, form)
    with pytest.raises(DatasetError, match=r"shard\.tar:k7 is unreadable \(\d+ bytes that .*\); replace or remove it"):
        decode(data[: int(len(data) * kept)], what="shard.tar:k7")


def test_no_image():
    with pytest.raises(DatasetError, match=r"a\.jpg is empty \(0 bytes\)"):
        decode(b"", what="a.jpg")
    with pytest.raises(DatasetError, match=r"a\.jpg is unreadable \(27 bytes that are no image of a known format\)"):
        decode(b"<html>404 Not Found</html>\n", what="a.jpg")
