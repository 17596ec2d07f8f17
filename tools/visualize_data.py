#!/usr/bin/env python3
"""Draw what a detector is trained on: a run's images from an iteration on, augmented, with their annotations."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_backbone import detection
from resnet_backbone.detection.data.pictures import COLUMNS, write_pictures
from resnet_backbone.engine.config import load_config
from resnet_backbone.errors import exit_code

EPILOG = """examples:
  python tools/visualize_data.py --config-file configs/faster_rcnn_R101.yaml --output pictures \\
      DATASETS.TRAIN my/train.json SEED 1
  python tools/visualize_data.py --config-file output/detector/config.yaml --iteration 5000 --output pictures

The second draws what the run in output/detector gets in iteration 5000."""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML, or a name of ours or of Detectron2's model zoo"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the pictures (PNG)")
    parser.add_argument("--iteration", type=int, default=0, metavar="N", help="the first iteration (default: 0)")
    parser.add_argument("--images", type=int, default=COLUMNS**2, metavar="M", help="how many (default: %(default)s)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration keys to set; flags may follow")
    return parser.parse_intermixed_args(words)


def visualize(given: argparse.Namespace) -> None:
    cfg = load_config(detection.get_config(), given.config_file, given.opts)
    print(write_pictures(cfg, given.output, iteration=given.iteration, images=given.images))


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(visualize, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
