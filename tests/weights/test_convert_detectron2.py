"""Files of Detectron2, MSRA and Caffe2, read here, and files made here, read by Detectron2."""

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from resnet_backbone.errors import InputError
from resnet_backbone.networks import build_network
from resnet_backbone.weights import Checkpoint, CheckpointError, load_state
from resnet_backbone.weights.convert import convert, read_weights
from resnet_backbone.weights.writers import write_weights
from tests.weights.foreign import detectron2_config
from tests.weights.networks import (
    IMAGE,
    STAGES,
    arrays,
    assert_same_bits,
    difference,
    randomized,
    rebuilt,
    save_pickle,
)


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
    overrides = dict(channel_order="RGB", pixel_mean=(1, 2, 3), pixel_std=(4, 5, 6))
    conversion = read_weights(path, **overrides, stride_in_1x1=stride_in_1x1 if depth > 18 else None)
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


def test_statistics_that_no_image_ever_touched(tmp_path):
    """Batch norm as torchvision builds it, and Detectron2's frozen one: nothing to freeze."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", norm_epsilon=1e-3).checkpoint.metadata.norm_statistics == "never"
    assert read_weights(tmp_path / "a.pth").checkpoint.metadata.norm_statistics == "never"
    save_pickle(tmp_path / "b.pkl", {"model": arrays(narrow_detectron2().state_dict()), "__author__": "somebody"})
    assert read_weights(tmp_path / "b.pkl", preprocessing="msra").checkpoint.metadata.norm_statistics == "never"


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
    assert metadata.arguments == {"width": 1.0, "shortcut": "B", "stride_in_1x1": True, "res5_dilation": 1}
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
