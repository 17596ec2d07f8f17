"""What a disk does to a run; /dev/full is a disk without space."""

import errno
import logging
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage, TensorboardXWriter

from resnet_backbone.engine import disk
from resnet_backbone.engine.output import start_logging
from resnet_backbone.engine.writers import MetricsFile
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.weights import atomic_write
from tests.engine.tiny import Run, refusal

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def shown(monkeypatch) -> list[BaseException]:
    """The errors of threads that Python prints."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: errors.append(arguments.exc_value))
    return errors


def sentence(folder: Path, error: Exception) -> str:
    def run():
        with disk.write_errors(folder):
            raise error

    return refusal(run)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE"])
@pytest.mark.parametrize("file", [None, "inference/results.json", b"events.out", "/elsewhere/cache"])
def test_errors_that_only_a_disk_raises(tmp_path, name, file):
    number = getattr(errno, name)
    path = None if file is None else os.path.join(tmp_path, os.fsdecode(file))
    if isinstance(file, bytes):
        path = os.fsencode(path)
    message = sentence(tmp_path, OSError(number, os.strerror(number), path))
    place = f"OUTPUT_DIR {tmp_path}" if path is None else os.fsdecode(path)
    assert message.startswith(f"{place} cannot be ") and f"({os.strerror(number)})" in message
    assert "checkpoints written before are whole" in message and "--resume" in message


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError])
def test_others_only_where_the_run_writes(tmp_path, kind, caplog):
    number = {FileNotFoundError: 2, PermissionError: 13, NotADirectoryError: 20, IsADirectoryError: 21}[kind]
    inside = OSError(number, "as it were", str(tmp_path / "inference" / "x.json"))
    assert type(inside) is kind and "x.json cannot be written (as it were)" in sentence(tmp_path, inside)
    for other in (kind(number, "as it were", "/data/x.jpg"), kind(number, "as it were"), RuntimeError("a bug")):
        caplog.clear()
        with pytest.raises(type(other)) as caught, disk.write_errors(tmp_path):
            raise other
        assert caught.value is other
        assert len(caplog.records) == isinstance(other, OSError)  # the trainer leaves them to this


@pytest.mark.parametrize("first", [InputError("the loss is not finite."), Interrupted("SIGTERM: saved")])
def test_what_ended_the_run_before_is_what_is_said(tmp_path, first):
    with pytest.raises(type(first)) as caught, disk.write_errors(tmp_path):
        try:
            raise first
        finally:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as TensorBoard's last flush
    assert caught.value is first


def test_what_torch_makes_of_it(tmp_path):
    def run():
        with disk.write_errors(tmp_path), open(FULL, "wb") as file:
            torch.save({"a": torch.zeros(10_000)}, file)

    assert refusal(run).startswith(f"OUTPUT_DIR {tmp_path} cannot be written (No space left on device)")


def test_an_atomic_write_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    def run():
        with disk.write_errors(tmp_path), atomic_write(tmp_path / "results.json") as file:
            file.write(b"{}")

    assert refusal(run).startswith(f"{tmp_path / 'results.json'} cannot be written (No space left on device)")
    assert os.listdir(tmp_path) == []


class TestLog:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        (tmp_path / "log.txt").symlink_to(FULL)
        return tmp_path

    def test_a_full_log_file_says_so_once(self, folder, capfd):
        start_logging(folder)
        for number in range(5):
            logging.getLogger("resnet_backbone.x").info("line %d", number)
        start_logging(folder)  # closes the first
        captured = capfd.readouterr()
        said = f"{folder / 'log.txt'} loses lines: No space left on device\n"
        assert captured.err.replace(said, "", 2) == "" and captured.err.startswith(said)
        assert "Traceback" not in captured.out and captured.out.count("line ") == 5

    def test_a_full_terminal_too(self, tmp_path, monkeypatch, capfd):
        with open(FULL, "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            start_logging(tmp_path)
            for number in range(5):
                logging.getLogger("resnet_backbone.x").info("line %d", number)
            full.close = lambda: None  # it would fail once more
            assert (tmp_path / "log.txt").read_text().count("line ") == 5
            error = capfd.readouterr().err
            assert error == "the log on the terminal loses lines: No space left on device\n"
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())

    def test_a_bug_in_a_log_line_is_still_shown(self, tmp_path, capfd):
        start_logging(tmp_path)
        logging.getLogger("resnet_backbone.x").info("%d", "text")
        assert "--- Logging error ---" in capfd.readouterr().err


class TestInARun:
    def test_metrics(self, cfg, tmp_path, capfd):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "metrics.json").symlink_to(FULL)

        def run():
            with disk.write_errors(folder):
                Run(cfg, folder)

        # keep_metrics_before would read /dev/full to its end, which it does not have.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("resnet_backbone.engine.train.keep_metrics_before", lambda *_: None)
            message = refusal(run)
        assert message.startswith(f"{folder / 'metrics.json'} cannot be written (No space left on device)")
        assert "Traceback" not in "".join(capfd.readouterr())
        assert (folder / "model_0000003.pth").exists()

    def test_an_evaluation(self, cfg, tmp_path, caplog):
        cfg.TEST.EVAL_PERIOD = 5

        def write(_):
            with open(FULL, "w") as file:
                file.write("[]")

        def run():
            with disk.write_errors(tmp_path):
                Run(cfg, tmp_path, during_evaluation=write)

        assert "No space left on device" in refusal(run)
        assert not [record for record in caplog.records if record.exc_info]

    def test_tensorboard(self, tmp_path, monkeypatch, shown):
        """Its thread fails, and the main thread when it writes or closes next; none of them prints a stack trace."""
        from tensorboard.compat import tf

        def full(self, filename, content, binary_mode=False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def run():
            with disk.write_errors(tmp_path), EventStorage(0) as storage:
                writer = TensorboardXWriter(str(tmp_path))
                file_system = type(tf.io.gfile.get_filesystem(str(tmp_path)))
                monkeypatch.setattr(file_system, "append", full)
                monkeypatch.setattr(file_system, "write", full)
                thread = writer._writer._get_file_writer().event_writer._async_writer._worker
                thread._next_flush_time = 0  # as after two minutes
                for iteration in range(50):
                    storage.iter = iteration
                    storage.put_scalar("loss", 1.0, smoothing_hint=False)
                    writer.write()
                writer.close()

        before = threading.excepthook
        assert "No space left on device" in refusal(run)
        assert threading.excepthook is before and not shown


def test_other_threads_errors_are_still_shown(tmp_path, shown):
    def fail():
        raise FileNotFoundError(2, "No such file or directory", "/data/x.jpg")

    with disk.write_errors(tmp_path):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert [type(error) for error in shown] == [FileNotFoundError]


def test_a_metrics_file_that_failed_stays_closed(tmp_path):
    (tmp_path / "metrics.json").symlink_to(FULL)
    writer = MetricsFile(tmp_path / "metrics.json")
    with EventStorage(0) as storage:
        storage.put_scalar("loss", 1.0, smoothing_hint=False)
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write()
    assert caught.value.filename == str(tmp_path / "metrics.json")
    writer.close()
