"""Runs of tools/pretrain.py in process groups of their own, and what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from resnet_backbone.weights import read_checkpoint

ROOT = Path(__file__).parents[3]
WAIT = 120  # seconds that something may take on a machine with better things to do
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TIMES = ("images_per_second", "data_share")


class Run:
    """A run in a process group of its own.

    Args:
        status: given seconds, waits so long at most for the exit status; None if the run has not ended by then.
    """

    def __init__(self, pid: int, output: Path, status: Callable[[float], int | None]):
        self.pid = pid
        self.output = output
        self._status = status

    def wait_for(self, text: str) -> None:
        """Wait until `text` was printed."""
        end = time.monotonic() + WAIT
        while text not in (printed := self.output.read_text() if self.output.exists() else ""):
            if time.monotonic() > end:
                self._give_up(f"{text!r} was not printed")
            time.sleep(0.002)
            assert "\nTraceback" not in printed, printed

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """Send a signal to the main process or to all of the group, and let go on what was held."""
        (os.killpg if to_all else os.kill)(self.pid, number)
        self.release()

    def release(self) -> None:
        Path(f"{self.output}.release").touch()

    def end(self) -> tuple[int, str]:
        """The exit status (a signal as a negative number) and all that was printed."""
        if (status := self._status(WAIT)) is None:
            self._give_up("the run has not ended")
        return status, self.output.read_text()

    def _give_up(self, reason: str) -> NoReturn:
        os.killpg(self.pid, signal.SIGKILL)
        self._status(WAIT)
        pytest.fail(f"{reason} after {WAIT} s:\n{self.output.read_text() if self.output.exists() else ''}")


def command(output: Path, words: list[str]) -> Run:
    """`python tools/pretrain.py` with these words, in a process group of its own."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "pretrain.py"), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=ENVIRONMENT,
        )

    def status(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)

    return Run(process.pid, output, status)


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What metrics.json says of each iteration, without times; that no line contradicts another is checked."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        before = found.setdefault(values["iteration"], {})
        values = {name: value for name, value in values.items() if name not in (*TIMES, "iteration")}
        assert not before.keys() & values.keys(), f"{line} is there twice"
        before |= values
    return found


def assert_same(folder: Path, whole: Path) -> None:
    """Everything that two finished runs leave behind is the same, bit for bit, but times."""
    names = {file.name for file in folder.iterdir() if not file.name.startswith("events.")}
    assert names == {file.name for file in whole.iterdir() if not file.name.startswith("events.")}
    assert {"model_final.pth", "model_best.pth", (whole / "last_checkpoint").read_text()} <= names
    for name in (name for name in names if name.endswith(".pth")):
        one, other = read_checkpoint(folder / name), read_checkpoint(whole / name)
        assert one.metadata == other.metadata and one.iteration == other.iteration
        assert_equal(dict(one.model), dict(other.model), f"{name}: ")
        if one.trainer is not None or other.trainer is not None:
            states = [dict(checkpoint.trainer) for checkpoint in (one, other)]
            configs = [state.pop("config") for state in states]
            assert all(
                state.pop("config_sha256") and config.pop("OUTPUT_DIR") for state, config in zip(states, configs)
            )
            assert_equal(*configs, f"{name}: config")
            assert_equal(*states, f"{name}: trainer")
    for name in ("results.json", "last_checkpoint"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(folder) == metrics(whole)


def assert_equal(one, other, where: str) -> None:
    """Two trees of dicts, lists, tensors and plain values are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where
