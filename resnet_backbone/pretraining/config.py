"""Configuration keys of pretraining, beside Detectron2's and the engine's.

Detectron2's keys mean here what they mean there: INPUT.MIN_SIZE_TRAIN is the range of the shorter side, INPUT.CROP.SIZE
the crop, INPUT.FORMAT the channel order, MODEL.PIXEL_MEAN and PIXEL_STD the normalization, MODEL.RESNETS.NORM the norm.
"""

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.keys import add_engine_config


def get_config() -> CfgNode:
    """Detectron2's defaults with the engine's and pretraining's keys."""
    cfg = get_cfg()
    add_engine_config(cfg)
    # Number of outputs; 0: as many as DATASETS.TRAIN has classes.
    cfg.MODEL.NETWORK.NUM_CLASSES = 0
    # Standard deviation of the PCA color shift (ResNet paper, section 3.4: "the standard color augmentation", 0.1).
    cfg.INPUT.PCA_COLOR_STD = 0.0
    # CROP.TYPE padded (ResNet paper, section 4.2): black pixels added on each side before the crop.
    cfg.INPUT.CROP.PADDING = 4
    # CROP.TYPE random_resized: smallest and largest share of the image's area.
    cfg.INPUT.CROP.AREA = (0.08, 1.0)
    # Decode JPEGs at a half, a quarter or an eighth of their size where what is cut out of them stays large enough.
    cfg.INPUT.REDUCED_DECODING = True
    # Training images, drawn once for all seeds, that are tested on instead of DATASETS.TEST (ResNet paper, section
    # 4.2: 5,000 of 50,000).
    cfg.DATASETS.HOLD_OUT = 0
    # Where images are decoded and augmented: in loading processes ("workers"); on the device, while loading processes
    # only read files ("device"); or on the device, which holds the whole data set ("resident").
    cfg.DATALOADER.PIPELINE = "workers"
    # An unreadable image in training: "stop", or "skip": put another one in its place, up to this share of the images.
    cfg.DATALOADER.ON_CORRUPT = "stop"
    cfg.DATALOADER.MAX_CORRUPT = 0.001
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Crops that an image's prediction is averaged over: 1, the center, or 10, that and the corners, each mirrored too.
    cfg.TEST.CROPS = 1
    # Shorter sides that the whole image is tested at, fully convolutionally, instead of crops (ResNet paper, section
    # 3.4).
    cfg.TEST.SCALES = ()
    # Further checkpoints, whose predictions are averaged with those of MODEL.WEIGHTS (--eval-only).
    cfg.TEST.ENSEMBLE = ()
    # Images a step in evaluation, over all processes; 0: as many as in training.
    cfg.TEST.IMS_PER_BATCH = 0
    return cfg
