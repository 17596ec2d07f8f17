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
    """The network and torchvision's with the same random weights and statistics (logits: test_references.py)."""
    reference = randomize(getattr(torchvision.models, request.param)(num_classes=10))
    net = build_network(request.param, num_classes=10)
    net.load_state_dict(reference.state_dict(), strict=True)
    return net, reference


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


CIFAR_DEPTHS = {"cifar_resnet20": 0.27, "cifar_resnet32": 0.46, "cifar_resnet44": 0.66, "cifar_resnet56": 0.85}
# Table 6, in millions; for pre-activation and wide networks arXiv 1603.05027, Table 2 and arXiv 1605.07146, Table 5.
CIFAR_PARAMETERS = CIFAR_DEPTHS | {
    "cifar_resnet110": 1.7,
    "cifar_resnet1202": 19.4,
    "cifar_preact_resnet110": 1.7,
    "cifar_preact_resnet164": 1.7,
    "cifar_wide_resnet28_10": 36.5,
}


@pytest.mark.parametrize(("name", "millions"), CIFAR_PARAMETERS.items())
def test_parameters_of_the_cifar_networks_are_the_papers(name, millions):
    with torch.device("meta"):
        net = build_network(name, num_classes=10)
    digits = len(str(millions).partition(".")[2])
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, digits) == millions


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20"])
def test_cifar_networks_against_the_paper_written_out(name, randomize, relative_error):
    """Section 4.2 as a loop over layers: 6n + 2 layers at 32, 16 and 8 pixels, option A shortcuts."""
    net = randomize(build_network(name, num_classes=10)).eval()
    image = torch.randn(2, 3, 32, 32)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(convs) + 1 == 20
    with torch.no_grad():
        x = torch.relu(norms[0](convs[0](image)))
        for i in range(1, 19, 2):
            out = torch.relu(norms[i](convs[i](x)))
            out = norms[i + 1](convs[i + 1](out))
            shortcut = x
            if out.shape != x.shape:
                shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], dim=1)
            x = torch.relu(out + shortcut if "resnet" in name else out)
        assert x.shape == (2, 64, 8, 8)
        assert relative_error(net(image), net.fc(x.mean(dim=(2, 3)))) < 1e-5


@pytest.mark.parametrize("name", ["cifar_preact_resnet110", "cifar_preact_resnet164", "cifar_wide_resnet28_10"])
def test_preactivation_for_cifar_against_the_paper_written_out(name, randomize, relative_error):
    """arXiv 1603.05027, section 4.1: x + F(x), F from norm, ReLU and convolution; all norms are in one row."""
    net = randomize(build_network(name, num_classes=10, width=0.25)).eval()
    image = torch.randn(2, 3, 32, 32)
    norms = iter([module for module in net.modules() if isinstance(module, nn.BatchNorm2d)])
    if net.layer1[0].bn1 is not None:
        assert isinstance(net.bn1, nn.Identity)
    with torch.no_grad():
        x = net.conv1(image)
        for layer in (net.layer1, net.layer2, net.layer3):
            for block in [module for module in layer if hasattr(module, "conv1")]:
                activated = torch.relu(next(norms)(x))
                out = block.conv1(activated)
                for conv in [getattr(block, key) for key in ("conv2", "conv3") if hasattr(block, key)]:
                    out = conv(torch.relu(next(norms)(out)))
                x = out + (x if block.downsample is None else block.downsample(activated))
        pooled = torch.relu(next(norms)(x)).mean(dim=(2, 3))
        assert next(norms, None) is None
        assert relative_error(net(image), net.fc(pooled)) < 1e-5


def test_the_walkthrough_pads_three_pixels():
    with torch.device("meta"):
        net = build_network("cifar_resnet18", num_classes=10)
        features = net.forward_features(torch.empty(1, 3, 32, 32), list(net.feature_info))
    assert [tuple(f.shape[1:]) for f in features.values()] == [
        *((16, 36, 36), (16, 36, 36), (32, 18, 18), (64, 9, 9), (128, 5, 5))
    ]


def test_plain_networks_are_the_residual_ones_without_their_projections():
    with torch.device("meta"):
        plain, residual = build_network("plain34"), build_network("resnet34")
        padded = build_network("resnet34", shortcut="A")
    without = [key for key in residual.state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == list(padded.state_dict()) == without
    assert multiply_adds(plain) == pytest.approx(3.6e9, rel=0.02)
    # Option A adds nothing that is counted.
    assert multiply_adds(padded) == multiply_adds(plain)


def test_option_c_projects_in_every_block_of_the_network():
    with torch.device("meta"):
        net = build_network("resnet34", shortcut="C")
    assert sum(name.endswith("downsample.0") for name, _ in net.named_modules()) == 16


def test_zero_initialized_last_norms_make_every_block_the_identity_at_first():
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        net = build_network(name, width=0.125, zero_init_last_norm=True)
        zero = {key for key, module in net.named_modules() if getattr(module, "weight", None) is not None}
        zero = {key for key in zero if not net.get_submodule(key).weight.any()}
        assert zero == {key for key, _ in net.named_modules() if key.endswith(last)}
    x = torch.rand(1, net.layer1[1].conv1.in_channels, 8, 8)
    assert torch.equal(net.layer1[1].eval()(x), x)


def test_a_dilated_last_stage_sees_as_far_at_twice_the_resolution():
    """With stride 1 images' every second pixel is what the strided stage gives, where only 3×3s look around."""
    torch.manual_seed(0)
    strided = build_network("resnet50", width=0.125, stages=("res5",)).eval()
    dilated = build_network("resnet50", width=0.125, stages=("res5",), res5_dilation=2).eval()
    dilated.load_state_dict(strided.state_dict())
    assert dilated.feature_info["res5"].stride == 16
    x = torch.randn(1, strided.layer4[0].conv1.in_channels, 12, 12)
    with torch.no_grad():
        value, expected = dilated(x), strided(x)
    assert value.shape[-2:] == (12, 12)
    # Dilating all 3×3s but the first (torchvision's way) keeps the strided values; Detectron2 dilates the first too.
    dilated.layer4[0].conv2.dilation = dilated.layer4[0].conv2.padding = (1, 1)
    with torch.no_grad():
        assert torch.allclose(dilated(x)[..., ::2, ::2], expected, atol=1e-4)
    with pytest.raises(ValueError, match="res5_dilation is 4, expected 1 or 2"):
        build_network("resnet50", res5_dilation=4)
