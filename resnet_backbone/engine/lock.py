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
        os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
