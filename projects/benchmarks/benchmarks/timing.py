"""Seconds of several ways to do the same work, taken in turns, and what follows from them.

On a machine that does other things too, two timings are comparable only if they were taken at the same time. So the
ways, called sides, alternate: each has its turn in every round, and a ratio is formed within a round.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class Clock:
    """Takes the seconds of each side's turns; the device has finished its work before and after each.

    Attributes:
        seconds: one entry a turn, by the side's name.

    Args:
        device: that does the work.
        cpu_time: take the seconds that this process had a core for, of all its threads together, instead of those that
            passed. Threads that wait for each other may count as busy: compare what runs in one thread.
    """

    def __init__(self, device: str = "cpu", *, cpu_time: bool = False):
        self.seconds: dict[str, list[float]] = {}
        self._on_gpu = torch.device(device).type == "cuda"
        self._read = time.process_time if cpu_time else time.perf_counter

    def time(self, side: str, run: Callable[[], object]) -> None:
        """A turn of a side that can be called."""
        start = self._now()
        run()
        self._add(side, start)

    def watch(self, side: str, items: Iterable[Item]) -> Iterator[Item]:
        """A turn of a side that asks for items: it lasts until it wants one more than there are."""
        start = self._now()
        yield from items
        self._add(side, start)

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._read()

    def _add(self, side: str, start: float) -> None:
        self.seconds.setdefault(side, []).append(self._now() - start)


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        settings: what tells it from the others, in words.
        shape: of the images in a batch that it worked on.
    """

    settings: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured of the same work done in several ways.

    Attributes:
        task: the work.
        unit: of the rates.
        first: the side that the others are compared with.
        sides: by name.
        rates: of each side, one entry a round.
        work: what a side did in a turn; divided by the rate, it gives the seconds.
    """

    task: str
    unit: str
    first: str
    sides: Mapping[str, Side]
    rates: Mapping[str, list[float]]
    work: float

    @classmethod
    def of(
        cls, clock: Clock, *, task: str, unit: str, first: str, sides: Mapping[str, Side], work: float
    ) -> "Comparison":
        """From the seconds of a clock."""
        rates = {side: [work / seconds for seconds in clock.seconds[side]] for side in sides}
        return cls(task=task, unit=unit, first=first, sides=sides, rates=rates, work=work)

    def ratios(self, side: str) -> list[float]:
        """How many times as fast as `side` the first one was, in each round."""
        return [one / other for one, other in zip(self.rates[self.first], self.rates[side], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: every rate, and median, smallest and largest of rates and ratios."""
        return {
            "task": self.task,
            "unit": self.unit,
            "first": self.first,
            "work": self.work,
            "sides": [
                {
                    "name": name,
                    "settings": side.settings,
                    "shape": list(side.shape),
                    "rates": self.rates[name],
                    "rate": spread(self.rates[name]),
                    "first_is_faster": spread(self.ratios(name)),
                }
                for name, side in self.sides.items()
            ],
        }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
