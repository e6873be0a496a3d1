#!/usr/bin/env python3
"""Run the proofs and print what they found.

    python torture/run.py                      the quick form, as CI runs it
    python torture/run.py --full --json FILE   the full form, and its figures as JSON
    python torture/run.py --report FILE        write those figures into docs/proofs.md
    python torture/run.py --only kill9 --seed 7

A proof is a module beside this file. Its docstring states the claim. Its function
`prove(full: bool) -> Figures` tries to break the claim, and raises AssertionError with
a sentence if it can. Each proof runs in a process of its own. The exit status is 1 if
any claim is false.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/proofs.md"
BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"

# In the order of the table in docs/proofs.md. The proofs in TOGETHER mostly wait, so
# they run at the same time. Each other proof has the machine to itself.
PROOFS = (
    "conformance",
    "attacks",
    "fuzz",
    "kill9",
    "power_cut",
    "disk",
    "slow",
    "storm",
    "flood",
    "stop",
    "revocation",
    "erasure",
    "firefox",
    "secrecy",  # the last: it searches the logs and answers of all the others
)
FULL_ONLY = frozenset(("firefox",))  # or with --only
TOGETHER = frozenset(
    ("conformance", "kill9", "power_cut", "disk", "revocation", "erasure")
)


@dataclasses.dataclass
class Result:
    """The result of one proof. error is empty if the claim holds."""

    name: str
    seconds: float
    claim: str
    figure: str
    numbers: dict[str, Any]
    error: str = ""


def run_one(name: str, full: bool) -> Result:
    """Run a proof in this process."""
    started = time.monotonic()
    module = importlib.import_module(name)
    claim, figure, numbers, error = (module.__doc__ or name).split("\n")[0], "", {}, ""
    try:
        found = module.prove(full)
        claim, figure, numbers = found.claim, found.figure, found.numbers
    except AssertionError as false:
        error = f"{false}" or traceback.format_exc()
        traceback.print_exc()
    except Exception as broken:
        error = f"the proof itself failed: {type(broken).__name__}: {broken}"
        traceback.print_exc()
    return Result(name, time.monotonic() - started, claim, figure, numbers, error)


def run_all(names: list[str], full: bool, jobs: int) -> Iterator[Result]:
    """Run proofs, each in a process of its own; yield each result as its proof ends."""
    context = multiprocessing.get_context("spawn")
    together = [name for name in names if name in TOGETHER and jobs > 1]
    groups = [together, *([name] for name in names if name not in together)]
    for group in groups:
        if not group:
            continue
        with concurrent.futures.ProcessPoolExecutor(
            min(jobs, len(group)), mp_context=context, max_tasks_per_child=1
        ) as pool:
            futures = {pool.submit(run_one, name, full): name for name in group}
            for future in concurrent.futures.as_completed(futures):
                try:
                    yield future.result()
                except concurrent.futures.process.BrokenProcessPool as broken:
                    yield Result(
                        futures[future], 0, futures[future], "", {}, f"{broken}"
                    )


def copy_program(folder: Path) -> str:
    """Copy chatd, so that an edit during the run does not change what is tested."""
    for name in ("chatd.py", "schema.sql", "web"):
        source, target = HERE.parent / name, folder / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return str(folder / "chatd.py")


def describe_machine() -> dict[str, Any]:
    """The machine that this runs on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30),
        "kernel": platform.release(),
    }


def describe_versions() -> dict[str, str]:
    """The versions of chatd and of what is under it."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in ("chatd", "trio", "trio-websocket", "wsproto", "h11"):
        found[name] = importlib.metadata.version(name)
    return found


def table(report: dict[str, Any]) -> str:
    """Make the table of docs/proofs.md from a report."""
    machine, versions = report["machine"], report["versions"]
    lines = ["| claim | what was found |", "|---|---|"]
    for proof in report["proofs"]:
        figure = (
            proof["figure"] if not proof["error"] else f"**false**: {proof['error']}"
        )
        cells = (proof["claim"], figure)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += [
        "",
        f"The {report['form']} form, {report['date']}, in "
        f"{report['seconds'] / 60:.0f} minutes on {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"Python {versions['python']}, SQLite {versions['sqlite']}, "
        f"trio {versions['trio']}.",
    ]
    return "\n".join(lines)


def write_report(path: Path) -> None:
    """Write a report's table between the markers in docs/proofs.md."""
    text = PAGE.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{PAGE} has no {BEGIN} ... {END}")
    report = json.loads(path.read_text("utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}", "utf-8")


def main() -> int:
    """Run the command line. The exit status is 1 if a claim is false."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="as CI does (the default)")
    form.add_argument("--full", action="store_true", help="longer, larger, more often")
    add("--only", nargs="+", metavar="NAME", choices=PROOFS, help=", ".join(PROOFS))
    add("--seed", type=int, help="repeat the random numbers of an earlier run")
    add(
        "--jobs",
        type=int,
        default=2,
        help="how many run at a time, of those that wait (2)",
    )
    add("--json", type=Path, metavar="FILE", help="write the results to a file")
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="write such a file into docs/proofs.md",
    )
    options = parser.parse_args()
    if options.report is not None:
        write_report(options.report)
        return 0
    seed = (
        options.seed
        if options.seed is not None
        else random.SystemRandom().getrandbits(32)
    )
    names = [name for name in PROOFS if (HERE / f"{name}.py").exists()]
    if options.only:
        names = [name for name in names if name in options.only]
    elif not options.full:
        names = [name for name in names if name not in FULL_ONLY]
    kept = Path(tempfile.mkdtemp(prefix="torture-evidence-"))
    os.environ["CHATD_TORTURE_SEED"] = str(seed)
    os.environ["CHATD_TORTURE_EVIDENCE"] = str(kept)
    os.environ["CHATD_TORTURE_PROGRAM"] = copy_program(kept / "program")
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    results = []
    for result in run_all(names, options.full, options.jobs):
        results.append(result)
        verdict = "FALSE" if result.error else "holds"
        print(f"{result.name:12} {verdict} {result.seconds:6.1f} s  {result.claim}")
        print(f"{'':12} {result.error or result.figure}", flush=True)
    results.sort(key=lambda result: PROOFS.index(result.name))
    seconds = time.monotonic() - started
    failed = [result.name for result in results if result.error]
    print(
        f"{len(results) - len(failed)} of {len(results)} claims hold, {seconds:.0f} s"
    )
    if options.json is not None:
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "form": "full" if options.full else "quick",
            "seed": seed,
            "seconds": round(seconds, 1),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "proofs": [dataclasses.asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if failed:
        print(f"false: {', '.join(failed)}; the servers' logs are in {kept}")
        return 1
    shutil.rmtree(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
