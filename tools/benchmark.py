#!/usr/bin/env python3
"""Time training, loading, detection and evaluation against the usual alternatives, in turns, in one process."""

import signal

if __name__ == "__main__":  # Ctrl-C ends the imports below without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "benchmarks"))

from benchmarks import data, detect, evaluate, pretrain
from benchmarks.detectors import DETECTORS
from benchmarks.plans import DEVICES, NETWORKS, PRECISIONS, run_data, run_detect, run_evaluate, run_pretrain
from benchmarks.report import format_page, write
from resnet_backbone.errors import exit_code, new_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
READING = """Each side has its turn in every round. "first ÷ this" is how many times as fast the first side of a group
was: the median over the rounds, then the smallest and the largest."""


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = _command(commands, "pretrain", "images per second of a training step", pretrain.MEANING, run_pretrain)
    steps.set_defaults(configs=CONFIGS)
    steps.add_argument("--networks", nargs="+", metavar="NAME", help=f"default: {' '.join(NETWORKS)}")
    steps.add_argument("--batch", type=int, help="images; default: 256 on a GPU, else 32 (CIFAR's networks: 128)")
    steps.add_argument("--size", type=int, help="pixels; default: 224 (CIFAR's networks: 32)")
    steps.add_argument(
        "--iterations", type=int, help="in a turn; default: 40 on a GPU, else 1 (CIFAR's: 10 times, or twice)"
    )
    steps.add_argument("--precision", choices=PRECISIONS, help="of all sides but the plain loop; default: the recipe's")
    loading = _command(commands, "data", "images per second of loading and augmenting JPEGs", data.MEANING, run_data)
    loading.set_defaults(configs=CONFIGS)
    loading.add_argument("--images", type=Path, metavar="FOLDER", help="with JPEGs below it; default: generated ones")
    loading.add_argument("--workers", type=int, default=0, help="loading processes; default: 0, this process")
    detectors = _command(
        commands, "detect", "images per second of a detector's training step and inference", detect.MEANING, run_detect
    )
    detectors.set_defaults(configs=CONFIGS.parent)
    detectors.add_argument(
        "--detectors",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(DETECTORS)}; default: R101-C4, R101-FPN and R50-FPN on a GPU, else R50-C4",
    )
    detectors.add_argument("--batch", type=int, help="images; default: 8 on a GPU, else 1")
    detectors.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels; default: 800 1216 on a GPU, else 480 640",
    )
    detectors.add_argument("--rois", type=int, help="an image in training; default: 512 on a GPU, else 128")
    detectors.add_argument("--iterations", type=int, help="in a turn; default: 5 on a GPU, else 1")
    detectors.add_argument(
        "--stride-in-3x3",
        action="store_true",
        help="of all sides' ResNets; default: in the first 1×1 convolution, as Detectron2 has it",
    )
    evaluation = _command(
        commands,
        "evaluate",
        "images per second of COCO's evaluation of boxes",
        evaluate.MEANING,
        run_evaluate,
        on_device=False,
    )
    evaluation.add_argument("--images", type=int, help="default: 5000")
    evaluation.add_argument("--detections", type=int, help="in an image; default: 100")
    return parser.parse_args(words)


def _command(
    commands: Any,
    name: str,
    what: str,
    meaning: Mapping[str, str],
    run: Callable[..., dict[str, Any]],
    *,
    on_device: bool = True,
) -> argparse.ArgumentParser:
    """Add a subcommand with the shared options, --device only where a GPU can do the work."""
    sides = "\n".join(f"  {side}: {text}" for side, text in meaning.items())
    parser = commands.add_parser(
        name,
        help=what,
        description=f"Measure {what}.",
        epilog=f"sides:\n{sides}\n\n{READING}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if on_device:
        parser.add_argument("--device", choices=DEVICES, help="default: the GPU, where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side; default: 5")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU seconds instead of those that pass: for a machine that others use, with "
        "OMP_NUM_THREADS=1",
    )
    parser.add_argument("--tiny", action="store_true", help="a few seconds that show that it runs; says nothing else")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything that was measured")
    return parser


def measure(*, run: Callable[..., dict[str, Any]], json: Path | None, **options: Any) -> None:
    if json is not None:
        options["keep"] = functools.partial(write, json)
    with contextlib.redirect_stdout(sys.stderr):  # where the training loop's log goes, too
        results = run(report=lambda line: print(line, flush=True), **options)
    print(format_page(results))
    if json is not None:
        write(json, results)


def main(words: Sequence[str] | None = None) -> int:
    options = vars(parse(words))
    options.pop("command")
    return exit_code(functools.partial(measure, **options))


if __name__ == "__main__":
    sys.exit(main())
