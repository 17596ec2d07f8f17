"""Freed memory is reused: the kernel's count of page faults shows it."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
import torch
from resnet_backbone.engine.allocator import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
    sys.exit(3)
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(20):  # until a block of 64 MiB fits into what is free
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_large_blocks_are_reused():
    faults = {}
    for mode in ("left alone", "kept"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("the C library is not glibc")
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["left alone"] > 1000 > 100 > faults["kept"]


def test_another_c_library_is_left_alone(monkeypatch):
    from resnet_backbone.engine import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    allocator.keep_freed_memory()
