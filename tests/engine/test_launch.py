import functools

import pytest
import torch
import torch.distributed as dist

from resnet_backbone.engine import launch
from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError, Interrupted
from tests.engine.tiny import VARIABLES


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
        ours = vars(launch.argument_parser("", "").parse_args(words))
        assert (ours.pop("print_config"), ours.pop("try_run"), ours.pop("throughput")) == (False, None, None)
        assert ours == vars(default_argument_parser().parse_args(words))

    def test_exit_codes(self, cfg, capsys):
        def ends(error, *_, **__):
            raise error

        bad = functools.partial(ends, InputError("there is no file x."))
        arguments = self.parse()
        assert launch.run_tool(arguments, lambda _: cfg, lambda cfg, resume, eval_only: None) == 0
        assert launch.run_tool(arguments, lambda _: cfg, lambda cfg, word: word, {"word": 1}) == 0
        assert launch.run_tool(arguments, bad, lambda *_, **__: None) == 2
        assert capsys.readouterr().err == "error: there is no file x.\n"
        assert launch.run_tool(arguments, lambda _: cfg, bad) == 2
        capsys.readouterr()
        assert launch.run_tool(arguments, lambda _: cfg, functools.partial(ends, Interrupted("saved"))) == 75
        assert launch.run_tool(arguments, lambda _: cfg, functools.partial(ends, KeyboardInterrupt())) == 130
        assert capsys.readouterr().err == "saved\ninterrupted\n"
        with pytest.raises(ZeroDivisionError):
            launch.run_tool(arguments, lambda _: cfg, functools.partial(ends, ZeroDivisionError()))

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
        with pytest.raises(ConfigError, match="--num-gpus is 2, but this machine has 1"):
            launch.launch(lambda cfg: None, cfg, processes=2)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        cfg.MODEL.DEVICE = "cuda:1"
        with pytest.raises(ConfigError, match="set cuda"):
            launch.launch(lambda cfg: None, cfg, processes=2)


class TestUnderTorchrun:
    """With the variables that torchrun sets, flags may repeat what these say."""

    @pytest.fixture(autouse=True)
    def variables(self, monkeypatch):
        for name, value in VARIABLES.items():
            monkeypatch.setenv(name, value)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"processes": 2}, "--num-gpus is 2, but the environment, as torchrun sets it, says 4"),
            ({"processes": 4, "machines": 3}, "--num-machines is 3.*says 2"),
            ({"machines": 2, "machine_rank": 0, "url": "tcp://a:1"}, "--dist-url is tcp://a:1"),
        ],
    )
    def test_flags_that_contradict(self, cfg, flags, expected):
        with pytest.raises(ConfigError, match=expected):
            launch.launch(lambda cfg: pytest.fail("must not run"), cfg, **flags)

    def test_flags_that_agree(self, cfg, monkeypatch):
        called = []
        monkeypatch.setattr(launch, "run_given", lambda info, call, on_gpu: called.append((info.rank, call(), on_gpu)))
        for flags in ({}, {"processes": 4}, {"processes": 4, "machines": 2, "machine_rank": 1}):
            assert launch.launch(lambda cfg, word: word, cfg, word="ran", **flags) == 0
        assert called == 3 * [(5, "ran", False)]

    def test_a_single_process_needs_no_group(self, cfg, monkeypatch):
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**one, "MASTER_ADDR": "nowhere"}.items():
            monkeypatch.setenv(name, value)
        ran = []
        assert launch.launch(lambda cfg: ran.append(dist.is_initialized()), cfg) == 0
        assert ran == [False]
