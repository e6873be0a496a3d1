"""Is this machine quiet? Figures for publication need one that does nothing else.

Another program that runs takes CPU time, caches and turns on the cores from the server
and from the load. The figures then tell about that program, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 0.5  # busy cores; a machine below it is quiet
LOOK_SECONDS = 5
PATIENCE_SECONDS = 180


def read_stat() -> str:
    """Read the kernel's account of what the cores did since the machine started."""
    return Path("/proc/stat").read_text()


def worked(stat: str) -> float:
    """Return the seconds of work of all cores together: neither idle nor iowait."""
    fields = stat.partition("\n")[0].split()[1:9]  # guest time is in user time already
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_cores(
    read: Callable[[], str] = read_stat, sleep: Callable[[float], None] = time.sleep
) -> float:
    """Return how many cores work, on average over the next LOOK_SECONDS.

    A load average would not do: it covers minutes, so our own last round is in it.
    """
    before = worked(read())
    sleep(LOOK_SECONDS)
    return (worked(read()) - before) / LOOK_SECONDS


def wait(
    read: Callable[[], str] = read_stat, sleep: Callable[[float], None] = time.sleep
) -> float:
    """Wait until the machine is quiet, PATIENCE_SECONDS at most; return its load."""
    busy = busy_cores(read, sleep)
    for _ in range(0, PATIENCE_SECONDS, LOOK_SECONDS):
        if busy < LIMIT:
            return busy
        print(f"{busy:.1f} cores are busy; waiting for less than {LIMIT}", flush=True)
        busy = busy_cores(read, sleep)
    if busy >= LIMIT:
        print(f"{busy:.1f} cores are still busy; measuring all the same", flush=True)
    return busy


def refusal(results: dict[str, Any]) -> str:
    """Say why the figures cannot be published, and what to do; empty if they can."""
    rounds, loads = results["plan"]["rounds"], results.get("loads", [])
    advice = "stop what else runs, and measure again: python bench/run.py --full"
    if len(loads) < rounds:
        return f"not every round has a record of how busy the machine was; {advice}"
    for turn, busy in enumerate(loads[:rounds]):
        if busy >= LIMIT:
            return (
                f"{busy:.1f} cores were busy with something else when round {turn + 1} "
                f"began, and {LIMIT} are too many; {advice}"
            )
    return ""
