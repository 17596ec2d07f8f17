"""Processes that train together: how they begin, and how all of them end when one does.

They are started here (`spawn`), or by torchrun or a scheduler, which tell each its ranks (`given_rank_info`,
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
from typing import NamedTuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted

EXIT_CTRL_C = 128 + signal.SIGINT  # a signal, as shells count it
COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 5.0  # seconds that the others have to notice by themselves that one is gone


class RankInfo(NamedTuple):
    """One process among those that train together.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine. Every machine runs as many, and their ranks follow each other.
        url: where the processes find each other, for `torch.distributed.init_process_group`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


class Ending(NamedTuple):
    """How a process ended: its exit code, and a sentence or a stack trace that says why."""

    code: int
    text: str = ""


def given_rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The ranks that torchrun, or a script that sets the same variables, gave to this process; None without any.

    Raises:
        ConfigError: variables are missing or contradict each other.
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
    """Call `call` in a process that something else started, with the process group that it belongs to.

    If it fails, the process says why and ends at once: the others may wait for it in a collective operation, and
    whoever started them ends them when one is gone.
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
    """Call `call` in a new process for each of this machine's ranks, with the process group that it belongs to.

    A process that fails ends the others. SIGTERM, SIGUSR1 and Ctrl-C are passed on, and what the processes then do is
    waited for; a second Ctrl-C ends them at once.

    Returns:
        The exit code: 0, or that of a process that failed, after its stack trace or signal was printed.

    Raises:
        InputError: a process raised one.
        Interrupted: the processes saved and left.
    """
    endings = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with _ignored(signal.SIGINT):  # which they inherit: in the middle of their imports, Ctrl-C prints stack traces
        context = torch.multiprocessing.spawn(
            _process, args=(infos, call, on_gpu, endings), nprocs=len(infos), join=False
        )
    processes, said = context.processes, []

    def wait(seconds: float = float("inf"), *, for_all: bool = False) -> None:
        """Until one has failed or all have ended, or else for so long; take in what they say, so that they can go."""
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
    """The exit code for processes that ended so, after saying what there is to say.

    Args:
        codes: of the processes, as `multiprocessing` counts them; None for one that did not end by itself.
        said: what they said, in this order.
        received: the signals that were passed on to them.

    Raises:
        InputError, Interrupted: as `spawn`.
    """
    first = {ending.code: ending.text for ending in reversed(said)}
    if received.count(signal.SIGINT) > 1 or not any(codes):
        return EXIT_CTRL_C if any(codes) else 0
    # Where one process stopped for an InputError, what the others then say is its consequence.
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
    code = min(code for code in codes if code)  # a signal before an exit code, which may be its consequence
    return code if code > 0 else 128 - code


def _process(number: int, infos: Sequence[RankInfo], call: Callable[[], object], on_gpu: bool, endings) -> None:
    """What a spawned process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(infos)))
    ending = _work(infos[number], call, on_gpu)
    if ending.code:
        endings.put(ending)
        leave(ending.code)


def _work(info: RankInfo, call: Callable[[], object], on_gpu: bool) -> Ending:
    """Join the other processes, call, and part from them."""
    try:
        _join(info, on_gpu)
        call()
        dist.destroy_process_group()
    except InputError as error:
        return Ending(EXIT_BAD_INPUT, str(error))
    except Interrupted as error:
        with contextlib.suppress(RuntimeError):  # one of them may have died meanwhile
            dist.barrier()  # it is raised in all of them; the first to go would end those that still write
        return Ending(EXIT_INTERRUPTED, str(error))
    except KeyboardInterrupt:
        return Ending(EXIT_CTRL_C, "interrupted")
    except Exception as error:
        get_error_handler().record_exception(error)  # for torchrun, which shows it in its summary
        return Ending(1, f"process {info.rank} of {info.world_size}:\n{traceback.format_exc()}")
    return Ending(0)


def _join(info: RankInfo, on_gpu: bool) -> None:
    """Take this process's GPU, enter the group of all processes, and tell Detectron2 those of this machine."""
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
    for first in range(0, info.world_size, info.local_size):  # every process must take part in making every group
        ranks = list(range(first, first + info.local_size))
        group = dist.new_group(ranks)
        if info.rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group  # Detectron2 0.6 offers no other way to set it


def _is_first_to_say() -> bool:
    """Whether no other process has asked before; in doubt, yes."""
    try:
        return dist.distributed_c10d._get_default_store().add("resnet_backbone: something to say", 1) == 1
    except (RuntimeError, ValueError):  # the process that keeps the count is gone, or there never was one
        return True


def leave(code: int) -> None:
    """End this process at once.

    At the interpreter's own end, a process group that is still referred to waits for the other processes, or aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    former = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, former)


@contextlib.contextmanager
def _forwarded(processes: Sequence[BaseProcess]) -> Iterator[list[signal.Signals]]:
    """Pass signals on to the processes; the list that is given holds those received so far."""
    received: list[signal.Signals] = []

    def handle(number: int, _frame: object) -> None:
        again = number == signal.SIGINT and number in received
        received.append(signal.Signals(number))
        for process in processes:
            if again:
                process.kill()
            elif process.is_alive():
                # From a terminal Ctrl-C has reached them already, and a second one would end them.
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former = {number: signal.signal(number, handle) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
