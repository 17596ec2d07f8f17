"""Whole runs of tiny detectors on a GPU."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from resnet_backbone import detection
from resnet_backbone.detection import task
from resnet_backbone.engine.config import COMMAND_LINE, get_key, origin
from resnet_backbone.engine.describe import flat_config
from resnet_backbone.weights import read_checkpoint

ROOT = Path(__file__).parents[2]
TOOL, CONFIGS = ROOT / "tools" / "train_net.py", ROOT / "configs"
SECONDS = 300  # that something may take; a first run compiles


@pytest.fixture
def config(detection_config, classifier, tmp_path):
    """The function `(folder, KEY, VALUE, …, device=…, file=…, network=…)` that gives a configuration."""

    def load(folder, *overrides, device="cuda", file="faster_rcnn_R50.yaml", network="resnet18"):
        keys = ("MODEL.DEVICE", device, "MODEL.NETWORK.NAME", network, "MODEL.WEIGHTS", classifier(network))
        return detection_config(file, tmp_path / folder, *keys, "SOLVER.AMP.ENABLED", True, *overrides)

    return load


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.fixture
def build_without_chance(monkeypatch):
    """Train the heads on the ground truth alone and without dropout, so that their losses depend on no random number.

    The function that is given makes detectors on a CPU go their way for GPUs.
    """
    build, as_on_a_gpu = task.build_detector, []

    def build_detector(*arguments):
        model = build(*arguments)
        model.proposal_generator.post_nms_topk[True] = 0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif as_on_a_gpu and getattr(module, "fixed_size", False) is None:
                module.fixed_size = True
        return model

    monkeypatch.setattr(task, "build_detector", build_detector)
    return lambda: as_on_a_gpu.append(True)


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "fp32"), *(pytest.param("cuda", one, marks=pytest.mark.gpu) for one in ("bf16", "fp16", "fp32"))],
)
@pytest.mark.parametrize(
    ("file", "network"),
    [
        ("faster_rcnn_R50.yaml", "resnet18"),
        ("faster_rcnn_R50_FPN.yaml", "resnet18"),
        ("faster_rcnn_VGG16.yaml", "vgg16"),
    ],
)
def test_trains_and_evaluates(config, build_without_chance, tmp_path, device, file, network, precision):
    """The losses of the first iteration are those of the CPU, as far as the precision goes."""
    keys = ("SOLVER.AMP.PRECISION", precision, "SOLVER.MAX_ITER", 3)
    detection.run(config("cpu", *keys, "SOLVER.AMP.ENABLED", False, device="cpu", file=file, network=network))
    build_without_chance()
    results = detection.run(config("gpu", *keys, device=device, file=file, network=network))
    assert "AP50" in results["bbox"]
    on_gpu, on_cpu = (lines(tmp_path / folder) for folder in ("gpu", "cpu"))
    assert [line["iteration"] for line in on_gpu] == [0, 1, 2]
    assert all(math.isfinite(line["total_loss"]) for line in on_gpu)
    # Anchors are sampled by each device's own random numbers; the losses on RoIs, here the ground truth, are not.
    for name in ("loss_cls", "loss_box_reg"):
        assert on_gpu[0][name] == pytest.approx(on_cpu[0][name], rel=0.01 if precision == "fp32" else 0.1, abs=0.01)
    assert ("loss_scale" in on_gpu[-1]) == (precision == "fp16")


@pytest.mark.gpu
def test_compiled_killed_and_resumed(config, tmp_path):
    """It ends after as many iterations as one that was not killed; each is in metrics.json once."""
    cfg = config("run", "SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 4)
    given = [key for key in flat_config(cfg) if origin(cfg, key) == COMMAND_LINE]
    words = [word for key in given for word in (key, str(get_key(cfg, key)))]
    folder, file = tmp_path / "run", CONFIGS / "faster_rcnn_R50.yaml"
    command = [sys.executable, str(TOOL), "--config-file", str(file), "--resume", *words, "SOLVER.COMPILE", "True"]
    with (tmp_path / "printed.txt").open("w") as printed:
        run = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        end = time.monotonic() + SECONDS
        while not (folder / "model_0000005.pth").is_file() and run.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        run.kill()
    assert run.wait() != 0 and (folder / "model_0000005.pth").is_file(), (tmp_path / "printed.txt").read_text()
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "resumed: the next iteration is" in (folder / "log.txt").read_text()
    assert [line["iteration"] for line in lines(folder)] == list(range(9))
    assert {line["iteration"] for line in lines(folder) if "bbox/AP" in line} == {4, 8}
    metadata = read_checkpoint(folder / "model_final.pth").metadata
    assert metadata.kind == "detector" and metadata.origin["iterations"] == 9
    # The weights give the same detections on either device, up to rounding.
    weights = ("MODEL.WEIGHTS", folder / "model_final.pth", "SOLVER.AMP.ENABLED", False)
    found = [
        detection.run(config(device, *weights, device=device), eval_only=True)["bbox"]["AP"]
        for device in ("cuda", "cpu")
    ]
    assert found[0] == pytest.approx(found[1], abs=0.5, nan_ok=True)
