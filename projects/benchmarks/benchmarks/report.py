"""Comparisons as a readable page and as JSON, with details of the machine."""

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import PIL
import torch
from tabulate import tabulate

from benchmarks.timing import Comparison
from resnet_backbone.engine.output import versions
from resnet_backbone.weights import atomic_write


def describe_setup(*, cpu_time: bool) -> dict[str, Any]:
    """Date, versions, machine and threads before the run; the load shows whether others use the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": f"{versions()}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "seconds": "CPU seconds" if cpu_time else "seconds",
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def to_dict(setup: Mapping[str, Any], comparisons: Iterable[Comparison], skipped: Sequence[str]) -> dict[str, Any]:
    """Convert everything to plain values."""
    return {
        "setup": dict(setup),
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "skipped": list(skipped),
    }


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write `to_dict`'s values as JSON."""
    with atomic_write(file) as target:
        target.write((json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def format_page(results: Mapping[str, Any]) -> str:
    """Format a Markdown table per unit, with the sides' settings below it, and list what was skipped."""
    parts = [setup_line(results["setup"])]
    for unit in dict.fromkeys(comparison["unit"] for comparison in results["comparisons"]):
        parts += _tables([comparison for comparison in results["comparisons"] if comparison["unit"] == unit], unit)
    parts += [f"Skipped: {line}" for line in results["skipped"]]
    return "\n\n".join(parts)


def setup_line(setup: Mapping[str, Any]) -> str:
    gpu = f", {setup['gpu']} (CUDA {setup['cuda']})" if setup["gpu"] else ""
    return (
        f"{setup['date']}; {setup['versions']}; {setup['cpu']}{gpu}, {setup['cores']} cores, {setup['threads']} "
        f"threads, load before the run {setup['load']}, in {setup['seconds']}"
    )


def _tables(comparisons: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    rows, settings = [], {}
    for comparison in comparisons:
        for number, side in enumerate(comparison["sides"]):
            ratio = side["first_is_faster"]
            is_first = side["name"] == comparison["first"]
            rows.append(
                [
                    comparison["task"] if number == 0 else "",
                    side["name"],
                    f"{side['rate']['median']:.4g}",
                    "" if is_first else f"{ratio['median']:.2f}",
                    "" if is_first else f"{ratio['min']:.2f} … {ratio['max']:.2f}",
                ]
            )
            settings.setdefault((side["name"], side["settings"]), []).append(comparison["task"])
    header = ["", "side", unit, "first ÷ this", "over the rounds"]
    align = ["left", "left", "right", "right", "right"]
    table = tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True)
    return [table, "\n".join(f"- {name}: {text}" for name, text in settings)]


def _cpu() -> str:
    """The CPU's name as reported by Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
