"""Configuration keys of detection, in addition to Detectron2's."""

from detectron2.config import CfgNode, get_cfg

from resnet_backbone.engine.keys import add_engine_config


def add_network_config(cfg: CfgNode) -> None:
    """Add the keys that this package reads to Detectron2's defaults: `MODEL.NETWORK` and a few of `SOLVER`.

    Where Detectron2 already has a key, we use it: MODEL.RESNETS.{STRIDE_IN_1X1, NORM, OUT_FEATURES},
    MODEL.BACKBONE.FREEZE_AT, MODEL.WEIGHTS, INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD.
    """
    add_engine_config(cfg)


def get_config() -> CfgNode:
    """Return Detectron2's defaults plus this package's keys."""
    cfg = get_cfg()
    add_network_config(cfg)
    return cfg


# The keys that the training tool does not read, and why (`engine.unread`).
UNREAD = {
    "GLOBAL": "",
    "SOLVER.CUDA_GRAPH": "A detector's shapes change with every image, and a graph's cannot.",
    "SOLVER.REFERENCE_WORLD_SIZE": "Set SOLVER.REFERENCE_IMS_PER_BATCH, which rescales the schedule by the batch size.",
    "SOLVER.WARMUP_UNTIL_ERROR": "A detector has no training error. Set SOLVER.WARMUP_ITERS.",
}
