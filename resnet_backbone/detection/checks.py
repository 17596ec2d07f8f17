"""Checks that can stop a detection run before its first iteration, except for those on its weights."""

import difflib
import logging

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from resnet_backbone.detection.config import get_config
from resnet_backbone.detection.data import datasets, fit
from resnet_backbone.detection.weights import OWN_BACKBONES, is_own
from resnet_backbone.engine.config import ConfigError, flatten, get_key, origin, said
from resnet_backbone.weights import Checkpoint

logger = logging.getLogger(__name__)

REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}


def check_names(cfg: CfgNode) -> None:
    """Check registered names and suggest the closest match up front; Detectron2 looks names up only while building."""
    values = dict(flatten(cfg))
    for key, registry in REGISTRIES.items():
        names = [name for name, _ in registry]
        # Names that stand for none: what gives proposals, and the box head, which C4 does without.
        none = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals", "MODEL.ROI_BOX_HEAD.NAME": ""}
        if values[key] not in (*names, none.get(key)):
            near = difflib.get_close_matches(values[key], names, n=1, cutoff=0.0)
            raise ConfigError(f"{said(cfg, key)}, which is not registered; the nearest is {near[0]}.")


def check_network_keys(cfg: CfgNode) -> None:
    """Reject keys of MODEL.NETWORK for a model of Detectron2's own parts, which do not read them."""
    own_parts = (cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME)
    if is_own(cfg) or "NetworkRes5ROIHeads" in own_parts or "VGGBoxHead" in own_parts:
        return
    defaults = get_config()
    for name in ("NAME", "WIDTH", "SHORTCUT", "ZERO_INIT_LAST_NORM", "POOL5"):
        key = f"MODEL.NETWORK.{name}"
        if get_key(cfg, key) != get_key(defaults, key):
            raise ConfigError(
                f"{key} is {get_key(cfg, key)} ({origin(cfg, key)}), but MODEL.BACKBONE.NAME is "
                f"{cfg.MODEL.BACKBONE.NAME}, which does not read it. Set MODEL.BACKBONE.NAME to one of "
                f"{', '.join(OWN_BACKBONES)}, or leave {key} out."
            )


def check_test_keys(cfg: CfgNode) -> None:
    """Reject test-time augmentation for models that Detectron2 cannot do it for, and results expected of several."""
    if cfg.TEST.AUG.ENABLED:
        for key, wanted in (
            ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            ("MODEL.KEYPOINT_ON", False),
            ("MODEL.LOAD_PROPOSALS", False),
        ):
            if get_key(cfg, key) != wanted:
                raise ConfigError(
                    f"TEST.AUG.ENABLED is True ({origin(cfg, 'TEST.AUG.ENABLED')}), but Detectron2's test-time "
                    f"augmentation needs {key} {wanted}, and it is {get_key(cfg, key)}. Set TEST.AUG.ENABLED to False."
                )
    expected = cfg.TEST.EXPECTED_RESULTS
    if expected and len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"TEST.EXPECTED_RESULTS is about one data set, but DATASETS.TEST has {len(cfg.DATASETS.TEST)}. Name one."
        )


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Open all data sets, check that they fit the configuration and each other, and fill in what follows from them.

    Raises:
        ConfigError: a data set cannot be used, or a key contradicts it.
    """
    train, test = cfg.DATASETS.TRAIN if training else (), cfg.DATASETS.TEST
    if training and not train:
        raise ConfigError(f"DATASETS.TRAIN is empty. {datasets.FORMS}")
    opened = {}
    for entry in dict.fromkeys((*train, *test)):
        records = datasets.check(cfg, entry)
        logger.info("%s: %d images", entry, len(records))
        fit.check_annotations(cfg, entry, records, training=entry in train)
        if entry in test:
            fit.check_ground_truth(cfg, entry)
            datasets.check_images_are_whole(cfg, records)
        opened[entry] = records if cfg.MODEL.LOAD_PROPOSALS else []  # not to hold all data sets at once
    fit.check_same_names(cfg, list(opened))
    fit.fill_counts(cfg, next(iter(opened)))
    fit.check_sigmas(cfg)
    for suffix in ("TRAIN", "TEST") if training else ("TEST",):
        fit.check_proposals(cfg, suffix, opened)


def check_evaluable(cfg: CfgNode, weights: Checkpoint | None, file: str) -> None:
    """Check that --eval-only has a trained detector with the data's classes."""
    if not file:
        raise ConfigError("MODEL.WEIGHTS is empty, so --eval-only would test random weights. Name a checkpoint.")
    if weights is None:
        return
    if weights.metadata.kind == "classifier":
        raise ConfigError(
            f"{file} holds a classifier, but --eval-only needs a detector, written by tools/train_net.py."
        )
    theirs = list(weights.metadata.class_names)
    for entry in cfg.DATASETS.TEST:
        ours = list(MetadataCatalog.get(entry).get("thing_classes", ()))
        if theirs and ours and theirs != ours:
            raise ConfigError(
                f"the {len(theirs)} classes of {file} ({', '.join(theirs[:3])} …) are not the {len(ours)} of {entry} "
                f"({', '.join(ours[:3])} …). Evaluate on data with the same categories, in the same order."
            )
