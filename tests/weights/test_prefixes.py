"""Networks whose tensors carry a prefix: any, if what follows is a whole network; else nothing is guessed."""

import pytest
import torch
import torchvision
from torch import nn

from resnet_backbone.networks import build_network
from resnet_backbone.weights import CheckpointError, read_weights
from tests.weights.networks import IMAGE, difference, made, rebuilt

PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "model._orig_mod.", "module.model.net.", "1."]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return made(torchvision.models.resnet18, num_classes=7)


def under(prefix, net) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_network_without_it(net, tmp_path, prefix):
    torch.save(under(prefix, net), tmp_path / "net.pth")
    conversion = read_weights(tmp_path / "net.pth")
    assert (conversion.format, conversion.checkpoint.metadata.architecture) == ("torchvision", "resnet18")
    assert conversion.prefix == prefix and not conversion.dropped
    assert set(conversion.mapped) == set(under(prefix, net))
    assert f"prefix: {prefix} was taken off the names of 122 tensors" in conversion.summary()
    with torch.no_grad():
        assert difference(rebuilt(conversion.checkpoint)(IMAGE), net.double()(IMAGE)) < 1e-12
    net.float()


def test_none_is_not_mentioned(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    conversion = read_weights(tmp_path / "net.pth")
    assert conversion.prefix == "" and "prefix" not in conversion.summary()


def test_what_the_wrappers_themselves_write(net, tmp_path):
    compiled = nn.DataParallel(torch.compile(net, backend="eager"))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for module, prefix, left in ((compiled, "module._orig_mod.", []), (averaged, "module.", ["n_averaged"])):
        torch.save(module.state_dict(), tmp_path / "net.pth")
        conversion = read_weights(tmp_path / "net.pth")
        assert conversion.prefix == prefix and list(conversion.dropped) == left


def test_a_lightning_file_with_a_loss_of_its_own(net, tmp_path):
    state = {**under("model.", net), "loss.weight": torch.ones(7), "metric.total": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    conversion = read_weights(tmp_path / "last.ckpt")
    assert list(conversion.dropped) == ["loss.weight", "metric.total"]
    assert "2 dropped (without the prefix model.): loss.weight, metric.total" in conversion.summary()


def test_an_encoder_beside_a_head(net, tmp_path):
    """As self-supervised methods save them: the classifier is gone, and something else stands beside."""
    state = {name: t for name, t in under("encoder.", net).items() if ".fc." not in name}
    torch.save({**state, "projector.0.weight": torch.ones(8, 512)}, tmp_path / "net.pth")
    conversion = read_weights(tmp_path / "net.pth")
    assert conversion.checkpoint.metadata.class_names == () and list(conversion.dropped) == ["projector.0.weight"]


def test_other_formats_too(tmp_path):
    vgg = made(torchvision.models.vgg16)
    state = {f"net.{name}": t for name, t in vgg.state_dict().items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "vgg.pth")
    assert read_weights(tmp_path / "vgg.pth").checkpoint.metadata.architecture == "vgg16"


@pytest.mark.parametrize(("one", "other"), [("encoder_q.", "encoder_k."), ("model.", "model_ema.module.")])
def test_two_networks_are_refused_with_both_prefixes(net, tmp_path, one, other):
    torch.save({**under(one, net), **under(other, net)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=rf"under each of the prefixes {one} and {other}, and nothing says which"):
        read_weights(tmp_path / "two.pth")


def test_no_whole_network_under_any_prefix(net, tmp_path):
    state = under("model.", net)
    del state["model.layer3.0.bn1.weight"]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"Without the prefix model\.: .* lacks layer3\.0\.bn1\.weight"):
        read_weights(tmp_path / "net.pth")
    torch.save({"model.other.weight": torch.ones(2)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as error:
        read_weights(tmp_path / "net.pth")
    assert "model.other.weight" in str(error.value) and "prefix" not in str(error.value)


def test_two_networks_of_the_same_tensors_under_a_prefix_still_need_a_name(tmp_path):
    torch.save(under("module.", build_network("plain34", 5)), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"fits .*plain34.* alike"):
        read_weights(tmp_path / "net.pth")
    assert read_weights(tmp_path / "net.pth", architecture="plain34", preprocessing="torchvision").prefix == "module."
