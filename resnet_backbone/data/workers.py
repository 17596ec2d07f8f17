"""Start and set up loading processes."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# Signals that ask a run to stop; a queue or a terminal often sends them to all of its processes.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Loader(DataLoader):
    """A DataLoader with `workers` processes that survive signals to the whole run; 0 loads in this process.

    The workers are forked, so they share the data set's memory and import nothing, even if this process was spawned
    (its children would be spawned by default).
    """

    def __init__(self, dataset: Dataset, batch_sampler: Sampler, *, workers: int, **options: Any):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            # The workers' seed is drawn from this generator; drawing it from the global one would shift the random
            # numbers (dropout's) of a stopped and resumed run.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # A starting worker inherits the mask, and gets no signal before `prepare_worker`.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def prepare_worker(worker: int) -> None:
    """Limit a DataLoader worker to one thread and make it ignore signals from any process but its parent.

    This is the DataLoader's `worker_init_fn`. One thread is enough because the workers provide the parallelism. The
    training process decides when to stop and needs its workers until then, so a worker obeys SIGTERM, which a
    DataLoader uses to end it, only from its parent.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    # The collector marks every object it visits, which would copy memory that workers share with their parent.
    gc.freeze()
    # Only a thread that waits for a signal learns its sender, and only a blocked signal can be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process when the process `parent` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
