"""Files that other libraries make, read here, and files made here, read by them: the same outputs, the same bits.

Where a library can be installed (torchvision, timm, Detectron2), it makes the file. Keras' and Caffe's networks are
written down below as their definitions have them.
"""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from timm.layers import ClassifierHead
from timm.models.vgg import VGG as TimmVGG
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn import functional as F

from resnet_backbone.errors import InputError
from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state, write_checkpoint
from resnet_backbone.weights.convert import convert, read_weights
from resnet_backbone.weights.writers import write_weights

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STAGES = ["res2", "res3", "res4", "res5"]


def randomized(net: nn.Module) -> nn.Module:
    """`net` in evaluation mode with random values in every parameter and statistic, of a plausible size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() > 1:
                bound = (6 / tensor[0].numel()) ** 0.5
                tensor.uniform_(-bound, bound, generator=generator)
            elif name.endswith(("bias", "mean")):
                tensor.uniform_(-0.3, 0.3, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


def made(build, *arguments, **named) -> nn.Module:
    """A library's network with random weights, without its slow initialisation."""
    with torch.device("meta"):
        net = build(*arguments, **named)
    return randomized(net.to_empty(device="cpu"))


def rebuilt(checkpoint: Checkpoint) -> nn.Module:
    """Our network of the metadata with all its weights, in float64."""
    metadata = checkpoint.metadata
    net = build_network(metadata.architecture, len(metadata.class_names), **metadata.arguments)
    load_state(net, checkpoint.model, part="network", source="the checkpoint")
    return net.double().eval()


def difference(value, reference) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def assert_same_bits(state, expected, *, without_counts: bool = False) -> None:
    if without_counts:
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith("num_batches_tracked")}
    assert set(state) == set(expected)  # safetensors has its own order
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def save_pickle(path, payload, protocol=2):
    path.write_bytes(pickle.dumps(payload, protocol=protocol))
    return path


def arrays(state) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """torchvision's ResNet-50, and its file."""
    net = made(torchvision.models.resnet50, num_classes=12)
    path = tmp_path_factory.mktemp("weights") / "resnet50-0676ba61.pth"
    torch.save(net.state_dict(), path)
    return net, path


# --- torchvision, timm ---


def test_torchvisions_file_by_the_formats_convention(resnet50):
    net, path = resnet50
    conversion = read_weights(path)
    metadata = conversion.checkpoint.metadata
    assert (conversion.format, conversion.container, metadata.architecture) == ("torchvision", "torch", "resnet50")
    assert metadata.arguments == {"width": 1.0, "shortcut": "B", "stride_in_1x1": False}
    assert (metadata.channel_order, metadata.pixel_mean) == ("RGB", (123.675, 116.28, 103.53))
    assert (metadata.norm_statistics, metadata.norm_epsilon, metadata.crop) == ("running", 1e-5, None)
    assert metadata.class_names == tuple(f"class {i}" for i in range(12))
    assert conversion.mapped == {name: name for name in net.state_dict()} and conversion.dropped == {}
    assert_same_bits(conversion.checkpoint.model, net.state_dict())
    with torch.no_grad():
        assert difference(rebuilt(conversion.checkpoint)(IMAGE), net.double()(IMAGE)) < 1e-12
    net.float()
    summary = conversion.summary()
    for words in (
        "resnet50-0676ba61.pth: torch file with torchvision's names",
        "resnet50(shortcut=B, stride_in_1x1=False, width=1.0), 12 classes",
        "320 mapped, 0 dropped",
        "RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375], stride in the 3×3 (by convention of torch",
    ):
        assert words in summary


def test_the_users_word_goes_before_the_convention(resnet50):
    metadata = read_weights(resnet50[1], channel_order="BGR", pixel_std=(1, 2, 3.5)).checkpoint.metadata
    assert (metadata.channel_order, metadata.pixel_std) == ("BGR", (1, 2, 3.5))
    assert metadata.pixel_mean == (123.675, 116.28, 103.53)
    assert metadata.origin["converted_from"]["preprocessing"]["channel_order"] == "stated"
    assert "stride_in_1x1=True" in read_weights(resnet50[1], stride_in_1x1=True).checkpoint.metadata.describe()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_network_comes_back_bit_for_bit(resnet50, tmp_path, suffix):
    net, path = resnet50
    conversion, _ = convert(path, tmp_path / f"ours{suffix}")
    again, note = convert(tmp_path / f"ours{suffix}", tmp_path / "theirs.pth", format="torchvision")
    assert again.format == "resnet_backbone" and again.checkpoint.metadata == conversion.checkpoint.metadata
    assert "theirs.pth does not say how it was trained: RGB, mean [123.675" in note
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert_same_bits(state, net.state_dict())
    torchvision.models.resnet50(num_classes=12).load_state_dict(state, strict=True)


def test_a_library_reads_our_safetensors(resnet50, tmp_path):
    convert(resnet50[1], tmp_path / "ours.safetensors")
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours.safetensors"), resnet50[0].state_dict())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert json.loads(file.metadata()["resnet_backbone"])["channel_order"] == "RGB"


def test_detectron2s_checkpointer_reads_our_checkpoint_into_torchvisions_network(resnet50, tmp_path):
    net, path = resnet50
    convert(path, tmp_path / "ours.pth")
    target = torchvision.models.resnet50(num_classes=12)
    incompatible = DetectionCheckpointer(target).load(str(tmp_path / "ours.pth"))
    assert "metadata" in incompatible  # what the checkpointer leaves alone
    assert_same_bits(target.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("build", "name", "classes", "container"),
    [
        ((torchvision.models.resnet18,), "resnet18", 9, "torch"),
        ((timm.create_model, "resnet18"), "resnet18", 9, "safetensors"),
        ((timm.create_model, "resnext50_32x4d"), "resnext50_32x4d", 0, "safetensors"),
        ((timm.create_model, "resnetv2_50"), "preact_resnet50", 9, "torch"),
    ],
)
def test_networks_compute_what_their_library_computes(tmp_path, build, name, classes, container):
    net = made(*build, num_classes=classes)
    path = tmp_path / "pytorch_model.bin"
    torch.save(net.state_dict(), path) if container == "torch" else safetensors.torch.save_file(net.state_dict(), path)
    conversion = read_weights(path)
    metadata = conversion.checkpoint.metadata
    assert (conversion.container, metadata.architecture, len(metadata.class_names)) == (container, name, classes)
    assert conversion.format == ("timm" if "preact" in name else "torchvision")
    assert metadata.pixel_mean == ((127.5,) * 3 if "preact" in name else (123.675, 116.28, 103.53))
    assert len(conversion.mapped) == len(net.state_dict()) and not conversion.dropped
    with torch.no_grad():
        if classes:
            ours, theirs = rebuilt(conversion.checkpoint)(IMAGE), net.double()(IMAGE)
        else:
            backbone = build_network(name, stages=("stem", *STAGES), **metadata.arguments)
            load_state(backbone, conversion.checkpoint.model, part="backbone", source="file")
            ours = backbone.double().eval().forward_features(IMAGE, ["res5"])["res5"]
            theirs = net.double().forward_features(IMAGE)
        assert difference(ours, theirs) < 1e-12


def test_without_a_classifier_there_is_nothing_to_classify_with(tmp_path):
    net = made(timm.create_model, "resnet18", num_classes=0)
    torch.save({"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}, "epoch": 3}, tmp_path / "a.pth")
    conversion = read_weights(tmp_path / "a.pth")
    assert "no classifier" in conversion.summary() and conversion.checkpoint.metadata.class_names == ()
    with pytest.raises(CheckpointError, match=r"fc\.weight, fc\.bias"):
        load_state(build_network("resnet18"), conversion.checkpoint.model, part="network", source="a.pth")


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_timms_vgg_whose_classifier_is_convolutional(tmp_path, norm):
    def narrow_vgg() -> TimmVGG:
        """An eighth of VGG-16's channels: the 138 million parameters of the whole take long to no purpose."""
        net = TimmVGG([8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"], norm_layer=norm)
        net.pre_logits, net.head = ConvMlp(64, 512, 7), ClassifierHead(512, 10)
        return net

    net = made(narrow_vgg)
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"vgg16(_bn)? in timm's names.*--pixel-mean --pixel-std,"):
        read_weights(tmp_path / "vgg.pth")
    conversion = read_weights(tmp_path / "vgg.pth", preprocessing="torchvision")
    metadata = conversion.checkpoint.metadata
    assert metadata.architecture == ("vgg16_bn" if norm else "vgg16")
    assert metadata.arguments == {"width": 0.125, "pool5": True}
    assert (metadata.norm_statistics, metadata.norm_epsilon) == (("running", 1e-5) if norm else ("none", None))
    image = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert difference(rebuilt(conversion.checkpoint)(image), net.double()(image)) < 1e-12
    with pytest.raises(InputError, match=r"--stride-in-1x1 is True, but vgg16.* has no bottlenecks"):
        read_weights(tmp_path / "vgg.pth", preprocessing="torchvision", stride_in_1x1=True)


def test_another_epsilon_goes_into_the_variance(tmp_path):
    net = made(torchvision.models.resnet18, norm_layer=lambda channels: nn.BatchNorm2d(channels, eps=1e-3))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        expected = net.double()(IMAGE)
        wrong = rebuilt(read_weights(tmp_path / "a.pth").checkpoint)(IMAGE)
        conversion = read_weights(tmp_path / "a.pth", norm_epsilon=1e-3)
        # One rounding of the variances to float32.
        assert difference(rebuilt(conversion.checkpoint)(IMAGE), expected) < 1e-6 < 1e-4 < difference(wrong, expected)
    metadata = conversion.checkpoint.metadata
    assert metadata.norm_epsilon == 1e-5 and metadata.origin["converted_from"]["norm_epsilon"] == 1e-3


def test_statistics_that_no_image_ever_touched(tmp_path):
    """Batch norm as torchvision builds it, and Detectron2's frozen one: nothing to freeze."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", norm_epsilon=1e-3).checkpoint.metadata.norm_statistics == "never"
    assert read_weights(tmp_path / "a.pth").checkpoint.metadata.norm_statistics == "never"
    save_pickle(tmp_path / "b.pkl", {"model": arrays(narrow_detectron2().state_dict()), "__author__": "somebody"})
    assert read_weights(tmp_path / "b.pkl", preprocessing="msra").checkpoint.metadata.norm_statistics == "never"


# --- Detectron2 ---


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


def narrow_detectron2(depth: int = 50, stride_in_1x1: bool = True) -> nn.Module:
    cfg = detectron2_config(depth, stride_in_1x1)
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def assert_same_features(checkpoint: Checkpoint, theirs: nn.Module, tolerance=1e-12) -> None:
    metadata = checkpoint.metadata
    backbone = build_network(metadata.architecture, stages=("stem", *STAGES), **metadata.arguments)
    load_state(backbone, checkpoint.model, part="backbone", source="the checkpoint")
    with torch.no_grad():
        ours, expected = backbone.double().eval().forward_features(IMAGE, STAGES), theirs.double().eval()(IMAGE)
    assert list(ours) == list(expected)
    for name in STAGES:
        assert difference(ours[name], expected[name]) < tolerance, name


@pytest.mark.parametrize(
    ("depth", "stride_in_1x1", "container"),
    [(18, False, "pickle"), (50, True, "torch"), (50, False, "pickle"), (101, True, "pickle")],
)
def test_detectron2s_backbone(tmp_path, depth, stride_in_1x1, container):
    net = randomized(narrow_detectron2(depth, stride_in_1x1))
    if container == "pickle":
        path = save_pickle(
            tmp_path / "R.pkl", {"model": arrays(net.state_dict()), "__author__": "a", "matching_heuristics": True}
        )
    else:
        DetectionCheckpointer(net, str(tmp_path)).save("R")
        path = tmp_path / "R.pth"
    with pytest.raises(InputError, match=r"in detectron2's names, which does not say it.*--preprocessing msra"):
        read_weights(path)
    statements = dict(channel_order="RGB", pixel_mean=(1, 2, 3), pixel_std=(4, 5, 6))
    conversion = read_weights(path, **statements, stride_in_1x1=stride_in_1x1 if depth > 18 else None)
    assert (conversion.format, conversion.container) == ("detectron2", container)
    assert conversion.checkpoint.metadata.architecture == f"resnet{depth}"
    assert conversion.checkpoint.metadata.norm_statistics == "running"
    assert len(conversion.mapped) == len(net.state_dict()) and not conversion.dropped
    assert_same_features(conversion.checkpoint, net)


@pytest.mark.parametrize(
    "file", ["COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"]
)
def test_the_backbone_of_detectron2s_detector(tmp_path, file):
    model = randomized(build_model(detectron2_config(file=file)))
    state = model.state_dict()
    # As older files have it: 0.6 no longer saves them.
    state["pixel_mean"], state["pixel_std"] = model.pixel_mean, model.pixel_std
    torch.save({"model": state, "iteration": 89999, "optimizer": {"state": {}}}, tmp_path / "model_final.pth")
    conversion = read_weights(tmp_path / "model_final.pth", channel_order="BGR", stride_in_1x1=True)
    assert conversion.checkpoint.metadata.pixel_mean == (103.53, 116.28, 123.675)
    assert conversion.said_by["pixel_mean"] == "the file"
    heads = [n for n in state if n.startswith(("proposal_generator.", "roi_heads.box", "backbone.fpn"))]
    assert set(conversion.dropped) == {*heads, "pixel_mean", "pixel_std"} and len(heads) > 9
    assert "belongs to the detector's heads" in conversion.summary()
    backbone = model.backbone.bottom_up if "FPN" in file else model.backbone
    reference = narrow_detectron2()
    reference.load_state_dict(
        {
            **backbone.state_dict(),
            **({} if "FPN" in file else {f"res5.{n}": t for n, t in model.roi_heads.res5.state_dict().items()}),
        }
    )
    assert_same_features(conversion.checkpoint, reference)
    with pytest.raises(
        InputError, match=r"--pixel-mean is \[123.675, 116.28, 103.53\], but .*model_final.pth itself says"
    ):
        read_weights(tmp_path / "model_final.pth", preprocessing="torchvision")


def test_a_tensor_that_nothing_explains_stops_it(tmp_path):
    state = arrays(narrow_detectron2().state_dict())
    extra = {**state, "res4.0.conv2_offset.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"1 tensors that detectron2's names do not explain \(res4\.0\.conv2_off"):
        read_weights(save_pickle(tmp_path / "a.pkl", {"model": extra}), preprocessing="msra")
    twice = {**state, "backbone.stem.conv1.weight": state["stem.conv1.weight"]}
    with pytest.raises(CheckpointError, match=r"both stem\.conv1\.weight and backbone\.stem\.conv1\.weight for the"):
        read_weights(save_pickle(tmp_path / "b.pkl", {"model": twice}), preprocessing="msra")
    biased = {**state, "stem.conv1.bias": np.zeros(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"has conv1\.bias besides"):
        read_weights(save_pickle(tmp_path / "c.pkl", {"model": biased}), preprocessing="msra")
    del state["res5.2.conv3.weight"]
    with pytest.raises(CheckpointError, match=r"resnet50 \(width=0.125\): the file lacks layer4\.2\.conv3\.weight"):
        read_weights(save_pickle(tmp_path / "d.pkl", {"model": state}), preprocessing="msra")
    np.savez(tmp_path / "e.npz", weight=np.zeros(3))
    with pytest.raises(CheckpointError, match="names such as weight, which are none of caffe2, keras"):
        read_weights(tmp_path / "e.npz")


@pytest.fixture
def narrow(metadata):
    """The function `(name, …)` that gives a checkpoint of a randomized narrow network."""

    def make(name, **arguments) -> Checkpoint:
        arguments = {"width": 1.0 if name == "resnet18" else 0.125, **arguments}
        net = randomized(build_network(name, 3, **arguments))
        return Checkpoint(net.state_dict(), metadata(architecture=name, arguments=arguments))

    return make


@pytest.mark.parametrize(
    ("name", "stride_in_1x1"), [("resnet18", False), ("resnet50", True), ("resnet50", False), ("resnet101", False)]
)
def test_our_pkl_in_detectron2s_checkpointer(tmp_path, narrow, name, stride_in_1x1):
    checkpoint = narrow(name, stride_in_1x1=stride_in_1x1)
    note = write_weights(tmp_path / "ours.pkl", checkpoint)
    assert "INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53]" in note
    assert f"MODEL.RESNETS.STRIDE_IN_1X1 {stride_in_1x1}" in note
    net = narrow_detectron2(int(name.removeprefix("resnet")), stride_in_1x1)
    logged = load_with_detectron2(net, tmp_path / "ours.pkl")
    assert logged.missing_keys == [] and set(logged.unexpected_keys) == {"linear.weight", "linear.bias"}
    assert_same_features(checkpoint, net)


def load_with_detectron2(net, path):
    """Load, and return what Detectron2 reports as missing and unexpected."""
    checkpointer = DetectionCheckpointer(net)
    load, found = checkpointer._load_model, []
    checkpointer._load_model = lambda checkpoint: found.append(load(checkpoint)) or found[-1]
    checkpointer.load(str(path))
    return found[0]


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_our_own_files_come_back_bit_for_bit_with_their_metadata(tmp_path, narrow, suffix):
    checkpoint = dataclasses.replace(narrow("resnet50", stride_in_1x1=True), iteration=3, trainer={"seed": 1})
    write_checkpoint(tmp_path / "model_final.pth", checkpoint)
    first, _ = convert(tmp_path / "model_final.pth", tmp_path / f"out{suffix}")
    assert first.dropped == {"trainer": "the optimizer's state and more"}
    conversion = read_weights(tmp_path / f"out{suffix}")
    assert conversion.checkpoint.metadata.to_dict() == json.loads(json.dumps(checkpoint.metadata.to_dict()))
    assert_same_bits(conversion.checkpoint.model, checkpoint.model, without_counts=suffix == ".pkl")
    assert conversion.checkpoint.trainer is None
    assert "(the file's own metadata)" in conversion.summary()
    with pytest.raises(InputError, match=rf"--channel-order is BGR, but .*out{suffix} itself says RGB"):
        read_weights(tmp_path / f"out{suffix}", channel_order="BGR")
    with pytest.raises(InputError, match=rf"--pixel-mean is \[103.53.*out{suffix} itself says"):
        read_weights(tmp_path / f"out{suffix}", preprocessing="msra", channel_order="RGB")
    with pytest.raises(InputError, match=r"--arch is resnet101, but .* itself says resnet50"):
        read_weights(tmp_path / f"out{suffix}", architecture="resnet101")


@pytest.mark.parametrize("name", ["vgg16_bn", "preact_resnet50", "cifar_resnet20", "plain18"])
def test_any_network_fits_safetensors(tmp_path, narrow, name):
    checkpoint = narrow(name)
    write_weights(tmp_path / "a.safetensors", checkpoint)
    assert_same_bits(read_weights(tmp_path / "a.safetensors").checkpoint.model, checkpoint.model)
    with pytest.raises(InputError, match=f"Detectron2 has no network like {name}.*Write .pth or .safetensors"):
        write_weights(tmp_path / "a.pkl", checkpoint)
    assert not (tmp_path / "a.pkl").exists()


@pytest.mark.parametrize("shortcut", ["A", "C"])
def test_shortcuts_that_detectron2_does_not_have(tmp_path, narrow, shortcut):
    with pytest.raises(InputError, match="with projection shortcuts"):
        write_weights(tmp_path / "a.pkl", narrow("resnet50", shortcut=shortcut))


def test_what_torchvision_would_compute_otherwise_is_refused(tmp_path, narrow):
    for name, argument in (
        ("resnet50", {"stride_in_1x1": True}),
        ("vgg16", {"pool5": False}),
        ("resnet50", {"res5_dilation": 2}),
    ):
        with pytest.raises(InputError, match=f"has {next(iter(argument))}=.*would compute something else"):
            write_weights(tmp_path / "a.pth", narrow(name, **argument), "torchvision")
    write_weights(tmp_path / "a.pth", narrow("resnet18", stride_in_1x1=True), "torchvision")  # no effect there


def test_bfloat16_reaches_numpy(tmp_path, narrow):
    checkpoint = narrow("resnet50")
    half = dataclasses.replace(checkpoint, model={n: t.bfloat16() for n, t in checkpoint.model.items()})
    write_weights(tmp_path / "a.pkl", half)
    for name, tensor in read_weights(tmp_path / "a.pkl").checkpoint.model.items():
        assert torch.equal(tensor, half.model[name].float())


def test_places_that_are_refused(tmp_path, narrow, metadata):
    write_weights(tmp_path / "a.pth", narrow("resnet18"))
    before = (tmp_path / "a.pth").read_bytes()
    for target in ("a.pth", "../" + tmp_path.name + "/a.pth"):
        with pytest.raises(InputError, match="is the file to read"):
            convert(tmp_path / "a.pth", tmp_path / target)
    with pytest.raises(InputError, match=r"ends in .h5, expected one of .pth, .pkl, .safetensors"):
        convert(tmp_path / "a.pth", tmp_path / "b.h5")
    with pytest.raises(InputError, match=r"a .pkl file is written as detectron2, not as torchvision"):
        convert(tmp_path / "a.pth", tmp_path / "b.pkl", format="torchvision")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(tmp_path / "a.pth", tmp_path / "a.pth" / "b.safetensors")
    detector = Checkpoint({"backbone.x": torch.zeros(2)}, metadata(kind="detector"))
    for target, format in (("b.pkl", None), ("b.pth", "torchvision")):
        with pytest.raises(InputError, match=r"this is a detector, .* takes classifiers"):
            write_weights(tmp_path / target, detector, format)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == before


def test_metadata_that_is_not_ours_is_refused(tmp_path):
    for text in ("[", '"RGB"', "{}"):
        safetensors.torch.save_file({"fc.bias": torch.zeros(2)}, tmp_path / "a.safetensors", {"resnet_backbone": text})
        with pytest.raises(CheckpointError, match="its entry resnet_backbone is not this project's metadata"):
            read_weights(tmp_path / "a.safetensors")


# --- MSRA, Caffe2 ---


def caffe2_blobs(depth: int, statistics: bool = False) -> dict[str, np.ndarray]:
    """A ResNet in MSRA's names with its classifier, an eighth of the channels wide where it has bottlenecks."""
    random = np.random.default_rng(3)
    width = 8 if depth >= 50 else 64
    blobs: dict[str, np.ndarray] = {}

    def layer(conv, norm, outputs, inputs, size):
        blobs[f"{conv}_w"] = random.normal(0, (2 / (inputs * size**2)) ** 0.5, (outputs, inputs, size, size))
        blobs[f"{norm}_bn_s"], blobs[f"{norm}_bn_b"] = random.uniform(0.5, 1.5, outputs), random.normal(0, 0.2, outputs)
        if statistics:
            blobs[f"{norm}_bn_rm"], blobs[f"{norm}_bn_riv"] = (
                random.normal(0, 1, outputs),
                random.uniform(0.5, 2, outputs),
            )

    layer("conv1", "res_conv1", width, 3, 7)
    inputs = width
    for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]):
        inner = width * 2**stage
        outputs = inner * (4 if depth >= 50 else 1)
        for block in range(blocks):
            place = f"res{stage + 2}_{block}_branch"
            if inputs != outputs:
                layer(f"{place}1", f"{place}1", outputs, inputs, 1)
            for branch, shape in zip(
                ("2a", "2b", "2c"),
                ((inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1))
                if depth >= 50
                else ((inner, inputs, 3), (inner, inner, 3)),
            ):
                layer(place + branch, place + branch, *shape)
            inputs = outputs
    blobs["fc1000_w"], blobs["fc1000_b"] = random.normal(0, 0.1, (5, inputs)), random.normal(0, 0.1, 5)
    return {name: blob.astype(np.float32) for name, blob in blobs.items()}


@pytest.mark.parametrize(("depth", "statistics", "wrapped"), [(18, False, False), (50, False, True), (50, True, False)])
def test_caffe2_against_detectron2s_own_conversion(tmp_path, depth, statistics, wrapped):
    blobs = caffe2_blobs(depth, statistics)
    blobs["conv1_w_momentum"] = blobs["conv1_w"] * 0.1
    path = save_pickle(tmp_path / "R-50.pkl", {"blobs": blobs} if wrapped else blobs)
    net = narrow_detectron2(depth)
    assert load_with_detectron2(net, path).missing_keys == []
    if not statistics:
        # Detectron2 takes 1 for the variance that the file lacks, which with its epsilon is 5e-6 less than the file's
        # scale; a frozen norm that it builds itself has the value with which that is exact, as its comment says.
        net.load_state_dict({n: t for n, t in narrow_detectron2(depth).state_dict().items() if "running" in n}, False)
    conversion = read_weights(path, preprocessing="msra")
    assert (conversion.format, conversion.dropped) == ("caffe2", {"conv1_w_momentum": "optimizer state"})
    metadata = conversion.checkpoint.metadata
    assert (metadata.architecture, len(metadata.class_names)) == (f"resnet{depth}", 5)
    assert metadata.norm_statistics == ("running" if statistics else "folded")
    assert_same_features(conversion.checkpoint, net, 1e-12)
    for name in ("conv1.weight", "bn1.weight", "bn1.bias"):  # as they stand in the file
        theirs = {"conv1.weight": "conv1_w", "bn1.weight": "res_conv1_bn_s", "bn1.bias": "res_conv1_bn_b"}[name]
        assert torch.equal(conversion.checkpoint.model[name], torch.from_numpy(blobs[theirs]))


def test_a_folded_norm_is_scale_and_shift_to_the_last_bit(tmp_path):
    """In float32, in which networks run: with variance 1 and epsilon 1e-5 a scale would be off by 5e-6."""
    blobs = caffe2_blobs(50)
    model = read_weights(save_pickle(tmp_path / "a.pkl", blobs), preprocessing="msra").checkpoint.model
    net = build_network("resnet50", 5, width=0.125)
    load_state(net, model, part="network", source="a.pkl")
    x = torch.randn(2, 8, 4, 4)
    ours = net.eval().bn1(x)
    scale, shift = (torch.from_numpy(blobs[f"res_conv1_bn_{entry}"]).view(-1, 1, 1) for entry in "sb")
    assert difference(ours, x * scale + shift) < 2e-7
    divisor = (model["bn1.running_var"] + 1e-5).sqrt()
    assert torch.equal(divisor, torch.ones(8))


def test_caffe2_files_of_published_size_need_no_flag_and_come_back(tmp_path):
    blobs = caffe2_blobs(50)
    grown = {
        n: np.tile(
            b,
            [
                8 if i < 2 and not (n == "conv1_w" and i == 1) and not (n.startswith("fc") and i == 0) else 1
                for i in range(b.ndim)
            ],
        )
        for n, b in blobs.items()
    }
    conversion, _ = convert(save_pickle(tmp_path / "R-50.pkl", grown), tmp_path / "ours.pkl")
    metadata = conversion.checkpoint.metadata
    assert (metadata.channel_order, metadata.pixel_mean) == ("BGR", (103.53, 116.28, 123.675))
    assert metadata.arguments == {"width": 1.0, "shortcut": "B", "stride_in_1x1": True}
    again = read_weights(tmp_path / "ours.pkl").checkpoint
    assert again.metadata.norm_statistics == "folded"
    assert_same_bits(again.model, conversion.checkpoint.model)
    for name, theirs in (("bn1.weight", "res_conv1_bn_s"), ("layer4.2.conv3.weight", "res5_2_branch2c_w")):
        assert torch.equal(again.model[name], torch.from_numpy(grown[theirs]))


def test_the_bias_of_msras_first_convolution(tmp_path):
    blobs = caffe2_blobs(50)
    without = read_weights(save_pickle(tmp_path / "a.pkl", blobs), preprocessing="msra").checkpoint
    blobs["conv1_b"] = np.linspace(-1, 1, 8, dtype=np.float32)
    with_bias = read_weights(save_pickle(tmp_path / "a.pkl", blobs), preprocessing="msra").checkpoint
    assert with_bias.metadata.norm_statistics == "folded"
    nets = [rebuilt(without), rebuilt(with_bias)]
    convolved = nets[0].conv1(IMAGE)
    expected = nets[0].bn1(convolved + torch.from_numpy(blobs["conv1_b"]).double().view(-1, 1, 1))
    assert difference(nets[1].bn1(convolved), expected) < 1e-12
    with pytest.raises(
        InputError, match=r"--norm-epsilon is 0.001, but .*a.pkl has no batch normalization with a variance"
    ):
        read_weights(tmp_path / "a.pkl", preprocessing="msra", norm_epsilon=1e-3)


# --- Keras ---


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
