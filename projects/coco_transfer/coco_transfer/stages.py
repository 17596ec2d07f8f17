"""Carry out a plan, stage by stage; each finished stage is kept."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from coco_transfer.figures import draw_curves, draw_detections
from coco_transfer.plan import Plan
from coco_transfer.report import collect_results, write_report
from resnet_backbone import detection, pretraining
from resnet_backbone.engine.launch import launch
from resnet_backbone.engine.output import FINAL, LAST
from resnet_backbone.errors import InputError
from resnet_backbone.weights import write_json

logger = logging.getLogger("coco_transfer")

DONE = "stage.json"


def carry_out(plan: Plan) -> dict[str, Any]:
    """Pretrain, fine-tune and evaluate every network and its control; write report.md, results.json and the figures.

    Raises:
        InputError: the output folder holds a run with other arguments, or a stage cannot use what it was given.
    """
    start = time.perf_counter()
    plan.check()
    plan.output.mkdir(parents=True, exist_ok=True)
    _claim(plan)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s %(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
    ready = plan.with_data()
    steps = [(net, control) for net in plan.nets for control in ((False, True) if plan.control else (False,))]
    for number, (net, control) in enumerate(steps):
        title = f"{net}, control" if control else net
        logger.info("%s (%d of %d): pretraining", title, number + 1, len(steps))
        run_stage(ready.pretrain_config(net, control=control), pretraining.run, plan.processes)
        logger.info("%s (%d of %d): detection", title, number + 1, len(steps))
        run_stage(ready.detection_config(net, control=control), detection.run, plan.processes)
    results = {**collect_results(ready), "plan": plan.fixed()}
    write_json(plan.output / "results.json", results)
    draw_curves(ready, plan.output / "curves.png")
    draw_detections(ready, plan.output / "detections.png")
    report = write_report(results, plan.output / "report.md")
    print(report)
    logger.info("wrote %s in %.0f s", plan.output / "report.md", time.perf_counter() - start)
    return results


def run_stage(cfg: CfgNode, run: Callable[..., Any], processes: int) -> dict[str, Any]:
    """Run one stage unless it is finished; resume it if it was stopped.

    Returns:
        The stage's results, with the seconds it took (of the last start, if it was stopped).
    """
    folder = Path(cfg.OUTPUT_DIR)
    if (folder / DONE).is_file():
        logger.info("%s is finished", folder)
        return json.loads((folder / DONE).read_text())
    resume = (folder / LAST).is_file() or (folder / FINAL).is_file()
    start = time.perf_counter()
    if code := launch(run, cfg, processes=processes, resume=resume):
        raise InputError(f"the stage in {folder} stopped with exit code {code}: see {folder / 'log.txt'}.")
    results = json.loads((folder / "results.json").read_text())
    stage = {"seconds": round(time.perf_counter() - start, 3), "resumed": resume, **results}
    write_json(folder / DONE, stage)
    return stage


def _claim(plan: Plan) -> None:
    """Note the plan in the output folder; refuse a folder with another one."""
    file = plan.output / "plan.json"
    if not file.is_file():
        write_json(file, plan.fixed())
        return
    before = json.loads(file.read_text())
    differs = [key for key, value in plan.fixed().items() if before.get(key) != value]
    if differs:
        was = "; ".join(f"{key} was {before.get(key)}, is now {plan.fixed()[key]}" for key in differs)
        raise InputError(f"{plan.output} holds a run with other arguments ({was}). Choose another --output.")
