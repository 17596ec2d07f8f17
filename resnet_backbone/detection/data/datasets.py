"""Data sets by Detectron2 name or by path, opened and checked before training."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.colormap import colormap

from resnet_backbone.data.errors import nearest_existing
from resnet_backbone.detection.data import folders
from resnet_backbone.engine.config import ConfigError

FORMS = (
    "Give a registered name, a COCO file as FILE.json (images in the folder images beside it) or FILE.json:IMAGES, or "
    "a folder in PASCAL VOC's or YOLO's layout as FOLDER or FOLDER:SPLIT."
)


def register(entry: str, output_dir: str | Path = "./output") -> None:
    """Register an entry of DATASETS.TRAIN or TEST with Detectron2, using the entry itself as its name.

    A second call does no harm: it converts a folder again if that has changed.

    Args:
        entry: a registered name (`coco_2014_train`); `FILE.json:IMAGES` with a COCO file and its folder of images;
            `FILE.json` alone, which means the folder `images` beside it; `FOLDER` or `FOLDER:SPLIT` in PASCAL VOC's
            or YOLO's layout.
        output_dir: the run's OUTPUT_DIR; a folder is converted to a COCO file in `output_dir/datasets`.

    Raises:
        ConfigError: there is no such name, file or folder, or the folder cannot be converted.
    """
    fingerprint = None
    if entry in DatasetCatalog:
        fingerprint = MetadataCatalog.get(entry).get("fingerprint")
        if fingerprint is None:  # not a folder
            return
    file, _, images = entry.partition(".json:")
    if images or entry.endswith(".json"):
        path = Path(f"{file}.json" if images else entry).expanduser()
        folder = Path(images).expanduser() if images else path.parent / "images"
        if not path.is_file():
            raise ConfigError(f"there is no COCO file {path}. {_near(path)}")
        if not folder.is_dir():
            raise ConfigError(f"there is no folder of images {folder} for {path}; name it as {path}:IMAGES.")
        _register_coco(entry, path, folder)
        return
    if (found := folders.find_folder(entry)) is None:
        if os.sep in entry:
            raise ConfigError(f"there is no data set {entry}: {nearest_existing(Path(entry).expanduser())}. {FORMS}")
        near = difflib.get_close_matches(entry, DatasetCatalog.list(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no data set {entry}; the nearest registered name is {near}. {FORMS}")
    path, new = folders.convert(*found, Path(output_dir) / "datasets")
    if fingerprint is not None:
        if (fingerprint, MetadataCatalog.get(entry).json_file) == (new, str(path)):
            return
        DatasetCatalog.remove(entry)
        MetadataCatalog.remove(entry)
    _register_coco(entry, path, found[0], fingerprint=new)


def _register_coco(entry: str, file: Path, images: Path, **metadata: Any) -> None:
    """Do what Detectron2's `register_coco_instances` does, and have the keypoints' names set on reading."""
    DatasetCatalog.register(entry, lambda: _load_coco(entry, file, images))
    MetadataCatalog.get(entry).set(json_file=str(file), image_root=str(images), evaluator_type="coco", **metadata)


def _load_coco(entry: str, file: Path, images: Path) -> list[dict[str, Any]]:
    dicts = load_coco_json(str(file), str(images), entry)
    if "keypoint_names" not in MetadataCatalog.get(entry).as_dict() and any(
        annotation.get("keypoints") for record in dicts for annotation in record["annotations"]
    ):
        MetadataCatalog.get(entry).set(**_keypoints(json.loads(file.read_bytes())["categories"]))
    return dicts


def _keypoints(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return Detectron2's metadata about keypoints from the categories that have any; empty unless they agree."""
    found = [category for category in categories if category.get("keypoints")]
    names = found[0]["keypoints"] if found else []
    if not names or any(category["keypoints"] != names for category in found):
        return {}
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    colors = colormap(rgb=True).astype(int).tolist()
    # The skeleton counts from 1.
    bones = [(names[a - 1], names[b - 1]) for a, b in found[0].get("skeleton") or []]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [(left, right) for left, right in pairs if right in names],
        "keypoint_connection_rules": [(*bone, tuple(colors[n % len(colors)])) for n, bone in enumerate(bones)],
    }


def check(cfg: CfgNode, entry: str) -> list[dict[str, Any]]:
    """Open a data set and return its images; raise ConfigError if it is empty, incomplete or not in COCO's form."""
    register(entry, cfg.OUTPUT_DIR)
    try:
        dicts = DatasetCatalog.get(entry)
    except OSError as error:
        raise ConfigError(
            f"the data set {entry} does not open ({' '.join(str(error).split())}). Registered data sets are looked "
            "for under the environment variable DETECTRON2_DATASETS, else under ./datasets."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the data set {entry} is not a complete JSON file ({error}). Expected a COCO file."
        ) from error
    except (KeyError, IndexError, AssertionError, TypeError, AttributeError, ValueError) as error:
        # Detectron2's and pycocotools' readers raise these when a list, key or category is missing.
        detail = " ".join(str(error.args[0] if error.args else "").split())
        raise ConfigError(
            f"the data set {entry} is not in COCO form ({type(error).__name__}: {detail}). A COCO file holds images, "
            "annotations and categories, and each annotation one of these categories."
        ) from error
    if not dicts:
        raise ConfigError(f"the data set {entry} has no images.")
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor" and not any(objects_of(record) for record in dicts):
        raise ConfigError(
            f"the data set {entry} has {len(dicts)} images but not one annotated object. Crowd regions and difficult "
            "objects do not count."
        )
    files = [record["file_name"] for record in dicts]
    files += [record["sem_seg_file_name"] for record in dicts if "sem_seg_file_name" in record]
    if missing := _missing(files):
        raise ConfigError(
            f"{len(missing)} of {len(files)} images of {entry} do not exist, for instance {missing[0]}. Put them "
            "there, remove them from the annotations, or name another folder as FILE.json:IMAGES."
        )
    return dicts


def objects_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations of an image that are trained on: all but crowd regions."""
    return [annotation for annotation in record.get("annotations", ()) if not annotation.get("iscrowd", 0)]


def class_names(entry: str, output_dir: str | Path = "./output") -> tuple[str, ...]:
    """Return a data set's category names in the order of the detector's outputs; the arguments are `register`'s."""
    register(entry, output_dir)
    if "thing_classes" not in MetadataCatalog.get(entry).as_dict():
        DatasetCatalog.get(entry)  # reading a COCO file sets its categories
    return tuple(MetadataCatalog.get(entry).thing_classes)


def file_name(entry: str) -> str:
    """Return a name for files about a data set: its own, or its file's or folder's."""
    if (found := folders.find_folder(entry)) is not None and "fingerprint" in MetadataCatalog.get(entry).as_dict():
        return folders.short_name(*found)
    return Path(entry.partition(".json:")[0]).stem


def _missing(files: list[str]) -> list[str]:
    """Return files that do not exist. Listing each folder once is thousands of times faster on a network disk."""
    listed: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder] and "://" not in file:
            missing.append(file)
    return missing


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    found = sorted(p.name for p in path.parent.glob("*.json"))
    return f"Its folder has {', '.join(found[:5])}." if found else f"The folder {path.parent} has no .json file."
