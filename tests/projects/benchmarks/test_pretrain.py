"""Both loops do the same steps on the same batch, and only their seconds are compared."""

import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.resnet import ResNet as TorchvisionResNet

from benchmarks.pretrain import BARE, COMPILED, OURS, PLAIN, TUNED, Conduct, Task, compare_networks
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.networks.stages import StagedNetwork
from resnet_backbone.pretraining import network

CONFIGS = Path(__file__).parents[3] / "configs" / "pretrain"
ROUNDS, ITERATIONS, CIFAR_ITERATIONS, WARM_UP = 3, 2, 1, 1
STEPS, CIFAR_STEPS = WARM_UP + ROUNDS * ITERATIONS, WARM_UP + ROUNDS * CIFAR_ITERATIONS


def tiny(name: str, **changes) -> Task:
    arguments = {"num_classes": 1000, "config_file": CONFIGS / "imagenet.yaml", "size": 32}
    arguments |= {"batch": 2, "iterations": ITERATIONS}
    if name.startswith("cifar"):
        cifar = {"num_classes": 10, "config_file": CONFIGS / "cifar10.yaml", "batch": 4}
        arguments |= cifar | {"iterations": CIFAR_ITERATIONS}
    return Task(network=name, **arguments | changes)


def conduct(**changes) -> Conduct:
    return Conduct(**{"device": "cpu", "rounds": ROUNDS, "warm_up": WARM_UP} | changes)


@contextlib.contextmanager
def watched():
    """What every network is given in training, by kind of network: (shape, type, layout, autocast's type or None)."""
    given: dict[type, Counter] = {StagedNetwork: Counter(), TorchvisionResNet: Counter()}

    def note(module, arguments):
        for kind, counter in given.items():
            if isinstance(module, kind):
                images = arguments[0]
                autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
                last = images.is_contiguous(memory_format=torch.channels_last)
                counter[tuple(images.shape), images.dtype, "channels_last" if last else "NCHW", autocast] += 1
                assert module.training

    handle = register_module_forward_pre_hook(note)
    try:
        yield given
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def measured():
    """Comparisons of resnet18 and cifar_resnet20, what the networks were given, the runs and the files they wrote."""
    runs, real = [], network.train

    def train(cfg, task, model, optimizer, *, folder, resume_from):
        try:
            return real(cfg, task, model, optimizer, folder=folder, resume_from=resume_from)
        finally:
            files = {path.name for path in folder.iterdir()}
            runs.append(SimpleNamespace(cfg=cfg, optimizer=optimizer, files=files, folder=folder))

    lines = []
    with pytest.MonkeyPatch.context() as patch, watched() as given:
        patch.setattr(network, "train", train)
        comparisons = list(compare_networks([tiny("resnet18"), tiny("cifar_resnet20")], conduct(), lines.append))
    return SimpleNamespace(comparisons=comparisons, given=given, runs=runs, lines=lines)


def test_every_side_has_a_rate_for_each_round(measured):
    for comparison in measured.comparisons:
        assert list(comparison.rates) == list(comparison.sides) == [OURS, BARE, PLAIN, TUNED]
        assert all(len(rates) == ROUNDS and min(rates) > 0 for rates in comparison.rates.values())
        assert all(ratio > 0 for side in comparison.sides for ratio in comparison.ratios(side))
        assert (comparison.first, comparison.unit) == (OURS, "images/s")
    resnet, cifar = measured.comparisons
    assert (resnet.task, cifar.task) == ("resnet18, 2×3×32×32", "cifar_resnet20, 4×3×32×32")
    assert {side.shape for side in resnet.sides.values()} == {(2, 3, 32, 32)}
    assert (resnet.work, cifar.work) == (2 * ITERATIONS, 4 * CIFAR_ITERATIONS)
    assert measured.lines == ["resnet18", "cifar_resnet20"]


def test_the_sides_take_the_same_steps_on_the_same_shapes(measured):
    fp32, last = torch.float32, "channels_last"
    shape, cifar = (2, 3, 32, 32), (4, 3, 32, 32)
    assert measured.given[TorchvisionResNet] == {
        (shape, fp32, "NCHW", None): STEPS,
        (shape, fp32, last, torch.bfloat16): STEPS,
    }
    assert measured.given[StagedNetwork] == {
        (shape, fp32, last, torch.bfloat16): 2 * STEPS,  # ours, and the same network bare
        (cifar, fp32, last, None): 3 * CIFAR_STEPS,  # and plain, tuned: the recipe is in fp32
        (cifar, fp32, "NCHW", None): CIFAR_STEPS,
    }


def test_our_side_is_the_recipe_with_all_that_surrounds_it(measured):
    resnet, cifar = measured.runs
    assert resnet.cfg.SOLVER.AMP.ENABLED and resnet.cfg.SOLVER.AMP.PRECISION == "bf16"
    assert not cifar.cfg.SOLVER.AMP.ENABLED and cifar.cfg.DATALOADER.PIPELINE == "resident"
    for run in measured.runs:
        assert run.cfg.SOLVER.EMA_DECAY > 0 and run.optimizer.defaults["fused"]
        assert run.cfg.SOLVER.LOG_PERIOD <= ITERATIONS  # the metrics are read in each turn
        assert "metrics.json" in run.files and any("tfevents" in name for name in run.files)


def test_nothing_is_saved_and_nothing_stays(measured):
    for run in measured.runs:
        assert not any(name.endswith(".pth") for name in run.files) and not run.folder.exists()


def test_settings_say_what_tells_the_sides_apart(measured):
    resnet, cifar = ({name: side.settings for name, side in c.sides.items()} for c in measured.comparisons)
    assert resnet[OURS] == "bf16, channels_last, moving average" and resnet[BARE] == "bf16, channels_last"
    assert resnet[PLAIN] == "torchvision's network, fp32, NCHW"
    assert resnet[TUNED] == "torchvision's network, bf16, channels_last"
    assert cifar[OURS] == "fp32, channels_last, resident data, moving average"
    assert cifar[PLAIN] == "our network, fp32, NCHW"


def test_a_precision_holds_for_all_sides_but_the_plain_one():
    with watched() as given:
        list(compare_networks([tiny("resnet18", iterations=1)], conduct(precision="fp32", rounds=1), print))
    assert {autocast for counter in given.values() for *_, autocast in counter} == {None}
    with watched() as given:
        list(compare_networks([tiny("cifar_resnet20")], conduct(precision="bf16", rounds=1), print))
    used = {(layout, autocast) for _, _, layout, autocast in given[StagedNetwork]}
    assert used == {("NCHW", None), ("channels_last", torch.bfloat16)}


def test_a_batch_that_the_memory_does_not_hold(monkeypatch):
    def train(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "train", train)
    with pytest.raises(InputError, match="resnet18: the GPU's memory does not hold --batch 2; lower it"):
        list(compare_networks([tiny("resnet18")], conduct(), print))


def test_a_signal_ends_it_without_a_promise_to_resume(monkeypatch):
    def train(*arguments, **named):
        raise Interrupted("SIGTERM: saved after 3 of 5 iterations. Go on with --resume.")

    monkeypatch.setattr(network, "train", train)
    with pytest.raises(Interrupted, match=r"^stopped by a signal; nothing was written$"):
        list(compare_networks([tiny("resnet18")], conduct(), print))


@pytest.mark.gpu
def test_on_a_gpu_steps_are_compiled_or_recorded():
    tasks = [tiny("resnet18", batch=8, size=64), tiny("cifar_resnet20", batch=8)]
    resnet, cifar = compare_networks(tasks, conduct(device="cuda", warm_up=6), print)
    assert list(resnet.rates) == [OURS, BARE, PLAIN, TUNED, COMPILED]
    assert "compiled" in resnet.sides[OURS].settings
    assert list(cifar.rates) == [OURS, PLAIN, TUNED] and "one CUDA graph" in cifar.sides[OURS].settings
    assert all(min(rates) > 0 for comparison in (resnet, cifar) for rates in comparison.rates.values())
