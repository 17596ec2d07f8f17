"""The one exception that means "what you gave cannot be used, and here is what to do"."""


class InputError(ValueError):
    """Something a user gave (a path, a name, a key, a file) cannot be used.

    The message stands alone: what was found, what was expected, what to do. The command lines print it without a
    stack trace and exit with code 2.
    """
