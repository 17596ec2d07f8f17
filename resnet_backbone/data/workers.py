"""Loading processes: how they are started, and what each of them does first."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# What asks a run to stop; a queue or a terminal often sends it to all processes of a run.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Loader(DataLoader):
    """A DataLoader with `workers` processes that outlive signals to the whole run, or with 0 in this process.

    The workers are forked, so they share the data set's memory and import nothing, also where this process was spawned
    (whose children would be spawned by default).
    """

    def __init__(self, dataset: Dataset, batch_sampler: Sampler, *, workers: int, **options: Any):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            # A number for the workers is drawn from this generator; from the global one it would shift the random
            # numbers (dropout's) of a run that was stopped and resumed.
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        # A worker that is being started inherits the mask, and gets no signal before `prepare_worker`.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def prepare_worker(worker: int) -> None:
    """Limit a DataLoader's worker to one thread and make it ignore signals from any process but its parent.

    This is the DataLoader's `worker_init_fn`. One thread, because the workers are the parallelism. The training process
    decides when to stop and needs its workers until then, so a worker obeys SIGTERM, with which a DataLoader ends it,
    from its parent alone.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    # The collector marks every object it looks at, and so would copy what the workers share with their parent.
    gc.freeze()
    # The sender of a signal is known only to a thread that waits for it, and only a blocked signal can be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process when the process `parent` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
