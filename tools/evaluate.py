#!/usr/bin/env python3
"""Evaluate detections as COCO does, and report why the AP is what it is."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_backbone.detection.evaluation.report import write_report
from resnet_backbone.detection.evaluation.results_file import evaluate_files
from resnet_backbone.errors import exit_code

EPILOG = """examples:
  python tools/evaluate.py found.json annotations.json --output report
  python tools/evaluate.py output/detector/inference/NAME/coco_instances_results.json annotations.json

What the detections have is evaluated: boxes (bbox), masks (segmentation, as run lengths), keypoints.
exit code: 0, or 2 if a file cannot be used"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detections", type=Path, metavar="DETECTIONS.json", help="a list, in COCO's form of results")
    parser.add_argument("truth", type=Path, metavar="GROUND_TRUTH.json", help="a COCO file")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="for report.md and its figures; default: evaluation",
    )
    parser.add_argument(
        "--oks-sigmas", type=float, nargs="+", default=[], metavar="SIGMA", help="one a keypoint; default: COCO's 17"
    )
    given = parser.parse_args(words)
    if not all(0 < sigma < float("inf") for sigma in given.oks_sigmas):
        parser.error("--oks-sigmas: expected numbers above 0")
    return given


def report(given: argparse.Namespace) -> None:
    evaluations = evaluate_files(given.detections, given.truth, sigmas=given.oks_sigmas)
    title = f"{given.detections.name} on {given.truth.name}"
    file = write_report(evaluations, given.output, title)
    for task, evaluation in evaluations.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.2f}" for name, value in evaluation.metrics.items()))
    print(f"report: {file}")


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(report, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
