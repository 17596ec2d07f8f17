"""The images that loading is measured with."""

import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photograph, select_photographs, write_photographs, write_shard
from resnet_backbone.data.sources import open_source
from resnet_backbone.errors import InputError


def test_detail_falls_off_as_in_photographs():
    """The power at a frequency goes with its inverse square or a little steeper (Field 1987)."""
    gray = photograph(256, 256, seed=3).mean(axis=2)
    power = np.abs(np.fft.fft2(gray - gray.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    edges = np.geomspace(0.02, 0.4, 9)
    bands = [(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(edges)]
    slope = np.polyfit(
        np.log([frequency[band].mean() for band in bands]), np.log([power[band].mean() for band in bands]), 1
    )
    assert -3 < slope[0] < -2
    assert 20 < gray.std() < 80


def test_seeds_give_different_images_and_the_same_again():
    assert np.array_equal(photograph(40, 50, seed=1), photograph(40, 50, seed=1))
    assert not np.array_equal(photograph(40, 50, seed=1), photograph(40, 50, seed=2))


def test_files_have_the_size_of_photographs(tmp_path):
    files = write_photographs(tmp_path / "images", size=(375, 500), count=2)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG" and image.size == (500, 375)
        # ImageNet's training images: 138 GB / 1.28 million, about 110 kB, of about 500×400 pixels.
        assert 40_000 < file.stat().st_size < 140_000


def jpeg(gray: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (gray, gray, gray)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def album(tmp_path):
    for number in range(10):
        folder = tmp_path / "album" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPG").write_bytes(jpeg(20 * number))
    (tmp_path / "album" / "readme.txt").write_text("no image")
    return tmp_path / "album"


def grays(files) -> list[int]:
    return sorted(round(int(cv2.imread(str(file))[0, 0, 0]) / 20) for file in files)


def test_a_selection_is_spread_over_all_folders(album, tmp_path):
    chosen = select_photographs(album, tmp_path / "few", count=5)
    assert len(chosen) == len(set(chosen)) == 5 and all(file.parent == tmp_path / "few" for file in chosen)
    assert {number % 3 for number in grays(chosen)} == {0, 1, 2} and len(set(grays(chosen))) == 5
    assert grays(select_photographs(album, tmp_path / "all", count=50)) == list(range(10))


def test_a_folder_without_jpegs_is_refused(album, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no JPEG; give a folder"):
        select_photographs(tmp_path / "empty", tmp_path / "out", count=5)
    with pytest.raises(InputError, match=r"nowhere is no folder; give a folder"):
        select_photographs(tmp_path / "nowhere", tmp_path / "out", count=5)


def test_a_shard_holds_the_files(album, tmp_path):
    files = select_photographs(album, tmp_path / "class", count=4)
    write_shard(tmp_path / "set.tar", files)
    source = open_source(tmp_path / "set.tar")
    assert [source.read(index) for index in range(4)] == [file.read_bytes() for file in files]
    assert source.labels.tolist() == [0] * 4 and not (tmp_path / "set.cls").exists()
