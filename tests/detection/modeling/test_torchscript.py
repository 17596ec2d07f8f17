"""Accelerated detectors in TorchScript: what is traced on one image holds for others, and nothing is scripted."""

import io

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from resnet_backbone.detection import accelerate
from resnet_backbone.errors import InputError
from tests.detection.modeling.small import accelerated, build

TRACED = ["Detectron2's C4", "Detectron2's FPN", "C4, global context", "C4, RoIPool", "Mask R-CNN"]


def infer(model: nn.Module, batch: list[dict[str, Tensor]]) -> Instances:
    return model.inference(batch, do_postprocess=False)[0]


@pytest.mark.parametrize("case", TRACED)
@torch.no_grad()
def test_a_trace_holds_for_images_of_other_sizes(case):
    thresholds = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 50)
    model = build(case, *thresholds).float().eval()
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.rand(3, *size, generator=generator) * 255 for size in ((64, 96), (160, 130)))
    adapter = TracingAdapter(accelerated(model), [{"image": small}], infer).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(adapter, adapter.flattened_inputs), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert "resnet_backbone::" not in str(traced.inlined_graph)  # it runs where this package is not installed
    found, expected = adapter.outputs_schema(traced(large)), infer(model, [{"image": large}])
    assert found.image_size.tolist() == [160, 130]
    assert expected.pred_boxes.tensor.max() > 96  # beyond the image that was traced
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)


FIELDS = {"proposal_boxes": Boxes, "objectness_logits": Tensor, "pred_boxes": Boxes, "scores": Tensor}


@pytest.mark.parametrize("part", ["", "backbone", "proposal_generator", "roi_heads", "roi_heads.box_pooler"])
def test_scripting_is_refused_in_a_sentence(part):
    module = accelerate(build("Detectron2's FPN").eval()).get_submodule(part)
    with pytest.raises(
        InputError, match=r"torch\.jit\.script got a .* Script the model before accelerate, or trace it"
    ):
        scripting_with_instances(module, FIELDS | {"pred_classes": Tensor})
