import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.data.loader import TrainBatches
from resnet_backbone.detection.modeling.precision import keep_boxes_in_float32


@pytest.mark.parametrize(("dtype", "left"), [(torch.bfloat16, 601.0), (torch.float16, 3001.0)])
def test_regions_are_pooled_at_their_own_coordinates(dtype, left):
    """A ramp over x gives each box's position back; bfloat16 knows 600 and 604 pixels, float16 3,000 and 3,002."""
    pooler = ROIPooler(output_size=1, scales=(1.0,), sampling_ratio=2, pooler_type="ROIAlignV2")
    start = int(left) - 41
    far = torch.zeros(1, 1, 8, start + 64)
    far[..., start:] = torch.arange(64.0)  # exact in either
    box = [Boxes(torch.tensor([[left, 2.0, left + 4, 4.0]]))]
    with torch.autocast("cpu", dtype=dtype):
        off = pooler([far.to(dtype)], box)
        keep_boxes_in_float32(nn.Sequential(pooler))
        kept = pooler([far.to(dtype)], box)
    assert kept.dtype == torch.float32
    assert kept.item() == pytest.approx(left + 2 - 0.5 - start)
    assert off.item() != pytest.approx(left + 2 - 0.5 - start, abs=0.4)  # what it guards against


@pytest.mark.parametrize("file", ["faster_rcnn_R50.yaml", "faster_rcnn_VGG16.yaml", "faster_rcnn_R50_FPN.yaml"])
def test_losses_under_autocast_are_near_those_in_float32(detection_config, tmp_path, file):
    keys = ["MODEL.NETWORK.WIDTH", 0.125, "MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0]
    keys += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    # Ground truth as the only RoIs: which proposals are sampled hangs on the last bit of their scores.
    keys += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 0]
    if "VGG" not in file:
        keys += ["MODEL.NETWORK.NAME", "resnet18"]
    cfg = detection_config(file, tmp_path, *keys)
    datasets.register(cfg.DATASETS.TRAIN[0])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    keep_boxes_in_float32(model)
    batch = next(TrainBatches(cfg)(0))
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(1)
        with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses[enabled] = model(batch)
    for name, value in losses[True].items():
        assert value.dtype == torch.float32 and value.isfinite(), name
    assert sum(losses[True].values()).item() == pytest.approx(sum(losses[False].values()).item(), rel=0.1)
