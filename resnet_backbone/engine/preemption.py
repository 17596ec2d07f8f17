"""Preemption: on a signal, finish the step, save the state and exit."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.nn.modules.module import register_module_forward_pre_hook

from resnet_backbone.engine.hooks import Checkpoints
from resnet_backbone.engine.processes import install_handler, restore_handlers
from resnet_backbone.errors import Interrupted


class _EvaluationLeft(BaseException):
    """Raised in the middle of an evaluation, which may outlast the scheduler's grace period."""


class _WaitLeft(BaseException):
    """Raised by the signal handler while the next batch is awaited, which may never come."""


class Preemption(HookBase):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save, raise Interrupted. A second Ctrl-C ends the run at once.

    Several processes stop together, after the same iteration: they agree before each step, so it is enough for one of
    them to get the signal.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._received: signal.Signals | None = None
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._former = install_handler(self._handle)

    def after_train(self) -> None:
        restore_handlers(self._former)
        self._former = {}

    def interruptible(self, evaluate: Callable[[], dict]) -> dict:
        """Call `evaluate`, but abort it at the next module call after a signal; a resumed run evaluates again.

        With several processes, which would wait for each other, it runs to completion.
        """
        if comm.get_world_size() > 1:
            return evaluate()
        # The handler itself must not raise: the code it interrupts, such as a `__del__`, may swallow the exception.
        watch = register_module_forward_pre_hook(self._leave_evaluation)
        try:
            self._leave_evaluation()
            return evaluate()
        except _EvaluationLeft:
            pass
        finally:
            watch.remove()
        self._leave(self._received)

    def wait(self, fetch: Callable[[], Any]) -> Any:
        """Call `fetch` for the next batch, but leave on a signal, at once; a resumed run fetches the batch again.

        It comes before anything else of an iteration, in all processes, so all leave with the same state.
        """
        batch = None
        try:
            self._waiting = True
            if self._received is None:
                batch = fetch()  # here the handler may raise: what swallows the exception only delays the leaving
        except _WaitLeft:
            pass
        finally:
            self._waiting = False
        self.leave_if_asked()
        return batch

    def leave_if_asked(self) -> None:
        """Leave if a signal came; call it in all processes, between iterations or after the last one."""
        if (received := self._agree()) is not None:
            self._leave(received)

    def _agree(self) -> signal.Signals | None:
        """Return the signal that this process or another one received."""
        if comm.get_world_size() == 1:
            return self._received
        number = torch.tensor(self._received or 0)
        # On the CPU, by gloo: the processes wait for each other here, but not for their devices.
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return signal.Signals(number.item()) if number else None

    def _leave_evaluation(self, *_: Any) -> None:
        if self._received is not None:
            raise _EvaluationLeft

    def _leave(self, received: signal.Signals) -> None:
        iteration = self.trainer.iter - 1  # the latest one that is done
        if iteration < self.trainer.start_iter:
            raise Interrupted(f"{received.name}: left before the first iteration, with nothing new to save.")
        self._checkpoints.save(iteration)
        raise Interrupted(
            f"{received.name}: saved after {iteration + 1} of {self.trainer.max_iter} iterations. Go on with --resume."
        )

    def _handle(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # data loader workers share the handlers, but the training process decides
        again = self._received is not None
        if number == signal.SIGINT and again:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if not again:
            self._received = signal.Signals(number)
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                # Not through the logger, which may be in the middle of a line.
                os.write(2, f"{self._received.name}: finishing the step, then saving\n".encode())
        if self._waiting:
            self._waiting = False
            raise _WaitLeft
