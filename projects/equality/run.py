#!/usr/bin/env python3
"""Train a detector with Detectron2's own modules and with the accelerated ones, over some seeds, and compare."""

import argparse
import sys
from pathlib import Path

from equality.compare import compare
from equality.report import report

from resnet_backbone.errors import EXIT_BAD_INPUT, InputError
from resnet_backbone.weights import write_json

EXAMPLE = """example:
  python projects/equality/run.py --config-file faster_rcnn_R101.yaml --output output/equality \\
      MODEL.WEIGHTS output/resnet101/model_final.pth DATASETS.TRAIN voc/train.json DATASETS.TEST voc/val.json"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a run's folder each, and the report")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--images", type=int, default=50, metavar="N", help="test images to compare detections on")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    given = parser.parse_intermixed_args(words)
    try:
        results = compare(given.config_file, given.opts, given.output, seeds=given.seeds, images=given.images)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    write_json(given.output / "results.json", results)
    print(report(results, given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
