"""What an entry of DATASETS.TRAIN or TEST is, by its form: images to classify, or to detect objects in."""

import difflib
import importlib.util
import os
from pathlib import Path

from resnet_backbone.data.sources import registered_names


def is_voc(folder: Path) -> bool:
    """Whether a folder has PASCAL VOC's layout."""
    return (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir()


def is_yolo(folder: Path) -> bool:
    """Whether a folder has YOLO's layout."""
    return is_yolo_pair(folder) or bool(yolo_splits(folder))


def is_yolo_pair(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def yolo_splits(folder: Path) -> list[str]:
    """The splits of the layout `FOLDER/SPLIT/images`, `FOLDER/SPLIT/labels`."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_yolo_pair(path))


def is_detection(entry: str) -> bool:
    """Return whether an entry is detection's: a COCO file, a VOC or YOLO folder, or a name registered with Detectron2.

    A name that nobody knows is detection's, too, unless it resembles one of classification's, or there is no
    Detectron2.
    """
    path = os.path.expanduser(entry)
    if path.endswith(".json") or ".json:" in path:
        return True
    if path in registered_names() or path.endswith(".tar") or "{" in path:
        return False
    if os.path.isdir(path):
        return is_voc(Path(path)) or is_yolo(Path(path))
    if os.path.isdir(path.rpartition(":")[0]):
        return True
    unknown = os.sep not in path and not os.path.exists(path)
    return (
        unknown
        and not difflib.get_close_matches(path, registered_names(), n=1, cutoff=0.7)
        and importlib.util.find_spec("detectron2") is not None
    )
