"""Files of weights as other libraries write them, small and with random values."""

import pickle
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from resnet_backbone.networks import build_network
from tests.weights.networks import arrays, randomized, save_pickle


def detectron2_config(depth: int = 50, stride_in_1x1: bool = True, file: str | None = None):
    """Detectron2's network, with an eighth of the channels where it has bottlenecks (it builds no other narrow)."""
    cfg = get_cfg()
    if file:
        cfg.merge_from_file(model_zoo.get_config_file(file))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    if depth >= 50:
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    return cfg


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


def caffe2s(folder: Path, width: float = 0.125) -> Path:
    """MSRA's names, whose norms are scale and shift."""
    net = build_network("resnet50", 8, width=width, stride_in_1x1=True)
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


def zoo_detector(folder: Path) -> Path:
    """The file that Detectron2's model zoo has of its R50-C4 detector."""
    net = randomized(build_model(detectron2_config(file="COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")))
    payload = {"model": arrays(net.state_dict()), "__author__": "Detectron2 Model Zoo"}
    return save_pickle(folder / "model_final_721ade.pkl", payload)
