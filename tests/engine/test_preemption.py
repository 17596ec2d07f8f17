"""Signals, sent to this process in the middle of a step or an evaluation."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from resnet_backbone.engine.hooks import Checkpoints, Evaluation
from resnet_backbone.engine.output import read_last_checkpoint
from resnet_backbone.engine.preemption import Preemption
from resnet_backbone.engine.processes import SIGNALS
from resnet_backbone.errors import Interrupted
from tests.engine.tiny import Run, assert_same, build, in_two_processes, metrics


def send(number: int, *iterations: int):
    """A function of the iteration that sends a signal in some of them."""
    return lambda i: os.kill(os.getpid(), number) if i in iterations else None


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before come back, whatever a run ends with; Python's own where a test sets none."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    found = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == before


class TestInAStep:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_it_is_finished_saved_and_resumed(self, cfg, tmp_path, number, capfd):
        cfg.SOLVER.EMA_DECAY, cfg.TEST.EVAL_PERIOD = 0.9, 3
        whole = Run(cfg, tmp_path / "whole")
        with pytest.raises(Interrupted) as caught:
            Run(cfg, tmp_path / "parts", during_step=send(number, 5))
        name = signal.Signals(number).name
        assert str(caught.value) == f"{name}: saved after 6 of 10 iterations. Go on with --resume."
        assert capfd.readouterr().err == f"{name}: finishing the step, then saving\n"
        last = read_last_checkpoint(tmp_path / "parts")
        assert last.iteration == 5 and last.metadata.origin["iterations"] == 6
        resumed = Run(cfg, tmp_path / "parts", resume=True)
        assert resumed.seen == whole.seen[6:] and resumed.evaluated == [6, 9]
        assert_same(whole, resumed)
        assert metrics(tmp_path / "parts", times=False) == metrics(tmp_path / "whole", times=False)

    def test_in_one_that_saves_anyway(self, cfg, tmp_path):
        with pytest.raises(Interrupted, match="SIGTERM: saved after 4 of 10"):
            Run(cfg, tmp_path / "run", during_step=send(signal.SIGTERM, 3))
        assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["model_0000003.pth"]

    def test_in_the_last_one_the_final_evaluation_is_left_to_a_resumed_run(self, cfg, tmp_path):
        with pytest.raises(Interrupted, match="SIGTERM: saved after 10 of 10"):
            Run(cfg, tmp_path / "run", during_step=send(signal.SIGTERM, 9))
        assert read_last_checkpoint(tmp_path / "run").iteration == 9
        assert Run(cfg, tmp_path / "run", resume=True).seen == []

    def test_several_are_one(self, cfg, tmp_path):
        def both(i):
            send(signal.SIGUSR1, 2)(i)
            send(signal.SIGTERM, 2)(i)

        with pytest.raises(Interrupted, match="saved after 3 of 10"):
            Run(cfg, tmp_path / "run", during_step=both)

    def test_bad_weights_are_not_saved(self, cfg, tmp_path):
        """A step before it gave a loss that is not a number, and nobody has looked yet."""
        with pytest.raises(FloatingPointError, match="iteration 6 gave"):
            Run(
                cfg,
                tmp_path / "run",
                factor=lambda i: float("nan") if i == 6 else 1.0,
                during_step=send(signal.SIGTERM, 7),
            )
        assert read_last_checkpoint(tmp_path / "run").iteration == 3


class TestWhileABatchIsAwaited:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_the_wait_is_left_at_once_and_the_batch_fetched_again(self, cfg, tmp_path, number):
        def stuck(iteration: int) -> None:
            if iteration == 5:
                threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
                time.sleep(60)

        whole, begin = Run(cfg, tmp_path / "whole"), time.monotonic()
        name = signal.Signals(number).name
        with pytest.raises(Interrupted, match=f"{name}: saved after 5 of 10 iterations"):
            Run(cfg, tmp_path / "parts", during_fetch=stuck)
        assert time.monotonic() - begin < 30
        resumed = Run(cfg, tmp_path / "parts", resume=True)
        assert resumed.seen == whole.seen[5:]
        assert_same(whole, resumed)

    def test_the_first_batch_leaves_nothing_to_save(self, cfg, tmp_path):
        with pytest.raises(Interrupted, match="SIGTERM: left before the first iteration, with nothing new to save"):
            Run(cfg, tmp_path / "run", during_fetch=send(signal.SIGTERM, 0))
        assert not list((tmp_path / "run").glob("*.pth"))

    def test_a_signal_that_something_swallows_is_obeyed_after_the_wait(self, cfg, tmp_path):
        def swallow(iteration: int) -> None:
            if iteration == 5:
                with contextlib.suppress(BaseException):
                    os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted, match="SIGTERM: saved after 5 of 10 iterations"):
            Run(cfg, tmp_path / "run", during_fetch=swallow)

    def test_an_evaluation_of_the_same_iteration_has_not_begun(self, cfg, tmp_path):
        """The resumed run would count it twice: a plateau would be found too early."""
        cfg.TEST.EVAL_PERIOD = 5
        evaluated = []
        with pytest.raises(Interrupted, match="saved after 5 of 10"):
            Run(cfg, tmp_path / "run", during_fetch=send(signal.SIGTERM, 5), during_evaluation=evaluated.append)
        assert evaluated == []
        assert Run(cfg, tmp_path / "run", resume=True).evaluated == [5]


class TestInAnEvaluation:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_it_is_left_at_once_and_done_again(self, cfg, tmp_path, number):
        cfg.SOLVER.EMA_DECAY, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.LOG_PERIOD = 0.9, 5, 4
        whole = Run(cfg, tmp_path / "whole", scores=float)
        with pytest.raises(Interrupted) as caught:
            Run(cfg, tmp_path / "parts", scores=float, during_evaluation=send(number, 5))
        assert str(caught.value).startswith(f"{signal.Signals(number).name}: saved after 5 of 10")
        assert read_last_checkpoint(tmp_path / "parts").iteration == 4
        assert not (tmp_path / "parts" / "model_best.pth").exists()
        resumed = Run(cfg, tmp_path / "parts", scores=float, resume=True)
        assert resumed.evaluated == [5] and resumed.seen == whole.seen[5:]
        assert_same(whole, resumed)
        assert metrics(tmp_path / "parts", times=False) == metrics(tmp_path / "whole", times=False)
        assert (tmp_path / "parts" / "model_best.pth").exists()

    def test_code_that_expects_exceptions_does_not_swallow_it(self, cfg, tmp_path):
        """As a loader's `except Exception` might."""
        cfg.TEST.EVAL_PERIOD = 5
        reached = []

        def evaluate(i):
            try:
                send(signal.SIGTERM, 5)(i)
                nn.Identity()(i)
                reached.append("on")
            except Exception:
                reached.append("swallowed")

        with pytest.raises(Interrupted):
            Run(cfg, tmp_path / "run", during_evaluation=evaluate)
        assert reached == []

    def test_it_may_come_where_nothing_can_be_raised(self, cfg, tmp_path):
        cfg.TEST.EVAL_PERIOD = 5

        class Sender:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                gone.append(1)

        gone = []
        with pytest.raises(Interrupted, match="SIGTERM: saved after 5 of 10"):
            Run(cfg, tmp_path / "run", during_evaluation=lambda _: Sender() and None)
        assert gone == [1]

    def test_nothing_watches_modules_afterwards(self, cfg, tmp_path):
        cfg.TEST.EVAL_PERIOD = 5
        Run(cfg, tmp_path / "run", scores=float)
        with pytest.raises(Interrupted):
            Run(cfg, tmp_path / "left", during_evaluation=send(signal.SIGTERM, 5))
        assert not nn.modules.module._global_forward_pre_hooks

    def test_one_that_came_before_it_began(self):
        """Between two steps: the evaluation is not begun."""
        saved, evaluated = [], []
        checkpoints = Checkpoints(saved.append, 0)
        preemption = Preemption(checkpoints)

        class Late(HookBase):
            def before_step(self):
                if self.trainer.iter == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                    preemption.interruptible(lambda: evaluated.append(1) or {})

        with pytest.raises(Interrupted, match="saved after 3 of"):
            build(hooks=[Late(), checkpoints, preemption]).train(0, 10)
        assert evaluated == [] and saved == [2]


class TestCtrlC:
    def test_a_second_one_ends_the_run_at_once(self, cfg, tmp_path):
        reached = []

        def step(i):
            if i == 5:
                os.kill(os.getpid(), signal.SIGINT)
                reached.append("after the first")
                os.kill(os.getpid(), signal.SIGINT)
                reached.append("after the second")

        with pytest.raises(KeyboardInterrupt):
            build_run(cfg, tmp_path / "run", step)
        assert reached == ["after the first"]
        assert read_last_checkpoint(tmp_path / "run").iteration == 3

    def test_after_another_signal_one_is_enough(self, cfg, tmp_path):
        """Whoever types it does not want to wait."""

        def step(i):
            if i == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            build_run(cfg, tmp_path / "run", step)


def build_run(cfg, folder: Path, step) -> None:
    """A run whose KeyboardInterrupt comes through."""

    class Raised(Exception):
        pass

    def guarded(i):
        try:
            step(i)
        except KeyboardInterrupt as error:
            raise Raised from error

    try:
        Run(cfg, folder, during_step=guarded)
    except Raised:
        raise KeyboardInterrupt from None


def test_a_forked_child_leaves_it_to_the_training_process(cfg, tmp_path):
    """A loader's workers are forked and get a terminal's Ctrl-C too."""
    codes = []

    def child():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)

    def step(i):
        if i == 5:
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(30)
            codes.append(process.exitcode)

    run = Run(cfg, tmp_path / "run", during_step=step)
    assert codes == [7] and len(run.seen) == 10


def test_in_another_thread_there_are_no_handlers_and_no_error(cfg, tmp_path):
    """Python lets the main thread alone set them."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(Run(cfg, tmp_path / "run")))
    thread.start()
    thread.join(60)
    assert len(runs[0].seen) == 10


def _signalled(where: str) -> dict[str, object]:
    """A run of 20 iterations whose rank 1 alone gets a signal, in iteration 6, its evaluation, or the wait before."""
    rank = torch.distributed.get_rank()
    saved, evaluated = [], []
    checkpoints = Checkpoints(saved.append, 0)
    preemption = Preemption(checkpoints)

    def losses(model, i):
        if rank == 1 and i == 6 and where == "step":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": model(torch.ones(1, 1)).sum()}, {}

    def evaluate():
        if rank == 1 and where == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        evaluated.append(1)
        return {}

    def batches(start):
        for i in range(start, 100):
            if rank == 1 and i == 6 and where == "wait":
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            yield i

    hooks = [Evaluation(lambda: preemption.interruptible(evaluate), 6), checkpoints, preemption]
    trainer = build(losses=losses, hooks=hooks, batches=batches)
    trainer.wait = preemption.wait
    try:
        trainer.train(0, 20)
    except Interrupted as error:
        return {"message": str(error), "saved": saved, "evaluated": len(evaluated)}
    return {"message": "came to its end"}


@pytest.mark.parametrize(("where", "done"), [("step", 7), ("evaluation", 7), ("wait", 6)])
def test_of_two_processes_one_is_signalled_and_both_leave_together(tmp_path, where, done):
    zero, one = in_two_processes(_signalled, tmp_path, where, seconds=45)
    message = f"SIGTERM: saved after {done} of 20 iterations. Go on with --resume."
    expected = {"message": message, "evaluated": done - 6}
    assert zero == {**expected, "saved": [done - 1]} and one == {**expected, "saved": []}
