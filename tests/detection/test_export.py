"""The export of a detector, as docs/weights.md shows it."""

import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch

from resnet_backbone import detection

DOCS = Path(__file__).parents[2] / "docs" / "weights.md"
FILES = {"faster_rcnn_R50.yaml": "resnet18", "faster_rcnn_VGG16.yaml": "vgg16", "faster_rcnn_R50_FPN.yaml": "resnet18"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.filterwarnings("ignore")  # the tracer's, about Detectron2's own code
def test_the_documented_export_gives_the_detectors_boxes(
    detection_config, classifier, scenes, tmp_path, monkeypatch, file
):
    keys = ("MODEL.NETWORK.NAME", FILES[file], "MODEL.WEIGHTS", classifier(FILES[file]))
    keys += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 0)
    detection.run(detection_config(file, tmp_path / "output" / "detector", *keys))
    pictures = sorted((Path(scenes).parent / "images").iterdir())
    shutil.copy(pictures[0], tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?TracingAdapter.*?)```", DOCS.read_text(), re.DOTALL)
    names = {}
    exec(code, names)

    model, schema = names["predictor"].model, names["adapter"].outputs_schema
    traced = torch.jit.load("detector.ts")
    session = onnxruntime.InferenceSession("detector.onnx", providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    for image in (names["image"], torch.rand(3, 96, 64) * 255):  # the second of another shape and content
        with torch.no_grad():
            expected = model.inference([{"image": image}], do_postprocess=False)[0]
            of_trace = schema(traced(image))[0]["instances"]
        of_onnx = schema(tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()}))))[0]["instances"]
        assert len(expected) > 0
        for found in (of_trace, of_onnx):
            assert tuple(map(int, found.image_size)) == expected.image_size
            assert torch.equal(found.pred_classes, expected.pred_classes)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
