"""Run everything that needs a GPU, part by part, and report on the parts run so far."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.report import describe_setup, format_page, setup_line
from resnet_backbone.errors import InputError, Interrupted
from resnet_backbone.weights import atomic_write, write_json

ROOT = Path(__file__).resolve().parents[3]
GRACE = 20.0  # seconds from Ctrl-C, after which pytest still reports its results, to SIGKILL
TAIL = 40  # log lines shown in the report


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        what: what it shows.
        words: arguments to `python`, run in the repository's root.
        seconds: time limit.
        measures: whether it accepts `--json FILE` and writes comparisons there.
    """

    what: str
    words: tuple[str, ...]
    seconds: int
    measures: bool = True


def _benchmark(what: str, seconds: int, *words: str) -> Part:
    return Part(what, ("tools/benchmark.py", *words), seconds)


# Three at a time if xdist is installed: a test of a whole run waits for its processes and the compiler.
PARALLEL = ("-n", "3") if importlib.util.find_spec("xdist") else ()
PARTS = {
    "tests": Part(
        "tests marked gpu", ("-m", "pytest", "-m", "gpu", "-q", "-ra", *PARALLEL, "tests"), 300, measures=False
    ),
    "pretrain": _benchmark("training step, ResNet-50", 240, "pretrain", "--networks", "resnet50", "--rounds", "3"),
    "cifar": _benchmark(
        "training step, CIFAR networks",
        150,
        *("pretrain", "--networks", "cifar_resnet20", "cifar_resnet110", "--rounds", "3"),
    ),
    "data": _benchmark("loading and training from JPEGs", 180, "data", "--rounds", "3"),
    "detect": _benchmark("detectors", 400, "detect", "--rounds", "3"),
}


def run_parts(
    names: Sequence[str], output: Path, *, report: Callable[[str], object], parts: Mapping[str, Part] = PARTS
) -> bool:
    """Run parts one by one, rewriting the page `output/report.md` after each.

    It includes the latest result of each part from earlier calls with the same `output`.

    Args:
        names: keys of `parts`, in the order to run them.
        report: gets a line before and after each part.

    Returns:
        Whether all of them finished without an error.

    Raises:
        InputError: an unknown name.
        Interrupted: a signal requested exit; the current part was stopped and the report written.
    """
    if unknown := [name for name in names if name not in parts]:
        raise InputError(f"there is no part {unknown[0]}; expected {', '.join(parts)}.")
    output.mkdir(parents=True, exist_ok=True)
    good = True
    with _signals() as received:
        for number, name in enumerate(names, 1):
            report(f"{name} ({number} of {len(names)}): {parts[name].what}, at most {parts[name].seconds} s")
            found = _run(name, parts[name], output, received)
            write_json(output / f"{name}.json", found)
            with atomic_write(output / "report.md") as file:
                file.write(format_report(output, parts).encode())
            report(f"{name}: {found['ending']} after {found['seconds']:.0f} s")
            good &= found["ending"] == "passed"
            if received:
                raise Interrupted(f"{received[0].name}: {name} was stopped; {output / 'report.md'} holds what there is")
    return good


def format_report(output: Path, parts: Mapping[str, Part]) -> str:
    """Format the page from what `run_parts` wrote to `output`."""
    found = {name: json.loads((output / f"{name}.json").read_text()) for name in parts if _is_there(output, name)}
    rows = [(name, parts[name].what, part["ending"], f"{part['seconds']:.0f}") for name, part in found.items()]
    table = tabulate(rows, ("part", "what", "how it ended", "seconds"), tablefmt="github", disable_numparse=True)
    pages = ["# On a GPU", table]
    for name, part in found.items():
        pages.append(f"## {name}: {parts[name].what}")
        pages.append(format_page(part["results"]) if part["results"] else setup_line(part["setup"]))
        if part["tail"]:
            pages.append("\n".join(["```", *part["tail"], "```"]))
    return "\n\n".join(pages) + "\n"


def _is_there(output: Path, name: str) -> bool:
    return (output / f"{name}.json").is_file()


def _run(name: str, part: Part, output: Path, received: list[signal.Signals]) -> dict[str, Any]:
    """Run one part; return how it ended, its measurements (possibly partial), and the end of its log."""
    results, log = output / f"{name}_results.json", output / f"{name}.log"
    results.unlink(missing_ok=True)
    words = [sys.executable, *part.words, *(["--json", str(results.resolve())] if part.measures else [])]
    setup = describe_setup(cpu_time=False)
    start = time.monotonic()
    with log.open("w") as file:
        # In its own process group, since a part starts processes too.
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        code = _wait(process, part.seconds, received)
    if received:
        ending = f"stopped by {received[0].name}"
    else:
        special = {0: "passed", None: f"stopped, longer than {part.seconds} s"}
        ending = special.get(code, f"failed with exit code {code}")
    lines = log.read_text(errors="replace").splitlines()
    return {
        "ending": ending,
        "seconds": round(time.monotonic() - start, 1),
        "setup": setup,
        "results": json.loads(results.read_text()) if results.is_file() else None,
        # For tests, this has the pass count and skip reasons.
        "tail": lines[-TAIL:] if ending != "passed" or not part.measures else [],
    }


def _wait(process: subprocess.Popen, seconds: float, received: list[signal.Signals]) -> int | None:
    """Return the exit code; None if the process had to be stopped by the time limit or a signal."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not received:
        time.sleep(0.1)
    if (code := process.poll()) is not None:
        return code
    for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
            break
        except subprocess.TimeoutExpired:
            continue
    return None


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect the signals that requested exit."""
    received: list[signal.Signals] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = {
        number: signal.signal(number, lambda which, _: received.append(signal.Signals(which))) for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
