"""A run finds no space on its disk. Resumed, it ends in the bits of one that always had space."""

import os
import subprocess

import pytest

from tests.tools.interrupted.runs import assert_same


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
