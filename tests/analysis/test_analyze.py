"""The analysis of networks against fvcore, torchvision, the paper's tables, and receptive fields seen by gradients."""

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_jit, generic_activation_jit, linear_flop_jit
from torch import nn

from resnet_backbone.analysis import analyze, analyze_catalogue, analyze_network, format_overview, format_table
from resnet_backbone.networks import build_network, list_networks

# `python tools/analyze_model.py --all --json > tests/analysis/golden.json` writes it anew.
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
LABELS = [f"{row['name']}{'-stride_in_1x1' if row['stride_in_1x1'] else ''}" for row in GOLDEN]
DEFAULT = {row["name"]: row for row in GOLDEN if not row["stride_in_1x1"]}

# He et al. 2015: multiply-adds in Table 1, sections 3.3 (plain-34) and 4.1 (VGG), parameters in Table 6.
PAPER_FLOPS = {
    "resnet18": 1.8e9,
    "resnet34": 3.6e9,
    "plain34": 3.6e9,
    "vgg16": 15.3e9,
    "vgg19": 19.6e9,
}
PAPER_FLOPS_STRIDE_IN_1X1 = {"resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}
PAPER_PARAMETERS = {
    "cifar_resnet20": 0.27e6,
    "cifar_resnet32": 0.46e6,
    "cifar_resnet44": 0.66e6,
    "cifar_resnet56": 0.85e6,
    "cifar_resnet110": 1.7e6,
    "cifar_resnet1202": 19.4e6,
}


def on_meta(name, **arguments):
    with torch.device("meta"):
        return build_network(name, **arguments)


def test_golden_table_holds():
    rows = [analysis.totals() for analysis in analyze_catalogue()]
    assert [row["name"] for row in rows] == [row["name"] for row in GOLDEN]
    assert set(DEFAULT) == set(list_networks())
    for row, golden in zip(rows, GOLDEN, strict=True):
        assert row == golden


# Tracing 1202 layers takes ten seconds; the test after this one needs none.
SLOW = {"cifar_resnet1202"}
ROWS = [
    pytest.param(row, id=label, marks=pytest.mark.slow if label in SLOW else ())
    for row, label in zip(GOLDEN, LABELS, strict=True)
]


def count_with_fvcore(net, images):
    """Multiply-adds by operator, and activations, by fvcore's own counters in one trace instead of two."""
    activations = generic_activation_jit("activations")
    analysis = FlopCountAnalysis(net, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::_convolution", lambda x, y: conv_flop_jit(x, y) + activations(x, y))
    analysis.set_op_handle("aten::linear", lambda x, y: Counter(linear=linear_flop_jit(x, y)) + activations(x, y))
    return analysis.by_operator()


@pytest.mark.parametrize("row", ROWS)
def test_golden_table_is_fvcores(row):
    arguments = {"stride_in_1x1": True} if row["stride_in_1x1"] else {}
    classes = 10 if row["name"].startswith("cifar") else 1000
    assert row["image_size"] == (32 if classes == 10 else 224)
    net = on_meta(row["name"], num_classes=classes, **arguments).to_empty(device="cpu").eval().requires_grad_(False)
    images = torch.zeros(1, 3, row["image_size"], row["image_size"])
    by_operator = count_with_fvcore(net, images)
    assert row["multiply_adds"] == by_operator["conv"] + by_operator["linear"]
    assert row["activations"] == by_operator["activations"]
    assert row["parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_counts_grow_by_the_same_with_every_block():
    for key in ("layers", "parameters", "multiply_adds", "activations"):
        first, second, last = (DEFAULT[f"cifar_resnet{6 * n + 2}"][key] for n in (3, 5, 200))
        assert last - first == (second - first) // 2 * (200 - 3), key


def test_golden_parameters_are_torchvisions():
    names = [name for name in DEFAULT if name in torchvision.models.list_models(torchvision.models)]
    assert len(names) == 13
    for name in names:
        with torch.device("meta"):
            reference = getattr(torchvision.models, name)()
        assert DEFAULT[name]["parameters"] == sum(parameter.numel() for parameter in reference.parameters()), name


def test_multiply_adds_are_the_papers_within_2_per_cent():
    rows = [(row["name"], row["stride_in_1x1"], row["multiply_adds"]) for row in GOLDEN]
    paper = {True: PAPER_FLOPS_STRIDE_IN_1X1, False: PAPER_FLOPS, None: PAPER_FLOPS}
    compared = [(name, value, paper[stride][name]) for name, stride, value in rows if name in paper[stride]]
    assert len(compared) == len(PAPER_FLOPS) + len(PAPER_FLOPS_STRIDE_IN_1X1)
    for name, value, expected in compared:
        assert value == pytest.approx(expected, rel=0.02), name


def test_parameters_are_table_6s_to_its_digits():
    for name, expected in PAPER_PARAMETERS.items():
        # 1.7 for 110 layers has two digits like the others, in tenths of a million.
        unit = 1e5 if expected > 1e6 else 1e4
        assert round(DEFAULT[name]["parameters"] / unit) == round(expected / unit), name


def test_the_table_names_the_papers_numbers():
    analyses = {
        name: analyze(name) for name in (*PAPER_FLOPS, *PAPER_FLOPS_STRIDE_IN_1X1, "cifar_resnet56", "vgg16_bn")
    }
    for name, expected in {**PAPER_FLOPS, **PAPER_FLOPS_STRIDE_IN_1X1}.items():
        assert analyses[name].paper.multiply_adds == expected, name
    assert analyses["cifar_resnet56"].paper.parameters == PAPER_PARAMETERS["cifar_resnet56"]
    assert analyses["vgg16_bn"].paper is None
    # They are those of the published network and image size, and of no other.
    assert analyze("resnet18", width=0.5).paper is None
    assert analyze("resnet18", image_size=256).paper is None
    assert analyze("resnet50", stride_in_1x1=True).paper is not None


def test_vggs_fully_connected_layers_are_counted():
    stages = {stage.name: stage for stage in analyze("vgg16").stages}
    convolutions = sum(stages[f"conv{i}"].multiply_adds for i in range(1, 6))
    assert convolutions == pytest.approx(15.35e9, abs=0.005e9)
    assert stages["fc6"].multiply_adds == 7 * 7 * 512 * 4096
    assert stages["pool5"].multiply_adds == stages["pool5"].parameters == stages["pool5"].activations == 0


# ------------------------------------------------------------------------------------------------ layers and stages


def test_layers_are_those_in_the_name():
    depths = {name: int(re.search(r"\d+", name)[0]) for name in DEFAULT}
    assert (depths["wide_resnet50_2"], depths["vgg16_bn"], depths["cifar_preact_resnet164"]) == (50, 16, 164)
    # Its paper's 28 = 6n + 4 (arXiv 1605.07146, section 3) counts three projections and not the classifier.
    assert depths["cifar_wide_resnet28_10"] == 28
    depths["cifar_wide_resnet28_10"] += 1 - 3
    assert {name: row["layers"] for name, row in DEFAULT.items()} == depths


def test_projections_are_counted_in_everything_but_the_layers():
    a, b, c = (analyze("resnet34", shortcut=shortcut) for shortcut in "ABC")
    assert a.layers == b.layers == c.layers == 34
    # Option A is the plain network's cost (section 3.3); B adds three projections, C thirteen more (section 4.1).
    assert a.multiply_adds == analyze("plain34").multiply_adds
    projections = [(56 // 2**i) ** 2 * (64 * 2 ** (i - 1)) * (64 * 2**i) for i in (1, 2, 3)]
    assert b.multiply_adds - a.multiply_adds == sum(projections)
    everywhere = [(56 // 2**i) ** 2 * (64 * 2**i) ** 2 * n for i, n in enumerate((3, 3, 5, 2))]
    assert c.multiply_adds - b.multiply_adds == sum(everywhere)


@pytest.mark.parametrize("name", ["resnet50", "preact_resnet50", "vgg16_bn", "cifar_resnet20"])
def test_stages_add_up_and_have_the_shapes_of_the_features(name):
    analysis, net = analyze(name), on_meta(name)
    assert analysis.stages[-1].name == "fc"
    for count in ("layers", "parameters", "multiply_adds", "activations"):
        assert getattr(analysis, count) == sum(getattr(stage, count) for stage in analysis.stages)
    images = torch.zeros(1, 3, analysis.image_size, analysis.image_size, device="meta")
    features = net.forward_features(images, list(net.feature_info))
    for stage in analysis.stages:
        if stage.name in features:
            assert stage.output_shape == features[stage.name].shape[1:]
            assert stage.stride == net.feature_info[stage.name].stride
        else:
            assert len(stage.output_shape) == 1 and stage.receptive_field is None and stage.stride is None


def test_parameters_by_stage_are_those_of_torchvisions_layers():
    with torch.device("meta"):
        reference = torchvision.models.resnet50()
    stages = {stage.name: stage.parameters for stage in analyze("resnet50").stages}
    for i in (1, 2, 3, 4):
        layer = reference.get_submodule(f"layer{i}")
        assert stages[f"res{i + 1}"] == sum(parameter.numel() for parameter in layer.parameters())
    assert stages["stem"] == 64 * 3 * 7 * 7 + 2 * 64 and stages["fc"] == 2048 * 1000 + 1000


def cells(name, **arguments):
    return {stage.name: "; ".join(map(str, stage.structure)) for stage in analyze(name, **arguments).stages}


@pytest.mark.parametrize(("depth", "blocks"), {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}.items())
def test_table_1_bottlenecks(depth, blocks):
    for name in (f"resnet{depth}", f"preact_resnet{depth}"):
        assert cells(name) == {
            "stem": "7×7, 64, /2; 3×3 max pool, /2",
            "res2": f"[1×1, 64; 3×3, 64; 1×1, 256] × {blocks[0]}",
            "res3": f"[1×1, 128; 3×3, 128; 1×1, 512] × {blocks[1]}",
            "res4": f"[1×1, 256; 3×3, 256; 1×1, 1024] × {blocks[2]}",
            "res5": f"[1×1, 512; 3×3, 512; 1×1, 2048] × {blocks[3]}",
            "fc": "average pool; 1000-d fc",
        }


@pytest.mark.parametrize("name", ["resnet34", "plain34"])
def test_table_1_basic_blocks(name):
    assert cells(name) == {
        "stem": "7×7, 64, /2; 3×3 max pool, /2",
        "res2": "[3×3, 64; 3×3, 64] × 3",
        "res3": "[3×3, 128; 3×3, 128] × 4",
        "res4": "[3×3, 256; 3×3, 256] × 6",
        "res5": "[3×3, 512; 3×3, 512] × 3",
        "fc": "average pool; 1000-d fc",
    }


def test_cells_of_other_networks():
    assert cells("vgg16") == {
        "conv1": "[3×3, 64] × 2",
        "conv2": "2×2 max pool, /2; [3×3, 128] × 2",
        "conv3": "2×2 max pool, /2; [3×3, 256] × 3",
        "conv4": "2×2 max pool, /2; [3×3, 512] × 3",
        "conv5": "2×2 max pool, /2; [3×3, 512] × 3",
        "pool5": "2×2 max pool, /2",
        "fc6": "4096-d fc",
        "fc7": "4096-d fc",
        "fc": "1000-d fc",
    }
    assert cells("vgg16", image_size=256)["fc6"] == "average pool to 7×7; 4096-d fc"
    # arXiv 1611.05431, Table 1.
    assert cells("resnext50_32x4d")["res2"] == "[1×1, 128; 3×3, 128, C=32; 1×1, 256] × 3"
    assert cells("resnet50", res5_dilation=2)["res5"] == "[1×1, 512; 3×3, 512, dilation 2; 1×1, 2048] × 3"
    assert cells("cifar_resnet20")["fc"] == "average pool; 10-d fc"


# ---------------------------------------------------------------------------------------------------- receptive field


def extent(net, feature, image_size, position):
    """First and last column of the image that an output pixel at (position, position) depends on, by its gradient.

    All weights are positive, so that no dependence cancels; average pooling has max pooling's extent, without its
    choice of one pixel.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.Conv2d):
                nn.init.constant_(child.weight, 1 / child.weight[0].numel())
    images = torch.ones(1, 3, image_size, image_size, dtype=torch.float64, requires_grad=True)
    output = net.double().eval().forward_features(images, [feature])[feature]
    output[0, 0, position, position].backward()
    columns = images.grad.abs().sum(dim=(0, 1, 2)).nonzero()
    return columns.min().item(), columns.max().item()


@pytest.mark.parametrize(
    ("name", "arguments", "feature", "expected", "stride"),
    [
        # With the stride in the 1×1 every 3×3 of a stage steps over the stage's own stride: 11 + 2 (3·4 + 4·8 + …).
        ("resnet50", {"stride_in_1x1": True}, "res5", 483, 32),
        ("resnet50", {}, "res5", 427, 32),
        ("resnet50", {"res5_dilation": 2}, "res5", None, 16),
        ("resnet18", {"shortcut": "A"}, "res4", None, 16),
        ("plain18", {}, "res3", None, 8),
        ("preact_resnet50", {}, "res4", 267, 16),
        ("vgg16", {}, "conv5", 196, 16),
        ("vgg16_bn", {}, "pool5", 212, 32),
        ("cifar_resnet20", {}, "res4", None, 4),
        ("cifar_resnet18", {}, "res5", None, 8),
    ],
)
def test_receptive_field_is_what_gradients_reach(name, arguments, feature, expected, stride):
    (stage,) = (stage for stage in analyze(name, width=0.125, **arguments).stages if stage.name == feature)
    if expected is not None:
        assert stage.receptive_field == expected
    net = build_network(name, width=0.125, stages=_up_to(name, feature), **arguments)
    size = stage.receptive_field + 3 * stride
    middle = size // stride // 2
    first, last = extent(net, feature, size, middle)
    assert first > 0 and last < size - 1, "the image must be larger than the receptive field"
    assert last - first + 1 == stage.receptive_field
    assert extent(net, feature, size, middle + 1)[0] - first == stage.stride == stride


def _up_to(name, feature):
    names = on_meta(name).all_stages
    return names[: names.index(feature) + 1]


def test_receptive_fields_of_the_deep_ones():
    # Araujo et al. 2019 (https://distill.pub/2019/computing-receptive-fields), the table's resnet_v1_101 and _152.
    fields = {name: analyze(name, stride_in_1x1=True).stages[-2].receptive_field for name in ("resnet101", "resnet152")}
    assert fields == {"resnet101": 1027, "resnet152": 1507}


# ------------------------------------------------------------------------------------------------- what it is given


def test_a_detectors_backbone():
    with torch.device("meta"):
        net = build_network("resnet50", norm="FrozenBN", stages=("stem", "res2", "res3", "res4"))
    analysis, whole = analyze_network(net, image_size=224), analyze("resnet50")
    assert [stage.name for stage in analysis.stages] == ["stem", "res2", "res3", "res4"]
    assert [stage.multiply_adds for stage in analysis.stages] == [stage.multiply_adds for stage in whole.stages[:4]]
    # Frozen norms hold constants; the convolutions remain.
    assert analysis.parameters == sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))


def test_leaves_the_network_as_it_was():
    net = build_network("resnet18", num_classes=2, width=0.125).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(net)(images)
    analyze_network(net, image_size=32)
    assert net.training and all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(images), expected), "batch norm is at work again"


def test_what_cannot_be_analysed_is_said():
    with pytest.raises(ValueError, match="image_size is 16, expected at least 32, the stride of the network"):
        analyze("vgg16", image_size=16)
    with pytest.raises(ValueError, match="begins at 'res5', expected a network that takes images"):
        analyze_network(on_meta("resnet50", stages=("res5",)), image_size=224)
    with pytest.raises(ValueError, match=r"'resnet51', did you mean"):
        analyze("resnet51")


# ------------------------------------------------------------------------------------------------------------- tables


def test_five_networks_fit_a_terminal():
    for names in (
        [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
        ["vgg16", "vgg19_bn", "plain34", "resnet34", "resnet152"],
        ["resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2", "preact_resnet152"],
    ):
        text = format_table([analyze(name) for name in names])
        assert max(map(len, text.splitlines())) <= 120, names
        assert all(name in text for name in names)


def test_stages_of_one_output_size_are_beside_each_other():
    lines = format_table([analyze("vgg16"), analyze("resnet50")]).splitlines()
    row = next(line for line in lines if line.startswith("conv4, res3"))
    assert row.split() == ["conv4,", "res3", "28×28", "2×2", "max", "pool,", "/2", "[1×1,", "128]"]
    assert any(line.startswith("fc ") and "average pool" in line and "1000-d fc" in line for line in lines)


def test_table_shows_the_counts():
    text = format_table([analyze("resnet50", stride_in_1x1=True), analyze("vgg16")])
    for expected in ("25,557,032", "138,357,544", "3.86e9", "15.47e9", "3.8e9", "15.3e9", "483", "212"):
        assert expected in text
    assert "first 1×1" in text
    assert "first 1×1" not in format_table([analyze("vgg16")])


def test_markdown_is_well_formed():
    texts = [
        format_table([analyze("resnet50"), analyze("vgg16")], markdown=True),
        format_overview([analyze("resnet50"), analyze("cifar_resnet20")], markdown=True),
    ]
    tables = [part.splitlines() for text in texts for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2 + 1
    for header, rule, *rows in tables:
        columns = header.count("|")
        assert set(rule) <= set("|-: ") and rule.count("|") == columns
        assert rows and all(row.count("|") == columns for row in rows)


def test_overview_has_a_row_for_each():
    analyses = [analyze("resnet50"), analyze("resnet50", stride_in_1x1=True), analyze("cifar_resnet20")]
    lines = format_overview(analyses).splitlines()
    # Rules above and below the header's two lines, and at the end.
    assert all(set(lines[i]) == {"-", " "} for i in (0, 3, -1)) and len(lines) == 4 + 3 + 1
    assert lines[4].split() == ["resnet50", "224", "50", "25,557,032", "4.09e9", "3.8e9", "11.11e6", "427"]
    assert "stride in 1×1" in lines[5] and "3.86e9" in lines[5] and "3.8e9" in lines[5]
    assert "0.27e6" in lines[6]


def test_details_survive_json():
    analysis = analyze("resnet50")
    details = json.loads(json.dumps(analysis.details()))
    assert {key: value for key, value in details.items() if key != "stages"} == analysis.totals()
    assert details["stages"][1] == {
        "name": "res2",
        "structure": "[1×1, 64; 3×3, 64; 1×1, 256] × 3",
        "output_shape": [256, 56, 56],
        "layers": 9,
        "parameters": 215808,
        "multiply_adds": details["stages"][1]["multiply_adds"],
        "activations": 56**2 * (256 + 3 * (64 + 64 + 256)),
        "receptive_field": 35,
        "stride": 4,
    }
    assert math.isclose(details["stages"][1]["multiply_adds"], 56**2 * (215808 - 2 * (256 + 3 * 384)), rel_tol=1e-12)
