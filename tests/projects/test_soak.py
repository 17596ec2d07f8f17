"""The soak's accidents and its report; the whole of it takes twenty minutes (`make soak`)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "projects" / "soak"

SLEEP = "import time; time.sleep(60)"
FORK = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "{SLEEP} # spawn_main"])
subprocess.Popen([sys.executable, "-c", "{SLEEP}"])
print("ready", flush=True)
{SLEEP}
"""


@pytest.fixture
def family():
    """A process with two children, one of which looks like a rank."""
    process = subprocess.Popen([sys.executable, "-c", FORK], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_rank_is_found_among_the_children_and_killed(project, family, tmp_path):
    accidents = project["accidents"]
    assert len(accidents.children(family.pid)) == 2
    (rank,) = accidents.ranks(family.pid)
    assert accidents.kill_rank(family, tmp_path, random.Random(0))
    end = time.monotonic() + 20
    while accidents.ranks(family.pid) and time.monotonic() < end:  # a zombie has no command line
        time.sleep(0.01)
    assert accidents.ranks(family.pid) == [] and Path(f"/proc/{rank}").exists()
    assert not accidents.kill_worker(family, tmp_path, random.Random(0))  # the rank has none
    assert accidents.children(2**22 + 1) == []


def row(accident: str, code: int) -> dict:
    return {"accident": accident, "after": 3, "seconds": 9, "exit": code, "last line": f"{accident} …"}


def test_the_report_says_what_happened_and_whether_all_is_equal(project):
    report, plan = project["report"], project["carry_out"].Plan(Path("out"), ("a.json", "b.json"), 60, 2, 1)
    results = {
        "data": plan.data,
        "seconds": {"undisturbed": 40, "all": 200},
        "rows": [row("SIGTERM", 75), row("none", 0)],
        "tensors": 132,
        "different": [],
        "reported": {"model_final.pth": 1.234, "model_best.pth": 2.0},
        "detections": 300,
        "same_detections": True,
        "evaluated": {"model_final.pth": 1.23, "model_best.pth": 2.0},
    }
    text = report.report(plan, results)
    assert "132 tensors: all equal to the last bit." in text
    assert any(line.split("|")[2:5] == [" SIGTERM    ", " 3         ", " 75          "] for line in text.splitlines())
    assert any("model_final.pth" in line and line.count("1.23") == 2 for line in text.splitlines())
    assert "The 300 detections of model_final.pth" in text and "one of its own: the same." in text
    assert "NOT the same" in report.report(plan, {**results, "same_detections": False})
    assert "2 differ (a, b …)" in report.report(plan, {**results, "different": ["a", "b"]})


def test_a_folder_that_exists_stops(run, tmp_path, capsys):
    assert run.main(["--output", str(tmp_path)]) == 2
    assert "Name a new folder" in capsys.readouterr().err
