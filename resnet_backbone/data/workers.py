"""What every loading process does first."""

import signal

import cv2
import torch


def prepare_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: one thread, since the workers are the parallelism, and deaf to signals.

    Signals that ask a run to stop often go to all of its processes. The training process decides when to leave, and
    needs its workers until then; when it ends, they do.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
