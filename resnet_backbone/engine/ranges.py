"""Check a configuration's values against a table: for each key, what it may hold.

The table below is what both training tools read; each tool adds its own rows. A key that holds True or False needs no
row: loading a configuration checks types.
"""

import operator
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.solver.build import GradientClipType

from resnet_backbone.data.corrupt import ON_CORRUPT
from resnet_backbone.engine.config import ConfigError, flatten, said, shown
from resnet_backbone.engine.precision import PRECISIONS
from resnet_backbone.engine.schedule import SCHEDULES, WARMUP_METHODS


class Range(NamedTuple):
    """What a key may hold.

    Attributes:
        words: completes "expected …".
        allows: whether a value, of any type, is in the range.
    """

    words: str
    allows: Callable[[Any], bool]


def number(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Range:
    """Return the range of finite numbers within these bounds."""
    bounds = [
        ("of at least", operator.ge, at_least),
        ("above", operator.gt, above),
        ("at most", operator.le, at_most),
        ("below", operator.lt, below),
    ]
    bounds = [bound for bound in bounds if bound[2] is not None]

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            return False
        return all(compare(value, bound) for _, compare, bound in bounds)

    words = " and ".join(f"{words} {bound}" for words, _, bound in bounds)
    return Range(f"a number {words}" if words else "a finite number", allows)


def whole(low: int, high: int = 2**31 - 1) -> Range:
    """Return the range of whole numbers from `low` to `high`; larger ones fit in no counter, or no memory."""
    return Range(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def one_of(*values: Any) -> Range:
    """Return the range of these values."""
    return Range(
        " or ".join(map(shown, values)), lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def each(item: Range, count: int | None = None, *, empty: bool = False) -> Range:
    """Return the range of tuples and lists with every item in `item`: `count` of them, or any number but 0."""
    return Range(
        f"{count or ('any number of' if empty else 'one or more')} values, each {item.words}",
        lambda value: (
            isinstance(value, (tuple, list))
            and (len(value) == count if count else empty or len(value) > 0)
            and all(map(item.allows, value))
        ),
    )


def either(*ranges: Range) -> Range:
    """Return the union of ranges."""
    return Range(", or ".join(r.words for r in ranges), lambda value: any(r.allows(value) for r in ranges))


TEXT = Range("text", lambda value: isinstance(value, str))
TEXTS = each(TEXT, empty=True)
FLAG = one_of(True, False)
# Pixels of an image's side, and channels of a layer: limits far above use, so that a slip does not take all memory.
SIDE = whole(1, 16384)
CHANNELS = whole(1, 16384)

RANGES: dict[str, Range] = {
    "MODEL.DEVICE": Range(
        "cpu, cuda or cuda:NUMBER", lambda value: bool(re.fullmatch(r"cpu|cuda(:\d{1,4})?", str(value)))
    ),
    "MODEL.PIXEL_MEAN": each(number(), 3),
    "MODEL.PIXEL_STD": each(number(above=0), 3),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.NUM_GROUPS": whole(1, 1024),
    "MODEL.RESNETS.WIDTH_PER_GROUP": whole(1, 4096),
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": each(FLAG, 4),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": whole(1, 1024),
    "MODEL.NETWORK.WIDTH": number(above=0, at_most=16),
    "MODEL.NETWORK.SHORTCUT": one_of("A", "B", "C"),
    "MODEL.NETWORK.ALLOW_MISSING": TEXTS,
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "DATASETS.TRAIN": TEXTS,
    "DATASETS.TEST": TEXTS,
    "DATALOADER.NUM_WORKERS": whole(0, 1024),
    "DATALOADER.ON_CORRUPT": one_of(*ON_CORRUPT),
    "DATALOADER.MAX_CORRUPT": number(at_least=0, below=1),
    "SOLVER.LR_SCHEDULER_NAME": one_of(*SCHEDULES),
    "SOLVER.MAX_ITER": whole(0),
    "SOLVER.BASE_LR": number(at_least=0, at_most=1000),
    "SOLVER.MOMENTUM": number(at_least=0, below=1),
    "SOLVER.WEIGHT_DECAY": number(at_least=0, at_most=1000),
    "SOLVER.WEIGHT_DECAY_NORM": number(at_least=0, at_most=1000),
    "SOLVER.WEIGHT_DECAY_BIAS": either(one_of(None), number(at_least=0, at_most=1000)),
    "SOLVER.BIAS_LR_FACTOR": number(at_least=0, at_most=1000),
    "SOLVER.GAMMA": number(above=0, at_most=1),
    "SOLVER.STEPS": each(whole(1), empty=True),
    "SOLVER.WARMUP_FACTOR": number(at_least=0, at_most=1),
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.WARMUP_METHOD": one_of(*WARMUP_METHODS),
    "SOLVER.WARMUP_UNTIL_ERROR": number(at_least=0, at_most=100),
    "SOLVER.CHECKPOINT_PERIOD": whole(0),
    "SOLVER.CHECKPOINT_KEEP": whole(0),
    "SOLVER.IMS_PER_BATCH": whole(1, 2**20),
    "SOLVER.REFERENCE_IMS_PER_BATCH": whole(0, 2**20),
    "SOLVER.ACCUMULATE": whole(1, 2**20),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(*(kind.value for kind in GradientClipType)),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(above=0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": number(above=0),
    "SOLVER.AMP.PRECISION": one_of(*PRECISIONS),
    "SOLVER.EMA_DECAY": number(at_least=0, below=1),
    "SOLVER.PLATEAU_PATIENCE": whole(0),
    "SOLVER.PLATEAU_THRESHOLD": number(at_least=0),
    "SOLVER.LOG_PERIOD": whole(1),
    "TEST.EVAL_PERIOD": whole(0),
    "TEST.PATIENCE": whole(0),
    "TEST.PRECISE_BN.NUM_ITER": whole(1),
    "SEED": whole(-1, 2**32 - 1),
}


def check_ranges(cfg: CfgNode, ranges: Mapping[str, Range]) -> None:
    """Raise ConfigError for the first key of `ranges` whose value is outside its range."""
    values = dict(flatten(cfg))
    for key, allowed in ranges.items():
        if not allowed.allows(values[key]):
            raise ConfigError(f"{said(cfg, key)}, expected {allowed.words}.")
