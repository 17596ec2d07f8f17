"""Detectron2's own configs with the backbone exchanged by name: they build and train; and its ResNet gives the same."""

import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.detection import add_network_config
from resnet_backbone.detection.weights import is_frozen_norm
from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, Metadata, write_checkpoint
from tests.detection.detectron2_names import detectron2_state

C4 = {"MODEL.BACKBONE.NAME": "build_network_backbone", "MODEL.ROI_HEADS.NAME": "NetworkRes5ROIHeads"}
DC5 = {"MODEL.BACKBONE.NAME": "build_network_backbone"}
FPN = {"MODEL.BACKBONE.NAME": "build_network_fpn_backbone"}
RETINANET = {"MODEL.BACKBONE.NAME": "build_network_retinanet_fpn_backbone"}
VGG_FPN = {
    "MODEL.NETWORK.NAME": "vgg16",
    "MODEL.NETWORK.WIDTH": 0.25,
    "MODEL.RESNETS.OUT_FEATURES": ["conv3", "conv4", "conv5", "pool5"],
    "MODEL.FPN.IN_FEATURES": ["conv3", "conv4", "conv5", "pool5"],
}
VGG_RETINANET = {
    "MODEL.NETWORK.NAME": "vgg16",
    "MODEL.NETWORK.WIDTH": 0.25,
    "MODEL.RESNETS.OUT_FEATURES": ["conv4", "conv5", "pool5"],
    "MODEL.FPN.IN_FEATURES": ["conv4", "conv5", "pool5"],
}

# Losses of Detectron2's models by name, as its documentation of each has them.
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
BOX = {"loss_cls", "loss_box_reg"}
CONFIGS = [
    ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", C4, RPN | BOX),
    ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", DC5, RPN | BOX),
    ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN, RPN | BOX),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", FPN, RPN | BOX | {"loss_mask"}),
    ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", FPN, RPN | BOX | {"loss_keypoint"}),
    ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RETINANET, {"loss_cls", "loss_box_reg"}),
    ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", FPN, RPN | BOX | {"loss_mask", "loss_sem_seg"}),
    ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN | VGG_FPN, RPN | BOX),
    ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RETINANET | VGG_RETINANET, {"loss_cls", "loss_box_reg"}),
]
# Not of the networks: what makes a step on two cores a matter of a second.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
}


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """A ResNet-50 that claims to be fed as Detectron2's configs say, its statistics those of a damped network."""
    torch.manual_seed(0)
    network = build_network("resnet50", stride_in_1x1=True)
    for module in network.modules():
        if hasattr(module, "last_norm"):
            nn.init.constant_(module.last_norm.weight, 0.25)
    metadata = Metadata(
        kind="classifier",
        architecture="resnet50",
        arguments={"width": 1.0, "stride_in_1x1": True},
        channel_order="BGR",
        pixel_mean=(103.53, 116.28, 123.675),
        pixel_std=(1.0, 1.0, 1.0),
        norm_statistics="running",
        norm_epsilon=1e-5,
        class_names=tuple(map(str, range(1000))),
    )
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    write_checkpoint(file, Checkpoint(network.state_dict(), metadata))
    return file


def stock_config(name, changes, weights):
    cfg = get_cfg()
    add_network_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    keys = {"MODEL.NETWORK.NAME": "resnet50", **changes, **SMALL}
    cfg.MODEL.WEIGHTS = str(weights) if keys["MODEL.NETWORK.NAME"] == "resnet50" else ""
    for key, value in keys.items():
        cfg.merge_from_list([key, value])
    return cfg


def annotated_image(num_keypoints=17):
    """One image of 96×128 with two objects, with everything that any of the models wants to know of them."""
    boxes = torch.tensor([[8.0, 8.0, 56.0, 72.0], [64.0, 24.0, 120.0, 88.0]])
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    points = torch.full((2, num_keypoints, 3), 2.0)
    for i, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        masks[i, y0:y1, x0:x1] = True
        points[i, :, 0] = torch.linspace(x0 + 1, x1 - 1, num_keypoints)
        points[i, :, 1] = torch.linspace(y0 + 1, y1 - 1, num_keypoints)
    classes = torch.tensor([0, 0])
    instances = Instances(
        (96, 128), gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=BitMasks(masks), gt_keypoints=Keypoints(points)
    )
    return {
        "image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8),
        "instances": instances,
        "sem_seg": masks.any(dim=0).long(),
        "height": 96,
        "width": 128,
    }


@pytest.mark.parametrize(("name", "changes", "expected"), CONFIGS)
def test_a_stock_config_builds_and_takes_a_step(resnet50, name, changes, expected):
    cfg = stock_config(name, changes, resnet50)
    torch.manual_seed(0)
    model = build_model(cfg)
    body = getattr(model.backbone, "bottom_up", model.backbone)
    assert type(body).__name__ == "NetworkBackbone"
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with EventStorage():
        losses = model.train()([annotated_image()])
    assert set(losses) == expected
    total = sum(losses.values())
    assert math.isfinite(total.item())
    total.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    torch.optim.SGD(parameters, lr=0.01).step()

    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    # FREEZE_AT 2: the first two stages stay, the others learn.
    names = list(body.network.stage_names)
    for stage in names:
        keys = {
            f"{prefix}.{key}"
            for prefix, part in model.named_modules()
            if any(part is module for module in body.network.stage_modules(stage))
            for key, _ in part.named_parameters()
        }
        assert (keys & moved == set()) == (stage in names[:2] or not keys), stage
    assert all("running" not in key for key in moved)

    with torch.no_grad():
        assert "instances" in model.eval()([annotated_image()])[0]


@pytest.mark.parametrize("stride_in_1x1", [True, False])
# Detectron2 has no dilated basic blocks.
@pytest.mark.parametrize(("depth", "dilation"), [(18, 1), (50, 1), (50, 2), (101, 1)])
def test_detectron2s_resnet_gives_the_same_features(depth, dilation, stride_in_1x1):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.RES5_DILATION = dilation
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    reference = build_resnet_backbone(cfg, ShapeSpec(channels=3)).double().eval()
    assert any(is_frozen_norm(module) for module in reference.modules())

    torch.manual_seed(1)
    network = build_network(f"resnet{depth}", stride_in_1x1=stride_in_1x1, res5_dilation=dilation).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, std=0.1)
    reference.load_state_dict(detectron2_state(network), strict=True)

    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        value, expected = network.forward_features(images, cfg.MODEL.RESNETS.OUT_FEATURES), reference(images)
    for name, feature in expected.items():
        assert value[name].shape == feature.shape
        assert torch.allclose(value[name], feature, rtol=1e-10, atol=1e-10 * feature.abs().max()), name
