"""The lock of an output folder, between real processes."""

import errno
import fcntl
import multiprocessing
import os
import platform
import re
import signal
import time

import pytest

from resnet_backbone.engine import lock
from resnet_backbone.engine.config import ConfigError

FORK = multiprocessing.get_context("fork")


def hold(folder, pipe, *, worker: bool = False) -> None:
    """Hold the lock until killed; with `worker`, a forked child outlives this process, as a loader's may."""
    with lock.locked(folder) as alone:
        child = os.fork() if worker else -1
        if child != 0:
            pipe.send((alone, child))
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """The function `(worker=…)` that starts a process that holds the lock of `tmp_path`: itself, its child's id."""
    started = []

    def start(**named):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path, theirs), kwargs=named)
        process.start()
        started.append(process)
        assert ours.poll(30), "it did not get the lock"
        alone, child = ours.recv()
        assert alone
        return process, child

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_process_is_refused_and_told_by_whom(holder, tmp_path):
    before = time.strftime("%Y-%m-%d %H:%M")
    process, _ = holder()
    with pytest.raises(ConfigError) as caught, lock.locked(tmp_path):
        pass
    message = str(caught.value)
    found = re.search(r"is in use by process (\d+) on (\S+) since ([-\d]+ [\d:]+)[+-][\d:]+\. ", message)
    assert found and found[1] == str(process.pid) and found[2] == platform.node() and found[3] >= before
    assert str(tmp_path) in message and "OUTPUT_DIR" in message and "MODEL.WEIGHTS" in message and "\n" not in message


def test_being_refused_takes_nothing_from_the_holder(holder, tmp_path):
    holder()
    for _ in range(3):
        with pytest.raises(ConfigError), lock.locked(tmp_path):
            pass


def test_it_ends_with_a_process_that_is_killed(holder, tmp_path):
    process, _ = holder()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock.locked(tmp_path) as alone:
        assert alone and (tmp_path / lock.LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_worker_that_outlives_the_process_does_not_keep_it(holder, tmp_path):
    process, worker = holder(worker=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        os.kill(worker, 0)  # it lives
        with lock.locked(tmp_path) as alone:
            assert alone
    finally:
        os.kill(worker, signal.SIGKILL)


def test_it_can_be_taken_again(tmp_path):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), lock.locked(tmp_path) as alone:
            assert alone
            raise ZeroDivisionError
        assert (tmp_path / lock.LOCK).read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.locked(tmp_path) as alone:
        assert not alone


class TestAFolderThatVanishes:
    def test_one_that_is_there(self, tmp_path):
        lock.check_still_there(tmp_path / "not locked")
        with lock.locked(tmp_path):
            lock.check_still_there(tmp_path)

    @pytest.mark.parametrize("again", [False, True])
    def test_deleted_and_made_again(self, tmp_path, again):
        folder = tmp_path / "run"
        folder.mkdir()
        with lock.locked(folder):
            folder.rename(tmp_path / "moved")
            if again:
                folder.mkdir()
                (folder / lock.LOCK).write_text("")
            with pytest.raises(ConfigError, match=f"OUTPUT_DIR {folder} or its .lock was deleted, moved or replaced"):
                lock.check_still_there(folder)
        lock.check_still_there(folder)
