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


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_skipped_first_step_leaves_no_trace(cfg, nesterov):
    """As a loss scale that is too high asks for; torch's own buffers would hold whatever was in the memory."""
    cfg.SOLVER.NESTEROV = nesterov
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01
    cfg.SOLVER.BASE_LR = 0.1
    ours, expected = _network(), _network()
    optimizer = build_optimizer(cfg, ours)
    plain = torch.optim.SGD(
        expected.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01, fused=False
    )
    batches = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    for number, batch in enumerate([batches[0], *batches]):
        optimizer.zero_grad()
        ours(batch).square().sum().backward()
        if number == 0:
            ours[1].reset_running_stats()
        optimizer.found_inf = torch.tensor(float(number == 0))
        optimizer.step()
        if number == 0:
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), _network().parameters(), strict=True))
            assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
            assert len(optimizer.state) == len(list(ours.parameters()))
    for batch in batches:
        plain.zero_grad()
        expected(batch).square().sum().backward()
        plain.step()
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_momentum_there_is_no_buffer(cfg):
    cfg.SOLVER.MOMENTUM = 0.0
    assert not build_optimizer(cfg, _network()).state


def test_momentum_is_laid_out_as_the_weights(cfg):
    """Channels last beside channels last: a fused step goes through memory in one order."""
    network = _network().to(memory_format=torch.channels_last)
    state = build_optimizer(cfg, network).state
    assert state[network[0].weight]["momentum_buffer"].stride() == network[0].weight.stride()
