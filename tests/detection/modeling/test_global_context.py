"""Global context in the C4 heads: against the paper's words written out, and what follows from them."""

import pytest
import torch
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes, Instances
from torchvision.ops import roi_align

from resnet_backbone import detection
from resnet_backbone.detection import load_detector
from tests.detection.modeling.small import SIZE, accelerated, build, inputs, step

pytestmark = pytest.mark.usefixtures("double_precision")

CONTEXT = "Mask R-CNN, C4, global context"
REGIONS = torch.tensor([[4.0, 8.0, 60.0, 90.0], [30.0, 10.0, 90.0, 70.0], [0.0, 0.0, 128.0, 96.0]])


def proposals(*sizes: tuple[int, int]) -> list[Instances]:
    return [
        Instances(size, proposal_boxes=Boxes(REGIONS[number:].double()), objectness_logits=REGIONS[number:, 0])
        for number, size in enumerate(sizes)
    ]


@torch.no_grad()
def predicted(model, given: list[Instances]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and deltas that the heads predict, before any of them is dropped."""
    images = model.preprocess_image(inputs())
    outputs = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda _, __, output: outputs.append(output))
    model.roi_heads(images, model.backbone(images.tensor), given, None)
    hook.remove()
    return outputs[0]


def test_classes_and_boxes_are_predicted_from_the_region_and_the_whole_image():
    model = build(CONTEXT).eval()
    heads, sizes = model.roi_heads, [SIZE, (80, 100)]  # the second image is padded
    scores, deltas = predicted(model, proposals(*sizes))
    row = 0
    with torch.no_grad():
        (features,) = model.backbone(model.preprocess_image(inputs()).tensor).values()
        for number, (height, width) in enumerate(sizes):
            for region in REGIONS[number:].tolist():
                parts = []
                for box in (region, [0.0, 0.0, width, height]):
                    pooled = roi_align(
                        features[number : number + 1], [torch.tensor([box]).double()], 14, 1 / 16, 0, aligned=True
                    )
                    parts.append(heads.res5(pooled).mean(dim=(2, 3))[0])
                expected = torch.cat(parts)
                torch.testing.assert_close(scores[row], heads.box_predictor.cls_score(expected), rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(deltas[row], heads.box_predictor.bbox_pred(expected), rtol=1e-9, atol=1e-9)
                row += 1
    assert row == len(scores) == 5


def test_other_pixels_of_the_image_change_a_regions_scores_and_padding_does_not():
    model = build(CONTEXT).eval()
    with torch.no_grad():
        found = []
        for value in (0.0, 3.0):
            features = torch.full((1, model.roi_heads.res5[0].conv1.in_channels, 6, 8), 0.5).double()
            features[..., 5:] = value
            region = Instances((96, 128), proposal_boxes=Boxes(REGIONS[:1].double() / 2))
            for size in ((96, 128), (96, 64)):
                hook = model.roi_heads.box_predictor.register_forward_hook(lambda _, __, out: found.append(out[0]))
                one = Instances(size, proposal_boxes=region.proposal_boxes)
                model.roi_heads(None, {model.roi_heads.in_features[0]: features}, [one], None)
                hook.remove()
    whole, left, whole_again, left_again = found
    assert (whole - whole_again).abs().max() > 1e-3
    torch.testing.assert_close(left, left_again, rtol=0, atol=0)


def test_the_context_is_trained():
    model = accelerated(build(CONTEXT))
    losses, gradients = step(model, inputs())
    channels = gradients["roi_heads.box_predictor.cls_score.weight"].shape[1] // 2
    assert channels == model.roi_heads.res5[-1].conv3.out_channels
    for layer in ("cls_score", "bbox_pred"):
        trained = gradients[f"roi_heads.box_predictor.{layer}.weight"].norm(dim=0) > 0
        assert all(half.double().mean() > 0.9 for half in trained.split(channels))  # a channel may be dead
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= losses.keys()


def test_without_the_key_the_heads_are_detectron2s(monkeypatch):
    model = build("C4").eval()
    assert model.roi_heads.box_predictor.cls_score.in_features == model.roi_heads.res5[-1].conv3.out_channels
    calls = []
    monkeypatch.setattr(Res5ROIHeads, "forward", lambda self, *given: calls.append(given) or ([], {}))
    model.roi_heads("images", "features", "proposals", "targets")
    assert calls == [("images", "features", "proposals", "targets")]


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)])
def test_images_without_proposals(counts):
    for model in (build(CONTEXT).eval(), accelerated(build(CONTEXT)).eval()):
        given = [
            Instances(SIZE, proposal_boxes=Boxes(REGIONS[:count].double()), objectness_logits=REGIONS[:count, 0])
            for count in counts
        ]
        scores, deltas = predicted(model, given)
        assert len(scores) == len(deltas) == sum(counts)


def test_a_run_trains_it_and_load_detector_knows_it(detection_config, classifier, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", str(classifier("resnet18")), "SOLVER.MAX_ITER", 2)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, "MODEL.ROI_HEADS.GLOBAL_CONTEXT", True))
    heads = load_detector(tmp_path / "model_final.pth").model.roi_heads
    assert heads.global_context and heads.box_predictor.cls_score.in_features == 2 * 64
