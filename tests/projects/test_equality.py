"""Both sides train and are compared, and a difference would be found."""

import json
from pathlib import Path

import pytest
import torch

from resnet_backbone import detection
from resnet_backbone.engine.config import load_config
from tests.conftest import DETECTION_SMALL

PROJECT = Path(__file__).parents[2] / "projects" / "equality"


@pytest.fixture(scope="module")
def words(scenes, classifier) -> list[str]:
    words = [
        *DETECTION_SMALL.split(),
        "DATASETS.TRAIN",
        scenes,
        "DATASETS.TEST",
        scenes,
        "MODEL.NETWORK.NAME",
        "resnet18",
    ]
    return [*words, "MODEL.WEIGHTS", str(classifier("resnet18")), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="module")
def output(run, words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    flags = ["--config-file", "faster_rcnn_R50.yaml", "--output", str(folder), "--seeds", "1", "2", "--images", "3"]
    assert run.main([*flags, *words]) == 0
    return folder


def test_every_run_is_there(output):
    results = json.loads((output / "results.json").read_text())
    sides = "Detectron2's modules", "accelerated"
    assert [(run["seed"], run["side"]) for run in results["runs"]] == [
        (seed, side) for seed in (1, 2) for side in sides
    ]
    for name, accelerated in (("stock_1", False), ("accelerated_2", True)):
        assert f"ACCELERATE: {str(accelerated).lower()}" in (output / name / "config.yaml").read_text()
    assert all(run["losses"] for run in results["runs"])
    assert "| accelerated " in (output / "report.md").read_text() and (output / "losses.png").stat().st_size > 5000


def test_detections_are_those_of_the_same_weights(project, output, words, monkeypatch):
    found = json.loads((output / "results.json").read_text())["detections"]
    assert found["images"] == 3 and found["detections"] > 10
    assert found["box"] < 1e-3 and found["score"] < 1e-5 and found["classes"] == found["unmatched"] == 0

    def worse(model):
        with torch.no_grad():
            model.roi_heads.box_predictor.bbox_pred.bias.add_(0.01)
        return model

    monkeypatch.setattr(project["compare"], "accelerate", worse)
    keys = "MODEL.WEIGHTS", str(output / "stock_1" / "model_final.pth"), "MODEL.ACCELERATE", "False"
    keys += "OUTPUT_DIR", str(output / "again")
    cfg = load_config(detection.get_config(), "faster_rcnn_R50.yaml", [*words, *keys])
    assert project["compare"].compare_detections(cfg, 3)["box"] > 1e-3
