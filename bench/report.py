"""What a bench found: a table for people, JSON for the chart, latencies in between."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Literal

Better = Literal["more", "less"]

QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
# The upper ends of the histogram's steps, in milliseconds.
STEPS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
BAR: Final = 40


@dataclass(frozen=True)
class Figure:
    """One number, as it was on this machine."""

    name: str
    value: float | int | str
    unit: str = ""


@dataclass(frozen=True)
class Ratio:
    """One number over another of the same run: what can be compared between machines.

    `aim` is what it should be at least (`better` is "more") or at most ("less").
    """

    name: str
    value: float
    aim: float | None = None
    better: Better = "more"


@dataclass
class Report:
    """What one bench found. `failures` say what is wrong, whatever the figures are."""

    bench: str
    machine: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    taken: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    def add(self, name: str, value: float | int | str, unit: str = "") -> None:
        self.figures.append(Figure(name, value, unit))

    def ratio(
        self, name: str, rounds: Iterable[float], aim: float | None = None, better: Better = "more"
    ) -> None:
        """Add the median over the rounds."""
        self.ratios.append(Ratio(name, median(rounds), aim, better))

    def add_latencies(self, name: str, seconds: Iterable[float]) -> None:
        """Add the quantiles and the histogram of some latencies."""
        ordered = sorted(seconds)
        for label, value in quantiles(ordered).items():
            self.add(f"{name}, {label}", value * 1000, "ms")
        self.histogram |= {f"{name}, {step}": n for step, n in histogram(ordered).items()}

    def value(self, name: str) -> Any:
        """Return the figure or the ratio of that name."""
        return {row.name: row.value for row in self._rows()}[name]

    def _rows(self) -> list[Figure | Ratio]:
        return [*self.figures, *self.ratios]

    def lines(self) -> Iterator[str]:
        """Return the report as a table."""
        yield ", ".join(f"{name} {value}" for name, value in self.machine.items())
        width = max((len(row.name) for row in self._rows()), default=0)
        for figure in self.figures:
            yield f"{figure.name:<{width}}  {written(figure.value):>10} {figure.unit}".rstrip()
        for ratio in self.ratios:
            aim = ""
            if ratio.aim is not None:
                least = "at least" if ratio.better == "more" else "at most"
                aim = f"   aim: {least} {written(ratio.aim)}"
            yield f"{ratio.name:<{width}}  {ratio.value:>10.3f}{aim}"
        most = max(self.histogram.values(), default=0)
        for step, count in self.histogram.items():
            yield f"{step:<{width}}  {count:>10} {'#' * round(BAR * count / most)}".rstrip()
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"WRONG: {failure}" for failure in self.failures)


def written(value: float | int | str) -> str:
    """Return a figure with as many digits as it deserves."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def quantile(ordered: Sequence[float], part: float) -> float:
    """Return the smallest value that so large a part of the values does not exceed."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def quantiles(ordered: Sequence[float]) -> dict[str, float]:
    """Return the usual quantiles and the maximum, by their names."""
    found = {f"p{part * 100:g}": quantile(ordered, part) for part in QUANTILES}
    return {**found, "max": ordered[-1] if ordered else float("nan")}


def histogram(ordered: Sequence[float]) -> dict[str, int]:
    """Return how many of some ordered latencies, in seconds, fall into each step."""
    counts: dict[str, int] = {}
    below = 0
    for step in STEPS_MS:
        up_to = bisect_right(ordered, step / 1000)
        counts[f"up to {step} ms"] = up_to - below
        below = up_to
    counts[f"over {STEPS_MS[-1]} ms"] = len(ordered) - below
    filled = [place for place, count in enumerate(counts.values()) if count]
    if not filled:
        return {}
    return dict(list(counts.items())[filled[0] : filled[-1] + 1])
