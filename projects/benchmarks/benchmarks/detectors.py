"""Pairs of detectors with the same weights: this package's, and the one Detectron2 users have."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.photographs import photograph
from resnet_backbone.detection.config import get_config
from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.modeling.fixed_size import FixedSize
from resnet_backbone.detection.modeling.layout import use_channels_last
from resnet_backbone.detection.modeling.precision import keep_boxes_in_float32
from resnet_backbone.engine.config import CfgNode, load_config
from resnet_backbone.errors import InputError
from resnet_backbone.weights.names import detectron2_name

Inputs = list[dict[str, Any]]

OBJECTS = 8  # ground-truth boxes per image; COCO averages 7
BRANCH_SCALE = 0.25  # for each residual branch's last norm, so a deep sum of branches does not grow


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A detector's base configuration and the overrides of its two versions.

    Attributes:
        config_file: in the configuration folder or Detectron2's model zoo.
        ours, stock: keys that select this package's parts, or the ones compared with them.
    """

    config_file: str
    ours: Mapping[str, Any]
    stock: Mapping[str, Any]


def _c4(file: str, network: str) -> Detector:
    ours = {"MODEL.BACKBONE.NAME": "build_network_backbone", "MODEL.ROI_HEADS.NAME": "NetworkRes5ROIHeads"}
    return Detector(config_file=f"COCO-Detection/{file}", ours=ours | {"MODEL.NETWORK.NAME": network}, stock={})


def _fpn(file: str, network: str) -> Detector:
    ours = {"MODEL.BACKBONE.NAME": "build_network_fpn_backbone", "MODEL.NETWORK.NAME": network}
    return Detector(config_file=f"COCO-Detection/{file}", ours=ours, stock={})


# Detectron2 has no VGG: users wrap torchvision's and use Detectron2's own head with two layers as wide as fc6 and fc7.
_VGG16 = Detector(
    config_file="faster_rcnn_VGG16.yaml",
    ours={},
    stock={
        "MODEL.BACKBONE.NAME": "build_torchvision_vgg16_backbone",
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 4096,
    },
)

DETECTORS = {
    "R50-C4": _c4("faster_rcnn_R_50_C4_1x.yaml", "resnet50"),
    "R101-C4": _c4("faster_rcnn_R_101_C4_3x.yaml", "resnet101"),
    "R50-FPN": _fpn("faster_rcnn_R_50_FPN_1x.yaml", "resnet50"),
    "R101-FPN": _fpn("faster_rcnn_R_101_FPN_3x.yaml", "resnet101"),
    "VGG16": _VGG16,
}


@dataclass(frozen=True, kw_only=True)
class DetectionWork:
    """A detector's workload.

    Attributes:
        batch: images per batch.
        size: their height and width in pixels.
        rois: sampled from each image's proposals in training.
        proposals: per image in inference; None: the configuration's number.
        iterations: per turn.
        stride_in_1x1: stride a ResNet's stages in the first 1×1 convolution, Detectron2's default, rather than the 3×3.
            No effect on VGG.
    """

    batch: int
    size: tuple[int, int]
    rois: int
    proposals: int | None = None
    iterations: int
    stride_in_1x1: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of an image batch."""
        return self.batch, 3, *self.size


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two detectors with the same weights, on their device, and their input.

    Attributes:
        ours: accelerated and in channels_last, as the training tool builds it; the other is NCHW.
        inputs: a batch in Detectron2's format.
        cfg, stock_cfg: the configurations they were built from.
    """

    ours: nn.Module
    stock: nn.Module
    inputs: Inputs
    cfg: CfgNode
    stock_cfg: CfgNode


def check_names(names: list[str]) -> None:
    """Raise InputError for a name not in DETECTORS and suggest the closest one."""
    for name in names:
        if name not in DETECTORS:
            near = get_close_matches(name.upper(), DETECTORS, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise InputError(f"--detectors {name} is unknown{hint}; there are {', '.join(DETECTORS)}.")


def build_pair(name: str, work: DetectionWork, *, configs: Path, device: str) -> Pair:
    """Build both versions of a detector in DETECTORS: ours with random weights, the other with a copy of them.

    Args:
        configs: folder with faster_rcnn_VGG16.yaml.
        device: "cuda" or "cpu".
    """
    detector = DETECTORS[name]
    cfg = _config(detector.config_file, detector.ours, work, configs, device)
    stock_cfg = _config(detector.config_file, detector.stock, work, configs, device)
    inputs = make_inputs(work)
    torch.manual_seed(cfg.SEED)
    ours = build_model(cfg)
    _set_scale(ours, inputs)
    stock = build_model(stock_cfg)
    stock.load_state_dict({stock_name(name): tensor for name, tensor in ours.state_dict().items()}, strict=True)
    accelerate(ours)
    keep_boxes_in_float32(ours)
    use_channels_last(ours)
    return Pair(ours=ours, stock=stock, inputs=inputs, cfg=cfg, stock_cfg=stock_cfg)


def _config(file: str, changes: Mapping[str, Any], work: DetectionWork, configs: Path, device: str) -> CfgNode:
    on_gpu = torch.device(device).type == "cuda"
    keys = {
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN": True,
        "MODEL.RESNETS.STRIDE_IN_1X1": work.stride_in_1x1,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": work.rois,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.COMPILE": on_gpu,
        "SOLVER.IMS_PER_BATCH": work.batch,
        # If the weights changed, so would the proposals and thus the work.
        "SOLVER.BASE_LR": 0.0,
        "SOLVER.LOG_PERIOD": min(20, work.iterations),
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "TEST.EVAL_PERIOD": 0,
        "SEED": 1,
        **changes,
    }
    if work.proposals is not None:
        keys["MODEL.RPN.POST_NMS_TOPK_TEST"] = work.proposals
    path = configs / file
    words = [str(word) for pair in keys.items() for word in pair]
    return load_config(get_config(), path if path.is_file() else file, words)


def stock_name(name: str) -> str:
    """Name of our tensor in Detectron2, or in a user's wrapper of torchvision's VGG."""
    if match := re.fullmatch(r"(backbone\.(?:bottom_up\.)?)network\.(.+)", name):
        return match[1] + (detectron2_name(match[2]) or match[2])
    if name.startswith("roi_heads.res5."):
        return f"roi_heads.{detectron2_name(name.replace('roi_heads.res5', 'layer4', 1))}"
    return name.replace("box_head.fc6.", "box_head.fc1.").replace("box_head.fc7.", "box_head.fc2.")


@BACKBONE_REGISTRY.register()
def build_torchvision_vgg16_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """torchvision's VGG-16 up to conv5_3, with the first two blocks frozen, like MODEL.BACKBONE.FREEZE_AT 2."""
    return TorchvisionVGG16()


class TorchvisionVGG16(Backbone):
    """torchvision's VGG-16 convolutions behind Detectron2's backbone interface, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg16(weights=None).features[:-1]  # drop the last pooling
        self.features[:10].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"conv5": self.features(images)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"conv5": ShapeSpec(channels=512, stride=16)}


def make_inputs(work: DetectionWork) -> Inputs:
    """Generate `(3, H, W)` uint8 images with OBJECTS boxes each, on the CPU, as Detectron2's loaders return them."""
    generator = torch.Generator().manual_seed(0)
    height, width = work.size
    inputs = []
    for number in range(work.batch):
        pixels = torch.from_numpy(photograph(height, width, seed=number))
        extent = torch.tensor([width, height])
        sizes = (0.1 + 0.5 * torch.rand(OBJECTS, 2, generator=generator)) * extent
        corners = torch.rand(OBJECTS, 2, generator=generator) * (extent - sizes)
        classes = torch.randint(80, (OBJECTS,), generator=generator)
        boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        objects = Instances(work.size, gt_boxes=boxes, gt_classes=classes)
        image = pixels.permute(2, 0, 1).contiguous()
        inputs.append({"image": image, "instances": objects, "height": height, "width": width})
    return inputs


@torch.no_grad()
def _set_scale(model: nn.Module, inputs: Inputs) -> None:
    """Scale random weights so that features have a magnitude of about 1, as after training.

    Frozen norms without statistics do not control the scale: scores would saturate, every proposal would stretch to the
    whole image, and non-maximum suppression would leave only a few. Up to the features, all layers are linear except
    for ReLUs and have no biases yet, so scaling the first convolution scales the features by the same factor.
    """
    for module in model.modules():
        if hasattr(module, "last_norm"):
            nn.init.constant_(module.last_norm.weight, BRANCH_SCALE)
    features = model.backbone(model.preprocess_image(inputs).tensor)
    size = torch.stack([feature.square().mean().sqrt() for feature in features.values()]).mean()
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    next(module for module in bottom_up.modules() if isinstance(module, nn.Conv2d)).weight.div_(size)


def difference_of_losses(pair: Pair, rois: int) -> float:
    """Largest float32 difference between the two detectors' losses, relative to the stock loss.

    Random sampling would pick different RoIs: scores that differ only in the last bit swap places, and the same random
    number then picks another box. So both use all of the top `rois` proposals and the ground truth. On a GPU, ours
    samples anchors as it does on a CPU, by stock's random numbers. Dropout is off because the other head has none.
    """
    ours, stock = (_losses(model, pair.inputs, rois) for model in (pair.ours, pair.stock))
    return max(abs(ours[name] - loss) / max(abs(loss), 1e-12) for name, loss in stock.items())


def _losses(model: nn.Module, inputs: Inputs, rois: int) -> dict[str, float]:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    torch.manual_seed(0)  # for sampling RPN anchors, which does not depend on scores
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
    with EventStorage(), torch.no_grad(), exact, _all_of_the_best(model, rois):
        losses = {name: loss.item() for name, loss in model(inputs).items()}
    model.train()
    return losses


@contextlib.contextmanager
def _all_of_the_best(model: nn.Module, rois: int) -> Iterator[None]:
    """Train on all of the top proposals and the ground truth instead of a random sample."""
    rpn, heads = model.proposal_generator, model.roi_heads
    before = rpn.post_nms_topk[True], heads.batch_size_per_image, heads.positive_fraction
    rpn.post_nms_topk[True], heads.batch_size_per_image, heads.positive_fraction = rois, rois + OBJECTS, 1.0
    ways = {module: module.fixed_size for module in model.modules() if isinstance(module, FixedSize)}
    for module in ways:
        module.fixed_size = False
    try:
        yield
    finally:
        rpn.post_nms_topk[True], heads.batch_size_per_image, heads.positive_fraction = before
        for module, way in ways.items():
            module.fixed_size = way
