"""A run is asked to leave, by a signal. Resumed, it ends in the bits of one that was not asked."""

import os
import signal

import pytest

from tests.tools.interrupted.runs import assert_same


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
