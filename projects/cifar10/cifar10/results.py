"""A run's numbers, and their summary over several seeds."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from cifar10.dataset import Dataset
from cifar10.plan import Plan, records
from resnet_backbone.engine.output import machine, versions
from resnet_backbone.engine.precision import precision_of
from resnet_backbone.errors import InputError
from resnet_backbone.weights import atomic_write

LONGEST_CURVE = 200  # points

Curve = list[tuple[int, float]]


class Curves(NamedTuple):
    """Errors in percent by number of completed iterations.

    Attributes:
        training: on augmented images during training, each the mean since the previous point.
        test: on the test images.
    """

    training: Curve
    test: Curve


class Summary(NamedTuple):
    """A quantity over the seeds: count, mean, min and standard deviation (with n − 1; None for one seed)."""

    count: int
    mean: float
    least: float
    deviation: float | None


def read_curves(metrics: Path) -> Curves:
    """Read the curves so far from a run's `metrics.json`; after a resume, later readings win."""
    training, test = {}, {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # still being written
            continue
        if "top1_error" in entry:
            training[entry["iteration"] + 1] = entry["top1_error"]
        if "top1" in entry:  # evaluated before the iteration with that number
            test[entry["iteration"]] = 100 - entry["top1"]
    return Curves(sorted(training.items()), sorted(test.items()))


def make_record(
    plan: Plan,
    dataset: Dataset,
    cfg: CfgNode,
    *,
    curves: Curves,
    test_top1: float,
    training_top1: float | None,
    seconds: float,
    resumed: bool,
) -> dict[str, Any]:
    """Collect a run's measurements and what it takes to reproduce them; errors are in percent."""
    solver, hold_out = cfg.SOLVER, cfg.DATASETS.HOLD_OUT
    title = dataset.title + (f", {hold_out:,} training images held out to test on" if hold_out else "")
    images = (dataset.images[0] - hold_out, hold_out or dataset.images[1])
    return {
        "network": cfg.MODEL.NETWORK.NAME,
        "seed": cfg.SEED,
        "scale": plan.scale,
        "title": title,
        "training_error": last_epoch(curves.training, solver.MAX_ITER, images[0] / solver.IMS_PER_BATCH),
        "training_error_of_final_weights": None if training_top1 is None else round(100 - training_top1, 3),
        "test_error": round(100 - test_top1, 3),
        "settings": {
            "training_images": images[0],
            "test_images": images[1],
            "width": cfg.MODEL.NETWORK.WIDTH,
            "batch": solver.IMS_PER_BATCH,
            "learning_rate": solver.BASE_LR,
            "steps": [step for step in solver.STEPS if step < solver.MAX_ITER],
            "iterations": solver.MAX_ITER,
            "warm_up_until_error": solver.WARMUP_UNTIL_ERROR,
            "weight_decay": solver.WEIGHT_DECAY,
            "precision": precision_of(cfg),
        },
        "keys": list(plan.keys),
        "versions": versions(),
        "machine": machine(),
        "parallel": plan.parallel,
        "seconds": round(seconds),
        "resumed": resumed,
        "training_curve": thin(curves.training),
        "test_curve": thin([*curves.test, (solver.MAX_ITER, 100 - test_top1)]),
    }


def last_epoch(curve: Curve, iterations: int, epoch: float) -> float | None:
    """Mean of a training curve over the last epoch, to the resolution of its points."""
    values = [error for iteration, error in curve if iteration > iterations - epoch]
    return round(statistics.fmean(values), 3) if values else None


def thin(curve: Curve) -> Curve:
    """Reduce to at most LONGEST_CURVE points: each averages equally many neighbors, at the last one's iteration."""
    size = math.ceil(len(curve) / LONGEST_CURVE)
    parts = (curve[start : start + size] for start in range(0, len(curve), size or 1))
    return [(part[-1][0], round(statistics.fmean(error for _, error in part), 2)) for part in parts]


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write one line per entry; JSON's own indentation would put each number of a curve on its own line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_records(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an output folder's finished runs by network, ordered by seed.

    Raises:
        InputError: there are none, or their data or sizes differ, which a table must not mix.
    """
    files = sorted(records(output).glob("*.json"))
    if not files:
        raise InputError(f"{records(output)} holds no finished run (NETWORK-SEED.json). Run the experiment first.")
    found = defaultdict(list)
    for file in files:
        try:
            record = json.loads(file.read_text())
            found[record["network"]].append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not the record of a run ({error!r}). Remove it, or copy it again.") from error
    kinds = {(record["scale"], record["title"]): record for runs in found.values() for record in runs}
    if len(kinds) > 1:
        raise InputError(
            f"{records(output)} mixes {' with '.join(f'{title} (scale {scale})' for scale, title in sorted(kinds))}. "
            "Keep each in a folder of its own."
        )
    return {network: sorted(runs, key=lambda record: record["seed"]) for network, runs in found.items()}


def summarize(values: list[float | None]) -> Summary | None:
    """Summarize over the seeds; None if any run lacks the quantity."""
    if not values or None in values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.fmean(values), min(values), deviation)


def mean_curve(curves: list[Curve]) -> Curve:
    """Mean over the seeds, at the iterations they all share."""
    common = set.intersection(*({iteration for iteration, _ in curve} for curve in curves))
    values = [dict(map(tuple, curve)) for curve in curves]
    return [(iteration, statistics.fmean(value[iteration] for value in values)) for iteration in sorted(common)]
