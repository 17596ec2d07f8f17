"""Turns, their seconds, and the ratios that follow."""

import time

import pytest
import torch

from benchmarks.timing import Clock, Comparison, Side, spread


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one: nothing passes but what a test lets pass."""
    present = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: present[0])
    return present


def test_a_turn_that_is_called(now):
    clock = Clock()

    def run():
        now[0] += 3

    clock.time("one", run)
    now[0] += 10  # between turns
    clock.time("one", run)
    clock.time("other", lambda: None)
    assert clock.seconds == {"one": [3, 3], "other": [0]}


def test_a_turn_that_asks_for_items_lasts_until_it_wants_one_more(now):
    clock = Clock()

    def items():
        yield from clock.watch("host", [1, 2])
        now[0] += 50  # another side's turn, inside of the host's request for its next item
        yield from clock.watch("host", [3])

    seen = []
    for item in items():
        seen.append(item)
        now[0] += item  # what the host does with it
    assert seen == [1, 2, 3] and clock.seconds == {"host": [3, 3]}


def test_cpu_seconds_are_those_of_work():
    clock = Clock(cpu_time=True)
    clock.time("sleeps", lambda: time.sleep(0.2))

    def work():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    clock.time("works", work)
    assert clock.seconds["sleeps"][0] < 0.1 <= clock.seconds["works"][0]


@pytest.mark.gpu
def test_a_turn_ends_when_the_gpu_has_done_its_work():
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run():
        begin.record()
        torch.cuda._sleep(200_000_000)
        end.record()

    clock = Clock("cuda")
    clock.time("one", run)
    assert clock.seconds["one"][0] >= 0.99e-3 * begin.elapsed_time(end) > 0.01


def comparison() -> Comparison:
    clock = Clock()
    clock.seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 8.0, 6.0]}
    sides = {name: Side(f"settings of {name}", (8, 3, 32, 32)) for name in clock.seconds}
    return Comparison.of(clock, task="a task", unit="images/s", first="ours", sides=sides, work=24)


def test_a_ratio_is_formed_within_a_round():
    measured = comparison()
    assert measured.rates == {"ours": [24, 12, 6], "theirs": [12, 3, 4]}
    assert measured.ratios("theirs") == [2, 4, 1.5] and measured.ratios("ours") == [1, 1, 1]


def test_plain_values_hold_all_of_it():
    ours, theirs = comparison().to_dict()["sides"]
    assert theirs["first_is_faster"] == {"median": 2, "min": 1.5, "max": 4}
    assert theirs["rate"] == {"median": 4, "min": 3, "max": 12} and theirs["rates"] == [12, 3, 4]
    assert (ours["name"], ours["settings"], ours["shape"]) == ("ours", "settings of ours", [8, 3, 32, 32])


def test_the_median_of_an_even_number_lies_between():
    assert spread([4.0, 1.0, 3.0, 9.0]) == {"median": 3.5, "min": 1.0, "max": 9.0}
