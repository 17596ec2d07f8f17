"""Training that waits for no device: the numbers of Detectron2's, and nothing that waits."""

import pytest
import torch
from detectron2.modeling.proposal_generator import rpn
from detectron2.modeling.roi_heads import roi_heads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_backbone.detection.modeling import fixed_size
from resnet_backbone.ops import sample
from tests.detection.modeling.small import CASES, accelerated, build, inputs, step

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

    @pytest.mark.parametrize("keys", [("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True), ("MODEL.RPN.SMOOTH_L1_BETA", 0.1)])
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


@pytest.mark.parametrize("case", ["C4", "C4, stride in the 3×3", "Detectron2's C4", "FPN", "VGG-16"])
def test_nothing_waits(case, monkeypatch):
    """Without values, on a GPU that need not exist: reading one, or asking how many there are, is an error."""
    monkeypatch.setattr(fixed_size, "is_time_to_log", lambda: False)
    monkeypatch.setattr("resnet_backbone.detection.modeling.proposals.is_time_to_log", lambda: False)
    model = build(case).float()
    faster = accelerated(model)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        faster = fake(faster, mode)
        batch = [
            {**record, "image": mode.from_tensor(record["image"]), "instances": fake_instances(record["instances"], mode)}
            for record in inputs()
        ]
        losses, gradients = run(faster, batch)
    assert losses and all(loss.device.type == "cuda" for loss in losses.values())
    assert gradients
