import pytest
import timm
import torchvision
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg

from resnet_backbone.errors import InputError
from resnet_backbone.networks import list_networks
from resnet_backbone.weights.architectures import Architecture
from resnet_backbone.weights.preprocessing import PRESETS, refuse_contradiction, settle

TORCHVISION = [name for name in list_networks() if name in torchvision.models.list_models(torchvision.models)]


def settled(format, name, *, width=1.0, container="torch", has_bottlenecks=True, **others):
    values = dict(overrides={}, in_file={}, preset=None, source="file") | others
    architecture = Architecture(name, {"width": width}, 1000)
    return settle(architecture, format=format, container=container, has_bottlenecks=has_bottlenecks, **values)


def refusal(*arguments, **named) -> str:
    with pytest.raises(InputError) as caught:
        settled(*arguments, **named)
    return str(caught.value)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_convention_is_what_torchvision_does(name):
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    known = settled("torchvision", name)
    assert known.values["pixel_mean"] == pytest.approx([255 * v for v in transforms.mean])
    assert known.values["pixel_std"] == pytest.approx([255 * v for v in transforms.std])
    assert (known.values["channel_order"], known.values["stride_in_1x1"]) == ("RGB", False)
    assert "convention of torchvision" in known.sources["pixel_mean"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *((name, name) for name in TORCHVISION if name != "resnet34"),
        ("resnetv2_50", "preact_resnet50"),
        ("resnetv2_101", "preact_resnet101"),
    ],
)
def test_all_of_timms_weights_agree_with_the_convention(theirs, ours):
    format = "timm" if theirs.startswith(("vgg", "resnetv2")) else "torchvision"
    tags = timm.list_pretrained(f"{theirs}.*")
    assert tags
    for tag in tags:
        expected = timm.get_pretrained_cfg(tag)
        values = settled(format, ours, container="safetensors").values
        assert values["pixel_mean"] == pytest.approx([255 * v for v in expected.mean]), tag
        assert values["pixel_std"] == pytest.approx([255 * v for v in expected.std]), tag


def test_where_timms_weights_differ_the_user_is_asked():
    means = {timm.get_pretrained_cfg(tag).mean for tag in timm.list_pretrained("resnet34.*")}
    assert len(means) == 2
    assert "timm hands out weights with two" in refusal("torchvision", "resnet34", container="safetensors")
    assert not timm.list_pretrained("resnetv2_152.*")
    assert "--pixel-mean" in refusal("timm", "preact_resnet152")
    settled("torchvision", "resnet34", has_bottlenecks=False)  # torchvision's .pth


def test_msra_and_caffe2_as_detectron2_feeds_them():
    cfg = get_cfg()
    for values in (PRESETS["msra"], settled("caffe2", "resnet101").values):
        assert values["channel_order"] == cfg.INPUT.FORMAT
        assert list(values["pixel_mean"]) == cfg.MODEL.PIXEL_MEAN and list(values["pixel_std"]) == cfg.MODEL.PIXEL_STD
        assert values["stride_in_1x1"] == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    file = model_zoo.get_config_file("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    with open(file) as text:
        theirs = yaml.safe_load(text)["MODEL"]
    values = settled("caffe2", "resnext101_32x8d").values
    assert list(values["pixel_std"]) == theirs["PIXEL_STD"]
    assert values["stride_in_1x1"] == theirs["RESNETS"]["STRIDE_IN_1X1"]
    assert list(values["pixel_mean"]) == cfg.MODEL.PIXEL_MEAN and values["channel_order"] == cfg.INPUT.FORMAT


def test_keras_and_caffe():
    assert settled("keras", "resnet50").values == {
        "channel_order": "BGR",
        "pixel_mean": (103.939, 116.779, 123.68),
        "pixel_std": (1.0, 1.0, 1.0),
        "stride_in_1x1": True,
    }
    assert settled("caffe", "vgg16", has_bottlenecks=False).values["pixel_mean"] == (103.939, 116.779, 123.68)
    assert settled("caffe", "resnet50").values["pixel_mean"] == (103.0626, 115.9029, 123.1516)


def test_a_detectron2_file_says_neither():
    message = refusal("detectron2", "resnet50")
    for words in ("channel_order, pixel_mean, pixel_std, stride_in_1x1", "--preprocessing msra", "--stride-in-1x1"):
        assert words in message
    assert "BGR, mean [103.53, 116.28, 123.675], std [1, 1, 1], stride in the first 1×1" in message
    assert "RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375], stride in the 3×3" in message
    assert "\n" not in message
    # A stride that the network does not have is not asked for.
    assert "stride_in_1x1" not in refusal("detectron2", "resnet18", has_bottlenecks=False)
    assert "--channel-order --stride-in-1x1," in refusal(
        "detectron2", "resnet50", in_file={"pixel_mean": (1.0, 2.0, 3.0), "pixel_std": (1.0, 1.0, 1.0)}
    )


@pytest.mark.parametrize(("name", "width"), [("plain18", 1.0), ("cifar_resnet20", 1.0), ("resnet50", 0.5)])
def test_networks_that_nobody_hands_out_have_no_convention(name, width):
    assert "--preprocessing" in refusal("torchvision", name, width=width)
    assert settled("torchvision", name, width=width, preset="torchvision").values == PRESETS["torchvision"]


def test_who_goes_before_whom():
    known = settled("caffe2", "resnet50", preset="torchvision", overrides={"channel_order": "BGR"})
    assert known.values == {**PRESETS["torchvision"], "channel_order": "BGR"}
    assert known.sources == {
        "channel_order": "override",
        **dict.fromkeys(("pixel_mean", "pixel_std", "stride_in_1x1"), "--preprocessing torchvision"),
    }


def test_what_the_file_says_is_not_contradicted():
    in_file = {"pixel_mean": (103.53, 116.28, 123.675)}
    assert settled("detectron2", "resnet50", preset="msra", in_file=in_file).sources["pixel_mean"] == "the file"
    for named in (
        {"preset": "torchvision"},
        {"preset": "msra", "overrides": {"pixel_mean": (102.9801, 115.9465, 122.7717)}},
    ):
        assert "itself says [103.53, 116.28, 123.675]" in refusal("detectron2", "resnet50", in_file=in_file, **named)
    with pytest.raises(InputError, match=r"--channel-order is BGR, but file itself says RGB"):
        refuse_contradiction("channel_order", "BGR", "RGB", "file")
    assert "--preprocessing is caffe, expected one of torchvision, msra" in refusal("keras", "resnet50", preset="caffe")
