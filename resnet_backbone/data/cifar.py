"""CIFAR-10, in its two forms as published (https://www.cs.toronto.edu/~kriz/cifar.html), all of it in memory.

`cifar-10-batches-py` holds pickles, which are read without calling anything that they name; `cifar-10-batches-bin`
holds records of one label byte and 3072 pixel bytes. Both have five training batches and one test batch.
"""

import fcntl
import io
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resnet_backbone.data.errors import DatasetError, content, nearest_existing
from resnet_backbone.data.interface import ClassificationSource

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
SIDE = 32
_IMAGE_BYTES = 3 * SIDE * SIDE  # red plane, green plane, blue plane


class CifarSource(ClassificationSource):
    """The 50,000 training or 10,000 test images of a folder `cifar-10-batches-py` or `cifar-10-batches-bin`.

    An image is given as a PPM file, which `decode` reads without loss, so that CIFAR goes the way of all images.

    Attributes:
        pixels: all images, `(N, 32, 32, 3)` uint8 RGB, in one array that forked workers share.
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
        read, extension = (_read_pickle, "") if python else (_read_records, ".bin")
        self._files = [os.path.join(self.folder, name + extension) for name in names]
        planes, labels = zip(*(read(path) for path in self._files))
        self._sizes = [len(batch) for batch in labels]
        if len(set(self._sizes)) > 1:
            raise DatasetError(
                f"{folder}: the training batches hold {', '.join(map(str, self._sizes))} images, expected the same "
                "number in each; unpack the archive again"
            )
        self.pixels = np.ascontiguousarray(np.concatenate(planes).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        super().__init__(_class_names(self.folder, python), np.concatenate(labels))
        wrong = np.flatnonzero(self.labels >= len(CLASS_NAMES))
        if len(wrong):
            raise DatasetError(
                f"{self.describe(wrong[0])} has the class {self.labels[wrong[0]]}, expected 0...9: this is not "
                "CIFAR-10, or it is damaged; unpack the archive again"
            )

    def read(self, index: int) -> bytes:
        return b"P6\n%d %d\n255\n" % (SIDE, SIDE) + self.pixels[index].tobytes()

    def describe(self, index: int) -> str:
        batch, number = divmod(int(index), self._sizes[0])
        return f"{self._files[batch]}:{number}"


def is_cifar_folder(path: str | Path, form: str | None = None) -> bool:
    """Whether a folder holds a first training batch or the test batch of CIFAR-10, in one form or in either."""
    extensions = {PYTHON_FOLDER: [""], BINARY_FOLDER: [".bin"], None: ["", ".bin"]}[form]
    names = [name + extension for name in ("data_batch_1", "test_batch") for extension in extensions]
    return any(os.path.isfile(os.path.join(path, name)) for name in names)


def open_cifar(root: str | Path, *, train: bool) -> CifarSource:
    """CIFAR-10 below `root`, the folder of all data sets; downloaded to it if it is not there."""
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
    """Download CIFAR-10 to `root/cifar-10-batches-py`, which is there as a whole or not at all.

    Of several processes one downloads, the others wait for it.
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
            CIFAR10(scratch, download=True)  # which checks the files' MD5 sums
            os.rename(os.path.join(scratch, PYTHON_FOLDER), target)
        finally:
            shutil.rmtree(scratch)


def _class_names(folder: str, python: bool) -> list[str]:
    """The names in `batches.meta` or `batches.meta.txt`; the known ones where that file is missing."""
    path = os.path.join(folder, "batches.meta" if python else "batches.meta.txt")
    if not os.path.exists(path):
        return list(CLASS_NAMES)
    try:
        if python:
            names = [name.decode() for name in _load(path)[b"label_names"]]
        else:
            names = _bytes(path).decode().split()
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        names = []
    if len(names) != len(CLASS_NAMES):
        raise DatasetError(f"{path} holds {len(names)} class names, expected 10; replace it, or remove it")
    return names


def _read_records(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(n, 3072)` uint8 and labels `(n,)` int64 of one file of the binary form."""
    data = np.frombuffer(_bytes(path), np.uint8)
    if not len(data) or len(data) % (1 + _IMAGE_BYTES):
        raise DatasetError(
            f"{path} has {len(data)} bytes, expected a multiple of {1 + _IMAGE_BYTES}, one label and {_IMAGE_BYTES} "
            "pixels for each image; unpack the archive again"
        )
    records = data.reshape(-1, 1 + _IMAGE_BYTES)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_pickle(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(n, 3072)` uint8 and labels `(n,)` int64 of one file of the Python form."""
    batch = _load(path)
    pixels, labels = (batch.get(key) if type(batch) is dict else None for key in (b"data", b"labels"))
    if not isinstance(pixels, _Array) or type(labels) is not list or set(map(type, labels)) != {int}:
        raise DatasetError(f"{path} holds no 'data' (an array) with 'labels' (a list); expected a batch of CIFAR-10")
    if pixels.shape != (len(labels), _IMAGE_BYTES) or len(pixels.data) != len(labels) * _IMAGE_BYTES:
        raise DatasetError(
            f"{path} holds an array of shape {str(pixels.shape)[:60]} with {len(pixels.data)} bytes for {len(labels)} "
            f"labels, expected ({len(labels)}, {_IMAGE_BYTES}); unpack the archive again"
        )
    if not all(0 <= label < 2**31 for label in labels):
        raise DatasetError(f"{path} holds labels outside 0...9; expected a batch of CIFAR-10")
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.shape), np.array(labels, np.int64)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; unpack the archive again") from None


def _load(path: str) -> Any:
    file = io.BytesIO(_bytes(path))
    try:
        return _Unpickler(file).load()
    except _Refused as refused:
        raise DatasetError(
            f"{path} asks for {str(refused)!r}, which no batch of CIFAR-10 does; nothing in it was executed: replace it"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DatasetError(f"{path} is cut off or damaged ({reason}); unpack the archive again") from None


class _Refused(Exception):
    """A pickle names something that arrays and lists do not need."""


class _Array:
    """Stands in for a NumPy array of bytes in a pickle: what the file says of it, which nobody has believed yet."""

    __slots__ = ("data", "shape")

    def __init__(self) -> None:
        self.shape, self.data = (), b""

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, data = state
        if type(dtype) is not _Bytes or fortran or type(data) is not bytes or type(shape) is not tuple:
            raise TypeError("an array of something else than bytes")
        self.shape, self.data = shape, data


class _Bytes:
    """Stands in for NumPy's dtype uint8 in a pickle."""

    __slots__ = ()

    def __setstate__(self, state: tuple) -> None:
        pass  # byte order and alignment, without meaning for bytes


class _Unpickler(pickle._Unpickler):
    """Reads plain containers and `_Array`s; what a pickle may name is answered with stand-ins, never with NumPy's own.

    Written on `pickle`'s Python form: a number in a file can make the C form reserve any amount of memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # Python 2 wrote the files

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed the module.
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return self._array
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of the function above
        if (module, name) == ("numpy", "dtype"):
            return self._dtype
        raise _Refused(f"{module}.{name}"[:80])

    def _array(self, kind: None, shape: Any, code: Any) -> _Array:
        return _Array()

    def _dtype(self, code: Any, *rest: Any) -> _Bytes:
        if code not in (b"u1", "u1"):
            raise TypeError(f"an array of {code!r:.20}, expected bytes")
        return _Bytes()
