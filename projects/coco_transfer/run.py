#!/usr/bin/env python3
"""Measure what depth is worth: pretrain each network, transfer it to Faster R-CNN, print the comparison."""

import argparse
import functools
import sys
from pathlib import Path

from coco_transfer.plan import SCALES, Plan
from coco_transfer.transfer import carry_out

from resnet_backbone.errors import exit_code

EXAMPLES = """examples:
  # generated data, ten minutes on two cores
  python projects/coco_transfer/run.py --scale demo --output output/demo

  # your own data, both networks at a time on one GPU
  python projects/coco_transfer/run.py --scale subset --output output/subset --parallel 2 \\
      --pretrain-data 'shards/train-{000000..000007}.tar' shards/val-000000.tar \\
      --detection-data voc/train.json:voc/images voc/val.json:voc/images

  # one factor at a time, some networks with three seeds, two CPU cores
  OMP_NUM_THREADS=1 python projects/coco_transfer/run.py --scale quarter --output output/quarter --parallel 2 \\
      --nets vgg16 vgg16_bn plain34 resnet34 resnet50 resnet101 --repeat vgg16:3 resnet101:3 \\
      --pretrain-data 'shards/train-{000000..000007}.tar' shards/val-000000.tar \\
      --detection-data voc/train.json:voc/images voc/val.json:voc/images

  # ImageNet and COCO 2014 under DETECTRON2_DATASETS, eight GPUs
  python projects/coco_transfer/run.py --scale paper --output output/paper --num-gpus 8

A run that was stopped goes on where it stopped when it is started again with the same arguments. A finished run
is extended by more --nets or a larger --repeat."""


def parse(arguments: list[str] | None = None) -> Plan:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", required=True, choices=SCALES)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--nets", nargs="+", default=["vgg16", "resnet101"], metavar="NAME")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-gpus", type=int, default=1, help="processes (on CPUs too)")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="K", help="networks side by side on the same GPU, each a process"
    )
    parser.add_argument(
        "--repeat",
        nargs="+",
        default=[],
        metavar="[NAME:]N",
        help="number of seeds, SEED, SEED+1, …, for every network or, as NAME:N, for one (default: 1)",
    )
    parser.add_argument(
        "--options", metavar="NAME", help="also measure the options of the paper's Table 9 with this ResNet of --nets"
    )
    parser.add_argument("--no-control", action="store_true", help="leave out the detectors with random backbones")
    data = parser.add_argument_group("data (quarter, subset: required; paper: ImageNet and COCO 2014; demo: generated)")
    entry = ("TRAIN", "TEST")
    data.add_argument("--pretrain-data", nargs=2, metavar=entry, help="folders, shard patterns or registered names")
    data.add_argument("--detection-data", nargs=2, metavar=entry, help="FILE.json:IMAGES, FOLDER:SPLIT or names")
    keys = parser.add_argument_group("configuration over the scale's own, for every network or, as NAME:KEY, for one")
    keys.add_argument("--pretrain", nargs="+", default=[], metavar="KEY VALUE")
    keys.add_argument("--detection", nargs="+", default=[], metavar="KEY VALUE")
    given = parser.parse_args(arguments)
    return Plan(
        scale=given.scale,
        output=given.output,
        nets=tuple(given.nets),
        seed=given.seed,
        processes=given.num_gpus,
        control=not given.no_control,
        parallel=given.parallel,
        repeat=tuple(given.repeat),
        options=given.options,
        pretrain_data=tuple(given.pretrain_data or ()),
        detection_data=tuple(given.detection_data or ()),
        pretrain_keys=tuple(given.pretrain),
        detection_keys=tuple(given.detection),
    )


def main(arguments: list[str] | None = None) -> int:
    return exit_code(
        functools.partial(carry_out, parse(arguments)),
        interrupted="stopped and saved: the same command goes on from there.",
    )


if __name__ == "__main__":
    sys.exit(main())
