"""Every YAML of Detectron2's model zoo, names alone changed: the same network as Detectron2's, or refused by key."""

import json
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model, build_roi_heads
from torch import nn

from resnet_backbone.detection import add_network_config
from resnet_backbone.detection.weights import is_frozen_norm
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.network_config import network_name
from tests.detection.detectron2_names import detectron2_state

ZOO = Path(model_zoo.__file__).parent / "configs"
FILES = sorted(path.relative_to(ZOO).as_posix() for path in ZOO.rglob("*.yaml") if not path.name.startswith("Base-"))
NAMES = {
    "build_resnet_backbone": "build_network_backbone",
    "build_resnet_fpn_backbone": "build_network_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_network_retinanet_fpn_backbone",
    "Res5ROIHeads": "NetworkRes5ROIHeads",
}
DEFORMABLE = r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE is \[False, True, True, True\], but resnet"
REFUSED = {
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml": r"DEPTH 152, NUM_GROUPS 32, WIDTH_PER_GROUP 8",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml": DEFORMABLE,
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml": DEFORMABLE,
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml": DEFORMABLE,
}


def load(file: str, device: str):
    """Return the configuration as Detectron2 and as this package build it, without weights."""
    stock = get_cfg()
    add_network_config(stock)
    stock.merge_from_file(str(ZOO / file))
    stock.MODEL.WEIGHTS, stock.MODEL.DEVICE = "", device
    stock.MODEL.NETWORK.ALLOW_UNTRAINED_FROZEN_BN = True
    ours = stock.clone()
    ours.MODEL.BACKBONE.NAME = NAMES[stock.MODEL.BACKBONE.NAME]
    ours.MODEL.ROI_HEADS.NAME = NAMES.get(stock.MODEL.ROI_HEADS.NAME, stock.MODEL.ROI_HEADS.NAME)
    return stock, ours


def size(model: nn.Module) -> int:
    return sum(v.numel() for key, v in model.state_dict().items() if not key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("file", FILES)
def test_the_same_size_as_detectron2s_or_refused(file):
    stock, ours = load(file, "meta")
    if file in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[file]):
            build_model(ours)
        return
    with torch.device("meta"):
        model, reference = build_model(ours), build_model(stock)
    assert size(model) == size(reference)
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, reference)]
    assert trainable[0] == trainable[1]


def distinct_backbones() -> list[str]:
    """One file for each combination of the keys that decide about the backbone."""
    found = {}
    for file in FILES:
        if file not in REFUSED:
            cfg, _ = load(file, "cpu")
            heads = cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
            found.setdefault(json.dumps((cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.BACKBONE, heads)), file)
    return list(found.values())


def randomize(network: nn.Module) -> None:
    """Give batch norm statistics of its own, and damp the residual branches, so that nothing grows."""
    for name, module in network.named_modules():
        if is_frozen_norm(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            last = name.endswith(("bn3", "downsample.1"))
            module.weight.data.uniform_(0.2, 0.6) if last else module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(std=0.1)


@pytest.mark.parametrize("file", distinct_backbones())
def test_the_same_features_as_detectron2s(file):
    stock, ours = load(file, "cpu")
    torch.manual_seed(1)
    reference, backbone = build_backbone(stock).eval(), build_backbone(ours).eval()
    body = getattr(backbone, "bottom_up", backbone)
    randomize(body)
    state = detectron2_state(body.network)
    if body is not backbone:
        state = {f"bottom_up.{key}": value for key, value in state.items()}
        state |= {key: v for key, v in backbone.state_dict().items() if not key.startswith("bottom_up.")}
    reference.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        value, expected = backbone(images), reference(images)
    assert value.keys() == expected.keys()
    for name, feature in expected.items():
        assert torch.allclose(value[name], feature, rtol=1e-4, atol=1e-4 * feature.abs().max()), name
    assert {n: tuple(s) for n, s in backbone.output_shape().items()} == {
        n: tuple(s) for n, s in reference.output_shape().items()
    }
    if stock.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and stock.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        ours_heads, their_heads = (build_roi_heads(cfg, backbone.output_shape()).eval() for cfg in (ours, stock))
        randomize(ours_heads.res5)
        holder = nn.Module()
        holder.layer4 = ours_heads.res5
        state = {key.removeprefix("res5."): value for key, value in detectron2_state(holder).items()}
        their_heads.res5.load_state_dict(state, strict=True)
        regions = torch.randn(2, 1024, 14, 14)
        with torch.no_grad():
            assert torch.allclose(ours_heads.res5(regions), their_heads.res5(regions), rtol=1e-4, atol=1e-4)


def test_the_list_in_the_docs_is_the_zoo():
    """docs/detection.md names every file, under our name of its network or under what refuses it."""
    listed = {}
    for line in (Path(__file__).parents[2] / "docs" / "detection.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] and (ZOO / cells[0]).is_dir():
            for name in cells[2].split(", "):
                listed[f"{cells[0]}/{name.strip('`')}.yaml"] = cells[1]
    for file in FILES:
        if file.startswith("quick_schedules/"):  # the same networks on a hundred images
            continue
        _, ours = load(file, "cpu")
        expected = "refused" if file in REFUSED else network_name(ours)
        assert listed.pop(file) == expected, file
    assert not listed
