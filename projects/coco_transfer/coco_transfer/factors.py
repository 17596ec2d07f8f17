"""Which of the compared networks differ in batch norm, shortcuts or depth alone, and what that is worth."""

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from coco_transfer.bootstrap import draw_images, find_matches, interval, resampled_ap
from coco_transfer.plan import STAGES, Plan, Step, keys_of_one
from coco_transfer.results import detection_files, summarize
from resnet_backbone.analysis import analyze
from resnet_backbone.detection.data import datasets
from resnet_backbone.detection.evaluation.average_precision import evaluate
from resnet_backbone.detection.evaluation.coco import complete
from resnet_backbone.engine.config import flatten, get_key
from resnet_backbone.engine.network_config import configured_network
from resnet_backbone.networks.blocks import BasicBlock, PreActBasicBlock
from resnet_backbone.networks.catalogue import find_row

RESAMPLES = 1000
SEED = 1

# The arguments of a network that make up each factor.
FACTORS = {"norm": ("norm",), "shortcuts": ("shortcut", "zero_init_last_norm"), "depth": ("plan", "depths", "block")}
ALL_AT_ONCE = "all at once"
NORMS = {"BN": "batch norm", "SyncBN": "batch norm", "GN": "group norm"}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A network as the comparison sees it.

    Attributes:
        layers: convolutions on the main path and fully connected layers.
        shortcuts: whether it has any.
        norm: the name of its normalization; None without.
        arguments: what defines it, the class included.
    """

    layers: int
    shortcuts: bool
    norm: str | None
    arguments: dict[str, Any]

    def differs_only_in(self, factor: str, other: "Traits") -> bool:
        rest = [
            {key: value for key, value in one.arguments.items() if key not in FACTORS[factor]} for one in (self, other)
        ]
        return rest[0] == rest[1] and self.arguments != other.arguments


class Pair(NamedTuple):
    """Two networks, and what the second has that the first has not, in words."""

    factor: str
    first: str
    second: str


def find_traits(plan: Plan, net: str) -> Traits:
    """Return the traits of a network as it is configured for pretraining; a detector freezes its norms."""
    name, configured = configured_network(plan.config(net, Step(stage="pretrain", seed=plan.seed)))
    row = find_row(name)
    arguments = {"class": row.network_class, **row.arguments, **configured}
    return Traits(
        layers=analyze(name, **configured).layers,
        shortcuts=arguments.get("shortcut") is not None,
        norm=NORMS.get(arguments["norm"], arguments["norm"]),
        arguments=arguments,
    )


def find_pairs(networks: Mapping[str, Traits]) -> list[Pair]:
    """List the pairs that differ in one factor: norm, then shortcuts, then depth, each network with the next deeper.

    Last comes the shallowest network with neither norm nor shortcuts and the deepest with both, if that is deeper.
    """
    ordered = sorted(networks, key=lambda net: networks[net].layers)
    norms, shortcuts, depths = [], [], []
    for first, second in permutations(ordered, 2):
        one, two = networks[first], networks[second]
        if one.norm is None and two.norm is not None and one.differs_only_in("norm", two):
            norms.append(Pair(two.norm, first, second))
        if two.shortcuts and not one.shortcuts and one.differs_only_in("shortcuts", two):
            shortcuts.append(Pair("shortcuts", first, second))
    for first in ordered:
        one = networks[first]
        deeper = [net for net in ordered if networks[net].layers > one.layers]
        if second := next((net for net in deeper if one.differs_only_in("depth", networks[net])), None):
            depths.append(Pair(_depth_words(one, networks[second]), first, second))
    bare = [net for net in ordered if networks[net].norm is None and not networks[net].shortcuts]
    full = [net for net in ordered if networks[net].norm is not None and networks[net].shortcuts]
    everything = []
    if bare and full and networks[full[-1]].layers > networks[bare[0]].layers:
        everything.append(Pair(ALL_AT_ONCE, bare[0], full[-1]))
    return norms + shortcuts + depths + everything


def compare(plan: Plan, networks: Mapping[str, Any]) -> dict[str, Any]:
    """Return each network's traits and the pairs' differences, as plain values.

    Args:
        networks: the results of each.

    Returns:
        traits: by network: family, layers, shortcuts, norm.
        comparisons: for each pair the differences of top1, AP50 and AP, of means over seeds; intervals of AP50 and AP
            over test images, unless the evaluator wrote no detections in COCO's form; and the settings that differ.
        test_images, resamples: of the intervals.
    """
    traits = {net: find_traits(plan, net) for net in networks}
    pairs = find_pairs(traits)
    needed = dict.fromkeys(net for pair in pairs for net in pair[1:])
    images, resamples = _resample(plan, list(needed))
    comparisons = []
    for factor, first, second in pairs:
        differences = {
            key: summarize(networks[second], key).mean - summarize(networks[first], key).mean
            for key in ("top1", "AP50", "AP")
        }
        comparison = {"factor": factor, "first": first, "second": second, **differences}
        if resamples:
            aps = resamples[second] - resamples[first]
            comparison["intervals"] = {"AP50": interval(aps[:, 0]), "AP": interval(aps.mean(1))}
        comparisons.append({**comparison, "settings": _settings(plan, first, second)})
    return {
        "traits": {
            net: {
                "family": one.arguments["class"].__name__,
                "layers": one.layers,
                "shortcuts": one.shortcuts,
                "norm": one.norm,
            }
            for net, one in traits.items()
        },
        "comparisons": comparisons,
        **({"test_images": images, "resamples": RESAMPLES} if resamples else {}),
    }


def _depth_words(one: Traits, two: Traits) -> str:
    basic = [issubclass(traits.arguments.get("block", object), BasicBlock | PreActBasicBlock) for traits in (one, two)]
    words = f"depth, {one.layers} to {two.layers} layers"
    return f"{words}, with bottlenecks for basic blocks" if basic == [True, False] else words


def _resample(plan: Plan, nets: list[str]) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of test images and each network's AP in the same resamples of them, mean over its seeds.

    The arrays are `resampled_ap`'s; there are none unless all networks have detections in COCO's form.
    """
    name = plan.detection_data[1]
    datasets.register(name, plan.output)
    files = {net: list(detection_files(plan, net)) for net in nets}
    truth_file = datasets.coco_json(name)
    if truth_file is None or not nets or any(None in of_net for of_net in files.values()):
        return 0, {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
    complete(truth)
    images = len(truth.getImgIds())
    counts = draw_images(images, resamples=RESAMPLES, seed=SEED)
    resamples = {}
    for net, of_net in files.items():
        evaluations = (evaluate(truth, json.loads(file.read_bytes()), "bbox") for file in of_net)
        resamples[net] = np.mean([resampled_ap(find_matches(one), counts) for one in evaluations], axis=0)
    return images, resamples


def _settings(plan: Plan, first: str, second: str) -> dict[str, dict[str, list[Any]]]:
    """Return the settings that differ, `{stage: {key: [first's, second's]}}`: of solver and input, or given to one."""
    differ = {}
    for stage, keys in zip(STAGES, (plan.pretrain_keys, plan.detection_keys), strict=True):
        own = {key for net in (first, second) for key in keys_of_one(net, keys)}
        one, two = (_recipe(plan, net, stage, own) for net in (first, second))
        differ[stage] = {key: [one[key], two[key]] for key in one if key in two and one[key] != two[key]}
    return differ


def _recipe(plan: Plan, net: str, stage: str, own: set[str]) -> dict[str, Any]:
    """Return what solver, input and the keys in `own` are set to, without keys that have no effect."""
    cfg = plan.config(net, Step(stage=stage, seed=plan.seed))
    unused = []
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        unused += ["CLIP_GRADIENTS.CLIP_TYPE", "CLIP_GRADIENTS.CLIP_VALUE", "CLIP_GRADIENTS.NORM_TYPE"]
    if "MultiStep" not in cfg.SOLVER.LR_SCHEDULER_NAME:
        unused += ["STEPS", "GAMMA"]
    values = dict(flatten({"SOLVER": cfg.SOLVER, "INPUT": cfg.INPUT})) | {key: get_key(cfg, key) for key in own}
    return {key: value for key, value in values.items() if key.removeprefix("SOLVER.") not in unused}
