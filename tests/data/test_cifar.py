import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

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


def write_python(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches().items():
        (folder / name).write_bytes(python2_pickle(pixels, labels))
    names = "".join(f"S'{name}'\na" for name in CLASS_NAMES)  # protocol 0, again as Python 2 wrote it
    meta = f"(dp1\nS'num_cases_per_batch'\np2\nI{COUNT}\nsS'label_names'\np3\n(lp4\n{names}sS'num_vis'\np15\nI3072\ns."
    (folder / "batches.meta").write_text(meta)
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


def open_with_torchvision(root: Path, train: bool, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    return datasets.CIFAR10(root, train=train)


@pytest.mark.parametrize("train", [True, False])
def test_both_forms_equal_torchvision(tmp_path, monkeypatch, train):
    write_python(tmp_path / cifar.PYTHON_FOLDER)
    write_binary(tmp_path / cifar.BINARY_FOLDER)
    expected = open_with_torchvision(tmp_path, train, monkeypatch)
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


def test_pickled_again_by_todays_numpy(tmp_path):
    folder = write_python(tmp_path / "again")
    for name, (pixels, labels) in batches().items():
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=4))
    expected = batches()["data_batch_5"]
    source = CifarSource(folder, train=True)
    assert np.array_equal(source.pixels[-COUNT:].transpose(0, 3, 1, 2).reshape(COUNT, 3072), expected[0])
    assert source.labels[-COUNT:].tolist() == expected[1]


def test_class_names(folder):
    (meta,) = folder.glob("batches.meta*")
    meta.unlink()
    assert CifarSource(folder, train=True).class_names == CLASS_NAMES
    names = [f"name{number}" for number in range(10)]
    text = "\n".join(names).encode()
    meta.write_bytes(text if meta.suffix == ".txt" else pickle.dumps({b"label_names": [n.encode() for n in names]}))
    assert CifarSource(folder, train=False).class_names == names
    meta.write_bytes(b"one" if meta.suffix == ".txt" else pickle.dumps({b"label_names": [b"one"]}))
    fails(folder, "batches.meta", "class names, expected 10")


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
    datasets = pytest.importorskip("torchvision.datasets")
    calls = []

    class Downloaded:
        def __init__(self, root, download):
            calls.append(Path(root).parent)
            write_python(Path(root) / cifar.PYTHON_FOLDER)

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    for _ in range(2):
        assert len(open_source("cifar10_train", root=tmp_path / "new")) == 5 * COUNT
    assert calls == [tmp_path / "new"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {cifar.PYTHON_FOLDER, ".cifar10.lock"}


def test_failed_download(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Interrupted:
        def __init__(self, root, download):
            (Path(root) / cifar.PYTHON_FOLDER).mkdir()
            (Path(root) / cifar.PYTHON_FOLDER / "data_batch_1").write_bytes(b"half")
            raise OSError("<urlopen error\nno network>")

    monkeypatch.setattr(datasets, "CIFAR10", Interrupted)
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
    fails(folder, "data_batch_4", "cannot be read: No such file", "unpack")


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
    folder = write_python(tmp_path / "p")
    for labels in ([0, 1, 2, 3, 4, 5, 99], [-1] * COUNT, [2**70] * COUNT):
        batch = {b"data": batches()["test_batch"][0], b"labels": labels}
        (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
        fails(folder, "test_batch", train=False)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_is_executed(tmp_path, protocol):
    folder = write_python(tmp_path / "p")
    mark = tmp_path / "executed"
    for call in (Call(os.mkdir, str(mark)), Call(eval, f"__import__('os').mkdir({str(mark)!r})")):
        (folder / "test_batch").write_bytes(pickle.dumps({b"data": call}, protocol=protocol))
        fails(folder, "nothing in it was executed", train=False)
        (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": call}, protocol=protocol))
        fails(folder, "nothing in it was executed")
    assert not mark.exists()


def test_pickles_of_other_things(tmp_path):
    folder = write_python(tmp_path / "p")
    pixels, labels = batches()["test_batch"]
    cases = [
        ({b"labels": labels}, "no 'data'"),
        ({b"data": pixels}, "no 'data'"),
        ({b"data": pixels.tolist(), b"labels": labels}, "no 'data'"),
        ({b"data": pixels, b"labels": tuple(labels)}, "no 'data'"),
        ({b"data": pixels, b"labels": [[1]] * COUNT}, "no 'data'"),
        ({b"data": pixels, b"fine_labels": labels}, "no 'data'"),
        ([pixels, labels], "no 'data'"),
        ({b"data": pixels[:, :-1], b"labels": labels}, "expected (7, 3072)"),
        ({b"data": pixels[:-1], b"labels": labels}, "expected (7, 3072)"),
        ({b"data": pixels.astype(np.float32), b"labels": labels}, "is cut off or damaged"),
        ({b"data": np.array([b"x", None]), b"labels": labels}, "is cut off or damaged"),
        ({b"data": np.asfortranarray(pixels), b"labels": labels}, "is cut off or damaged"),
    ]
    for value, part in cases:
        (folder / "test_batch").write_bytes(pickle.dumps(value, protocol=4))
        fails(folder, "test_batch", part, train=False)


def test_shapes_that_lie_take_no_memory(tmp_path):
    """Arrays and numbers of 2^31 bytes and more, claimed in few bytes."""
    folder = write_python(tmp_path / "p")
    small = python2_pickle(*batches()["test_batch"])
    lies = [
        small.replace(b"K\x07M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86"),
        b"\x80\x04\x96" + struct.pack("<Q", 2**60) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"cnumpy\nndarray\n(I99999999999\ntR.",
    ]
    for lie in lies:
        (folder / "test_batch").write_bytes(lie)
        fails(folder, "test_batch", train=False)
