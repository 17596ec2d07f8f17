"""Test images in batches: the same detections as one by one."""

import json

import pytest
import torch

from resnet_backbone.detection.build import build_detector
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.evaluation import evaluate as module
from resnet_backbone.detection.evaluation.batches import batch_by_shape
from resnet_backbone.detection.evaluation.evaluate import evaluate
from resnet_backbone.engine.network_config import fill_from_metadata
from resnet_backbone.weights import read_checkpoint

SIZES = [(100, 200), (50, 100), (200, 100), (100, 200), (100, 201), (100, 200), (480, 640)]


def test_a_batch_has_one_shape(detection_config, tmp_path):
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, "INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 1000)
    records = [{"height": height, "width": width} for height, width in SIZES] + [{}, {}]
    batches = batch_by_shape(cfg, records, range(9), 3)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    # 100×200 and 50×100 become 80×160; those without a size are alone.
    assert sorted(map(tuple, batches)) == [(0, 1, 3), (2,), (4,), (5,), (6,), (7,), (8,)]
    assert batch_by_shape(cfg, records, [5, 2], 1) == [[5], [2]]
    assert batch_by_shape(cfg, records, [], 3) == []
    cfg.INPUT.MIN_SIZE_TEST = 0  # no resizing
    assert sorted(map(tuple, batch_by_shape(cfg, records, range(7), 8))) == [(0, 3, 5), (1,), (2,), (4,), (6,)]


@pytest.mark.parametrize("workers", [0, 2])
def test_detections_are_those_of_one_by_one(detection_config, classifier, scenes, tmp_path, monkeypatch, workers):
    weights = str(classifier("resnet18"))
    keys = "MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0
    cfg = detection_config("faster_rcnn_R50.yaml", tmp_path, *keys, "DATALOADER.NUM_WORKERS", workers)
    datasets.register(scenes)
    torch.manual_seed(0)
    checkpoint = read_checkpoint(weights)
    fill_from_metadata(cfg, checkpoint.metadata, weights)
    model = build_detector(cfg, checkpoint, weights)
    sizes, found = [], []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for name, most in (("one", 1), ("several", 4)):
        batch = batch_by_shape
        monkeypatch.setattr(module, "batch_by_shape", lambda *given, batch=batch, most=most: batch(*given[:3], most))
        evaluate(cfg, model, tmp_path / name)
        file = next((tmp_path / name).rglob("coco_instances_results.json"))
        found.append(sorted(json.loads(file.read_text()), key=lambda d: (d["image_id"], d["category_id"], d["score"])))
    assert max(sizes) == 4 and sizes.count(1) >= len({d["image_id"] for d in found[0]})
    one, several = found
    assert len(one) == len(several) > 20
    for left, right in zip(one, several, strict=True):
        assert (left["image_id"], left["category_id"]) == (right["image_id"], right["category_id"])
        assert left["score"] == pytest.approx(right["score"], abs=1e-6)
        assert left["bbox"] == pytest.approx(right["bbox"], abs=1e-3)
