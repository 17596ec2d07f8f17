"""What weights say about a configuration, and a configuration about a network."""

from dataclasses import replace

import pytest
import torch

from resnet_backbone.engine.config import COMMAND_LINE, ConfigError, get_key, load_config, origin, set_key
from resnet_backbone.engine.network_config import (
    ARGUMENT_KEYS,
    configured_network,
    fill_adjustable,
    fill_from_metadata,
    network_name,
    same_value,
)
from resnet_backbone.networks import ARGUMENTS
from resnet_backbone.weights import Metadata
from tests.engine.tiny import refusal


@pytest.fixture
def metadata():
    return Metadata(
        kind="classifier",
        architecture="resnet50",
        arguments={"width": 0.25, "stride_in_1x1": True},
        channel_order="RGB",
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        norm_statistics="precise",
        norm_epsilon=1e-5,
        class_names=("a", "b"),
    )


class TestMetadata:
    def test_fills_what_nobody_set(self, cfg, metadata):
        fill_from_metadata(cfg, metadata, "f.pth")
        assert cfg.INPUT.FORMAT == "RGB"
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
        assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
        assert (cfg.MODEL.NETWORK.NAME, cfg.MODEL.NETWORK.WIDTH) == ("resnet50", 0.25)
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is True
        assert origin(cfg, "INPUT.FORMAT") == "metadata of f.pth"

    @pytest.mark.parametrize(
        ("key", "mine", "theirs"),
        [
            ("INPUT.FORMAT", "BGR", "RGB"),
            ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]", "[123.675, 116.28, 103.53]"),
            ("MODEL.PIXEL_STD", "[1, 1, 1]", "[58.395, 57.12, 57.375]"),
            ("MODEL.NETWORK.NAME", "resnet101", "resnet50"),
            ("MODEL.NETWORK.WIDTH", "1.0", "0.25"),
            ("MODEL.RESNETS.STRIDE_IN_1X1", "False", "True"),
        ],
    )
    def test_a_contradiction_names_both_values_and_who_set_it(self, cfg, metadata, key, mine, theirs):
        load_config(cfg, None, [key, mine])
        message = refusal(fill_from_metadata, cfg, metadata, "f.pth")
        for part in (f"{key} is {mine} (command line)", f"in f.pth were trained with {theirs}"):
            assert part in message

    def test_the_same_value_is_no_contradiction(self, cfg, metadata):
        float32 = torch.tensor(metadata.pixel_mean).tolist()
        load_config(cfg, None, ["INPUT.FORMAT", "RGB"])
        set_key(cfg, "MODEL.PIXEL_MEAN", float32, "a.yaml")
        fill_from_metadata(cfg, metadata, "f.pth")
        assert origin(cfg, "INPUT.FORMAT") == COMMAND_LINE
        assert tuple(cfg.MODEL.PIXEL_MEAN) == tuple(float32)
        assert tuple(float32) != metadata.pixel_mean

    def test_same_value(self):
        assert same_value((1.0, 2.0), [1, 2]) and same_value(0.0, 0) and same_value("a", "a")
        assert not same_value([1.0], [1.0, 2.0]) and not same_value(123.675, 123.68) and not same_value(True, False)


def test_network_arguments_are_what_the_network_takes(cfg):
    set_key(cfg, "MODEL.NETWORK.WIDTH", 0.5, "test")
    set_key(cfg, "MODEL.NETWORK.NAME", "vgg16_bn", "test")
    assert configured_network(cfg) == ("vgg16_bn", {"width": 0.5, "norm": "FrozenBN", "pool5": True})
    set_key(cfg, "MODEL.NETWORK.NAME", "cifar_resnet20", "test")
    expected = {"width": 0.5, "norm": "FrozenBN", "stride_in_1x1": True, "zero_init_last_norm": False}
    assert configured_network(cfg) == ("cifar_resnet20", expected)


@pytest.mark.parametrize(
    ("key", "value", "has", "has_not"),
    [
        ("MODEL.NETWORK.SHORTCUT", "C", "resnet50", "plain34"),
        ("MODEL.NETWORK.POOL5", False, "vgg16", "resnet50"),
        ("MODEL.RESNETS.RES5_DILATION", 2, "resnet50", "vgg16"),
    ],
)
def test_a_key_that_the_network_has_no_choice_in_stops(cfg, key, value, has, has_not):
    set_key(cfg, key, value, "test")
    set_key(cfg, "MODEL.NETWORK.NAME", has, "test")
    assert value in configured_network(cfg)[1].values()
    set_key(cfg, "MODEL.NETWORK.NAME", has_not, "test")
    with pytest.raises(
        ConfigError, match=rf"{key} is {value} \(test\), but {has_not} does not support that\. Leave it"
    ):
        configured_network(cfg)


class TestAnEmptyName:
    """Detectron2's MODEL.RESNETS decides."""

    @pytest.mark.parametrize(
        ("depth", "groups", "width_per_group", "name"),
        [
            (18, 1, 64, "resnet18"),
            (34, 1, 64, "resnet34"),
            (50, 1, 64, "resnet50"),
            (101, 1, 64, "resnet101"),
            (152, 1, 64, "resnet152"),
            (50, 32, 4, "resnext50_32x4d"),
            (101, 32, 8, "resnext101_32x8d"),
            (50, 1, 128, "wide_resnet50_2"),
        ],
    )
    def test_depth_groups_and_width_choose_the_row(self, cfg, depth, groups, width_per_group, name):
        resnets = cfg.MODEL.RESNETS
        resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = depth, groups, width_per_group
        assert network_name(cfg) == configured_network(cfg)[0] == name

    def test_detectron2s_defaults_are_a_resnet50(self, cfg):
        assert network_name(cfg) == "resnet50"

    def test_what_no_row_is_stops(self, cfg):
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NUM_GROUPS = 152, 32
        assert "describes no network of the catalogue (DEPTH 152, NUM_GROUPS 32, WIDTH_PER_GROUP 64)" in refusal(
            configured_network, cfg
        )

    def test_a_name_stands_above_the_depth(self, cfg):
        cfg.MODEL.NETWORK.NAME, cfg.MODEL.RESNETS.DEPTH = "resnet18", 101
        assert configured_network(cfg)[0] == "resnet18"

    @pytest.mark.parametrize("said", ["MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NUM_GROUPS"])
    def test_weights_of_another_network_than_the_user_described(self, cfg, metadata, said):
        metadata = replace(metadata, architecture="resnet101")
        fill_from_metadata(cfg.clone(), metadata, "f.pth")  # the defaults said nothing
        set_key(cfg, said, get_key(cfg, said), "a.yaml")
        message = refusal(fill_from_metadata, cfg, metadata, "f.pth")
        assert f"MODEL.NETWORK.NAME is resnet50 ({said} of a.yaml), but the weights in f.pth were" in message
        assert "Set MODEL.NETWORK.NAME to resnet101" in message


@pytest.mark.parametrize("name", ["", "resnet50", "vgg16"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DEFORM_ON_PER_STAGE", [False, True, True, True]),
        ("STEM_OUT_CHANNELS", 32),
        ("RES2_OUT_CHANNELS", 128),
        ("STEM_TYPE", "deeplab"),  # a key of Detectron2's DeepLab project
    ],
)
def test_what_no_network_here_has_is_refused_by_key_and_value(cfg, name, key, value):
    cfg.MODEL.NETWORK.NAME = name
    cfg.MODEL.RESNETS[key] = value
    assert f"MODEL.RESNETS.{key} is {value}, but" in refusal(configured_network, cfg)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("resnet50", "NUM_GROUPS", 32), ("vgg16", "WIDTH_PER_GROUP", 8), ("resnext50_32x4d", "NUM_GROUPS", 16)],
)
def test_groups_that_a_named_network_does_not_have_are_refused(cfg, name, key, value):
    cfg.MODEL.NETWORK.NAME = name
    cfg.MODEL.RESNETS[key] = value
    assert f"MODEL.RESNETS.{key} is {value}, but {name}" in refusal(configured_network, cfg)


@pytest.mark.parametrize("channels", [64, 256])
def test_detectron2s_channels_of_basic_blocks(cfg, channels):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, channels
    assert configured_network(cfg)[0] == "resnet18"


class TestArguments:
    """Each argument of the catalogue that decides what is computed is compared, or left to the user for a reason."""

    @pytest.mark.parametrize("kind", ["classifier", "detector"])
    def test_a_dilated_last_stage(self, cfg, metadata, kind):
        """Of a detector it must agree; a detector may dilate the stage of a classifier."""
        metadata = replace(metadata, kind=kind, arguments={**metadata.arguments, "res5_dilation": 2})
        fill_from_metadata(cfg.clone(), metadata, "f.pth")
        set_key(cfg, "MODEL.RESNETS.RES5_DILATION", 1, "a.yaml")
        if kind == "classifier":
            fill_from_metadata(cfg, metadata, "f.pth")
            assert cfg.MODEL.RESNETS.RES5_DILATION == 1
        else:
            message = refusal(fill_from_metadata, cfg, metadata, "f.pth")
            assert "MODEL.RESNETS.RES5_DILATION is 1 (a.yaml), but the weights in f.pth were trained with 2" in message

    def test_a_detectors_dilation_is_taken_over(self, cfg, metadata):
        fill_from_metadata(cfg, replace(metadata, kind="detector", arguments={"res5_dilation": 2}), "f.pth")
        assert cfg.MODEL.RESNETS.RES5_DILATION == 2
        assert origin(cfg, "MODEL.RESNETS.RES5_DILATION") == "metadata of f.pth"

    def test_what_a_classifier_also_serves_is_taken_where_nobody_said_anything(self, cfg, metadata):
        metadata = replace(metadata, arguments={"pool5": False, "res5_dilation": 2, "norm": "GN", "width": 0.25})
        set_key(cfg, "MODEL.RESNETS.RES5_DILATION", 1, "a.yaml")
        fill_adjustable(cfg, metadata, "f.pth")
        assert cfg.MODEL.NETWORK.POOL5 is False and cfg.MODEL.RESNETS.RES5_DILATION == 1
        assert origin(cfg, "MODEL.RESNETS.NORM") is None and origin(cfg, "MODEL.NETWORK.WIDTH") is None

    def test_an_argument_of_another_version(self, cfg, metadata):
        metadata = replace(metadata, arguments={"blurred": True})
        assert "resnet50 with blurred=True, which this version does not know" in refusal(
            fill_from_metadata, cfg, metadata, "f.pth"
        )

    def test_every_key_is_one_of_the_configuration(self, cfg):
        assert {name: get_key(cfg, key) for name, key in ARGUMENT_KEYS.items()}.keys() == ARGUMENT_KEYS.keys()
        for name, key in ARGUMENT_KEYS.items():
            if name not in ("stride_in_1x1", "norm"):  # of which Detectron2 has another default
                assert get_key(cfg, key) == ARGUMENTS[name].default, name
