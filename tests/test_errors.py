"""How a command line ends."""

import argparse
import errno
import os

import pytest

from resnet_backbone.errors import InputError, Interrupted, exit_code, new_file, os_error


def raises(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("there is no x."), 2, "error: there is no x."),
        (Interrupted("SIGTERM: saved"), 75, "SIGTERM: saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (IsADirectoryError(21, "Is a directory", "/out"), 2, "error: /out cannot be read or written: Is a directory."),
        (OSError(errno.ENOSPC, "No space"), 2, "error: a file cannot be read or written: No space."),
    ],
)
def test_exit_codes(error, code, said, capsys):
    assert exit_code(raises(error)) == code
    assert capsys.readouterr() == ("", f"{said}\n")


def test_without_an_error(capsys):
    assert [exit_code(lambda result=result: result) for result in (0, 1, None, {"AP": 1.0})] == [0, 1, 0, 0]
    assert exit_code(raises(Interrupted("x")), interrupted="come back") == 75
    assert capsys.readouterr().err == "come back\n"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), ZeroDivisionError(), RuntimeError()])
def test_a_bug_stays_a_bug(error):
    with pytest.raises(type(error)):
        exit_code(raises(error))


def test_the_error_behind_an_error():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os_error(full) is full and os_error(ValueError()) is None and os_error(RuntimeError()) is None
    try:
        try:
            raise full
        finally:
            raise RuntimeError("torch's own")
    except RuntimeError as error:
        assert os_error(error) is full


def test_a_file_to_write(tmp_path):
    assert new_file(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        new_file(str(tmp_path))
