#!/usr/bin/env python3
"""Pretrain a classifier and write a checkpoint that records the input it expects."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence

from resnet_backbone import pretraining
from resnet_backbone.analysis import analyze_catalogue, format_overview
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.launch import PrintAndExit, argument_parser, training_tool
from resnet_backbone.pretraining.dry_run import throughput, try_run

EXAMPLE = """examples:
  python tools/pretrain.py --config-file configs/pretrain/imagenet.yaml MODEL.NETWORK.NAME resnet50 \\
      DATASETS.TRAIN '/data/shards/train-{000000..000007}.tar' DATASETS.TEST /data/val OUTPUT_DIR output/resnet50
  python tools/pretrain.py --config-file configs/pretrain/imagenet.yaml --try 20    # does it work?
  torchrun --nproc-per-node 8 tools/pretrain.py --config-file configs/pretrain/imagenet.yaml"""


def load(arguments: argparse.Namespace):
    return load_config(pretraining.get_config(), arguments.config_file, arguments.opts)


def main(words: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--list-networks",
        action=PrintAndExit,
        const=lambda: format_overview(analyze_catalogue()),
        help="print the names for MODEL.NETWORK.NAME, and what the networks cost, and stop",
    )
    return training_tool(parser, words, load, pretraining.run, try_run=try_run, throughput=throughput)


if __name__ == "__main__":
    sys.exit(main())
