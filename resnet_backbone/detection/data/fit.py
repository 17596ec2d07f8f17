"""Whether data sets fit the configuration, and the numbers of classes and keypoints that it takes from them."""

import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset

from resnet_backbone.data.errors import some
from resnet_backbone.detection.data.datasets import objects_of
from resnet_backbone.engine.config import ConfigError, get_key, origin, set_key

logger = logging.getLogger(__name__)

Records = list[dict[str, Any]]

WORDS = {
    "thing_classes": "categories",
    "stuff_classes": "semantic classes",
    "keypoint_names": "keypoints",
}
COCO_KEYPOINTS = 17


def counted_keys(cfg: CfgNode) -> dict[str, str]:
    """Return the keys that count something in the data, with what they count: a name in Detectron2's metadata."""
    architecture, keys = cfg.MODEL.META_ARCHITECTURE, {}
    if architecture == "RetinaNet":
        keys["MODEL.RETINANET.NUM_CLASSES"] = "thing_classes"
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = "thing_classes"
        if cfg.MODEL.KEYPOINT_ON:
            keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = "keypoint_names"
    if needs_semantic_labels(cfg):
        keys["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = "stuff_classes"
    return keys


def needs_semantic_labels(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor")


def check_same_names(cfg: CfgNode, entries: Sequence[str]) -> None:
    """Raise ConfigError if the data sets do not have the same classes, and keypoints, in the same order."""
    for attribute in dict.fromkeys(("thing_classes", *counted_keys(cfg).values())):
        names = {entry: list(MetadataCatalog.get(entry).get(attribute, ())) for entry in entries}
        reference = entries[0]
        for entry, found in names.items():
            if found != names[reference]:
                raise ConfigError(
                    f"{reference} and {entry} have different {WORDS[attribute].replace('categories', 'classes')}: "
                    f"{_some(names[reference])} against {_some(found)}. Give both the same, in the same order."
                )


def fill_counts(cfg: CfgNode, entry: str) -> None:
    """Set each number of classes or keypoints from the data set `entry`, or compare it if the user set it.

    Raises:
        ConfigError: a number that the user set differs from the data.
    """
    for key, attribute in counted_keys(cfg).items():
        names = list(MetadataCatalog.get(entry).get(attribute, ()))
        by = origin(cfg, key)
        if not names:  # a registered data set need not name them
            continue
        if by is None:
            set_key(cfg, key, len(names), f"{WORDS[attribute]} of {entry}")
            logger.info("%s is %d, from the %s of %s", key, len(names), WORDS[attribute], entry)
        elif get_key(cfg, key) != len(names):
            raise ConfigError(
                f"{_stated(cfg, key)}, but {entry} has {len(names)} {WORDS[attribute]} "
                f"({', '.join(names[:3])}{' …' if len(names) > 3 else ''}). Set {key} to {len(names)}, or leave it out."
            )


def check_annotations(cfg: CfgNode, entry: str, records: Records, *, training: bool) -> None:
    """Check that each object and image has what the configured heads need.

    Args:
        training: whether the data set is trained on, not only tested.

    Raises:
        ConfigError: masks, keypoints or semantic labels are missing.
    """
    objects = [annotation for record in records for annotation in objects_of(record)]
    if cfg.MODEL.MASK_ON:
        _check_masks(cfg, entry, objects, training=training)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, entry, objects, training=training)
    if needs_semantic_labels(cfg):
        lacking = sum("sem_seg_file_name" not in record for record in records)
        if lacking:
            raise ConfigError(
                f"{_stated(cfg, 'MODEL.META_ARCHITECTURE')}, "
                f"which learns from semantic labels, but {lacking} of {len(records)} images of {entry} have none "
                "(sem_seg_file_name). Register the data set in a script of yours, with Detectron2's load_sem_seg or "
                "register_coco_panoptic_separated, or choose an architecture for boxes."
            )


def _check_masks(cfg: CfgNode, entry: str, objects: Records, *, training: bool) -> None:
    if lacking := sum(_lacks(annotation, "segmentation") for annotation in objects):
        raise ConfigError(
            f"{_stated(cfg, 'MODEL.MASK_ON')}, but {lacking} of {len(objects)} objects of {entry} "
            "have no segmentation. Set MODEL.MASK_ON to False, or give masks for all."
        )
    if training and cfg.INPUT.MASK_FORMAT == "polygon":
        encoded = sum(not isinstance(annotation["segmentation"], list) for annotation in objects)
        if encoded:
            raise ConfigError(
                f"{_stated(cfg, 'INPUT.MASK_FORMAT')}, but {encoded} of "
                f"{len(objects)} masks of {entry} are no polygons. Set INPUT.MASK_FORMAT to bitmask."
            )


def _check_keypoints(cfg: CfgNode, entry: str, objects: Records, *, training: bool) -> None:
    metadata, on = MetadataCatalog.get(entry), _stated(cfg, "MODEL.KEYPOINT_ON")
    if lacking := sum(_lacks(annotation, "keypoints") for annotation in objects):
        raise ConfigError(
            f"{on}, but {lacking} of {len(objects)} objects of {entry} have no keypoints. Set MODEL.KEYPOINT_ON to "
            "False, or give keypoints for all."
        )
    names = metadata.get("keypoint_names")
    if not names or metadata.get("keypoint_flip_map") is None:
        raise ConfigError(
            f"{on}, but {entry} does not name its keypoints. Give its category the names in a list keypoints, as "
            "COCO's person_keypoints files do; for a data set that a script registers, set keypoint_names and "
            "keypoint_flip_map in its metadata."
        )
    if training and len(names) > 1 and not metadata.keypoint_flip_map and cfg.INPUT.RANDOM_FLIP == "horizontal":
        logger.warning(
            "%s: no two keypoints (%s) are named as the left and the right one of a pair, so that a flip swaps none; "
            "if there are pairs, name them left_… and right_…, or set INPUT.RANDOM_FLIP to none",
            entry,
            some(names),
        )
    if wrong := next((a["keypoints"] for a in objects if len(a["keypoints"]) != 3 * len(names)), None):
        raise ConfigError(
            f"{entry} names {len(names)} keypoints, so an object has {3 * len(names)} numbers in keypoints, but one "
            f"has {len(wrong)}. Correct either."
        )
    if not any(visible > 0 for annotation in objects for visible in annotation["keypoints"][2::3]):
        raise ConfigError(f"{on}, but not one keypoint of {entry} is marked as labeled (each third number above 0).")


def check_ground_truth(cfg: CfgNode, entry: str) -> None:
    """Check that all annotations of a test set's COCO file have the masks and keypoints that its evaluation compares.

    Training needs them for objects only, the evaluation for crowd regions too.
    """
    metadata = MetadataCatalog.get(entry)
    file = Path(metadata.get("json_file") or "")
    wanted = ("segmentation",) * cfg.MODEL.MASK_ON + ("keypoints",) * cfg.MODEL.KEYPOINT_ON
    if not wanted or metadata.get("evaluator_type", "coco") != "coco" or not file.is_file():
        return
    annotations = json.loads(file.read_bytes()).get("annotations", [])
    for name in wanted:
        if lacking := sum(_lacks(annotation, name) for annotation in annotations):
            raise ConfigError(
                f"{lacking} of {len(annotations)} annotations of {entry} have no {name}, which COCO's evaluation "
                "needs. Add it, or leave DATASETS.TEST empty to train without evaluation."
            )


def check_sigmas(cfg: CfgNode) -> None:
    """Check that TEST.KEYPOINT_OKS_SIGMAS has a number for each keypoint."""
    if not cfg.MODEL.KEYPOINT_ON or not cfg.DATASETS.TEST:
        return
    given, wanted = len(cfg.TEST.KEYPOINT_OKS_SIGMAS), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if given != wanted and (given or wanted != COCO_KEYPOINTS):
        found = f"has {given} numbers ({origin(cfg, 'TEST.KEYPOINT_OKS_SIGMAS') or 'default'})" if given else "is empty"
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS {found}, but there are {wanted} keypoints "
            f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS). Give {wanted}, one for each: how precisely it can be located, "
            f"for COCO's {COCO_KEYPOINTS} from 0.025 (eyes) to 0.107 (hips)."
        )


def check_proposals(cfg: CfgNode, suffix: str, records: dict[str, Records]) -> None:
    """Check DATASETS.PROPOSAL_FILES_TRAIN or _TEST against the data sets that they belong to.

    Args:
        suffix: TRAIN or TEST.
        records: the images of each entry of DATASETS.TRAIN or TEST.
    """
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" and not cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            f"{_stated(cfg, 'MODEL.PROPOSAL_GENERATOR.NAME')}, but "
            "MODEL.LOAD_PROPOSALS is False. Set it to True, and DATASETS.PROPOSAL_FILES_TRAIN and PROPOSAL_FILES_TEST "
            "to the files."
        )
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    key = f"DATASETS.PROPOSAL_FILES_{suffix}"
    entries, files = get_key(cfg, f"DATASETS.{suffix}"), get_key(cfg, key)
    if entries and len(files) != len(entries):
        raise ConfigError(
            f"{_stated(cfg, 'MODEL.LOAD_PROPOSALS')}, but {key} has {len(files)} files for "
            f"the {len(entries)} data sets of DATASETS.{suffix}. Give one for each."
        )
    for entry, file in zip(entries, files, strict=False):
        try:
            load_proposals_into_dataset([dict(record) for record in records[entry]], file)
        except OSError as error:
            raise ConfigError(f"{key}: {file} cannot be read ({error.strerror or error}).") from error
        except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{key}: {file} does not hold proposals for every image of {entry} ({type(error).__name__}: {error}). "
                "Expected a pickled dictionary with ids, boxes and objectness_logits, as Detectron2 writes it."
            ) from error


def _lacks(annotation: dict[str, Any], name: str) -> bool:
    return annotation.get(name) is None or len(annotation[name]) == 0


def _stated(cfg: CfgNode, key: str) -> str:
    """Say what a key is and who set it."""
    return f"{key} is {get_key(cfg, key)} ({origin(cfg, key) or 'default'})"


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)})"
