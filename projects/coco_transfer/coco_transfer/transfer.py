"""Carry out a plan, one network at a time or several in parallel; finished stages are kept."""

import datetime
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from coco_transfer.factor_section import FIGURE, FIGURE_FROM
from coco_transfer.factors import compare
from coco_transfer.figures import draw_curves, draw_detections, draw_factors
from coco_transfer.options import measure_options
from coco_transfer.plan import CONTEXT, Plan, Step
from coco_transfer.report import write_report
from coco_transfer.results import collect_results
from coco_transfer.stages import DONE, run_stage
from resnet_backbone import detection, pretraining
from resnet_backbone.engine.jobs import Job, interruptible, run_jobs
from resnet_backbone.errors import InputError
from resnet_backbone.weights import write_json

logger = logging.getLogger("coco_transfer")

RUNS = {"pretrain": pretraining.run, "detection": detection.run, CONTEXT: detection.run}


@interruptible()
def carry_out(plan: Plan) -> dict[str, Any]:
    """Pretrain, fine-tune and evaluate every network and its control; write the reports and figures.

    Raises:
        InputError: the output folder holds a run with other arguments, or a stage cannot use its input; the other
            networks finished.
        Interrupted: a signal requested exit; the current runs are saved.
    """
    start = time.perf_counter()
    plan.check()
    plan.output.mkdir(parents=True, exist_ok=True)
    _claim(plan)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s %(name)s] %(message)s", datefmt="%m-%d %H:%M:%S")
    ready = plan.with_data()
    nets = list(dict.fromkeys(plan.nets))
    # The first seeds of all networks come first.
    trained = sorted(((net, seed) for net in nets for seed in plan.seeds(net)), key=lambda pair: pair[1])
    jobs = [
        Job(plan.title(*pair), partial(carry_out_network, ready, *pair), partial(describe_progress, ready, *pair))
        for pair in trained
        if _next_step(plan, *pair) is not None
    ]
    logger.info("%d of %d networks are finished", len(trained) - len(jobs), len(trained))
    if stopped := run_jobs(jobs, at_a_time=plan.parallel, logger=logger):
        raise InputError(
            f"{len(stopped)} of {len(trained)} networks stopped: {', '.join(job.title for job in stopped)}. What is "
            f"said above and log.txt in the stages' folders in {plan.output} tell why; the same command goes on from "
            "there."
        )
    results = collect_results(ready)
    results |= {**compare(ready, results["networks"]), "plan": plan.fixed()}
    write_json(plan.output / "results.json", results)
    draw_curves(ready, plan.output / "curves.png")
    draw_detections(ready, plan.output / "detections.jpg")
    if len(nets) >= FIGURE_FROM:
        draw_factors(results, plan.output / FIGURE)
    report = write_report(results, plan.output / "report.md")
    print(report)
    if plan.options:
        logger.info("evaluating the options of Table 9 with %s", plan.options)
        print(measure_options(ready))
    logger.info("wrote %s in %.0f s", plan.output / "report.md", time.perf_counter() - start)
    return results


def carry_out_network(plan: Plan, net: str, seed: int) -> None:
    """Run all unfinished steps of one network with one seed."""
    for step in plan.steps(net, seed):
        logger.info("%s: %s", plan.title(net, seed), step)
        run_stage(plan.config(net, step), RUNS[step.stage], processes=plan.processes, parallel=plan.parallel)


def describe_progress(plan: Plan, net: str, seed: int) -> str:
    """Describe a network's progress from its current step's output, in a few words for the terminal."""
    step = _next_step(plan, net, seed)
    if step is None:
        return "all stages are finished"
    folder = plan.folder(net, step)
    reading = _last_reading(folder / "metrics.json")
    if reading is None:
        return f"{step}, preparing"
    solver = yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]  # the run's, which may rescale the plan's
    done, total, rate = reading["iteration"] + 1, solver["MAX_ITER"], reading["images_per_second"]
    if done >= total:
        return f"{step}, evaluating"
    eta = datetime.timedelta(seconds=round((total - done) * solver["IMS_PER_BATCH"] / rate))
    return f"{step}, {done} of {total}, {rate:.4g} images/s, eta {eta}"


def _next_step(plan: Plan, net: str, seed: int) -> Step | None:
    """A network's first unfinished step with a seed; None if all are finished."""
    return next((step for step in plan.steps(net, seed) if not (plan.folder(net, step) / DONE).is_file()), None)


def _last_reading(metrics: Path) -> dict[str, Any] | None:
    """Last training entry in a `metrics.json`; None before the first."""
    for line in reversed(metrics.read_text().splitlines() if metrics.is_file() else []):
        try:
            entry = json.loads(line)
        except ValueError:  # still being written
            continue
        if "images_per_second" in entry:
            return entry
    return None


def _claim(plan: Plan) -> None:
    """Record the plan in the output folder; reject a folder with a different one."""
    file = plan.output / "plan.json"
    if not file.is_file():
        write_json(file, plan.fixed())
        return
    before = json.loads(file.read_text())
    differs = [key for key, value in plan.fixed().items() if before.get(key) != value]
    if differs:
        was = "; ".join(f"{key} was {before.get(key)}, is now {plan.fixed()[key]}" for key in differs)
        raise InputError(f"{plan.output} holds a run with other arguments ({was}). Choose another --output.")
