import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_backbone.engine import launch
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError


def start(what: str, processes: int, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).with_name("launched.py")), what, str(processes), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def ranks(folder: Path, count: int) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


def test_two_processes_equal_one_with_the_same_batch(folders):
    one, two = folders
    for folder, processes in ((one, 1), (two, 2)):
        done = start("train", processes, folder)
        assert done.returncode == 0, done.stderr
    (single,), pair = ranks(one, 1), ranks(two, 2)
    # Each rank sees its half of every batch, none of it twice.
    for whole, first, second in zip(single["seen"][:6], pair[0]["seen"], pair[1]["seen"], strict=False):
        assert len(first) == len(second) == 4 and first + second == whole
    for name, tensor in single["model"].items():
        assert torch.equal(pair[0]["model"][name], pair[1]["model"][name])
        assert (pair[0]["model"][name] - tensor).abs().max() < 1e-12
    assert pair[0]["seed"] == pair[1]["seed"] >= 0  # drawn, and shared
    # One set of files, with the mean over both processes.
    assert sorted(p.name for p in two.glob("*.pth")) == sorted(p.name for p in one.glob("*.pth"))
    lines = [[json.loads(line) for line in (f / "metrics.json").read_text().splitlines()] for f in (one, two)]
    assert [line["iteration"] for line in lines[1]] == [1, 3, 5]
    for a, b in zip(*lines, strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-6) and a["lr"] == b["lr"]


def test_gradients_and_norm_statistics_are_averaged(folders):
    _, two = folders
    done = start("gradients", 2, two)
    assert done.returncode == 0, done.stderr
    values = torch.cat([torch.arange(12.0).view(6, 2) ** 2, torch.ones(6, 2)])
    for rank, state in enumerate(ranks(two, 2)):
        assert state["grad"].tolist() == [[1.5, 5.0]]  # of (1, 0) and (2, 10)
        assert torch.allclose(state["mean"], values.mean(0))
        assert torch.allclose(state["variance"], values.var(0, unbiased=False))
        assert state["local"] == (rank, 2)


def test_bad_input_in_one_process_is_one_sentence(tmp_path):
    done = start("bad_input", 2, tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the image x.jpg cannot be read. Replace it."
    assert "Traceback" not in done.stderr and done.stderr.count("x.jpg") == 1


def test_bad_input_in_all_processes_is_one_sentence(tmp_path):
    done = start("bad_key", 2, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("SOLVER.STEPS is bad.") == 1 and "Traceback" not in done.stderr


def test_a_bug_comes_with_its_stack_trace(tmp_path):
    done = start("bug", 2, tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "bug_run" in done.stderr and "ZeroDivisionError: a bug" in done.stderr


def test_a_killed_process_is_named(tmp_path):
    done = start("killed", 2, tmp_path)
    assert done.returncode == 128 + 9
    assert "error: process 1 terminated with signal SIGKILL" in done.stderr


class TestArguments:
    def parse(self, *words):
        return launch.argument_parser("what it does", "example").parse_args(["--config-file", "a.yaml", *words])

    def test_defaults_and_overrides(self):
        arguments = self.parse("--num-gpus", "2", "--resume", "SOLVER.MAX_ITER", "5", "OUTPUT_DIR", "x")
        assert arguments.opts == ["SOLVER.MAX_ITER", "5", "OUTPUT_DIR", "x"]
        assert (arguments.num_gpus, arguments.resume, arguments.eval_only) == (2, True, False)
        assert (arguments.num_machines, arguments.machine_rank, arguments.dist_url) == (1, 0, "auto")

    def test_flags_are_detectron2s(self):
        from detectron2.engine import default_argument_parser

        words = ["--config-file", "f", "--num-gpus", "3", "--num-machines", "2", "--machine-rank", "1"]
        words += ["--dist-url", "tcp://a:1", "--eval-only", "SEED", "1"]
        theirs = default_argument_parser().parse_args(words)
        assert vars(theirs) == vars(launch.argument_parser("", "").parse_args(words))

    def test_exit_codes(self, cfg, capsys):
        def fails(*_, **__):
            raise InputError("there is no file x.")

        arguments = self.parse()
        assert launch.run_tool(arguments, lambda _: cfg, lambda cfg, resume, eval_only: None) == 0
        assert launch.run_tool(arguments, fails, lambda *_, **__: None) == 2
        assert capsys.readouterr().err == "error: there is no file x.\n"
        assert launch.run_tool(arguments, lambda _: cfg, fails) == 2

        def bug(*_, **__):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            launch.run_tool(arguments, lambda _: cfg, bug)

    @pytest.mark.parametrize(
        "arguments",
        [
            dict(processes=0),
            dict(processes=-1),
            dict(machines=0),
            dict(machines=2, machine_rank=2, url="tcp://127.0.0.1:1"),
            dict(machine_rank=-1),
            dict(machines=2),
        ],
    )
    def test_impossible_numbers(self, cfg, arguments):
        with pytest.raises(ConfigError, match="--"):
            launch.launch(lambda cfg: pytest.fail("must not run"), cfg, **arguments)

    def test_more_processes_than_gpus(self, cfg, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        cfg.MODEL.DEVICE = "cuda"
        with pytest.raises(ConfigError, match="--num-gpus is 2, but this machine shows 1"):
            launch.launch(lambda cfg: None, cfg, processes=2)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        cfg.MODEL.DEVICE = "cuda:1"
        with pytest.raises(ConfigError, match="set cuda"):
            launch.launch(lambda cfg: None, cfg, processes=2)
