"""What ends a command in an orderly way, and the exit codes that scripts and queues can go by."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class InputError(ValueError):
    """Something a user gave (a path, a name, a key, a file) cannot be used.

    The message stands alone: what was found, what was expected, what to do. The command lines print it without a
    stack trace and exit with EXIT_BAD_INPUT.
    """


class Interrupted(Exception):
    """A signal (SIGTERM, SIGUSR1, Ctrl-C) ended the run after it had saved; raised in every process.

    The command lines print the message and exit with EXIT_INTERRUPTED.
    """
