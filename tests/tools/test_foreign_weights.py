"""Weights of other libraries through the tools: evaluated, converted, trained, written in every format, read again."""

import json
import re
from pathlib import Path

import pytest
import torch

from resnet_backbone.weights import convert, read_weights
from tests.weights.foreign import caffe2s, caffe_resnet50, detectron2s, keras_resnet50, timms, torchvisions

ROOT = Path(__file__).parents[2]
PRETRAIN = """
INPUT.MIN_SIZE_TRAIN (36,36) INPUT.MIN_SIZE_TEST 36 INPUT.CROP.SIZE (32,32) SOLVER.REFERENCE_IMS_PER_BATCH 0
SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.001 SOLVER.MAX_ITER 1 SOLVER.STEPS () TEST.EVAL_PERIOD 0 SEED 1
TEST.PRECISE_BN.NUM_ITER 2 DATALOADER.NUM_WORKERS 0 MODEL.DEVICE cpu
"""
DETECTION = """
MODEL.DEVICE cpu MODEL.ROI_HEADS.NUM_CLASSES 8 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 10
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
SOLVER.REFERENCE_IMS_PER_BATCH 0 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0001 SOLVER.MAX_ITER 1 SOLVER.STEPS ()
TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 1
"""
BGR = "INPUT.FORMAT BGR MODEL.PIXEL_MEAN [103.53,116.28,123.675] MODEL.PIXEL_STD [1.0,1.0,1.0]"


@pytest.fixture(scope="module")
def tool(load_script):
    """The function that gives a tool's `main`, to be called in this process: an import of everything takes seconds."""
    return lambda name: load_script(ROOT / "tools" / f"{name}.py").main


def ours(folder: Path) -> Path:
    """Our own format, made of torchvision's by the converter's function."""
    convert(torchvisions(folder), folder / "resnet18.pth")
    return folder / "resnet18.pth"


# A file's maker, the network's name, how to tell the training tools what the file leaves open, and how the converter.
SOURCES = {
    "torchvision": (torchvisions, "resnet18", "", ""),
    "timm": (timms, "resnet18", "", ""),
    "detectron2": (detectron2s, "resnet18", BGR, "--preprocessing msra"),
    "caffe2": (caffe2s, "resnet50", f"{BGR} MODEL.RESNETS.STRIDE_IN_1X1 True", "--preprocessing msra"),
    "keras": (keras_resnet50, "resnet50", f"{BGR} MODEL.RESNETS.STRIDE_IN_1X1 True", "--preprocessing msra"),
    "caffe": (caffe_resnet50, "resnet50", f"{BGR} MODEL.RESNETS.STRIDE_IN_1X1 True", "--preprocessing msra"),
    "ours": (ours, "resnet18", "", ""),
}


@pytest.mark.parametrize("source", SOURCES)
def test_into_our_training_and_out_again(tool, shapes, scenes, tmp_path, capsys, source):
    make, name, keys, flags = SOURCES[source]
    file = make(tmp_path)
    convert_weights, pretrain, train_net = tool("convert_weights"), tool("pretrain"), tool("train_net")
    width = "MODEL.NETWORK.WIDTH 0.125" if name == "resnet50" else ""
    data = ["DATASETS.TRAIN", shapes, "DATASETS.TEST", shapes, "MODEL.NETWORK.NAME", name, *width.split()]
    classify = ["--config-file", str(ROOT / "configs/pretrain/imagenet.yaml"), *PRETRAIN.split(), *data]

    # Evaluated as it is, and converted: the same.
    direct, converted, tuned = tmp_path / "direct", tmp_path / "converted.pth", tmp_path / "tuned"
    weights = ["MODEL.WEIGHTS", str(file), *keys.split()]
    assert pretrain(["--eval-only", *classify, *weights, "OUTPUT_DIR", str(direct)]) == 0
    assert convert_weights([str(file), str(converted), *flags.split()]) == 0
    if keys:  # the recipe's own preprocessing is another, which is said, not overridden
        assert pretrain([*classify, "MODEL.WEIGHTS", str(converted), "OUTPUT_DIR", str(tuned)]) == 2
        assert "INPUT.FORMAT is RGB" in capsys.readouterr().err
    fed = ["MODEL.WEIGHTS", str(converted), *keys.split(), "OUTPUT_DIR", str(tuned)]
    assert pretrain([*classify, *fed, "SOLVER.MAX_ITER", "0", "TEST.PRECISE_BN.ENABLED", "False"]) == 0
    untouched = json.loads((tuned / "results.json").read_text())
    logged = (direct / "log.txt").read_text()
    assert f"top-1 {untouched['top1']:.2f}%, top-5 {untouched['top5']:.2f}%" in logged

    # One step of a classifier and one of a detector.
    stepped = tmp_path / "stepped"
    assert pretrain([*classify, *fed[:-1], str(stepped)]) == 0
    detect = ["--config-file", str(ROOT / "configs/faster_rcnn_R50.yaml"), *DETECTION.split()]
    detect += ["DATASETS.TRAIN", scenes, "DATASETS.TEST", scenes, "MODEL.NETWORK.NAME", name, *weights]
    assert train_net([*detect, "OUTPUT_DIR", str(tmp_path / "detector")]) == 0
    log = (tmp_path / "detector" / "log.txt").read_text()
    counts = re.search(r"(\d+) of (\d+) backbone tensors, (\d+) of (\d+) head", log)
    assert counts[1] == counts[2] and counts[3] == counts[4]

    # Written in every format, and read again.
    final = stepped / "model_final.pth"
    before = read_weights(file, **_statements(flags)).checkpoint.model
    after = read_weights(final).checkpoint
    assert not torch.equal(after.model["fc.weight"], before["fc.weight"])
    targets = [["out.safetensors"], ["out.pkl"]]
    targets += [] if "1X1" in keys else [["out.pth", "--format", "torchvision"]]
    for target, *more in targets:
        assert convert_weights([str(final), str(tmp_path / target), *more]) == 0
        again = read_weights(tmp_path / target).checkpoint.model
        for key, tensor in after.model.items():
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(again[key], tensor), (target, key)


def _statements(flags: str) -> dict[str, str]:
    return {"preprocessing": flags.split()[1]} if flags else {}


def test_from_torchvision_to_onnx(tool, tmp_path, capsys):
    torchvisions(tmp_path)
    assert tool("convert_weights")([str(tmp_path / "torchvision.pth"), str(tmp_path / "network.onnx")]) == 0
    assert "takes RGB images in 0…255" in capsys.readouterr().out


def test_what_a_file_leaves_open_must_be_said_on_the_command_line(tool, shapes, tmp_path, capsys):
    file = detectron2s(tmp_path)
    data = ["DATASETS.TRAIN", shapes, "DATASETS.TEST", shapes, "MODEL.NETWORK.NAME", "resnet18"]
    words = ["--config-file", str(ROOT / "configs/pretrain/imagenet.yaml"), *PRETRAIN.split(), *data]
    assert tool("pretrain")([*words, "MODEL.WEIGHTS", str(file), "OUTPUT_DIR", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in (
        "R-18.pkl",
        "detectron2's names",
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "command line",
    ):
        assert word in error
