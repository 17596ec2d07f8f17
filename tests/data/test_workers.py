import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from resnet_backbone.data import workers
from resnet_backbone.data.errors import DatasetError
from resnet_backbone.data.workers import STOPPING, Loader, explained_deaths, prepare_worker

ROOT = Path(__file__).parents[2]


def work(ready) -> None:
    prepare_worker(0)
    ready.set()
    time.sleep(60)


@pytest.fixture
def worker():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("number", STOPPING)
def test_a_strangers_signals_do_nothing(worker, number):
    send = f"import os; os.kill({worker.pid}, {int(number)})"
    subprocess.run([sys.executable, "-c", send], check=True)
    worker.join(0.5)
    assert worker.is_alive()


def test_the_parent_ends_it(worker):
    assert os.getpid() == multiprocessing.current_process().pid
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


class Numbers(Dataset):
    def __init__(self):
        self.unpicklable = lambda: None

    def __getitem__(self, number: int) -> int:
        return number


def load() -> list[list[int]]:
    return [batch.tolist() for batch in Loader(Numbers(), [[3, 1], [2]], workers=2)]


def test_workers_are_forked_where_others_would_be_spawned(monkeypatch):
    """As in a process that was spawned itself."""
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    assert multiprocessing.get_start_method() == "spawn"
    assert load() == [[3, 1], [2]]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_reaches_a_worker_at_its_very_beginning(monkeypatch, number):
    fork, workers = os.fork, []

    def signalled() -> int:
        if (child := fork()) == 0:
            os.kill(os.getpid(), number)
        workers.append(child)
        return child

    monkeypatch.setattr(os, "fork", signalled)
    assert load() == [[3, 1], [2]]
    assert len(workers) == 2


def test_a_signal_to_this_process_meanwhile_is_not_lost(monkeypatch):
    fork, received = os.fork, []

    def signalled() -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return fork()

    monkeypatch.setattr(os, "fork", signalled)
    former = signal.signal(signal.SIGUSR1, lambda *_: received.append(os.getpid()))
    try:
        assert load() == [[3, 1], [2]]
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert set(received) == {os.getpid()}


class Collected(Dataset):
    """The MB that the worker has for itself; from number 1 on, after a collection."""

    def __init__(self, private_memory):
        self.private_memory = private_memory

    def __getitem__(self, number: int) -> float:
        if number:
            gc.collect()
        return self.private_memory(os.getpid())


def test_a_collection_copies_nothing_of_the_parent(private_memory):
    shared = [[number] for number in range(500_000)]
    before, after = (float(batch) for batch in Loader(Collected(private_memory), [[0], [1]], workers=1))
    assert after - before < 4
    assert len(shared) == 500_000


class Structure:
    """As Detectron2's structures: tensors in attributes."""

    def __init__(self, boxes: torch.Tensor):
        self.fields = {"boxes": boxes, "name": "a"}


class Images(Dataset):
    def __getitem__(self, number: int) -> dict:
        return {"image": torch.full((3, 640, 640), float(number)), "instances": Structure(torch.ones(2, 4) * number)}


def as_list(samples: list) -> list:
    return samples


def test_tensors_come_in_shared_memory_with_their_values():
    batches = list(Loader(Images(), [[0, 1], [2]], workers=1, collate_fn=as_list))
    for number, sample in enumerate(sample for batch in batches for sample in batch):
        tensors = sample["image"], sample["instances"].fields["boxes"]
        assert all(tensor.is_shared() and bool((tensor == number).all()) for tensor in tensors)
    (alone,) = Loader(Images(), [[0]], workers=0, collate_fn=as_list)
    assert not alone[0]["image"].is_shared()


SMALL_SHM = """
import sys
from resnet_backbone.data.workers import Loader
from tests.data.test_workers import Images, as_list, stack
for batch in Loader(Images(), [[n, n + 1] for n in range(0, 40, 2)], workers=2, collate_fn=globals()[sys.argv[1]]):
    pass
"""


def stack(samples: list) -> torch.Tensor:
    return default_collate([sample["image"] for sample in samples])


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode,
    reason="this user may not mount a small /dev/shm",
)
@pytest.mark.parametrize("collate", ["as_list", "stack"])
def test_a_small_shared_memory_ends_in_a_sentence(collate):
    """As Docker gives it; the lists of detection used to wait forever for a batch that a thread had lost."""
    mount = 'mount -t tmpfs -o size=12m tmpfs /dev/shm && exec "$@"'
    python = [sys.executable, "-c", SMALL_SHM, collate]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", *python]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert "DatasetError: loading processes hand over batches in shared memory" in last, done.stderr
    assert "of 12 MiB left" in last and "--shm-size" in last and "DATALOADER.NUM_WORKERS" in last


class Dying(Dataset):
    def __getitem__(self, number: int) -> int:
        if number:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_worker_that_dies_is_named():
    with pytest.raises(DatasetError) as caught, explained_deaths():
        list(Loader(Dying(), [[0], [1], [0], [0]], workers=1))
    # Whichever of the loader's two checks comes first.
    how = r"(is killed by signal: Killed|exited unexpectedly)"
    assert re.search(rf"ended: worker \(pid(\(s\))? \d+\) {how}\. The kernel kills", str(caught.value))
    with pytest.raises(RuntimeError, match="other"), explained_deaths():
        raise RuntimeError("other")


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_that_dies_while_it_hands_over_a_batch(monkeypatch, killed):
    """The connection for the batch's shared memory breaks before its death is known."""
    batches = iter(Loader(Numbers(), [[0], [1], [2]], workers=1))
    next(batches)

    def broken(self, timeout):
        if killed:
            os.kill(self._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", broken)
    how = r"worker \(pid.*\) is (gone|killed)" if killed else "reset by peer"
    with pytest.raises(DatasetError if killed else ConnectionResetError, match=how), explained_deaths():
        next(batches)


class Slow(Dataset):
    def __getitem__(self, number: int) -> int:
        time.sleep(1.5 if number else 0)
        return number


def test_a_worker_that_is_stuck_is_named_while_the_wait_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(workers, "PATIENCE", 0.4)
    monkeypatch.setattr(workers._WatchedIterator._try_get_data, "__defaults__", (0.1,))
    assert [batch.item() for batch in Loader(Slow(), [[0], [1], [0]], workers=2)] == [0, 1, 0]
    said = [record.getMessage() for record in caplog.records if record.name == workers.__name__]
    assert 1 <= len(said) <= 4
    assert re.fullmatch(r"no batch for \d s: loading process 2 of 2 \(pid \d+\) is stuck, or the disk .*", said[0])
