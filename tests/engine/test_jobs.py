"""Jobs in this process and in processes of their own, and signals that arrive in between."""

import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from resnet_backbone.engine import jobs
from resnet_backbone.engine.jobs import Job, interruptible, run_jobs
from resnet_backbone.engine.processes import SIGNALS
from resnet_backbone.errors import InputError, Interrupted

LIMIT = 120  # seconds that something may take on a machine with better things to do

logger = logging.getLogger("test_jobs")


def wait_for(*files: Path) -> None:
    end = time.monotonic() + LIMIT
    while not all(file.is_file() for file in files):
        assert time.monotonic() < end, f"{files} did not appear"
        time.sleep(0.02)


# ---- what jobs do, in new processes


def meet(folder: Path, name: str, other: str) -> None:
    """Wait for the other job, and note the threads of this one."""
    print(f"{name} says something")
    (folder / f"{name} began").touch()
    wait_for(folder / f"{other} began")
    (folder / f"{name} threads").write_text(str(torch.get_num_threads()))


def diverge(folder: Path, name: str, other: str) -> None:
    meet(folder, name, other)
    raise InputError("the loss is not a number.")


def stumble(folder: Path, name: str) -> None:
    """Note which of the first two are still at work, and fail."""
    seen = [other for other in ("first", "second") if not (folder / f"{other} threads").is_file()]
    (folder / f"{name} saw").write_text(" ".join(seen))
    raise ZeroDivisionError("a bug")


def sleep(folder: Path, name: str) -> None:
    """As outside a training loop."""
    (folder / f"{name} began").touch()
    time.sleep(LIMIT)


def train(folder: Path, name: str) -> None:
    """As a training loop that was at its last iteration at the first signal, and so leaves at the next."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(time.monotonic()))
    (folder / f"{name} began").touch()
    while len(received) < 2:
        time.sleep(0.02)
    (folder / f"{name} saved").touch()
    raise Interrupted("saved")


# ---- side by side


def test_so_many_run_at_a_time_and_one_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "STATUS_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    calls = {
        "first": partial(meet, tmp_path, "first", "second"),
        "second": partial(diverge, tmp_path, "second", "first"),
        "third": partial(stumble, tmp_path, "third"),
    }
    todo = [Job(title, call, lambda title=title: f"{title} is at work") for title, call in calls.items()]
    stopped = run_jobs(todo, at_a_time=2, logger=logger)
    assert sorted(job.title for job in stopped) == ["second", "third"]
    assert (tmp_path / "first threads").is_file(), "two at a time"
    assert len((tmp_path / "third saw").read_text().split()) <= 1, "no more than two"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {int(file.read_text()) for file in tmp_path.glob("* threads")} == {share}
    output = capfd.readouterr()
    assert output.out == "", "each has its log"
    assert "error: second: the loss is not a number." in output.err and "ZeroDivisionError: a bug" in output.err
    lines = [record.getMessage() for record in caplog.records]
    assert {"first begins", "first is finished", "second stopped with exit code 2"} <= set(lines)
    assert "third stopped with exit code 1" in lines
    assert any(line.endswith(" is at work") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_what_the_jobs_then_do_is_waited_for(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(jobs, "AGAIN_SECONDS", 0.5)
    caplog.set_level(logging.INFO)
    before = [signal.getsignal(other) for other in SIGNALS]
    todo = [
        Job("asleep", partial(sleep, tmp_path, "asleep"), str),
        Job("training", partial(train, tmp_path, "training"), str),
        Job("waiting", partial(sleep, tmp_path, "waiting"), str),
    ]

    def send() -> None:
        wait_for(tmp_path / "asleep began", tmp_path / "training began")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        run_jobs(todo, at_a_time=2, logger=logger)
    sender.join()
    assert (tmp_path / "training saved").is_file()
    assert not (tmp_path / "waiting began").exists(), "none begins after the signal"
    codes = {record.getMessage() for record in caplog.records if "stopped" in record.getMessage()}
    assert codes == {"asleep stopped with exit code 75", "training stopped with exit code 75"}
    assert [signal.getsignal(other) for other in SIGNALS] == before


# ---- in this process


def test_one_at_a_time_they_run_here(capsys, caplog):
    caplog.set_level(logging.INFO)
    done = []

    def fail() -> None:
        raise InputError("it diverged.")

    todo = [Job("bad", fail, str), Job("good", lambda: done.append(os.getpid()), str)]
    assert run_jobs(todo, at_a_time=1, logger=logger) == todo[:1]
    assert done == [os.getpid()]
    assert capsys.readouterr().err == "error: bad: it diverged.\n"
    assert [record.getMessage() for record in caplog.records] == ["bad (1 of 2)", "good (2 of 2)"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_a_job_here_too_once(number):
    before, cleaned = [signal.getsignal(other) for other in SIGNALS], []

    def job() -> None:
        try:
            try:
                os.kill(os.getpid(), number)
                pytest.fail("went on")
            except Exception as error:
                pytest.fail(f"{error!r} could have been held back by a library")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append("wholly")

    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        run_jobs([Job("one", job, str), Job("two", pytest.fail, str)], at_a_time=1, logger=logger)
    assert cleaned == ["wholly"]
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_function_can_be_interruptible():
    @interruptible()
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    for _ in range(2):
        with pytest.raises(Interrupted, match="SIGUSR1"):
            wait()
