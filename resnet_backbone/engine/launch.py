"""Command lines of the training tools: Detectron2's flags, several processes on GPUs or CPUs, errors as sentences."""

import argparse
import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.errors import InputError

EXIT_BAD_INPUT = 2


def argument_parser(description: str, example: str) -> argparse.ArgumentParser:
    """The flags that both training tools share, named as Detectron2's."""
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML, or a name of Detectron2's model zoo"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST and stop")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (on CPUs too, by gloo)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, unique, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; auto on a single machine")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration keys to set; flags may follow")
    return parser


def run_tool(
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], CfgNode],
    run: Callable[..., object],
) -> int:
    """Load the configuration, run in as many processes as asked, and return the exit code.

    Args:
        load: from the arguments to the configuration; a cheap call that finds misspelt keys before anything starts.
        run: called in every process as `run(cfg, resume=…, eval_only=…)`.
    """
    try:
        cfg = load(arguments)
        return launch(
            run,
            cfg,
            resume=arguments.resume,
            eval_only=arguments.eval_only,
            processes=arguments.num_gpus,
            machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            url=arguments.dist_url,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


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

    Returns:
        The exit code: 0, or that of a process that was killed.

    Raises:
        InputError: a process raised one; the others were ended. Any other exception comes with its stack trace.
    """
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise ConfigError(
            f"--num-gpus {processes} --num-machines {machines} --machine-rank {machine_rank}: expected at least 1 "
            "process and 1 machine, and a rank from 0 up to, not including, the number of machines."
        )
    if processes * machines == 1:
        run(cfg, **arguments)
        return 0
    if url == "auto":
        if machines > 1:
            raise ConfigError("--dist-url auto works on a single machine only; give tcp://HOST:PORT of machine 0.")
        url = f"tcp://127.0.0.1:{_free_port()}"
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu and torch.cuda.device_count() < processes:
        raise ConfigError(f"--num-gpus is {processes}, but this machine shows {torch.cuda.device_count()} GPUs.")
    if on_gpu and cfg.MODEL.DEVICE != "cuda":
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but each of {processes} processes has its own; set cuda."
        )
    sentences = torch.multiprocessing.get_context("spawn").SimpleQueue()
    backend = "nccl" if on_gpu else "gloo"
    context = torch.multiprocessing.spawn(
        _process,
        args=(run, cfg, arguments, processes, machines, machine_rank, url, backend, sentences),
        nprocs=processes,
        join=False,
    )
    try:
        while not context.join():
            pass
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
        # Where one process stopped for an InputError, what the others then say is its consequence.
        if not sentences.empty():
            raise InputError(sentences.get()) from None
        if isinstance(error, torch.multiprocessing.ProcessRaisedException):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code  # a signal, as shells count it
    return 0


def wrap_for_processes(model: torch.nn.Module) -> torch.nn.Module:
    """Average gradients over processes, where there are several."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model behind `wrap_for_processes`."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def _process(local_rank, run, cfg, arguments, processes, machines, machine_rank, url, backend, sentences) -> None:
    rank = machine_rank * processes + local_rank
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dist.init_process_group(backend, init_method=url, world_size=processes * machines, rank=rank)
    for machine in range(machines):  # every process must take part in making every group
        ranks = list(range(machine * processes, (machine + 1) * processes))
        group = dist.new_group(ranks)
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group  # Detectron2 0.6 offers no other way to set it
    try:
        run(cfg, **arguments)
    except InputError as error:
        sentences.put(str(error))
        os._exit(EXIT_BAD_INPUT)  # the other processes may wait for this one; leaving ends them
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
