#!/usr/bin/env python3
"""Plot signal and gradient by depth for plain and residual networks, at initialization and after brief training."""

import argparse
import functools
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from signal_propagation.figure import draw
from signal_propagation.measure import EXPERIMENT, measure

from resnet_backbone.errors import exit_code
from resnet_backbone.weights import atomic_write


def carry_out(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # One thread, so sums run in the same order everywhere.
    torch.set_num_threads(1)
    start = time.process_time()
    results = measure(EXPERIMENT, report=print)
    setting = {
        "experiment": asdict(EXPERIMENT),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "machine": f"one of {os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "cpu_seconds": round(time.process_time() - start),
    }
    with atomic_write(output / "results.json") as file:
        # One line per entry; JSON's own indentation would put each number of a curve on its own line.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (setting | results).items()]
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
    draw(results, EXPERIMENT, output / "propagation.png")
    print(f"{output / 'propagation.png'} after {setting['cpu_seconds']} seconds")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets propagation.png, results.json")
    return exit_code(functools.partial(carry_out, parser.parse_args(words).output))


if __name__ == "__main__":
    sys.exit(main())
