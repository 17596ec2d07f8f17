#!/usr/bin/env python3
"""Pretrain a classifier and write a checkpoint that says how to feed it."""

import argparse
import sys
from collections.abc import Sequence

from resnet_backbone import pretraining
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.launch import argument_parser, run_tool

EXAMPLE = """example:
  python tools/pretrain.py --config-file configs/pretrain/imagenet.yaml MODEL.NETWORK.NAME resnet50 \\
      DATASETS.TRAIN '/data/shards/train-{000000..000007}.tar' DATASETS.TEST /data/val OUTPUT_DIR output/resnet50"""


def load(arguments: argparse.Namespace):
    return load_config(pretraining.get_config(), arguments.config_file, arguments.opts)


def main(words: Sequence[str] | None = None) -> int:
    return run_tool(argument_parser(__doc__, EXAMPLE).parse_intermixed_args(words), load, pretraining.run)


if __name__ == "__main__":
    sys.exit(main())
