"""The output folder: up-front checks, the log, the configuration, and saving and finding checkpoints."""

import contextlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.engine.config import ConfigError
from resnet_backbone.engine.disk import LogFile, LogStream, write_errors
from resnet_backbone.engine.lock import check_still_there, locked
from resnet_backbone.weights import Checkpoint, CheckpointError, atomic_write, read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
BEST = "model_best.pth"
LAST = "last_checkpoint"
FILES = ("log.txt", "config.yaml", "metrics.json", LAST, BEST, FINAL, "results.json")
EVALUATIONS = ("inference", "inference_TTA")  # folders
LOWEST_FREE_SPACE = 2**28  # bytes; with less, not even a small network's checkpoints fit


@contextlib.contextmanager
def open_output(cfg: CfgNode, *, resume: bool, eval_only: bool = False) -> Iterator[Path]:
    """Create OUTPUT_DIR, check that it is writable, and log there and to the terminal; no other run may write there.

    Errors of its disk later on, in the `with` block, become a ConfigError too.

    Raises:
        ConfigError: in all processes. The folder is not writable, its disk is full, another process uses it, or what it
            holds does not suit `resume` or its absence.
    """
    folder = Path(cfg.OUTPUT_DIR)
    with contextlib.ExitStack() as stack:
        alone = True
        with _refused_by_all():
            _check_writable(folder)
            if comm.is_main_process():
                with write_errors(folder):
                    alone = stack.enter_context(locked(folder))
                if not eval_only:
                    _check_run_in(folder, resume=resume, iterations=cfg.SOLVER.MAX_ITER)
        stack.enter_context(write_errors(folder))
        start_logging(folder)
        if not alone:
            logger.warning("the file system of %s has no locks: start no second run there beside this one", folder)
        elif comm.is_main_process():
            for torn in folder.glob(".*.tmp"):  # left behind by a killed process
                torn.unlink(missing_ok=True)
        yield folder


@contextlib.contextmanager
def _refused_by_all() -> Iterator[None]:
    """Raise the ConfigError of any process in all of them, so that none waits for one that has left."""
    mine = None
    try:
        yield
    except ConfigError as error:
        mine = error
    if message := next(filter(None, comm.all_gather(mine and str(mine))), None):
        raise ConfigError(message) from mine


def _check_writable(folder: Path) -> None:
    """Create the folder; check that a run can write there all that it will."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {folder} cannot be written: {error.strerror}. Choose another folder.") from error
    if (free := shutil.disk_usage(folder).free) < LOWEST_FREE_SPACE:
        raise ConfigError(
            f"the disk of OUTPUT_DIR {folder} has {free / 2**20:.0f} MiB left, too little for checkpoints."
        )
    evaluations = [entry for name in EVALUATIONS for entry in (folder / name, *sorted((folder / name).rglob("*")))]
    for entry in (*(folder / name for name in FILES), *evaluations):
        if entry.name in FILES and entry.is_dir():
            found = "is a folder, where the run writes a file"
        elif entry.name in EVALUATIONS and entry.is_file():
            found = "is a file, where the run writes a folder"
        elif entry.exists() and not os.access(entry, os.W_OK):
            found = "is not writable"
        else:
            continue
        raise ConfigError(f"{entry} {found}. Move it away, or choose another OUTPUT_DIR.")


def _check_run_in(folder: Path, *, resume: bool, iterations: int) -> None:
    """Check that a new run finds none in the folder, and that one to resume has what it takes."""
    held = next((name for name in (LAST, FINAL) if (folder / name).exists()), None)
    if not resume and held:
        raise ConfigError(
            f"OUTPUT_DIR {folder} already holds a run ({held}). Add --resume to go on with it, choose another "
            "OUTPUT_DIR, or delete the folder."
        )
    # A run of no iterations writes nothing to resume from, and is simply done again.
    if not resume or held == LAST or not iterations:
        return
    checkpoints = _training_checkpoints(folder)
    if held is None and len(checkpoints) <= 1:
        return  # one alone: the process was killed before it could write down the first checkpoint's name
    found = checkpoints[-1].name if checkpoints else FINAL
    do = f"To go on from there, write {found} into that file" if checkpoints else "Delete the folder"
    raise ConfigError(
        f"OUTPUT_DIR {folder} holds {found}, but no {LAST}, which names the checkpoint to resume from. {do}, or choose "
        "another OUTPUT_DIR."
    )


def start_logging(folder: Path) -> None:
    """Log Detectron2, fvcore and this package to `log.txt` in `folder`, and to the terminal on the main process.

    A second call in the same process, for another folder, replaces the first.
    """
    formatter = logging.Formatter("[%(asctime)s %(name)s] %(message)s", "%m-%d %H:%M:%S")
    rank = comm.get_rank()
    handlers = [LogFile(folder / (f"log.txt.rank{rank}" if rank else "log.txt"))]
    if rank == 0:
        handlers.append(LogStream(sys.stdout))
    for handler in handlers:
        handler.setFormatter(formatter)
    for name in ("detectron2", "fvcore", "resnet_backbone"):
        named = logging.getLogger(name)
        for old in named.handlers:
            old.close()
        named.handlers = list(handlers)
        named.setLevel(logging.INFO)
        named.propagate = False
    logger.info(versions())


def versions() -> str:
    """Software versions and the device, on one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Detectron2 {detectron2.__version__}, {device}"
    )


def machine() -> str:
    """The computer and the threads of this process, on one line."""
    threads = f"{os.cpu_count()} CPU cores, threads: {torch.get_num_threads()}"
    return f"{threads}, {platform.machine()}, {platform.system()} {platform.release()}"


def write_config(cfg: CfgNode, folder: Path) -> None:
    """Write the resolved configuration to `config.yaml`, which Detectron2 needs to use the result."""
    if comm.is_main_process():
        with atomic_write(folder / "config.yaml") as file:
            file.write(cfg.dump().encode())


def save_training_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 0) -> Path:
    """Write `model_0001234.pth`, then its name to `last_checkpoint`, each atomically.

    Then keep only the `keep` newest checkpoints (0: all). A complete checkpoint exists at any moment.
    """
    check_still_there(folder)
    path = folder / f"model_{checkpoint.iteration:07d}.pth"
    write_checkpoint(path, checkpoint)
    with atomic_write(folder / LAST) as file:
        file.write(path.name.encode())
    logger.info("saved %s", path)
    if keep:
        for old in _training_checkpoints(folder)[:-keep]:
            if old != path:
                old.unlink()
    return path


def save_best_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `model_best.pth` atomically: weights to use, not to resume from."""
    check_still_there(folder)
    write_checkpoint(folder / BEST, checkpoint)
    logger.info("saved %s, the best so far", folder / BEST)


def _training_checkpoints(folder: Path) -> list[Path]:
    """Training checkpoints, oldest first."""
    found = [path for path in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+\.pth", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("model_")))


def read_last_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint to resume from; None if the run wrote none.

    It is the one that `last_checkpoint` names or, without that file, the only one.

    Raises:
        CheckpointError: `last_checkpoint` names a missing or damaged file; the message names an earlier one if any.
    """
    tag, path = folder / LAST, last_checkpoint_path(folder)
    if path is None:
        logger.warning("nothing to resume: there is no %s, so training starts at iteration 0", tag)
        return None
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        earlier = [other for other in _training_checkpoints(folder) if other.name < path.name]
        hint = (
            f" An earlier one is {earlier[-1].name}: write its name into {tag} to go on from there." if earlier else ""
        )
        raise CheckpointError(f"cannot resume: {error}{hint}") from error


def last_checkpoint_path(folder: Path) -> Path | None:
    """The file that `last_checkpoint` names, or the only checkpoint there is; None without either."""
    tag, checkpoints = folder / LAST, _training_checkpoints(folder)
    if tag.is_file():
        return folder / tag.read_text(errors="replace").strip()
    return checkpoints[0] if len(checkpoints) == 1 else None


def keep_metrics_before(folder: Path, iteration: int) -> None:
    """Drop lines of metrics.json from `iteration` on, which training rewrites, and any line truncated by a kill."""
    path = folder / "metrics.json"
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _iteration(line) < iteration]
    if kept != lines:
        with atomic_write(path) as file:
            file.writelines(kept)


def _iteration(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
