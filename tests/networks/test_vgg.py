"""VGG networks against torchvision's, as classifiers and as a detector's backbone and head."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_backbone.networks import build_network

BACKBONE = ("conv1", "conv2", "conv3", "conv4", "conv5")


def share_weights(net, reference):
    """Give `net` (built on the meta device) the reference's own tensors of the same names: no second 550 MB."""
    state = reference.state_dict()
    net.load_state_dict({key: state[key] for key in net.state_dict()}, strict=True, assign=True)
    return net


def build_sharing(reference, name, **arguments):
    with torch.device("meta"):
        net = build_network(name, **arguments)
    return share_weights(net, reference)


def bias_away_from_zero(net):
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
    return net


@pytest.fixture(scope="module")
def vgg16():
    torch.manual_seed(0)
    return bias_away_from_zero(torchvision.models.vgg16(init_weights=False)).eval()


def test_logits_without_batch_norm(vgg16, relative_error):
    net = build_sharing(vgg16, "vgg16").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(net(x), vgg16(x)) < 1e-5
        net.train(), vgg16.train()
        torch.manual_seed(3)
        value = net(x)
        torch.manual_seed(3)
        expected = vgg16(x)
        vgg16.eval()
    # The same random numbers drop the same activations: dropout is in the same places.
    assert relative_error(value, expected) < 1e-5


def test_logits_with_batch_norm(randomize, relative_error):
    reference = randomize(bias_away_from_zero(torchvision.models.vgg16_bn(init_weights=False, num_classes=10))).eval()
    net = build_sharing(reference, "vgg16_bn", num_classes=10, dropout=0.0).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(net(x), reference(x)) < 1e-5
        for module in reference.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert relative_error(net.train()(x), reference.train()(x)) < 1e-5


def test_features_are_taken_before_the_pooling(vgg16, relative_error):
    net = build_sharing(vgg16, "vgg16", stages=(*BACKBONE, "pool5")).eval()
    x = torch.randn(1, 3, 64, 64)
    # Number of torchvision's layers up to the last ReLU of each block (Table 1, D), and up to the last pooling.
    ends = {"conv1": 4, "conv2": 9, "conv3": 16, "conv4": 23, "conv5": 30, "pool5": 31}
    with torch.no_grad():
        features = net.forward_features(x, list(ends))
        for name, end in ends.items():
            assert relative_error(features[name], vgg16.features[:end](x)) < 1e-5, name


def test_backbone_and_head_of_a_detector(vgg16, relative_error):
    backbone = build_sharing(vgg16, "vgg16", stages=BACKBONE).eval()
    head = build_sharing(vgg16, "vgg16", stages=("fc6", "fc7")).eval()
    assert set(backbone.state_dict()) == {key for key in vgg16.state_dict() if key.startswith("features.")}
    assert set(head.state_dict()) == {f"classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
    assert backbone.feature_info["conv5"] == (512, 16)
    assert not head.feature_info

    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        c5 = backbone.forward_features(x, ["conv5"])["conv5"]
        fc7 = vgg16.classifier[:6](vgg16.features[:30](x).flatten(1))
        assert c5.shape == (1, 512, 7, 7)
        assert relative_error(head(c5), fc7) < 1e-5
        assert torch.equal(head(c5.flatten(1)), head(c5))
        assert head(c5[:0]).shape == (0, 4096)


def test_without_pool5_the_classifier_reads_conv5(vgg16, relative_error):
    net = build_sharing(vgg16, "vgg16", pool5=False).eval()
    assert list(net.state_dict()) == list(vgg16.state_dict())
    assert net.stage_names == (*BACKBONE, "fc6", "fc7")
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = vgg16.classifier(vgg16.features[:30](x).flatten(1))
        assert relative_error(net(x), expected) < 1e-5
    with pytest.raises(ValueError, match="no feature 'pool5'"):
        net.forward_features(x, ["pool5"])


def test_multiply_adds():
    with torch.device("meta"):
        net, reference = build_network("vgg16"), torchvision.models.vgg16()
    image = torch.empty(1, 3, 224, 224, device="meta")
    counts = []
    for model in (net, reference):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] == counts[1] == pytest.approx(15.47e9, rel=0.001)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.forward_features(image, ["conv5"])
    assert counter.get_total_flops() / 2 == pytest.approx(15.35e9, rel=0.001)


def test_width_scales_the_fully_connected_layers_too():
    with torch.device("meta"):
        net = build_network("vgg16", num_classes=10, width=0.25)
        head = build_network("vgg16", width=0.25, stages=("fc6", "fc7"))
    assert [info.channels for info in net.feature_info.values()] == [16, 32, 64, 128, 128, 128]
    shapes = [tuple(net.classifier[i].weight.shape) for i in (0, 3, 6)]
    assert shapes == [(1024, 128 * 49), (1024, 1024), (10, 1024)]
    assert head.classifier[0].weight.shape == (1024, 128 * 49)


def test_he_initialization():
    net = build_network("vgg16", width=0.25)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * 9
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features
        else:
            continue
        expected = 0.01 if module is net.classifier[6] else math.sqrt(2 / fan_in)
        assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * module.weight.numel()))
        assert torch.all(module.bias == 0)


def test_initialization_keeps_the_signal():
    net = build_network("vgg16", width=0.25).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for name in net.stage_names:
            x = net.run_stage(name, x)
            assert 0.2 < x.square().mean().sqrt().item() < 5, name


def test_published_network_has_no_norm():
    with torch.device("meta"):
        net, with_norm = build_network("vgg16"), build_network("vgg16_bn")
        frozen = build_network("vgg16_bn", norm="FrozenBN")
    assert not [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len([module for module in with_norm.modules() if isinstance(module, nn.BatchNorm2d)]) == 13
    assert not [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(frozen.state_dict()) == {key for key in with_norm.state_dict() if "num_batches_tracked" not in key}
