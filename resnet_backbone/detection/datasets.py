"""Data sets by Detectron2's names or as paths of COCO files, checked before they are trained on."""

import difflib
import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from resnet_backbone.engine.config import ConfigError, origin


def register(entry: str) -> None:
    """Make an entry of DATASETS.TRAIN or TEST known to Detectron2, under the entry itself as its name.

    Args:
        entry: a registered name (`coco_2014_train`, `voc_2007_trainval`), or `FILE.json:IMAGES` with a COCO file and its
            folder of images; `FILE.json` alone means the folder `images` beside it.

    Raises:
        ConfigError: no such name, file or folder, or the file is not in COCO form.
    """
    if entry in DatasetCatalog:
        return
    file, _, images = entry.partition(".json:")
    if not images and not entry.endswith(".json"):
        near = difflib.get_close_matches(entry, DatasetCatalog.list(), n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no data set {entry}; the nearest registered name is {near}. Give a registered name, FILE.json, or "
            "FILE.json:IMAGES for a COCO file and its folder of images."
        )
    path = Path(f"{file}.json" if images else entry)
    folder = Path(images) if images else path.parent / "images"
    if not path.is_file():
        raise ConfigError(f"there is no COCO file {path}. {_near(path)}")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of images {folder} for {path}; name it as {path}:IMAGES.")
    _check_coco_form(path)
    register_coco_instances(entry, {}, str(path), str(folder))


def check(cfg: CfgNode, entry: str) -> list[dict[str, Any]]:
    """Open a data set and return its images; raise ConfigError if it is empty or does not fit the configuration."""
    register(entry)
    try:
        dicts = DatasetCatalog.get(entry)
    except (OSError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"the data set {entry} does not open ({' '.join(str(error).split())}). Registered data sets are looked for under "
            "the environment variable DETECTRON2_DATASETS, else under ./datasets."
        ) from error
    if not dicts:
        raise ConfigError(f"the data set {entry} has no images.")
    if not any(record.get("annotations") for record in dicts):
        raise ConfigError(f"the data set {entry} has {len(dicts)} images but not one annotated object.")
    first = Path(dicts[0]["file_name"])
    if not first.is_file():
        raise ConfigError(f"the first image of {entry}, {first}, does not exist. Give its folder as FILE.json:IMAGES.")
    key, expected = num_classes(cfg)
    names = MetadataCatalog.get(entry).get("thing_classes", ())
    if key is not None and names and len(names) != expected:
        raise ConfigError(
            f"{key} is {expected} ({origin(cfg, key) or 'default'}), but {entry} has {len(names)} categories "
            f"({', '.join(names[:3])} …). Set {key} to {len(names)}."
        )
    return dicts


def num_classes(cfg: CfgNode) -> tuple[str | None, int]:
    """The key that holds the number of foreground classes for this architecture, and its value."""
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
                f"({len(names[reference])}) against {', '.join(classes[:3])} … ({len(classes)}). Give both the same categories."
            )


def _check_coco_form(path: Path) -> None:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a whole JSON file ({error}). Expected COCO annotations.") from error
    lacking = [key for key in ("images", "annotations", "categories") if key not in content]
    if not isinstance(content, dict) or lacking:
        raise ConfigError(f"{path} is not in COCO form: it lacks {', '.join(lacking) or 'a mapping'}.")
    known = {category["id"] for category in content["categories"]}
    unknown = {a["category_id"] for a in content["annotations"]} - known
    if unknown:
        raise ConfigError(
            f"{path} has annotations of categories {sorted(unknown)[:5]}, which its list of {len(known)} categories lacks."
        )


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    found = sorted(p.name for p in path.parent.glob("*.json"))
    return f"Its folder has {', '.join(found[:5])}." if found else f"The folder {path.parent} has no .json file."
