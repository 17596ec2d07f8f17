"""Images in a folder of class folders."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from resnet_backbone.data.decode import read_ends
from resnet_backbone.data.errors import IMAGE_EXTENSIONS, DatasetError, content, nearest_existing, some
from resnet_backbone.data.interface import ClassificationSource, PackedStrings

_EXTENSIONS = ", ".join(IMAGE_EXTENSIONS[:-1]) + " or " + IMAGE_EXTENSIONS[-1]


class FolderSource(ClassificationSource):
    """A folder of class folders: `ROOT/CLASS/IMAGE`, with images at any depth below their class.

    Classes are numbered by sorted name, and images are ordered by sorted path. Names that start with a dot are ignored.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.fspath(root)
        _require_folder(Path(root), "a folder with one folder of images per class")
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise DatasetError(f"{root} holds no class folders, {content(Path(root))}; expected {root}/CLASS/IMAGE")
        paths, labels, empty = [], [], []
        for number, name in enumerate(names):
            found = sorted(_images_below(self.root, name))
            paths += found
            labels += [number] * len(found)
            if not found:
                empty.append(name)
        if not paths:
            raise DatasetError(
                f"{root} holds {len(names)} folders ({some(names)}) but no image in them; expected "
                f"{root}/CLASS/IMAGE with the extension {_EXTENSIONS}"
            )
        if empty:
            raise DatasetError(
                f"{root}: {len(empty)} of {len(names)} class folders hold no image: {some(empty)}; add images with "
                f"the extension {_EXTENSIONS}, or remove the folder"
            )
        super().__init__(names, np.array(labels, np.int64))
        self._paths = PackedStrings(paths)

    def read(self, index: int) -> bytes:
        path = self.describe(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DatasetError(f"{path} was found at the start but cannot be read now: {error.strerror}") from None

    def ends(self, index: int) -> tuple[bytes, bytes]:
        path = self.describe(index)
        try:
            with open(path, "rb") as file:
                return read_ends(file.fileno())
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}") from None

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def ignored(self) -> Iterator[str]:
        """Files in the class folders without an image extension, and all files next to the class folders."""
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                image = folder != self.root and name.lower().endswith(IMAGE_EXTENSIONS)
                if not image and not name.startswith("."):
                    yield os.path.join(folder, name)


def _images_below(root: str, folder: str) -> Iterable[str]:
    """Paths, relative to `root`, of the images in or below `root/folder`."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(IMAGE_EXTENSIONS):
                if not entry.is_file() and os.path.exists(entry.path):  # opening a FIFO would wait forever
                    raise DatasetError(f"{entry.path} is no regular file; rename or remove it")
                yield os.path.join(folder, entry.name)
            elif entry.is_dir():
                yield from _images_below(root, os.path.join(folder, entry.name))


def _require_folder(path: Path, expected: str) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise DatasetError(f"{path} is a file; expected {expected}")
    raise DatasetError(f"{path} does not exist ({nearest_existing(path)}); expected {expected}")
