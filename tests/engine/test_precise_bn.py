import copy

import pytest
import torch
from torch import nn

from resnet_backbone.engine import precise_bn
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.precise_bn import estimate_norm_statistics


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.fill_(7.0)
            module.running_var.fill_(11.0)
    return net


def batches(sizes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator) * (i + 1) + i for i, n in enumerate(sizes)]


def by_hand(net: nn.Module, images: list[torch.Tensor]):
    """Mean and variance (over n, not n - 1) of all values before each norm; each batch is normalized by itself."""
    net = copy.deepcopy(net).double()
    first = [net[0](x.double()) for x in images]
    second = []
    for x in first:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        normalized = (x - mean) / (variance + net[1].eps).sqrt()
        second.append(net[3](torch.relu(normalized * net[1].weight[:, None, None] + net[1].bias[:, None, None])))
    result = []
    for values in (first, second):
        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in values], dim=1)
        result.append((flat.mean(1), flat.var(1, unbiased=False)))
    return result


@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 2, 9), (5,)])
def test_equals_statistics_over_all_batches(sizes):
    net, images = build(), batches(sizes)
    expected = by_hand(net, images)
    assert estimate_norm_statistics(net, images, len(sizes)) == 2
    for layer, (mean, variance) in zip((net[1], net[4]), expected, strict=True):
        assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)


def test_reads_as_many_batches_as_asked_and_changes_nothing_else():
    net = build().eval()
    before = copy.deepcopy(net.state_dict())
    rest = iter(batches((4, 4, 4)))
    estimate_norm_statistics(net, rest, 2)
    assert len(list(rest)) == 1
    assert not net.training and not any(module.training for module in net.modules())
    assert net[1].momentum == 0.1 and not any(p.grad is not None for p in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("running" in name or "tracked" in name), name
    assert set(dict(net.named_buffers())) == {name for name in before if "running" in name or "tracked" in name}


def test_a_compiled_network_runs_uncompiled():
    """Compiled for training, it would be compiled anew without gradients."""
    net, compiled = build(), []
    net.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    estimate_norm_statistics(net, batches((4, 4)), 2)
    assert compiled == []


def test_a_network_without_norms_reads_nothing():
    def never():
        raise AssertionError
        yield

    assert estimate_norm_statistics(nn.Sequential(nn.Conv2d(3, 2, 1)), never(), 5) == 0


def test_a_constant_channel_keeps_a_variance_that_is_no_negative():
    net = nn.Sequential(nn.BatchNorm2d(1))
    estimate_norm_statistics(net, [torch.full((3, 1, 5, 5), 1234.567 + i * 1e-4) for i in range(7)], 7)
    assert 0 <= net[0].running_var.item() < 1.0
    assert net.eval()(torch.full((1, 1, 2, 2), 1234.567)).isfinite().all()


def test_no_batches_at_all_is_refused():
    with pytest.raises(ConfigError, match="NUM_ITER is 0"):
        estimate_norm_statistics(build(), [], 0)


def test_processes_are_pooled(monkeypatch):
    """Two processes with two batches each equal one process with the four."""
    images = batches((6, 6, 6, 6))
    expected = by_hand(build(), images)
    halves = [build(), build()]
    estimate_norm_statistics(halves[0], images[:2], 2)
    estimate_norm_statistics(halves[1], images[2:], 2)

    others = iter([halves[1][1], halves[1][4]])

    def all_reduce(moments):
        other = next(others)
        mean, variance = other.running_mean.double(), other.running_var.double()
        moments += torch.stack([mean, variance + mean**2])

    monkeypatch.setattr(precise_bn.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    precise_bn._average_over_processes([halves[0][1], halves[0][4]])
    for layer, (mean, variance) in zip((halves[0][1], halves[0][4]), expected, strict=True):
        assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)
