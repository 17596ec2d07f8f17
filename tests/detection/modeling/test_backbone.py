import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from torchvision.models import resnet50

from resnet_backbone import build_network
from resnet_backbone.detection import NetworkBackbone
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.networks import FrozenBatchNorm2d
from resnet_backbone.pretraining.preprocessing import build_normalize
from resnet_backbone.weights import read_checkpoint

UNTRAINED = ("MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", True)


def randomise_statistics(network):
    generator = torch.Generator().manual_seed(0)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_features_are_the_networks_own_bit_by_bit(freeze_at):
    torch.manual_seed(0)
    network = build_network("resnet18", width=0.125, stages=("stem", "res2", "res3", "res4")).eval()
    randomise_statistics(network)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = network.forward_features(images, ("res2", "res4"))
        after = NetworkBackbone(network, out_features=("res2", "res4"), freeze_at=freeze_at)(images)
    assert list(after) == ["res2", "res4"]
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_c4_equals_torchvisions_resnet50_in_float64():
    torch.manual_seed(0)
    reference = resnet50(weights=None).double().eval()
    with torch.no_grad():
        randomise_statistics(reference)
        network = build_network("resnet50", stages=("stem", "res2", "res3", "res4")).double().eval()
        names = set(network.state_dict())
        network.load_state_dict({k: v for k, v in reference.state_dict().items() if k in names})
        x = images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            x = getattr(reference, stage)(x)
        found = NetworkBackbone(network, out_features=["res4"], freeze_at=2)(images)["res4"]
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("file", "name", "feature"),
    [
        ("faster_rcnn_R101.yaml", "resnet18", "res4"),
        ("faster_rcnn_VGG16.yaml", "vgg16", "conv5"),
    ],
)
def test_a_checkpoint_gives_the_same_c4_features_by_both_ways(
    detection_config, classifier, tmp_path, pretrain_config, file, name, feature
):
    """One image, once as the classifier is fed in pretraining, once by Detectron2's own preprocessing."""
    from resnet_backbone.engine.network_config import fill_from_metadata

    path = str(classifier(name))
    checkpoint = read_checkpoint(path)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    width = checkpoint.metadata.arguments["width"]
    network = build_network(name, 8, width=width).eval()
    network.load_state_dict(checkpoint.model)
    pretraining = pretrain_config(tmp_path)
    with torch.no_grad():
        expected = network.forward_features(build_normalize(pretraining)(image[None]), (feature,))[feature]

    cfg = detection_config(file, tmp_path, "MODEL.NETWORK.NAME", name, "MODEL.WEIGHTS", path)
    fill_from_metadata(cfg, checkpoint.metadata, path)
    assert cfg.INPUT.FORMAT == "RGB"
    model = build_model(cfg).eval()
    with torch.no_grad():
        found = model.backbone(model.preprocess_image([{"image": image}]).tensor)[feature]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_stages_after_the_last_output_feature_are_not_built(detection_config, tmp_path):
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "MODEL.NETWORK.WIDTH", 0.125, *UNTRAINED)
    backbone = build_backbone(cfg)
    assert backbone.network.stage_names == ("stem", "res2", "res3", "res4")
    assert not any(name.startswith(("network.layer4", "network.fc")) for name, _ in backbone.named_parameters())
    shape = backbone.output_shape()
    assert list(shape) == ["res4"] and shape["res4"].stride == 16 and shape["res4"].channels == 128


def test_freezing_follows_detectron2s_meaning(detection_config, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", 0.125, "MODEL.RESNETS.NORM", "BN", *UNTRAINED)
    for freeze_at, frozen in ((0, set()), (1, {"conv1"}), (2, {"conv1", "layer1"}), (9, None)):
        cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
        network = build_backbone(cfg).network
        still = {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
        assert still == ({"conv1", "layer1", "layer2", "layer3"} if frozen is None else frozen)
        assert any(isinstance(m, FrozenBatchNorm2d) for m in network.modules()) == (freeze_at > 0)


def test_pyramids_have_detectron2s_levels(detection_config, tmp_path):
    small = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.NETWORK.WIDTH", 0.125, "MODEL.FPN.OUT_CHANNELS", 16, *UNTRAINED)
    cfg = detection_config("faster_rcnn_R50_FPN.yaml", tmp_path, *small)
    images = torch.randn(1, 3, 64, 128)
    features = build_backbone(cfg)(images)
    assert {name: tuple(f.shape[1:]) for name, f in features.items()} == {
        "p2": (16, 16, 32),
        "p3": (16, 8, 16),
        "p4": (16, 4, 8),
        "p5": (16, 2, 4),
        "p6": (16, 1, 2),
    }
    cfg.MODEL.BACKBONE.NAME = "build_network_retinanet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert sorted(build_backbone(cfg)(images)) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.NETWORK.NAME", "resnet51"), ("resnet51", "resnet50")),
        (("MODEL.RESNETS.OUT_FEATURES", ["c4"]), ("c4", "OUT_FEATURES", "res4")),
        (("MODEL.NETWORK.NAME", "vgg16"), ("res4", "conv5")),
        (("MODEL.RESNETS.NORM", "nope"), ("nope", "FrozenBN")),
        (("MODEL.RESNETS.RES5_DILATION", 4), ("res5_dilation is 4", "1 or 2")),
        (("MODEL.NETWORK.SHORTCUT", "D"), ("shortcut is 'D'", "A, B, C")),
        (("MODEL.NETWORK.POOL5", False), ("MODEL.NETWORK.POOL5 is False", "resnet50", "Leave it at True")),
    ],
)
def test_what_the_network_does_not_have_stops(detection_config, tmp_path, overrides, words):
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *UNTRAINED, *overrides)
    with pytest.raises(ConfigError) as error:
        build_backbone(cfg)
    assert all(word in str(error.value) for word in words), str(error.value)
