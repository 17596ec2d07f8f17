"""Configuration keys of detection, beside Detectron2's."""

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.keys import add_engine_config


def add_network_config(cfg: CfgNode) -> None:
    """Add the keys that this package reads to Detectron2's defaults: `MODEL.NETWORK` and a few of `SOLVER`.

    What Detectron2 has a key for is read there: MODEL.RESNETS.{STRIDE_IN_1X1, NORM, OUT_FEATURES},
    MODEL.BACKBONE.FREEZE_AT, MODEL.WEIGHTS, INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD.
    """
    add_engine_config(cfg)


def get_config() -> CfgNode:
    """Detectron2's defaults with this package's keys."""
    cfg = get_cfg()
    add_network_config(cfg)
    return cfg
