"""Configuration keys of pretraining, beside Detectron2's and the engine's.

Detectron2's keys mean here what they mean there: INPUT.MIN_SIZE_TRAIN is the range of the shorter side, INPUT.CROP.SIZE
the crop, INPUT.FORMAT the channel order, MODEL.PIXEL_MEAN and PIXEL_STD the normalisation, MODEL.RESNETS.NORM the norm.
"""

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.config import add_engine_config


def get_config() -> CfgNode:
    """Detectron2's defaults with the engine's and pretraining's keys."""
    cfg = get_cfg()
    add_engine_config(cfg)
    # Number of outputs; 0: as many as DATASETS.TRAIN has classes.
    cfg.MODEL.NETWORK.NUM_CLASSES = 0
    # Standard deviation of the PCA colour shift (ResNet paper, section 3.4: "the standard color augmentation", 0.1).
    cfg.INPUT.PCA_COLOR_STD = 0.0
    # Images a step in evaluation, over all processes; 0: as many as in training.
    cfg.TEST.IMS_PER_BATCH = 0
    return cfg
