"""Frozen batch normalization against torch's own in eval mode."""

import pytest
import torch
from torch import nn

from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.networks.norms import freeze_batch_norm, norm_factory


def trained_batch_norm(channels=5, dtype=torch.float64, eps=1e-3):
    norm = nn.BatchNorm2d(channels, eps=eps).to(dtype)
    norm.weight.data.uniform_(-2, 2)
    norm.bias.data.uniform_(-1, 1)
    for _ in range(3):
        norm(torch.randn(4, channels, 6, 6, dtype=dtype) * 3 + 1)
    return norm


def test_equals_batch_norm_in_eval_mode():
    norm = trained_batch_norm()
    frozen = FrozenBatchNorm2d.from_batch_norm(norm)
    norm.eval()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    value, expected = frozen(x1), norm(x2)
    assert torch.equal(value, expected)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(x1.grad, x2.grad)
    # The formula itself, so that the reference is not only another call of the same function.
    by_hand = (x - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + 1e-3).sqrt()
    by_hand = by_hand * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    frozen = FrozenBatchNorm2d.from_batch_norm(trained_batch_norm(3))
    assert torch.autograd.gradcheck(frozen, torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True))


def test_training_changes_nothing_and_nothing_is_trainable():
    frozen = FrozenBatchNorm2d.from_batch_norm(trained_batch_norm(dtype=torch.float32)).train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    x = torch.randn(8, 5, 4, 4)
    assert torch.equal(frozen(x), frozen.eval()(x))
    assert not list(frozen.parameters())
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())


def test_state_dicts_are_interchangeable_with_batch_norm():
    norm, frozen, back = trained_batch_norm(), FrozenBatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    state = norm.state_dict()
    assert "num_batches_tracked" in state
    frozen.load_state_dict(state, strict=True)
    assert "num_batches_tracked" in state, "the caller's dict must stay whole"
    back.load_state_dict(frozen.state_dict(), strict=True)
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(back, key), getattr(norm, key))


def test_missing_statistics_are_still_an_error():
    with pytest.raises(RuntimeError, match="running_var"):
        FrozenBatchNorm2d(3).load_state_dict({key: torch.ones(3) for key in ("weight", "bias", "running_mean")})


def test_freeze_batch_norm_converts_recursively():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()), nn.SyncBatchNorm(4))
    net = net.to(torch.bfloat16)
    keys = [key for key in net.state_dict() if "num_batches_tracked" not in key]
    converted = freeze_batch_norm(net)
    assert converted is net
    assert list(net.state_dict()) == keys
    assert isinstance(net[1][0], FrozenBatchNorm2d)
    assert isinstance(net[2], FrozenBatchNorm2d)
    assert net[1][0].eps == 1e-3
    assert net[1][0].running_var.dtype == torch.bfloat16
    assert isinstance(freeze_batch_norm(nn.BatchNorm2d(2, affine=False)), FrozenBatchNorm2d)


def test_device_is_preserved():
    with torch.device("meta"):
        norm = nn.BatchNorm2d(4)
    assert FrozenBatchNorm2d.from_batch_norm(norm).running_mean.device.type == "meta"


def test_batch_norm_without_statistics_cannot_be_frozen():
    with pytest.raises(ValueError, match="keeps no running statistics"):
        freeze_batch_norm(nn.BatchNorm2d(4, track_running_stats=False))


def test_autocast_keeps_bf16_maps_and_channels_last():
    frozen = FrozenBatchNorm2d.from_batch_norm(trained_batch_norm(8, torch.float32))
    x = torch.randn(2, 8, 4, 4).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
def test_norms_by_name(norm):
    kinds = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": nn.GroupNorm}
    layer = norm_factory(norm)(64)
    assert type(layer) is kinds[norm]
    assert layer.weight.shape == (64,)


def test_group_norm_of_narrow_layers():
    assert norm_factory("GN")(256).num_groups == 32
    assert norm_factory("GN")(24).num_groups == 8


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm is 'bn', expected one of BN, FrozenBN, SyncBN, GN"):
        norm_factory("bn")
