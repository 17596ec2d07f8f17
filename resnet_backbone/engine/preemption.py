"""Preemption: on a signal, finish the step, save the state and exit."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

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

    Several processes stop together, after the same iteration. They sync every `period` iterations, so it is enough
    for one of them to get the signal.
    """

    def __init__(self, checkpoints: Checkpoints, period: int):
        self._checkpoints = checkpoints
        self._period = period
        self._received: str | None = None
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._former = install_handler(self._handle)

    def after_train(self) -> None:
        restore_handlers(self._former)
        self._former = {}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        received = self._received
        if comm.get_world_size() > 1:
            if done % self._period:
                return
            received = next(filter(None, comm.all_gather(received)), None)
        if received is not None and done < self.trainer.max_iter:
            self._leave(received, self.trainer.iter)

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
        self._leave(self._received, self.trainer.iter - 1)

    def wait(self, fetch: Callable[[], Any]) -> Any:
        """Call `fetch` for the next batch, but abort it on a signal; a resumed run fetches the batch again.

        With several processes, it waits to the end: the others may be in the middle of the step.
        """
        if comm.get_world_size() > 1:
            return fetch()
        try:
            self._waiting = True
            if self._received is not None:
                raise _WaitLeft
            # Here the handler may raise: if something swallows the exception, the run leaves after the step.
            return fetch()
        except _WaitLeft:
            pass
        finally:
            self._waiting = False
        self._leave(self._received, self.trainer.iter - 1)

    def _leave_evaluation(self, *_: Any) -> None:
        if self._received is not None:
            raise _EvaluationLeft

    def _leave(self, received: str, iteration: int) -> None:
        if iteration < self.trainer.start_iter:
            raise Interrupted(f"{received}: left before the first iteration, with nothing new to save.")
        self._checkpoints.save(iteration)
        raise Interrupted(
            f"{received}: saved after {iteration + 1} of {self.trainer.max_iter} iterations. Go on with --resume."
        )

    def _handle(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # data loader workers share the handlers, but the training process decides
        again = self._received is not None
        if number == signal.SIGINT and again:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if not again:
            self._received = signal.Signals(number).name
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                # Not through the logger, which may be in the middle of a line.
                os.write(2, f"{self._received}: finishing the step, then saving\n".encode())
        if self._waiting:
            raise _WaitLeft
