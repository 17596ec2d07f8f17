"""Several detectors as one: against their definition, and as the detectors' files are taken."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torchvision.ops import batched_nms

from resnet_backbone import detection
from resnet_backbone.detection import load_detector
from resnet_backbone.detection.inference.ensemble import Member, average, unite
from resnet_backbone.detection.inference.options import RCNNWithOptions
from resnet_backbone.detection.inference.voting import find_candidates
from resnet_backbone.errors import InputError
from resnet_backbone.weights import read_checkpoint
from tests.detection.inference.test_options import assert_equal, detector, found_by, heads_predict
from tests.detection.modeling.small import SIZE, inputs


def test_proposals_are_united_by_image():
    first = [torch.ones(2, 4), torch.zeros(0, 4)]
    second = [torch.full((1, 4), 5.0), torch.full((3, 4), 7.0)]
    assert [each[:, 0].tolist() for each in unite([first, second])] == [[1, 1, 5], [7, 7, 7]]


def test_boxes_and_scores_are_averaged_by_region():
    by_class = torch.tensor([[0.0, 0, 10, 10, 2, 2, 8, 8]]), torch.tensor([[0.2, 0.3, 0.5]])
    for_all = torch.tensor([[4.0, 4, 20, 20]]), torch.tensor([[0.6, 0.1, 0.3]])
    ((boxes, scores),) = average([[by_class], [for_all]])
    assert boxes.tolist() == [[2, 2, 15, 15, 3, 3, 14, 14]]
    torch.testing.assert_close(scores, torch.tensor([[0.4, 0.2, 0.4]]))
    nothing = torch.zeros(0, 4), torch.zeros(0, 3)
    ((boxes, scores),) = average([[nothing], [nothing]])
    assert boxes.shape == (0, 4) and scores.shape == (0, 3)


@pytest.mark.parametrize("kind", ["C4", "Mask R-CNN"])
def test_a_detector_twice_is_itself(kind):
    model, batch = detector(kind), inputs()
    twice = RCNNWithOptions(model, members=[Member(copy.deepcopy(model))])
    for found, expected in zip(found_by(twice, batch), found_by(model, batch), strict=True):
        assert_equal(found, expected, rtol=1e-5, atol=1e-3)


def test_two_detectors_are_as_defined():
    models, record = [detector("C4"), detector("FPN", "SEED", 5)], inputs()[0]
    with torch.no_grad():
        seen = []
        for model in models:
            images = model.preprocess_image([record])
            features = model.backbone(images.tensor)
            seen.append((model, features, model.proposal_generator(images, features, None)[0][0]))
        proposals = type(seen[0][2]).cat([type(each)(SIZE, proposal_boxes=each.proposal_boxes) for _, _, each in seen])
        predictions = [heads_predict(model, features, proposals) for model, features, _ in seen]
        boxes, scores = (sum(each) / 2 for each in zip(*predictions, strict=True))
    candidates = find_candidates(boxes, scores, SIZE, 0.05)
    kept = batched_nms(*candidates, 0.5)[:20]
    (found,) = found_by(RCNNWithOptions(models[0], members=[Member(models[1])]), [record])
    assert len(found) == len(kept) > 5
    assert found.pred_classes.tolist() == candidates.classes[kept].tolist()
    torch.testing.assert_close(found.scores, candidates.scores[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes.tensor, candidates.boxes[kept], rtol=0, atol=1e-3)


def test_flipping_gives_the_mirror_image_the_mirrored_boxes():
    wrapped, batch = RCNNWithOptions(detector("C4"), flip=True), inputs()
    mirrored = [{**record, "image": record["image"].flip(2)} for record in batch]
    for one, other in zip(found_by(wrapped, batch), found_by(wrapped, mirrored), strict=True):
        boxes = other.pred_boxes.tensor
        boxes = torch.stack([SIZE[1] - boxes[:, 2], boxes[:, 1], SIZE[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        assert len(one) == len(other) > 5
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        distances = (one.pred_boxes.tensor[:, None] - boxes).abs().amax(2)
        distances = distances.masked_fill(one.pred_classes[:, None] != other.pred_classes, torch.inf)
        assert distances.amin(1).max() < 1e-2
    (plain,), (flipped,) = found_by(wrapped.model, batch[:1]), found_by(wrapped, batch[:1])
    assert plain.scores.tolist() != flipped.scores.tolist()


@pytest.mark.parametrize("kind", ["C4", "VGG-16"])
def test_all_options_together_do_not_depend_on_the_batch(kind):
    every = {"refinement": True, "voting": True, "flip": True, "scales": (0.5, 1.0, 1.5), "region_size": 64}
    wrapped = RCNNWithOptions(detector(kind), **every, members=[Member(detector("FPN"), scale=1.5, swapped=True)])
    batch = inputs()
    for found, record in zip(found_by(wrapped, batch), batch, strict=True):
        assert len(found) > 5
        assert_equal(found, found_by(wrapped, [record])[0], rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["C4", "FPN", "VGG-16"])
def test_a_gpu_finds_the_same(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for device in ("cpu", "cuda"):
        model, member = detector(kind).to(device), detector("FPN").to(device)
        # Scales whose bilinear weights are exact, so that no pixel rounds to another level.
        every = {"refinement": True, "voting": True, "flip": True, "scales": (0.5, 1.0, 2.0), "region_size": 64}
        found.append(found_by(RCNNWithOptions(model, **every, members=[Member(member)]), inputs()))
    for one, other in zip(*found, strict=True):
        assert_equal(other.to("cpu"), one, rtol=1e-3, atol=0.1)


@pytest.fixture
def other(detection_config, classifier, tmp_path):
    """The function that gives the checkpoint of an untrained detector: of some keys, or of data of one category."""

    def make(*keys: object, file: str = "faster_rcnn_R50.yaml", colors: tuple = (), one_category: bool = False) -> Path:
        first = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18", *colors))
        cfg = detection_config(file, tmp_path / f"other{len(list(tmp_path.iterdir()))}", *first, *keys)
        if one_category:
            content = json.loads(Path(cfg.DATASETS.TRAIN[0]).read_text())
            content["categories"] = content["categories"][:1]
            kept = content["categories"][0]["id"]
            content["annotations"] = [each for each in content["annotations"] if each["category_id"] == kept]
            images = Path(cfg.DATASETS.TRAIN[0]).parent / "images"
            (tmp_path / "one.json").write_text(json.dumps(content))
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{tmp_path / 'one.json'}:{images}",), ()
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
        cfg.SOLVER.MAX_ITER = 0
        detection.run(cfg)
        return Path(cfg.OUTPUT_DIR) / "model_final.pth"

    return make


def test_load_detector_takes_members_by_their_files(detector_file, pictures):
    sure = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    alone = load_detector(detector_file, opts=sure)
    twice = load_detector(detector_file, opts=(*sure, "TEST.ENSEMBLE", str(detector_file)))
    (member,) = twice.model.members[1:]
    assert (member.scale, member.swapped) == (1.0, False)
    assert_equal(twice(pictures[0]), alone(pictures[0]), rtol=1e-5, atol=1e-3)


def test_a_member_is_fed_as_it_was_trained(detector_file, other):
    colors = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[90, 100, 110]", "MODEL.PIXEL_STD", "[50, 60, 70]")
    file = other("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 200, "TEST.BOX_VOTING", True, colors=colors)
    detector = load_detector(detector_file, opts=("TEST.ENSEMBLE", str(file)))
    (member,) = detector.model.members[1:]
    assert member.swapped and member.scale == 96 / detector.cfg.INPUT.MIN_SIZE_TEST
    assert not isinstance(member.model, RCNNWithOptions) and not detector.model.voting


def test_a_run_evaluates_the_ensemble(detection_config, detector_file, other, tmp_path):
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", detector_file)
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 48]]", "TEST.DETECTIONS_PER_IMAGE", 7)
    keys += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05)
    member = other("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7)
    written = []
    for name, more in (("alone", ()), ("together", ("TEST.ENSEMBLE", (str(member),)))):
        detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path / name, *keys, *more), eval_only=True)
        (file,) = (tmp_path / name / "inference").rglob("coco_instances_results.json")
        written.append(json.loads(file.read_text()))
    assert all(written) and written[0] != written[1]


def test_members_that_cannot_be_in_it_are_refused_in_a_sentence(
    detector_file, other, classifier, detection_config, tmp_path
):
    small = ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.BACKBONE.NAME", "build_network_retinanet_fpn_backbone")
    retinanet = other(*small, file="COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    fewer = other(one_category=True)
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": dict(read_checkpoint(detector_file).model), "iteration": 1}, foreign)
    for file, message in (
        (retinanet, "TEST.ENSEMBLE is .*MODEL.META_ARCHITECTURE is RetinaNet.*needs GeneralizedRCNN.*Leave it out"),
        (fewer, r"the 1 classes of .* \(.*\) are not this detector's \d+ \(.*the same classes in the same order"),
        (classifier("resnet18"), "holds a classifier"),
        (tmp_path / "none.pth", "none.pth"),
        (other("INPUT.MIN_SIZE_TEST", 0), r"INPUT.MIN_SIZE_TEST of .* is 0, and this detector's \d+; .*Leave it out"),
        (foreign, "TEST.ENSEMBLE is .*foreign.pth does not say how .*Put the config.yaml of its training there"),
    ):
        with pytest.raises(InputError, match=message):
            load_detector(detector_file, opts=("TEST.ENSEMBLE", str(file)))
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", detector_file, "TEST.ENSEMBLE", (str(fewer),))
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 48]]")
    with pytest.raises(InputError, match=r"TEST.ENSEMBLE is .*are not this detector's"):
        detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path / "run", *keys), eval_only=True)
