"""What test_launch.py runs in processes of its own: `python launched.py WHAT PROCESSES FOLDER`."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch import nn

from resnet_backbone.data.sampler import BatchSampler
from resnet_backbone.engine.config import add_engine_config
from resnet_backbone.engine.launch import run_tool, unwrap, wrap_for_processes
from resnet_backbone.engine.output import read_last_checkpoint
from resnet_backbone.engine.precise_bn import estimate_norm_statistics
from resnet_backbone.engine.train import choose_seed, train
from resnet_backbone.errors import InputError
from resnet_backbone.weights import Metadata

IMAGES = torch.randn(37, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def describe(iterations: int) -> Metadata:
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
    )


def train_run(cfg, *, resume, eval_only):
    """A few steps in float64 of a network without batch statistics; each rank writes down which images it saw."""
    folder = Path(cfg.OUTPUT_DIR)
    last = read_last_checkpoint(folder) if resume else None
    choose_seed(cfg, last)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    seen = []

    def batches(start):
        for pairs in BatchSampler(
            37, 8, seed=9, start_iteration=start, rank=comm.get_rank(), world_size=comm.get_world_size()
        ):
            seen.append([index for _, index in pairs])
            yield IMAGES[seen[-1]]

    def compute(model, images):
        return {"loss": model(images).square().mean()}, {}

    train(
        cfg,
        model=model,
        optimizer=build_optimizer(cfg, model),
        batches=batches,
        compute=compute,
        evaluate=dict,
        metadata=describe,
        num_images=37,
        folder=folder,
        resume_from=last,
    )
    torch.save({"model": model.state_dict(), "seen": seen, "seed": cfg.SEED}, folder / f"rank{comm.get_rank()}.pt")


def gradients_run(cfg, *, resume, eval_only):
    """The gradient of each rank after one backward pass on its own numbers, and precise BN over both ranks."""
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


def bad_input_run(cfg, *, resume, eval_only):
    """Only the second process meets the bad image, while the first waits for it in a collective operation."""
    if comm.get_rank() == comm.get_world_size() - 1:
        raise InputError("the image x.jpg cannot be read. Replace it.")
    dist.barrier()


def bad_key_run(cfg, *, resume, eval_only):
    raise InputError("SOLVER.STEPS is bad.")


def bug_run(cfg, *, resume, eval_only):
    raise ZeroDivisionError("a bug")


def killed_run(cfg, *, resume, eval_only):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def load(arguments):
    cfg = get_cfg()
    add_engine_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = arguments.folder
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.STEPS = (4,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.SOLVER.LOG_PERIOD = 2
    return cfg


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("num_gpus", type=int)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    shared = dict(resume=False, eval_only=False, num_machines=1, machine_rank=0, dist_url="auto")
    run = globals()[f"{arguments.what}_run"]
    sys.exit(run_tool(argparse.Namespace(**vars(arguments), **shared), load, run))
