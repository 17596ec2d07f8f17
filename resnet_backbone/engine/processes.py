"""Processes that train together: how they start, and how all of them end when one does.

They are started here (`spawn`), or by torchrun or a scheduler, which tells each process its ranks (`given_rank_info`,
`run_given`).
"""

import contextlib
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.distributed import lost_another_process
from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_CTRL_C, EXIT_INTERRUPTED, InputError, Interrupted

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # ask a run to stop
GRACE = 5.0  # seconds for the others to notice by themselves that one is gone


class RankInfo(NamedTuple):
    """One of the processes that train together.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine. All machines run the same number, with consecutive ranks on each.
        url: the rendezvous address for `torch.distributed.init_process_group`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


class Ending(NamedTuple):
    """How a process ended: its exit code, and a message or stack trace saying why."""

    code: int
    text: str = ""


def given_rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The ranks that torchrun, or a script that sets the same variables, gave this process; None if unset.

    Raises:
        ConfigError: variables are missing or inconsistent.
    """
    if "LOCAL_RANK" not in environment:
        return None
    names = (*COUNTS, "MASTER_ADDR")
    if missing := [name for name in names if not environment.get(name)]:
        raise ConfigError(
            f"the environment has LOCAL_RANK, as torchrun sets it, but not {', '.join(missing)}. Set "
            f"{', '.join(names)}; or unset LOCAL_RANK, to train in processes that this command starts."
        )
    found = ", ".join(f"{name} {environment[name]}" for name in COUNTS)
    try:
        rank, world_size, local_rank, local_size, _ = (int(environment[name]) for name in COUNTS)
    except ValueError:
        raise ConfigError(f"the environment has {found}; expected whole numbers.") from None
    fits = 0 <= local_rank < local_size and 0 <= rank < world_size and world_size % local_size == 0
    if not fits or rank % local_size != local_rank:
        raise ConfigError(
            f"the environment has {found}; expected the same number of processes on each machine, counted from 0, one "
            "machine after the other."
        )
    return RankInfo(rank, world_size, local_rank, local_size, "env://")


def run_given(info: RankInfo, call: Callable[[], object], *, on_gpu: bool) -> None:
    """Call `call` within its process group, in a process that something else started.

    On failure, the process reports why and exits immediately: the others may be waiting for it in a collective
    operation, and their launcher ends them once one is gone.
    """
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // info.local_size)))
    ending = _work(info, call, on_gpu)
    if not ending.code:
        return
    if ending.code == EXIT_BAD_INPUT:
        if _is_first_to_say():
            print(f"error: {ending.text}", file=sys.stderr)
    elif ending.code != EXIT_INTERRUPTED or info.rank == 0:
        print(ending.text, file=sys.stderr)
    leave(ending.code)


def spawn(infos: Sequence[RankInfo], call: Callable[[], object], *, on_gpu: bool) -> int:
    """Call `call` within its process group, in a new process for each of this machine's ranks.

    If one process fails, the others are killed. SIGTERM, SIGUSR1 and Ctrl-C are forwarded, and this process waits for
    the others to act on them; a second Ctrl-C kills them immediately.

    Returns:
        The exit code: 0, or that of a failed process, whose stack trace or signal has been printed.

    Raises:
        InputError: a process raised one.
        Interrupted: the processes saved and exited.
    """
    endings = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with _ignored(signal.SIGINT):  # inherited, else Ctrl-C during their imports prints stack traces
        context = torch.multiprocessing.spawn(
            _process, args=(infos, call, on_gpu, endings), nprocs=len(infos), join=False
        )
    processes, said = context.processes, []

    def wait(seconds: float = float("inf"), *, for_all: bool = False) -> None:
        """Wait until one has failed, all have ended or time is up; drain their messages, so that they can exit."""
        end = time.monotonic() + seconds
        while True:
            running = [process.sentinel for process in processes if process.is_alive()]
            while not endings.empty():
                said.append(endings.get())
            failed = not for_all and any(process.exitcode for process in processes)
            if not running or failed or time.monotonic() > end:
                break
            multiprocessing.connection.wait(running, timeout=0.2)

    with _forwarded(processes) as received:
        try:
            wait()
            wait(GRACE, for_all=True)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return _judge(codes, said, received)


def _judge(codes: Sequence[int | None], said: Sequence[Ending], received: Sequence[signal.Signals]) -> int:
    """Report how the processes ended and return the exit code.

    Args:
        codes: their exit codes in `multiprocessing`'s convention; None for a process that did not end by itself.
        said: their messages, in order.
        received: the signals that were forwarded to them.

    Raises:
        InputError, Interrupted: as in `spawn`.
    """
    first = {ending.code: ending.text for ending in reversed(said)}
    if received.count(signal.SIGINT) > 1 or not any(codes):
        return EXIT_CTRL_C if any(codes) else 0
    # If one process stopped with an InputError, the others' messages are just a consequence.
    if EXIT_BAD_INPUT in first:
        raise InputError(first[EXIT_BAD_INPUT])
    if 1 in first:
        print(first[1], file=sys.stderr)
    elif EXIT_INTERRUPTED in first:
        raise Interrupted(first[EXIT_INTERRUPTED])
    elif received:
        print(f"{received[0].name}: left without saving, not being in the training loop", file=sys.stderr)
        return 128 + received[0]
    for number, code in enumerate(codes):
        if code and not (code > 0 and code in first):
            by = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            print(f"error: process {number} ended {by}.", file=sys.stderr)
    code = min(code for code in codes if code)  # prefer a signal; an exit code may be its consequence
    return code if code > 0 else 128 - code


def _process(number: int, infos: Sequence[RankInfo], call: Callable[[], object], on_gpu: bool, endings) -> None:
    """Entry point of a spawned process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(infos)))
    ending = _work(infos[number], call, on_gpu)
    if ending.code:
        endings.put(ending)
        leave(ending.code)


def _work(info: RankInfo, call: Callable[[], object], on_gpu: bool) -> Ending:
    """Join the process group, call `call`, and leave the group."""
    try:
        _join(info, on_gpu)
        call()
        dist.destroy_process_group()
    except InputError as error:
        return Ending(EXIT_BAD_INPUT, str(error))
    except Interrupted as error:
        with contextlib.suppress(RuntimeError):  # a process may have died meanwhile
            dist.barrier()  # all processes get here; the first to exit would kill those still writing
        return Ending(EXIT_INTERRUPTED, str(error))
    except KeyboardInterrupt:
        return Ending(EXIT_CTRL_C, "interrupted")
    except Exception as error:
        get_error_handler().record_exception(error)  # for torchrun's summary
        this = f"process {info.rank} of {info.world_size}"
        if lost_another_process(error):
            return Ending(1, f"{this}: the connection to another process broke ({' '.join(str(error).split())}).")
        return Ending(1, f"{this}:\n{traceback.format_exc()}")
    return Ending(0)


def _join(info: RankInfo, on_gpu: bool) -> None:
    """Select this process's GPU, join the global process group, and give Detectron2 this machine's group."""
    if on_gpu:
        if (seen := torch.cuda.device_count()) <= info.local_rank:
            raise ConfigError(
                f"process {info.local_rank} of {info.local_size} on this machine sees {seen} GPUs, and takes the one "
                "of its own number. Start fewer processes, or let each see all GPUs of its machine."
            )
        torch.cuda.set_device(info.local_rank)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=info.url,
            world_size=info.world_size,
            rank=info.rank,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = info.url
        if where == "env://":
            where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{info.world_size} processes did not find each other at {where} ({reason}). Give the address of the "
            "first machine and a free port that the others can reach, and start the command on every machine."
        ) from error
    for first in range(0, info.world_size, info.local_size):  # all processes must help create every group
        ranks = list(range(first, first + info.local_size))
        group = dist.new_group(ranks)
        if info.rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group  # Detectron2 0.6 offers no other way to set it


def _is_first_to_say() -> bool:
    """Whether this process is the first to ask; True if in doubt."""
    try:
        return dist.distributed_c10d._get_default_store().add("resnet_backbone: something to say", 1) == 1
    except (RuntimeError, ValueError):  # the process that hosts the store is gone, or there never was one
        return True


def leave(code: int) -> None:
    """Exit this process immediately.

    In a normal interpreter shutdown, a process group that is still referenced would wait for the others or abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set handlers
        yield
        return
    former = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, former)


@contextlib.contextmanager
def _forwarded(processes: Sequence[BaseProcess]) -> Iterator[list[signal.Signals]]:
    """Forward signals to the processes; yields the list of signals received so far."""
    received: list[signal.Signals] = []

    def handle(number: int, _frame: object) -> None:
        again = number == signal.SIGINT and number in received
        received.append(signal.Signals(number))
        for process in processes:
            if again:
                process.kill()
            elif process.is_alive():
                # A terminal's Ctrl-C has reached them already, and a second one would kill them.
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    with handled(handle):
        yield received


@contextlib.contextmanager
def handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Handle SIGNALS with `handle` in the main thread, and restore the previous handlers at the end."""
    former = install_handler(handle)
    try:
        yield
    finally:
        restore_handlers(former)


def install_handler(handle: Callable[[int, object], None] | signal.Handlers) -> dict[signal.Signals, Any]:
    """Install a handler for SIGNALS; return the previous handlers."""
    return {number: signal.signal(number, handle) for number in SIGNALS}


def restore_handlers(former: Mapping[signal.Signals, Any]) -> None:
    """Undo `install_handler`."""
    for number, handler in former.items():
        signal.signal(number, handler)
