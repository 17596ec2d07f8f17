import pytest
import torch
from torch import nn

from resnet_backbone.networks import build_network
from resnet_backbone.weights import CheckpointError, LoadReport, load_state

C4 = ("stem", "res2", "res3", "res4")


def counted(state) -> int:
    return sum(not name.endswith("num_batches_tracked") for name in state)


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return build_network("resnet50", 5, width=0.125)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def part_of(name: str, stages, **arguments) -> nn.Module:
    return build_network(name, stages=stages, **arguments)


def test_a_classifier_divides_into_c4_backbone_and_res5(resnet50):
    """The counts that the detectors' log must show: 215 + 50 of ResNet-50's 265 tensors, fc apart."""
    state = resnet50.state_dict()
    backbone = part_of("resnet50", C4, width=0.125)
    res5 = part_of("resnet50", ("res5",), width=0.125)
    first = load_state(backbone, state, part="backbone", source="f.pth")
    second = load_state(res5, state, part="roi_heads.res5", source="f.pth")
    assert len(first.loaded) == 215 and len(second.loaded) == 50
    assert str(first) == "backbone: all 215 of 215 tensors loaded"
    assert str(second) == "roi_heads.res5: all 50 of 50 tensors loaded"
    assert not set(first.loaded) & set(second.loaded)
    assert counted(state) == 215 + 50 + 2
    assert set(state) - {"fc.weight", "fc.bias"} == {*backbone.state_dict()} | {*res5.state_dict()}
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in res5.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_vggs_fully_connected_layers():
    torch.manual_seed(0)
    state = build_network("vgg16", 5, width=0.0625).state_dict()
    head = part_of("vgg16", ("fc6", "fc7"), width=0.0625)
    report = load_state(head, state, part="box_head", source="vgg.pth")
    assert sorted(report.loaded) == [
        "classifier.0.bias",
        "classifier.0.weight",
        "classifier.3.bias",
        "classifier.3.weight",
    ]
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_nothing_is_copied_when_one_tensor_is_missing(resnet50):
    backbone = part_of("resnet50", C4, width=0.125)
    before = snapshot(backbone)
    state = dict(resnet50.state_dict())
    del state["layer3.5.bn3.running_var"]
    with pytest.raises(CheckpointError) as caught:
        load_state(backbone, state, part="backbone", source="f.pth")
    assert "backbone: 1 of 215 tensors are not in f.pth (layer3.5.bn3.running_var)" in str(caught.value)
    assert "ALLOW_MISSING" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_wrong_shapes_are_named_and_nothing_is_copied(resnet50):
    wider = part_of("resnet50", C4, width=0.25)
    before = snapshot(wider)
    with pytest.raises(CheckpointError) as caught:
        load_state(wider, resnet50.state_dict(), part="backbone", source="f.pth")
    assert "conv1.weight is 16×3×7×7 here, 8×3×7×7 in the file" in str(caught.value)
    assert "width" in str(caught.value) and " more" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())


def test_batch_norms_statistics_are_not_dropped_by_another_norm(resnet50):
    other = build_network("resnet50", 5, width=0.125, norm="GN")
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"f\.pth has 106 tensors more .*running_mean.*MODEL\.RESNETS\.NORM"):
        load_state(other, resnet50.state_dict(), part="network", source="f.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    without = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1, bias=False)})
    with pytest.raises(CheckpointError, match=r"has 1 tensors more .*conv\.bias"):
        state = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1)}).state_dict()
        load_state(without, state, part="network", source="f.pth")


def test_what_may_be_missing_is_left_as_initialized(resnet50):
    torch.manual_seed(1)
    target = build_network("resnet50", 7, width=0.125)
    before = snapshot(target)
    state = {name: tensor for name, tensor in resnet50.state_dict().items() if not name.startswith("fc.")}
    report = load_state(target, state, part="network", source="f", may_miss=("fc.",))
    assert report.missing == ("fc.weight", "fc.bias") and len(report.loaded) == 265
    assert str(report) == "network: 265 of 267 tensors loaded, fc.weight, fc.bias left as initialized, as asked"
    assert torch.equal(target.fc.weight, before["fc.weight"])
    assert torch.equal(target.conv1.weight, state["conv1.weight"])
    with pytest.raises(CheckpointError, match="1 of 267"):
        load_state(target, state, part="network", source="f", may_miss=("fc.weight", "layer4."))


def test_what_may_be_missing_may_have_another_shape(resnet50):
    """A classifier for other classes starts from the rest of the network."""
    torch.manual_seed(1)
    target = build_network("resnet50", 7, width=0.125)
    before = snapshot(target)
    with pytest.raises(CheckpointError, match="number of classes"):
        load_state(target, resnet50.state_dict(), part="network", source="f")
    report = load_state(target, resnet50.state_dict(), part="network", source="f", may_miss=("fc.",))
    assert report.missing == ("fc.weight", "fc.bias")
    assert torch.equal(target.fc.weight, before["fc.weight"])
    assert torch.equal(target.conv1.weight, resnet50.state_dict()["conv1.weight"])


def test_batch_counters_need_not_be_there():
    norm = nn.BatchNorm2d(3)
    state = {name: tensor + 1 for name, tensor in norm.state_dict().items()}
    assert len(load_state(norm, state, part="n", source="f").loaded) == 4
    assert norm.num_batches_tracked == 1
    del state["num_batches_tracked"]
    assert len(load_state(norm, state, part="n", source="f").loaded) == 4


def test_the_targets_type_stays():
    layer = nn.Linear(2, 2)
    load_state(layer, {n: t.half() for n, t in nn.Linear(2, 2).state_dict().items()}, part="x", source="f")
    assert layer.weight.dtype == torch.float32 and layer.weight.requires_grad


def test_a_report_of_many_missing_keys_is_short():
    text = str(LoadReport("part", ("a",), tuple(f"layer.{i}" for i in range(50))))
    assert (
        text
        == "part: 1 of 51 tensors loaded, layer.0, layer.1, layer.2, layer.3 and 46 more left as initialized, as asked"
    )
