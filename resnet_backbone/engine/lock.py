"""One run at a time in an output folder: a lock that ends with the process that holds it."""

import contextlib
import datetime
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from resnet_backbone.engine.config import ConfigError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_opened: dict[Path, os.stat_result] = {}  # the lock files of folders that this process writes to


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder`; yield whether there is one, since some file systems have none.

    It is a POSIX record lock (`lockf`). NFS passes it on to its server, so it counts on all machines. A forked child
    does not inherit it, as it would `flock`'s: loader workers that outlive a killed run must not keep the next one out.
    The price is that closing any descriptor of the file ends it, so nothing else in the process may open the file.

    Raises:
        ConfigError: another process holds it.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _opened[folder] = os.fstat(descriptor)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                yield False
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"OUTPUT_DIR {folder} is in use by {holder}. Wait until it ends, or choose another OUTPUT_DIR; to "
                f"evaluate meanwhile, another one with MODEL.WEIGHTS. If its machine is down, delete {folder / LOCK}."
            ) from None
        _write(descriptor, f"process {os.getpid()} on {platform.node()} since {_now()}\n")
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # a disk that is gone; closing still ends the lock
                _write(descriptor, "")
    finally:
        del _opened[folder]
        os.close(descriptor)


def check_still_there(folder: Path) -> None:
    """Stop a run whose folder was deleted, moved or replaced: what it went on to write would mix with another run's.

    Nothing is checked of a folder that is not in `locked`.

    Raises:
        ConfigError: the lock file is gone, or is another one.
    """
    try:
        if folder not in _opened or os.path.samestat(_opened[folder], os.stat(folder / LOCK)):
            return
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise
    raise ConfigError(
        f"OUTPUT_DIR {folder} or its {LOCK} was deleted, moved or replaced while this run wrote there, so it stops "
        "before it mixes with another. Start it anew, or with --resume in the folder that has its checkpoints."
    )


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
