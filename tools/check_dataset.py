#!/usr/bin/env python3
"""Check a data set before a run, for pretraining or detection: what would stop it, and what is worth knowing."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence

from resnet_backbone.data import check as classification
from resnet_backbone.data.layouts import is_detection
from resnet_backbone.errors import InputError, exit_code, new_file

EXIT_FOUND = 1

EPILOG = """examples:
  python tools/check_dataset.py imagenet/train imagenet/val --workers 8
  python tools/check_dataset.py 'shards/train-{000000..000007}.tar' --json found.json
  python tools/check_dataset.py my/train.json my/val.json --figure sizes.png
  python tools/check_dataset.py VOC2007:trainval VOC2007:test

exit code: 0 if nothing that was looked at would stop a run, 1 if something would, 2 if the data set cannot be opened"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "entry", metavar="ENTRY", help="as in DATASETS.TRAIN: a folder, a shard pattern, a COCO file or a name"
    )
    parser.add_argument("other", metavar="ENTRY", nargs="?", help="a second one: find the images that are in both, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images only, spread evenly")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything that was found, name by name")
    parser.add_argument("--figure", type=new_file, metavar="FILE", help="draw classes and box sizes (detection; PNG)")
    given = parser.parse_args(words)
    for flag, file in (("--json", given.json), ("--figure", given.figure)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{flag}: the folder {file.absolute().parent} does not exist")
    return given


def report(given: argparse.Namespace) -> int:
    entries = [entry for entry in (given.entry, given.other) if entry]
    kinds = set(map(is_detection, entries))
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(entries)}: one has images to classify, the other objects to detect.")
    if kinds == {True}:  # imported here, since pretraining's data needs no Detectron2
        from resnet_backbone.detection.data import check, figure
    elif given.figure:
        raise InputError(f"--figure draws objects, and {given.entry} has images to classify. Leave it out.")
    else:
        check = classification
    reports = [
        check.check_entry(entry, workers=given.workers, limit=given.limit, progress=sys.stderr) for entry in entries
    ]
    text, found, stops = check.outcome(reports)
    print(text.encode(errors="backslashreplace").decode())  # names that are no text
    if given.json:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        given.json.write_bytes(text.encode(errors="backslashreplace"))  # which is how JSON writes them, too
    if given.figure:
        figure.draw(reports, given.figure)
    return EXIT_FOUND if stops else 0


def main(words: Sequence[str] | None = None) -> int:
    return exit_code(functools.partial(report, parse(words)))


if __name__ == "__main__":
    sys.exit(main())
