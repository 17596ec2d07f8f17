#!/usr/bin/env python3
"""Check every image of a classification dataset before a run: what would stop it, and what is worth knowing."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence

from resnet_backbone.data.check import check_entry
from resnet_backbone.data.report import outcome
from resnet_backbone.errors import exit_code, new_file

EXIT_FOUND = 1

EPILOG = """examples:
  python tools/check_dataset.py imagenet/train imagenet/val --workers 8
  python tools/check_dataset.py 'shards/train-{000000..000007}.tar' --json found.json

exit code: 0 if a run can read every image that was looked at, 1 if not, 2 if the data set cannot be opened"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entry", metavar="ENTRY", help="as in DATASETS.TRAIN: a folder, a shard pattern or a name")
    parser.add_argument("other", metavar="ENTRY", nargs="?", help="a second one: find the images that are in both, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images only, spread evenly")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything that was found, name by name")
    given = parser.parse_args(words)
    if given.json and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: the folder {given.json.absolute().parent} does not exist")
    return given


def report(given: argparse.Namespace) -> int:
    reports = [
        check_entry(entry, workers=given.workers, limit=given.limit, progress=sys.stderr)
        for entry in (given.entry, given.other)
        if entry
    ]
    text, found, stops = outcome(reports)
    print(text)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return EXIT_FOUND if stops else 0


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(report, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
