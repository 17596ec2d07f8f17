"""The training tools' command line: Detectron2's flags, multi-process launch on GPUs or CPUs, readable errors."""

import argparse
import functools
import socket
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.describe import describe_config
from resnet_backbone.engine.processes import RankInfo, given_rank_info, leave, run_given, spawn
from resnet_backbone.errors import exit_code


def argument_parser(description: str, example: str) -> argparse.ArgumentParser:
    """The flags that both training tools share, under Detectron2's names where it has them."""
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML, or a name of ours or of Detectron2's model zoo"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST and stop")
    parser.add_argument(
        "--print-config", action="store_true", help="print every key, its value and who set it, and stop"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--try",
        dest="try_run",
        type=int,
        metavar="N",
        help="see in N iterations whether it all works; nothing of it stays",
    )
    instead.add_argument(
        "--throughput",
        type=int,
        metavar="N",
        help="measure images per second over N iterations, and leave nothing behind",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (on CPUs too, by gloo)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, unique, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; auto on a single machine")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration keys to set; flags may follow")
    return parser


class PrintAndExit(argparse.Action):
    """A flag that prints the return value of `const` and exits, even if required flags are missing."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, nargs=0, **named)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const())
        parser.exit()


def training_tool(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    load: Callable[[argparse.Namespace], CfgNode],
    run: Callable[..., object],
    *,
    try_run: Callable[..., object],
    throughput: Callable[..., object],
) -> int:
    """Parse a training tool's command line, and train, evaluate, try or measure; return the exit code."""
    given = parser.parse_intermixed_args(words)
    for check, iterations in ((try_run, given.try_run), (throughput, given.throughput)):
        if iterations is not None:
            if given.resume or given.eval_only:
                parser.error("--try and --throughput go without --resume and --eval-only")
            return run_tool(given, load, check, {"iterations": iterations})
    return run_tool(given, load, run)


def run_tool(
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], CfgNode],
    run: Callable[..., object],
    named: Mapping[str, object] | None = None,
) -> int:
    """Load the configuration, run in the requested number of processes, and return the exit code.

    Args:
        load: turns the arguments into a configuration; cheap, so misspelled keys are caught before anything starts.
        run: called in every process as `run(cfg, **named)`.
        named: defaults to the flags `resume` and `eval_only`.
    """
    return exit_code(functools.partial(_load_and_launch, arguments, load, run, named))


def _load_and_launch(
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], CfgNode],
    run: Callable[..., object],
    named: Mapping[str, object] | None,
) -> int:
    cfg = load(arguments)
    if arguments.print_config:
        print(describe_config(cfg))
        return 0
    code = launch(
        run,
        cfg,
        processes=arguments.num_gpus,
        machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        url=arguments.dist_url,
        **({"resume": arguments.resume, "eval_only": arguments.eval_only} if named is None else named),
    )
    if (given := given_rank_info()) is not None and given.world_size > 1:
        leave(code)
    return code


def launch(
    run: Callable[..., object],
    cfg: CfgNode,
    *,
    processes: int = 1,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = "auto",
    **arguments: object,
) -> int:
    """Call `run(cfg, **arguments)` in `processes` processes on each of `machines` machines.

    Under torchrun, or anything else that sets its environment variables, this process is already one of them, so it
    just calls `run`. The counts may then stay at their defaults. If there are several such processes and this one
    fails, it exits here.

    Returns:
        The exit code: 0, or that of a failed process, whose stack trace or signal has been printed.

    Raises:
        InputError: a process raised one; the others were killed.
        Interrupted: a signal asked to stop; everything is saved.
    """
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise ConfigError(
            f"--num-gpus {processes} --num-machines {machines} --machine-rank {machine_rank}: expected at least 1 "
            "process and 1 machine, and a rank from 0 up to, not including, the number of machines."
        )
    given = given_rank_info()
    if given is not None:
        _check_same(given, processes, machines, machine_rank, url)
        processes, machines = given.local_size, given.world_size // given.local_size
    if processes * machines == 1:
        run(cfg, **arguments)
        return 0
    call, on_gpu = functools.partial(run, cfg, **arguments), cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu and cfg.MODEL.DEVICE != "cuda":
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but each of {processes} processes has its own; set cuda."
        )
    if given is not None:
        run_given(given, call, on_gpu=on_gpu)
        return 0
    if url == "auto":
        if machines > 1:
            raise ConfigError("--dist-url auto works on a single machine only; give tcp://HOST:PORT of machine 0.")
        url = f"tcp://127.0.0.1:{_free_port()}"
    if on_gpu and torch.cuda.device_count() < processes:
        raise ConfigError(f"--num-gpus is {processes}, but this machine has {torch.cuda.device_count()} GPUs.")
    first = machine_rank * processes
    infos = [RankInfo(first + number, machines * processes, number, processes, url) for number in range(processes)]
    return spawn(infos, call, on_gpu=on_gpu)


def _check_same(given: RankInfo, processes: int, machines: int, machine_rank: int, url: str) -> None:
    """Refuse flags that contradict the environment; a flag at its default counts as not given."""
    expected = {
        "--num-gpus": (processes, 1, given.local_size),
        "--num-machines": (machines, 1, given.world_size // given.local_size),
        "--machine-rank": (machine_rank, 0, given.rank // given.local_size),
        "--dist-url": (url, "auto", "auto"),
    }
    for flag, (said, default, environment) in expected.items():
        if said not in (default, environment):
            raise ConfigError(
                f"{flag} is {said}, but the environment, as torchrun sets it, says {environment}: {given.local_size} "
                f"processes on each of {given.world_size // given.local_size} machines. Leave the flag out."
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
