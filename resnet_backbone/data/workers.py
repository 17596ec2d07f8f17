"""What every loading process does first."""

import os
import signal
import threading

import cv2
import torch


def prepare_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: one thread, since the workers are the parallelism, and deaf to strangers.

    Signals that ask a run to stop often go to all of its processes. The training process decides when to leave, and
    needs its workers until then. So they take SIGTERM, by which a DataLoader ends them, from it alone.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Only a waiting thread is told who sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(master: int) -> None:
    """End this process when `master` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != master:
        pass
    os._exit(0)
