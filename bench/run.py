#!/usr/bin/env python3
"""Measure chatd beside what one would otherwise pick, on this machine, in one run.

    python bench/run.py --full      about twenty minutes; writes bench/results.json
    python bench/run.py --quick     about a minute; what CI runs, figures mean little
    python bench/run.py --full --only fanout,idle --peers chatd,go
    python bench/run.py --report bench/results.json     docs/speed.md, chart.svg

How. Server on core 0, load (load.c, one epoll loop in C) on core 1. Rounds are
interleaved (A B C A B C), each with a fresh server and a fresh database on the disk of
this checkout; medians and the range over the rounds are printed. CPU time is the server
process's, all its threads and children, system calls included, by the kernel's clock of
each process; what the kernel does on the load's side is not in it. Every delivery is
checked for its room, its order and its number: what a peer loses is printed. The JSON
has every round's raw figures, and is written after each.

The peers (peer.py, peers/) do the least that a workload needs, set up as their
documentation advises for speed: no compression, TCP_NODELAY, a backlog of 4,096. chatd
runs with its rates off (peer.UNLIMITED), else it would refuse this load.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peer as peers
import report
import workload
from peer import HERE, PEERS, Missing


def machine() -> dict[str, Any]:
    """Say what this ran on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
    }


def commit() -> str:
    """Say which version of the checkout this is, if it is one."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip()


def build(names: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Build the peers: their commands, and versions. One that is missing is told."""
    commands, versions = {}, {}
    for name in names:
        try:
            commands[name], versions[name] = PEERS[name].build()
            print(f"{PEERS[name].label}: {versions[name]}")
        except Missing as why:
            print(f"{PEERS[name].label}: left out: {why}")
    return commands, versions


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results whole, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def measure(
    plan: workload.Plan, names: list[str], only: list[str], path: Path
) -> dict[str, Any]:
    """Run it all, round by round; return the results."""
    workload.build_load()
    commands, versions = build(names)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "versions": versions,
        "runs": [],
    }
    begin = time.monotonic()
    for turn in range(plan.rounds):
        for kind in only:
            if turn and kind in workload.ONCE:
                continue
            took = []
            for name, command in commands.items():
                started = time.monotonic()
                run = {"round": turn, "workload": kind, "peer": name}
                cases = workload.WORKLOADS[kind](PEERS[name], command, plan)
                try:
                    for case, result in cases:
                        results["runs"].append({**run, "case": case, **result})
                except (workload.Broken, Missing, OSError) as why:
                    results["runs"].append({**run, "case": "", "error": str(why)})
                    print(f"{kind} {name}: broken: {why}")
                save(results, path)
                took.append(f"{name} {time.monotonic() - started:.0f}")
            spent = time.monotonic() - begin
            print(f"{spent:5.0f} s: round {turn + 1}, {kind}: {', '.join(took)}")
    results["took_seconds"] = round(time.monotonic() - begin)
    save(results, path)
    return results


def words(known: dict[str, Any], text: str) -> list[str]:
    """Read a list of names, in the order of the tables."""
    asked = text.split(",") if text else list(known)
    unknown = set(asked) - set(known)
    if unknown:
        raise SystemExit(
            f"run.py: no {', '.join(unknown)}; there are {', '.join(known)}"
        )
    return [name for name in known if name in asked]


def main() -> None:
    """Read the command line and obey it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="what docs/speed.md shows")
    size.add_argument("--quick", action="store_true", help="what CI runs")
    parser.add_argument("--only", default="", help="these workloads, with commas")
    parser.add_argument("--peers", default="", help="these peers, with commas")
    parser.add_argument("--rounds", type=int, help="instead of the plan's")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="write docs/speed.md, the chart"
    )
    options = parser.parse_args()
    if options.report:
        report.publish(json.loads(options.report.read_text()))
        return
    plan = workload.FULL if options.full else workload.QUICK
    if options.rounds:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    only = words(workload.WORKLOADS, options.only)
    names = words(PEERS, options.peers)
    partly = bool(options.only or options.peers or not options.full)
    path = options.output or (
        peers.BUILD / "results.json" if partly else HERE / "results.json"
    )
    peers.BUILD.mkdir(exist_ok=True)
    peers.raise_file_limit()
    results = measure(plan, names, only, path)
    print(report.text(results))
    print(f"every round's figures: {path}")


if __name__ == "__main__":
    main()
