"""tools/convert_weights.py as a user calls it."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

from resnet_backbone.weights import read_checkpoint

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_weights.py"


@pytest.fixture(scope="module")
def main(load_script):
    """The tool's `main`, called in this process."""
    return load_script(SCRIPT).main


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A file of torchvision's, with statistics as after training."""
    net = torchvision.models.resnet18(num_classes=5)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.save(net.state_dict(), path)
    return net, path


def fails(main, words, capsys) -> str:
    """The one sentence that a failing command prints."""
    assert main(list(map(str, words))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
    return captured.err


def test_from_torchvision_to_detectron2(resnet18, tmp_path):
    """In a process of its own, as typed."""
    net, path = resnet18
    command = [sys.executable, str(SCRIPT), str(path), str(tmp_path / "R-18.pkl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "resnet18-f37072fd.pth: torch file with torchvision's names",
        "network: resnet18(",
        "5 classes",
        "122 mapped, 0 dropped, none left over",
        "RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375] (by convention of torchvision's",
        "set INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]",
    ):
        assert words in done.stdout, words
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.MODEL.RESNETS.OUT_FEATURES = False, ["res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(backbone).load(str(tmp_path / "R-18.pkl"))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = backbone(image)["res5"].mean((2, 3))
        torch.testing.assert_close(net.fc(pooled), net.eval()(image))


def test_statements(main, resnet18, tmp_path, capsys):
    words = [resnet18[1], tmp_path / "out.pth", "--channel-order", "BGR", "--pixel-mean", "1", "2", "3.5"]
    words += ["--pixel-std", "4", "5", "6", "--norm-epsilon", "1e-3", "--arch", "resnet18"]
    assert main(list(map(str, words))) == 0
    assert "BGR, mean [1, 2, 3.5], std [4, 5, 6] (override)" in capsys.readouterr().out
    metadata = read_checkpoint(tmp_path / "out.pth").metadata
    assert (metadata.channel_order, metadata.pixel_mean, metadata.pixel_std) == ("BGR", (1, 2, 3.5), (4, 5, 6))
    assert metadata.origin["converted_from"]["norm_epsilon"] == 1e-3
    assert main([str(resnet18[1]), str(tmp_path / "preset.pth"), "--preprocessing", "msra"]) == 0
    assert read_checkpoint(tmp_path / "preset.pth").metadata.pixel_mean == (103.53, 116.28, 123.675)
    assert main([str(tmp_path / "preset.pth"), str(tmp_path / "bare.pth"), "--format", "torchvision"]) == 0
    assert set(torch.load(tmp_path / "bare.pth", weights_only=True)) == set(resnet18[0].state_dict())


def test_one_sentence_for_what_cannot_be_done(main, resnet18, tmp_path, capsys):
    _, path = resnet18
    assert "is the file to read" in fails(main, [path, path], capsys)
    assert "ends in .h5" in fails(main, [path, tmp_path / "a.h5"], capsys)
    assert "no checkpoint" in fails(main, [tmp_path / "absent.pth", tmp_path / "a.pth"], capsys)
    assert "is not resnet34" in fails(main, [path, tmp_path / "a.pth", "--arch", "resnet34"], capsys)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    stride = "--stride-in-1x1 is True, but resnet18 has no bottlenecks"
    assert stride in fails(main, [path, tmp_path / "a.pth", "--stride-in-1x1", "TRUE"], capsys)
    assert "HTML page" in fails(main, [tmp_path / "page.pth", tmp_path / "a.pth"], capsys)
    names = {"stem.conv1.weight": resnet18[0].conv1.weight.detach().numpy()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": names}))
    assert "fits no network" in fails(main, [tmp_path / "a.pkl", tmp_path / "a.pth"], capsys)
    assert not (tmp_path / "a.pth").exists()


def test_misspelt_words(main, resnet18, tmp_path, capsys):
    for flag, word in (("--stride-in-1x1", "maybe"), ("--channel-order", "GBR"), ("--preprocessing", "caffe")):
        with pytest.raises(SystemExit) as stopped:
            main([str(resnet18[1]), str(tmp_path / "a.pth"), flag, word])
        assert stopped.value.code == 2 and word in capsys.readouterr().err
