#!/usr/bin/env python3
"""Print each network's structure and cost, stage by stage, next to the ResNet paper's numbers."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from resnet_backbone.analysis import NetworkAnalysis, analyze, analyze_catalogue, format_overview, format_table
from resnet_backbone.errors import exit_code
from resnet_backbone.networks import accepted_arguments, list_networks

EPILOG = f"""examples:
  python tools/analyze_model.py resnet50 resnet101 resnet152 --stride-in-1x1    # the paper's Table 1
  python tools/analyze_model.py vgg16 resnet101
  python tools/analyze_model.py --all --markdown

names: {", ".join(list_networks())}"""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a network of the catalogue")
    parser.add_argument("--all", action="store_true", help="instead of NAME: a row for each network of the catalogue")
    parser.add_argument("--width", type=float, help="factor on the channels")
    parser.add_argument(
        "--stride-in-1x1", action="store_true", help="bottlenecks' stride in their first 1×1, as in the paper"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: 224, for CIFAR's networks 32")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true")
    form.add_argument("--json", action="store_true", help="a list of networks, one a line")
    given = parser.parse_intermixed_args(words)
    one_network = given.names or given.width is not None or given.stride_in_1x1 or given.image_size is not None
    if given.all == bool(one_network) or not (given.all or given.names):
        parser.error("expected names of networks, or --all without names, --width, --stride-in-1x1 and --image-size")
    return given


def network_options(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Select the arguments that apply: stride placement means nothing to a network without bottlenecks."""
    options = {} if given.width is None else {"width": given.width}
    if given.stride_in_1x1 and "stride_in_1x1" in accepted_arguments(name):
        options["stride_in_1x1"] = True
    return options


def report(given: argparse.Namespace) -> str:
    analyses: list[NetworkAnalysis]
    if given.all:
        analyses, form, values = analyze_catalogue(), format_overview, NetworkAnalysis.totals
    else:
        analyses = [analyze(name, image_size=given.image_size, **network_options(given, name)) for name in given.names]
        form, values = format_table, NetworkAnalysis.details
    if given.json:
        return "[\n" + ",\n".join(json.dumps(values(analysis), ensure_ascii=False) for analysis in analyses) + "\n]"
    return form(analyses, markdown=given.markdown)


def main(words: Sequence[str] | None = None) -> int:
    given = parse(words)
    return exit_code(lambda: print(report(given)))


if __name__ == "__main__":
    sys.exit(main())
