#!/usr/bin/env python3
"""Run everything that needs a GPU, the tests marked gpu and the benchmark tables, and write a report."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "benchmarks"))

from benchmarks.gpu import PARTS, run_parts
from resnet_backbone.errors import InputError, exit_code


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    lines = [f"  {name:10} {part.what} (at most {part.seconds} s)" for name, part in PARTS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["parts:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="NAME", help="default: all of them")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), metavar="DIR", help="default: output/gpu")
    return parser.parse_args(words)


def check(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise InputError("torch finds no GPU here, and everything that this command runs needs one.")
    good = run_parts(options.parts, options.output, report=lambda line: print(line, file=sys.stderr, flush=True))
    print((options.output / "report.md").read_text())
    return 0 if good else 1


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(check, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
