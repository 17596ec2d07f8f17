"""Configuration keys of detection, in addition to Detectron2's."""

from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.config.defaults import _C

from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.engine.ranges import (
    CHANNELS,
    SIDE,
    TEXT,
    TEXTS,
    Range,
    each,
    either,
    number,
    one_of,
    whole,
)


def add_network_config(cfg: CfgNode) -> None:
    """Add the keys that this package reads to Detectron2's defaults: of `MODEL`, `SOLVER` and others.

    Where Detectron2 already has a key, we use it: MODEL.RESNETS.{STRIDE_IN_1X1, NORM, OUT_FEATURES},
    MODEL.BACKBONE.FREEZE_AT, MODEL.WEIGHTS, INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD.
    """
    add_engine_config(cfg)
    # Large-scale jitter in training, instead of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: fit the image into a square of SIZE
    # pixels times a factor drawn from RANGE, then crop or pad it to that square.
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.RANGE = (0.1, 2.0)
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    # Probability that objects of a second image are pasted onto a training image; needs masks and SCALE_JITTER.
    cfg.INPUT.COPY_PASTE = 0.0
    # Predict classes and boxes from a region's feature and the whole image's (ResNet paper, appendix B). It is trained.
    cfg.MODEL.ROI_HEADS.GLOBAL_CONTEXT = False
    # Test-time options of two-stage detectors (ResNet paper, appendix B), which evaluations and `load_detector` use.
    # BOX_REFINEMENT: the heads run again on the regressed boxes, and NMS on both results. BOX_VOTING: each detection's
    # box becomes the average of those around it, weighted by their scores.
    cfg.TEST.BOX_REFINEMENT = False
    cfg.TEST.BOX_VOTING = False
    # MULTI_SCALE: regions take their features from two adjacent ones of these shorter sides, those at which a region's
    # side, the root of its area, is around REGION_SIZE pixels. The paper's: (200, 400, 600, 800, 1000). Empty: off.
    cfg.TEST.MULTI_SCALE = CfgNode()
    cfg.TEST.MULTI_SCALE.MIN_SIZES = ()
    cfg.TEST.MULTI_SCALE.REGION_SIZE = 224
    # FLIP: average with what is found on the mirror image. ENSEMBLE: with what these checkpoints' detectors find.
    cfg.TEST.FLIP = False
    cfg.TEST.ENSEMBLE = ()


def add_to_defaults() -> None:
    """Add the same keys to Detectron2's own defaults, so that every `get_cfg()` of this process has them."""
    add_network_config(_C)


def get_config() -> CfgNode:
    """Return Detectron2's defaults plus this package's keys."""
    cfg = get_cfg()
    add_network_config(cfg)
    return cfg


_SHARE = number(at_least=0, at_most=1)
_WEIGHT = number(at_least=0)  # of a loss
_CLASSES = whole(1, 10**5)
_COUNT = whole(1, 10**6)  # of boxes
_NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_BOX_WEIGHTS = either(each(number(above=0), 4), each(number(above=0), 5))  # 5 for rotated boxes
_POOLER = one_of("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
_RESOLUTION = whole(1, 256)
_SAMPLES = whole(0, 64)
_THRESHOLDS = Range(
    "one or more overlaps above 0 and at most 1, in ascending order",
    lambda value: each(number(above=0, at_most=1)).allows(value) and list(value) == sorted(value),
)
_LABELS = each(one_of(-1, 0, 1))


def _per_level(item: Range) -> Range:
    """Return the range of anchor parameters: one list for all feature levels, or a list of lists, one for each."""
    return Range(
        f"lists such as [[32], [64]] or one list, not empty, of values each {item.words}",
        either(each(item), each(each(item))).allows,
    )


# What detection's keys may hold, in addition to `engine.ranges.RANGES`; together: `combinations`.
RANGES: dict[str, Range] = {
    "MODEL.BACKBONE.FREEZE_AT": whole(0, 100),
    "MODEL.FPN.IN_FEATURES": TEXTS,
    "MODEL.FPN.OUT_CHANNELS": CHANNELS,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": number(at_least=0),
    "MODEL.ANCHOR_GENERATOR.SIZES": _per_level(number(above=0, at_most=10**5)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _per_level(number(at_least=0.001, at_most=1000)),
    "MODEL.ANCHOR_GENERATOR.ANGLES": _per_level(number(at_least=-360, at_most=360)),
    "MODEL.ANCHOR_GENERATOR.OFFSET": number(at_least=0, below=1),
    "MODEL.RPN.IN_FEATURES": each(TEXT),
    "MODEL.RPN.BOUNDARY_THRESH": whole(-1),
    "MODEL.RPN.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": number(at_least=0),
    "MODEL.RPN.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.CONV_DIMS": each(either(one_of(-1), CHANNELS)),
    "MODEL.ROI_HEADS.NUM_CLASSES": _CLASSES,
    "MODEL.ROI_HEADS.IN_FEATURES": each(TEXT),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": number(at_least=0),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _SAMPLES,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_BOX_HEAD.NUM_FC": whole(0, 100),
    "MODEL.ROI_BOX_HEAD.FC_DIM": CHANNELS,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": whole(0, 100),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": each(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": each(number(above=0, at_most=1)),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _SAMPLES,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": whole(0, 100),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_MASK_HEAD.NORM": _NORM,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": _SAMPLES,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": each(CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": whole(1, 10**4),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": whole(0),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": each(TEXT),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": whole(-(2**31)),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _CLASSES,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": CHANNELS,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": one_of(1, 2, 4, 8, 16, 32),
    "MODEL.SEM_SEG_HEAD.NORM": _NORM,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _WEIGHT,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _WEIGHT,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": _SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": number(at_least=0),
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": _SHARE,
    "MODEL.RETINANET.NUM_CLASSES": _CLASSES,
    "MODEL.RETINANET.IN_FEATURES": each(TEXT),
    "MODEL.RETINANET.NUM_CONVS": whole(1, 100),
    "MODEL.RETINANET.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.RETINANET.IOU_LABELS": _LABELS,
    "MODEL.RETINANET.PRIOR_PROB": number(above=0, below=1),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _COUNT,
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": number(at_least=0),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": number(at_least=-1, at_most=1),  # below 0: none
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": number(at_least=0),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RETINANET.NORM": _NORM,
    "MODEL.RESNETS.OUT_FEATURES": each(TEXT),
    "MODEL.RESNETS.NORM": _NORM,
    "INPUT.MIN_SIZE_TRAIN": each(either(one_of(0), SIDE)),  # 0: as it is
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": SIDE,
    "INPUT.MIN_SIZE_TEST": either(one_of(0), SIDE),
    "INPUT.MAX_SIZE_TEST": SIDE,
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": each(number(above=0, at_most=16384), 2),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.SCALE_JITTER.RANGE": each(number(above=0, at_most=100), 2),
    "INPUT.SCALE_JITTER.SIZE": SIDE,
    "INPUT.COPY_PASTE": _SHARE,
    "DATASETS.PROPOSAL_FILES_TRAIN": TEXTS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _COUNT,
    "DATASETS.PROPOSAL_FILES_TEST": TEXTS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _COUNT,
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _SHARE,
    "TEST.EXPECTED_RESULTS": Range(
        "rows of task, metric, value, and tolerance, such as [['bbox', 'AP', 38.5, 0.2]]",
        lambda value: isinstance(value, (tuple, list)) and all(map(_is_result, value)),
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": each(number(above=0), empty=True),
    "TEST.DETECTIONS_PER_IMAGE": _COUNT,
    "TEST.MULTI_SCALE.MIN_SIZES": Range(
        "no or at least two whole numbers from 1 to 16384, in ascending order",
        lambda value: each(SIDE, empty=True).allows(value) and len(value) != 1 and sorted(set(value)) == list(value),
    ),
    "TEST.MULTI_SCALE.REGION_SIZE": number(above=0, at_most=16384),
    "TEST.ENSEMBLE": TEXTS,
    "TEST.AUG.MIN_SIZES": each(SIDE),
    "TEST.AUG.MAX_SIZE": SIDE,
    "VIS_PERIOD": whole(0),
}


def _is_result(row: Any) -> bool:
    kinds = (TEXT, TEXT, number(), number(at_least=0))
    return isinstance(row, (tuple, list)) and len(row) == 4 and all(k.allows(v) for k, v in zip(kinds, row))


# The keys that the training tool does not read, and why (`engine.unread`).
UNREAD = {
    "GLOBAL": "",
    "SOLVER.CUDA_GRAPH": "A detector's shapes change with every image, and a graph's cannot.",
    "SOLVER.REFERENCE_WORLD_SIZE": "Set SOLVER.REFERENCE_IMS_PER_BATCH, which rescales the schedule by the batch size.",
    "SOLVER.WARMUP_UNTIL_ERROR": "A detector has no training error. Set SOLVER.WARMUP_ITERS.",
}
