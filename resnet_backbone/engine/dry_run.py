"""Check in a temporary folder that a configuration works and how fast it trains; nothing of it stays."""

import contextlib
import itertools
import json
import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from resnet_backbone.engine.config import ConfigError, set_key
from resnet_backbone.engine.disk import write_errors
from resnet_backbone.engine.optimizer import build_optimizer
from resnet_backbone.engine.precision import precision_of
from resnet_backbone.engine.run import Task
from resnet_backbone.engine.schedule import rescale_for_batch
from resnet_backbone.engine.train import check_batch, check_solver, choose_seed, train


def try_run(cfg: CfgNode, run: Callable[..., Any], test_on_few: Callable[[CfgNode], int], *, iterations: int) -> None:
    """Train, save, evaluate on a few images and resume halfway; then print "works", the time and the memory.

    Everything runs as in a real run, except that it is short and stays at the first iteration's learning rate.

    Args:
        run: called as `run(cfg, resume=…)`, in all processes.
        test_on_few: limits a configuration's DATASETS.TEST to a few images, and returns their number.

    Raises:
        InputError: something does not work.
    """
    if iterations < 2:
        raise ConfigError(f"--try is {iterations}, expected at least 2: one before and one after the resume.")
    check_solver(cfg)
    start = time.perf_counter()
    with _temporary_folder(cfg) as folder:
        half = iterations // 2
        trial = _shortened(
            cfg,
            folder,
            {
                "SOLVER.LOG_PERIOD": min(cfg.SOLVER.LOG_PERIOD, half),
                "SOLVER.CHECKPOINT_PERIOD": 0,  # only after the last iteration, where the resume starts
                "TEST.EVAL_PERIOD": max(1, half // 2),
                "TEST.PRECISE_BN.NUM_ITER": min(cfg.TEST.PRECISE_BN.NUM_ITER, iterations),
            },
        )
        images = test_on_few(trial)
        for resume, last in ((False, half), (True, iterations)):
            set_key(trial, "SOLVER.MAX_ITER", last, "a short run")
            run(trial.clone(), resume=resume)
    memory, kind = max(comm.all_gather(_peak_memory())), "GPU memory" if torch.cuda.is_initialized() else "memory"
    if comm.is_main_process():
        evaluations = f"evaluations on {images} images" if images else "no evaluation"
        print(
            f"works: {iterations} iterations with checkpoints, a resume and {evaluations} in "
            f"{time.perf_counter() - start:.0f} s; at most {memory / 2**30:.2f} GiB of {kind} in a process"
        )


def throughput(cfg: CfgNode, make_task: Callable[[CfgNode], Task], *, iterations: int) -> None:
    """Print training images per second, on the data and on one repeated batch, after an equally long warm-up.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    if iterations < 1:
        raise ConfigError(f"--throughput is {iterations}, expected at least 1 iteration.")
    check_solver(cfg)
    check_batch(cfg)
    with _temporary_folder(cfg) as folder:
        short = _shortened(
            cfg,
            folder,
            {
                "SOLVER.BASE_LR": 0.0,  # the weights do not change, so training cannot diverge
                "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
                "SOLVER.WARMUP_UNTIL_ERROR": 0.0,
                "SOLVER.MAX_ITER": 2 * iterations,
                "SOLVER.LOG_PERIOD": iterations,
                "SOLVER.CHECKPOINT_PERIOD": 0,
                "TEST.EVAL_PERIOD": 0,
            },
        )
        choose_seed(short, None)
        network, *on_data = _measure(short, make_task(short), folder / "data")
        _, *on_one_batch = _measure(short, _OneBatch(make_task(short)), folder / "one_batch")
    if comm.is_main_process():
        print(
            f"{network}, batches of {cfg.SOLVER.IMS_PER_BATCH} images over {comm.get_world_size()} process(es), "
            f"{cfg.MODEL.DEVICE}, {precision_of(cfg)}; {iterations} iterations, after {iterations} of warm-up"
        )
        rows = [(", ".join(cfg.DATASETS.TRAIN), *on_data), ("one batch, repeated", *on_one_batch)]
        print(tabulate(rows, ("data", "images per second", "waiting for data, % of the time"), floatfmt=".1f"))


def _measure(cfg: CfgNode, task: Task, folder: Path) -> tuple[str, float, float]:
    """Train; return the network's name, and of the last period the images per second and the percentage of waiting."""
    torch.manual_seed(cfg.SEED)
    task.check(eval_only=False)
    model = task.build(None, eval_only=False)
    folder.mkdir(exist_ok=True)
    train(cfg, task, model, build_optimizer(cfg, model), folder=folder, resume_from=None)
    comm.synchronize()  # wait for the main process to write
    measured = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    return task.metadata(0).architecture, measured["images_per_second"], 100 * measured["data_share"]


class _OneBatch:
    """A task whose batches are all its first one."""

    def __init__(self, task: Task):
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batches(self, start_iteration: int) -> Iterable[Any]:
        return itertools.repeat(next(iter(self._task.batches(0))))


def _shortened(cfg: CfgNode, folder: Path, keys: Mapping[str, Any]) -> CfgNode:
    """Return a copy with these keys that writes to `folder` and stays at the first iteration's learning rate."""
    short = cfg.clone()
    short.defrost()
    rescale_for_batch(short)
    rate = short.SOLVER.BASE_LR
    if short.SOLVER.WARMUP_ITERS > 0 and short.SOLVER.WARMUP_UNTIL_ERROR <= 0:
        rate *= short.SOLVER.WARMUP_FACTOR
    common = {
        "OUTPUT_DIR": str(folder),
        "WANDB_PROJECT": "",
        "SOLVER.BASE_LR": rate,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.STEPS": (),
        "TEST.PATIENCE": 0,
    }
    for key, value in {**common, **keys}.items():
        set_key(short, key, value, "a short run")
    return short


@contextlib.contextmanager
def _temporary_folder(cfg: CfgNode) -> Iterator[Path]:
    """Yield a temporary folder, shared by all processes, on the same disk as OUTPUT_DIR."""
    folder = ""
    if comm.is_main_process():
        parent = next(parent for parent in Path(cfg.OUTPUT_DIR).absolute().parents if parent.is_dir())
        try:
            folder = tempfile.mkdtemp(prefix=".try-", dir=parent)
        except OSError as error:
            raise ConfigError(
                f"{parent}, for OUTPUT_DIR {cfg.OUTPUT_DIR}, cannot be written: {error.strerror}."
            ) from error
    folder = comm.all_gather(folder)[0]
    with contextlib.ExitStack() as stack:
        if comm.is_main_process():
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_close_log_files)
        stack.enter_context(write_errors(Path(folder)))
        yield Path(folder)
        _close_log_files()
        comm.synchronize()  # all processes are done writing


def _close_log_files() -> None:
    """Close log files: on a network disk, open files outlive their folder."""
    for name in ("detectron2", "fvcore", "resnet_backbone"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)
                handler.close()


def _peak_memory() -> int:
    """Return this process's peak memory in bytes, on its GPU if it has one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
