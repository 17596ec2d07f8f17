"""What happens to a run: signals, lost processes, a full disk."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from resnet_backbone.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED

FILLER = "filler"  # the file that fills the disk of the output folder


def kill_all(run: subprocess.Popen, disk: Path, rng: random.Random) -> bool:
    """SIGKILL to all processes: a node is lost."""
    os.killpg(run.pid, signal.SIGKILL)
    return True


def ask(run: subprocess.Popen, disk: Path, rng: random.Random) -> bool:
    """SIGTERM to the command: preemption."""
    run.send_signal(signal.SIGTERM)
    return True


def kill_rank(run: subprocess.Popen, disk: Path, rng: random.Random) -> bool:
    """SIGKILL to one of the processes that train."""
    return _kill_one(ranks(run.pid), rng)


def kill_worker(run: subprocess.Popen, disk: Path, rng: random.Random) -> bool:
    """SIGKILL to one of the processes that load images, as the kernel does when memory runs out."""
    return _kill_one([child for rank in ranks(run.pid) for child in children(rank)], rng)


def fill_disk(run: subprocess.Popen, disk: Path, rng: random.Random) -> bool:
    """No space left where the run writes."""
    with contextlib.suppress(OSError), (disk / FILLER).open("wb", buffering=0) as file:
        while file.write(bytes(2**20)):
            pass
    return True


# Each accident with the exit codes that the run may end with, besides 0 if it was at its end already. The functions
# take the run, the disk that it writes to, and random numbers; they return whether there was anything to hit.
ACCIDENTS: dict[str, tuple[Callable[[subprocess.Popen, Path, random.Random], bool], set[int]]] = {
    "SIGKILL to all": (kill_all, {-signal.SIGKILL}),
    # The latter two outside of the training loop, before and after the two processes have started.
    "SIGTERM": (ask, {EXIT_INTERRUPTED, -signal.SIGTERM, 128 + signal.SIGTERM}),
    "SIGKILL to a rank": (kill_rank, {128 + signal.SIGKILL}),
    "SIGKILL to a worker": (kill_worker, {EXIT_BAD_INPUT}),
    "full disk": (fill_disk, {EXIT_BAD_INPUT}),
}


def ranks(parent: int) -> list[int]:
    """Return the training processes that the command `parent` started."""
    return [child for child in children(parent) if b"spawn_main" in _command(child)]


def children(process: int) -> list[int]:
    """Return a process's children; none if it has ended."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{process}/task").iterdir()
        return sorted({int(child) for task in tasks for child in (task / "children").read_text().split()})
    return []


def _command(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def _kill_one(processes: list[int], rng: random.Random) -> bool:
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(rng.choice(processes), signal.SIGKILL)
        return True
    return False
