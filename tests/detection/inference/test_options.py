"""Test-time options around detectors: against plain loops, known regressions and the models themselves."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FastRCNNOutputLayers
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.ops import batched_nms

from resnet_backbone import detection
from resnet_backbone.detection import load_detector
from resnet_backbone.detection.inference.options import RCNNWithOptions
from resnet_backbone.detection.inference.voting import find_candidates
from resnet_backbone.engine.config import ConfigError
from tests.detection.inference.test_voting import voted
from tests.detection.modeling.small import SIZE, accelerated, build, inputs

AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
KINDS = {
    "C4": ("C4", ()),
    "Detectron2's Mask R-CNN, C4": ("Detectron2's Mask R-CNN, C4", ()),
    "FPN": ("FPN", ()),
    "FPN, one box for all classes": ("FPN", AGNOSTIC),
    "Mask R-CNN": ("Mask R-CNN", ()),
    "Keypoint R-CNN": ("Keypoint R-CNN", ()),
    "VGG-16": ("VGG-16", ()),
}
BOTH = ("TEST.BOX_REFINEMENT", "True", "TEST.BOX_VOTING", "True")


def detector(kind: str, *more: object) -> nn.Module:
    """A detector that finds objects of all classes on any image and moves proposals by a tenth of their size."""
    case, keys = KINDS[kind]
    few = ("MODEL.RPN.POST_NMS_TOPK_TEST", 30, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05)
    few += ("TEST.DETECTIONS_PER_IMAGE", 20, "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    model = build(case, *few, *keys, *more).float().eval()
    corners = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([88, 56])
    regions = [Instances(SIZE, proposal_boxes=Boxes(torch.cat([corners, corners + 40], dim=1)))]
    predictor, seen = model.roi_heads.box_predictor, []
    hook = predictor.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
    with torch.no_grad():
        images = model.preprocess_image(inputs()[:1])
        model.roi_heads(images, model.backbone(images.tensor), regions, None)
        hook.remove()
        for layer, spread in ((predictor.cls_score, 2.0), (predictor.bbox_pred, 1.0)):
            layer.weight.mul_(spread / (seen[0] @ layer.weight.T).std(dim=0, keepdim=True).T)
            layer.bias.copy_(-(seen[0] @ layer.weight.T).mean(dim=0))
    return model


def found_by(model: nn.Module, batch) -> list[Instances]:
    with torch.no_grad():
        return [output["instances"] for output in model(batch)]


def assert_equal(found: Instances, expected: Instances, **tolerance: float) -> None:
    assert found.image_size == expected.image_size and len(found) == len(expected)
    assert found.get_fields().keys() == expected.get_fields().keys()
    assert torch.equal(found.pred_classes, expected.pred_classes)
    for name, value in expected.get_fields().items():
        other = found.get(name)
        if name == "pred_boxes":
            value, other = value.tensor, other.tensor
        if value.dtype == torch.bool:  # masks, whose probabilities may be one half
            assert other.shape == value.shape and (other != value).float().mean() < 1e-3
        else:
            torch.testing.assert_close(other, value, **tolerance)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_both_off_it_is_the_model(kind, fast):
    model = detector(kind)
    model = accelerated(model) if fast else model
    batch = [{**record, "height": 50, "width": 70} for record in inputs()]
    wrapped = RCNNWithOptions(model)
    for found, expected in zip(found_by(wrapped, batch), found_by(model, batch), strict=True):
        assert len(expected) > 0
        assert_equal(found, expected, rtol=0, atol=0)


def heads_predict(model: nn.Module, features, proposals) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores of one image's proposals, by the parts of Detectron2's heads."""
    heads = model.roi_heads
    if hasattr(heads, "res5"):
        pooled = heads.res5(heads.pooler([features[name] for name in heads.in_features], [proposals.proposal_boxes]))
        pooled = pooled.mean(dim=[2, 3])
    else:
        maps = [features[name] for name in heads.box_in_features]
        pooled = heads.box_head(heads.box_pooler(maps, [proposals.proposal_boxes]))
    output = heads.box_predictor(pooled)
    return heads.box_predictor.predict_boxes(output, [proposals])[0], torch.softmax(output[0], dim=1)


def refined_by_hand(model: nn.Module, record, *, refinement: bool, voting: bool) -> list[tuple]:
    """Rows of class, score and box in the image as it is fed, by the definition."""
    images = model.preprocess_image([record])
    features = model.backbone(images.tensor)
    proposals = model.proposal_generator(images, features, None)[0][0]
    boxes, scores = heads_predict(model, features, proposals)
    if refinement:
        again = []
        for sides, row in zip(boxes.tolist(), scores.tolist(), strict=True):
            best = row[:-1].index(max(row[:-1])) if len(sides) > 4 else 0
            left, top, right, bottom = sides[4 * best : 4 * best + 4]
            again.append([max(left, 0), max(top, 0), min(right, SIZE[1]), min(bottom, SIZE[0])])
        second = heads_predict(model, features, Instances(SIZE, proposal_boxes=Boxes(torch.tensor(again))))
        boxes, scores = torch.cat([boxes, second[0]]), torch.cat([scores, second[1]])
    candidates = find_candidates(boxes, scores, SIZE, 0.05)
    kept = batched_nms(*candidates, 0.5).tolist()[:20]
    final = voted(candidates, kept) if voting else candidates.boxes[kept].tolist()
    return [(candidates.classes[i].item(), candidates.scores[i].item(), box) for i, box in zip(kept, final)]


@pytest.mark.parametrize(("refinement", "voting"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_refinement_and_voting_are_as_defined(kind, refinement, voting):
    model, record = detector(kind), inputs()[0]
    with torch.no_grad():
        expected = refined_by_hand(model, record, refinement=refinement, voting=voting)
    wrapped = RCNNWithOptions(model, refinement=refinement, voting=voting)
    found, fast, plain = (
        found_by(each, [record])[0]
        for each in (wrapped, RCNNWithOptions(accelerated(model), refinement=refinement, voting=voting), model)
    )
    classes, scores, boxes = zip(*expected, strict=True)
    assert found.pred_classes.tolist() == list(classes) and len(set(classes)) > 1
    torch.testing.assert_close(found.scores, torch.tensor(scores), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(boxes), rtol=0, atol=1e-3)
    count = min(len(plain), len(found))
    assert (found.pred_boxes.tensor[:count] - plain.pred_boxes.tensor[:count]).abs().max() > 0.1
    torch.testing.assert_close(fast.pred_boxes.tensor, found.pred_boxes.tensor, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["Mask R-CNN", "Detectron2's Mask R-CNN, C4", "Keypoint R-CNN"])
def test_masks_and_keypoints_are_those_of_the_final_boxes(kind):
    model, batch = detector(kind), inputs()
    found = found_by(RCNNWithOptions(model, refinement=True, voting=True), batch)
    with torch.no_grad():
        given = [
            Instances(SIZE, pred_boxes=each.pred_boxes, pred_classes=each.pred_classes, scores=each.scores)
            for each in found
        ]
        expected = model.inference(batch, given)
    for one, other in zip(found, expected, strict=True):
        assert one.has("pred_masks") or one.has("pred_keypoints")
        assert_equal(one, other["instances"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["C4", "Mask R-CNN"])
def test_results_do_not_depend_on_the_batch(kind):
    wrapped, batch = RCNNWithOptions(detector(kind), refinement=True, voting=True), inputs()
    for found, record in zip(found_by(wrapped, batch), batch, strict=True):
        assert_equal(found, found_by(wrapped, [record])[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["C4", "FPN", "Mask R-CNN"])
@pytest.mark.parametrize("counts", [(0, 0), (3, 0)])
def test_images_without_proposals(kind, counts):
    model = detector(kind, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "MODEL.LOAD_PROPOSALS", True)
    boxes = torch.tensor([[5.0, 5.0, 60.0, 80.0], [30.0, 10.0, 90.0, 70.0], [0.0, 0.0, 128.0, 96.0]])
    batch = [
        {**record, "proposals": Instances(SIZE, proposal_boxes=Boxes(boxes[:count]))}
        for record, count in zip(inputs(), counts, strict=True)
    ]
    found = found_by(RCNNWithOptions(model, refinement=True, voting=True), batch)
    assert [len(each) > 0 for each in found] == [count > 0 for count in counts]


class Shifting(FastRCNNOutputLayers):
    """Shifts boxes of class 0 by a tenth of their width and those of class 1 by half; is surer of boxes more right."""

    def forward(self, boxes):
        left = boxes[:, :1] > 2
        probabilities = torch.where(left, torch.tensor([[0.8, 0.15, 0.05]]), torch.tensor([[0.6, 0.3, 0.1]]))
        deltas = torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0]]).expand(len(boxes), 8)
        return probabilities.log(), deltas


class Heads(nn.Module):
    """Heads whose feature of a region is its box."""

    def __init__(self, **thresholds):
        super().__init__()
        transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
        shape = ShapeSpec(channels=4)
        self.box_predictor = Shifting(shape, box2box_transform=transform, num_classes=2, **thresholds)
        self.seen = []

    def forward(self, images, features, proposals, targets):
        self.seen.append([each.proposal_boxes.tensor.tolist() for each in proposals])
        self.box_predictor(torch.cat([each.proposal_boxes.tensor for each in proposals]))
        raise AssertionError("the heads ran on after their predictor")

    def forward_with_given_boxes(self, features, instances):
        return instances


@pytest.mark.parametrize("limit", [100, 1])
@pytest.mark.parametrize(
    ("refinement", "voting", "threshold", "expected"),
    [
        (False, False, 0.05, [(0, 0.6, 4.0), (1, 0.3, 20.0)]),
        # Class 0: 4…44 with 0.6 and, from there, 8…48 with 0.8. Class 1: 20…60 with 0.3 and, also from 4…44, 24…64.
        (True, False, 0.05, [(0, 0.8, 8.0), (1, 0.3, 20.0)]),
        (False, True, 0.05, [(0, 0.6, 4.0), (1, 0.3, 20.0)]),
        (
            True,
            True,
            0.05,
            [(0, 0.8, (8 * 0.8 + 4 * 0.6) / 1.4), (1, 0.3, (20 * 0.3 + 24 * 0.15) / 0.45)],
        ),
        (True, True, 0.2, [(0, 0.8, (8 * 0.8 + 4 * 0.6) / 1.4), (1, 0.3, 20.0)]),  # what is below does not vote
    ],
)
def test_a_known_regression(refinement, voting, threshold, expected, limit):
    heads = Heads(test_score_thresh=threshold, test_nms_thresh=0.3, test_topk_per_image=limit)
    proposals = [Instances((100, 100), proposal_boxes=Boxes(torch.tensor([[0.0, 0.0, 40.0, 40.0]])))]
    model = nn.Module()
    model.roi_heads, model.backbone = heads, nn.Identity()
    model.proposal_generator = lambda images, features, targets: (proposals, {})
    model.preprocess_image = lambda batch: ImageList(torch.zeros(1, 3, 100, 100), [(100, 100)])
    (found,) = found_by(
        RCNNWithOptions(model, refinement=refinement, voting=voting), [{"image": torch.zeros(3, 100, 100)}]
    )
    rows = expected[:limit]
    assert found.pred_classes.tolist() == [kind for kind, _, _ in rows]
    assert found.scores.tolist() == pytest.approx([score for _, score, _ in rows])
    boxes = [[left, 0.0, left + 40, 40.0] for _, _, left in rows]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(boxes))
    assert heads.seen[1:] == ([[[[4.0, 0.0, 44.0, 40.0]]]] if refinement else [])
    assert not heads.box_predictor._forward_pre_hooks


def test_an_evaluation_leaves_the_model_in_the_mode_that_it_had():
    model = detector("FPN")
    for training in (True, False):
        model.training = training
        assert RCNNWithOptions(model, refinement=True, voting=False).training == training


def test_evaluation_and_load_detector_use_what_test_says(detection_config, detector_file, scenes, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", detector_file, "TEST.DETECTIONS_PER_IMAGE", 7)
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 48]]", *BOTH)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys), eval_only=True)
    (file,) = (tmp_path / "inference").rglob("coco_instances_results.json")
    content, written = json.loads(Path(scenes).read_text()), json.loads(file.read_text())
    refined, plain = load_detector(detector_file, opts=BOTH), load_detector(detector_file)
    assert isinstance(refined.model, RCNNWithOptions) and not isinstance(plain.model, RCNNWithOptions)
    differs = False
    for image in content["images"][:3]:
        picture = Path(scenes).parent / "images" / image["file_name"]
        found = refined(picture)
        rows = [row for row in written if row["image_id"] == image["id"]]
        assert len(rows) == len(found) > 0
        corners = torch.tensor([row["bbox"] for row in rows])
        corners[:, 2:] += corners[:, :2]
        torch.testing.assert_close(found.pred_boxes.tensor, corners, rtol=0, atol=1e-3)
        differs |= plain(picture).scores.tolist() != found.scores.tolist()
    assert differs


def test_a_detector_remembers_how_it_was_tested(detection_config, detector_file, classifier, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "SOLVER.MAX_ITER", 0)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, "TEST.BOX_VOTING", True))
    wrapped = load_detector(tmp_path / "model_final.pth").model
    assert (wrapped.refinement, wrapped.voting) == (False, True)
    off = load_detector(tmp_path / "model_final.pth", opts=("TEST.BOX_VOTING", "False"))
    assert not isinstance(off.model, RCNNWithOptions)


def test_load_detector_refuses_it_in_a_sentence(detector_file):
    with pytest.raises(ConfigError, match=r"TEST.BOX_VOTING is True \(command line\), but TEST.AUG.ENABLED is True"):
        load_detector(detector_file, opts=("TEST.BOX_VOTING", "True", "TEST.AUG.ENABLED", "True"))
