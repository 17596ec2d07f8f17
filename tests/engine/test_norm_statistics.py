"""In two processes with batch norm, what is evaluated is what is saved, and a resumed run ends in the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch import nn

from resnet_backbone.engine.norm_statistics import NormStatistics
from resnet_backbone.weights import read_checkpoint

SCRIPT = Path(__file__).with_name("launched.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folders `whole`, and `run` that was stopped and resumed."""
    root = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(SCRIPT), "statistics", "2", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return root


def ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_both_processes_evaluate_with_the_mean_of_their_statistics(trained):
    one, two = ranks(trained / "whole")
    assert list(one["evaluated"]) == list(two["evaluated"]) == [2, 5]
    for iteration, statistics in one["evaluated"].items():
        assert statistics.keys() == two["evaluated"][iteration].keys() and statistics
        assert all(torch.equal(b, two["evaluated"][iteration][key]) for key, b in statistics.items())


def test_a_checkpoint_holds_the_mean_and_the_best_one_what_was_evaluated(trained):
    for file in ("model_0000003.pth", "model_0000007.pth"):
        checkpoint = read_checkpoint(trained / "whole" / file)
        own = checkpoint.trainer["norm_statistics"]["own"]
        assert own.shape[0] == 2 and not torch.equal(own[0], own[1])
        names = [key for key in checkpoint.model if "running" in key]
        # The network's, and behind them those of the moving average.
        for state, part in zip((checkpoint.model, checkpoint.trainer["average"]), own.mean(dim=0).chunk(2)):
            assert torch.allclose(torch.cat([state[key] for key in names]), part, rtol=1e-12, atol=0)
    one, _ = ranks(trained / "whole")
    best = read_checkpoint(trained / "whole" / "model_best.pth")
    evaluated = one["evaluated"][best.metadata.origin["iterations"] - 1]
    assert all(torch.equal(best.model[key], value) for key, value in evaluated.items())


def test_at_the_end_both_have_the_mean(trained):
    one, two = (rank["model"] for rank in ranks(trained / "whole"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_resumed_run_ends_in_the_same_bits(trained):
    for whole, resumed in zip(ranks(trained / "whole"), ranks(trained / "run"), strict=True):
        assert whole["model"].keys() == resumed["model"].keys()
        assert all(torch.equal(value, resumed["model"][key]) for key, value in whole["model"].items())
        assert list(resumed["seen"]) == [4, 5, 6, 7]
    whole, resumed = (read_checkpoint(trained / name / "model_0000007.pth") for name in ("whole", "run"))
    assert torch.equal(*(c.trainer["norm_statistics"]["own"] for c in (whole, resumed)))
    assert whole.trainer["plateau"] == resumed.trainer["plateau"]


@pytest.mark.parametrize("saved, loaded", [(1, 2), (2, 1), (2, 2)])
def test_an_average_may_come_or_go(monkeypatch, saved, loaded):
    """The trained network's statistics come first."""

    def norms(value: float, count: int) -> list[nn.Module]:
        models = [nn.BatchNorm2d(3) for _ in range(count)]
        for number, model in enumerate(models):
            model.running_mean.fill_(value + 10 * number)
        return models

    own = torch.stack([NormStatistics(norms(value, saved))._flat() for value in (1.0, 2.0)])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    models = norms(5.0, loaded)
    NormStatistics(models).load_state_dict({"own": own})
    assert models[0].running_mean.tolist() == [2.0] * 3
    if loaded == 2:
        assert models[1].running_mean.tolist() == [12.0 if saved == 2 else 15.0] * 3
