import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import Dataset

from resnet_backbone.data.workers import STOPPING, Loader, prepare_worker


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
