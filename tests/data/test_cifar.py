import hashlib
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from resnet_backbone.data import cifar
from resnet_backbone.data.cifar import CLASS_NAMES, CifarSource
from resnet_backbone.data.decode import decode
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.data.sources import open_source

COUNT = 7  # images in a batch
ARCHIVE = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10_jpeg.tar.xz"


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as CIFAR's authors wrote it: protocol 2 of Python 2 with NumPy's old module names, strings as bytes."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    data = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(data)) + data + b"tb"
    names = b"](" + b"".join(text(b"image_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    items = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels")
    items += b"](" + b"".join(map(number, labels)) + b"e" + text(b"data") + array + text(b"filenames") + names
    return b"\x80\x02}(" + items + b"u."


def batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pixels `(n, 3072)`, red, green and blue planes, and labels of each file."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    return {
        name: (rng.integers(0, 256, (COUNT, 3072), np.uint8), rng.integers(0, 10, COUNT).tolist()) for name in names
    }


def python_files() -> dict[str, bytes]:
    """The contents of the Python form's files by name."""
    names = "".join(f"S'{name}'\na" for name in CLASS_NAMES)  # protocol 0, again as Python 2 wrote it
    meta = f"(dp1\nS'num_cases_per_batch'\np2\nI{COUNT}\nsS'label_names'\np3\n(lp4\n{names}sS'num_vis'\np15\nI3072\ns."
    return {name: python2_pickle(*batch) for name, batch in batches().items()} | {"batches.meta": meta.encode()}


def write_python(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in python_files().items():
        (folder / name).write_bytes(data)
    return folder


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches().items():
        records = [bytes([label]) + image.tobytes() for image, label in zip(pixels, labels)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text("\n".join(CLASS_NAMES) + "\n\n")
    return folder


@pytest.fixture(params=[write_python, write_binary])
def folder(request, tmp_path) -> Path:
    name = cifar.PYTHON_FOLDER if request.param is write_python else cifar.BINARY_FOLDER
    return request.param(tmp_path / "data" / name)


@pytest.fixture(autouse=True)
def sums(monkeypatch):
    """The MD5 sums of the small data set in place of the published ones."""
    sums = {name: hashlib.md5(data).hexdigest() for name, data in python_files().items()}
    meta = sums.pop("batches.meta")
    *train, test = map(list, sums.items())
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})


@pytest.mark.parametrize("train", [True, False])
def test_both_forms_equal_torchvision(tmp_path, train):
    write_python(tmp_path / cifar.PYTHON_FOLDER)
    write_binary(tmp_path / cifar.BINARY_FOLDER)
    expected = CIFAR10(tmp_path, train=train)
    planes = np.concatenate([p for name, (p, _) in batches().items() if name.startswith("data") == train])
    assert np.array_equal(expected.data, planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    for name in (cifar.PYTHON_FOLDER, cifar.BINARY_FOLDER):
        source = CifarSource(tmp_path / name, train=train)
        assert source.pixels.dtype == np.uint8 and np.array_equal(source.pixels, expected.data)
        assert source.labels.dtype == np.int64 and source.labels.tolist() == expected.targets
        assert source.class_names == expected.classes
        assert len(source) == (5 * COUNT if train else COUNT)


def test_images_decode_without_loss(folder):
    source = CifarSource(folder, train=True)
    planes = batches()["data_batch_3"][0]
    for number in range(COUNT):
        image = decode(source.read(2 * COUNT + number), what="")
        assert np.array_equal(image, planes[number].reshape(3, 32, 32).transpose(1, 2, 0))
    extension = ".bin" if folder.name == cifar.BINARY_FOLDER else ""
    assert source.describe(2 * COUNT + 4) == f"{folder}/data_batch_3{extension}:4"


def test_class_names_of_the_binary_form(tmp_path):
    folder = write_binary(tmp_path / "b")
    meta = folder / "batches.meta.txt"
    meta.unlink()
    assert CifarSource(folder, train=True).class_names == CLASS_NAMES
    names = [f"name{number}" for number in range(10)]
    meta.write_text("\n".join(names))
    assert CifarSource(folder, train=False).class_names == names
    meta.write_text("one")
    fails(folder, "batches.meta.txt holds 1 class names, expected 10")


def test_class_folders_have_the_same_order(tmp_path):
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE} is not there")
    wanted = {f"test/{name}" for name in CLASS_NAMES}
    with tarfile.open(ARCHIVE) as packed:
        for member in packed:
            folder = os.path.dirname(member.name.removeprefix("./"))
            if member.isfile() and any(folder.endswith(name) for name in wanted):
                packed.extract(member, tmp_path, filter="data")
                wanted.discard(next(name for name in wanted if folder.endswith(name)))
            if not wanted:
                break
    (test,) = tmp_path.rglob("test")
    source = FolderSource(test)
    assert source.class_names == CLASS_NAMES and source.labels.tolist() == list(range(10))
    assert decode(source.read(3), what="").shape == (32, 32, 3)


# Opening by an entry of a config.


def test_entries(folder):
    for part, count in (("train", 5 * COUNT), ("test", COUNT)):
        assert len(open_source(folder / part)) == len(open_source(f"{folder}/{part}/")) == count
        assert len(open_source(f"cifar10_{part}", root=folder.parent)) == count
    with pytest.raises(DatasetError, match=r"holds both parts of CIFAR-10; name one .*/train or .*/test"):
        open_source(folder)


def test_a_folder_named_train_beside_cifars_files_is_a_folder(folder, class_folders):
    os.symlink(class_folders, folder / "train")
    assert open_source(folder / "train").class_names == ["ant", "bee", "cat"]


def test_download(tmp_path, monkeypatch):
    calls = []

    def download(self):
        calls.append(Path(self.root).parent)
        write_python(Path(self.root) / cifar.PYTHON_FOLDER)

    monkeypatch.setattr(CIFAR10, "download", download)
    for _ in range(2):
        assert len(open_source("cifar10_train", root=tmp_path / "new")) == 5 * COUNT
    assert calls == [tmp_path / "new"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {cifar.PYTHON_FOLDER, ".cifar10.lock"}


def test_failed_download(tmp_path, monkeypatch):
    def interrupted(self):
        (Path(self.root) / cifar.PYTHON_FOLDER).mkdir()
        (Path(self.root) / cifar.PYTHON_FOLDER / "data_batch_1").write_bytes(b"half")
        raise OSError("<urlopen error\nno network>")

    monkeypatch.setattr(CIFAR10, "download", interrupted)
    with pytest.raises(DatasetError) as caught:
        open_source("cifar10_test", root=tmp_path)
    assert "\n" not in str(caught.value)
    for part in ("no network", "cifar-10-python.tar.gz", f"unpack it to {tmp_path}/cifar-10-batches-py"):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".cifar10.lock"]


# What bad input gets: one sentence each.


def fails(folder, *parts, train=True):
    with pytest.raises(DatasetError) as caught:
        CifarSource(folder, train=train)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_no_cifar(tmp_path, folder):
    fails(tmp_path / "none", "is not there", "data_batch_1, data_batch_2")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no CIFAR-10 (with nothing in it)", "test_batch", train=False)
    (missing,) = folder.glob("data_batch_4*")
    missing.unlink()
    fails(folder, "data_batch_4", "unpack the archive again")


@pytest.mark.parametrize("length", [0, 1, 1000, 3073 * 3, -1])
def test_truncated(folder, length):
    (path,) = folder.glob("data_batch_2*")
    path.write_bytes(path.read_bytes()[:length])
    part = "hold 7, 3, 7, 7, 7 images" if length == 3073 * 3 and path.suffix else path.name
    fails(folder, part, "unpack the archive again")


def test_labels_of_another_data_set(tmp_path):
    folder = write_binary(tmp_path / "b")
    data = bytearray((folder / "test_batch.bin").read_bytes())
    data[2 * 3073] = 10
    (folder / "test_batch.bin").write_bytes(data)
    fails(folder, "test_batch.bin:2 has the class 10", train=False)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_nothing_in_an_altered_pickle_is_executed(tmp_path, name):
    folder = write_python(tmp_path / "p")
    mark = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps({"label_names": Call(os.mkdir, str(mark))}))
    for train in (True, False):
        fails(folder, f"{name} missing or not as published (by the MD5 sum); nothing was read", train=train)
    assert not mark.exists()
