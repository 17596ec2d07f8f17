#!/usr/bin/env python3
"""Detect objects on images and videos with a trained detector: pictures with boxes, and COCO results."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_backbone.detection.inference.predict import predict
from resnet_backbone.errors import exit_code

EXAMPLE = """examples:
  python tools/predict.py --weights output/detector/model_final.pth --output found photographs
  python tools/predict.py --weights output/detector/model_best.pth --output found --threshold 0.7 'day1/*.jpg' a.mp4

exit code: 0 if something was read, 1 if nothing could be, 2 for unusable input or a video that ends early"""


def share(word: str) -> float:
    if not 0 <= float(word) <= 1:
        raise ValueError
    return float(word)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="an image, a video, a folder, or a quoted pattern")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a detector that tools/train_net.py wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write to")
    parser.add_argument("--threshold", type=share, default=0.5, metavar="X", help="lowest score to draw (default: 0.5)")
    parser.add_argument(
        "--ids", type=Path, metavar="FILE", help="a COCO file: take the images' and categories' ids of it"
    )
    parser.add_argument("--config-file", metavar="FILE", help="for a detector of Detectron2's trainer")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    return parser.parse_args(words)


def report(given: argparse.Namespace) -> int:
    summary = predict(**vars(given))
    print(summary.text())
    return summary.exit_code


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(report, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
