import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_backbone.weights import atomic_write, write_json


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second, longer", b""):
        with atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["file"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(kind), atomic_write(path) as file:
        file.write(b"half of the ne")
        raise kind
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 100_000


def test_flushes_to_disk_before_renaming(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: calls.append("fsync") or fsync(d))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(f"replace {Path(a).stat().st_size}") or replace(a, b))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"four")
    assert calls == ["fsync", "replace 4", "fsync"]  # the last one is the folder's


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = """
import sys, time
from resnet_backbone.weights import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half" * 100_000)
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"


def test_json(tmp_path):
    value = {"scale": "demo", "AP": 21.25, "names": ["Å", None, True]}
    write_json(tmp_path / "results.json", value)
    assert json.loads((tmp_path / "results.json").read_text()) == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"bad": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == value
    assert os.listdir(tmp_path) == ["results.json"]
