"""Start, set up and watch loading processes."""

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data._utils.collate import default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from resnet_backbone.data.errors import DatasetError

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 5.0  # seconds between looks at the workers while a batch is awaited
PATIENCE = 60.0  # seconds without a batch after which the log names the worker that owes it

# Signals that ask a run to stop; a queue or a terminal often sends them to all of its processes.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Loader(DataLoader):
    """A DataLoader with `workers` processes that survive signals to the whole run; 0 loads in this process.

    The workers are forked, so they share the data set's memory and import nothing, even if this process was spawned
    (its children would be spawned by default).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: Sampler,
        *,
        workers: int,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=_Sharing(collate_fn),
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

    def _get_iterator(self) -> Iterator[Any]:
        return _WatchedIterator(self) if self.num_workers else super()._get_iterator()


class _WatchedIterator(_MultiProcessingDataLoaderIter):
    """The DataLoader's iterator, which says in the log whom it waits for."""

    def __init__(self, loader: DataLoader):
        self._waited = 0.0
        super().__init__(loader)

    def _next_data(self) -> Any:
        try:
            return super()._next_data()
        except (OSError, EOFError) as error:
            # A worker that dies between announcing a batch and handing over its memory breaks a connection. The system
            # tells of its death a moment later.
            time.sleep(1.0)
            if dead := [worker.pid for worker in self._workers if not worker.is_alive()]:
                raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(map(str, dead))}) is gone") from error
            raise

    def _try_get_data(self, timeout: float = CHECK_INTERVAL) -> tuple[bool, Any]:
        came, data = super()._try_get_data(timeout)
        before, self._waited = self._waited, 0.0 if came else self._waited + timeout
        if self._waited // PATIENCE > before // PATIENCE:
            number = self._task_info[self._rcvd_idx][0]
            logger.warning(
                "no batch for %.0f s: loading process %d of %d (pid %d) is stuck, or the disk that it reads from",
                self._waited,
                number + 1,
                self._num_workers,
                self._workers[number].pid,
            )
        return came, data


class _Sharing:
    """Collates samples and, in a worker, moves the batch's tensors into shared memory at once.

    Otherwise a thread of the queue does that, whose errors only end up on the terminal: the batch never arrives.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        if get_worker_info() is None:
            return self._collate(samples)
        try:
            batch = self._collate(samples)
            _share(batch)
            return batch
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            size, _, free = shutil.disk_usage("/dev/shm")
            raise DatasetError(
                f"loading processes hand over batches in shared memory, and /dev/shm has {free / 2**20:.0f} of "
                f"{size / 2**20:.0f} MiB left. Give the container more (docker run --shm-size 8g), lower "
                "DATALOADER.NUM_WORKERS, or set it to 0."
            ) from error


def _share(value: Any) -> None:
    """Move all tensors of a batch, in containers and in objects' attributes, into shared memory."""
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, Mapping):
        for part in value.values():
            _share(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _share(part)
    elif hasattr(value, "__dict__"):  # Detectron2's structures
        _share(vars(value))


@contextlib.contextmanager
def explained_deaths() -> Iterator[None]:
    """Turn the error of a DataLoader whose worker died, which may surface anywhere, into one for the user."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DatasetError(
            f"a process that loads data ended: {str(error).removeprefix('DataLoader ').partition('. ')[0]}. The kernel "
            "kills processes when memory runs out; lower DATALOADER.NUM_WORKERS, or the size of the images. The last "
            "checkpoint is whole: continue with --resume."
        ) from error


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
    sys.excepthook = _say_error
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _say_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error, unless it says that a connection broke: so it does when the training process is killed.

    The thread that hands over batches calls this for its own errors.
    """
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)


def _obey(parent: int) -> None:
    """End this process when the process `parent` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
