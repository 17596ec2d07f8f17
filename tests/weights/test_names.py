import re

import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

from resnet_backbone.networks import build_network
from resnet_backbone.weights.names import FORMATS, detectron2_name, map_keys, recognize


def on_meta(build, *arguments, **named) -> list[str]:
    with torch.device("meta"):
        return list(build(*arguments, **named).state_dict())


def detectron2_names(depth: int) -> list[str]:
    """Names of Detectron2's own network, its classifier's included."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    with torch.device("meta"):
        return [*build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict(), "linear.weight", "linear.bias"]


def ours(format: str, names: list[str]) -> list[str]:
    """Our names, which must exist for all."""
    keys = map_keys(format, names)
    assert not keys.dropped and not keys.unknown and list(keys.mapped) == names
    return list(keys.mapped.values())


def counted(names) -> set[str]:
    return {name for name in names if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (on_meta(torchvision.models.resnet18), "torchvision"),
        (on_meta(torchvision.models.vgg16_bn), "torchvision"),
        (on_meta(timm.create_model, "resnet50"), "torchvision"),
        (on_meta(timm.create_model, "vgg16"), "timm"),
        (on_meta(timm.create_model, "vgg19_bn", num_classes=0), "timm"),
        (on_meta(timm.create_model, "resnetv2_50"), "timm"),
        (detectron2_names(50), "detectron2"),
        ([f"backbone.bottom_up.{name}" for name in detectron2_names(50)], "detectron2"),
        (["conv1_w", "fc1000_b"], "caffe2"),
        (["conv1_conv/kernel:0", "conv1_conv/bias:0"], "keras"),
        (["block1_conv1/kernel"], "keras"),
        (["conv1/0", "bn_conv1/0"], "caffe"),
        (["conv1_1/0", "conv1_1/1"], "caffe"),
        (on_meta(torchvision.models.densenet121), None),
        (on_meta(timm.create_model, "vit_tiny_patch16_224"), None),
    ],
)
def test_recognize(names, format):
    assert recognize(names) == format
    assert format is None or format in FORMATS


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_detectron2s_own_names_both_ways(depth):
    theirs = detectron2_names(depth)
    expected = counted(on_meta(build_network, f"resnet{depth}"))
    assert set(ours("detectron2", theirs)) == expected
    assert {detectron2_name(name) for name in expected} == set(theirs)
    for name in expected:
        assert map_keys("detectron2", [detectron2_name(name)]).mapped == {detectron2_name(name): name}


def test_a_detectors_backbone_is_taken_out():
    fpn = [
        "backbone.bottom_up.res2.0.shortcut.norm.bias",
        "backbone.fpn_lateral2.weight",
        "roi_heads.box_head.fc1.bias",
    ]
    keys = map_keys("detectron2", [*fpn, "proposal_generator.rpn_head.conv.weight"])
    assert keys.mapped == {fpn[0]: "layer1.0.downsample.1.bias"}
    assert list(keys.dropped) == [*fpn[1:], "proposal_generator.rpn_head.conv.weight"]
    assert set(keys.dropped.values()) == {"belongs to the detector's heads, not to the backbone"}
    assert ours("detectron2", ["backbone.res4.5.conv3.weight", "roi_heads.res5.0.conv1.norm.running_var"]) == [
        "layer3.5.conv3.weight",
        "layer4.0.bn1.running_var",
    ]


def test_what_the_rules_do_not_explain_is_unknown():
    names = ["stem.conv1.weight", "stem.conv2.weights.0", "res4.0.conv2_offset.weight", "backbone.extra.weight"]
    names.append("roi_heads.res5.0.conv2_offset.weight")
    keys = map_keys("detectron2", names)
    assert keys.unknown == tuple(names[1:]) and not keys.dropped
    assert map_keys("caffe2", ["conv1_gn_s", "res2_0_branch2d_w"]).unknown == ("conv1_gn_s", "res2_0_branch2d_w")
    assert map_keys("keras", ["conv1_conv/gamma:0", "conv2_block1_preact_bn/gamma:0"]).mapped == {}
    assert map_keys("caffe", ["bn_conv1/3", "res2a_branch2a/scale"]).mapped == {}
    assert map_keys("timm", ["stem.conv.weight", "stages.0.blocks.0.se.weight"]).unknown == (
        "stages.0.blocks.0.se.weight",
    )
    for name in ("layer1.0.conv1.bias.more", "features.0.weight", "layer1.norm.weight", "layer5.0.conv1.weight"):
        assert detectron2_name(name) is None


@pytest.mark.parametrize("depths", [(3, 4, 6, 3), (2, 2, 2, 2)])
def test_caffe2_as_detectron2_reads_it(depths):
    bottleneck = depths[0] == 3
    names = ["conv1_w", "res_conv1_bn_s", "res_conv1_bn_b", "res_conv1_bn_rm", "res_conv1_bn_riv", "pred_w", "pred_b"]
    for stage, depth in enumerate(depths, start=2):
        for block in range(depth):
            for branch in ("2a", "2b", "2c")[: 2 + bottleneck] + (("1",) if block == 0 else ()):
                names += [
                    f"res{stage}_{block}_branch{branch}_{entry}" for entry in ("w", "bn_s", "bn_b", "bn_rm", "bn_riv")
                ]
                names += [f"res{stage}_{block}_branch{branch}_bn_running_mean"] if block == 1 else []
    names = [name for name in names if not (name.replace("running_mean", "rm") in names and "running_mean" in name)]
    theirs = convert_basic_c2_names(names)
    assert [detectron2_name(name) for name in ours("caffe2", names)] == theirs


def test_caffe2s_optimizer_and_heads_are_dropped():
    keys = map_keys("caffe2", ["conv1_w", "conv1_w_momentum", "conv_rpn_w", "cls_score_b", "fpn_inner_res2_2_sum_w"])
    assert keys.mapped == {"conv1_w": "conv1.weight"}
    assert keys.dropped["conv1_w_momentum"] == "optimizer state"
    assert len(keys.dropped) == 4 and not keys.unknown
    assert ours("caffe2", ["fc1000_w", "fc1000_b", "conv1_b"]) == ["fc.weight", "fc.bias", "conv1.bias"]


def test_timms_names_cover_a_whole_network():
    for theirs, name in (("resnetv2_50", "preact_resnet50"), ("resnetv2_101", "preact_resnet101")):
        assert set(ours("timm", on_meta(timm.create_model, theirs))) == set(on_meta(build_network, name))
    for name in ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn"):
        assert set(ours("timm", on_meta(timm.create_model, name))) == set(on_meta(torchvision.models.get_model, name))


# As in the published model definitions of both libraries: name there, name in torchvision.
KERAS = {
    "conv1_conv/kernel:0": "conv1.weight",
    "conv1_conv/bias:0": "conv1.bias",
    "conv1_bn/gamma:0": "bn1.weight",
    "conv1_bn/moving_variance:0": "bn1.running_var",
    "conv2_block1_0_conv/kernel:0": "layer1.0.downsample.0.weight",
    "conv2_block1_0_bn/moving_mean:0": "layer1.0.downsample.1.running_mean",
    "conv4_block23_2_conv/bias:0": "layer3.22.conv2.bias",
    "conv5_block3_3_bn/beta:0": "layer4.2.bn3.bias",
    "conv5_block3_3_bn/beta": "layer4.2.bn3.bias",
    "predictions/kernel:0": "fc.weight",
}
CAFFE = {
    "conv1/0": "conv1.weight",
    "conv1/1": "conv1.bias",
    "bn_conv1/0": "bn1.running_mean",
    "bn_conv1/2": "bn1.scale_factor",
    "scale_conv1/0": "bn1.weight",
    "res2a_branch1/0": "layer1.0.downsample.0.weight",
    "bn2a_branch1/1": "layer1.0.downsample.1.running_var",
    "scale5c_branch2c/1": "layer4.2.bn3.bias",
    "res4f_branch2b/0": "layer3.5.conv2.weight",
    "res4b22_branch2a/0": "layer3.22.conv1.weight",
    "bn3b1_branch2a/0": "layer2.1.bn1.running_mean",
    "fc1000/1": "fc.bias",
}


@pytest.mark.parametrize(("format", "pairs"), [("keras", KERAS), ("caffe", CAFFE)])
def test_keras_and_caffes_residual_networks(format, pairs):
    for theirs, expected in pairs.items():
        assert ours(format, [theirs]) == [expected]


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
@pytest.mark.parametrize(
    ("format", "layer", "entries", "last"),
    [
        ("keras", "block{}_conv{}", ("/kernel:0", "/bias:0"), ("fc1", "fc2", "predictions")),
        ("caffe", "conv{}_{}", ("/0", "/1"), ("fc6", "fc7", "fc8")),
    ],
)
def test_keras_and_caffes_vgg(name, format, layer, entries, last):
    """In the order of the layers, Keras' and Caffe's names are torchvision's."""
    plan = (2, 2, 3, 3, 3) if name == "vgg16" else (2, 2, 4, 4, 4)
    layers = [layer.format(b, c) for b, depth in enumerate(plan, 1) for c in range(1, depth + 1)]
    names = [place + entry for place in (*layers, *last) for entry in entries]
    shuffled = sorted(names, key=lambda n: re.sub(r"\d", "", n[::-1]))  # a file's order says nothing
    mapped = map_keys(format, shuffled).mapped
    assert [mapped[n] for n in names] == on_meta(torchvision.models.get_model, name)
