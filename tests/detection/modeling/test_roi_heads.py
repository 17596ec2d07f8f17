import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torchvision.models import vgg16

from resnet_backbone import build_network
from resnet_backbone.detection import VGGBoxHead
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.network_config import fill_from_metadata
from resnet_backbone.weights import Checkpoint, Metadata, read_checkpoint, write_checkpoint

UNTRAINED = ("MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", True)


def test_res5_is_the_classifiers_layer4(detection_config, classifier, tmp_path):
    path = str(classifier("resnet18"))
    checkpoint = read_checkpoint(path)
    network = build_network("resnet18", 8, width=0.125).eval()
    network.load_state_dict(checkpoint.model)
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", path)
    fill_from_metadata(cfg, checkpoint.metadata, path)
    model = build_model(cfg)  # in training mode: frozen BN does not notice

    features = torch.randn(3, 32, 14, 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.roi_heads.res5(features), network.layer4(features))
    assert model.roi_heads.box_predictor.cls_score.in_features == 64
    pooler = model.roi_heads.pooler
    assert pooler.output_size == (14, 14) and pooler.level_poolers[0].spatial_scale == 1 / 16


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_res5_has_the_stride_where_the_configuration_says(detection_config, tmp_path, stride_in_1x1):
    keys = ("MODEL.NETWORK.WIDTH", 0.125, "MODEL.RESNETS.STRIDE_IN_1X1", stride_in_1x1, *UNTRAINED)
    block = build_model(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys)).roi_heads.res5[0]
    assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if stride_in_1x1 else ((1, 1), (2, 2)))


@pytest.fixture
def vgg_head(detection_config, tmp_path):
    """A head of full width's topology at an eighth, with weights cut out of torchvision's layers' shapes."""
    cfg = detection_config("faster_rcnn_VGG16.yaml", tmp_path, "MODEL.NETWORK.WIDTH", 0.125)
    torch.manual_seed(0)
    return VGGBoxHead(cfg, ShapeSpec(channels=64, height=7, width=7))


def test_vgg_head_equals_torchvisions_classifier(vgg_head):
    reference = vgg16(weights=None).classifier[:6].eval()
    reference[0], reference[3] = vgg_head.fc6, vgg_head.fc7
    features = torch.randn(5, 64, 7, 7)
    vgg_head.eval()
    with torch.no_grad():
        assert torch.equal(vgg_head(features), reference(features.flatten(1)))
    assert vgg_head.output_shape == ShapeSpec(channels=512)
    assert vgg_head.dropout.p == reference[2].p == reference[5].p


def test_vgg_head_drops_half_of_both_layers_in_training(vgg_head):
    features = torch.randn(200, 64, 7, 7)
    vgg_head.train()
    with torch.no_grad():
        active = vgg_head.fc6(features.flatten(1)).relu() > 0
        seen = []
        vgg_head.fc7.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        out = vgg_head(features)
    assert (seen[0][active] == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    vgg_head.eval()
    with torch.no_grad():
        positive = vgg_head.fc7(seen[0]) > 0
    assert (out[positive] == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(out[out > 0], 2 * vgg_head.fc7(seen[0]).relu()[out > 0])  # inverted dropout


def test_vgg_weights_go_to_fc6_and_fc7(detection_config, classifier, tmp_path):
    path = str(classifier("vgg16"))
    checkpoint = read_checkpoint(path)
    cfg = detection_config("faster_rcnn_VGG16.yaml", tmp_path, "MODEL.WEIGHTS", path)
    fill_from_metadata(cfg, checkpoint.metadata, path)
    head = build_model(cfg).roi_heads.box_head
    for layer, number in ((head.fc6, 0), (head.fc7, 3)):
        assert torch.equal(layer.weight, checkpoint.model[f"classifier.{number}.weight"])
        assert torch.equal(layer.bias, checkpoint.model[f"classifier.{number}.bias"])


@pytest.mark.parametrize(
    ("file", "overrides", "words"),
    [
        ("faster_rcnn_VGG16.yaml", ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14), ("14×14", "7×7", "POOLER_RESOLUTION")),
        ("faster_rcnn_VGG16.yaml", ("MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads"), ("res5", "vgg16", "VGGBoxHead")),
        (
            "faster_rcnn_R50.yaml",
            ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "VGGBoxHead"),
            ("fc6", "resnet50", "NetworkRes5ROIHeads"),
        ),
    ],
)
def test_a_head_that_does_not_fit_the_network_stops(detection_config, tmp_path, file, overrides, words):
    cfg = detection_config(file, tmp_path, "MODEL.NETWORK.WIDTH", 0.125, *UNTRAINED, *overrides)
    with pytest.raises(ConfigError) as error:
        build_model(cfg)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_resnet50_c4_is_covered_whole(detection_config, tmp_path, caplog):
    """All 215 tensors of the backbone and all 50 of conv5_x, of the full-size network."""
    network = build_network("resnet50", 2)
    metadata = Metadata(
        kind="classifier", architecture="resnet50", arguments={"width": 1.0, "stride_in_1x1": False, "norm": "BN"},
        channel_order="RGB", pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0), norm_statistics="running",
        norm_epsilon=1e-5, class_names=("a", "b"),
    )  # fmt: skip
    write_checkpoint(tmp_path / "r50.pth", Checkpoint(network.state_dict(), metadata))
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "MODEL.WEIGHTS", tmp_path / "r50.pth")
    fill_from_metadata(cfg, metadata, "r50.pth")
    with caplog.at_level("INFO"):
        model = build_model(cfg)
    assert f"215 of 215 backbone tensors, 50 of 50 head tensors from {tmp_path / 'r50.pth'}\n" in caplog.text
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, network.layer4[2].conv3.weight)
    assert torch.equal(model.backbone.network.layer3[5].bn3.running_var, network.layer3[5].bn3.running_var)
