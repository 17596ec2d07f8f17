"""Run independent jobs, sequentially or in parallel, until a signal asks them to stop."""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from resnet_backbone.engine.processes import handled, install_handler
from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted

STATUS_SECONDS = 60.0
AGAIN_SECONDS = 5.0  # between repeated requests to a process that has not exited yet


class Job(NamedTuple):
    """A unit of work, such as training a network.

    Attributes:
        title: the job's name in log lines and errors.
        call: does the work. It must be picklable to run in a process of its own.
        status: a short progress report; called while the job runs in another process.
    """

    title: str
    call: Callable[[], object]
    status: Callable[[], str]


class _Running(NamedTuple):
    process: BaseProcess
    job: Job
    slot: int


class _Left(BaseException):
    """Raised by a signal handler at any point; a BaseException, so that no `except Exception` catches it."""


def run_jobs(jobs: Sequence[Job], *, at_a_time: int, logger: logging.Logger) -> list[Job]:
    """Run all jobs, `at_a_time` at once; when all are done, return those that failed.

    With `at_a_time` 1, jobs run in this process. Otherwise each job runs in its own process, with its share of the
    cores or its own GPU, and prints only errors, while this process reports progress.

    A job fails on an InputError, whose message is printed; in its own process, any other error fails it too.

    Raises:
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, once the running jobs have exited. Training loops save first.
    """
    if at_a_time == 1:
        with interruptible():
            return _one_after_the_other(jobs, logger)
    return _side_by_side(jobs, at_a_time, logger)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGTERM, SIGUSR1 or Ctrl-C, at any point in this process.

    A training loop installs its own handlers, which save first.
    """
    try:
        with handled(_leave_once()):
            yield
    except _Left as left:
        raise Interrupted(f"{left}: what is finished is kept.") from None


def _one_after_the_other(jobs: Sequence[Job], logger: logging.Logger) -> list[Job]:
    stopped = []
    for number, job in enumerate(jobs, 1):
        logger.info("%s (%d of %d)", job.title, number, len(jobs))
        try:
            job.call()
        except InputError as error:
            print(f"error: {job.title}: {error}", file=sys.stderr)
            stopped.append(job)
    return stopped


def _side_by_side(jobs: Sequence[Job], at_a_time: int, logger: logging.Logger) -> list[Job]:
    context = multiprocessing.get_context("spawn")
    waiting, running, stopped = list(jobs), [], []
    left: list[str] = []

    def leave(number: int, _frame: object) -> None:
        left.append(signal.Signals(number).name)
        ask_to_leave()

    def ask_to_leave() -> None:
        for other in running:
            other.process.terminate()  # SIGTERM, on which a training loop saves

    told = time.monotonic()
    with handled(leave):
        try:
            while running or (waiting and not left):
                while waiting and len(running) < at_a_time and not left:
                    job = waiting.pop(0)
                    slot = min(set(range(at_a_time)) - {other.slot for other in running})
                    process = context.Process(target=_process, args=(job.title, job.call, slot, at_a_time))
                    # The child inherits this; otherwise Ctrl-C during its imports would print a stack trace.
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    process.start()
                    signal.signal(signal.SIGINT, leave)
                    running.append(_Running(process, job, slot))
                    logger.info("%s begins", job.title)
                multiprocessing.connection.wait([other.process.sentinel for other in running], timeout=AGAIN_SECONDS)
                for other in [other for other in running if not other.process.is_alive()]:
                    running.remove(other)
                    code = other.process.exitcode
                    logger.info("%s %s", other.job.title, f"stopped with exit code {code}" if code else "is finished")
                    if code:
                        stopped.append(other.job)
                if left:
                    ask_to_leave()  # a loop in its last iteration ignored the first request and moved on
                elif time.monotonic() - told >= STATUS_SECONDS:
                    told = time.monotonic()
                    for other in running:
                        logger.info("%s: %s", other.job.title, other.job.status())
        finally:
            ask_to_leave()  # some are left only if this process failed
    if left:
        raise Interrupted(f"{left[0]}: the jobs under way were saved.")
    return stopped


def _process(title: str, call: Callable[[], object], slot: int, at_a_time: int) -> None:
    """Entry point of a job's process."""
    install_handler(_leave_once())
    try:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // at_a_time))
        if torch.cuda.is_available():
            torch.cuda.set_device(slot % torch.cuda.device_count())
        # Interleaved logs are unreadable; each run has its own log.txt.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            call()
    except InputError as error:
        print(f"error: {title}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt, _Left):
        sys.exit(EXIT_INTERRUPTED)
    finally:
        install_handler(signal.SIG_IGN)  # a repeated signal must not change the exit code during shutdown


def _leave_once() -> Callable[[int, object], None]:
    """A handler that raises _Left on the first signal only.

    A second signal must not disrupt the shutdown: a terminal or scheduler may signal all processes, and the process
    that runs the jobs forwards the signal as well.
    """
    process, received = os.getpid(), []

    def leave(number: int, _frame: object) -> None:
        if received or os.getpid() != process:  # forked processes share the handler
            return
        received.append(number)
        raise _Left(signal.Signals(number).name)

    return leave
