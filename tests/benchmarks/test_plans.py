"""What is run by default, and what is refused."""

from pathlib import Path

import pytest
import torch

from resnet_backbone.benchmarks import data, pretrain
from resnet_backbone.benchmarks.plans import NETWORKS, NO_GPU, run_data, run_pretrain
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
    monkeypatch.setattr(data, "compare_training", lambda *arguments: calls.setdefault("training", arguments) and None)
    monkeypatch.setattr("resnet_backbone.benchmarks.plans.to_dict", lambda setup, comparisons, skipped: skipped)
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
    assert [(task.batch, task.iterations) for task in tasks] == 3 * [(256, 5)] + 2 * [(128, 50)]
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
