#!/usr/bin/env python3
"""CIFAR-10 by depth: train plain and residual networks and compare with the ResNet paper's Table 6 and Figure 6."""

import argparse
import functools
import sys
from pathlib import Path

from cifar10.plan import SCALES, Plan
from cifar10.report import write_report
from cifar10.runs import carry_out

from resnet_backbone.errors import exit_code

EXAMPLES = """examples:
  # two CPU cores, half an hour, on JPEG copies of CIFAR-10
  python projects/cifar10/run.py --scale cpu --parallel 2 --data cifar10_jpeg.tar.xz --output output/cifar10_cpu

  # the paper's schedule on one GPU, four networks at a time, CIFAR-10 under DETECTRON2_DATASETS
  python projects/cifar10/run.py --scale paper --seeds 1 2 3 --parallel 4 --output output/cifar10 SOLVER.CUDA_GRAPH True

  # the report alone, of the records in DIR/runs
  python projects/cifar10/run.py --report --output projects/cifar10/results/cpu

Started again with the same arguments, an experiment goes on where it stopped; further networks or seeds are added."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--data",
        metavar="PATH_OR_NAME",
        help="cifar10 (the default: cifar10_train and cifar10_test), a folder with train and test in it, or an archive "
        "of one, which is unpacked beside DIR",
    )
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="by default the scale's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED")
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="runs side by side, each a process")
    parser.add_argument("--report", action="store_true", help="train nothing; write the report of the finished runs")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration over the scale's own, for all runs")
    given = parser.parse_intermixed_args(words)
    if given.scale is None and not given.report:
        parser.error("--scale is required, except with --report")
    return given


def report(given: argparse.Namespace) -> None:
    if given.report:
        print(write_report(given.output))
        return
    plan = Plan(
        scale=given.scale,
        output=given.output,
        data=given.data,
        networks=tuple(given.networks),
        seeds=tuple(given.seeds),
        parallel=given.parallel,
        keys=tuple(given.opts),
    )
    print(carry_out(plan))


def main(words: list[str] | None = None) -> int:
    return exit_code(
        functools.partial(report, parse(words)),
        interrupted="stopped and saved: started again with the same arguments, it goes on from there.",
    )


if __name__ == "__main__":
    sys.exit(main())
