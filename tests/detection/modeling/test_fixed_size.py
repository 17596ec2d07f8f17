"""Training that waits for no device: the numbers of Detectron2's, and nothing that waits."""

import pytest
import torch
from detectron2.modeling.proposal_generator import rpn
from detectron2.modeling.roi_heads import roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_backbone.detection.modeling import fixed_size
from resnet_backbone.detection.modeling.precision import keep_boxes_in_float32
from resnet_backbone.ops import sample
from tests.detection.modeling.small import CASES, SIZE, accelerated, build, inputs, step

FIXED = [
    name
    for name in CASES
    if "batch norm" not in name and name not in ("C4, RoIPool", "C4 of basic blocks", "C4, pre-activation")
    if name not in ("Cascade R-CNN", "RetinaNet")
]


def fixed(model: nn.Module) -> nn.Module:
    """Accelerate a copy, and let it go its way for GPUs on this CPU."""
    faster = accelerated(model)
    for part in (faster.proposal_generator, faster.roi_heads, faster.roi_heads.box_predictor):
        assert part.fixed_size is None
        part.fixed_size = True
    return faster


@pytest.fixture
def our_sampler(monkeypatch):
    """Detectron2 draws what we draw."""

    def subsample_labels(labels, num_samples, positive_fraction, bg_label):
        positive = (labels != -1) & (labels != bg_label)
        indices, drawn = sample(positive, labels == bg_label, num_samples, positive_fraction)
        indices = indices[drawn]
        return indices[positive[indices]], indices[~positive[indices]]

    monkeypatch.setattr(rpn, "subsample_labels", subsample_labels)
    monkeypatch.setattr(roi_heads, "subsample_labels", subsample_labels)


@pytest.mark.usefixtures("double_precision", "our_sampler")
class TestTheNumbersOfDetectron2:
    def compare(self, case: str, batch, *keys: object) -> None:
        model = build(case, *keys)
        faster = fixed(model)
        expected, expected_gradients = step(model, batch)
        losses, gradients = step(faster, batch)
        assert losses.keys() == expected.keys() and len(losses) > 1
        for name, loss in losses.items():
            # Detectron2 computes the first two in float32.
            precision = 1e-6 if name in ("loss_rpn_cls", "loss_mask") else 1e-10
            assert loss == pytest.approx(expected[name], rel=precision, abs=1e-12), name
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            difference, size = (gradient - expected_gradients[name]).norm(), expected_gradients[name].norm()
            assert difference <= 1e-8 * size + 1e-14, name

    @pytest.mark.parametrize("case", FIXED)
    def test_a_sample_of_the_proposals(self, case):
        """As many proposals as are wanted, all of them usable: the same random numbers go to the same boxes."""
        self.compare(case, inputs(), "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20)

    @pytest.mark.parametrize("case", ["C4", "Detectron2's FPN", "VGG-16", "Mask R-CNN"])
    def test_fewer_than_are_wanted(self, case):
        """All that there are, whatever the random numbers: some proposals and some samples are missing."""
        keys = "MODEL.RPN.POST_NMS_TOPK_TRAIN", 2000, "MODEL.RPN.NMS_THRESH", 0.3
        keys += "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 3000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0
        self.compare(case, inputs(), *keys)

    @pytest.mark.parametrize("case", ["C4", "Detectron2's FPN", "Mask R-CNN"])
    def test_images_without_objects(self, case):
        batch = inputs()
        batch[0]["instances"] = batch[0]["instances"][:0]
        self.compare(case, batch, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20)
        self.compare(case, inputs(0), "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20)

    @pytest.mark.parametrize(
        "keys", [("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True), ("MODEL.RPN.SMOOTH_L1_BETA", 0.1)]
    )
    def test_other_losses(self, keys):
        self.compare("C4", inputs(), "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, *keys)

    def test_counts_are_logged_now_and_then(self, monkeypatch):
        seen = {}
        monkeypatch.setattr(
            "detectron2.utils.events.EventStorage.put_scalar", lambda self, name, value, **_: seen.update({name: value})
        )
        model = build("C4", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20)
        faster = fixed(model)
        step(model, inputs())
        expected = dict(seen)
        seen.clear()
        step(faster, inputs())
        assert seen == expected and "fast_rcnn/cls_accuracy" in seen
        monkeypatch.setattr(fixed_size, "is_time_to_log", lambda: False)
        monkeypatch.setattr("resnet_backbone.detection.modeling.proposals.is_time_to_log", lambda: False)
        seen.clear()
        step(faster, inputs())
        assert not seen


@pytest.mark.parametrize("case", ["C4", "FPN"])
def test_a_proposal_that_is_not_finite_reaches_the_loss(case):
    faster = fixed(build(case)).float()
    with torch.no_grad():
        faster.proposal_generator.rpn_head.anchor_deltas.bias.fill_(torch.inf)
    assert torch.tensor(step(faster, inputs())[0]["loss_rpn_loc"]).isnan()


def without_values(model: nn.Module, device: str) -> nn.Module:
    """Put tensors that have no values, on a device that need not exist, in the place of a model's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.dim() == 4:
                    empty = empty.contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


class WaitingCopy(Exception):
    """A copy between devices that waits."""


class NoWaitingCopies(TorchDispatchMode):
    """To copy between devices and wait is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            waits = not kwargs.get("non_blocking") and args[2:] != (True,)
            if waits and source.device != result.device:
                raise WaitingCopy(func)
        return result


def a_step_without_values(model: nn.Module, device: str, precision: torch.dtype) -> dict[str, torch.Tensor]:
    with FakeTensorMode():
        batch = []
        for size in (SIZE, SIZE):
            truth = Instances(size, gt_boxes=Boxes(torch.rand(5, 4)), gt_classes=torch.zeros(5).long())
            batch.append({"image": torch.zeros(3, *size, dtype=torch.uint8), "instances": truth})
        model = without_values(model, device).train()
        autocast = torch.autocast(device, dtype=precision, enabled=precision != torch.float32)
        with EventStorage(), autocast, NoWaitingCopies():
            losses = model(batch)
        if device == "cpu":  # autograd wants a GPU that exists
            sum(losses.values()).backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        return losses


@pytest.fixture
def nothing_to_log(monkeypatch):
    monkeypatch.setattr(fixed_size, "is_time_to_log", lambda: False)
    monkeypatch.setattr("resnet_backbone.detection.modeling.proposals.is_time_to_log", lambda: False)


WITHOUT_WAITING = ["C4", "C4, stride in the 3×3", "C4, global context", "Detectron2's C4", "FPN", "VGG-16"]


@pytest.mark.usefixtures("nothing_to_log")
class TestNothingWaits:
    """To read a value, or to ask how many there are, is an error where there are no values."""

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("case", WITHOUT_WAITING)
    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_in_a_step(self, case, precision, device):
        """Forward on a GPU, and backward too where the CPU goes the GPU's way."""
        model = build(case).float()
        faster = fixed(model) if device == "cpu" else accelerated(model)
        keep_boxes_in_float32(faster)
        losses = a_step_without_values(faster, device, precision)
        assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert all(loss.device.type == device for loss in losses.values())

    def test_but_detectron2s_does(self):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, WaitingCopy)):
            a_step_without_values(build("C4").float(), "cuda", torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("nothing_to_log")
@pytest.mark.parametrize("case", WITHOUT_WAITING)
def test_on_a_gpu_nothing_waits(case):
    """Copies that wait, too, which a step without values does not show."""
    faster = accelerated(build(case).float()).cuda().to(memory_format=torch.channels_last).train()
    keep_boxes_in_float32(faster)
    batch = [{**record, "image": record["image"].pin_memory()} for record in inputs()]
    for record in batch:  # a detector of boxes is given no masks and keypoints
        record["instances"].remove("gt_masks")
        record["instances"].remove("gt_keypoints")
    for mode in ("default", "error"):  # the first step compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with EventStorage(), torch.autocast("cuda", dtype=torch.bfloat16):
                losses = faster(batch)
            sum(losses.values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses.values())
