"""Pictures for TensorBoard, compared with drawings of the objects at their place."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnet_backbone import detection
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.drawing import draw
from resnet_backbone.detection.evaluation.pictures import Pictures, confident, side_by_side

SIZE = (60, 80)


def detections(scores, *, size=SIZE, **fields) -> Instances:
    boxes = [[8.0 * n, 4.0 * n, 8.0 * n + 20, 4.0 * n + 16] for n in range(len(scores))]
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.arange(len(scores)),
        **fields,
    )


@pytest.mark.parametrize(
    ("scores", "drawn"),
    [
        ([0.9, 0.4, 0.5, 0.49], [0.9, 0.5]),
        ([0.1, 0.4, 0.3, 0.2, 0.05, 0.45, 0.01], [0.45, 0.4, 0.3, 0.2, 0.1]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_confident_detections_are_drawn_or_else_the_best(scores, drawn):
    extra = {"pred_keypoint_heatmaps": torch.zeros(len(scores), 1, 2, 2)}
    found = confident(detections(scores, **extra))
    assert found.scores.tolist() == pytest.approx(drawn) and not found.has("pred_keypoint_heatmaps")
    assert found.pred_classes.tolist() == [scores.index(pytest.approx(score)) for score in drawn]


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = {"bbox": [10.0, 20.0, 30.0, 16.0], "bbox_mode": 1, "category_id": 1}
    outline = {"segmentation": [[10.0, 20, 40, 20, 40, 36, 10, 36]]}
    crowd = {**box, "bbox": [0.0, 0.0, 9.0, 9.0], "iscrowd": 1, **outline}
    return {"file_name": str(tmp_path / "a.png"), "annotations": [{**box, **outline}, crowd]}


@pytest.mark.parametrize("masks", [False, True])
def test_truth_is_left_and_detections_right(record, masks):
    before, pixels = copy.deepcopy(record), np.array(Image.open(record["file_name"]))
    found, truth = detections([0.9, 0.8]), Instances(SIZE, gt_classes=torch.tensor([1]))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 40.0, 36.0]]))
    if masks:
        found.pred_masks = torch.zeros(2, *SIZE, dtype=torch.bool)
        found.pred_masks[0, 5:30, 7:50] = True
        truth.gt_masks = torch.zeros(1, *SIZE, dtype=torch.bool)
        truth.gt_masks[0, 20:36, 10:40] = True
    picture = side_by_side(record, found, ["a", "b"]).transpose(1, 2, 0)
    assert picture.shape == (60, 164, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture[:, :80], draw(pixels, truth, ["a", "b"]))
    assert np.array_equal(picture[:, 84:], draw(pixels, found, ["a", "b"]))
    assert (picture[:, 80:84] == 255).all() and record == before


def test_a_large_image_is_reduced_with_everything_on_it(tmp_path):
    size = (1200, 1920)  # a quarter of it has 300 × 480 pixels
    Image.new("RGB", size[::-1], (100, 100, 100)).save(tmp_path / "a.png")
    found = detections([0.9], size=size)
    found.pred_boxes = Boxes(torch.tensor([[400.0, 400.0, 1200.0, 800.0]]))
    found.pred_masks = torch.zeros(1, *size, dtype=torch.bool)
    found.pred_masks[:, 400:800, 400:1200] = True
    found.pred_keypoints = torch.tensor([[[1600.0, 1000.0, 1.0]]])
    picture = side_by_side({"file_name": str(tmp_path / "a.png"), "annotations": []}, found, ["a"])
    small = detections([0.9], size=(300, 480))
    small.pred_boxes = Boxes(torch.tensor([[100.0, 100.0, 300.0, 200.0]]))
    small.pred_masks = torch.zeros(1, 300, 480, dtype=torch.bool)
    small.pred_masks[:, 100:200, 100:300] = True
    small.pred_keypoints = torch.tensor([[[400.0, 250.0, 1.0]]])
    expected = draw(np.full((300, 480, 3), 100, np.uint8), small, ["a"])
    assert np.array_equal(picture.transpose(1, 2, 0)[:, 484:], expected)


def test_the_metrics_are_those_of_the_evaluator_itself(scenes):
    datasets.register(scenes)
    records, found = DatasetCatalog.get(scenes), {}
    for wrapped in (False, True):
        evaluator = COCOEvaluator(scenes, tasks=("bbox",), use_fast_impl=False)
        evaluator = Pictures(evaluator, records[1:3], []) if wrapped else evaluator
        evaluator.reset()
        for each in records:
            output = {"instances": detections([0.9, 0.6], size=(each["height"], each["width"]))}
            evaluator.process([{"image_id": each["image_id"], "file_name": each["file_name"]}], [output])
        found[wrapped] = evaluator.evaluate()
    assert found[True]["bbox"] == pytest.approx(found[False]["bbox"], nan_ok=True)
    assert [name for name, _ in evaluator.drawn()] == [
        f"predictions/{n}_{Path(each['file_name']).stem}" for n, each in enumerate(records[1:3], 1)
    ]


def test_a_run_shows_the_first_images_of_the_first_test_set(detection_config, classifier, scenes, tmp_path):
    """At each evaluation, under the iterations that are done, but not after the last iteration."""
    again = f"{scenes}:{Path(scenes).parent / 'images'}"
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "DATASETS.TEST", (scenes, again))
    keys += ("SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 1)
    detection.run(detection_config("faster_rcnn_R50.yaml", tmp_path, *keys))
    (file,) = tmp_path.glob("events.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    stems = [Path(image["file_name"]).stem for image in json.loads(Path(scenes).read_text())["images"][:4]]
    assert sorted(events.Tags()["images"]) == [f"predictions/{n}_{stem}" for n, stem in enumerate(stems, 1)]
    for tag in events.Tags()["images"]:
        assert [image.step for image in events.Images(tag)] == [1, 2]
        assert (events.Images(tag)[0].width, events.Images(tag)[0].height) == (2 * 96 + 4, 96)
