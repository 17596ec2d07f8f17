"""Write files atomically: they are complete or absent."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; when the block ends, flush it to disk and rename it to `path`.

    If the block raises, `path` is untouched and the temporary file is removed. Readers never see a partial file,
    even if the process is killed or the disk fills up. A missing folder is created. A killed process leaves its
    temporary file (`.NAME.….tmp`) behind.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _renamed_when_complete(path) as file:
            yield file
        _sync_folder(path.parent)
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # rather than the temporary file, or none at all
        raise


@contextlib.contextmanager
def _renamed_when_complete(path: Path) -> Iterator[BinaryIO]:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp restricts access to the owner
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # gone, or on a disk that is
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` atomically as indented JSON. Numbers that JSON lacks (NaN, infinity) become null."""
    with atomic_write(path) as file:
        file.write((json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """Replace numbers that JSON lacks with null, such as the AP for a size that no object has."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
