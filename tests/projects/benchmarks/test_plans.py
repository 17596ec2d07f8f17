"""What is run by default, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import data, detect, plans, pretrain
from benchmarks.plans import (
    NETWORKS,
    NO_GPU,
    NO_GPU_FOR_DETECTORS,
    run_data,
    run_detect,
    run_pretrain,
)
from resnet_backbone.errors import InputError

COMMON = {"configs": Path("configs"), "report": print}


@pytest.fixture
def asked(monkeypatch) -> dict[str, tuple]:
    """What the comparisons are called with, instead of being made."""
    calls = {}

    def stand_in(module, name, result):
        monkeypatch.setattr(module, name, lambda *arguments: calls.setdefault(name, arguments) and result)

    stand_in(pretrain, "compare_networks", [])
    stand_in(data, "compare_loading", [])
    stand_in(data, "compare_on_gpu", [])
    stand_in(detect, "compare_detectors", [])
    monkeypatch.setattr(data, "compare_training", lambda *arguments: calls.setdefault("training", arguments) and None)
    monkeypatch.setattr("benchmarks.plans.to_dict", lambda setup, comparisons, skipped: skipped)
    return calls


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_steps_on_a_cpu(asked, no_gpu):
    assert run_pretrain(**COMMON) == [NO_GPU]
    tasks, conduct, _ = asked["compare_networks"]
    assert [task.network for task in tasks] == list(NETWORKS)
    resnet, cifar = tasks[0], tasks[-1]
    assert (resnet.batch, resnet.size, resnet.num_classes, resnet.iterations) == (32, 224, 1000, 1)
    assert (cifar.batch, cifar.size, cifar.num_classes, cifar.iterations) == (128, 32, 10, 2)
    assert (resnet.config_file.name, cifar.config_file.name) == ("imagenet.yaml", "cifar10.yaml")
    assert (conduct.device, conduct.rounds, conduct.precision, conduct.cpu_time) == ("cpu", 5, None, False)


def test_steps_on_a_gpu(asked, gpu):
    assert run_pretrain(**COMMON) == []
    tasks, conduct, _ = asked["compare_networks"]
    assert [(task.batch, task.iterations) for task in tasks] == 3 * [(256, 40)] + 2 * [(128, 400)]
    assert conduct.device == "cuda" and conduct.warm_up > 4  # three eager steps and a recording precede the graph


def test_options_reach_the_steps(asked, gpu):
    options = {"networks": ["vgg16"], "device": "cpu", "precision": "fp32", "batch": 3, "size": 64, "rounds": 7}
    assert run_pretrain(**COMMON, **options, iterations=2, cpu_time=True) == [NO_GPU]
    (task,), conduct, _ = asked["compare_networks"]
    assert (task.network, task.batch, task.size, task.iterations) == ("vgg16", 3, 64, 2)
    assert (conduct.device, conduct.precision, conduct.rounds, conduct.cpu_time) == ("cpu", "fp32", 7, True)


def test_an_unknown_name_stops_before_anything_is_timed(asked, no_gpu):
    with pytest.raises(InputError, match="no network is named 'resnet51'"):
        run_pretrain(**COMMON, networks=["resnet18", "resnet51"])
    assert not asked


def test_loading_on_a_cpu_and_on_a_gpu(asked, no_gpu, monkeypatch):
    assert run_data(**COMMON, images=Path("album")) == [NO_GPU] and "compare_on_gpu" not in asked
    work = asked["compare_loading"][0]
    assert (work.images, work.workers, work.crop, work.rounds) == (Path("album"), 0, 224, 5)
    assert asked["training"][0].network == "resnet50" and asked["training"][2].workers == 1
    asked.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert run_data(**COMMON) == []
    assert asked["compare_on_gpu"][0].workers >= 1 and asked["training"][1].device == "cuda"
    assert not asked["compare_loading"][0].cpu_time


def test_on_a_gpu_its_part_comes_first_and_its_failure_loses_nothing(asked, gpu, monkeypatch):
    """Without nvJPEG, say."""
    kept, order = [], []

    def on_gpu(*_):
        order.append("GPU")
        yield SimpleNamespace(to_dict=lambda: "loaded by the GPU")
        raise RuntimeError("decode_jpegs_cuda: no nvJPEG")

    def on_cpu(*_):
        order.append("CPU")
        yield SimpleNamespace(to_dict=lambda: "loaded by the CPU")

    monkeypatch.setattr(data, "compare_on_gpu", on_gpu)
    monkeypatch.setattr(data, "compare_loading", on_cpu)
    monkeypatch.setattr(plans, "to_dict", lambda setup, made, skipped: ([one.to_dict() for one in made], [*skipped]))
    expected = (["loaded by the GPU", "loaded by the CPU"], ["what the GPU decodes (decode_jpegs_cuda: no nvJPEG)"])
    assert run_data(**COMMON, keep=kept.append) == expected
    assert order == ["GPU", "CPU"] and kept == [(["loaded by the GPU"], []), expected]


def test_detectors_on_a_cpu(asked, no_gpu):
    assert run_detect(**COMMON) == [NO_GPU_FOR_DETECTORS]
    names, work, conduct, configs, _ = asked["compare_detectors"]
    assert names == ["R50-C4"] and configs == COMMON["configs"]
    assert (work.batch, work.size, work.rois, work.proposals, work.iterations) == (1, (480, 640), 128, 300, 1)
    assert work.stride_in_1x1 and (conduct.device, conduct.rounds, conduct.cpu_time) == ("cpu", 5, False)


def test_detectors_on_a_gpu(asked, gpu):
    assert run_detect(**COMMON) == []
    names, work, conduct, *_ = asked["compare_detectors"]
    assert names == ["R101-C4", "R101-FPN", "R50-FPN"]
    assert (work.batch, work.size, work.rois, work.proposals, work.iterations) == (8, (800, 1216), 512, None, 5)
    assert conduct.device == "cuda" and conduct.warm_up > 1


def test_options_reach_the_detectors(asked, gpu):
    options = {"detectors": ["VGG16", "R50-FPN"], "device": "cpu", "batch": 3, "size": [64, 80], "rois": 9}
    assert run_detect(**COMMON, **options, rounds=7, iterations=2, stride_in_3x3=True, cpu_time=True)
    names, work, conduct, *_ = asked["compare_detectors"]
    assert names == ["VGG16", "R50-FPN"]
    assert (work.batch, work.size, work.rois, work.iterations, work.stride_in_1x1) == (3, (64, 80), 9, 2, False)
    assert (conduct.device, conduct.rounds, conduct.cpu_time) == ("cpu", 7, True)


def test_each_comparison_of_detectors_is_handed_over_when_it_is_made(no_gpu, monkeypatch):
    kept = []

    def compare(names, *arguments):
        for name in names:
            yield SimpleNamespace(to_dict=lambda name=name: name)
        assert [results["comparisons"] for results in kept] == [["R50-C4"], ["R50-C4", "VGG16"]]
        raise InputError("the third fails")

    monkeypatch.setattr(detect, "compare_detectors", compare)
    with pytest.raises(InputError, match="the third fails"):
        run_detect(**COMMON, detectors=["R50-C4", "VGG16"], keep=kept.append)
    assert all(results["setup"]["cpu"] and results["skipped"] == [NO_GPU_FOR_DETECTORS] for results in kept)


@pytest.mark.parametrize(
    ("name", "near"), [("R50-C5", "R50-C4"), ("r101-fpn", "R101-FPN"), ("vgg-16", "VGG16"), ("mobilenet", None)]
)
def test_an_unknown_detector_stops_before_anything_is_timed(asked, no_gpu, name, near):
    with pytest.raises(InputError) as refused:
        run_detect(**COMMON, detectors=["R50-C4", name])
    assert f"--detectors {name} is unknown" in str(refused.value) and "R50-FPN" in str(refused.value) and not asked
    assert (f"did you mean {near}" in str(refused.value)) if near else ("did you mean" not in str(refused.value))


@pytest.mark.parametrize(
    ("run", "options", "sentence"),
    [
        (run_pretrain, {"device": "cuda"}, "--device is cuda, but torch finds no GPU here"),
        (run_pretrain, {"rounds": 0}, "--rounds is 0; expected at least 1"),
        (run_pretrain, {"batch": -1}, "--batch is -1; expected at least 1"),
        (run_pretrain, {"iterations": 0}, "--iterations is 0; expected at least 1"),
        (run_data, {"workers": -1}, "--workers is -1; expected at least 0"),
        (run_data, {"workers": 1, "cpu_time": True}, "--cpu-time, which sees no workers"),
        (run_data, {"device": "cuda"}, "--device is cuda, but torch finds no GPU here"),
        (run_detect, {"device": "cuda"}, "--device is cuda, but torch finds no GPU here"),
        (run_detect, {"size": [480, 0]}, "--size is 0; expected at least 1"),
        (run_detect, {"rois": 0}, "--rois is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(asked, no_gpu, run, options, sentence):
    with pytest.raises(InputError) as refused:
        run(**COMMON, **options)
    assert sentence in str(refused.value) and not asked


def test_cpu_seconds_say_nothing_about_a_gpu(asked, gpu):
    with pytest.raises(InputError, match="--cpu-time counts what the CPU does"):
        run_pretrain(**COMMON, device="cuda", cpu_time=True)
    run_pretrain(**COMMON, cpu_time=True)
    assert asked["compare_networks"][1].device == "cpu"
