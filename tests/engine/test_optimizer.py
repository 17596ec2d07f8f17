"""SGD by Detectron2's keys, against Detectron2's own."""

import pytest
import torch
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from resnet_backbone.engine.optimizer import build_optimizer


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("clip", [False, True])
def test_steps_equal_detectron2s(cfg, clip):
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.02
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.05
    ours, theirs = _network(), _network()
    optimizers = build_optimizer(cfg, ours), detectron2_build_optimizer(cfg, theirs)
    images = torch.randn(5, 2, 3, 8, 8, dtype=torch.float64)
    for batch in images:
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not torch.equal(next(ours.parameters()), next(_network().parameters()))
