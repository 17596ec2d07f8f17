"""Data sets by Detectron2 name or by path, opened and checked before training."""

import contextlib
import difflib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.colormap import colormap

from resnet_backbone.data.decode import looks_whole, read_ends, too_long
from resnet_backbone.data.errors import nearest_existing
from resnet_backbone.data.report import Kind
from resnet_backbone.detection.data import annotations, coco_file, folders
from resnet_backbone.detection.data.annotations import Found
from resnet_backbone.detection.data.mapper import of_a_data_set, read_image
from resnet_backbone.engine.config import ConfigError

logger = logging.getLogger(__name__)

FORMS = (
    "Give a registered name, a COCO file as FILE.json (images in the folder images beside it) or FILE.json:IMAGES, or "
    "a folder in PASCAL VOC's or YOLO's layout as FOLDER or FOLDER:SPLIT."
)


# Detectron2's and pycocotools' readers raise these when a list, key, category or element is missing.
_FROM_READERS = (KeyError, IndexError, AssertionError, TypeError, AttributeError, ValueError, ElementTree.ParseError)
CLASS_NUMBER = Kind("class_number", True, "annotations without a class's number")


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
    pairs = [(name, _on_the_right(name)) for name in names]
    colors = colormap(rgb=True).astype(int).tolist()
    # The skeleton counts from 1.
    bones = [(names[a - 1], names[b - 1]) for a, b in found[0].get("skeleton") or []]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [(name, right) for name, right in pairs if right != name and right in names],
        "keypoint_connection_rules": [(*bone, tuple(colors[n % len(colors)])) for n, bone in enumerate(bones)],
    }


def _on_the_right(name: str) -> str:
    """Return a keypoint's name with its left side, as in left_eye, Left Eye, l_eye or eye.L, made right."""
    for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
        if left in name:
            return name.replace(left, right)
    alone = r"(?<![^\W_])[lL](?![^\W_])"  # no letter or digit on either side
    return re.sub(alone, lambda found: {"l": "r", "L": "R"}[found[0]], name)


def coco_json(entry: str) -> Path | None:
    """Return the COCO file of a registered data set that is read as one, if it is there."""
    metadata = MetadataCatalog.get(entry)
    file = Path(metadata.get("json_file") or "")
    coco = metadata.get("evaluator_type", "coco") in ("coco", "coco_panoptic_seg")
    return file if coco and file.is_file() else None


@contextlib.contextmanager
def explained(entry: str) -> Iterator[None]:
    """Turn what readers of a data set raise into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the data set {entry} does not open ({' '.join(str(error).split())}). Registered data sets are looked "
            "for under the environment variable DETECTRON2_DATASETS, else under ./datasets."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: too deep
        raise ConfigError(
            f"the data set {entry} is not a complete JSON file ({error}). Expected a COCO file."
        ) from error
    except ConfigError:
        raise
    except _FROM_READERS as error:
        detail = " ".join(str(error.args[0] if error.args else "").split())
        metadata = MetadataCatalog.get(entry)
        if metadata.get("evaluator_type") == "pascal_voc" and "dirname" in metadata.as_dict():
            folder = f"{metadata.dirname}:{metadata.split}"
            raise ConfigError(
                f"the data set {entry} is not in PASCAL VOC's form ({type(error).__name__}: {detail}). Each annotation "
                f"in {metadata.dirname} has a size, and objects of the registered classes alone; a split has more than "
                f"one image. tools/check_dataset.py {folder} names a fault by file and line. {folder} can also take "
                "the data set's place, and may have other classes."
            ) from error
        raise ConfigError(
            f"the data set {entry} is not in COCO form ({type(error).__name__}: {detail}). A COCO file holds images, "
            "annotations and categories, and each annotation one of these categories."
        ) from error


def check(cfg: CfgNode, entry: str) -> list[dict[str, Any]]:
    """Open a data set and return its images; log what in its annotations is tolerated, and how often.

    Raises:
        ConfigError: it is empty, incomplete or not in COCO's form, or has annotations that cannot be used.
    """
    register(entry, cfg.OUTPUT_DIR)
    tolerated: Counter[str] = Counter()
    with explained(entry):
        if (file := coco_json(entry)) is not None:
            tolerated = coco_file.check(entry, file)
        dicts = DatasetCatalog.get(entry)
    if not dicts:
        raise ConfigError(f"the data set {entry} has no images.")
    tolerated |= _check_dicts(entry, dicts)
    for words, count in tolerated.items():
        logger.info("%s: %d %s", entry, count, words)
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor" and not any(objects_of(record) for record in dicts):
        raise ConfigError(
            f"the data set {entry} has {len(dicts)} images but not one annotated object. Crowd regions and difficult "
            "objects do not count."
        )
    files = [record["file_name"] for record in dicts]
    files += [record["sem_seg_file_name"] for record in dicts if "sem_seg_file_name" in record]
    if missing := missing_files(files):
        raise ConfigError(
            f"{len(missing)} of {len(files)} images of {entry} do not exist, or are no regular files, for instance "
            f"{missing[0]}. Put them there, remove them from the annotations, or name another folder as "
            "FILE.json:IMAGES."
        )
    return dicts


def _check_dicts(entry: str, records: list[dict[str, Any]]) -> Counter[str]:
    """Check images and annotations in Detectron2's form; return how many there are of each kind that is tolerated.

    Raises:
        ConfigError: an image's shape or an annotation cannot be used.
    """
    for record in records:
        if "width" in record and (found := too_long(record["width"], record["height"])):
            raise ConfigError(f"{entry}: the image {record['file_name']} has {found}. Remove or cut it.")
    items, owners = annotations_of(records)
    found = find_in_records(entry, records, items, owners)
    return annotations.check(items, found, entry=entry, name=namer(records, owners))


def namer(records: Sequence[dict[str, Any]], owners: np.ndarray) -> Callable[[int], str]:
    """Return a function that gives words for an annotation by its index; `owners` as `annotations_of` gives them."""

    def name(index: int) -> str:
        owner = int(owners[index])
        number = index - int(np.searchsorted(owners, owner)) + 1
        return f"object {number} of {records[owner]['file_name']}"

    return name


def annotations_of(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the annotations of all images, and the place of each one's image in `records`."""
    items = [annotation for record in records for annotation in record.get("annotations", ())]
    return items, np.repeat(np.arange(len(records)), [len(record.get("annotations", ())) for record in records])


def find_in_records(
    entry: str, records: Sequence[dict[str, Any]], items: Sequence[dict[str, Any]], owners: np.ndarray
) -> Iterator[Found]:
    """Yield what is wrong or unusual with the annotations of a registered data set, in Detectron2's form.

    Args:
        items, owners: what `annotations_of(records)` gives.
    """
    sizes = np.array([(r.get("width", np.inf), r.get("height", np.inf)) for r in records], dtype=np.float64)
    classes = len(MetadataCatalog.get(entry).get("thing_classes", ()))
    modes = [annotation.get("bbox_mode") for annotation in items]
    categories = [annotation.get("category_id") for annotation in items]
    if set(map(type, categories)) != {int} or not 0 <= min(categories) <= max(categories) < (classes or np.inf):
        for index, category in enumerate(categories):
            if not (isinstance(category, Integral) and 0 <= int(category) < (classes or np.inf)):
                words = f"has the category_id {annotations.shortened(category)}; expected a class's number, from 0"
                yield Found(index, CLASS_NUMBER, words)
    yield from annotations.find(items, sizes[owners], modes=modes)


def check_images_are_whole(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Raise DatasetError for a cut-off image, which would end an evaluation hours later; training may skip it.

    Only images without an end mark are decoded, so thousands take a second.
    """
    for file in (record["file_name"] for record in records):
        if not os.path.isfile(file):
            continue
        with open(file, "rb") as opened:
            whole = looks_whole(*read_ends(opened.fileno()))
        if not whole:
            with of_a_data_set():
                read_image(file, cfg.INPUT.FORMAT)


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


def missing_files(files: Sequence[str]) -> list[str]:
    """Return names that are no regular files (opening a FIFO would wait forever), or do not exist.

    Listing each folder once is thousands of times faster on a network disk.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in listed:
            listed[folder] = _regular_files(folder or ".")
        if name not in listed[folder] and "://" not in file:
            missing.append(file)
    return missing


def _regular_files(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    found = sorted(p.name for p in path.parent.glob("*.json"))
    return f"Its folder has {', '.join(found[:5])}." if found else f"The folder {path.parent} has no .json file."
