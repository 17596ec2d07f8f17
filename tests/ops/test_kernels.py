"""Where a GPU lacks what Triton needs, the plain functions run, which is said once."""

import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from resnet_backbone.ops import kernels


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    caches = (kernels._say_slower, kernels._has_compiler)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def on_a_gpu(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, dtype=dtype)


def test_with_triton_and_a_compiler(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert kernels.kernels_for(on_a_gpu(), "nms_kernels", "suppression").nms
    assert kernels.kernels_for(on_a_gpu(torch.float64), "nms_kernels", "suppression") is None
    assert kernels.kernels_for(torch.zeros(1), "nms_kernels", "suppression") is None


@pytest.mark.parametrize("lacks", ["Triton is not installed", "Triton finds no C compiler"])
def test_without_one_of_them(monkeypatch, caplog, lacks):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    if "installed" in lacks:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "resnet_backbone.ops.nms_kernels", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert kernels.kernels_for(on_a_gpu(), "nms_kernels", "suppression") is None
    (record,) = caplog.records
    assert record.message.startswith(f"{lacks}: suppression takes its slower path")
