"""SGD by Detectron2's keys, against Detectron2's own."""

import pytest
import torch
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.optimizer import build_optimizer


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("clip", [None, ("norm", 2.0), ("norm", 1.0), ("norm", float("inf")), ("value", 2.0)])
def test_steps_equal_detectron2s(cfg, clip):
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.02
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    if clip is not None:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = clip
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


class Operators(TorchDispatchMode):
    """Counts what is handed to the device, views left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += not function.is_view
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_takes_as_many_operators_for_many_parameters_as_for_one(cfg, kind):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])
        optimizer = build_optimizer(cfg, model)
        model(torch.ones(1, 2)).sum().backward()
        with Operators() as operators:
            optimizer.step()
        counts.append(operators.count)
    assert counts[0] == counts[1] > 0


def test_a_parameter_without_a_gradient_is_not_clipped(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    for kind in ("norm", "value"):
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
        model = _network()
        before = [parameter.clone() for parameter in model.parameters()]
        build_optimizer(cfg, model).step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_an_unknown_kind_of_clipping(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'full_model', expected value or norm"):
        build_optimizer(cfg, _network())


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
