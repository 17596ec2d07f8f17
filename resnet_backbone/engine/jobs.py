"""Independent jobs, one after the other or side by side, until a signal asks to leave."""

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
from typing import Any, NamedTuple

import torch

from resnet_backbone.engine.processes import FORWARDED
from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted

STATUS_SECONDS = 60.0
AGAIN_SECONDS = 5.0  # after which a process that has not left is asked again


class Job(NamedTuple):
    """Something to do, such as training a network.

    Attributes:
        title: its name in log lines and errors.
        call: does it. To run in a process of its own, it must be picklable.
        status: says in a few words how far it is; called while it runs in another process.
    """

    title: str
    call: Callable[[], object]
    status: Callable[[], str]


class _Running(NamedTuple):
    process: BaseProcess
    job: Job
    slot: int


class _Left(BaseException):
    """Raised by a signal wherever the process is: no `except Exception` on the way may hold it back."""


def run_jobs(jobs: Sequence[Job], *, at_a_time: int, logger: logging.Logger) -> list[Job]:
    """Run all jobs, `at_a_time` of them at once; return those that failed, after the others are done.

    With one at a time, they run in this process. With several, each runs in a process of its own, with its share of the
    cores or on its GPU, and prints nothing but errors; this process reports how far they are.

    A job fails with an InputError, whose sentence is printed; in a process of its own, with any other error too.

    Raises:
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, when the jobs under way have left. Training loops save first.
    """
    if at_a_time == 1:
        with interruptible():
            return _one_after_the_other(jobs, logger)
    return _side_by_side(jobs, at_a_time, logger)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGTERM, SIGUSR1 or Ctrl-C, wherever this process is.

    A training loop has handlers of its own, which save first.
    """
    try:
        with _handled(_leave_once()):
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
            other.process.terminate()  # by SIGTERM, on which a training loop saves

    told = time.monotonic()
    with _handled(leave):
        try:
            while running or (waiting and not left):
                while waiting and len(running) < at_a_time and not left:
                    job = waiting.pop(0)
                    slot = min(set(range(at_a_time)) - {other.slot for other in running})
                    process = context.Process(target=_process, args=(job.title, job.call, slot, at_a_time))
                    # Which it inherits: in the middle of its imports, Ctrl-C would print a stack trace.
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
                    ask_to_leave()  # a loop that was at its last iteration has gone on to what comes after it
                elif time.monotonic() - told >= STATUS_SECONDS:
                    told = time.monotonic()
                    for other in running:
                        logger.info("%s: %s", other.job.title, other.job.status())
        finally:
            ask_to_leave()  # none is left but after an error of this process
    if left:
        raise Interrupted(f"{left[0]}: the jobs under way were saved.")
    return stopped


def _process(title: str, call: Callable[[], object], slot: int, at_a_time: int) -> None:
    """What the process of a job does."""
    _handle(_leave_once())
    try:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // at_a_time))
        if torch.cuda.is_available():
            torch.cuda.set_device(slot % torch.cuda.device_count())
        # Several logs at once are unreadable; each run has its log.txt.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            call()
    except InputError as error:
        print(f"error: {title}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt, _Left):
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _handle(signal.SIG_IGN)  # else a signal that is sent again changes the exit code while the interpreter ends


def _leave_once() -> Callable[[int, object], None]:
    """A handler that raises _Left at the first signal.

    A second one must not break the way out: a terminal or a queue may send the same signal to all processes, and the
    process that runs the jobs passes it on.
    """
    process, received = os.getpid(), []

    def leave(number: int, _frame: object) -> None:
        if received or os.getpid() != process:  # a forked process, which shares the handler
            return
        received.append(number)
        raise _Left(signal.Signals(number).name)

    return leave


@contextlib.contextmanager
def _handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    former = _handle(handle)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _handle(handle: Callable[[int, object], None] | signal.Handlers) -> dict[signal.Signals, Any]:
    """Set what a signal does; return what it did."""
    return {number: signal.signal(number, handle) for number in FORWARDED}
