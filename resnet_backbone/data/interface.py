"""The interface of a classification image source."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """A list of strings in two numpy arrays.

    Every forked worker would end up copying a Python list page by page, because reading a Python object writes its
    reference count. Arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = self._ends[index - 1] if index > 0 else 0
        return os.fsdecode(self._bytes[begin : self._ends[index]].tobytes())


class ClassificationSource(ABC):
    """Encoded images with labels.

    Attributes:
        class_names: one name per class, in the order of the class numbers.
        labels: `(len,)` int64, each in `0 ... len(class_names) - 1`.
    """

    def __init__(self, class_names: list[str], labels: np.ndarray) -> None:
        self.class_names = class_names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read the encoded image, as stored."""

    def ends(self, index: int) -> tuple[bytes, bytes] | None:
        """Read the image's first and last bytes alone (`decode.read_ends`); None if it is in memory already."""
        return None

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the image for messages: its path, or shard and key."""

    def ignored(self) -> Iterable[str]:
        """Files among the images that are not treated as images."""
        return ()
