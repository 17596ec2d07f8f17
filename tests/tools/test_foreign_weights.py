"""Weights of other libraries through the tools: evaluated, converted, trained, written in every format, read again."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from resnet_backbone.networks import build_network
from resnet_backbone.weights import convert, read_weights

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


def trained(net: nn.Module) -> nn.Module:
    """`net` with statistics that some images have left, and residual branches that are damped."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_mean"):
            tensor.uniform_(-0.1, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2, generator=generator)
    return net.eval()


def torchvisions(folder: Path) -> Path:
    torch.save(trained(torchvision.models.resnet18(num_classes=8)).state_dict(), folder / "torchvision.pth")
    return folder / "torchvision.pth"


def timms(folder: Path) -> Path:
    safetensors.torch.save_model(trained(timm.create_model("resnet18", num_classes=8)), folder / "timm.safetensors")
    return folder / "timm.safetensors"


def detectron2s(folder: Path) -> Path:
    """With the classifier's `linear`, as Detectron2's own ResNet for classification has it."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    net = trained(build_resnet_backbone(cfg, ShapeSpec(channels=3)))
    model = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    model["linear.weight"] = np.random.default_rng(0).normal(0, 0.01, (8, 512)).astype(np.float32)
    model["linear.bias"] = np.zeros(8, np.float32)
    (folder / "R-18.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "test", "matching_heuristics": True}))
    return folder / "R-18.pkl"


def caffe2s(folder: Path) -> Path:
    """MSRA's names, whose norms are scale and shift, of a network with an eighth of the channels."""
    net = build_network("resnet50", 8, width=0.125, stride_in_1x1=True)
    blobs = {}

    def take(conv, norm, name, norm_name):
        blobs[f"{name}_w"] = conv.weight.detach().numpy()
        blobs[f"{norm_name}_s"] = np.full(norm.num_features, 0.5, np.float32)
        blobs[f"{norm_name}_b"] = np.full(norm.num_features, 0.1, np.float32)

    take(net.conv1, net.bn1, "conv1", "res_conv1_bn")
    for i, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
        for j, block in enumerate(layer):
            for k, letter in enumerate("abc", start=1):
                name = f"res{i + 2}_{j}_branch2{letter}"
                take(getattr(block, f"conv{k}"), getattr(block, f"bn{k}"), name, f"{name}_bn")
            if block.downsample is not None:
                take(*block.downsample, f"res{i + 2}_{j}_branch1", f"res{i + 2}_{j}_branch1_bn")
    blobs["fc1000_w"], blobs["fc1000_b"] = net.fc.weight.detach().numpy(), net.fc.bias.detach().numpy()
    (folder / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    return folder / "R-50.pkl"


def keras_resnet50(folder: Path) -> Path:
    """Keras' names and layouts, with biases in front of its norms, at an eighth of the channels."""
    net = trained(build_network("resnet50", 8, width=0.125, stride_in_1x1=True))
    arrays = {}

    def take(conv, norm, name):
        arrays[f"{name}_conv/kernel:0"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
        arrays[f"{name}_conv/bias:0"] = np.full(conv.out_channels, 0.25, np.float32)
        parts = {"gamma": norm.weight, "beta": norm.bias, "moving_mean": norm.running_mean}
        for part, tensor in {**parts, "moving_variance": norm.running_var}.items():
            arrays[f"{name}_bn/{part}:0"] = tensor.detach().numpy()

    take(net.conv1, net.bn1, "conv1")
    for i, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
        for j, block in enumerate(layer):
            for k in (1, 2, 3):
                take(getattr(block, f"conv{k}"), getattr(block, f"bn{k}"), f"conv{i + 2}_block{j + 1}_{k}")
            if block.downsample is not None:
                take(*block.downsample, f"conv{i + 2}_block{j + 1}_0")
    arrays["predictions/kernel:0"] = net.fc.weight.detach().t().numpy()
    arrays["predictions/bias:0"] = net.fc.bias.detach().numpy()
    np.savez(folder / "keras.npz", **arrays)
    return folder / "keras.npz"


def caffe_resnet50(folder: Path) -> Path:
    """Caffe's layers and numbered blobs, whose norms keep sums and a count, at an eighth of the channels."""
    net = trained(build_network("resnet50", 8, width=0.125, stride_in_1x1=True))
    arrays = {}

    def take(conv, norm, name):
        suffix = name.removeprefix("res") if name.startswith("res") else f"_{name}"
        arrays[f"{name}/0"] = conv.weight.detach().numpy()
        count = np.array([999.98], np.float32)
        for i, tensor in enumerate((norm.running_mean, norm.running_var)):
            arrays[f"bn{suffix}/{i}"] = tensor.numpy() * count
        arrays[f"bn{suffix}/2"] = count
        for i, tensor in enumerate((norm.weight, norm.bias)):
            arrays[f"scale{suffix}/{i}"] = tensor.detach().numpy()

    take(net.conv1, net.bn1, "conv1")
    for i, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
        for block, letter in zip(layer, "abcdef", strict=False):
            for k, branch in enumerate("abc", start=1):
                name = f"res{i + 2}{letter}_branch2{branch}"
                take(getattr(block, f"conv{k}"), getattr(block, f"bn{k}"), name)
            if block.downsample is not None:
                take(*block.downsample, f"res{i + 2}{letter}_branch1")
    arrays["fc1000/0"], arrays["fc1000/1"] = net.fc.weight.detach().numpy(), net.fc.bias.detach().numpy()
    np.savez(folder / "caffe.npz", **arrays)
    return folder / "caffe.npz"


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
    assert f"top-1 {untouched['top1']:.2f} %, top-5 {untouched['top5']:.2f} %" in logged

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
