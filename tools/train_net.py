#!/usr/bin/env python3
"""Train or evaluate a Detectron2 detector with one of this package's networks or any of Detectron2's own."""

import argparse
import sys
from collections.abc import Sequence

from resnet_backbone import detection
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.launch import argument_parser, run_tool

EXAMPLE = """example:
  python tools/train_net.py --config-file configs/faster_rcnn_R101.yaml --num-gpus 8 \\
      MODEL.WEIGHTS output/resnet101/model_final.pth OUTPUT_DIR output/detector"""


def load(arguments: argparse.Namespace):
    return load_config(detection.get_config(), arguments.config_file, arguments.opts)


def main(words: Sequence[str] | None = None) -> int:
    return run_tool(argument_parser(__doc__, EXAMPLE).parse_intermixed_args(words), load, detection.run)


if __name__ == "__main__":
    sys.exit(main())
