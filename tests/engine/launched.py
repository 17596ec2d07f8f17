"""What test_processes.py and test_distributed.py run in new processes: `python launched.py WHAT PROCESSES FOLDER`."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.utils import comm
from torch import nn

from resnet_backbone.engine.distributed import unwrap, wrap_for_processes
from resnet_backbone.engine.keys import add_engine_config
from resnet_backbone.engine.launch import run_tool
from resnet_backbone.errors import InputError

IMAGES = 37
BATCH = 8
ITERATIONS = 8
STOP = 5  # the iteration in which the first half of a run ends; saved was after the fourth


def build_network(name: str) -> nn.Module:
    """A network in float64 in which no image depends on the others of its batch, but for "bn"."""
    from resnet_backbone.networks import build_network

    torch.manual_seed(0)
    if name == "gn":
        network = build_network("cifar_resnet20", 5, norm="GN", width=2.0)
    elif name == "bn":
        network = build_network("cifar_resnet20", 5, width=1.0)
    elif name == "frozen_bn":
        network = build_network("resnet18", 5, norm="FrozenBN", width=0.125)
        for key, buffer in network.named_buffers():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if key.endswith(("weight", "running_var")) else -0.5))
    else:
        network = build_network("vgg16", 5, width=0.0625)
        for layer in network.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    return network.double()


def train_network(cfg, name: str, folder: Path, *, stop_at: int | None = None) -> None:
    """Train from the last checkpoint in `folder`, if there is one; each rank writes down what it saw.

    An evaluation's metric is a number that the running statistics decide, when there are any.
    """
    from detectron2.solver import build_optimizer

    from resnet_backbone.data.sampler import BatchSampler
    from resnet_backbone.engine.output import read_last_checkpoint
    from resnet_backbone.engine.train import choose_seed, train
    from resnet_backbone.weights import Metadata

    folder.mkdir(parents=True, exist_ok=True)
    last = read_last_checkpoint(folder)
    choose_seed(cfg, last)
    generator = torch.Generator().manual_seed(1)
    size = 32 if name == "vgg" else 16
    images = torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (IMAGES,), generator=generator)
    model, seen, evaluated = build_network(name), {}, {}

    def batches(start):
        share = {"rank": comm.get_rank(), "world_size": comm.get_world_size()}
        for number, pairs in enumerate(
            BatchSampler(IMAGES, BATCH, seed=cfg.SEED, start_iteration=start, **share), start
        ):
            if number == stop_at:
                raise KeyboardInterrupt
            seen[number] = pairs
            indices = [index for _, index in pairs]
            yield images[indices], labels[indices]

    def compute(model, batch):
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}, {}

    def describe(iterations: int, **results: float) -> Metadata:
        return Metadata(
            kind="classifier",
            architecture="tiny",
            arguments={},
            channel_order="RGB",
            pixel_mean=(0.0, 0.0, 0.0),
            pixel_std=(1.0, 1.0, 1.0),
            norm_statistics="none",
            norm_epsilon=None,
            class_names=("a",),
            origin={"iterations": iterations, **results},
        )

    def evaluate(network):
        statistics = {key: b.clone() for key, b in network.named_buffers() if "running" in key}
        evaluated[max(seen) - 1] = statistics  # the next iteration's batch has been fetched
        return {"score": sum(b.sum().item() for b in statistics.values()) % 1} if statistics else {}

    try:
        task = SimpleNamespace(
            batches=batches,
            losses=compute,
            evaluate=evaluate,
            metadata=describe,
            image_names=lambda _: (),
            num_images=IMAGES,
            best_metric="score",
        )
        train(cfg, task, model, build_optimizer(cfg, model), folder=folder, resume_from=last)
    except KeyboardInterrupt:
        assert stop_at is not None
    state = {"model": model.state_dict(), "seen": seen, "seed": cfg.SEED, "evaluated": evaluated}
    torch.save(state, folder / f"rank{comm.get_rank()}.pt")


def trainings_run(cfg, **_):
    """Each network: a whole run, the first half of one, and the rest of one whose first half somebody else did."""
    for name in ("gn", "frozen_bn", "vgg"):
        folder = Path(cfg.OUTPUT_DIR) / name
        train_network(cfg.clone(), name, folder / "whole")
        train_network(cfg.clone(), name, folder / "half", stop_at=STOP)
        if (folder / "rest").exists():
            train_network(cfg.clone(), name, folder / "rest")


def statistics_run(cfg, **_):
    """With batch norm, a moving average and a plateau: a whole run, one that stops, and its rest."""
    cfg.SOLVER.EMA_DECAY = 0.5
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.PLATEAU_PATIENCE = "WarmupPlateauLR", 0
    cfg.TEST.EVAL_PERIOD = 3
    for name, stop_at in (("whole", None), ("run", STOP), ("run", None)):
        train_network(cfg.clone(), "bn", Path(cfg.OUTPUT_DIR) / name, stop_at=stop_at)


def long_run(cfg, **_):
    """Train until somebody asks to leave."""
    cfg.SOLVER.MAX_ITER = 10**6
    cfg.SOLVER.CHECKPOINT_PERIOD = 0
    train_network(cfg, "frozen_bn", Path(cfg.OUTPUT_DIR))


def gradients_run(cfg, **_):
    """The gradient of each rank after one backward pass on its own numbers, and precise BN over both ranks."""
    from resnet_backbone.engine.precise_bn import estimate_norm_statistics

    rank = comm.get_rank()
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    wrapped = wrap_for_processes(layer)
    assert unwrap(wrapped) is layer and (wrapped is layer) == (comm.get_world_size() == 1)
    wrapped(torch.tensor([[1.0 + rank, 10.0 * rank]], dtype=torch.float64)).sum().backward()

    norm = nn.Sequential(nn.BatchNorm1d(2))
    mine = torch.arange(12.0).view(6, 2) ** 2 if rank == 0 else torch.ones(6, 2)
    estimate_norm_statistics(norm, [mine[:3], mine[3:]], 2)
    state = {"grad": layer.weight.grad, "mean": norm[0].running_mean, "variance": norm[0].running_var}
    local = comm.get_local_rank(), comm.get_local_size()
    torch.save({**state, "local": local}, Path(cfg.OUTPUT_DIR) / f"rank{rank}.pt")


def places_run(cfg, **_):
    """What each process knows of its place, and the seed that they draw."""
    from resnet_backbone.engine.train import choose_seed

    cfg.SEED = -1
    choose_seed(cfg, None)
    place = comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()
    state = {"place": place, "seed": cfg.SEED, "threads": torch.get_num_threads()}
    torch.save(state, Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.pt")


def bad_input_run(cfg, **_):
    """Only the second process meets the bad image, while the first waits for it in a collective operation."""
    if comm.get_rank() == 1:
        raise InputError("the image x.jpg cannot be read. Replace it.")
    dist.barrier()


def bad_key_run(cfg, **_):
    raise InputError("SOLVER.STEPS is bad.")


def bug_run(cfg, **_):
    if comm.get_rank() == 1:
        raise ZeroDivisionError("a bug")
    dist.all_reduce(torch.zeros(1))


def killed_run(cfg, **_):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def left_run(cfg, **_):
    if comm.get_rank() == 1:
        os._exit(3)
    time.sleep(600)  # nor does it wait for anything that would fail


def wait_run(cfg, **_):
    """Anything outside the training loop."""
    print("waiting", flush=True)
    time.sleep(600)


def deaf_run(cfg, **_):
    """As in a call that comes back to Python only when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    wait_run(cfg)


def load(arguments):
    cfg = get_cfg()
    add_engine_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = arguments.folder
    cfg.SEED = 9
    cfg.SOLVER.IMS_PER_BATCH = BATCH
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.MAX_ITER = ITERATIONS
    cfg.SOLVER.STEPS = (6,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    cfg.SOLVER.LOG_PERIOD = 2
    return cfg


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("num_gpus", type=int)
    parser.add_argument("folder")
    shared = dict(print_config=False, num_machines=1, machine_rank=0, dist_url="auto")
    arguments = argparse.Namespace(**vars(parser.parse_args()), **shared)
    sys.exit(run_tool(arguments, load, globals()[f"{arguments.what}_run"], {}))
