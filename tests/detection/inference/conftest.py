"""A detector that finds things on any image."""

import shutil
from pathlib import Path

import pytest

from resnet_backbone import detection


@pytest.fixture(scope="session")
def detector_file(detection_config, classifier, tmp_path_factory) -> Path:
    """The checkpoint of a ResNet-18-C4 detector, alone in its folder, with a few keys that are not the defaults."""
    folder = tmp_path_factory.mktemp("detector")
    keys = ("MODEL.NETWORK.NAME", "resnet18", "MODEL.WEIGHTS", classifier("resnet18"), "SOLVER.MAX_ITER", 0)
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 48]]", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05)
    keys += ("TEST.DETECTIONS_PER_IMAGE", 7)
    detection.run(detection_config("faster_rcnn_R50.yaml", folder / "run", *keys))
    return Path(shutil.copy(folder / "run" / "model_final.pth", folder / "moved.pth"))


@pytest.fixture
def pictures(scenes) -> list[Path]:
    return sorted((Path(scenes).parent / "images").iterdir())
