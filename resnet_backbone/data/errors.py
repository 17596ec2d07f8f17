"""The exception for unusable data, and helpers for its messages."""

import difflib
import os
from pathlib import Path

from resnet_backbone.errors import InputError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


class DatasetError(InputError):
    """A data set or one of its images is unusable; the message says what was found and expected, and what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's exception in the main process, with the worker's full traceback as the only
        # argument. The sentence for the user is at its end.
        if message.startswith("Caught DatasetError in "):
            message = message.rpartition("DatasetError: ")[2].strip()
        super().__init__(message)


def some(names: list[str], limit: int = 5) -> str:
    """List the first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def content(folder: Path) -> str:
    """Describe a folder's contents in a few words that start with 'with'."""
    if not folder.is_dir():
        return "a file"
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    shards = [name for name in names if name.endswith(".tar")]
    if shards:
        return f"with {len(shards)} tar shards (name them as '{folder}/train-{{000000..000007}}.tar')"
    images = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
    if images:
        return f"with {len(images)} images directly in it"
    return f"with {some(names)} in it" if names else "with nothing in it"


def nearest_existing(path: Path) -> str:
    """Describe what exists instead, for the message about a missing path."""
    path = Path(os.path.abspath(path))
    parent = next(above for above in path.parents if above.exists())
    if parent != path.parent:
        return f"the nearest that exists is {parent}, {content(parent)}"
    names = [name for name in os.listdir(parent) if not name.startswith(".")] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"{parent} exists, {content(parent)}" + (f"; the nearest name is {near[0]!r}" if near else "")
