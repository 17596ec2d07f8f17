import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resnet_backbone.engine import processes
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.processes import Ending, RankInfo, given_rank_info
from resnet_backbone.errors import InputError, Interrupted
from tests.engine.tiny import VARIABLES

SCRIPT = Path(__file__).with_name("launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
LIMIT = 200  # seconds that something may take on a machine with better things to do
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def words(what: str, number: int, folder: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), what, str(number), str(folder)]


def start(what: str, number: int, folder: Path) -> subprocess.CompletedProcess:
    """Run in so many processes that launched.py starts."""
    return subprocess.run(words(what, number, folder), capture_output=True, text=True, timeout=LIMIT)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(what: str, folder: Path, *flags: str) -> list[str]:
    """The command that runs in two processes of torchrun's."""
    return [*TORCHRUN, free_port(), *flags, *words(what, 1, folder)[1:]]


def ranks(folder: Path, count: int) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


class Started:
    """A command in a process group of its own, and what it prints."""

    def __init__(self, command: list[str], output: Path, **variables: str):
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, env={**ENVIRONMENT, **variables}
            )

    def wait_for(self, pattern: str, count: int = 1) -> None:
        end = time.monotonic() + LIMIT
        while len(re.findall(pattern, self.output.read_text())) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """The exit code, when this process and all that it started are gone, and what they printed."""
        try:
            code = self.process.wait(LIMIT)
            end = time.monotonic() + LIMIT
            while alive(self.process.pid):
                assert time.monotonic() < end, "a process is left over"
                time.sleep(0.02)
        finally:
            if alive(self.process.pid):
                os.killpg(self.process.pid, signal.SIGKILL)
        return code, self.output.read_text()


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_metrics(run: Started, folder: Path) -> None:
    """Until the training loop has been running for a while."""
    metrics = folder / "metrics.json"
    end = time.monotonic() + LIMIT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < end and run.process.poll() is None, run.output.read_text()
        time.sleep(0.02)


def test_gradients_and_norm_statistics_are_averaged(tmp_path):
    done = start("gradients", 2, tmp_path)
    assert done.returncode == 0, done.stderr
    values = torch.cat([torch.arange(12.0).view(6, 2) ** 2, torch.ones(6, 2)])
    for rank, state in enumerate(ranks(tmp_path, 2)):
        assert state["grad"].tolist() == [[1.5, 5.0]]  # of (1, 0) and (2, 10)
        assert torch.allclose(state["mean"], values.mean(0))
        assert torch.allclose(state["variance"], values.var(0, unbiased=False))
        assert state["local"] == (rank, 2)


class TestOneEnds:
    """Of two processes that were started here, one ends; the other waits for it."""

    def test_bad_input_is_one_sentence(self, tmp_path):
        done = start("bad_input", 2, tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "error: the image x.jpg cannot be read. Replace it."
        assert "Traceback" not in done.stderr and done.stderr.count("x.jpg") == 1

    def test_a_bug_comes_with_its_stack_trace(self, tmp_path):
        done = start("bug", 2, tmp_path)
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 1 and "process 1 of 2:\n" in done.stderr
        assert "bug_run" in done.stderr and "ZeroDivisionError: a bug" in done.stderr

    @pytest.mark.parametrize(
        ("what", "code", "sentence"),
        [("killed", 128 + 9, "process 1 ended by SIGKILL."), ("left", 3, "process 1 ended with exit code 3.")],
    )
    def test_the_process_is_named(self, tmp_path, what, code, sentence):
        done = start(what, 2, tmp_path)
        assert done.returncode == code
        assert done.stderr.splitlines()[-1] == f"error: {sentence}"


class TestSignals:
    """Signals to the command that started two processes, or, as Ctrl-C does, to all three."""

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
    def test_the_processes_save_and_leave(self, tmp_path, number):
        run = Started(words("long", 2, tmp_path), tmp_path / "output.txt")
        wait_for_metrics(run, tmp_path)
        (os.killpg if number == signal.SIGINT else os.kill)(run.process.pid, number)
        code, printed = run.end()
        assert code == 75 and "Traceback" not in printed, printed
        done = int(re.search(r"saved after (\d+) of 1000000 iterations\. Go on with --resume\.\n$", printed)[1])
        assert (tmp_path / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"
        assert printed.count("saved after") == 1

    def test_ctrl_c_twice_ends_those_that_do_not_listen(self, tmp_path):
        run = Started(words("deaf", 2, tmp_path), tmp_path / "output.txt")
        run.wait_for("waiting", 2)
        os.killpg(run.process.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(1)
        os.killpg(run.process.pid, signal.SIGINT)
        code, printed = run.end()
        assert code == 130 and "Traceback" not in printed, printed

    def test_ctrl_c_outside_of_the_training_loop(self, tmp_path):
        run = Started(words("wait", 2, tmp_path), tmp_path / "output.txt")
        run.wait_for("waiting", 2)
        os.killpg(run.process.pid, signal.SIGINT)
        code, printed = run.end()
        assert code == 130 and "Traceback" not in printed, printed
        assert "SIGINT: left without saving" in printed.splitlines()[-1]


class TestTorchrun:
    def test_each_process_knows_its_place(self, tmp_path):
        done = subprocess.run(torchrun("places", tmp_path), capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        states = ranks(tmp_path, 2)
        assert [state["place"] for state in states] == [(0, 2, 0, 2), (1, 2, 1, 2)]
        assert states[0]["seed"] == states[1]["seed"] >= 0  # drawn, and shared
        assert all(state["threads"] == 1 for state in states)

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            ("bug", ("bug_run", "ZeroDivisionError: a bug", "Root Cause", "exitcode  : 1 ")),
            ("killed", ("exitcode  : -9 ", "Signal 9 (SIGKILL)")),
        ],
    )
    def test_one_process_ends_and_the_other_with_it(self, tmp_path, what, words):
        code, printed = Started(torchrun(what, tmp_path), tmp_path / "output.txt").end()
        assert code == 1
        assert all(word in printed for word in words), printed
        if what == "bug":  # said by the process, and once more in torchrun's summary
            assert printed.count("ZeroDivisionError: a bug") == 2

    def test_bad_input_in_both_is_one_sentence(self, tmp_path):
        code, printed = Started(torchrun("bad_key", tmp_path), tmp_path / "output.txt").end()
        assert code == 1
        assert printed.count("error: SOLVER.STEPS is bad.\n") == 1 and "InputError" not in printed

    @pytest.mark.parametrize(
        ("number", "flags"), [(signal.SIGTERM, ()), (signal.SIGUSR1, ("--signals-to-handle", "SIGUSR1,SIGTERM"))]
    )
    def test_signals_are_passed_on(self, tmp_path, number, flags):
        run = Started(torchrun("long", tmp_path, *flags), tmp_path / "output.txt")
        wait_for_metrics(run, tmp_path)
        os.kill(run.process.pid, number)
        code, printed = run.end()
        assert code == 1  # torchrun's own
        done = int(re.search(rf"{number.name}: saved after (\d+) of 1000000 iterations", printed)[1])
        assert (tmp_path / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"
        assert printed.count("saved after") == 1


class TestAQueuesProcesses:
    """Processes that were started one by one with torchrun's variables, as `srun` does by docs/clusters.md."""

    def begin(self, what: str, folder: Path) -> list[Started]:
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [
            Started(words(what, 1, folder), folder / f"output{n}.txt", RANK=str(n), LOCAL_RANK=str(n), **common)
            for n in range(2)
        ]

    def test_a_signal_to_one_lets_both_save_and_leave(self, tmp_path):
        runs = self.begin("long", tmp_path)
        wait_for_metrics(runs[0], tmp_path)
        os.kill(runs[1].process.pid, signal.SIGUSR1)
        endings = [run.end() for run in runs]
        assert [code for code, _ in endings] == [75, 75], endings
        assert "SIGUSR1: saved after" in endings[0][1] and "saved after" not in endings[1][1]

    def test_one_process_is_killed(self, tmp_path):
        endings = [run.end() for run in self.begin("killed", tmp_path)]
        assert endings[1][0] == -signal.SIGKILL
        assert endings[0][0] == 1 and "process 0 of 2: the connection to another process broke" in endings[0][1]
        assert "Traceback" not in endings[0][1]


class TestGivenPlace:
    def test_the_variables(self):
        assert given_rank_info(VARIABLES) == RankInfo(5, 8, 1, 4, "env://")
        assert given_rank_info({}) is None
        # As some clusters set them for every command, without having started as many processes.
        assert given_rank_info({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) is None

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"MASTER_ADDR": ""}, r"not MASTER_ADDR\. Set "),
            ({"RANK": "", "LOCAL_WORLD_SIZE": ""}, r"not RANK, LOCAL_WORLD_SIZE\. Set "),
            ({"RANK": "one"}, "RANK one.*whole numbers"),
            ({"MASTER_PORT": "http"}, "MASTER_PORT http.*whole numbers"),
            ({"RANK": "8", "LOCAL_RANK": "0"}, "RANK 8, WORLD_SIZE 8"),
            ({"RANK": "4"}, "one machine after the other"),
            ({"WORLD_SIZE": "7"}, "same number of processes on each machine"),
            ({"LOCAL_RANK": "4", "RANK": "4"}, "LOCAL_RANK 4, LOCAL_WORLD_SIZE 4"),
        ],
    )
    def test_impossible_ones(self, changes, expected):
        with pytest.raises(ConfigError, match=expected):
            given_rank_info({**VARIABLES, **changes})


class TestJoin:
    def test_processes_that_do_not_find_each_other(self, monkeypatch):
        def fail(*_, **__):
            raise dist.DistNetworkError("the client socket has timed out\nmore")

        monkeypatch.setattr(dist, "init_process_group", fail)
        ending = processes._work(RankInfo(1, 2, 1, 2, "tcp://node1:1"), lambda: None, False)
        assert ending.code == 2 and ending.text.startswith("2 processes did not find each other at tcp://node1:1 (the")

    def test_a_process_without_its_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        ending = processes._work(RankInfo(1, 2, 1, 2, "env://"), lambda: None, True)
        assert ending.code == 2 and "process 1 of 2 on this machine sees 1 GPUs" in ending.text


class TestJudge:
    """What several endings together mean."""

    def judge(self, codes, said=(), received=()):
        return processes._judge(codes, said, received)

    def test_all_is_well(self):
        assert self.judge([0, 0]) == 0
        assert self.judge([0, 0], received=[signal.SIGTERM]) == 0  # heard after the last iteration

    def test_bad_input_comes_before_its_consequences(self):
        with pytest.raises(InputError, match=r"^bad$"):
            self.judge([1, 2], [Ending(1, "Traceback: connection closed"), Ending(2, "bad"), Ending(2, "later")])

    def test_saved(self):
        with pytest.raises(Interrupted, match=r"^saved$"):
            self.judge([75, 75], [Ending(75, "saved"), Ending(75, "saved")], [signal.SIGTERM])

    def test_a_bug_while_the_others_leave(self, capsys):
        assert self.judge([75, 1], [Ending(75, "saved"), Ending(1, "Traceback: bug")], [signal.SIGTERM]) == 1
        assert capsys.readouterr().err == "Traceback: bug\n"

    def test_a_dead_process_and_its_consequence(self, capsys):
        assert self.judge([1, -9], [Ending(1, "Traceback: connection closed")]) == 137
        printed = capsys.readouterr().err
        assert printed == "Traceback: connection closed\nerror: process 1 ended by SIGKILL.\n"

    def test_one_that_had_to_be_ended(self, capsys):
        assert self.judge([None, 3]) == 3
        assert capsys.readouterr().err == "error: process 1 ended with exit code 3.\n"

    def test_signals_that_nobody_could_heed(self, capsys):
        assert self.judge([-10, -10], received=[signal.SIGUSR1]) == 138
        assert self.judge([130, -15], [Ending(130)], [signal.SIGINT]) == 130
        assert self.judge([-9, None], received=[signal.SIGINT, signal.SIGINT]) == 130
