"""CIFAR-10 in its two published forms (https://www.cs.toronto.edu/~kriz/cifar.html), held entirely in memory.

`cifar-10-batches-py` holds pickles, which torchvision reads if their MD5 sums match the published ones;
`cifar-10-batches-bin` holds records of one label byte and 3072 pixel bytes. Both have five training batches and one
test batch.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from resnet_backbone.data.errors import DatasetError, content, nearest_existing, some
from resnet_backbone.data.interface import ClassificationSource

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
SIDE = 32
_IMAGE_BYTES = 3 * SIDE * SIDE  # red plane, green plane, blue plane


class CifarSource(ClassificationSource):
    """The 50,000 training or 10,000 test images of a folder `cifar-10-batches-py` or `cifar-10-batches-bin`.

    Images are returned as PPM files, which `decode` reads losslessly, so CIFAR takes the same path as other images.

    Attributes:
        pixels: all images, `(N, 32, 32, 3)` uint8 RGB, in one array shared by forked workers.
    """

    def __init__(self, folder: str | Path, *, train: bool) -> None:
        self.folder = os.fspath(folder)
        names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
        python, binary = (is_cifar_folder(folder, form) for form in (PYTHON_FOLDER, BINARY_FOLDER))
        if not (python or binary):
            path = Path(folder)
            found = (
                f"holds no CIFAR-10 ({content(path)})" if path.exists() else f"is not there ({nearest_existing(path)})"
            )
            raise DatasetError(f"{path} {found}; expected the files {', '.join(names)}, with or without '.bin'")
        self._files = [os.path.join(self.folder, name + ("" if python else ".bin")) for name in names]
        self.pixels, labels, class_names = (
            _read_python(self.folder, train) if python else _read_binary(self._files, self.folder)
        )
        super().__init__(class_names, labels)

    def read(self, index: int) -> bytes:
        return b"P6\n%d %d\n255\n" % (SIDE, SIDE) + self.pixels[index].tobytes()

    def describe(self, index: int) -> str:
        batch, number = divmod(int(index), len(self) // len(self._files))
        return f"{self._files[batch]}:{number}"


def is_cifar_folder(path: str | Path, form: str | None = None) -> bool:
    """Whether a folder holds CIFAR-10's first training batch or its test batch, in the given form or either form."""
    extensions = {PYTHON_FOLDER: [""], BINARY_FOLDER: [".bin"], None: ["", ".bin"]}[form]
    names = [name + extension for name in ("data_batch_1", "test_batch") for extension in extensions]
    return any(os.path.isfile(os.path.join(path, name)) for name in names)


def open_cifar(root: str | Path, *, train: bool) -> CifarSource:
    """Open CIFAR-10 under `root`, the folder of all data sets; download it there if it is missing."""
    for name in (PYTHON_FOLDER, BINARY_FOLDER):
        if os.path.isdir(os.path.join(root, name)):
            return CifarSource(os.path.join(root, name), train=train)
    try:
        download(root)
    except Exception as error:  # urllib, ssl, tarfile and torchvision raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{root} holds neither {PYTHON_FOLDER} nor {BINARY_FOLDER}, and the download failed ({reason}); fetch "
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and unpack it to "
            f"{os.path.join(root, PYTHON_FOLDER)}"
        ) from None
    return CifarSource(os.path.join(root, PYTHON_FOLDER), train=train)


def download(root: str | Path) -> None:
    """Download CIFAR-10 to `root/cifar-10-batches-py`, all or nothing.

    If there are several processes, one downloads and the others wait for it.
    """
    from torchvision.datasets import CIFAR10  # takes a second to import

    os.makedirs(root, exist_ok=True)
    target = os.path.join(root, PYTHON_FOLDER)
    with open(os.path.join(root, ".cifar10.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(target):
            return
        scratch = tempfile.mkdtemp(dir=root, prefix=".cifar10-")
        try:
            CIFAR10(scratch, download=True)  # checks the files' MD5 sums
            os.rename(os.path.join(scratch, PYTHON_FOLDER), target)
        finally:
            shutil.rmtree(scratch)


def _read_python(folder: str, train: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read pixels `(N, 32, 32, 3)` uint8, labels `(N,)` int64 and class names with torchvision."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    class Here(CIFAR10):
        base_folder = ""  # whatever the folder is called

    try:
        data = Here(folder, train=train)
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}; unpack the archive again") from None
    except RuntimeError:  # an MD5 sum differs from the published one
        files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        wrong = [name for name, md5 in files if not check_integrity(os.path.join(folder, name), md5)]
        raise DatasetError(
            f"{folder}: {some(wrong)} missing or not as published (by the MD5 sum); nothing was read: unpack the "
            "archive again"
        ) from None
    return np.ascontiguousarray(data.data), np.array(data.targets, np.int64), data.classes


def _read_binary(files: list[str], folder: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read pixels `(N, 32, 32, 3)` uint8, labels `(N,)` int64 and class names from the binary form."""
    batches = [_read_records(path) for path in files]
    sizes = [len(batch) for batch in batches]
    if len(set(sizes)) > 1:
        raise DatasetError(
            f"{folder}: the training batches hold {', '.join(map(str, sizes))} images, expected the same number in "
            "each; unpack the archive again"
        )
    records = np.concatenate(batches)
    pixels = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    labels = records[:, 0].astype(np.int64)
    if len(wrong := np.flatnonzero(labels >= len(CLASS_NAMES))):
        batch, number = divmod(int(wrong[0]), sizes[0])
        raise DatasetError(
            f"{files[batch]}:{number} has the class {labels[wrong[0]]}, expected 0...9: this is not CIFAR-10, or it is "
            "damaged; unpack the archive again"
        )
    return pixels, labels, _class_names(os.path.join(folder, "batches.meta.txt"))


def _read_records(path: str) -> np.ndarray:
    """Read the records of one binary file, `(n, 1 + 3072)` uint8: a label and an image's planes."""
    data = np.frombuffer(_bytes(path), np.uint8)
    if not len(data) or len(data) % (1 + _IMAGE_BYTES):
        raise DatasetError(
            f"{path} has {len(data)} bytes, expected a multiple of {1 + _IMAGE_BYTES}, one label and {_IMAGE_BYTES} "
            "pixels for each image; unpack the archive again"
        )
    return data.reshape(-1, 1 + _IMAGE_BYTES)


def _class_names(path: str) -> list[str]:
    """Read the names in `batches.meta.txt`; use the known ones if that file is missing."""
    if not os.path.exists(path):
        return list(CLASS_NAMES)
    names = _bytes(path).decode("latin1").split()
    if len(names) != len(CLASS_NAMES):
        raise DatasetError(f"{path} holds {len(names)} class names, expected 10; replace it, or remove it")
    return names


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; unpack the archive again") from None
