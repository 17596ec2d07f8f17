"""What the command runs on this machine, with the sizes that suit it."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.benchmarks import data, pretrain
from resnet_backbone.benchmarks.report import describe_setup, to_dict
from resnet_backbone.errors import InputError
from resnet_backbone.networks.analysis import analyze

NETWORKS = ("resnet50", "vgg16", "resnet101", "cifar_resnet20", "cifar_resnet110")
TINY_NETWORKS = ("resnet18", "cifar_resnet20")
CIFAR = {"num_classes": 10, "batch": 128, "size": 32}
WARM_UP = {"cuda": 10, "cpu": 1}  # iterations; a GPU compiles, chooses kernels and records a graph in them
DEVICES = ("cuda", "cpu")
PRECISIONS = ("bf16", "fp32")
NO_GPU = (
    "what needs a GPU (compiled steps, CUDA graphs, decoding on the GPU); torch finds none here, or --device is cpu."
)


def run_pretrain(
    *,
    configs: Path,
    networks: Sequence[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    size: int | None = None,
    rounds: int = 5,
    iterations: int | None = None,
    cpu_time: bool = False,
    tiny: bool = False,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Time training steps (`pretrain.MEANING`); the results as plain values.

    Args:
        configs: the folder of the recipes imagenet.yaml and cifar10.yaml.
        batch, size, iterations: of ImageNet's networks. CIFAR's take 128 images of 32 pixels, and on a GPU ten times,
            on a CPU twice as many iterations in a turn.
        tiny: a few seconds that show that all of it runs, on the CPU.

    Raises:
        InputError: an argument cannot be used, or the memory does not hold the batch.
    """
    device = _choose_device("cpu" if tiny else device, cpu_time=cpu_time)
    _check(batch=batch, size=size, rounds=rounds, iterations=iterations)
    on_gpu = device == "cuda"
    iterations = iterations or (5 if on_gpu else 1)

    def task(name: str) -> pretrain.Task:
        if analyze(name).image_size == CIFAR["size"]:
            small = {"batch": 8, "iterations": 1} if tiny else {"iterations": (10 if on_gpu else 2) * iterations}
            return pretrain.Task(network=name, config_file=configs / "cifar10.yaml", **CIFAR | small)
        return pretrain.Task(
            network=name,
            num_classes=1000,
            config_file=configs / "imagenet.yaml",
            batch=batch or (4 if tiny else 256 if on_gpu else 32),
            size=size or (32 if tiny else 224),
            iterations=iterations,
        )

    tasks = [task(name) for name in networks or (TINY_NETWORKS if tiny else NETWORKS)]
    conduct = pretrain.Conduct(
        device=device,
        precision=precision,
        rounds=2 if tiny else rounds,
        warm_up=WARM_UP[device],
        cpu_time=cpu_time,
    )
    setup = describe_setup(cpu_time=cpu_time)
    return to_dict(setup, pretrain.compare_networks(tasks, conduct, report), [] if on_gpu else [NO_GPU])


def run_data(
    *,
    configs: Path,
    images: Path | None = None,
    workers: int = 0,
    device: str | None = None,
    rounds: int = 5,
    cpu_time: bool = False,
    tiny: bool = False,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Time loading, and training from files (`data.MEANING`); the results as plain values.

    Args:
        configs: the folder of the recipe imagenet.yaml.
        images: a folder with JPEGs in it or below; None: generated ones.
        workers: loading processes where images a second and core are counted; 0: the process itself.
        tiny: a few seconds that show that all of it runs, on the CPU.

    Raises:
        InputError: an argument cannot be used.
    """
    device = _choose_device("cpu" if tiny else device, cpu_time=cpu_time and not workers)
    _check(rounds=rounds)
    if workers < 0 or (workers and cpu_time):
        raise InputError(f"--workers is {workers}; expected at least 0, and 0 with --cpu-time, which sees no workers.")
    on_gpu = device == "cuda"
    common: Mapping[str, Any] = {
        "config_file": configs / "imagenet.yaml",
        "images": images,
        "rounds": 2 if tiny else rounds,
    }
    sizes = {"count": 8, "batch": 4, "crop": 32} if tiny else {"count": 64, "batch": 32, "crop": 224}
    shapes = {"sizes": [(48, 64), (160, 200)]} if tiny else {}
    setup = describe_setup(cpu_time=cpu_time)
    comparisons = data.compare_loading(
        data.LoadingWork(workers=workers, cpu_time=cpu_time, **common, **sizes, **shapes), report
    )

    # The rest with one size of image, and with the workers that a training would have.
    beside = len(os.sched_getaffinity(0)) if on_gpu else 0 if cpu_time else 1
    shapes = {"sizes": [(48, 64)]} if tiny else {"sizes": [(480, 640)]}
    loading = data.LoadingWork(workers=beside, **common, **sizes, **shapes)
    if on_gpu:
        comparisons += data.compare_on_gpu(loading, report)
    task = pretrain.Task(
        network="resnet18" if tiny else "resnet50",
        num_classes=1000,
        config_file=common["config_file"],
        batch=4 if tiny else 256 if on_gpu else 16,
        size=sizes["crop"],
        iterations=1 if tiny else 20 if on_gpu else 3,
    )
    conduct = pretrain.Conduct(device=device, rounds=common["rounds"], warm_up=WARM_UP[device], cpu_time=cpu_time)
    comparisons.append(data.compare_training(task, conduct, loading, report))
    return to_dict(setup, comparisons, [] if on_gpu else [NO_GPU])


def _choose_device(device: str | None, *, cpu_time: bool) -> str:
    there = torch.cuda.is_available()
    device = device or ("cuda" if there and not cpu_time else "cpu")
    if device == "cuda" and not there:
        raise InputError("--device is cuda, but torch finds no GPU here; leave it out, or give cpu.")
    if device == "cuda" and cpu_time:
        raise InputError("--cpu-time counts what the CPU does, and the steps would run on a GPU; give --device cpu.")
    return device


def _check(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}; expected at least 1.")
