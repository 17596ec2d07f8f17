#!/usr/bin/env python3
"""Train or evaluate a Detectron2 detector with one of this package's networks or any of Detectron2's own."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence

from resnet_backbone import detection
from resnet_backbone.detection.dry_run import throughput, try_run
from resnet_backbone.engine.config import load_config
from resnet_backbone.engine.launch import argument_parser, training_tool

EXAMPLE = """examples:
  python tools/train_net.py --config-file configs/faster_rcnn_R101.yaml --num-gpus 8 \\
      MODEL.WEIGHTS output/resnet101/model_final.pth OUTPUT_DIR output/detector
  python tools/train_net.py --config-file configs/faster_rcnn_R101.yaml --try 20    # does it work?"""


def load(arguments: argparse.Namespace):
    return load_config(detection.get_config(), arguments.config_file, arguments.opts)


def main(words: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, EXAMPLE)
    return training_tool(parser, words, load, detection.run, try_run=try_run, throughput=throughput)


if __name__ == "__main__":
    sys.exit(main())
