"""Runs of stages: built alone, composed, extracted from, frozen."""

import copy
import math

import pytest
import torch
from torch import nn

from resnet_backbone.networks import FrozenBatchNorm2d, build_network, list_networks

C4 = ("stem", "res2", "res3", "res4")
VGG_CONV = ("conv1", "conv2", "conv3", "conv4", "conv5")


@pytest.mark.parametrize("name", list_networks())
def test_feature_info_is_what_the_network_gives(name):
    with torch.device("meta"):
        net = build_network(name)
        image = torch.empty(1, 3, 128, 96)
    features = net.forward_features(image, list(net.feature_info))
    assert list(features) == list(net.feature_info)
    margin = 4 if name == "cifar_resnet18" else 0  # its 3×3 stem pads three pixels
    for feature, info in net.feature_info.items():
        height, width = (math.ceil((side + margin) / info.stride) for side in (128, 96))
        assert features[feature].shape == (1, info.channels, height, width), feature


def test_strides():
    with torch.device("meta"):
        resnet, vgg = build_network("resnet50"), build_network("vgg16")
    assert list(resnet.feature_info) == [*C4, "res5"]
    assert [info.stride for info in resnet.feature_info.values()] == [4, 4, 8, 16, 32]
    assert [info.channels for info in resnet.feature_info.values()] == [64, 256, 512, 1024, 2048]
    assert [info.stride for info in vgg.feature_info.values()] == [1, 2, 4, 8, 16, 32]
    assert list(vgg.feature_info) == [*VGG_CONV, "pool5"]


@pytest.mark.parametrize(("name", "arguments"), [("resnet18", {}), ("resnet50", {"stride_in_1x1": True})])
def test_backbone_and_head_compose_to_the_whole(name, arguments, randomize):
    whole = randomize(build_network(name, width=0.25, **arguments)).eval()
    backbone = build_network(name, width=0.25, stages=C4, **arguments).eval()
    head = build_network(name, width=0.25, stages=("res5",), **arguments).eval()
    state = whole.state_dict()
    for part in (backbone, head):
        part.load_state_dict({key: state[key] for key in part.state_dict()}, strict=True)
    assert {*backbone.state_dict(), *head.state_dict(), "fc.weight", "fc.bias"} == set(state)
    assert {key.split(".")[0] for key in head.state_dict()} == {"layer4"}

    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        c4 = backbone.forward_features(x, ["res4"])["res4"]
        expected = whole.forward_features(x, ["res4", "res5"])
        assert torch.equal(c4, expected["res4"])
        assert torch.equal(head(c4), expected["res5"])
        assert torch.equal(head.forward_features(c4, ["res5"])["res5"], expected["res5"])
        assert torch.equal(whole.fc(head(c4).mean((2, 3))), whole(x))
    assert head.feature_info == {"res5": whole.feature_info["res5"]}


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_parts_compose_to_the_whole(name, randomize):
    whole = randomize(build_network(name, num_classes=4, width=0.125)).eval()
    parts = [
        build_network(name, width=0.125, stages=stages).eval()
        for stages in (("conv1", "conv2"), ("conv3", "conv4", "conv5", "pool5"), ("fc6",), ("fc7",))
    ]
    state = whole.state_dict()
    keys = []
    for part in parts:
        keys += part.state_dict()
        part.load_state_dict({key: state[key] for key in part.state_dict()}, strict=True)
    assert [*keys, "classifier.6.weight", "classifier.6.bias"] == list(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = parts[0].forward_features(x, ["conv2"])["conv2"]
        for part in parts[1:]:
            y = part(y)
        assert torch.equal(whole.classifier[6](y), whole(x))


def test_the_tensors_of_a_c4_detector():
    """Detectron2's R50-C4: 215 tensors in the backbone, 50 in the head (43 and 10 convolutions, each with a BN's 4)."""
    with torch.device("meta"):
        backbone = build_network("resnet50", norm="FrozenBN", stages=C4)
        head = build_network("resnet50", norm="FrozenBN", stages=("res5",))
    assert (len(backbone.state_dict()), len(head.state_dict())) == (215, 50)


def counted_stages(net, names):
    ran = []
    for name in names:
        net.stage_modules(name)[0].register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("resnet18", ["res2"], ["stem", "res2"]),
        ("resnet18", ["res4", "res3"], ["stem", "res2", "res3", "res4"]),
        ("resnet18", ["stem"], ["stem"]),
        ("resnet18", [], []),
        ("vgg16_bn", ["conv3"], ["conv1", "conv2", "conv3"]),
        ("vgg16_bn", ["conv5"], list(VGG_CONV)),
    ],
)
def test_no_stage_is_computed_in_vain(name, wanted, expected):
    net = build_network(name, width=0.125)
    ran = counted_stages(net, [stage for stage in net.stage_names if stage != "pool5"])
    features = net.forward_features(torch.randn(1, 3, 32, 32), wanted)
    assert ran == expected
    assert list(features) == wanted


def test_unknown_features():
    net = build_network("resnet18", width=0.125, stages=C4)
    with pytest.raises(ValueError, match="no feature 'res5', expected some of stem, res2, res3, res4"):
        net.forward_features(torch.zeros(1, 3, 32, 32), ["res4", "res5"])
    with pytest.raises(ValueError, match="is the string 'res4'"):
        net.forward_features(torch.zeros(1, 3, 32, 32), "res4")
    with torch.device("meta"):
        vgg = build_network("vgg16")
    with pytest.raises(ValueError, match="no feature 'fc7'"):
        vgg.forward_features(torch.zeros(1, 3, 32, 32, device="meta"), ["fc7"])


def test_a_backbone_has_no_logits():
    net = build_network("resnet18", width=0.125, stages=C4)
    with pytest.raises(RuntimeError, match="has no classifier: call forward_features"):
        net(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "stages", [("res2", "res4"), ("res3", "res2"), ("layer1",), (), ("res2", "res2"), ("res5", "res6")]
)
def test_stages_must_follow_one_another(stages):
    with pytest.raises(ValueError, match=r"expected one or more names that follow one another in \('stem', 'res2'"):
        build_network("resnet18", stages=stages)


def test_stages_given_as_a_string():
    with pytest.raises(ValueError, match=r"such as \('res5',\)"):
        build_network("resnet18", stages="res5")


def test_stage_modules_hold_all_parameters():
    with torch.device("meta"):
        for name, classifier in (("resnet50", "fc"), ("vgg16_bn", "classifier.6")):
            net = build_network(name)
            found = [id(p) for stage in net.stage_names for m in net.stage_modules(stage) for p in m.parameters()]
            rest = [id(parameter) for parameter in net.get_submodule(classifier).parameters()]
            assert found + rest == [id(parameter) for parameter in net.parameters()]
            assert net.stage_modules("conv1" if name == "vgg16_bn" else "stem")
    with pytest.raises(ValueError, match="no stage 'res6' was built"):
        build_network("resnet18", stages=("stem",)).stage_modules("res6")


# Convolutions of ResNet-50 (Table 1): 1, then 3, 4, 6, 3 blocks of three and a projection each; a convolution is one
# tensor and its norm two more; fc has two.
RESNET50_CONVOLUTIONS = (1, 3 * 3 + 1, 4 * 3 + 1, 6 * 3 + 1, 3 * 3 + 1)


@pytest.mark.parametrize("count", range(6))
def test_trainable_tensors_per_freeze_level(count):
    with torch.device("meta"):
        net = build_network("resnet50")
    assert net.freeze(count) is net
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 * sum(RESNET50_CONVOLUTIONS[count:]) + 2
    frozen = [module for module in net.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == sum(RESNET50_CONVOLUTIONS[:count])


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("resnet18", ("conv1.", "bn1.", "layer1.")),
        ("vgg16_bn", tuple(f"features.{i}." for i in range(14))),
    ],
)
def test_frozen_stages_stay_bit_identical_in_training(name, prefixes, randomize):
    net = randomize(build_network(name, num_classes=3, width=0.125))
    keys = list(net.state_dict())
    net.freeze(2).train()
    before = copy.deepcopy(net.state_dict())
    frozen = {key for key in keys if key.startswith(prefixes)}
    assert set(keys) - set(before) == {key for key in frozen if key.endswith("num_batches_tracked")}

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = net.state_dict()
    unchanged = {key for key in before if torch.equal(before[key], after[key])}
    assert unchanged == frozen & set(before)


def test_freezing_changes_no_output(randomize):
    net = randomize(build_network("resnet18", width=0.125)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(net.freeze(3)(x), expected)
        assert torch.equal(net.freeze(3)(x), expected), "freezing twice is freezing once"


def test_freezing_counts_stages_of_the_whole_network():
    head = build_network("resnet18", width=0.125, stages=("res5",)).freeze(4)
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not any(parameter.requires_grad for parameter in head.freeze(5).parameters())
    vgg = build_network("vgg16", width=0.125, stages=VGG_CONV).freeze(2)
    trainable = {name.split(".")[1] for name, parameter in vgg.named_parameters() if parameter.requires_grad}
    assert trainable == {"10", "12", "14", "17", "19", "21", "24", "26", "28"}


@pytest.mark.parametrize("count", [-1, 6])
def test_freezing_stages_that_do_not_exist(count):
    net = build_network("resnet18", width=0.125)
    with pytest.raises(ValueError, match=rf"cannot freeze {count} stages: expected 0 to 5 \(stem, res2"):
        net.freeze(count)


@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn"])
def test_bf16_autocast_and_channels_last(name, randomize):
    net = build_network(name, num_classes=5, width=0.25).freeze(2).eval()
    x = torch.randn(2, 3, 64, 64)
    feature = list(net.feature_info)[3]
    with torch.no_grad():
        expected = net(x)
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            c4, logits = net.forward_features(x, [feature])[feature], net(x)
    assert c4.dtype == logits.dtype == torch.bfloat16
    assert c4.is_contiguous(memory_format=torch.channels_last)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_compiles_to_one_graph(name):
    net = build_network(name, num_classes=5, width=0.125).freeze(1).eval()
    x = torch.randn(1, 3, 32, 32)
    feature = list(net.feature_info)[3]
    # The "eager" backend runs the traced graph as it is: this tests the tracing, not a code generator.
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    extract = torch.compile(net.forward_features, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
        assert torch.equal(extract(x, (feature,))[feature], net.forward_features(x, (feature,))[feature])
