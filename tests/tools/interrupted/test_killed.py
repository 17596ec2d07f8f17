"""A run is killed at any moment or while it writes a file. Resumed, it ends in the bits of one that never was."""

import contextlib
import random
import secrets
import shutil
import signal
import time
from pathlib import Path

import pytest

from resnet_backbone.weights import read_checkpoint
from tests.tools.interrupted.runs import assert_same


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


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["", "SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION fp16"], ids=["fp32", "fp16"])
def test_killed_often(start, finish, seconds, tmp_path, keys):
    folders = tmp_path / "whole", tmp_path / "run"
    keys = f"{keys} SOLVER.MAX_ITER 120 SOLVER.CHECKPOINT_PERIOD 7"
    finish(folders[0], keys)
    kill_at_random(start, folders[1], 25, 0.8 * seconds, keys=keys, ask=True)
    finish(folders[1], keys)
    assert_same(*reversed(folders))


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


def test_the_main_process_alone_is_killed_and_its_workers_live_on(start, finish, whole, tmp_path):
    folder = tmp_path / "run"
    first = start(folder, "hold_in_step", 7)
    first.wait_for("held")
    first.send(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    assert "resumed: the next iteration is 6\n" in finish(folder)
    assert_same(folder, whole)
