"""Exported detectors: onnxruntime and TorchScript against the models that they came from."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from resnet_backbone import detection
from resnet_backbone.detection import load_detector
from resnet_backbone.detection.export import difference, export_detector
from resnet_backbone.weights import CheckpointError, read_checkpoint

ROOT = Path(__file__).parents[2]
FPN = ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32)
MASKS = ("MODEL.BACKBONE.NAME", "build_network_fpn_backbone", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, *FPN)
MASKS_C4 = ("MODEL.BACKBONE.NAME", "build_network_backbone", "MODEL.ROI_HEADS.NAME", "NetworkRes5ROIHeads")
MASKS_C4 += ("MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
RETINANET = ("MODEL.BACKBONE.NAME", "build_network_retinanet_fpn_backbone", *FPN, "MODEL.RETINANET.PRIOR_PROB", 0.3)
KINDS = {
    "C4": ("faster_rcnn_R50.yaml", "resnet18", ()),
    "C4, context": ("faster_rcnn_R50.yaml", "resnet18", ("MODEL.ROI_HEADS.GLOBAL_CONTEXT", True)),
    "VGG": ("faster_rcnn_VGG16.yaml", "vgg16", ()),
    "FPN": ("faster_rcnn_R50_FPN.yaml", "resnet18", FPN),
    "masks": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "resnet18", MASKS),
    "masks, C4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", "resnet18", MASKS_C4),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "resnet18", RETINANET),
}


@pytest.fixture
def trained(detection_config, classifier, scenes, tmp_path):
    """The function `(kind, KEY, VALUE, …)` that gives the checkpoint of a detector that finds something anywhere."""

    def make(kind, *keys) -> Path:
        file, network, more = KINDS[kind]
        first = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 0, "TEST.DETECTIONS_PER_IMAGE", 10)
        keys = (*first, "MODEL.NETWORK.NAME", network, "MODEL.WEIGHTS", classifier(network), *more, *keys)
        if kind.startswith("masks"):
            keys += ("DATASETS.TRAIN", with_masks(Path(scenes)), "DATASETS.TEST", "()", "MODEL.MASK_ON", True)
        folder = tmp_path / "output" / "detector"
        detection.run(detection_config(file, folder, *keys))
        return folder / "model_final.pth"

    def with_masks(file: Path) -> str:
        content = json.loads(file.read_text())
        for each in content["annotations"]:
            x, y, w, h = each["bbox"]
            each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (tmp_path / "masks.json").write_text(json.dumps(content))
        return f"{tmp_path / 'masks.json'}:{file.parent / 'images'}"

    return make


@pytest.fixture
def convert(load_script, monkeypatch):
    return lambda *words: load_script(ROOT / "tools" / "convert_weights.py").main(list(map(str, words)))


@pytest.mark.filterwarnings("ignore")  # the tracer's, about Detectron2's own code
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_finds_what_the_detector_finds_at_any_size(trained, convert, scenes, tmp_path, kind, capsys):
    weights = trained(kind)
    images = sorted((Path(scenes).parent / "images").iterdir())
    assert convert(weights, tmp_path / "d.onnx", "--images", images[0].parent) == 0
    assert "of any size" in capsys.readouterr().out
    detector = load_detector(weights)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx", providers=["CPUExecutionProvider"])
    for shape in ((64, 64), (80, 57), (64, 96)):  # as the detector's own resizing leaves them
        image = cv2.resize(cv2.imread(str(images[1]))[:, :, ::-1], shape[::-1])
        expected = detector(np.ascontiguousarray(image))
        resized = detector.prepare(image)["image"].float().numpy()  # RGB
        boxes, scores, classes, *masks = session.run(None, {"image": resized})
        assert len(boxes) == len(expected) > 0
        boxes = boxes * np.tile([shape[1] / resized.shape[2], shape[0] / resized.shape[1]], 2)
        rows = np.column_stack([classes, boxes, scores])
        theirs = np.column_stack([expected.pred_classes, expected.pred_boxes.tensor, expected.scores])
        rows, theirs = (each[np.lexsort(each.round(1).T)] for each in (rows, theirs))  # scores may be almost the same
        np.testing.assert_allclose(rows[:, :5], theirs[:, :5], atol=0.02)
        np.testing.assert_allclose(rows[:, 5], theirs[:, 5], atol=1e-4)
        side = {"masks": 28, "masks, C4": 14}.get(kind)
        assert [mask.shape for mask in masks] == ([(len(boxes), 1, side, side)] if side else [])
    (properties,) = onnx.load(tmp_path / "d.onnx").metadata_props
    assert json.loads(properties.value)["class_names"] == list(read_checkpoint(weights).metadata.class_names)


@pytest.mark.filterwarnings("ignore")
def test_the_graph_takes_rgb_whatever_the_network_takes(trained, convert, scenes, tmp_path, classifier):
    bgr = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[90, 100, 110]", "MODEL.PIXEL_STD", "[50, 60, 70]")
    file = classifier("resnet18", *bgr)
    weights = trained("C4", "MODEL.WEIGHTS", file)
    assert convert(weights, tmp_path / "d.onnx", "--images", Path(scenes).parent / "images") == 0
    image = sorted((Path(scenes).parent / "images").iterdir())[1]
    detector = load_detector(weights)
    fed = detector.prepare(cv2.imread(str(image))[:, :, ::-1])["image"].float()
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx", providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": fed.flip(0).numpy()})[0]
    np.testing.assert_allclose(scores, detector(image).scores, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_options_around_the_model_are_left_out_and_named(trained, convert, scenes, tmp_path, capsys):
    weights = trained("C4", "TEST.BOX_REFINEMENT", True, "TEST.BOX_VOTING", True)
    assert convert(weights, tmp_path / "d.onnx", "--images", Path(scenes).parent / "images") == 0
    assert "left out: TEST.BOX_REFINEMENT, TEST.BOX_VOTING" in capsys.readouterr().out


def test_what_cannot_be_exported_is_said_and_nothing_is_written(trained, convert, classifier, tmp_path, capsys):
    weights = trained("C4", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    blank = tmp_path / "blank.png"
    cv2.imwrite(str(blank), np.zeros((64, 64, 3), np.uint8))
    target = tmp_path / "d.onnx"
    for words, message in (
        ((weights, target), "finds nothing on generated images"),
        ((weights, target, "--images", blank), "finds nothing on .*blank.png"),
        ((weights, target, "--images", tmp_path / "none"), "there is no "),
        ((weights, target, "--arch", "resnet18"), "holds a detector, which becomes ONNX without any flag"),
        ((classifier("resnet18"), target, "--images", blank), "--images is about a detector"),
        ((weights, tmp_path / "d.pth", "--images", blank), "--images is about a detector that becomes ONNX"),
    ):
        assert convert(*words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not target.exists()


def test_a_file_without_metadata_is_refused_before_it_is_traced(trained, tmp_path, monkeypatch):
    weights = trained("C4")
    torch.save({"model": dict(read_checkpoint(weights).model)}, weights)  # as Detectron2's trainer writes it
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of tools/train_net\.py"):
        export_detector(weights, tmp_path / "d.onnx")
    assert not (tmp_path / "d.onnx").exists()


def test_objects_count_as_the_same_within_the_tolerances_only():
    def some(**changed):
        found = {"boxes": torch.tensor([[1.0, 2, 30, 40], [5, 5, 9, 9]]), "scores": torch.tensor([0.9, 0.5])}
        return {**found, "classes": torch.tensor([1, 2]), **changed}

    moved = some(boxes=some()["boxes"] + 0.01, scores=some()["scores"] - 5e-5)
    assert difference(moved, some(), limit=10) == (pytest.approx(0.01, rel=1e-3), pytest.approx(5e-5, rel=1e-2))
    turned = {name: value.flip(0) for name, value in some().items()}
    assert difference(turned, some(), limit=10) == (0, 0)
    for changed in (
        some(boxes=some()["boxes"] + 0.1),
        some(scores=torch.tensor([0.9, 0.501])),
        some(classes=torch.tensor([1, 1])),
        {name: value[:1] for name, value in some().items()},
        {name: value[:0] for name, value in some().items()},
    ):
        assert difference(changed, some(), limit=10) is None
        assert difference(some(), changed, limit=10) is None
    # Of a full list, the last may be another one of the same score.
    assert difference(some(classes=torch.tensor([1, 3])), some(), limit=2) == (0, 0)
    assert difference(some(classes=torch.tensor([3, 2])), some(), limit=2) is None


@pytest.mark.filterwarnings("ignore")
def test_the_documented_torchscript_gives_the_detectors_boxes(trained, scenes, tmp_path, monkeypatch):
    trained("FPN")
    shutil.copy(sorted((Path(scenes).parent / "images").iterdir())[0], tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?TracingAdapter.*?)```", (ROOT / "docs" / "weights.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    traced, schema = torch.jit.load("detector.ts"), names["adapter"].outputs_schema
    for image in (names["image"], torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)):  # another shape and content
        with torch.no_grad():
            expected = names["detector"].model.inference([{"image": image}], do_postprocess=False)[0]
            found = schema(traced(image))[0]["instances"]
        assert len(expected) > 0
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
