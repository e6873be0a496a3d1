"""This checkout beside another version of chatd: the ratios of `run.py --before`.

The two runs of a pair follow each other directly. A machine that is slow for a while is
slow for both, so it changes their ratio (this / before) less than it changes each of
them. The version that runs first alternates from pair to pair.

The 95 % interval of the median assumes no distribution: its ends are order statistics.
The true median lies between the k-th smallest and the k-th largest of n ratios with the
probability 1 - 2 P(B < k), where B counts the heads in n tosses of a coin. We take the
largest k for which this is at least 95 %. With nine pairs that is the second smallest
and the second largest ratio, at 96 %. Fewer than six pairs have no such interval. For
them the interval is the whole range, and the table prints its lower confidence.

A run that failed, or lost, repeated or misplaced a delivery, takes no part. A figure
that lacks one of its pairs does not hold.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from report import (
    FAULTS,
    Column,
    Results,
    aligned,
    counted,
    field,
    in_instructions,
    micros,
    per_message,
    rate,
    shown,
    tables,
    values,
)

AT_MOST = 1.03  # a figure holds when its median is no larger
CLOSE = 0.05  # or when its interval contains 1 and ends no farther from it than this


@dataclasses.dataclass(frozen=True)
class Measure:
    """One figure: its ratios, and whether it holds."""

    name: str
    this: float  # medians over the pairs, in the unit of the name
    before: float
    ratios: Sequence[float]  # this / before, one for each pair
    median: float
    low: float
    high: float
    confidence: float  # of the interval from low to high
    holds: bool


def time_each(run: dict[str, Any]) -> float:
    """Return 1 / rate in microseconds: so, too, lower is better."""
    return 1e6 / rate(run) if run["count"] else math.nan


def time_per_message(run: dict[str, Any]) -> float:
    """Return the time for a message in two-person chats: two deliveries."""
    return 2 * time_each(run)


def columns(plan: dict[str, Any]) -> list[Column]:
    """List the figures that are compared. For each of them, lower is better."""
    deliveries = next(iter(tables(plan).values()))
    (idle,) = plan["idle"]
    chats = f"{plan['pairs']} chats of 2"
    return [
        *(
            (f"us a delivery, {head}", kind, case, micros)
            for head, kind, case, _ in deliveries
        ),
        ("us a lone message, a chat of 2", "lone", "lone", per_message),
        (f"us a message, {chats}", "pairs", "flat out", per_message),
        (f"us of time a message, {chats}", "pairs", "flat out", time_per_message),
        ("us a post", "posts", "posts", micros),
        ("us of time a post", "posts", "posts", time_each),
        ("us a handshake", "handshakes", "shake", micros),
        ("us of CPU a returning client", "storm", "storm", micros),
        (f"s until {plan['storm']:,} are back", "storm", "storm", field("seconds")),
        ("KB of an idle connection", "idle", str(idle), field("bytes", 1024)),
        ("ms of CPU to start", "handshakes", "start", field("cpu", 1e-3)),
        ("ms to start", "handshakes", "start", field("seconds", 1e-3)),
    ]


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the interval of the median: its ends, and its confidence."""
    ordered = sorted(ratios)
    count = len(ordered)

    def confidence(k: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(k)) / math.pow(2, count)

    good = [k for k in range(1, count // 2 + 1) if confidence(k) >= 0.95]
    k = max(good, default=1)
    return ordered[k - 1], ordered[-k], confidence(k)


def judge(name: str, sides: Sequence[tuple[float, float]], wanted: int) -> Measure:
    """Judge a figure by its pairs, each (this, before); so many are wanted."""
    ratios = [this / before for this, before in sides]
    median = statistics.median(ratios)
    low, high, confidence = interval(ratios)
    close = 1 - CLOSE <= low <= 1 <= high <= 1 + CLOSE
    return Measure(
        name=name,
        this=statistics.median(this for this, _ in sides),
        before=statistics.median(before for _, before in sides),
        ratios=ratios,
        median=median,
        low=low,
        high=high,
        confidence=confidence,
        holds=len(ratios) == wanted and (median <= AT_MOST or close),
    )


def measures(results: Results, kinds: Sequence[str]) -> dict[str, Measure | None]:
    """Judge every figure of these workloads; None if no pair has it on both sides."""
    found: dict[str, Measure | None] = {}
    rounds = results["plan"]["rounds"]
    sound = [run for run in results["runs"] if not any(map(run.get, FAULTS))]
    compared = columns(results["plan"])
    if counted(results):
        compared += in_instructions(compared, "thousand instructions ")
    for column in compared:
        name, kind, *_ = column
        if kind not in kinds:
            continue
        sides = []
        for turn in range(rounds):
            runs = [run for run in sound if run["round"] == turn]
            this, before = (
                values({"runs": runs}, peer, column) for peer in ("chatd", "before")
            )
            if this and before:
                # In a pair each side starts, and its clients return, several times.
                sides.append((statistics.median(this), statistics.median(before)))
        sides = [pair for pair in sides if all(0 < side < math.inf for side in pair)]
        found[name] = judge(name, sides, rounds) if sides else None
    return found


def text(found: dict[str, Measure | None]) -> str:
    """Write the table for a terminal."""
    head = ("before", "this", "ratio", "interval", "of", "min", "max", "pairs", "")
    table = [["this checkout / before", *head]]
    for name, measure in found.items():
        if measure is None:
            table.append([name, *("-" for _ in head[:-1]), "no figures"])
            continue
        ratios = measure.ratios
        table.append(
            [
                name,
                shown(measure.before),
                shown(measure.this),
                f"{measure.median:.3f}",
                f"{measure.low:.3f}-{measure.high:.3f}",
                f"{measure.confidence:.0%}",
                f"{min(ratios):.3f}",
                f"{max(ratios):.3f}",
                str(len(ratios)),
                "holds" if measure.holds else "does not hold",
            ]
        )
    return "\n".join(aligned(table))


def holds(found: dict[str, Measure | None]) -> bool:
    """Return whether every figure holds."""
    return all(measure is not None and measure.holds for measure in found.values())
