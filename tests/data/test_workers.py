import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from resnet_backbone.data.workers import prepare_worker


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
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
