"""Processes with a GPU each, joined by NCCL, against one process on the CPU."""

import functools
import socket

import pytest
import torch

from resnet_backbone.engine.processes import RankInfo, spawn
from tests.engine import on_gpus


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu(2))]
)
def test_gradients_and_batch_norm_are_those_of_the_whole_batch(tmp_path, processes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    infos = [RankInfo(rank, processes, rank, processes, url) for rank in range(processes)]
    assert spawn(infos, functools.partial(on_gpus.step, tmp_path), on_gpu=True) == 0

    model = on_gpus.build()
    loss = model(on_gpus.images()).square().mean()
    loss.backward()
    for rank in range(processes):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert (found["backend"], found["gpu"]) == ("nccl", rank)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-10)
        for gradient, parameter in zip(found["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["mean"], model[1].running_mean, rtol=1e-9, atol=1e-12)
