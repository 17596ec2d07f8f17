"""Small data sets that several test files use."""

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def _png(rng: np.random.Generator, height: int = 12, width: int = 10) -> bytes:
    return cv2.imencode(".png", rng.integers(0, 256, (height, width, 3), np.uint8))[1].tobytes()


def _write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _private_memory(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


@pytest.fixture
def write_tar():
    """The function `(path, {member name: bytes})` that writes a tar archive."""
    return _write_tar


@pytest.fixture
def png():
    """The function `(rng, height=…, width=…)` that gives a PNG file of random pixels."""
    return _png


@pytest.fixture
def private_memory():
    """The function `(process)` that gives the MB that belong to this process alone and that it has written to."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux's /proc/PID/smaps_rollup")
    return _private_memory


@pytest.fixture
def shards(tmp_path) -> tuple[str, list[bytes], list[int]]:
    """The pattern, images and labels of 3 shards with 31 records of 4 classes."""
    rng = np.random.default_rng(0)
    images = [_png(rng, 8 + number % 5, 9) for number in range(31)]
    labels = [number % 4 for number in range(31)]
    for shard in range(3):
        members = {}
        for number in range(shard, 31, 3):
            members[f"key{number:02d}.png"] = images[number]
            members[f"key{number:02d}.cls"] = str(labels[number]).encode()
        _write_tar(tmp_path / f"train-{shard:02d}.tar", members)
    order = [number for shard in range(3) for number in range(shard, 31, 3)]
    return f"{tmp_path}/train-{{00..02}}.tar", [images[i] for i in order], [labels[i] for i in order]


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Three classes with 2, 3 and 4 images, one of them in a folder further down."""
    rng = np.random.default_rng(1)
    root = tmp_path / "folders"
    for count, name in ((2, "ant"), (3, "bee"), (4, "cat")):
        (root / name / "more").mkdir(parents=True)
        for number in range(count):
            folder = root / name / "more" if number == 1 else root / name
            (folder / f"{number}.PNG").write_bytes(_png(rng))
    return root


@pytest.fixture
def tiny_imagenet() -> Path:
    folder = SHARED / "tiny_imagenet"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture
def voc() -> Path:
    folder = SHARED / "voc"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
