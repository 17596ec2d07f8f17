"""Training throughput in images per second: the package's loop vs. torchvision's, on a batch already in memory."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from benchmarks.reference import PlainLoop
from benchmarks.timing import Clock, Comparison, Side
from resnet_backbone.data.generated import write_classification
from resnet_backbone.data.sources import open_source
from resnet_backbone.engine.config import CfgNode, load_config
from resnet_backbone.engine.precision import AUTOCAST_TYPES, autocast, precision_of
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.networks import build_network
from resnet_backbone.pretraining.config import get_config
from resnet_backbone.pretraining.losses import ClassificationLosses
from resnet_backbone.pretraining.network import train_new
from resnet_backbone.pretraining.pipelines import build_pipeline
from resnet_backbone.pretraining.preprocessing import build_normalize

Batch = tuple[torch.Tensor, torch.Tensor]

UNIT = "images/s"
OURS, BARE = "ours", "ours, bare"
PLAIN, TUNED, COMPILED = "plain loop", "plain loop, tuned", "plain loop, compiled"
MEANING = {
    OURS: "the package's training loop with its hooks, metrics.json, TensorBoard and the moving average of the "
    "weights, from uint8 images on; the recipe's precision, fused SGD, channels_last",
    BARE: "the same network, optimizer and precision without the loop; its ratio is what the loop around a step costs",
    PLAIN: "torchvision's reference loop with torchvision's network: float32, NCHW, SGD that is not fused, metrics "
    "read in each step. CIFAR's networks, which torchvision has not, are ours",
    TUNED: "the same with our precision and channels_last",
    COMPILED: "the same with torch.compile too (on a GPU, if the recipe asks for it)",
}

LEARNING_RATE = 1e-4  # random labels teach nothing; just avoid divergence


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train a network on.

    Attributes:
        network: its name.
        num_classes: of its dataset.
        config_file: recipe with the settings of the package's loop.
        batch, size: images per batch, and their height and width.
        iterations: per turn.
    """

    network: str
    num_classes: int
    config_file: Path
    batch: int
    size: int
    iterations: int


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How to measure.

    Attributes:
        device: "cuda" or "cpu".
        precision: "bf16" or "fp32", for all sides except the plain float32 loop; None: the recipe's.
        rounds: turns per side.
        warm_up: iterations per side before the first turn.
        cpu_time: measure this process's CPU seconds, as in `Clock`.
    """

    device: str
    precision: str | None = None
    rounds: int
    warm_up: int
    cpu_time: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


class Data(NamedTuple):
    """Input of the package's loop: endless batches, and a function from one to images and labels on the device."""

    batches: Iterator[Any]
    images_of: Callable[[Any], Batch]


class _Measured(Interrupted):
    """Raised in place of the next batch after all rounds: the loop exits without writing a final checkpoint."""


def compare_networks(tasks: Iterable[Task], conduct: Conduct, report: Callable[[str], object]) -> Iterator[Comparison]:
    """Compare the sides in MEANING for each task; `report` gets a line before each.

    Raises:
        InputError: the batch does not fit in memory.
    """
    for task in tasks:
        report(task.network)
        torch.compiler.reset()  # it limits how many networks one function is compiled for
        try:
            yield _compare(task, conduct)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{task.network}: the GPU's memory does not hold --batch {task.batch}; lower it"
            ) from error


def make_config(task: Task, conduct: Conduct, *words: Any) -> CfgNode:
    """Load the task's recipe with the moving average on and `words` (`KEY VALUE …`) applied."""
    amp = () if conduct.precision is None else ("SOLVER.AMP.ENABLED", conduct.precision != "fp32")
    words = (
        *("MODEL.NETWORK.NAME", task.network, "MODEL.DEVICE", conduct.device, "SEED", 1, *amp),
        *("SOLVER.IMS_PER_BATCH", task.batch, "INPUT.CROP.SIZE", (task.size, task.size)),
        *("SOLVER.BASE_LR", LEARNING_RATE, "SOLVER.EMA_DECAY", 0.9999, "SOLVER.LOG_PERIOD", min(20, task.iterations)),
        *("SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 0),
        *words,
    )
    return load_config(get_config(), task.config_file, [str(word) for word in words])


def train_on(
    cfg: CfgNode,
    num_classes: int,
    batches: Callable[[nn.Module, torch.optim.Optimizer, ClassificationLosses], Iterable[Any]],
    images_of: Callable[[Any], Batch],
) -> None:
    """Run `engine.train.train` with all its hooks on everything `batches(model, optimizer, losses)` yields."""

    def until_measured(
        model: nn.Module, optimizer: torch.optim.Optimizer, losses: ClassificationLosses
    ) -> Iterator[Any]:
        yield from batches(model, optimizer, losses)
        raise _Measured

    with tempfile.TemporaryDirectory() as folder:
        try:
            train_new(cfg, num_classes, until_measured, images_of, Path(folder))
        except _Measured:
            pass
        except Interrupted:
            raise Interrupted("stopped by a signal; nothing was written") from None


def _compare(task: Task, conduct: Conduct) -> Comparison:
    cfg = make_config(task, conduct)
    batch = _synthetic(task, conduct.device)
    if cfg.DATALOADER.PIPELINE != "resident":
        return _in_turns(task, conduct, cfg, Data(repeat(batch), lambda batch: batch), batch)
    # Small images: the dataset is on the device, and a GPU step is one graph.
    cfg.SOLVER.CUDA_GRAPH = conduct.on_gpu
    with tempfile.TemporaryDirectory() as folder:
        images = write_classification(Path(folder) / "images", images=16 * task.batch, image_size=task.size, seed=1)
        resident = build_pipeline(cfg, open_source(images))
    return _in_turns(task, conduct, cfg, Data(resident(0), resident.images_of), batch)


def _in_turns(task: Task, conduct: Conduct, cfg: CfgNode, data: Data, batch: Batch) -> Comparison:
    """Train on `data`; the other sides take turns between turns of the package's loop, the plain ones on `batch`."""
    precision = precision_of(cfg)
    clock = Clock(conduct.device, cpu_time=conduct.cpu_time)
    images, labels = batch
    normalize = build_normalize(cfg)
    plain = {}
    for side in (PLAIN, TUNED, COMPILED) if _is_compiled(cfg) else (PLAIN, TUNED):
        layout = torch.contiguous_format if side == PLAIN else torch.channels_last
        dtype = None if side == PLAIN else AUTOCAST_TYPES.get(precision)
        loop = _plain_loop(cfg, task.num_classes, layout, dtype, compiled=side == COMPILED)
        plain[side] = functools.partial(loop, normalize(images).contiguous(memory_format=layout), labels)

    def turns(model: nn.Module, optimizer: torch.optim.Optimizer, losses: ClassificationLosses) -> Iterator[Any]:
        others = dict(plain)
        if not cfg.SOLVER.CUDA_GRAPH:  # a captured step is tied to its loop
            others = {BARE: functools.partial(_bare, model, optimizer, losses, data, precision), **others}
        yield from islice(data.batches, conduct.warm_up)
        for run in others.values():
            run(conduct.warm_up)
        for _ in range(conduct.rounds):
            yield from clock.watch(OURS, islice(data.batches, task.iterations))
            for side, run in others.items():
                clock.time(side, functools.partial(run, task.iterations))

    train_on(cfg, task.num_classes, turns, data.images_of)
    shape = tuple(images.shape)
    settings = _settings(cfg, precision)
    return Comparison.of(
        clock,
        task=f"{task.network}, {'×'.join(map(str, shape))}",
        unit=UNIT,
        first=OURS,
        sides={side: Side(settings[side], shape) for side in clock.seconds},
        work=task.batch * task.iterations,
    )


def _bare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: ClassificationLosses,
    data: Data,
    precision: str,
    iterations: int,
) -> None:
    """Run the steps of `train_on`'s network without the surrounding loop."""
    device = next(model.parameters()).device
    for batch in islice(data.batches, iterations):
        optimizer.zero_grad()
        with autocast(precision, device):
            loss = losses(model, batch)[0]["loss_cls"]
        loss.backward()
        optimizer.step()


def _is_compiled(cfg: CfgNode) -> bool:
    """Whether `engine.train.train` compiles the network under this recipe."""
    return cfg.SOLVER.COMPILE and cfg.MODEL.DEVICE.startswith("cuda")


def _settings(cfg: CfgNode, precision: str) -> dict[str, str]:
    """Describe what sets the sides apart."""
    network = "torchvision's network" if _torchvision_has(cfg.MODEL.NETWORK.NAME) else "our network"
    compiled = ", compiled" if _is_compiled(cfg) else ""
    resident = ", resident data" if cfg.DATALOADER.PIPELINE == "resident" else ""
    graph = ", one CUDA graph" if cfg.SOLVER.CUDA_GRAPH else ""
    bare = f"{precision}, channels_last{compiled}{resident}"
    tuned = f"{network}, {precision}, channels_last"
    return {
        OURS: f"{bare}{graph}, moving average",
        BARE: bare,
        PLAIN: f"{network}, fp32, NCHW",
        TUNED: tuned,
        COMPILED: f"{tuned}, compiled",
    }


def _plain_loop(
    cfg: CfgNode, num_classes: int, layout: torch.memory_format, dtype: torch.dtype | None, *, compiled: bool
) -> PlainLoop:
    torch.manual_seed(cfg.SEED)
    build = torchvision.models.get_model if _torchvision_has(cfg.MODEL.NETWORK.NAME) else build_network
    model = build(cfg.MODEL.NETWORK.NAME, num_classes=num_classes).to(cfg.MODEL.DEVICE, memory_format=layout)
    if compiled:
        model.compile()
    return PlainLoop(
        model,
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        autocast=dtype,
    )


def _torchvision_has(name: str) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)


def _synthetic(task: Task, device: str) -> Batch:
    """Random `(N, 3, H, W)` uint8 images and `(N,)` int64 labels, on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (task.batch, 3, task.size, task.size), generator=generator, dtype=torch.uint8)
    return images.to(device), torch.randint(0, task.num_classes, (task.batch,), generator=generator).to(device)
