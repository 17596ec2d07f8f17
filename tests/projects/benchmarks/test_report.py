"""The page and the JSON file."""

import json

from benchmarks.report import describe_setup, format_page, to_dict, write
from benchmarks.timing import Comparison, Side


def results() -> dict:
    sides = {"ours": Side("fast", (8, 3, 32, 32)), "theirs": Side("slow", (8, 3, 32, 32))}
    rates = {"ours": [100.0, 120.0], "theirs": [50.0, 40.0]}
    shared = {"first": "ours", "sides": sides, "rates": rates, "work": 8.0}
    comparisons = [
        Comparison(task="a step", unit="images/s", **shared),
        Comparison(task="loading", unit="images/s per core", **shared),
    ]
    return to_dict(describe_setup(cpu_time=True), comparisons, ["what needs a GPU"])


def test_a_row_for_each_side_with_its_ratio():
    page = format_page(results())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "| theirs" in line]
    assert rows == 2 * [["", "theirs", "45", "2.50", "2.00 … 3.00"]]
    assert "| a step " in page and "| loading " in page and page.count("- ours: fast") == 2
    assert page.index("images/s |") < page.index("images/s per core |")
    assert page.endswith("Skipped: what needs a GPU") and "in CPU seconds" in page


def test_the_file_holds_what_the_page_shows(tmp_path):
    write(tmp_path / "new" / "results.json", results())
    read = json.loads((tmp_path / "new" / "results.json").read_text())
    assert format_page(read).splitlines()[1:] == format_page(results()).splitlines()[1:]
    assert read["comparisons"][0]["sides"][1]["first_is_faster"]["max"] == 3
    needed = {"date", "versions", "cpu", "cores", "threads", "seconds", "load", "gpu", "cuda"}
    assert set(read["setup"]) == needed and "torch" in read["setup"]["versions"]
