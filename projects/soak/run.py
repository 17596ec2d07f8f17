#!/usr/bin/env python3
"""Train a detector in two processes on the CPU through random accidents, and compare with a run that had none."""

import argparse
import sys
from pathlib import Path

from soak.carry_out import Plan, carry_out
from soak.report import report

from resnet_backbone.errors import EXIT_BAD_INPUT, InputError
from resnet_backbone.weights import write_json

EXAMPLE = """example:
  python projects/soak/run.py --output output/soak --data voc/train.json voc/val.json"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--data", nargs=2, metavar=("TRAIN", "TEST"), help="as in DATASETS; by default generated images"
    )
    parser.add_argument("--iterations", type=int, default=900, metavar="N")
    parser.add_argument("--accidents", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(words)
    plan = Plan(given.output, given.data and tuple(given.data), given.iterations, given.accidents, given.seed)
    try:
        results = carry_out(plan)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    text = report(plan, results)
    write_json(plan.output / "results.json", results)
    (plan.output / "report.md").write_text(text)
    print(text)
    # To the two decimals that are printed.
    same = all(abs(results["evaluated"][name] - value) < 0.006 for name, value in results["reported"].items())
    return 0 if same and results["same_detections"] and not results["different"] else 1


if __name__ == "__main__":
    sys.exit(main())
