"""The report over everything that needs a GPU, with stand-ins for its parts, which need none."""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part, run_parts
from benchmarks.report import describe_setup, to_dict, write
from benchmarks.timing import Clock, Comparison, Side
from resnet_backbone.errors import InputError, Interrupted

COPY = "import shutil, sys; shutil.copy({file!r}, sys.argv[-1]); print('copied'); sys.exit({code})"


@pytest.fixture
def parts(tmp_path) -> dict[str, Part]:
    clock = Clock()
    clock.seconds = {"ours": [1.0, 2.0], "theirs": [2.0, 6.0]}
    sides = {name: Side(f"settings of {name}", (8, 3, 32, 32)) for name in clock.seconds}
    comparison = Comparison.of(clock, task="a task", unit="images/s", first="ours", sides=sides, work=24)
    file = tmp_path / "measured.json"
    write(file, to_dict(describe_setup(cpu_time=False), [comparison], ["what was left out"]))
    return {
        "good": Part("a table", ("-c", COPY.format(file=str(file), code=0)), 60),
        "bad": Part("a table, then an error", ("-c", COPY.format(file=str(file), code=3)), 60),
        "tests": Part("tests", ("-c", "print('7 passed in 1 s')"), 60, measures=False),
        "slow": Part("no end", ("-c", "import time; print('begun', flush=True); time.sleep(600)"), 2, measures=False),
    }


def run(parts: dict[str, Part], names: str, output: Path) -> tuple[bool, str, list[str]]:
    lines: list[str] = []
    good = run_parts(names.split(), output, report=lines.append, parts=parts)
    return good, (output / "report.md").read_text(), lines


def test_every_part_is_in_the_report(parts, tmp_path):
    good, page, lines = run(parts, "tests good", tmp_path / "gpu")
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page.splitlines()]
    assert good and lines[0] == "tests (1 of 2): tests, at most 60 s" and "good: passed after" in lines[-1]
    assert "## good: a table" in page and "settings of theirs" in page and "Skipped: what was left out" in page
    assert ["theirs", "8", "2.50", "2.00 … 3.00"] in cells  # rates 24 and 12, 12 and 4, by hand
    assert "7 passed in 1 s" in page and "copied" not in page
    assert "copied" in (tmp_path / "gpu" / "good.log").read_text()


def test_what_a_part_measured_before_it_failed_stays_and_the_others_run(parts, tmp_path):
    good, page, _ = run(parts, "bad slow tests", tmp_path / "gpu")
    assert not good
    for words in ("failed with exit code 3", "stopped, longer than 2 s", "| passed", "settings of theirs", "begun"):
        assert words in page


def test_a_later_call_adds_to_it_and_replaces(parts, tmp_path):
    output = tmp_path / "gpu"
    run(parts, "bad good", output)
    parts["bad"] = parts["good"]
    good, page, _ = run(parts, "bad tests", output)
    assert good and "failed" not in page
    assert [line.split(":")[0] for line in page.splitlines() if line.startswith("## ")] == [
        *("## good", "## bad", "## tests")
    ]


def test_an_unknown_part(parts, tmp_path):
    with pytest.raises(InputError, match="there is no part speed; expected good, bad, tests, slow"):
        run(parts, "good speed", tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_signal_ends_the_part_and_what_it_started(parts, tmp_path, monkeypatch, deaf):
    """Deaf: it ignores Ctrl-C, and is killed."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    note = tmp_path / "pid"
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN);" if deaf else ""
    child = f"import signal, time; {ignore} time.sleep(600)"
    script = (
        f"import signal, subprocess, sys, time; {ignore} p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(note)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    parts["slow"] = Part("no end", ("-c", script), 60, measures=False)

    def interrupt():
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
        time.sleep(0.3)  # the child has its handler
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match=r"SIGTERM: slow was stopped; .*report\.md holds what there is"):
        run(parts, "good slow tests", tmp_path / "gpu")
    page = (tmp_path / "gpu" / "report.md").read_text()
    assert "stopped by SIGTERM" in page and "settings of theirs" in page and "## tests" not in page
    for _ in range(200):
        if not Path(f"/proc/{note.read_text()}").exists() or _is_zombie(note.read_text()):
            break
        time.sleep(0.01)
    else:
        pytest.fail("the process that the part started lives on")


def _is_zombie(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_parts_are_commands_that_the_tools_know(monkeypatch, load_script):
    """Words that a tool does not know would be found out on the GPU only."""
    benchmark = load_script(gpu.ROOT / "tools" / "benchmark.py")
    for name, part in PARTS.items():
        if part.measures:
            assert part.words[0] == "tools/benchmark.py", name
            assert benchmark.parse([*part.words[1:], "--json", "x.json"]).json == Path("x.json")
    assert sum(part.seconds for part in PARTS.values()) < 1500


def test_without_a_gpu(load_script, capsys, monkeypatch):
    tool = load_script(gpu.ROOT / "tools" / "check_gpu.py")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tool.main([]) == 2
    assert capsys.readouterr().err.startswith("error: torch finds no GPU here")


def test_exit_codes(parts, tmp_path, load_script, monkeypatch, capsys):
    tool = load_script(gpu.ROOT / "tools" / "check_gpu.py")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tool, "run_parts", functools.partial(run_parts, parts=parts))
    for names, code in ((["good"], 0), (["bad"], 1), (["nothing"], 2)):
        assert tool.main(["--parts", *names, "--output", str(tmp_path / "gpu")]) == code
    captured = capsys.readouterr()
    assert "## bad: a table, then an error" in captured.out and "there is no part nothing" in captured.err
    assert json.loads((tmp_path / "gpu" / "bad.json").read_text())["ending"] == "failed with exit code 3"
