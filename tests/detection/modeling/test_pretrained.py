"""Backbones with their weights by one call, in Detectron2's LazyConfig."""

import logging

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.detection import pretrained_backbone, pretrained_input, pretrained_res5
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError
from resnet_backbone.networks import FrozenBatchNorm2d, build_network
from resnet_backbone.weights import read_checkpoint, write_checkpoint

FEATURES = ["res2", "res3", "res4", "res5"]


@pytest.fixture
def weights(classifier) -> str:
    return str(classifier("resnet18", "MODEL.NETWORK.WIDTH", 0.25))


def test_features_are_the_classifiers(weights):
    """Against the whole classifier, filled by torch's own load_state_dict."""
    checkpoint = read_checkpoint(weights)
    whole = build_network("resnet18", len(checkpoint.metadata.class_names), width=0.25)
    whole.load_state_dict(checkpoint.model, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        value = pretrained_backbone(weights=weights, out_features=["res3", "res4"])(images)
        expected = whole.eval().forward_features(images, ["res3", "res4", "res5"])
        head = pretrained_res5(weights=weights)(expected["res4"])
    assert list(value) == ["res3", "res4"]
    for feature, tensor in value.items():
        assert torch.allclose(tensor, expected[feature], atol=1e-5)
    assert torch.allclose(head, expected["res5"], atol=1e-5)


def test_no_stage_beyond_the_last_feature_is_built_and_the_first_are_frozen(weights, caplog):
    caplog.set_level(logging.INFO, "resnet_backbone")
    logging.getLogger("resnet_backbone").addHandler(caplog.handler)
    backbone = pretrained_backbone(weights=weights, out_features=["res4"], freeze_at=2)
    assert not any(name.startswith(("layer4", "fc")) for name, _ in backbone.network.named_modules())
    trained = {name.split(".")[0] for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3"}
    counted = [k for k in backbone.state_dict() if not k.endswith("num_batches_tracked")]
    assert f"all {len(counted)} of {len(counted)} tensors loaded from {weights}" in caplog.text


def test_it_tells_how_it_is_fed(weights):
    metadata = read_checkpoint(weights).metadata
    backbone = pretrained_backbone(weights=weights, out_features=["res4"])
    fed = {"pixel_mean": list(metadata.pixel_mean), "pixel_std": list(metadata.pixel_std)}
    fed["input_format"] = metadata.channel_order
    assert pretrained_input(weights) == fed == {name: getattr(backbone, name) for name in fed}


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_the_norm(weights, norm):
    backbone = pretrained_backbone(weights=weights, out_features=["res4"], norm=norm)
    kinds = {type(m) for m in backbone.modules() if "Norm" in type(m).__name__}
    assert kinds == {FrozenBatchNorm2d if norm == "FrozenBN" else nn.BatchNorm2d}


def test_a_network_without_batch_norm(classifier):
    backbone = pretrained_backbone(weights=str(classifier("vgg16")), out_features=["conv5"])
    assert not any("Norm" in type(m).__name__ for m in backbone.modules())


def test_what_cannot_be_used(weights, classifier, tmp_path):
    with pytest.raises(InputError, match="no feature 'conv5', expected some of stem, res2"):
        pretrained_backbone(weights=weights, out_features=["conv5"])
    with pytest.raises(ConfigError, match=r"the vgg16 in .* has no res5, only conv1"):
        pretrained_res5(weights=str(classifier("vgg16")))
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        pretrained_input(str(tmp_path / "nowhere.pth"))
    never = str(classifier("resnet18", "TEST.PRECISE_BN.ENABLED", False))
    with pytest.raises(ConfigError, match="frozen batch normalizations without statistics"):
        pretrained_backbone(weights=never, out_features=["res4"])
    pretrained_backbone(weights=never, out_features=["res4"], norm="BN")
    with pytest.raises(ConfigError, match="backbone has 5 frozen batch normalizations without statistics"):
        pretrained_backbone(weights=never, out_features=["res4"], norm="BN", freeze_at=2)

    detector = read_checkpoint(weights)
    object.__setattr__(detector.metadata, "kind", "detector")
    write_checkpoint(tmp_path / "detector.pth", detector)
    with pytest.raises(ConfigError, match="holds a detector; give a classifier's checkpoint"):
        pretrained_input(str(tmp_path / "detector.pth"))


@pytest.mark.parametrize("zoo", ["mask_rcnn_fpn", "mask_rcnn_c4", "retinanet", "cascade_rcnn"])
def test_detectron2s_lazy_models(weights, zoo):
    """Each is built as Detectron2's lazy training script does, and takes a step."""
    model = model_zoo.get_config(f"common/models/{zoo}.py").model
    model.update(pretrained_input(weights))
    body = LazyCall(pretrained_backbone)(weights=weights, out_features=FEATURES, freeze_at=2)
    if zoo == "mask_rcnn_c4":
        model.backbone = body
        body.out_features = ["res4"]
        model.proposal_generator.head.in_channels = 64
        model.roi_heads.res5 = LazyCall(pretrained_res5)(weights=weights)
        model.roi_heads.box_predictor.input_shape.channels = 128
        model.roi_heads.mask_head.input_shape.channels = 128
    else:
        model.backbone.bottom_up = body
        if zoo == "retinanet":
            body.out_features = FEATURES[1:]
            model.backbone.top_block.in_channels = 128
    if "roi_heads" in model:
        model.roi_heads.batch_size_per_image = 16
        model.proposal_generator.post_nms_topk = (50, 50)
    torch.manual_seed(0)
    detector = instantiate(model)
    fed = getattr(detector.backbone, "bottom_up", detector.backbone)
    assert detector.pixel_mean.flatten().tolist() == pytest.approx(fed.pixel_mean)
    assert detector.pixel_std.flatten().tolist() == pytest.approx(fed.pixel_std)
    assert getattr(detector, "input_format", fed.input_format) == fed.input_format
    boxes = Boxes(torch.tensor([[8.0, 8.0, 56.0, 72.0]]))
    instances = Instances((96, 128), gt_boxes=boxes, gt_classes=torch.tensor([0]))
    if getattr(detector, "roi_heads", None) is not None:
        instances.gt_masks = BitMasks(torch.ones(1, 96, 128, dtype=torch.bool))
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    with EventStorage():
        losses = detector.train()([{"image": image, "instances": instances, "height": 96, "width": 128}])
    assert 0 < sum(losses.values()).item() < 100  # random weights under frozen norms gave over a thousand
