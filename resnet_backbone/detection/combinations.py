"""Check keys that are in their ranges one by one but not together; Detectron2 asserts them late or not at all."""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads

from resnet_backbone.detection.weights import is_own
from resnet_backbone.engine.config import ConfigError, flatten, said
from resnet_backbone.engine.ranges import SIDE, check_ranges, each, number, one_of, whole
from resnet_backbone.networks.norms import NORMS

# What `inference.options` puts around a two-stage detector: each key, and its value without the option.
TEST_OPTIONS = {
    "TEST.BOX_REFINEMENT": False,
    "TEST.BOX_VOTING": False,
    "TEST.MULTI_SCALE.MIN_SIZES": (),
    "TEST.FLIP": False,
    "TEST.ENSEMBLE": (),
}
_RCNN = ("GeneralizedRCNN", "PanopticFPN")
_PYRAMIDS = (
    "build_network_fpn_backbone",
    "build_network_retinanet_fpn_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)


def check_combinations(cfg: CfgNode) -> None:
    """Raise ConfigError, with the keys' names, for values that do not go together."""
    values = dict(flatten(cfg))  # looking at a key here is not reading it
    for check in (
        _check_sizes,
        _check_jitter,
        _check_copy_paste,
        _check_thresholds,
        _check_norms,
        _check_pyramid,
        _check_anchors,
        _check_heads,
        _check_context,
    ):
        check(cfg, values)
    check_test_options(cfg)


def _check_sizes(cfg: CfgNode, values: dict[str, Any]) -> None:
    tests = values["INPUT.MIN_SIZE_TEST"]
    for which, shorter in (("TRAIN", values["INPUT.MIN_SIZE_TRAIN"]), ("TEST", (tests,))):
        key = f"INPUT.MAX_SIZE_{which}"
        if values[key] < min(shorter):
            raise ConfigError(f"{said(cfg, key)}, below the shorter side: {said(cfg, f'INPUT.MIN_SIZE_{which}')}.")
    sides = values["INPUT.MIN_SIZE_TRAIN"]
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and (len(sides) != 2 or sides[0] > sides[1]):
        raise ConfigError(
            f"{said(cfg, 'INPUT.MIN_SIZE_TRAIN')}, expected the smallest and the largest side, since "
            f"{said(cfg, 'INPUT.MIN_SIZE_TRAIN_SAMPLING')}."
        )
    if values["INPUT.CROP.ENABLED"]:
        kind, size = values["INPUT.CROP.TYPE"], values["INPUT.CROP.SIZE"]
        item = whole(1) if kind.startswith("absolute") else number(above=0, at_most=1)
        if not each(item, 2).allows(size) or (kind == "absolute_range" and size[0] > size[1]):
            ordered = ", in ascending order" if kind == "absolute_range" else ""
            raise ConfigError(
                f"{said(cfg, 'INPUT.CROP.SIZE')}, expected {each(item, 2).words}{ordered}, since "
                f"{said(cfg, 'INPUT.CROP.TYPE')}."
            )


def _check_jitter(cfg: CfgNode, values: dict[str, Any]) -> None:
    enabled = "INPUT.SCALE_JITTER.ENABLED"
    if not values[enabled]:
        return
    low, high = values["INPUT.SCALE_JITTER.RANGE"]
    if low > high:
        raise ConfigError(f"{said(cfg, 'INPUT.SCALE_JITTER.RANGE')}, expected the smallest and the largest factor.")
    if not SIDE.allows(math.ceil(high * values["INPUT.SCALE_JITTER.SIZE"])):
        raise ConfigError(
            f"{said(cfg, 'INPUT.SCALE_JITTER.SIZE')} and {said(cfg, 'INPUT.SCALE_JITTER.RANGE')}, which resize images "
            f"to {high * values['INPUT.SCALE_JITTER.SIZE']:.0f} pixels, expected {SIDE.words}."
        )
    if values["INPUT.CROP.ENABLED"]:
        raise ConfigError(
            f"{said(cfg, 'INPUT.CROP.ENABLED')} and {said(cfg, enabled)}, which crops by itself. Set one to False."
        )
    if values["MODEL.META_ARCHITECTURE"] in ("PanopticFPN", "SemanticSegmentor"):
        raise ConfigError(
            f"{said(cfg, enabled)}, but {said(cfg, 'MODEL.META_ARCHITECTURE')}, whose semantic labels have no class "
            "for the padding. Set it to False."
        )


def _check_copy_paste(cfg: CfgNode, values: dict[str, Any]) -> None:
    if values["INPUT.COPY_PASTE"] == 0:
        return
    for key, wanted, why in (
        ("INPUT.SCALE_JITTER.ENABLED", True, "both images must have the same size"),
        ("MODEL.MASK_ON", True, "objects are cut out by their masks"),
        ("INPUT.MASK_FORMAT", "bitmask", "what is left of a covered object need not be a polygon"),
        ("MODEL.KEYPOINT_ON", False, "covered keypoints would count as visible"),
        ("MODEL.LOAD_PROPOSALS", False, "there are none for the pasted objects"),
    ):
        if values[key] != wanted:
            raise ConfigError(f"{said(cfg, 'INPUT.COPY_PASTE')}, but {said(cfg, key)}: {why}. Set {key} to {wanted}.")


def _check_thresholds(cfg: CfgNode, values: dict[str, Any]) -> None:
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = f"MODEL.{part}.IOU_THRESHOLDS", f"MODEL.{part}.IOU_LABELS"
        if len(values[labels]) != len(values[thresholds]) + 1:
            raise ConfigError(
                f"{said(cfg, labels)} and {said(cfg, thresholds)}, expected one label more than thresholds: one for "
                "overlaps below the first and one from each threshold on."
            )


def _check_norms(cfg: CfgNode, values: dict[str, Any]) -> None:
    if is_own(cfg):
        check_ranges(cfg, {"MODEL.RESNETS.NORM": one_of(*NORMS)})
    channels = [("MODEL.FPN.NORM", "MODEL.FPN.OUT_CHANNELS", values["MODEL.BACKBONE.NAME"] in _PYRAMIDS)]
    channels += [("MODEL.RETINANET.NORM", "MODEL.FPN.OUT_CHANNELS", values["MODEL.META_ARCHITECTURE"] == "RetinaNet")]
    segments = values["MODEL.META_ARCHITECTURE"] in ("PanopticFPN", "SemanticSegmentor")
    channels += [("MODEL.SEM_SEG_HEAD.NORM", "MODEL.SEM_SEG_HEAD.CONVS_DIM", segments)]
    for head, used in (("BOX", values["MODEL.ROI_BOX_HEAD.NUM_CONV"] > 0), ("MASK", values["MODEL.MASK_ON"])):
        rcnn = values["MODEL.META_ARCHITECTURE"] in _RCNN
        channels += [(f"MODEL.ROI_{head}_HEAD.NORM", f"MODEL.ROI_{head}_HEAD.CONV_DIM", used and rcnn)]
    for norm, width, used in channels:
        if used and values[norm] == "GN" and values[width] % 32:
            raise ConfigError(f"{said(cfg, width)}, expected a multiple of 32, since {said(cfg, norm)}.")


def _check_pyramid(cfg: CfgNode, values: dict[str, Any]) -> None:
    if values["MODEL.BACKBONE.NAME"] not in _PYRAMIDS:
        return
    given, offered = values["MODEL.FPN.IN_FEATURES"], values["MODEL.RESNETS.OUT_FEATURES"]
    if not given or not set(given) <= set(offered):
        raise ConfigError(
            f"{said(cfg, 'MODEL.FPN.IN_FEATURES')}, expected one or more of {said(cfg, 'MODEL.RESNETS.OUT_FEATURES')}, "
            f"since {said(cfg, 'MODEL.BACKBONE.NAME')}."
        )


def _check_anchors(cfg: CfgNode, values: dict[str, Any]) -> None:
    if values["MODEL.META_ARCHITECTURE"] == "RetinaNet":
        features = "MODEL.RETINANET.IN_FEATURES"
    elif values["MODEL.PROPOSAL_GENERATOR.NAME"] in ("RPN", "RRPN"):
        features = "MODEL.RPN.IN_FEATURES"
    else:
        return
    levels = len(values[features])
    names = ("SIZES", "ASPECT_RATIOS", "ANGLES") if "Rotated" in values["MODEL.ANCHOR_GENERATOR.NAME"] else None
    counts = [1] * levels
    for name in names or ("SIZES", "ASPECT_RATIOS"):
        key = f"MODEL.ANCHOR_GENERATOR.{name}"
        lists = values[key] if isinstance(values[key][0], Sequence) else [values[key]]
        if len(lists) not in (1, levels):
            raise ConfigError(f"{said(cfg, key)}, expected 1 list or {levels}, one for each of {said(cfg, features)}.")
        counts = [count * len(lists[level % len(lists)]) for level, count in enumerate(counts)]
    if len(set(counts)) > 1:
        keys = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
        raise ConfigError(
            f"{said(cfg, keys[0])} and {said(cfg, keys[1])}, which give {', '.join(map(str, counts))} anchors for each "
            "position of the feature levels, expected the same number on all."
        )


def _check_heads(cfg: CfgNode, values: dict[str, Any]) -> None:
    name = values["MODEL.ROI_HEADS.NAME"]
    if values["MODEL.META_ARCHITECTURE"] not in _RCNN or not name:
        return
    heads = ROI_HEADS_REGISTRY.get(name)
    heads = heads if isinstance(heads, type) else object
    chosen, rotated = said(cfg, "MODEL.ROI_HEADS.NAME"), issubclass(heads, RROIHeads)
    lacking = {"KEYPOINT": issubclass(heads, (Res5ROIHeads, RROIHeads)), "MASK": rotated}
    for head, lacks in lacking.items():
        if lacks and values[f"MODEL.{head}_ON"]:
            raise ConfigError(
                f"{said(cfg, f'MODEL.{head}_ON')}, but {chosen}, which has no head for it. Set it to False, or "
                "take a feature pyramid (MODEL.BACKBONE.NAME) and MODEL.ROI_HEADS.NAME StandardROIHeads."
            )
    pooler = "MODEL.ROI_BOX_HEAD.POOLER_TYPE"
    if rotated != (values[pooler] == "ROIAlignRotated"):
        kind = "ROIAlignRotated" if rotated else "one for boxes that are not rotated, such as ROIAlignV2"
        raise ConfigError(f"{said(cfg, pooler)}, but {chosen}, expected {kind}.")
    if issubclass(heads, Res5ROIHeads):
        if len(values["MODEL.ROI_HEADS.IN_FEATURES"]) != 1:
            raise ConfigError(f"{said(cfg, 'MODEL.ROI_HEADS.IN_FEATURES')}, but {chosen}, which takes one feature.")
    elif not values["MODEL.ROI_BOX_HEAD.NAME"]:
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.NAME is empty, but {chosen}, which needs a box head. Set it to FastRCNNConvFCHead, or "
            "to VGGBoxHead over a VGG."
        )
    elif values["MODEL.ROI_BOX_HEAD.NAME"] == "FastRCNNConvFCHead" and not (
        values["MODEL.ROI_BOX_HEAD.NUM_FC"] + values["MODEL.ROI_BOX_HEAD.NUM_CONV"]
    ):
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0, but FastRCNNConvFCHead needs at least one layer. Set "
            "NUM_FC to 2, as in Detectron2's feature pyramids."
        )
    if issubclass(heads, CascadeROIHeads):
        _check_cascade(cfg, values)


def _check_context(cfg: CfgNode, values: dict[str, Any]) -> None:
    key, heads = "MODEL.ROI_HEADS.GLOBAL_CONTEXT", "MODEL.ROI_HEADS.NAME"
    if not values[key]:
        return
    if values["MODEL.META_ARCHITECTURE"] not in _RCNN:
        reason = f"{said(cfg, 'MODEL.META_ARCHITECTURE')}, which has no RoI heads"
    elif values[heads] != "NetworkRes5ROIHeads":
        reason = f"{said(cfg, heads)}; the whole image goes through conv5_x, which NetworkRes5ROIHeads has"
    else:
        return
    raise ConfigError(f"{said(cfg, key)}, but {reason}. Set {key} to False.")


def check_test_options(cfg: CfgNode) -> None:
    """Raise ConfigError if a test-time option of the ResNet paper is on for a detector that cannot have it."""
    values = dict(flatten(cfg))
    for key, without in TEST_OPTIONS.items():
        if not values[key]:
            continue
        off = f"Set {key} to {without}."
        if reason := why_no_options(cfg):
            raise ConfigError(f"{said(cfg, key)}, but {reason}. {off}")
        if values["TEST.AUG.ENABLED"]:
            raise ConfigError(
                f"{said(cfg, key)}, but {said(cfg, 'TEST.AUG.ENABLED')}, and Detectron2's test-time augmentation "
                f"merges boxes itself. {off}"
            )
        if key == "TEST.MULTI_SCALE.MIN_SIZES" and values["INPUT.MIN_SIZE_TEST"] == 0:
            raise ConfigError(
                f"{said(cfg, key)}, but {said(cfg, 'INPUT.MIN_SIZE_TEST')}, so that images keep their own sizes. {off}"
            )


def why_no_options(cfg: CfgNode) -> str | None:
    """Return why a detector can have none of TEST_OPTIONS; None if it can."""
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return f"{said(cfg, 'MODEL.META_ARCHITECTURE')}; it needs GeneralizedRCNN, which Faster R-CNN is"
    name = cfg.MODEL.ROI_HEADS.NAME
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    if (
        isinstance(heads, type)
        and issubclass(heads, (Res5ROIHeads, StandardROIHeads))
        and not issubclass(heads, (CascadeROIHeads, RROIHeads))
    ):
        return None
    return f"{said(cfg, 'MODEL.ROI_HEADS.NAME')}; it needs heads of one stage and boxes that are not rotated"


def _check_cascade(cfg: CfgNode, values: dict[str, Any]) -> None:
    group = "MODEL.ROI_BOX_CASCADE_HEAD"
    overlaps, first = values[f"{group}.IOUS"], values["MODEL.ROI_HEADS.IOU_THRESHOLDS"][0]
    if len(overlaps) != len(values[f"{group}.BBOX_REG_WEIGHTS"]):
        raise ConfigError(
            f"{said(cfg, f'{group}.IOUS')} and {said(cfg, f'{group}.BBOX_REG_WEIGHTS')}, expected as many of one as of "
            "the other: one for each stage of the cascade."
        )
    if overlaps[0] != first:
        raise ConfigError(
            f"{said(cfg, f'{group}.IOUS')}, but {said(cfg, 'MODEL.ROI_HEADS.IOU_THRESHOLDS')}, expected the same first."
        )
    if not values["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"]:
        raise ConfigError(
            f"{said(cfg, 'MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG')}, but {said(cfg, 'MODEL.ROI_HEADS.NAME')}, whose "
            "stages refine one box for all classes. Set it to True."
        )
