"""What a disk does to a run in the middle of it, said in a sentence: full, over quota, read-only, broken, gone."""

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import DISK_ERRORS, InputError, Interrupted, os_error

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn errors that only a disk raises, and any OSError about a path in OUTPUT_DIR `folder`, into a ConfigError.

    Other OSErrors are logged.
    """
    former = threading.excepthook

    def in_a_thread(arguments: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread keeps its error for the main thread, which raises it; no need to print it as well.
        if arguments.exc_value is None or _sentence(arguments.exc_value, folder) is None:
            former(arguments)

    threading.excepthook = in_a_thread
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, (InputError, Interrupted)):
            raise error.__context__ from None  # it ended the run; this one is of closing files afterwards
        if sentence := _sentence(error, folder):
            raise ConfigError(sentence) from error
        if os_error(error) is not None:
            logger.exception("the run stopped")
        raise
    finally:
        threading.excepthook = former


def _sentence(error: BaseException, folder: Path) -> str | None:
    """What to say of an error if it is the disk's or about a path in `folder`, else None."""
    if (reason := os_error(error)) is None:
        return None
    path = os.fsdecode(reason.filename) if isinstance(reason.filename, (str, bytes, os.PathLike)) else None
    inside = path is not None and Path(path).absolute().is_relative_to(folder.absolute())
    if reason.errno not in DISK_ERRORS and not (inside and reason is error):
        return None
    place = f"OUTPUT_DIR {folder}" if path is None else path
    cannot = "be written" if inside or path is None else "be read or written"
    first = "Free some space" if reason.errno in (errno.ENOSPC, errno.EDQUOT) else "Repair that"
    return (
        f"{place} cannot {cannot} ({reason.strerror}); the checkpoints written before are whole. {first} and go on "
        "with --resume, or choose another OUTPUT_DIR."
    )


class LogStream(logging.StreamHandler):
    """Loses lines that cannot be written, and says so once; `logging` itself prints a stack trace for each."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            name = getattr(self, "baseFilename", "the log on the terminal")
            with contextlib.suppress(OSError):
                os.write(2, f"{name} loses lines: {error.strerror}\n".encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class LogFile(LogStream, logging.FileHandler):
    """The same for a file."""
