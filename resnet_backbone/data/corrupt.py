"""What becomes of training images that cannot be read: the run stops, or others replace them."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resnet_backbone.data.errors import DatasetError
from resnet_backbone.errors import InputError

ON_CORRUPT = ("stop", "skip")

logger = logging.getLogger(__name__)

# First word of the key that replacements are drawn from; distinct from those of sampler.py's streams.
_REPLACEMENT = 4
# After this many unreadable images in a row, the data set is blamed instead of the image.
_ATTEMPTS = 20


def first_readable(
    load: Callable[[int], Any], index: int, *, size: int, seed: int, position: int
) -> tuple[Any, list[str]]:
    """Load image `index`, or another one if it is unreadable; return it and a sentence for each unreadable one.

    The other one is drawn from the seed, the position and the number of failures there, so a resumed run sees the same.

    Args:
        load: returns an image by its index, or raises DatasetError.
        size: number of images in the data set.

    Raises:
        DatasetError: many images in a row are unreadable.
    """
    unreadable = []
    while True:
        try:
            return load(index), unreadable
        except DatasetError as error:
            unreadable.append(str(error))
        if len(unreadable) == _ATTEMPTS:
            raise DatasetError(
                f"{_ATTEMPTS} images in a row, drawn at random, cannot be read; check the data set. The last one: "
                f"{unreadable[-1]}"
            )
        rng = np.random.default_rng((_REPLACEMENT, seed, position, len(unreadable)))
        index = int(rng.integers(size))


class CorruptCounter:
    """Counts, in the training process, the images that `first_readable` replaced in the loading processes.

    Call it for each batch. It logs each unreadable image once, and raises DatasetError when the replaced share of the
    images seen exceeds `limit`. The first ten never stop a run unless `limit` is 0, since a share of few images says
    little. Each process of a run counts its own images, from its own start.
    """

    TOLERATED = 10

    def __init__(self, limit: float) -> None:
        if not 0 <= limit < 1:
            raise InputError(f"the limit of unreadable images is {limit}; expected a share: at least 0, less than 1")
        self.limit = limit
        self.images = 0
        self.replaced = 0
        self._known: set[str] = set()

    def __call__(self, images: int, replaced: Sequence[str]) -> None:
        """Count a batch of `images` images, with a sentence for each one that was replaced."""
        self.images += images
        for sentence in replaced:
            self.replaced += 1
            if sentence not in self._known:
                self._known.add(sentence)
                logger.warning("%s. Another image replaced it; %d so far", sentence.rstrip("."), len(self._known))
        if self.replaced > max(self.limit * self.images, self.TOLERATED if self.limit else 0):
            raise DatasetError(
                f"{self.replaced} of the {self.images} images loaded so far could not be read and were replaced "
                f"({100 * self.replaced / self.images:.3g}%, {len(self._known)} different ones); the limit is "
                f"{100 * self.limit:.3g}%. The last one: {sentence.rstrip('.')}. Repair or remove them "
                "(tools/check_dataset.py finds them), or raise DATALOADER.MAX_CORRUPT"
            )
