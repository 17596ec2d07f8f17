"""Runs of a tiny network that the engine's tests share, and a pair of processes."""

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.output import read_last_checkpoint
from resnet_backbone.engine.train import train
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Metadata, read_checkpoint

IMAGES = torch.randn(37, 3, 6, 6, generator=torch.Generator().manual_seed(1))
TIMES = ("images_per_second", "data_share")
# What torchrun tells a process: the second of four on the second machine.
VARIABLES = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


class Batch(NamedTuple):
    number: list[int]  # of the iteration, once for each image
    images: torch.Tensor


def metadata(iterations: int, **results: float) -> Metadata:
    return Metadata(
        kind="classifier",
        architecture="tiny",
        arguments={},
        channel_order="RGB",
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
        norm_statistics="running",
        norm_epsilon=1e-5,
        class_names=("a", "b"),
        origin={"iterations": iterations, **results},
    )


@dataclass
class TinyTask:
    """A task of given functions."""

    batches: Callable[[int], Iterable[Any]]
    losses: Callable[[nn.Module, Any], tuple[dict, dict]]
    evaluate: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    metadata: Callable[..., Metadata] = metadata
    image_names: Callable[[int], Sequence[str]] = lambda iteration: ()
    num_images: int = 37
    best_metric: str = ""

    def compile(self, model: nn.Module) -> None:
        model.compile()


def build_model(channels: int = 4, *, norm: bool = True, dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(channels * 16, 2),
    ).to(memory_format=torch.channels_last)


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).float().square().mean()


def build(model: nn.Module | None = None, losses=None, *, optimizer=None, hooks=(), **arguments) -> Trainer:
    """A trainer whose batch is the iteration's number; `losses` maps (model, iteration) to the two dicts."""
    model = model or nn.Linear(1, 1)

    def default(model, iteration):
        return {"loss": model(torch.ones(1, 1)).sum()}, {}

    defaults = dict(
        images_per_batch=4, seed=1, log_period=4, batches=lambda start: iter(range(start, 10**6)), loss_fn=default
    )
    trainer = Trainer(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.0),
        **{**defaults, **({"loss_fn": losses} if losses else {}), **arguments},
    )
    trainer.register_hooks(list(hooks))
    return trainer


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """The one sentence of the ConfigError that a call must raise."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)
    return str(caught.value)


class Reads(TorchDispatchMode):
    """Counts the times that a tensor's value comes to the host: `item`, `bool`, `int`, `float`, `nonzero`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.count += 1
        return function(*arguments, **(named or {}))


class Run:
    """One run of a tiny convolutional network with batch normalization and dropout, on batches by the sampler.

    Args:
        stop_at: the iteration before which it is broken off, as a kill would.
        factor: given the iteration, what the logits are multiplied by.
        error: given the iteration, the training error that is reported.
        scores: the AP of one evaluation after the other, by the iteration that follows.
        metric: which selects the best weights.
        num_images: what the task says.
        during_fetch, during_step, during_evaluation: called with the iteration.
    """

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        *,
        resume: bool = False,
        stop_at: int | None = None,
        model: nn.Module | None = None,
        factor: Callable[[int], float] = lambda i: 1.0,
        error: Callable[[int], float] | None = None,
        scores: Callable[[int], float] = lambda i: 1.5,
        metric: str = "bbox/AP",
        num_images: int = 37,
        during_fetch: Callable[[int], object] = lambda i: None,
        during_step: Callable[[int], object] = lambda i: None,
        during_evaluation: Callable[[int], object] = lambda i: None,
    ):
        folder.mkdir(exist_ok=True)
        self.model = model or build_model()
        self.optimizer = build_optimizer(cfg, self.model)
        self.seen: list[list[tuple[int, int]]] = []
        self.evaluated: list[int] = []
        self.modes: list[bool] = []
        self.last = last = read_last_checkpoint(folder) if resume else None
        torch.rand(11 if resume else 0)  # whatever drew from the generator before must not matter
        self._next = 0 if last is None else last.iteration + 1

        def batches(start: int) -> Iterator[Batch]:
            for number, pairs in enumerate(BatchSampler(37, 4, seed=cfg.SEED, start_iteration=start), start):
                if number == stop_at:
                    raise KeyboardInterrupt
                during_fetch(number)
                self.seen.append(pairs)
                yield Batch([number] * 4, IMAGES[[index for _, index in pairs]])

        def compute(model: nn.Module, batch: Batch):
            number = batch.number[0]
            during_step(number)
            self._next = number + 1
            logits = model(batch.images) * factor(number)
            wrong = logits.float().mean().detach() if error is None else torch.tensor(float(error(number)))
            return {"loss_cls": logits.float().square().mean()}, {"top1_error": wrong}

        def evaluate(model: nn.Module) -> dict[str, Any]:
            during_evaluation(self._next)
            self.evaluated.append(self._next)
            torch.rand(3)
            model.eval()
            with torch.no_grad():
                self.sums = model(IMAGES[:2]).sum().item()
            return {"bbox": {"AP": scores(self._next), "sum": self.sums}}

        try:
            task = TinyTask(
                batches=batches,
                losses=compute,
                evaluate=evaluate,
                metadata=metadata,
                num_images=num_images,
                best_metric=metric,
                image_names=lambda i: [f"image {index}" for _, index in BatchSampler(37, 4, seed=cfg.SEED).batch(i)],
            )
            self.result, self.iterations = train(cfg, task, self.model, self.optimizer, folder=folder, resume_from=last)
        except KeyboardInterrupt:
            assert stop_at is not None

    def momenta(self) -> list[torch.Tensor]:
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]


def assert_same_files(one, other) -> None:
    """Everything in two folders of finished runs but times, the log and TensorBoard's files."""
    names = [{p.name for p in folder.iterdir() if not p.name.startswith("events.")} for folder in (one, other)]
    assert names[0] == names[1]
    assert metrics(one, times=False) == metrics(other, times=False)
    for name in names[0]:
        if name.endswith(".pth"):
            ours, theirs = read_checkpoint(one / name), read_checkpoint(other / name)
            assert_equal(ours.model, theirs.model, name)
            assert ours.metadata == theirs.metadata
            assert_equal(ours.trainer, theirs.trainer, name)
        elif name != "metrics.json":
            assert (one / name).read_bytes() == (other / name).read_bytes()


def assert_same(one: Run, other: Run) -> None:
    """Two runs ended with the same weights, statistics and momenta, bit for bit."""
    assert_equal(one.model.state_dict(), other.model.state_dict())
    assert_equal(one.momenta(), other.momenta())
    assert_equal(one.result.state_dict(), other.result.state_dict())


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Two trees of dicts, lists, tensors and plain values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{number}]")
    else:
        assert one == other, where


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of weights, statistics and momenta."""
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for g in optimizer.param_groups for p in g["params"]]
    return {"model": {k: v.clone() for k, v in model.state_dict().items()}, "momenta": momenta}


def metrics(folder: Path, *, times: bool = True) -> list[dict[str, float]]:
    """The lines of metrics.json."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return lines if times else [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def in_two_processes(function: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = 120) -> list[Any]:
    """What `function(*arguments)` returns in each of two processes that are joined by gloo, in order of rank.

    They are forked from this one, so everything is imported already. What is returned must be plain values and tensors.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(rank, folder, function, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            process.kill()
            process.join()
    failures = [(folder / f"error{rank}.txt") for rank in range(2)]
    assert not any(file.exists() for file in failures), "\n".join(f.read_text() for f in failures if f.exists())
    assert [process.exitcode for process in processes] == [0, 0], "a process did not come to its end"
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
        torch.save(function(*arguments), folder / f"result{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise
