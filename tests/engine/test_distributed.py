"""Two processes train as one does with the same batch, and one goes on where the other stopped.

The networks have no batch statistics, so that which images share a process does not matter; in float64 only the order
of sums remains.
"""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("launched.py")


@pytest.fixture(scope="module")
def launched(load_script):
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def trained(launched, tmp_path_factory) -> Path:
    """NETWORK/{whole,half,rest} in the folders `one` and `two`, by one process and by two; a rest follows the other."""
    root = tmp_path_factory.mktemp("trained")
    one, two = root / "one", root / "two"
    cfg = launched.load(Namespace(folder=str(one)))
    launched.trainings_run(cfg)
    theirs = shutil.ignore_patterns("rank*.pt")
    for half in one.glob("*/half"):
        shutil.copytree(half, two / half.parent.name / "rest", ignore=theirs)
    command = [sys.executable, str(SCRIPT), "trainings", "2", str(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for half in two.glob("*/half"):
        shutil.copytree(half, one / half.parent.name / "rest", ignore=theirs)
        launched.train_network(cfg.clone(), half.parent.name, one / half.parent.name / "rest")
    return root


def order(*ranks: dict) -> dict[int, list[tuple[int, int]]]:
    """The positions and indices of the images at each iteration, over all ranks."""
    assert len({tuple(rank["seen"]) for rank in ranks}) == 1
    return {number: [pair for rank in ranks for pair in rank["seen"][number]] for number in ranks[0]["seen"]}


def read(folder: Path) -> list[dict]:
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.mark.parametrize("name", ["gn", "frozen_bn", "vgg"])
class TestTwoProcessesAndOne:
    def test_see_the_same_images_in_the_same_order(self, trained, launched, name):
        one, two = order(*read(trained / "one" / name / "whole")), read(trained / "two" / name / "whole")
        assert len(two) == 2 and order(*two) == one
        first = range(launched.ITERATIONS)
        assert [len(one[number]) for number in first] == [launched.BATCH] * launched.ITERATIONS
        assert [position for number in first for position, _ in one[number]] == list(range(64))
        for rank in two:  # each its half, none of it twice
            assert all(len(pairs) == launched.BATCH // 2 for pairs in rank["seen"].values())

    def test_end_with_the_same_weights(self, trained, launched, name):
        (one,), two = read(trained / "one" / name / "whole"), read(trained / "two" / name / "whole")
        start = dict(launched.build_network(name).named_parameters())
        moved = [(one["model"][key] - tensor).abs().max() for key, tensor in start.items()]
        assert min(moved) > 1e-4  # else the equality would say nothing
        for key, tensor in one["model"].items():
            assert torch.equal(two[0]["model"][key], two[1]["model"][key]), key
            assert (two[0]["model"][key] - tensor).abs().max() < 1e-6, key

    def test_write_the_same_files_with_the_same_metrics(self, trained, name):
        folders = trained / "one" / name / "whole", trained / "two" / name / "whole"
        names = [sorted(path.name for path in folder.glob("model_*.pth")) for folder in folders]
        assert names[0] == names[1] == ["model_0000003.pth", "model_0000007.pth"]
        lines = [[json.loads(line) for line in (f / "metrics.json").read_text().splitlines()] for f in folders]
        assert [line["iteration"] for line in lines[1]] == [1, 3, 5, 7]
        for a, b in zip(*lines, strict=True):
            assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-6) and a["lr"] == b["lr"]

    @pytest.mark.parametrize(("first", "then"), [("one", "two"), ("two", "one")])
    def test_go_on_where_the_other_stopped(self, trained, launched, name, first, then):
        whole = read(trained / first / name / "whole")
        half, rest = order(*read(trained / first / name / "half")), read(trained / then / name / "rest")
        assert len(rest) == {"one": 1, "two": 2}[then]
        assert list(half) == list(range(launched.STOP))
        after = order(*rest)
        assert min(after) == 4  # of the fifth iteration nothing had been saved
        for number in range(launched.ITERATIONS):
            expected = order(*whole)[number]
            assert half.get(number, expected) == after.get(number, expected) == expected
        for key, tensor in whole[0]["model"].items():
            assert (rest[0]["model"][key] - tensor).abs().max() < 1e-6, key
