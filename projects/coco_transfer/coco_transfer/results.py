"""A finished plan's numbers: of every network, its seeds and its control."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from coco_transfer.plan import STAGES, Plan, Step
from coco_transfer.stages import DONE

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Summary(NamedTuple):
    """A number over seeds: mean, and sample standard deviation if there are several."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def collect_results(plan: Plan) -> dict[str, Any]:
    """Collect all measurements and what it takes to reproduce them."""
    networks = {}
    for net in plan.nets:
        first, *others = plan.seeds(net)
        networks[net] = {**_measured(plan, net, first), **_recipe(plan, net, control=False)}
        if others:
            networks[net]["repeats"] = [{"seed": seed, **_measured(plan, net, seed)} for seed in others]
        if plan.control:
            control = {**_measured(plan, net, first, control=True), **_recipe(plan, net, control=True)}
            networks[net]["control"] = control
    return {
        "scale": plan.scale,
        "seed": plan.seed,
        "conditions": _conditions(plan),
        "networks": networks,
    }


def summarize(row: dict[str, Any], key: str) -> Summary | None:
    """Summarize one of a network's numbers over its seeds; None if the data set has no object of that kind."""
    values = [one.get(key) for one in seeds_of(row)]
    if None in values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def signed(points: float) -> str:
    """Write a difference with its sign and one digit; what rounds to 0 is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}"


def seeds_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """List the measurements of each of a network's seeds."""
    return [row, *row.get("repeats", ())]


def average_precision(bbox: dict[str, float | None]) -> dict[str, float | None]:
    """A detector's metrics; with no detections, AP is 0 instead of Detectron2's NaN (null in JSON)."""
    found = {key: bbox[key] for key in METRICS if key in bbox}
    return {key: 0.0 if value is None and bbox["AP"] is None else value for key, value in found.items()}


def detection_files(plan: Plan, net: str) -> Iterator[Path | None]:
    """Yield the detections of each of a network's seeds, in COCO's form; None if the evaluator wrote none."""
    for seed in plan.seeds(net):
        folder = plan.folder(net, Step(stage="detection", seed=seed))
        yield next(iter(sorted((folder / "inference").glob("*/coco_instances_results.json"))), None)


def _conditions(plan: Plan) -> list[dict[str, Any]]:
    """List the conditions under which stages ran, each with the number of stages."""
    steps = [(net, step) for net in plan.nets for seed in plan.seeds(net) for step in plan.steps(net, seed)]
    records = [_record(plan, net, step)["conditions"] for net, step in steps]
    return [{**one, "stages": records.count(one)} for number, one in enumerate(records) if records.index(one) == number]


def _measured(plan: Plan, net: str, seed: int, *, control: bool = False) -> dict[str, Any]:
    pretrain, detect = (_record(plan, net, Step(stage=stage, seed=seed, control=control)) for stage in STAGES)
    return {
        "top1": pretrain["top1"],
        **average_precision(detect["bbox"]),
        "seconds": {"pretrain": pretrain["seconds"], "detection": detect["seconds"]},
        "resumed": pretrain["resumed"] or detect["resumed"],
    }


def _record(plan: Plan, net: str, step: Step) -> dict[str, Any]:
    return json.loads((plan.folder(net, step) / DONE).read_text())


def _recipe(plan: Plan, net: str, *, control: bool) -> dict[str, Any]:
    steps = (Step(stage=stage, seed=plan.seed, control=control) for stage in STAGES)
    pretrain, detect = (plan.config(net, step) for step in steps)
    return {
        "schedule": {
            stage: {"iterations": cfg.SOLVER.MAX_ITER, "batch": cfg.SOLVER.IMS_PER_BATCH, "lr": cfg.SOLVER.BASE_LR}
            for stage, cfg in zip(STAGES, (pretrain, detect), strict=True)
        },
        "width": pretrain.MODEL.NETWORK.WIDTH,
        "crop": list(pretrain.INPUT.CROP.SIZE),
        "shorter_side": detect.INPUT.MIN_SIZE_TEST,
        "pooler": detect.MODEL.ROI_BOX_HEAD.POOLER_TYPE,
        "roi_size": detect.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
    }
