"""Files of Keras and Caffe: their networks are written down here as their definitions have them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from resnet_backbone.errors import InputError
from resnet_backbone.weights import CheckpointError
from resnet_backbone.weights.convert import read_weights
from tests.weights.networks import IMAGE, difference, rebuilt


class Variables(dict):
    """Arrays by name that are drawn when first asked for, so that the network's definition below makes the file too."""

    def __init__(self):
        self.random = np.random.default_rng(4)

    def get(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self:
            fan = int(np.prod(shape[:-1] if "kernel" in name else shape[1:]))
            low, high = (0.5, 1.5) if name.endswith(("gamma:0", "variance:0", "scale")) else (-0.3, 0.3)
            matrix = len(shape) > 1
            self[name] = np.float32(
                self.random.normal(0, (2 / fan) ** 0.5, shape) if matrix else self.random.uniform(low, high, shape)
            )
        return torch.from_numpy(self[name]).double()


def keras_resnet50(v: Variables, x: torch.Tensor) -> torch.Tensor:
    """keras.applications' ResNet50 on `(N, 3, H, W)`, an eighth of the channels wide, to logits before the softmax."""

    def convolution(x, name, filters, size, stride=1, padding=0):
        kernel = v.get(f"{name}/kernel:0", size, size, x.shape[1], filters)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), v.get(f"{name}/bias:0", filters), stride, padding)

    def norm(x, name):
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        mean, variance, gamma, beta = (v.get(f"{name}/{n}:0", x.shape[1]).view(-1, 1, 1) for n in names)
        return gamma * (x - mean) / (variance + 1.001e-5).sqrt() + beta

    x = norm(convolution(F.pad(x, (3, 3, 3, 3)), "conv1_conv", 8, 7, 2), "conv1_bn").relu()
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, (blocks, filters) in enumerate(zip((3, 4, 6, 3), (8, 16, 32, 64)), start=2):
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = x
            if block == 1:
                shortcut = norm(convolution(x, f"{name}_0_conv", 4 * filters, 1, stride), f"{name}_0_bn")
            x = norm(convolution(x, f"{name}_1_conv", filters, 1, stride), f"{name}_1_bn").relu()
            x = norm(convolution(x, f"{name}_2_conv", filters, 3, padding=1), f"{name}_2_bn").relu()
            x = (norm(convolution(x, f"{name}_3_conv", 4 * filters, 1), f"{name}_3_bn") + shortcut).relu()
    x = x.mean((2, 3))
    return x @ v.get("predictions/kernel:0", x.shape[1], 6) + v.get("predictions/bias:0", 6)


def keras_vgg16(v: Variables, x: torch.Tensor) -> torch.Tensor:
    """keras.applications' VGG16 on `(N, 3, 224, 224)`, an eighth of the channels wide, to logits."""

    def dense(x, name, units):
        return x @ v.get(f"{name}/kernel:0", x.shape[1], units) + v.get(f"{name}/bias:0", units)

    for block, (convolutions, filters) in enumerate(zip((2, 2, 3, 3, 3), (8, 16, 32, 64, 64)), start=1):
        for number in range(1, convolutions + 1):
            name = f"block{block}_conv{number}"
            kernel = v.get(f"{name}/kernel:0", 3, 3, x.shape[1], filters)
            x = F.conv2d(x, kernel.permute(3, 2, 0, 1), v.get(f"{name}/bias:0", filters), padding=1).relu()
        x = F.max_pool2d(x, 2, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # channels last
    return dense(dense(dense(x, "fc1", 512).relu(), "fc2", 512).relu(), "predictions", 6)


def caffe_resnet50(v: Variables, x: torch.Tensor) -> torch.Tensor:
    """MSRA's ResNet-50 in Caffe on `(N, 3, H, W)`, an eighth of the channels wide, to logits.

    But for the padding of its max pooling: Caffe's has none and rounds the size up, ours, as everybody's since, has one
    pixel all around. No weights can make up for that.
    """

    def layer(x, name, outputs, size, stride=1, padding=0, bias=False):
        conv, tail = ("conv1", "_conv1") if name == "conv1" else (f"res{name}", name)
        x = F.conv2d(
            x,
            v.get(f"{conv}/0", outputs, x.shape[1], size, size),
            v.get(f"{conv}/1", outputs) if bias else None,
            stride,
            padding,
        )
        factor = torch.tensor(v.setdefault(f"bn{tail}/2", np.float32([998.5]))).double()
        mean, variance = (v.get(f"bn{tail}/{n}", outputs).view(-1, 1, 1).abs() for n in (0, 1))
        v[f"bn{tail}/0"], v[f"bn{tail}/1"] = (np.abs(v[f"bn{tail}/{n}"]) for n in (0, 1))
        x = (x - mean / factor) / (variance / factor + 1e-5).sqrt()
        return v.get(f"scale{tail}/0", outputs).view(-1, 1, 1) * x + v.get(f"scale{tail}/1", outputs).view(-1, 1, 1)

    x = F.max_pool2d(layer(x, "conv1", 8, 7, 2, 3, bias=True).relu(), 3, 2, padding=1)
    for stage, (blocks, filters) in enumerate(zip((3, 4, 6, 3), (8, 16, 32, 64)), start=2):
        for letter in "abcdef"[:blocks]:
            name = f"{stage}{letter}_branch"
            stride = 2 if letter == "a" and stage > 2 else 1
            shortcut = layer(x, f"{name}1", 4 * filters, 1, stride) if letter == "a" else x
            x = layer(x, f"{name}2a", filters, 1, stride).relu()
            x = layer(x, f"{name}2b", filters, 3, padding=1).relu()
            x = (layer(x, f"{name}2c", 4 * filters, 1) + shortcut).relu()
    return F.linear(x.mean((2, 3)), v.get("fc1000/0", 6, 256), v.get("fc1000/1", 6))


def caffe_vgg16(v: Variables, x: torch.Tensor) -> torch.Tensor:
    """VGG-16 in Caffe on `(N, 3, 224, 224)`, an eighth of the channels wide, to logits."""
    for block, (convolutions, filters) in enumerate(zip((2, 2, 3, 3, 3), (8, 16, 32, 64, 64)), start=1):
        for number in range(1, convolutions + 1):
            name = f"conv{block}_{number}"
            x = F.conv2d(
                x, v.get(f"{name}/0", filters, x.shape[1], 3, 3), v.get(f"{name}/1", filters), padding=1
            ).relu()
        x = F.max_pool2d(x, 2, 2)
    x = x.flatten(1)
    for name, outputs in (("fc6", 512), ("fc7", 512)):
        x = F.linear(x, v.get(f"{name}/0", outputs, x.shape[1]), v.get(f"{name}/1", outputs)).relu()
    return F.linear(x, v.get("fc8/0", 6, 512), v.get("fc8/1", 6))


@pytest.mark.parametrize(
    ("forward", "name", "size"),
    [
        (keras_resnet50, "resnet50", 64),
        (keras_vgg16, "vgg16", 224),
        (caffe_resnet50, "resnet50", 64),
        (caffe_vgg16, "vgg16", 224),
    ],
)
def test_keras_and_caffe_networks(tmp_path, forward, name, size):
    variables = Variables()
    image = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = forward(variables, image)
    save = np.savez_compressed if size == 64 else np.savez
    save(tmp_path / "weights.npz", **variables)
    with pytest.raises(InputError, match="must be known"):  # a narrow network, which nobody hands out
        read_weights(tmp_path / "weights.npz")
    conversion = read_weights(tmp_path / "weights.npz", preprocessing="msra")
    metadata = conversion.checkpoint.metadata
    assert conversion.format == forward.__name__.split("_")[0] and conversion.container == "npz"
    assert (metadata.architecture, metadata.arguments["width"], len(metadata.class_names)) == (name, 0.125, 6)
    assert set(conversion.mapped) == set(variables) and not conversion.dropped
    with torch.no_grad():
        # Sums of a bias and a mean are rounded to float32 once.
        assert difference(rebuilt(conversion.checkpoint)(image), expected) < 1e-6
    if name == "resnet50":
        assert metadata.norm_epsilon == 1e-5
        assert metadata.origin["converted_from"]["norm_epsilon"] == (1.001e-5 if forward is keras_resnet50 else 1e-5)


def test_keras_epsilon_is_kept_to_a_unit_in_the_last_place(tmp_path):
    """Tiny variances, at which a hundredth of a millionth is seen."""
    variables = Variables()
    keras_resnet50(variables, IMAGE)
    variables["conv1_bn/moving_variance:0"] = np.float32([0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1, 100])
    np.savez(tmp_path / "a.npz", **variables)
    model = read_weights(tmp_path / "a.npz", preprocessing="msra").checkpoint.model
    wanted = variables["conv1_bn/moving_variance:0"].astype(np.float64) + 1.001e-5
    ours = model["bn1.running_var"].double().numpy() + 1e-5
    assert np.abs(ours / wanted - 1).max() < 6e-8  # half a unit in the last place


def test_caffe_statistics_that_were_never_counted(tmp_path):
    variables = Variables()
    caffe_resnet50(variables, IMAGE)
    variables["bn2a_branch2a/2"] = np.float32([0])
    np.savez(tmp_path / "a.npz", **variables)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.bn1\.scale_factor is \[0\.0\], expected one number above 0"):
        read_weights(tmp_path / "a.npz", preprocessing="msra")


def test_needs_no_other_library():
    hidden = "for name in ('detectron2', 'torchvision', 'timm', 'onnx'): sys.modules[name] = None"
    script = f"import sys\n{hidden}\nimport resnet_backbone.weights.convert"
    subprocess.run([sys.executable, "-c", script], check=True)
