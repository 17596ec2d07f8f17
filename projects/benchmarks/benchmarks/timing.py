"""Time several ways of doing the same work in turns, and compare them.

On a busy machine, two timings are comparable only if taken at the same time. So the ways, called sides, alternate: each
takes a turn in every round, and ratios are computed within a round.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class Clock:
    """Times each side's turns, synchronizing with the device before and after each.

    Attributes:
        seconds: one entry per turn, keyed by side.

    Args:
        device: the device doing the work.
        cpu_time: measure this process's CPU seconds, summed over its threads, instead of wall time. Threads waiting for
            each other may count as busy, so only compare single-threaded work.
    """

    def __init__(self, device: str = "cpu", *, cpu_time: bool = False):
        self.seconds: dict[str, list[float]] = {}
        self._on_gpu = torch.device(device).type == "cuda"
        self._read = time.process_time if cpu_time else time.perf_counter

    def time(self, side: str, run: Callable[[], object]) -> None:
        """Time a turn of a callable side."""
        start = self._now()
        run()
        self._add(side, start)

    def watch(self, side: str, items: Iterable[Item]) -> Iterator[Item]:
        """Time a turn of a side that consumes items; it ends when the side asks for one past the last."""
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
        settings: description of how it differs from the others.
        shape: of the image batch it worked on.
    """

    settings: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measurements of the same work done in several ways.

    Attributes:
        task: the work.
        unit: of the rates.
        first: the side the others are compared with.
        sides: by name.
        rates: per side, one entry per round.
        work: amount a side does per turn; dividing it by the rate gives seconds.
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
        """Build a comparison from a clock's timings."""
        rates = {side: [work / seconds for seconds in clock.seconds[side]] for side in sides}
        return cls(task=task, unit=unit, first=first, sides=sides, rates=rates, work=work)

    def ratios(self, side: str) -> list[float]:
        """Speed of the first side relative to `side`, per round."""
        return [one / other for one, other in zip(self.rates[self.first], self.rates[side], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values: every rate, plus median, min and max of rates and ratios."""
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
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
