"""A run that is killed, stopped or starved of disk space, and resumed, ends in the bits of one that never was."""

import contextlib
import json
import os
import random
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import pytest
import torch

from resnet_backbone.weights import read_checkpoint

ROOT = Path(__file__).parents[2]
WAIT = 120  # seconds that something may take on a machine with better things to do
# Checkpoints (every 3 iterations), readings of the metrics (4), evaluations (5) and epochs (3.75) all fall apart.
KEYS = """
MODEL.DEVICE cpu  MODEL.NETWORK.NAME vgg16_bn  MODEL.NETWORK.WIDTH 0.0625  MODEL.NETWORK.POOL5 False
INPUT.MIN_SIZE_TRAIN (32,40)  INPUT.MIN_SIZE_TEST 32  INPUT.CROP.SIZE (32,32)  DATALOADER.NUM_WORKERS 2  SEED 5
SOLVER.REFERENCE_IMS_PER_BATCH 0  SOLVER.IMS_PER_BATCH 8  SOLVER.BASE_LR 0.03  SOLVER.MAX_ITER 24
SOLVER.AMP.ENABLED False  SOLVER.EMA_DECAY 0.7  SOLVER.WARMUP_UNTIL_ERROR 60  SOLVER.WARMUP_FACTOR 0.2
SOLVER.LR_SCHEDULER_NAME WarmupPlateauLR  SOLVER.GAMMA 0.5  SOLVER.PLATEAU_PATIENCE 0
SOLVER.CHECKPOINT_PERIOD 3  SOLVER.CHECKPOINT_KEEP 2  SOLVER.LOG_PERIOD 4
TEST.EVAL_PERIOD 5  TEST.PRECISE_BN.NUM_ITER 2
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TIMES = ("images_per_second", "data_share")
# A network in which nothing depends on how images are divided among processes: no batch norm, no dropout.
DIVIDED = """
MODEL.NETWORK.NAME cifar_resnet20  MODEL.NETWORK.WIDTH 0.5  MODEL.NETWORK.POOL5 True  MODEL.RESNETS.NORM GN
DATALOADER.NUM_WORKERS 1  SOLVER.MAX_ITER 60  SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR  SOLVER.WARMUP_UNTIL_ERROR 0
SOLVER.BASE_LR 0.003  TEST.EVAL_PERIOD 0
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Folders of three classes of 10 images that differ in brightness, in noise."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate("abc"):
        (root / name).mkdir()
        for number in range(10):
            image = rng.integers(0, 180, (40, 36 + number, 3)) + 30 * label
            cv2.imwrite(str(root / name / f"{number}.{('jpg', 'png')[number % 2]}"), image.astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def words(images):
    """The function `(output folder, "KEY VALUE …", resume=…)` that gives the words of a command line."""

    def give(folder: Path, keys: str = "", *, resume: bool = True) -> list[str]:
        data = ("DATASETS.TRAIN", images, "DATASETS.TEST", images, "OUTPUT_DIR", folder)
        start = ("--config-file", ROOT / "configs" / "pretrain" / "imagenet.yaml", *(["--resume"] if resume else []))
        return [*map(str, start), *KEYS.split(), *keys.split(), *map(str, data)]

    return give


class Run:
    """A run in a process group of its own.

    Args:
        status: given seconds, waits so long at most for the exit status; None if the run has not ended by then.
    """

    def __init__(self, pid: int, output: Path, status: Callable[[float], int | None]):
        self.pid = pid
        self.output = output
        self._status = status

    def wait_for(self, text: str) -> None:
        """Wait until `text` was printed."""
        end = time.monotonic() + WAIT
        while text not in (printed := self.output.read_text() if self.output.exists() else ""):
            if time.monotonic() > end:
                self._give_up(f"{text!r} was not printed")
            time.sleep(0.002)
            assert "\nTraceback" not in printed, printed

    def send(self, number: signal.Signals, *, to_all: bool = False) -> None:
        """Send a signal to the main process or to all of the group, and let go on what was held."""
        (os.killpg if to_all else os.kill)(self.pid, number)
        self.release()

    def release(self) -> None:
        Path(f"{self.output}.release").touch()

    def end(self) -> tuple[int, str]:
        """The exit status (a signal as a negative number) and all that was printed."""
        if (status := self._status(WAIT)) is None:
            self._give_up("the run has not ended")
        return status, self.output.read_text()

    def _give_up(self, reason: str) -> NoReturn:
        os.killpg(self.pid, signal.SIGKILL)
        self._status(WAIT)
        pytest.fail(f"{reason} after {WAIT} s:\n{self.output.read_text() if self.output.exists() else ''}")


@pytest.fixture(scope="module")
def start(words, tmp_path_factory):
    """The function `(output folder, accident, …, keys=…)` that starts a run by way of killed.py."""
    outputs = tmp_path_factory.mktemp("outputs")
    script = Path(__file__).with_name("killed.py")
    server = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=ENVIRONMENT
    )
    assert server.stdout.readline() == b"ready\n"
    count = 0

    def status(seconds: float) -> int | None:
        return int(server.stdout.readline()) if select.select([server.stdout], [], [], seconds)[0] else None

    def begin(folder: Path, *accident, keys: str = "") -> Run:
        nonlocal count
        count += 1
        output = outputs / f"{count}.txt"
        request = {"words": words(folder, keys), "output": str(output), "accident": accident}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        return Run(int(server.stdout.readline()), output, status)

    yield begin
    server.stdin.close()
    server.wait(WAIT)


@pytest.fixture(scope="module")
def finish(start):
    """The function `(output folder, keys=…)` that resumes a run, which must then come to its end."""

    def resume(folder: Path, keys: str = "") -> str:
        status, printed = start(folder, keys=keys).end()
        assert status == 0 and "Traceback" not in printed, printed
        return printed

    return resume


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    """The output folder of a run by the command itself, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed = command(folder.with_suffix(".txt"), words(folder, resume=False)).end()
    assert status == 0, printed
    # It has all that a resume could lose.
    trainer = read_checkpoint(folder / "model_0000023.pth").trainer
    assert trainer["plateau"]["drops"] > 0 and trainer["warm_up"] == {"over": True} and trainer["evaluation"]["best"]
    assert trainer["optimizer"]["state"] and trainer["average"]
    scores = [values["top1"] for _, values in sorted(metrics(folder).items()) if "top1" in values]
    assert len(scores) == 4 and scores[0] < max(scores)
    return folder


def command(output: Path, words: list[str]) -> Run:
    """`python tools/pretrain.py` with these words, in a process group of its own."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "pretrain.py"), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=ENVIRONMENT,
        )

    def status(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)

    return Run(process.pid, output, status)


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What metrics.json says of each iteration, without times; that no line contradicts another is checked."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        before = found.setdefault(values["iteration"], {})
        values = {name: value for name, value in values.items() if name not in (*TIMES, "iteration")}
        assert not before.keys() & values.keys(), f"{line} is there twice"
        before |= values
    return found


def assert_same(folder: Path, whole: Path) -> None:
    """Everything that two finished runs leave behind is the same, bit for bit, but times."""
    names = {file.name for file in folder.iterdir() if not file.name.startswith("events.")}
    assert names == {file.name for file in whole.iterdir() if not file.name.startswith("events.")}
    assert {"model_final.pth", "model_best.pth", (whole / "last_checkpoint").read_text()} <= names
    for name in (name for name in names if name.endswith(".pth")):
        one, other = read_checkpoint(folder / name), read_checkpoint(whole / name)
        assert one.metadata == other.metadata and one.iteration == other.iteration
        assert_equal(dict(one.model), dict(other.model), f"{name}: ")
        if one.trainer is not None or other.trainer is not None:
            states = [dict(checkpoint.trainer) for checkpoint in (one, other)]
            configs = [state.pop("config") for state in states]
            assert all(
                state.pop("config_sha256") and config.pop("OUTPUT_DIR") for state, config in zip(states, configs)
            )
            assert_equal(*configs, f"{name}: config")
            assert_equal(*states, f"{name}: trainer")
    for name in ("results.json", "last_checkpoint"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(folder) == metrics(whole)


def assert_equal(one, other, where: str) -> None:
    """Two trees of dicts, lists, tensors and plain values are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


def kill_at_random(start, folder: Path, kills: int, longest: float, *, keys: str = "", ask: bool = False) -> None:
    """End a run `kills` times, at moments up to `longest` seconds after the beginning of training, and resume it.

    With `ask` it is asked to leave (SIGTERM to all of its processes) now and then, instead of killed.
    """
    seed = secrets.randbelow(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}, {longest:.2f} s")  # shown if the test fails
    while kills:
        run = start(folder, keys=keys)
        run.wait_for("epochs ")  # the table of the schedule: the first iteration is next
        number = rng.choice([signal.SIGKILL, signal.SIGTERM]) if ask else signal.SIGKILL
        time.sleep(moment := rng.uniform(0, longest))
        with contextlib.suppress(ProcessLookupError):
            run.send(number, to_all=True)
        status, printed = run.end()
        print(f"{number.name} after {moment:.3f} s, exit status {status}:", printed.splitlines()[-1])
        if status == 0:  # too late, it was at its end; the next one begins anew
            shutil.rmtree(folder)
            continue
        assert status == -number or (status == 75 and number == signal.SIGTERM), printed
        assert "Traceback" not in printed, printed
        kills -= 1


@pytest.fixture(scope="module")
def seconds(start, tmp_path_factory) -> float:
    """How long training takes here."""
    run = start(tmp_path_factory.mktemp("timed"))
    run.wait_for("epochs ")
    begin = time.monotonic()
    assert run.end()[0] == 0
    return time.monotonic() - begin


def test_killed_at_random_moments(start, finish, whole, seconds, tmp_path):
    folder = tmp_path / "run"
    kill_at_random(start, folder, 7, 0.5 * seconds)
    finish(folder)
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("accident", "following"),
    [
        (("die_while_writing", "model_0000008.pth"), 6),
        (("die_before_rename", "model_0000002.pth"), 0),
        (("die_before_rename", "model_0000008.pth"), 6),
        (("die_before_rename", "last_checkpoint"), 3),
        (("die_before_rename", "last_checkpoint", 3), 6),
        (("die_before_removal", "model_0000002.pth"), 9),
        (("die_before_rename", "model_best.pth"), 3),
        (("die_before_rename", "model_final.pth"), 24),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_killed_while_a_file_is_written(start, finish, whole, tmp_path, accident, following):
    folder = tmp_path / "run"
    status, printed = start(folder, *accident).end()
    assert status == -signal.SIGKILL, printed
    torn = [file.name for file in folder.iterdir() if file.name.endswith(".tmp")]
    assert len(torn) == ("removal" not in accident[0])
    for file in folder.glob("model_*.pth"):
        read_checkpoint(file)
    printed = finish(folder)
    assert f"resumed: the next iteration is {following}\n" in printed or (following == 0 and "nothing to" in printed)
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("name", "where", "following"),
    [
        ("model_0000008.pth", "writing", 6),
        ("model_0000008.pth", "flushing", 6),
        ("model_best.pth", "writing", 3),
        ("model_final.pth", "writing", 24),
        ("config.yaml", "flushing", 0),
        ("results.json", "flushing", 24),
    ],
)
def test_no_space_for_a_file(start, finish, whole, tmp_path, name, where, following):
    folder = tmp_path / "run"
    status, printed = start(folder, "fill_disk", name, where).end()
    assert status == 2 and "Traceback" not in printed, printed
    sentence = printed.splitlines()[-1]
    assert sentence.startswith(f"error: {folder / name} cannot be written (No space left on device)")
    assert "--resume" in sentence
    assert not (folder / name).exists() and not list(folder.glob(".*.tmp"))
    printed = finish(folder)
    assert f"resumed: the next iteration is {following}\n" in printed or (following == 0 and "nothing to" in printed)
    assert_same(folder, whole)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own of 300 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a disk needs the rights to do so")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("left", [0, 4 * 2**20])  # bytes: for nothing at all; for a log, but not for a checkpoint
def test_a_full_disk(start, finish, whole, disk, left):
    folder = disk / "run"
    run = start(folder, "hold_in_step", 7)
    run.wait_for("held")
    space = os.statvfs(disk)
    with open(disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, space.f_bavail * space.f_frsize - left)
    run.release()
    status, printed = run.end()
    assert status == 2 and "Traceback" not in printed, printed
    assert "No space left on device" in printed.splitlines()[-1]
    assert not list(folder.glob(".*.tmp"))
    (disk / "filler").unlink()
    assert "resumed: the next iteration is 6\n" in finish(folder)
    assert_same(folder, whole)


@pytest.mark.parametrize("period", [0, 40])  # iterations between evaluations
def test_a_disk_that_fills_between_checkpoints(start, finish, disk, period):
    """Log, metrics and TensorBoard's events find no space, in some order."""
    folder = disk / "run"
    keys = f"SOLVER.CHECKPOINT_PERIOD 395 SOLVER.LOG_PERIOD 1 SOLVER.MAX_ITER 400 TEST.EVAL_PERIOD {period}"
    keys += " SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR"
    run = start(folder, "hold_in_step", 9, keys=keys)
    run.wait_for("held")
    space = os.statvfs(disk)
    with open(disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, space.f_bavail * space.f_frsize)
    run.release()
    status, printed = run.end()
    assert status == 2 and "Traceback" not in printed and "--- Logging error ---" not in printed, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and printed.endswith(errors[0] + "\n"), printed
    assert "cannot be written (No space left on device)" in errors[0] and "--resume" in errors[0]
    (disk / "filler").unlink()
    finish(folder, keys.replace("MAX_ITER 400", "MAX_ITER 16"))


OTHERS = [[], ["--resume"], ["--eval-only"], ["--eval-only", "--resume"]]


@pytest.mark.parametrize("flags", OTHERS, ids=" ".join)
def test_a_second_run_beside_a_live_one(start, finish, whole, tmp_path, words, flags):
    """It is refused with one sentence, takes nothing away, and the first ends as if it had been alone."""
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    (folder / ".model_0000008.pth.abc.tmp").write_bytes(b"half")  # as in the middle of a checkpoint
    before = {file: file.read_bytes() for file in folder.iterdir()}
    second = [*words(folder, resume=False), *flags, "MODEL.WEIGHTS", str(folder / "model_0000002.pth")]
    status, printed = command(tmp_path / "second.txt", second).end()
    assert status == 2 and printed.count("\n") == 1, printed
    assert printed.startswith(f"error: OUTPUT_DIR {folder} is in use by process {first.pid} on "), printed
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (folder / ".model_0000008.pth.abc.tmp").unlink()
    first.release()
    status, printed = first.end()
    assert status == 0, printed
    assert_same(folder, whole)


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_a_folder_that_is_moved_away_ends_the_run(start, finish, whole, tmp_path, words, again):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    folder.rename(tmp_path / "moved")
    if again:
        status, printed = command(tmp_path / "second.txt", words(folder)).end()
        assert status == 0, printed
    first.release()
    status, printed = first.end()
    assert status == 2 and "Traceback" not in printed, printed
    assert f"error: OUTPUT_DIR {folder} or its .lock was deleted, moved or replaced" in printed.splitlines()[-1]
    if again:
        assert_same(folder, whole)
    else:
        assert not folder.exists()
    assert "resumed: the next iteration is 6\n" in finish(tmp_path / "moved")
    assert_same(tmp_path / "moved", whole)


def test_two_processes_are_refused_together(start, tmp_path, words):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    second = [*words(folder), "--num-gpus", "2", "SOLVER.CUDA_GRAPH", "False"]
    status, printed = command(tmp_path / "second.txt", second).end()
    assert status == 2 and printed.count("in use by process") == 1 and "Traceback" not in printed, printed
    assert sorted(file.name for file in folder.glob("log.txt*")) == ["log.txt"]
    first.send(signal.SIGKILL, to_all=True)
    first.end()


def test_the_main_process_alone_is_killed_and_its_workers_live_on(start, finish, whole, tmp_path):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    first.send(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    assert "resumed: the next iteration is 6\n" in finish(folder)
    assert_same(folder, whole)


def test_a_shorter_run_does_not_take_a_longer_ones_checkpoint(start, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    final = (folder / "model_final.pth").read_bytes()
    status, printed = start(folder, keys="SOLVER.MAX_ITER 20").end()
    assert status == 2 and "SOLVER.MAX_ITER is 20 (command line), but the run to resume has done 24" in printed
    assert "Traceback" not in printed and (folder / "model_final.pth").read_bytes() == final
    assert start(folder).end()[0] == 0  # as long as it was: nothing to do
    assert_same(folder, whole)


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "absent"])
def test_a_damaged_checkpoint_gives_way_to_an_earlier_one(start, finish, whole, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model_final.pth", "results.json"):
        (folder / name).unlink()
    last = folder / (folder / "last_checkpoint").read_text()
    content = bytearray(last.read_bytes())
    if damage == "cut":
        last.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif damage == "empty":
        last.write_bytes(b"")
    else:
        last.unlink()

    status, printed = start(folder).end()
    assert status == 2 and "Traceback" not in printed, printed
    sentence = printed.splitlines()[-1]
    assert sentence.startswith("error: cannot resume: ") and last.name in sentence
    advice = re.search(r"An earlier one is (\S+): write its name into (\S+) to go on from there\.$", sentence)
    assert advice, sentence
    Path(advice[2]).write_text(advice[1] + "\n")
    assert "resumed: the next iteration is 21\n" in finish(folder)
    # The damaged one was the last of the whole run: it was written anew.
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("number", "to_all", "moment"),
    [
        (signal.SIGTERM, False, "step"),
        (signal.SIGUSR1, False, "step"),
        (signal.SIGINT, True, "step"),
        (signal.SIGTERM, True, "step"),
        (signal.SIGUSR1, True, "step"),
        (signal.SIGTERM, False, "evaluation"),
        (signal.SIGINT, True, "evaluation"),
        (signal.SIGTERM, True, "evaluation"),
    ],
)
def test_asked_to_leave(start, finish, whole, tmp_path, number, to_all, moment):
    folder = tmp_path / "run"
    run = start(folder, *{"step": ("hold_in_step", 10), "evaluation": ("hold_in_evaluation", 2)}[moment])
    run.wait_for("held")
    run.send(number, to_all=to_all)
    status, printed = run.end()
    assert status == 75 and "Traceback" not in printed, printed
    assert f"{number.name}: finishing the step, then saving\n" in printed
    # An evaluation belongs to the iteration that follows it, the eleventh, which is not done.
    done = {"step": 11, "evaluation": 10}[moment]
    assert f"{number.name}: saved after {done} of 24 iterations. Go on with --resume." in printed.splitlines()[-1]
    assert (folder / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"
    assert f"resumed: the next iteration is {done}\n" in finish(folder)
    assert_same(folder, whole)


def test_ctrl_c_twice_leaves_at_once(start, finish, whole, tmp_path):
    folder = tmp_path / "run"
    run = start(folder, "hold_in_step", 10)
    run.wait_for("held")
    os.killpg(run.pid, signal.SIGINT)
    run.wait_for("SIGINT: finishing the step")
    run.send(signal.SIGINT, to_all=True)
    status, printed = run.end()
    assert status == 130 and "Traceback" not in printed, printed
    assert (folder / "last_checkpoint").read_text() == "model_0000008.pth"
    finish(folder)
    assert_same(folder, whole)


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_ended_before_the_first_iteration(start, finish, whole, tmp_path, number, to_all):
    folder = tmp_path / "run"
    run = start(folder, "hold_before_training")
    run.wait_for("held")
    run.send(number, to_all=to_all)
    status, printed = run.end()
    assert status == (130 if number == signal.SIGINT else -number) and "Traceback" not in printed, printed
    assert {file.name for file in folder.iterdir()} <= {".lock", "config.yaml", "log.txt"}
    assert "nothing to resume" in finish(folder)
    assert_same(folder, whole)


@pytest.fixture(scope="module")
def alone(finish, tmp_path_factory) -> Path:
    """The output folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(folder, DIVIDED)
    return folder


def assert_close(folder: Path, alone: Path) -> None:
    """The same losses, as far as rounding lets the sums of two processes equal those of one: the same images."""
    found, expected = metrics(folder), metrics(alone)
    assert found.keys() == expected.keys() and len(found) == 15
    for iteration, values in expected.items():
        assert found[iteration]["lr"] == values["lr"]
        assert found[iteration]["total_loss"] == pytest.approx(values["total_loss"], rel=1e-4), iteration


def test_of_two_processes_one_is_killed(words, finish, alone, tmp_path):
    folder = tmp_path / "run"
    run = command(tmp_path / "output.txt", words(folder, f"{DIVIDED} --num-gpus 2"))
    run.wait_for("model_0000005.pth")
    first, second = ranks(run.pid)
    os.kill(second, signal.SIGKILL)
    status, printed = run.end()
    assert status == 128 + signal.SIGKILL and "Traceback" not in printed, printed
    assert not Path(f"/proc/{first}").exists()
    finish(folder, DIVIDED)  # with one process
    assert_close(folder, alone)


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGTERM, False),
        *(pytest.param(number, True, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_two_processes_leave_together(words, finish, alone, tmp_path, number, to_all):
    folder = tmp_path / "run"
    run = command(tmp_path / "output.txt", words(folder, f"{DIVIDED} --num-gpus 2"))
    run.wait_for("model_0000005.pth")
    run.send(number, to_all=to_all)
    status, printed = run.end()
    assert status == 75 and "Traceback" not in printed, printed
    done = int(re.search(r"saved after (\d+) of 60 iterations. Go on with --resume.", printed)[1])
    assert f"resumed: the next iteration is {done}\n" in finish(folder, DIVIDED)
    assert_close(folder, alone)


def test_two_processes_with_batch_norm_are_killed_and_asked_to_leave(words, tmp_path):
    """With a plateau and a moving average: the bits of a run that nothing disturbed, and files worth what they say."""

    def run(folder: Path, keys: str = "", *, accident: Callable[[Run], None] | None = None) -> tuple[int, str]:
        started = command(tmp_path / "output.txt", words(folder, f"{keys} --num-gpus 2", resume=accident is not None))
        if accident is not None:
            accident(started)
        return started.end()

    def kill_the_second(started: Run) -> None:
        started.wait_for("model_0000005.pth")
        os.kill(ranks(started.pid)[1], signal.SIGKILL)

    def ask(started: Run) -> None:
        started.wait_for("model_0000011.pth")
        started.send(signal.SIGTERM)

    whole, folder = tmp_path / "whole", tmp_path / "run"
    for place, accident, expected in (
        (whole, None, 0),
        (folder, kill_the_second, 128 + signal.SIGKILL),
        (folder, ask, 75),
        (folder, lambda started: None, 0),
    ):
        status, printed = run(place, accident=accident)
        assert status == expected, printed
    assert_same(folder, whole)
    best = read_checkpoint(whole / "model_best.pth").metadata.origin
    assert read_checkpoint(whole / "model_0000023.pth").trainer["plateau"]["drops"] > 0
    status, printed = run(tmp_path / "test", f"--eval-only MODEL.WEIGHTS {whole / 'model_best.pth'}")
    assert status == 0, printed
    assert f"top-1 {best['top1']:.2f} %, " in printed


def ranks(parent: int) -> list[int]:
    """The processes that train, in the order of their start."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["", "SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION fp16"], ids=["fp32", "fp16"])
def test_killed_often(start, finish, seconds, tmp_path, keys):
    folders = tmp_path / "whole", tmp_path / "run"
    keys = f"{keys} SOLVER.MAX_ITER 120 SOLVER.CHECKPOINT_PERIOD 7"
    finish(folders[0], keys)
    kill_at_random(start, folders[1], 25, 0.8 * seconds, keys=keys, ask=True)
    finish(folders[1], keys)
    assert_same(*reversed(folders))
