"""The signal and gradient measurement where theory gives the values, and the command at a tiny size."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import cv2
import pytest
import torch
from torch.nn import functional as F

from resnet_backbone.networks import build_network

PROJECT = Path(__file__).parents[2] / "projects" / "signal_propagation"


@pytest.fixture(scope="module")
def measure(run):
    return sys.modules["signal_propagation.measure"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 8


def test_a_normalized_and_rectified_signal_has_rms_of_one_over_root_two(measure, batch):
    # Batch norm's output has mean square 1, of which ReLU keeps the positive half, whatever the depth.
    torch.manual_seed(1)
    profile = measure.propagate(build_network("cifar_plain20", 8), *batch)
    assert len(profile.signal) == len(profile.gradient) == 9
    assert profile.signal == pytest.approx([math.sqrt(0.5)] * 9, rel=0.1)


def test_identity_blocks_pass_signal_and_gradient_unchanged(measure, batch):
    # With branches that end in a zero scale, a block hands on its input, and its gradient too.
    torch.manual_seed(1)
    profile = measure.propagate(build_network("cifar_resnet20", 8, zero_init_last_norm=True), *batch)
    for stage in (profile.signal[:3], profile.signal[3:6], profile.signal[6:]):
        assert stage == pytest.approx([stage[0]] * 3, rel=1e-6)
    # From the last block to the one before, what belongs to zeros (of the ReLU, of shortcut A's channels) is lost.
    assert profile.gradient[:8] == pytest.approx([profile.gradient[0]] * 8, rel=1e-5)
    assert profile.gradient[0] < profile.gradient[8] == 1


def test_values_are_those_at_the_ends_of_the_stages(measure, batch):
    torch.manual_seed(1)
    net = build_network("resnet18", 8, width=0.125).train()
    images, labels = batch
    features = net.forward_features(images, ["res2", "res3", "res4", "res5"])
    loss = F.cross_entropy(net.run_classifier(features["res5"]), labels)
    gradients = torch.autograd.grad(loss, list(features.values()))
    profile = measure.propagate(net, images, labels)
    ends = slice(1, None, 2)  # two blocks a stage
    assert profile.signal[ends] == pytest.approx([value.pow(2).mean().sqrt().item() for value in features.values()])
    norms = [gradient.norm().item() for gradient in gradients]
    assert profile.gradient[ends] == pytest.approx([norm / norms[-1] for norm in norms], rel=1e-4)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_measured_images_are_not_trained_on(measure):
    measured, _ = measure.generate(1, measure.MEASURED_FROM, 8, 16)
    training, labels = measure.generate(1, 0, 8, 16)
    assert not torch.equal(measured, training) and sorted(labels.tolist()) == list(range(8))
    assert training.mean((0, 2, 3)).abs().max() < 1e-5 and (training.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_the_command(run, measure, tmp_path, monkeypatch):
    family = measure.Family(title="small", residual=("resnet18",), plain=("plain18",), image_size=32, width=0.125)
    small = dataclasses.replace(
        measure.EXPERIMENT,
        families=(family,),
        initializations=2,
        measured_images=8,
        training_images=16,
        iterations=3,
        batch_size=8,
    )
    monkeypatch.setattr(run, "EXPERIMENT", small)
    for folder in ("first", "second"):
        assert run.main(["--output", str(tmp_path / folder)]) == 0
    results, again = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("first", "second"))
    for name in ("resnet18", "plain18"):
        assert results[name] == again[name], "the same seed gives the same numbers"
        spread = results[name]["initial"]["gradient"]
        assert len(spread["median"]) == 8 and spread["median"][-1] == 1.0
        assert all(low <= mid <= high for low, mid, high in zip(spread["min"], spread["median"], spread["max"]))
    assert results["experiment"]["seed"] == 1 and "torch" in results["versions"]
    assert cv2.imread(str(tmp_path / "first" / "propagation.png")).shape[1] == 800


def test_kept_results_are_of_the_settings_in_the_code(measure):
    kept = json.loads((PROJECT / "results" / "results.json").read_text())
    assert kept["experiment"] == json.loads(json.dumps(dataclasses.asdict(measure.EXPERIMENT)))
    assert (PROJECT / "results" / "propagation.png").stat().st_size < 300_000
