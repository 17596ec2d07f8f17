"""Build the optimizer from Detectron2's keys."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import GradientClipType, get_default_optimizer_params
from torch import nn

from resnet_backbone.engine.config import ConfigError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build SGD like Detectron2's `build_optimizer`, but fused: one pass over the weights instead of five.

    Weight decay depends on the module type (SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS), gradient
    clipping on SOLVER.CLIP_GRADIENTS.

    Raises:
        ConfigError: SOLVER.CLIP_GRADIENTS.CLIP_TYPE is unknown.
    """
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = torch.optim.SGD(
        parameters,
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        fused=True,
    )
    if cfg.SOLVER.MOMENTUM > 0:
        # torch creates the buffers in the first step and leaves them unset if that step is skipped (because the loss
        # scale is too high). Zeros give the same first step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        optimizer.register_step_pre_hook(GradientClipping(cfg.SOLVER.CLIP_GRADIENTS))
    return optimizer


class GradientClipping:
    """Clip each parameter's gradient separately, by value or norm, as Detectron2 does; called before each step.

    The results are the same, but a handful of kernels handles all parameters, while Detectron2 launches several per
    parameter.
    """

    def __init__(self, clip: CfgNode):
        types = [kind.value for kind in GradientClipType]
        kind = clip.CLIP_TYPE
        if kind not in types:
            raise ConfigError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {kind!r}, expected {' or '.join(types)}.")
        self._by_value = kind == GradientClipType.VALUE.value
        self._limit = clip.CLIP_VALUE
        self._norm_type = clip.NORM_TYPE

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, _arguments: Any, _named: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:  # torch's foreach functions reject empty lists
            return
        if self._by_value:
            nn.utils.clip_grad_value_(parameters, self._limit, foreach=True)
        else:
            gradients = [parameter.grad for parameter in parameters]
            norms = torch.stack(torch._foreach_norm(gradients, self._norm_type))
            factors = (self._limit / (norms + 1e-6)).clamp(max=1.0)  # as in `clip_grad_norm_`
            torch._foreach_mul_(gradients, factors.unbind())
