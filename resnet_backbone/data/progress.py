"""A bar with progress and remaining time."""

from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm


def image_bar(images: Iterable | None = None, *, total: int, file: TextIO | None) -> tqdm:
    """Return a bar over images, to iterate over or to be updated.

    Args:
        file: where to show it; None: nowhere. In a log, nothing is shown of what is done within ten seconds.
    """
    on_terminal = file is not None and file.isatty()
    return tqdm(
        images,
        total=total,
        unit="image",
        file=file,
        disable=file is None,
        leave=False,
        delay=0 if on_terminal else 10,
        mininterval=0.2 if on_terminal else 10,
    )
