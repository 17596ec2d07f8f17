"""ONNX files against torch: run by onnxruntime, on images as they come from a decoder."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, CheckpointError, Metadata
from resnet_backbone.weights.onnx import write_onnx

MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)


def checkpoint(name, *, channel_order="BGR", crop=(64, 64), kind="classifier", **arguments):
    torch.manual_seed(0)
    network = build_network(name, 5, width=0.125, **arguments).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    metadata = Metadata(
        kind=kind,
        architecture=name,
        arguments={"width": 0.125, **arguments},
        channel_order=channel_order,
        pixel_mean=MEAN,
        pixel_std=STD,
        norm_statistics="none" if name == "vgg16" else "running",
        norm_epsilon=None if name == "vgg16" else 1e-5,
        class_names=tuple("abcde"),
        crop=crop,
    )
    return network, Checkpoint(network.state_dict(), metadata)


def logits_of(network, rgb, channel_order):
    """The logits of uint8 images `(N, H, W, 3)` in RGB, by a preprocessing written out in NumPy."""
    images = rgb[..., ::-1] if channel_order == "BGR" else rgb
    images = (images.astype(np.float64) - MEAN) / STD
    with torch.no_grad():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2)).float()).numpy()


@pytest.mark.parametrize(
    ("name", "channel_order", "sides"),
    [("resnet18", "BGR", (64, 64)), ("cifar_resnet20", "RGB", (33, 40)), ("vgg16", "BGR", (64, 64))],
)
def test_onnxruntime_gives_torchs_logits_on_raw_images(tmp_path, name, channel_order, sides):
    network, weights = checkpoint(name, channel_order=channel_order)
    assert write_onnx(tmp_path / "network.onnx", weights) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    rgb = np.random.default_rng(0).integers(0, 256, (3, *sides, 3), dtype=np.uint8)
    value = session.run(["logits"], {"images": rgb.transpose(0, 3, 1, 2).astype(np.float32)})[0]
    expected = logits_of(network, rgb, channel_order)
    assert np.abs(value - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_metadata_is_in_the_file(tmp_path):
    _, weights = checkpoint("cifar_resnet20")
    write_onnx(tmp_path / "network.onnx", weights)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "network.onnx").metadata_props}
    assert Metadata.from_dict(json.loads(properties["resnet_backbone"])) == weights.metadata


def test_what_differs_from_torch_is_not_written(tmp_path, monkeypatch):
    _, weights = checkpoint("cifar_resnet20")
    run = onnxruntime.InferenceSession.run

    def wrong(*arguments):
        return [output * 1.01 for output in run(*arguments)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", wrong)
    with pytest.raises(CheckpointError, match="was not written: onnxruntime's logits differ"):
        write_onnx(tmp_path / "network.onnx", weights)
    assert list(tmp_path.iterdir()) == []


def test_a_detector_is_refused(tmp_path):
    _, weights = checkpoint("cifar_resnet20", kind="detector")
    with pytest.raises(CheckpointError, match=r"those of a detector.*export_detector writes detectors"):
        write_onnx(tmp_path / "network.onnx", weights)


def test_a_missing_library_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, weights = checkpoint("cifar_resnet20")
    with pytest.raises(CheckpointError, match="pip install onnx onnxruntime onnxscript"):
        write_onnx(tmp_path / "network.onnx", weights)
