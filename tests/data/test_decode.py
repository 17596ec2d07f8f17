import io

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.data.decode import decode, jpeg_size, looks_whole, read_ends
from resnet_backbone.data.errors import DatasetError


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colors, 53 by 41 pixels."""
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


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [dict(subsampling=0), dict(subsampling=2), dict(progressive=True)])
def test_reduced_jpeg_is_the_mean_of_the_pixels(picture, reduction, mode, options):
    """Sizes are rounded up; the colors are in their order; EXIF turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture.resize((211, 163), Image.Resampling.BICUBIC)
    data = encoded(image.convert(mode), "JPEG", quality=95, exif=exif, **options)
    got = decode(data, what="x", reduction=reduction).astype(int)
    with Image.open(io.BytesIO(data)) as file:
        expected = np.asarray(file.convert("RGB").reduce(reduction)).astype(int)
    assert got.shape == (-(-163 // reduction), -(-211 // reduction), 3) == expected.shape
    inside = np.s_[: 163 // reduction, : 211 // reduction]  # the others stand for pixels beyond the edge, too
    difference = abs(got - expected)[inside]
    assert difference.mean() < 1.5 and difference.max() <= 12


def test_reduction_where_opencv_gives_up(picture):
    """Pillow then decodes, to the same size."""
    assert decode(encoded(picture, "PCX"), what="x", reduction=4).shape == (11, 14, 3)


@pytest.mark.parametrize(
    "options", [{}, dict(progressive=True), dict(comment=b"\xff\xc0" * 30), dict(restart_marker_rows=1)]
)
def test_jpeg_size(picture, options):
    """Also where metadata precedes the frame header and holds a preview image with a header of its own."""
    preview = encoded(picture.resize((8, 6)), "JPEG")
    data = encoded(picture, "JPEG", exif=b"Exif\x00\x00" + preview, **options)
    assert jpeg_size(data) == (41, 53)
    for form in ("PNG", "WEBP", "BMP"):
        assert jpeg_size(encoded(picture, form)) is None


def test_jpeg_size_of_damaged_bytes(picture):
    data = encoded(picture, "JPEG")
    header = data.index(b"\xff\xc0")
    assert jpeg_size(data[: header + 9]) == (41, 53)
    assert all(jpeg_size(data[:length]) is None for length in range(header + 9))
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(3, header + 9, 3)] = rng.integers(0, 256, 3)
        size = jpeg_size(damaged.tobytes())
        assert size is None or len(size) == 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_a_whole_file_looks_whole_and_a_cut_off_one_does_not(picture, tmp_path, form):
    data = encoded(picture, form)

    def looks(content: bytes) -> bool:
        (tmp_path / "image").write_bytes(b"before" + content + b"behind")
        with (tmp_path / "image").open("rb") as file:
            return looks_whole(*read_ends(file.fileno(), len(b"before"), len(content)))

    assert looks(data)
    assert looks(data[: len(data) // 2]) == (form not in ("JPEG", "PNG"))  # whose end can be seen
    assert not looks(b"") and not looks(b"<html>not found</html>")
