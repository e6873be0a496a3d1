#!/usr/bin/env python3
"""Measure chatd beside the servers that you might choose instead, in one run.

    python bench/run.py --full      takes about forty minutes; writes results.json
    python bench/run.py --quick     takes two minutes; its figures mean little
    python bench/run.py --full --only fanout,idle --peers chatd,go
    python bench/run.py --report bench/results.json     writes docs/speed.md, its chart,
                                                        and docs/capacity.md
    python bench/run.py --before CHECKOUT   measures beside another version of chatd

How it measures. The server runs on core 0, the load (load.c, one epoll loop in C) on
core 1. Each workload of a round runs with every peer in turn, and the next round goes
through the peers backwards: A B C, C B A. Each run has a fresh server and a fresh
database, on the disk of this checkout. Medians and the range over the rounds are
printed. CPU time is that of the server's process, its threads and its children, system
calls included, by the kernel's clock of each process. Work that the kernel does for the
load is not in it. Every delivery is checked for its room, its order and its number, and
what a peer loses is printed. The JSON file has the raw figures of every round, and is
written after each run.

Where perf_event_open(2) works, load.c also counts the instructions of the server in
user space. They hardly depend on what else runs, so they show a change that the noise
of CPU time hides.

--full and --before wait before each round until less than half a core is busy, for
three minutes at most, and record how busy the machine was (quiet.py). Figures of a busy
machine are not published: --full leaves results.json as it was, and --report refuses
them. All runs write .build/results.json first, or the file that --output names.

The peers (peer.py, peers/) do the least that a workload needs. They are set up as their
documentation advises for speed: no compression, TCP_NODELAY, a backlog of 4,096. chatd
runs without its rate limits (peer.UNLIMITED), because they would refuse this load.

--before measures this checkout beside the chatd.py in another folder, with the same
Python and the same options, in nine pairs of runs (--pairs), and prints the ratios of
the pairs (this / before). ratios.py says how they are judged. A figure holds when the
median ratio is at most 1.03, or when the interval contains 1 and lies within 0.95 and
1.05. The exit status is 1 when a figure does not hold.
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

import capacity
import peer as peers
import quiet
import ratios
import report
import workload
from peer import HERE, PEERS, Missing, Peer


def machine() -> dict[str, Any]:
    """Describe this machine."""
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
    }


def commit() -> str:
    """Return the commit of this checkout; empty without a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip()


Ready = list[tuple[Peer, list[str]]]  # peers that are built, and their commands


def build(sides: list[Peer]) -> tuple[Ready, dict[str, str]]:
    """Build the peers, and return them with their versions. Print what is missing."""
    ready, versions = [], {}
    for side in sides:
        try:
            command, versions[side.name] = side.build()
            ready.append((side, command))
            print(f"{side.label}: {versions[side.name]}")
        except Missing as why:
            print(f"{side.label}: left out: {why}")
    return ready, versions


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results in one step: a crash leaves the file as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def measure(
    plan: workload.Plan, sides: list[Peer], only: list[str], path: Path, *, wait: bool
) -> dict[str, Any]:
    """Run the workloads round by round; return the results.

    With `wait`, each round waits for a quiet machine, and "loads" has its busy cores.
    """
    workload.build_load()
    ready, versions = build(sides)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "versions": versions,
        "loads": [],
        "runs": [],
    }
    begin = time.monotonic()
    for turn in range(plan.rounds):
        if wait:
            busy = quiet.wait()
            results["loads"].append(busy)
            print(f"round {turn + 1} begins; {busy:.2f} cores are busy", flush=True)
        for kind in only:
            if turn and kind in plan.once:
                continue
            took = []
            for side, command in reversed(ready) if turn % 2 else ready:
                started = time.monotonic()
                name = side.name
                run = {"round": turn, "workload": kind, "peer": name}
                cases = workload.WORKLOADS[kind](side, command, plan)
                try:
                    for case, result in cases:
                        results["runs"].append({**run, "case": case, **result})
                except (workload.Broken, Missing, OSError) as why:
                    results["runs"].append({**run, "case": "", "error": str(why)})
                    print(f"{kind} {name}: failed: {why}")
                save(results, path)
                took.append(f"{name} {time.monotonic() - started:.0f}")
            spent = time.monotonic() - begin
            line = f"{spent:5.0f} s: round {turn + 1}, {kind}: {', '.join(took)}"
            print(line, flush=True)  # a log file shows how far it is
    results["took_seconds"] = round(time.monotonic() - begin)
    save(results, path)
    return results


def words(known: dict[str, Any], text: str) -> list[str]:
    """Read a list of names with commas; return them in the order of `known`."""
    asked = text.split(",") if text else list(known)
    unknown = set(asked) - set(known)
    if unknown:
        raise SystemExit(
            f"run.py: unknown: {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return [name for name in known if name in asked]


def compare(plan: workload.Plan, checkout: Path, only: str, path: Path) -> bool:
    """Measure beside another checkout, print the ratios; return whether all hold."""
    compared = {kind for _, kind, *_ in ratios.columns(dataclasses.asdict(plan))}
    known = {kind: run for kind, run in workload.WORKLOADS.items() if kind in compared}
    kinds = words(known, only)
    sides = [peers.earlier_chatd(checkout), PEERS["chatd"]]
    results = measure(plan, sides, kinds, path, wait=True)
    found = ratios.measures(results, kinds)
    results["measures"] = [dataclasses.asdict(each) for each in found.values() if each]
    save(results, path)
    told = [
        report.busiest(results),
        *report.uncounted(results),
        *report.faults(results),
    ]
    print("", ratios.text(found), "", *told, sep="\n")
    return ratios.holds(found)


def release(results: dict[str, Any]) -> bool:
    """Write results.json, if the machine was quiet; return whether it was."""
    published = HERE / "results.json"
    if why := quiet.refusal(results):
        print(f"{published} stays as it was: {why}")
        return False
    save(results, published)
    print(f"written: {published}")
    return True


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full", action="store_true", help="the figures of docs/speed.md"
    )
    size.add_argument("--quick", action="store_true", help="a short run, for CI")
    size.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="compare with its chatd.py"
    )
    parser.add_argument("--only", default="", help="only these workloads, with commas")
    parser.add_argument("--peers", default="", help="only these peers, with commas")
    parser.add_argument(
        *("--rounds", "--pairs"), type=int, metavar="N", help="how often all is run"
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="write the figures of docs/"
    )
    options = parser.parse_args()
    if options.report:
        results = report.whole_rounds(report.read(options.report))
        if why := quiet.refusal(results):
            raise SystemExit(f"run.py: {options.report} is not published: {why}")
        report.publish(results)
        try:
            capacity.publish(results)
        except capacity.Missing as why:
            raise SystemExit(
                f"run.py: docs/capacity.md stays as it was: {why}"
            ) from None
        return
    plan = workload.FULL if options.full else workload.QUICK
    if options.before:
        plan = workload.BESIDE
        if options.peers:
            parser.error("--before has its own two peers")
        if not (options.before / "chatd.py").is_file():
            parser.error(f"--before {options.before}: there is no chatd.py")
    if options.rounds:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    path = options.output or peers.BUILD / "results.json"
    peers.BUILD.mkdir(exist_ok=True)
    peers.raise_file_limit()
    good = True
    if options.before:
        good = compare(plan, options.before, options.only, path)
    else:
        only = words(workload.WORKLOADS, options.only)
        sides = [PEERS[name] for name in words(PEERS, options.peers)]
        results = measure(plan, sides, only, path, wait=options.full)
        print(report.text(results))
        if {"costs", "community"} & set(only):
            print(capacity.summary(results))
        if options.full and not (options.only or options.peers or options.output):
            good = release(results)
    print(f"the figures of every round: {path}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
