"""Residual networks against torchvision's, and against the paper's multiply-adds."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_backbone.networks import build_network

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def multiply_adds(net):
    """Multiply-adds of convolutions and linear layers for one 224-pixel image (the counter counts each as two)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "resnet101"])
def pair(request, randomize):
    """The network and torchvision's with the same random weights and statistics."""
    reference = randomize(getattr(torchvision.models, request.param)(num_classes=10))
    net = build_network(request.param, num_classes=10)
    net.load_state_dict(reference.state_dict(), strict=True)
    return net, reference


def test_logits_in_eval_mode(pair, relative_error):
    net, reference = pair
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(net.eval()(x), reference.eval()(x)) < 1e-5


def test_features_in_eval_mode(pair, relative_error):
    net, reference = pair
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = net.eval().forward_features(x, ["stem", "res2", "res3", "res4", "res5"])
        reference.eval()
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for name, layer in zip(features, [nn.Identity(), *list(reference.children())[4:8]], strict=True):
            y = layer(y)
            assert relative_error(features[name], y) < 1e-5, name


def test_logits_and_gradients_in_train_mode(pair, relative_error):
    net, reference = pair
    x = torch.randn(4, 3, 64, 64)
    value, expected = net.train()(x), reference.train()(x)
    assert relative_error(value, expected) < 1e-5
    weight = torch.randn(4, 10)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(net.conv1.weight.grad, reference.conv1.weight.grad) < 1e-5
    assert relative_error(net.layer4[1].conv2.weight.grad, reference.layer4[1].conv2.weight.grad) < 1e-5
    # Both have seen one batch: the statistics moved alike.
    assert torch.allclose(net.layer4[1].bn2.running_var, reference.layer4[1].bn2.running_var, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_multiply_adds_with_torchvisions_stride(name):
    with torch.device("meta"):
        net, reference = build_network(name), getattr(torchvision.models, name)()
    assert multiply_adds(net) == multiply_adds(reference)


@pytest.mark.parametrize(
    ("name", "exact", "paper"),
    # The exact count of convolutions and fc, and what the paper prints in Table 1. It cannot print ResNet-50's better
    # than "3.8", though the count is 3.86.
    [
        ("resnet18", 1.81e9, 1.8e9),
        ("resnet34", 3.66e9, 3.6e9),
        ("resnet50", 3.86e9, 3.8e9),
        ("resnet101", 7.57e9, 7.6e9),
        ("resnet152", 11.28e9, 11.3e9),
    ],
)
def test_multiply_adds_of_the_paper(name, exact, paper):
    with torch.device("meta"):
        net = build_network(name, stride_in_1x1=True)
    assert multiply_adds(net) == pytest.approx(exact, rel=0.005)
    assert multiply_adds(net) == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize(("stride_in_1x1", "strided"), [(True, "conv1"), (False, "conv2")])
def test_stride_placement(stride_in_1x1, strided):
    with torch.device("meta"):
        net = build_network("resnet50", stride_in_1x1=stride_in_1x1)
    found = {key for key, module in net.named_modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)}
    expected = {f"layer{i}.0.{conv}" for i in (2, 3, 4) for conv in (strided, "downsample.0")}
    assert found == expected | {"conv1"}


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_weights_do_not_tell_the_stride_placement(name):
    with torch.device("meta"):
        one, other = build_network(name, stride_in_1x1=True), build_network(name)
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (one, other)]
    assert shapes[0] == shapes[1]


def test_he_initialization():
    net = build_network("resnet18", width=0.5)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            count = module.weight.numel()
            # Five standard errors of a normal sample's standard deviation.
            tolerance = 5 / math.sqrt(2 * count)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)
            assert abs(module.weight.mean().item()) < 5 * math.sqrt(2 / fan_out / count)
        if isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.all(net.fc.bias == 0)


def test_width():
    with torch.device("meta"):
        net = build_network("resnet50", width=0.25)
        odd = build_network("resnet18", width=0.3)
        narrow = build_network("resnet18", width=0.01)
    assert [info.channels for info in net.feature_info.values()] == [16, 64, 128, 256, 512]
    assert net.layer1[0].conv2.out_channels == 16
    assert net.fc.in_features == 512
    # 64, 128, 256, 512 times 0.3 are 19.2, 38.4, 76.8, 153.6.
    assert [info.channels for info in odd.feature_info.values()] == [16, 16, 40, 80, 152]
    assert {info.channels for info in narrow.feature_info.values()} == {8}
    with pytest.raises(ValueError, match="width is 0, expected a positive factor"):
        build_network("resnet18", width=0)


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN", "GN"])
def test_other_norms(norm):
    net = build_network("resnet18", num_classes=3, width=0.125, norm=norm).eval()
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with torch.device("meta"):
        names = {key for key, _ in build_network("resnet18").named_modules() if "bn" in key or "downsample.1" in key}
    assert {type(net.get_submodule(name)).__name__ for name in names} == {type(net.bn1).__name__}
