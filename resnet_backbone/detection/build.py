"""Build a configured detector with all its weights, or say what is wrong with the configuration."""

import traceback

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.modeling.layout import use_channels_last
from resnet_backbone.detection.modeling.precision import keep_boxes_in_float32
from resnet_backbone.detection.weights import load_whole, offered
from resnet_backbone.engine.config import ConfigError, get_key, said, shown
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Checkpoint


def build_detector(cfg: CfgNode, weights: Checkpoint | None, file: str) -> nn.Module:
    """Return the detector on its device with all its initial weights.

    Args:
        weights, file: what `weights.read` returned.

    Raises:
        ConfigError: Detectron2 cannot build what the configuration describes.
        CheckpointError: the weights do not cover it.
    """
    try:
        with offered(weights, file):
            model = build_model(cfg)
    except InputError:
        raise
    except (KeyError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(_why_not_built(cfg, error)) from error
    _check_segmentation(cfg, model)
    load_whole(cfg, model, weights, file)
    if cfg.MODEL.ACCELERATE:
        accelerate(model)
    if cfg.SOLVER.AMP.ENABLED:
        keep_boxes_in_float32(model)
    use_channels_last(model)
    return model


def _why_not_built(cfg: CfgNode, error: Exception) -> str:
    """Return what is wrong with a configuration that Detectron2 failed to build."""
    feature = error.args[0] if isinstance(error, KeyError) else None
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        key = f"MODEL.{part}.IN_FEATURES"
        if feature in get_key(cfg, key):
            return (
                f"{said(cfg, key)}, but {said(cfg, 'MODEL.BACKBONE.NAME')} with "
                f"{said(cfg, 'MODEL.RESNETS.OUT_FEATURES')} has no feature {shown(feature)}. Name features that it has."
            )
    if "log2 contiguous" in str(error):
        return (
            f"{said(cfg, 'MODEL.FPN.IN_FEATURES')} with {said(cfg, 'MODEL.RESNETS.RES5_DILATION')}: a feature pyramid "
            f"needs stages in their order, each of twice the stride of the one before ({error})."
        )
    if "do not form a pyramid" in str(error):
        return f"{said(cfg, 'MODEL.ROI_HEADS.IN_FEATURES')}, expected neighboring levels, such as p2, p3, p4."
    if isinstance(error, ValueError) and "SemSegFPNHead" in str(error):
        return f"{said(cfg, 'MODEL.SEM_SEG_HEAD.IN_FEATURES')}, none of which the backbone has. Name features it has."
    asserted = f"it fails at `{traceback.extract_tb(error.__traceback__)[-1].line}`"
    return f"Detectron2 cannot build this configuration: {' '.join(str(error).split()) or asserted}."


def _check_segmentation(cfg: CfgNode, model: nn.Module) -> None:
    """Check SEM_SEG_HEAD's features, of which Detectron2 drops those that it does not find, and their stride."""
    if not hasattr(model, "sem_seg_head"):
        return
    shapes, key = model.backbone.output_shape(), "MODEL.SEM_SEG_HEAD.IN_FEATURES"
    if unknown := [name for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES if name not in shapes]:
        raise ConfigError(f"{said(cfg, key)}, but the backbone has {', '.join(shapes)}, and no {', '.join(unknown)}.")
    finest = min(shapes[name].stride for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
    if finest < cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE:
        raise ConfigError(
            f"{said(cfg, 'MODEL.SEM_SEG_HEAD.COMMON_STRIDE')}, expected at most {finest}, the stride of the finest of "
            f"{said(cfg, key)}."
        )
