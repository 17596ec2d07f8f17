"""Of two processes that train together one is killed, or both are asked to leave. Others finish their run."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_backbone.weights import read_checkpoint
from tests.tools.interrupted.runs import Run, assert_same, command, metrics

# A network in which nothing depends on how images are divided among processes: no batch norm, no dropout.
DIVIDED = """
MODEL.NETWORK.NAME cifar_resnet20  MODEL.NETWORK.WIDTH 0.5  MODEL.NETWORK.POOL5 True  MODEL.RESNETS.NORM GN
DATALOADER.NUM_WORKERS 1  SOLVER.MAX_ITER 60  SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR  SOLVER.WARMUP_UNTIL_ERROR 0
SOLVER.BASE_LR 0.003  TEST.EVAL_PERIOD 0
"""


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


def ranks(parent: int) -> list[int]:
    """The processes that train, in the order of their start."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


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

    def run(folder: Path, accident: Callable[[Run], None] | None) -> tuple[int, str]:
        started = command(tmp_path / "output.txt", words(folder, "--num-gpus 2", resume=accident is not None))
        if accident is not None:
            accident(started)
        return started.end()

    def kill_the_second(started: Run) -> None:
        started.wait_for("model_0000005.pth")
        first, second = ranks(started.pid)
        os.kill(second, signal.SIGKILL)
        survivors.append(first)

    def ask(started: Run) -> None:
        started.wait_for("model_0000011.pth")
        started.send(signal.SIGTERM)

    whole, folder, survivors = tmp_path / "whole", tmp_path / "run", []
    for place, accident, expected in (
        (whole, None, 0),
        (folder, kill_the_second, 128 + signal.SIGKILL),
        (folder, ask, 75),
        (folder, lambda started: None, 0),
    ):
        status, printed = run(place, accident)
        assert status == expected and "Traceback" not in printed, printed
        assert not any(Path(f"/proc/{process}").exists() for process in survivors)
    assert_same(folder, whole)
    best = read_checkpoint(whole / "model_best.pth").metadata.origin
    assert read_checkpoint(whole / "model_0000023.pth").trainer["plateau"]["drops"] > 0
    evaluation = words(tmp_path / "test", f"--eval-only MODEL.WEIGHTS {whole / 'model_best.pth'}", resume=False)
    status, printed = command(tmp_path / "output.txt", evaluation).end()
    assert status == 0, printed
    assert f"top-1 {best['top1']:.2f}%, " in printed
