"""Subsets of a classification source, and the random split that holds images out of training."""

import numpy as np

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.interface import ClassificationSource


class Subset(ClassificationSource):
    """The images of `source` at `indices`, `(n,)` int64, in that order."""

    def __init__(self, source: ClassificationSource, indices: np.ndarray) -> None:
        super().__init__(source.class_names, source.labels[indices])
        self.source = source
        self.indices = indices

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def ends(self, index: int) -> tuple[bytes, bytes] | None:
        return self.source.ends(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


def hold_out(source: ClassificationSource, count: int) -> tuple[Subset, Subset]:
    """Split into the rest and `count` held-out images, spread as evenly as possible over the classes.

    A class gives up at most all but one of its images. The draw depends only on the labels and never changes, so no run
    trains on images that another held out.

    Raises DatasetError if the classes have too few images.
    """
    sizes = np.bincount(source.labels, minlength=len(source.class_names))
    most = int(np.maximum(sizes - 1, 0).sum())
    if not 1 <= count <= most:
        raise DatasetError(
            f"{count} images to hold out of {len(source)} in {len(sizes)} classes; expected 1 to {most}, so that each "
            "class keeps one for training"
        )
    # Unlike the newer generators, NumPy guarantees that this one gives the same numbers in all future versions.
    random = np.random.RandomState(0)
    shares = _shares(sizes, count, random.permutation(len(sizes)))
    order = random.permutation(len(source))
    order = order[np.argsort(source.labels[order], kind="stable")]
    number_in_class = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(len(source), bool)
    chosen[order[number_in_class < shares[source.labels[order]]]] = True
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def _shares(sizes: np.ndarray, count: int, order: np.ndarray) -> np.ndarray:
    """How many images each class gives; `order` decides which classes give one more if `count` leaves a remainder."""
    available = np.maximum(sizes - 1, 0)
    shares = np.zeros_like(sizes)
    while (missing := count - int(shares.sum())) > 0:
        able = order[shares[order] < available[order]]
        each = max(missing // len(able), 1)
        able = able[:missing]  # all of them, unless there is less than one each
        shares[able] = np.minimum(shares[able] + each, available[able])
    return shares
