"""Data sets by Detectron2 name or COCO file path, checked before training."""

import difflib
import json
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from resnet_backbone.engine.config import ConfigError, origin


def register(entry: str) -> None:
    """Register an entry of DATASETS.TRAIN or TEST with Detectron2, using the entry itself as its name.

    Args:
        entry: a registered name (`coco_2014_train`, `voc_2007_trainval`), or `FILE.json:IMAGES` with a COCO file and
            its folder of images; `FILE.json` alone means the folder `images` beside it.

    Raises:
        ConfigError: there is no such name, file or folder.
    """
    if entry in DatasetCatalog:
        return
    file, _, images = entry.partition(".json:")
    if not images and not entry.endswith(".json"):
        near = difflib.get_close_matches(entry, DatasetCatalog.list(), n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no data set {entry}; the nearest registered name is {near}. Give a registered name, FILE.json, "
            "or FILE.json:IMAGES for a COCO file and its folder of images."
        )
    path = Path(f"{file}.json" if images else entry).expanduser()
    folder = Path(images).expanduser() if images else path.parent / "images"
    if not path.is_file():
        raise ConfigError(f"there is no COCO file {path}. {_near(path)}")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of images {folder} for {path}; name it as {path}:IMAGES.")
    register_coco_instances(entry, {}, str(path), str(folder))


def check(cfg: CfgNode, entry: str) -> list[dict[str, Any]]:
    """Open a data set and return its images; raise ConfigError if it is empty or does not fit the configuration."""
    register(entry)
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
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor" and not any(r.get("annotations") for r in dicts):
        raise ConfigError(f"the data set {entry} has {len(dicts)} images but not one annotated object.")
    if missing := _missing_images(dicts):
        raise ConfigError(
            f"{len(missing)} of {len(dicts)} images of {entry} do not exist, for instance {missing[0]}. Put them "
            "there, remove them from the annotations, or name another folder as FILE.json:IMAGES."
        )
    key, expected = num_classes(cfg)
    names = MetadataCatalog.get(entry).get("thing_classes", ())
    if key is not None and names and len(names) != expected:
        raise ConfigError(
            f"{key} is {expected} ({origin(cfg, key) or 'default'}), but {entry} has {len(names)} categories "
            f"({', '.join(names[:3])} …). Set {key} to {len(names)}."
        )
    return dicts


def class_names(entry: str) -> tuple[str, ...]:
    """Return a data set's category names in the order of the detector's outputs."""
    register(entry)
    if "thing_classes" not in MetadataCatalog.get(entry).as_dict():
        DatasetCatalog.get(entry)  # reading a COCO file sets its categories
    return tuple(MetadataCatalog.get(entry).thing_classes)


def num_classes(cfg: CfgNode) -> tuple[str | None, int]:
    """Return the config key for this architecture's number of foreground classes, and its value."""
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return None, 0


def check_same_classes(train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Raise ConfigError if the data sets do not have the same class names in the same order."""
    names = {entry: list(MetadataCatalog.get(entry).get("thing_classes", ())) for entry in (*train, *test)}
    reference = train[0]
    for entry, classes in names.items():
        if classes != names[reference]:
            raise ConfigError(
                f"{reference} and {entry} have different classes: {', '.join(names[reference][:3])} … "
                f"({len(names[reference])}) against {', '.join(classes[:3])} … ({len(classes)}). Give both the "
                "same categories."
            )


def _missing_images(dicts: list[dict[str, Any]]) -> list[str]:
    """Return missing image files. Listing each folder once is thousands of times faster on a network disk."""
    folders: dict[str, set[str]] = {}
    missing = []
    for file in (record["file_name"] for record in dicts):
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in folders[folder] and "://" not in file:
            missing.append(file)
    return missing


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    found = sorted(p.name for p in path.parent.glob("*.json"))
    return f"Its folder has {', '.join(found[:5])}." if found else f"The folder {path.parent} has no .json file."
