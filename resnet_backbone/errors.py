"""What ends a command in an orderly way, and the exit codes that scripts and queues can go by."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
EXIT_CTRL_C = 128 + signal.SIGINT  # the shell's exit code for a signal

# A disk is full, over quota, mounted read-only, broken or gone, or a file is too large for it.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
# What is wrong with a path that was given to write to.
_PATH_ERRORS = (
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG
)  # fmt: skip


class InputError(ValueError):
    """Something a user gave (a path, a name, a key, a file) cannot be used.

    The message stands alone: what was found, what was expected, what to do. The command lines print it without a
    stack trace and exit with EXIT_BAD_INPUT.
    """


class Interrupted(Exception):
    """A signal (SIGTERM, SIGUSR1, Ctrl-C) ended the run after it had saved; raised in every process.

    The command lines print the message and exit with EXIT_INTERRUPTED.
    """


def os_error(error: BaseException) -> OSError | None:
    """The OSError behind a failed write; torch.save raises a RuntimeError of its own with the OSError as context."""
    reason = error.__context__ if isinstance(error, RuntimeError) else error
    return reason if isinstance(reason, OSError) else None


def new_file(text: str) -> Path:
    """For argparse: a path to write a file to, rejected now and not when there is something to write."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return path


def exit_code(command: Callable[[], object], *, interrupted: str = "") -> int:
    """Call a command line's work; return its exit code, and say in a sentence what stopped it, if anything did.

    Args:
        command: returns the exit code where that may be another than 0.
        interrupted: printed instead of an Interrupted's own message.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as tools set it for their imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine get the same error here
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as error:
        print(interrupted or error, file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_CTRL_C
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, *_PATH_ERRORS):
            raise
        place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "a file"
        print(f"error: {place} cannot be read or written: {error.strerror}.", file=sys.stderr)
        return EXIT_BAD_INPUT
