"""torchvision's and timm's files, and ours in every format: the same outputs, the same bits, or a refusal."""

import dataclasses
import json

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from timm.layers import ClassifierHead
from timm.models.vgg import VGG as TimmVGG
from timm.models.vgg import ConvMlp
from torch import nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state, write_checkpoint
from resnet_backbone.weights.convert import convert, read_weights
from resnet_backbone.weights.writers import write_weights
from tests.weights.networks import IMAGE, STAGES, assert_same_bits, difference, made, rebuilt


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """torchvision's ResNet-50, and its file."""
    net = made(torchvision.models.resnet50, num_classes=12)
    path = tmp_path_factory.mktemp("weights") / "resnet50-0676ba61.pth"
    torch.save(net.state_dict(), path)
    return net, path


def test_torchvisions_file_by_the_formats_convention(resnet50):
    net, path = resnet50
    conversion = read_weights(path)
    metadata = conversion.checkpoint.metadata
    assert (conversion.format, conversion.container, metadata.architecture) == ("torchvision", "torch", "resnet50")
    assert metadata.arguments == {"width": 1.0, "shortcut": "B", "stride_in_1x1": False, "res5_dilation": 1}
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
        "resnet50(res5_dilation=1, shortcut=B, stride_in_1x1=False, width=1.0), 12 classes",
        "320 mapped, 0 dropped",
        "RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375], stride in the 3×3 (by convention of torch",
    ):
        assert words in summary


def test_the_users_word_goes_before_the_convention(resnet50):
    metadata = read_weights(resnet50[1], channel_order="BGR", pixel_std=(1, 2, 3.5)).checkpoint.metadata
    assert (metadata.channel_order, metadata.pixel_std) == ("BGR", (1, 2, 3.5))
    assert metadata.pixel_mean == (123.675, 116.28, 103.53)
    assert metadata.origin["converted_from"]["preprocessing"]["channel_order"] == "override"
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


# --- our own files ---


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
