"""Carry out one stage in its folder, once: it is resumed if it was stopped, and kept when it is finished."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.engine.launch import launch
from resnet_backbone.engine.output import FINAL, LAST, machine, versions
from resnet_backbone.errors import InputError
from resnet_backbone.weights import write_json

logger = logging.getLogger("coco_transfer")

DONE = "stage.json"
EARLIER = "stopped.json"  # seconds spent in stopped starts


def run_stage(cfg: CfgNode, run: Callable[..., Any], *, processes: int, parallel: int) -> dict[str, Any]:
    """Run one stage unless it is finished; resume it if it was stopped.

    Args:
        parallel: the number of stages that run concurrently, for the record.

    Returns:
        The stage's results, its seconds over all starts except those that were killed or saved nothing, and the
        conditions of the last start.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if (folder / DONE).is_file():
        logger.info("%s is finished", folder)
        return json.loads((folder / DONE).read_text())
    resume, earlier = _can_resume(folder), folder / EARLIER
    start = time.perf_counter() - (json.loads(earlier.read_text())["seconds"] if earlier.is_file() else 0)
    try:
        if code := launch(run, cfg, processes=processes, resume=resume):
            raise InputError(f"the stage in {folder} stopped with exit code {code}: see {folder / 'log.txt'}.")
    except BaseException:
        if _can_resume(folder):
            with contextlib.suppress(OSError):  # a full disk; the original error says so
                write_json(earlier, {"seconds": round(time.perf_counter() - start, 3)})
        raise
    results = json.loads((folder / "results.json").read_text())
    conditions = {"versions": versions(), "machine": machine(), "parallel": parallel}
    seconds = round(time.perf_counter() - start, 3)
    stage = {"seconds": seconds, "resumed": resume, "conditions": conditions, **results}
    write_json(folder / DONE, stage)
    earlier.unlink(missing_ok=True)
    return stage


def _can_resume(folder: Path) -> bool:
    return (folder / LAST).is_file() or (folder / FINAL).is_file()
