"""What each command runs, at sizes that suit this machine."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, detect, evaluate, pretrain
from benchmarks.detectors import DetectionWork, check_names
from benchmarks.report import describe_setup, to_dict
from benchmarks.timing import Comparison
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.errors import InputError
from resnet_backbone.networks.catalogue import find_row

NETWORKS = ("resnet50", "vgg16", "resnet101", "cifar_resnet20", "cifar_resnet110")
TINY_NETWORKS = ("resnet18", "cifar_resnet20")
CIFAR = {"num_classes": 10, "batch": 128, "size": 32}
WARM_UP = {"cuda": 10, "cpu": 1}  # iterations; a GPU compiles, selects kernels and captures a graph in them
ITERATIONS = {"cuda": 40, "cpu": 1}  # per turn for ImageNet networks: a second or more
Keep = Callable[[dict[str, Any]], object]
DEVICES = ("cuda", "cpu")
PRECISIONS = ("bf16", "fp32")
NO_GPU = (
    "what needs a GPU (compiled steps, CUDA graphs, decoding on the GPU); torch finds none here, or --device is cpu."
)
DETECTORS = {"cuda": ("R101-C4", "R101-FPN", "R50-FPN"), "cpu": ("R50-C4",)}
DETECTION = {
    "cuda": {"batch": 8, "size": (800, 1216), "rois": 512, "iterations": 5},
    "cpu": {"batch": 1, "size": (480, 640), "rois": 128, "iterations": 1},
    "tiny": {"batch": 1, "size": (64, 96), "rois": 4, "iterations": 1},
}
PROPOSALS = {"cuda": None, "cpu": 300, "tiny": 10}  # in inference; None: the configuration's number
NO_GPU_FOR_DETECTORS = (
    "what needs a GPU (compiled backbones, fp16, the memory that it takes); torch finds none here, or --device is cpu."
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
    keep: Keep = lambda results: None,
) -> dict[str, Any]:
    """Time training steps (`pretrain.MEANING`); return the results as plain values.

    Args:
        configs: folder with the recipes imagenet.yaml and cifar10.yaml.
        batch, size, iterations: for ImageNet networks. CIFAR networks use batches of 128 at 32 pixels, and ten times as
            many iterations per turn on a GPU, twice as many on a CPU.
        tiny: a smoke run of a few seconds on the CPU.
        keep: receives the results so far after each comparison.

    Raises:
        InputError: an argument is not usable, or the batch does not fit in memory.
    """
    device = _choose_device("cpu" if tiny else device, cpu_time=cpu_time)
    _check(batch=batch, size=size, rounds=rounds, iterations=iterations)
    on_gpu = device == "cuda"
    iterations = iterations or ITERATIONS[device]

    def task(name: str) -> pretrain.Task:
        if find_row(name).image_size == CIFAR["size"]:
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
    return _collect(setup, pretrain.compare_networks(tasks, conduct, report), [] if on_gpu else [NO_GPU], keep)


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
    keep: Keep = lambda results: None,
) -> dict[str, Any]:
    """Time loading and training from files (`data.MEANING`); return the results as plain values.

    If there is a GPU, its part runs first; the CPU's part runs even if that fails.

    Args:
        configs: folder with the recipe imagenet.yaml.
        images: folder searched recursively for JPEGs; None: generate some.
        workers: loader processes when measuring images per second and core; 0: this process.
        tiny: a smoke run of a few seconds on the CPU.
        keep: receives the results so far after each comparison.

    Raises:
        InputError: an argument is not usable.
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
    loading = data.LoadingWork(workers=workers, cpu_time=cpu_time, **common, **sizes, **shapes)

    # Train with one image size and the number of workers a real run would use.
    beside = len(os.sched_getaffinity(0)) if on_gpu else 0 if cpu_time else 1
    shapes = {"sizes": [(48, 64)]} if tiny else {"sizes": [(480, 640)]}
    feeding = data.LoadingWork(workers=beside, **common, **sizes, **shapes)
    task = pretrain.Task(
        network="resnet18" if tiny else "resnet50",
        num_classes=1000,
        config_file=common["config_file"],
        batch=4 if tiny else 256 if on_gpu else 16,
        size=sizes["crop"],
        iterations=1 if tiny else 20 if on_gpu else 3,
    )
    conduct = pretrain.Conduct(device=device, rounds=common["rounds"], warm_up=WARM_UP[device], cpu_time=cpu_time)
    setup, skipped = describe_setup(cpu_time=cpu_time), [] if on_gpu else [NO_GPU]

    def comparisons() -> Iterator[Comparison]:
        if on_gpu:
            try:
                yield from data.compare_on_gpu(feeding, report)
                yield data.compare_training(task, conduct, feeding, report)
            except (RuntimeError, DatasetError) as error:  # not every machine has nvJPEG
                skipped.append(f"what the GPU decodes ({error})")
        yield from data.compare_loading(loading, report)
        if not on_gpu:
            yield data.compare_training(task, conduct, feeding, report)

    return _collect(setup, comparisons(), skipped, keep)


def run_detect(
    *,
    configs: Path,
    detectors: Sequence[str] | None = None,
    device: str | None = None,
    batch: int | None = None,
    size: Sequence[int] | None = None,
    rois: int | None = None,
    stride_in_3x3: bool = False,
    rounds: int = 5,
    iterations: int | None = None,
    cpu_time: bool = False,
    tiny: bool = False,
    report: Callable[[str], object],
    keep: Keep = lambda results: None,
) -> dict[str, Any]:
    """Time detector training steps and inference (`detect.MEANING`); return the results as plain values.

    Args:
        configs: folder with faster_rcnn_VGG16.yaml.
        detectors: names in `detectors.DETECTORS`.
        size: image height and width.
        rois: sampled from each image's proposals in training.
        stride_in_3x3: stride all sides' ResNets there instead of in the first 1×1 convolution.
        tiny: a smoke run of a few seconds on the CPU.
        keep: receives the results so far after each comparison.

    Raises:
        InputError: an argument is not usable, or the batch does not fit in memory.
    """
    device = _choose_device("cpu" if tiny else device, cpu_time=cpu_time)
    _check(batch=batch, size=size and min(size), rois=rois, rounds=rounds, iterations=iterations)
    names = list(detectors or DETECTORS[device])
    check_names(names)
    scale = "tiny" if tiny else device
    given = {"batch": batch, "size": size and tuple(size), "rois": rois, "iterations": iterations}
    work = DetectionWork(
        **DETECTION[scale] | {key: value for key, value in given.items() if value is not None},
        proposals=PROPOSALS[scale],
        stride_in_1x1=not stride_in_3x3,
    )
    conduct = pretrain.Conduct(device=device, rounds=2 if tiny else rounds, warm_up=WARM_UP[device], cpu_time=cpu_time)
    setup = describe_setup(cpu_time=cpu_time)
    skipped = [] if device == "cuda" else [NO_GPU_FOR_DETECTORS]
    return _collect(setup, detect.compare_detectors(names, work, conduct, configs, report), skipped, keep)


def run_evaluate(
    *,
    images: int | None = None,
    detections: int | None = None,
    rounds: int = 5,
    cpu_time: bool = False,
    tiny: bool = False,
    report: Callable[[str], object],
    keep: Keep = lambda results: None,
) -> dict[str, Any]:
    """Time COCO's evaluation of boxes (`evaluate.MEANING`); return the results as plain values.

    Args:
        images, detections: the number of images, and of detections in each.
        tiny: a smoke run of a few seconds.
        keep: receives the results so far after each comparison.

    Raises:
        InputError: an argument is not usable.
    """
    _check(images=images, detections=detections, rounds=rounds)
    work = evaluate.EvaluationWork(
        images=images or (20 if tiny else 5000),
        detections=detections or (10 if tiny else 100),
        categories=80,
        rounds=2 if tiny else rounds,
        cpu_time=cpu_time,
    )
    return _collect(describe_setup(cpu_time=cpu_time), evaluate.compare_evaluation(work, report), [], keep)


def _collect(
    setup: Mapping[str, Any], comparisons: Iterable[Comparison], skipped: Sequence[str], keep: Keep
) -> dict[str, Any]:
    """Run all comparisons and pass on the results after each, so a later failure loses none."""
    made = []
    for comparison in comparisons:
        made.append(comparison)
        keep(to_dict(setup, made, skipped))
    return to_dict(setup, made, skipped)


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
