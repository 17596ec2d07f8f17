"""Configuration keys of pretraining, in addition to Detectron2's and the engine's.

Detectron2's keys keep their meaning: INPUT.MIN_SIZE_TRAIN is the range of the shorter side, INPUT.CROP.SIZE the crop,
INPUT.FORMAT the channel order, MODEL.PIXEL_MEAN and PIXEL_STD the normalization, MODEL.RESNETS.NORM the norm.
"""

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.data.transforms import CROP_TYPES
from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.engine.ranges import SIDE, TEXTS, Range, each, number, one_of, whole
from resnet_backbone.networks.norms import NORMS


def get_config() -> CfgNode:
    """Return Detectron2's defaults plus the engine's and pretraining's keys."""
    cfg = get_cfg()
    add_engine_config(cfg)
    # Number of outputs; 0: the number of classes in DATASETS.TRAIN.
    cfg.MODEL.NETWORK.NUM_CLASSES = 0
    # Standard deviation of the PCA color shift (ResNet paper, section 3.4: "the standard color augmentation", 0.1).
    cfg.INPUT.PCA_COLOR_STD = 0.0
    # CROP.TYPE padded (ResNet paper, section 4.2): black pixels added on each side before cropping.
    cfg.INPUT.CROP.PADDING = 4
    # CROP.TYPE random_resized: smallest and largest share of the image's area.
    cfg.INPUT.CROP.AREA = (0.08, 1.0)
    # Decode JPEGs at 1/2, 1/4 or 1/8 size when the region to crop stays large enough.
    cfg.INPUT.REDUCED_DECODING = True
    # Number of training images to hold out and test on instead of DATASETS.TEST (ResNet paper, section 4.2: 5,000 of
    # 50,000). The same images for all seeds.
    cfg.DATASETS.HOLD_OUT = 0
    # Where images are decoded and augmented: in worker processes ("workers"); on the device, with workers only reading
    # files ("device"); or on the device, which holds the whole data set ("resident").
    cfg.DATALOADER.PIPELINE = "workers"
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Crops to average predictions over: 1 (center) or 10 (center and corners, each also mirrored).
    cfg.TEST.CROPS = 1
    # Shorter sides at which to test the whole image, fully convolutionally, instead of crops (ResNet paper, section
    # 3.4).
    cfg.TEST.SCALES = ()
    # Additional checkpoints whose predictions are averaged with those of MODEL.WEIGHTS (--eval-only).
    cfg.TEST.ENSEMBLE = ()
    # Evaluation batch size over all processes; 0: same as in training.
    cfg.TEST.IMS_PER_BATCH = 0
    return cfg


# What pretraining's keys may hold, in addition to `engine.ranges.RANGES`.
RANGES: dict[str, Range] = {
    "MODEL.RESNETS.NORM": one_of(*NORMS),
    "MODEL.NETWORK.NUM_CLASSES": whole(0, 10**6),
    "INPUT.MIN_SIZE_TRAIN": each(SIDE),
    "INPUT.MIN_SIZE_TEST": SIDE,
    "INPUT.RANDOM_FLIP": one_of("horizontal", "none"),
    "INPUT.CROP.TYPE": one_of(*CROP_TYPES, "padded"),
    # Detectron2's default is a fraction of the image.
    "INPUT.CROP.SIZE": Range(
        "height and width in pixels, such as (224, 224)",
        lambda value: each(number(at_least=1, at_most=16384), 2).allows(value) and all(v == int(v) for v in value),
    ),
    "INPUT.CROP.PADDING": whole(0, 4096),
    "INPUT.CROP.AREA": Range(
        "the smallest and the largest share of the area, such as (0.08, 1)",
        lambda value: each(number(above=0, at_most=1), 2).allows(value) and value[0] <= value[1],
    ),
    "INPUT.PCA_COLOR_STD": number(at_least=0, at_most=100),
    "DATASETS.HOLD_OUT": whole(0),
    "DATALOADER.PIPELINE": one_of("workers", "device", "resident"),
    "SOLVER.LABEL_SMOOTHING": number(at_least=0, below=1),
    "TEST.BEST_METRIC": one_of("", "top1", "top5"),
    "TEST.CROPS": one_of(1, 10),
    "TEST.SCALES": each(SIDE, empty=True),
    "TEST.ENSEMBLE": TEXTS,
    "TEST.IMS_PER_BATCH": whole(0, 2**20),
}

_DETECTORS = "It belongs to detectors, which tools/train_net.py trains."
# The keys that pretraining does not read, and why (`engine.unread`).
UNREAD = {
    "DATALOADER.ASPECT_RATIO_GROUPING": _DETECTORS,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": _DETECTORS,
    "DATALOADER.REPEAT_THRESHOLD": "",
    "DATALOADER.SAMPLER_TRAIN": "",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _DETECTORS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _DETECTORS,
    "DATASETS.PROPOSAL_FILES_TEST": _DETECTORS,
    "DATASETS.PROPOSAL_FILES_TRAIN": _DETECTORS,
    "GLOBAL": "",
    "INPUT.CROP.ENABLED": "Images are always cropped, as INPUT.CROP.TYPE says.",
    "INPUT.MASK_FORMAT": _DETECTORS,
    "INPUT.MAX_SIZE_TEST": _DETECTORS,
    "INPUT.MAX_SIZE_TRAIN": _DETECTORS,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "INPUT.MIN_SIZE_TRAIN is the range of the shorter side.",
    "MODEL.ACCELERATE": _DETECTORS,
    "MODEL.ANCHOR_GENERATOR": _DETECTORS,
    "MODEL.BACKBONE": _DETECTORS,
    "MODEL.FPN": _DETECTORS,
    "MODEL.KEYPOINT_ON": _DETECTORS,
    "MODEL.LOAD_PROPOSALS": _DETECTORS,
    "MODEL.MASK_ON": _DETECTORS,
    "MODEL.META_ARCHITECTURE": _DETECTORS,
    "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN": _DETECTORS,
    "MODEL.PANOPTIC_FPN": _DETECTORS,
    "MODEL.PROPOSAL_GENERATOR": _DETECTORS,
    "MODEL.RESNETS.OUT_FEATURES": _DETECTORS,
    "MODEL.RETINANET": _DETECTORS,
    "MODEL.ROI_BOX_CASCADE_HEAD": _DETECTORS,
    "MODEL.ROI_BOX_HEAD": _DETECTORS,
    "MODEL.ROI_HEADS": _DETECTORS,
    "MODEL.ROI_KEYPOINT_HEAD": _DETECTORS,
    "MODEL.ROI_MASK_HEAD": _DETECTORS,
    "MODEL.RPN": _DETECTORS,
    "MODEL.SEM_SEG_HEAD": _DETECTORS,
    "SOLVER.REFERENCE_WORLD_SIZE": "Set SOLVER.REFERENCE_IMS_PER_BATCH, which rescales the schedule by the batch size.",
    "TEST.AUG": "Set TEST.CROPS 10 or TEST.SCALES.",
    "TEST.DETECTIONS_PER_IMAGE": _DETECTORS,
    "TEST.EXPECTED_RESULTS": "",
    "TEST.KEYPOINT_OKS_SIGMAS": _DETECTORS,
    "VIS_PERIOD": _DETECTORS,
}
