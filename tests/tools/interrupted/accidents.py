"""Starts runs of tools/pretrain.py in fresh processes, some of them with an accident at a chosen place.

A process forked from this one, in which everything is imported already, begins to train ten times sooner than one that
starts from nothing. One line of JSON on stdin asks for a run; the answers are its process id, when it has begun, and
its exit status as `subprocess` counts it, when it has ended.
"""

import errno
import io
import itertools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.tensorboard
from torch.utils.data import DataLoader

from resnet_backbone import pretraining  # noqa: F401  here already, instead of in each run
from resnet_backbone.data.sampler import EvaluationSampler
from resnet_backbone.engine.trainer import Trainer
from resnet_backbone.weights import files

TOOL = Path(__file__).parents[3] / "tools" / "pretrain.py"


def die() -> None:
    """As at a power failure: the whole process group, with the loader's workers."""
    os.killpg(0, signal.SIGKILL)


def die_while_writing(name: str) -> None:
    """Write half of the file that will be called `name`, then die."""

    def save(payload: dict, file: io.BufferedWriter) -> None:
        if f"/.{name}." not in os.readlink(f"/proc/self/fd/{file.fileno()}"):
            return whole(payload, file)
        buffer = io.BytesIO()
        whole(payload, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        die()

    whole, torch.save = torch.save, save


def die_before_rename(name: str, time: int = 1) -> None:
    """Die when a complete temporary file would become `name` for the `time`-th time."""
    _before("replace", lambda _, target: Path(target).name == name, time, die)


def die_before_removal(name: str) -> None:
    """Die when the older checkpoint `name` would be removed."""
    _before("unlink", lambda path, **_: Path(path).name == name, 1, die)


def _before(function: str, meant: Callable[..., bool], time: int, accident: Callable[[], None]) -> None:
    """Let `accident` happen before the `time`-th call of this function of `os` with arguments that are meant."""
    original, calls = getattr(os, function), 0

    def call(*arguments, **named):
        nonlocal calls
        calls += meant(*arguments, **named)
        if calls == time:
            accident()
        return original(*arguments, **named)

    setattr(os, function, call)


def fill_disk(name: str, where: str) -> None:
    """Leave no space for the file that will be called `name`: found out while writing, or only when flushing it."""

    class File(io.FileIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def is_meant(descriptor: int) -> bool:
        return f"/.{name}." in os.readlink(f"/proc/self/fd/{descriptor}")

    def fsync(descriptor: int) -> None:
        if is_meant(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    if where == "writing":
        files.open = lambda descriptor, mode: (File if is_meant(descriptor) else open)(descriptor, mode)
    else:
        flush, os.fsync = os.fsync, fsync


def hold_in_step(number: int) -> None:
    """Wait in the middle of the iteration `number`, whose batch was taken and whose workers have the next ones."""
    step = Trainer._step

    def held(trainer, batch) -> None:
        if trainer.iter == number:
            hold()
        step(trainer, batch)

    Trainer._step = held


def hold_in_evaluation(number: int) -> None:
    """Wait in the `number`-th evaluation, when each of its workers has given a batch."""
    iterate, count = DataLoader.__iter__, 0

    def held(loader):
        nonlocal count
        batches = iterate(loader)
        if not isinstance(loader.batch_sampler, EvaluationSampler) or not loader.num_workers:
            return batches
        count += 1
        return hold_after(batches, loader.num_workers) if count == number else batches

    def hold_after(batches, number_of_batches):
        yield from itertools.islice(batches, number_of_batches)
        hold()
        yield from batches

    DataLoader.__iter__ = held


def hold_before_training() -> None:
    """Wait when all is built and checked, before the first iteration."""
    run = sys.modules["resnet_backbone.engine.run"]
    train = run.train

    def held(*arguments, **named):
        hold()
        return train(*arguments, **named)

    run.train = held


def hold() -> None:
    """Say so, and wait until the test has sent its signal."""
    print("held", flush=True)
    for _ in range(6000):
        if Path(os.environ["RELEASE"]).exists():
            return
        time.sleep(0.01)


def run(words: list[str], output: str, accident: list) -> None:
    """Become `python tools/pretrain.py WORDS`, as the leader of a process group, printing to the file `output`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RELEASE"] = f"{output}.release"
    if accident:
        globals()[accident[0]](*accident[1:])
    sys.argv = [str(TOOL), *words]
    runpy.run_path(str(TOOL), run_name="__main__")


def serve() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return run(**json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
