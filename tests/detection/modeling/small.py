"""Small detectors of all kinds, of Detectron2's own classes and of ours, in double precision."""

import copy
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.detection.config import get_config
from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.weights import is_frozen_norm

SIZE = 96, 128
SMALL = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8)
SMALL += ("MODEL.RESNETS.WIDTH_PER_GROUP", 8)
BODY = ("MODEL.NETWORK.NAME", "resnet50", "MODEL.NETWORK.WIDTH", 0.125)
C4 = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads", *BODY)
FPN = ("MODEL.BACKBONE.NAME", "build_network_fpn_backbone", *BODY)
HEADS = ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
HEADS += ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,), "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)
FASTER_C4, FASTER_FPN = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
VGG = ("MODEL.NETWORK.WIDTH", 0.125)
CASES = {
    "Detectron2's C4": (FASTER_C4, SMALL),
    "Detectron2's C4, stride in the 3×3": (FASTER_C4, (*SMALL, "MODEL.RESNETS.STRIDE_IN_1X1", False)),
    "Detectron2's C4, batch norm": (FASTER_C4, (*SMALL, "MODEL.RESNETS.NORM", "BN")),
    "Detectron2's Mask R-CNN, C4": (MASK_C4, SMALL),
    "Detectron2's FPN": (FASTER_FPN, (*SMALL, *HEADS)),
    "C4": (FASTER_C4, C4),
    "C4, stride in the 3×3": (FASTER_C4, (*C4, "MODEL.RESNETS.STRIDE_IN_1X1", False)),
    "C4, batch norm": (FASTER_C4, (*C4, "MODEL.RESNETS.NORM", "BN")),
    "C4, group norm": (FASTER_C4, (*C4, "MODEL.RESNETS.NORM", "GN")),
    "C4, pooled to 7×7": (FASTER_C4, (*C4, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7)),
    "C4, aligned and with two samples": (
        FASTER_C4,
        (*C4, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
    ),
    "C4, RoIPool": (FASTER_C4, (*C4, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool")),
    "C4 of basic blocks": (FASTER_C4, (*C4, "MODEL.NETWORK.NAME", "resnet18")),
    "C4, pre-activation": (FASTER_C4, (*C4, "MODEL.NETWORK.NAME", "preact_resnet50")),
    "C4, global context": (FASTER_C4, (*C4, "MODEL.ROI_HEADS.GLOBAL_CONTEXT", True)),
    "Mask R-CNN, C4, global context": (MASK_C4, (*C4, "MODEL.ROI_HEADS.GLOBAL_CONTEXT", True)),
    "FPN": (FASTER_FPN, (*FPN, *HEADS)),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", (*FPN, *HEADS)),
    "Cascade R-CNN": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", (*FPN, *HEADS)),
    "Keypoint R-CNN": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", (*FPN, *HEADS)),
    "RetinaNet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        ("MODEL.BACKBONE.NAME", "build_network_retinanet_fpn_backbone", *BODY, *HEADS),
    ),
    "VGG-16": ("faster_rcnn_VGG16.yaml", VGG),
    "VGG-16 with batch norm": ("faster_rcnn_VGG16.yaml", (*VGG, "MODEL.NETWORK.NAME", "vgg16_bn")),
}


def build(case: str, *more: object) -> nn.Module:
    """A detector with random weights and statistics, in double precision."""
    file, keys = CASES[case]
    cfg = get_config()
    configs = Path(__file__).parents[3] / "configs"
    cfg.merge_from_file(str(configs / file) if (configs / file).is_file() else model_zoo.get_config_file(file))
    keys += ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN", True)
    cfg.merge_from_list(list(keys + ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 24, *more)))
    torch.manual_seed(3)
    model = build_model(cfg)
    for name, module in model.named_modules():
        if is_frozen_norm(module) or isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            last = name.endswith(("bn3", "downsample.1", "conv3.norm", "shortcut.norm"))
            module.weight.data.uniform_(0.2, 0.6) if last else module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double()


def inputs(objects: int = 5) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(5)
    height, width = SIZE
    found = []
    for _ in range(2):
        sizes = (0.2 + 0.5 * torch.rand(objects, 2, generator=generator)) * torch.tensor([width, height])
        corners = torch.rand(objects, 2, generator=generator) * (torch.tensor([width, height]) - sizes)
        boxes = torch.cat([corners, corners + sizes], dim=1).double()
        outlines = [[[*b[:2], b[2], b[1], *b[2:], b[0], b[3]]] for b in boxes.tolist()]
        points = torch.stack([boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - 1], dim=1)
        instances = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.zeros(objects, dtype=torch.int64))
        instances.gt_masks = PolygonMasks(outlines)
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((objects, 3, 1), 2.0)], dim=2))
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator)
        found.append({"image": image, "instances": instances, "height": height, "width": width})
    return found


def step(model: nn.Module, batch: list[dict[str, object]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients, with the same random numbers each time."""
    model.train()
    torch.manual_seed(7)
    with EventStorage():
        losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def accelerated(model: nn.Module) -> nn.Module:
    return accelerate(copy.deepcopy(model))
