"""Sources of classification images: registered names, folders of class folders, tar shards, CIFAR-10's files.

A source knows each image's encoded bytes, label and name; it decodes nothing. `open_source` resolves an entry in a
config's data set list.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from resnet_backbone.data.cifar import CifarSource, is_cifar_folder, open_cifar
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.folders import FolderSource
from resnet_backbone.data.interface import ClassificationSource
from resnet_backbone.data.shards import ShardSource

__all__ = ["ClassificationSource", "DatasetError", "open_source", "register_source"]


_REGISTRY: dict[str, Callable[[Path], ClassificationSource]] = {}


def register_source(name: str, opener: Callable[[Path], ClassificationSource]) -> None:
    """Make `open_source(name)` call `opener(root)`, where `root` is the folder of all data sets."""
    _REGISTRY[name] = opener


def registered_names() -> list[str]:
    return sorted(_REGISTRY)


register_source("imagenet_train", lambda root: FolderSource(root / "imagenet" / "train"))
register_source("imagenet_val", lambda root: FolderSource(root / "imagenet" / "val"))
register_source("cifar10_train", lambda root: open_cifar(root, train=True))
register_source("cifar10_test", lambda root: open_cifar(root, train=False))


def open_source(entry: str | Path, *, root: str | Path | None = None) -> ClassificationSource:
    """Open a data set given a registered name, a tar-shard pattern or the path of a folder of class folders.

    Arguments:
        entry: `imagenet_train`, `imagenet_val`, `cifar10_train`, `cifar10_test` or another registered name;
            `'.../train-{000000..000007}.tar'` or one `.tar`; a folder; or `FOLDER/train` and `FOLDER/test` for CIFAR-10
            in a folder such as `cifar-10-batches-py`, which holds both parts.
        root: folder of all data sets, used only by registered names; defaults to the environment variable
            DETECTRON2_DATASETS, else `./datasets`.

    Raises a one-sentence DatasetError for any problem with the data set as a whole.
    """
    entry = os.path.expanduser(os.fspath(entry))
    if entry in _REGISTRY:
        root = Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
        try:
            return _REGISTRY[entry](root)
        except DatasetError as error:
            raise DatasetError(f"{entry}: {error} (DETECTRON2_DATASETS names the folder of all data sets)") from None
    if entry.endswith(".tar") or "{" in entry:
        return ShardSource(entry)
    folder, part = os.path.split(entry.rstrip("/"))
    if part in ("train", "test") and is_cifar_folder(folder) and not os.path.exists(entry):
        return CifarSource(folder, train=part == "train")
    if is_cifar_folder(entry):
        raise DatasetError(
            f"{entry} holds both parts of CIFAR-10; name one of them: {os.path.join(entry, 'train')} or "
            f"{os.path.join(entry, 'test')}"
        )
    if not os.path.exists(entry) and os.path.basename(entry) == entry:
        near = difflib.get_close_matches(entry, _REGISTRY, n=1)
        raise DatasetError(
            f"there is no data set {entry!r}: it is no registered name ({', '.join(registered_names())})"
            + (f", of which {near[0]!r} is the nearest," if near else "")
            + f" and {os.getcwd()} holds no folder of that name; give a name, a folder or a shard pattern"
        )
    return FolderSource(entry)
