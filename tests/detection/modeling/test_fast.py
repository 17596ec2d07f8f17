"""Accelerated detectors against the ones that they were made from, of Detectron2's own classes and of ours."""

import copy

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from resnet_backbone.detection.modeling.fast import accelerate
from resnet_backbone.detection.modeling.precision import keep_boxes_in_float32
from resnet_backbone.networks.norms import FrozenBatchNorm2d
from tests.detection.modeling.small import CASES, accelerated, build, inputs, step

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("objects", [5, 0], ids=["objects", "no objects"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same(case, objects):
    model = build(case)
    faster = accelerated(model)
    expected, expected_gradients = step(model, inputs(objects))
    losses, gradients = step(faster, inputs(objects))
    assert losses == pytest.approx(expected, rel=1e-10, abs=1e-12) and len(losses) > 1
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        difference, size = (gradient - expected_gradients[name]).norm(), expected_gradients[name].norm()
        assert difference <= 1e-8 * size + 1e-14, name


@pytest.mark.parametrize("case", CASES)
def test_detections_are_the_same(case):
    thresholds = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    model = build(case, *thresholds, "MODEL.RPN.POST_NMS_TOPK_TEST", 50).eval()
    with torch.no_grad():
        expected, found = (m(inputs()) for m in (model, accelerated(model)))
    for one, other in zip(expected, found, strict=True):
        one, other = one["instances"], other["instances"]
        assert len(one) == len(other) > 0
        assert torch.equal(one.pred_classes, other.pred_classes)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-9)
        for field in ("pred_masks", "pred_keypoints"):
            assert one.has(field) == other.has(field)


@pytest.mark.parametrize("case", CASES)
def test_the_state_dict_stays(case):
    model = build(case)
    faster = accelerated(model)
    assert faster.state_dict().keys() == model.state_dict().keys()
    faster.load_state_dict(model.state_dict(), strict=True)
    assert [name for name, _ in faster.named_modules()] == [name for name, _ in model.named_modules()]


class TestLeftAlone:
    """What is not exactly Detectron2's or ours stays as it is, and the results with it."""

    def unchanged(self, model: nn.Module) -> nn.Module:
        faster = accelerated(model)
        expected, found = step(model, inputs())[0], step(faster, inputs())[0]
        assert found == pytest.approx(expected, rel=1e-10)
        return faster

    @pytest.mark.parametrize("part", ["roi_heads", "proposal_generator", "roi_heads.pooler", "roi_heads.res5.0"])
    def test_a_subclass_of_the_users(self, part):
        model = build("Detectron2's C4")
        module = model.get_submodule(part)
        module.__class__ = theirs = type("Theirs", (type(module),), {})
        faster = self.unchanged(model)
        assert type(faster.get_submodule(part)) is theirs
        if part != "proposal_generator":
            assert type(faster.roi_heads) is type(model.roi_heads)

    def test_a_norm_of_the_users(self):
        class Doubled(FrozenBatchNorm2d):
            def forward(self, x):
                return 2 * super().forward(x)

        model = build("C4")
        for block in (model.backbone.network.layer1[0], model.roi_heads.res5[0]):
            block.bn1.__class__ = Doubled
        self.unchanged(model)

    def test_a_convolution_of_the_users(self):
        class Adapted(nn.Conv2d):
            """As low-rank adapters wrap one."""

            def forward(self, x):
                return super().forward(x) + x.mean()

        model = build("C4")
        model.roi_heads.res5[0].conv1.__class__ = Adapted
        assert type(self.unchanged(model).roi_heads) is type(model.roi_heads)


@pytest.mark.parametrize("std", [(57, 57, 58), (57.5, 57.1, 58.4)])
def test_a_mean_of_whole_numbers(std):
    model, batch = build("C4").eval(), inputs()
    model.pixel_mean = torch.tensor([103, 116, 123]).view(3, 1, 1)  # as a configuration of whole numbers gives it
    model.pixel_std = torch.tensor(std).view(3, 1, 1)
    found = accelerated(model).preprocess_image(batch).tensor
    torch.testing.assert_close(found, model.preprocess_image(batch).tensor)


def test_hooks_of_the_user_see_what_they_saw():
    model = build("C4")
    faster, seen = accelerated(model), []
    for one in (model, faster):
        one.roi_heads.res5[0].conv2.register_forward_hook(
            lambda _, inputs, output: seen.append(output.detach().clone())
        )
        one.roi_heads.register_forward_hook(lambda *_: seen.append(torch.zeros(())))
        step(one, inputs())
    assert len(seen) == 4
    # The norm after the convolution is in it.
    torch.testing.assert_close(model.roi_heads.res5[0].bn2(seen[0]), seen[2])


def test_once_is_enough_and_copies_are_independent():
    faster = accelerated(build("C4"))
    types = [type(module) for module in faster.modules()]
    assert [type(module) for module in accelerate(copy.deepcopy(faster)).modules()] == types
    copied, before = copy.deepcopy(faster), step(faster, inputs())[0]
    for parameter in [*faster.parameters(), *faster.buffers()]:
        parameter.data.mul_(0.5)
    assert step(copied, inputs())[0] == before != step(faster, inputs())[0]


@pytest.mark.parametrize("case", ["C4", "C4, stride in the 3×3", "FPN", "VGG-16"])
def test_bf16_is_as_near_to_float64_as_before(case, monkeypatch):
    """With the ground truth as the only RoIs, since which proposals are sampled hangs on the last bit of their scores.

    The bound is what the model that is not accelerated shows, over all losses and some images.
    """
    model = build(case, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 0)
    exact, errors = step(model, inputs())[0], {}
    for name, one in (("before", copy.deepcopy(model)), ("after", accelerated(model))):
        one.float()
        keep_boxes_in_float32(one)
        monkeypatch.undo()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, gradients = step(one, inputs())
        errors[name] = [abs(losses[key] - loss) / loss for key, loss in exact.items()]
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert max(errors["after"]) < 2 * max(errors["before"]) + 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (250, 2), (33, 47)])
@pytest.mark.parametrize("case", ["C4", "Detectron2's FPN"])
def test_images_of_any_size(case, size):
    model = build(case)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box = Boxes(torch.tensor([[0.0, 0.0, *reversed(size)]]))
    objects = Instances(size, gt_boxes=box, gt_classes=torch.zeros(1, dtype=torch.int64))
    batch = [{"image": image, "instances": objects, "height": size[0], "width": size[1]}]
    faster = accelerated(model)
    assert step(faster, batch)[0] == pytest.approx(step(model, batch)[0], rel=1e-10)
    with torch.no_grad():
        one, other = (m.eval()(batch)[0]["instances"] for m in (model, faster))
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-4)


def test_in_a_wrapper():
    """As `trainer.model` is with several processes."""
    wrapped = nn.Sequential(build("C4"))
    accelerate(wrapped)
    assert [type(m) for m in wrapped[0].modules()] == [type(m) for m in accelerated(build("C4")).modules()]


def test_nothing_to_accelerate_is_said(caplog):
    with caplog.at_level("INFO"):
        accelerate(nn.Linear(2, 2))
    assert "accelerated: nothing" in caplog.text
