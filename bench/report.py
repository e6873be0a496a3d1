"""Make the tables and the chart from the JSON of run.py.

No figure is written by hand. Each is the median of one field over the rounds. Tables
for a terminal show the range beside it; those of docs/speed.md do not.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peer import HERE, PEERS

Results = dict[str, Any]
Run = dict[str, Any]
Figure = Callable[[Run], float]
Column = tuple[str, str, str, Figure]  # heading, workload, case, what of it

PAGE = HERE.parent / "docs/speed.md"
BEGIN, END = "<!-- bench/run.py --report: -->", "<!-- end -->"
FAULTS = ("lost", "late", "repeated", "strayed", "refused", "ended", "missing_on_disk")


def micros(run: Run) -> float:
    """Return the server's CPU for a delivery, request or handshake, in microseconds."""
    return float(run["cpu"] / run["count"] * 1e6) if run["count"] else math.nan


def per_message(run: Run) -> float:
    """Return the server's CPU for a message in a two-person chat: two deliveries."""
    return 2 * micros(run)


def thousands(run: Run) -> float:
    """Return the server's instructions for a delivery, request or handshake, in 1,000.

    NaN if they could not be counted.
    """
    if not run.get("instructions") or not run["count"]:
        return math.nan
    return float(run["instructions"] / run["count"] / 1000)


def thousands_per_message(run: Run) -> float:
    """Return the instructions for a message in a two-person chat: two deliveries."""
    return 2 * thousands(run)


# The figures of CPU time, and the same of instructions.
INSTRUCTIONS: dict[Figure, Figure] = {
    micros: thousands,
    per_message: thousands_per_message,
}


def rate(run: Run) -> float:
    """Return how many there were in a second."""
    return float(run["count"] / run["seconds"])


def share(run: Run) -> float:
    """Return the CPU in percent of a core."""
    return float(100 * run["cpu"] / run["seconds"])


def field(name: str, unit: float = 1) -> Figure:
    """Make a figure that is a field of the run, in this unit."""
    return lambda run: float(run[name]) / unit


def values(results: Results, name: str, column: Column) -> list[float]:
    """Return a peer's figures for a column, in the order of the runs."""
    _, workload, case, figure = column
    return [
        figure(run)
        for run in results["runs"]
        if (run["peer"], run["workload"], run["case"]) == (name, workload, case)
    ]


def shown(value: float) -> str:
    """Write a number with three significant digits."""
    if math.isnan(value):
        return "none"
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def cell(found: Sequence[float], *, spread: bool) -> str:
    """Write a median, and with `spread` the range over the rounds."""
    if not found:
        return "-"
    median = shown(statistics.median(found))
    if not spread or len(found) < 2:
        return median
    return f"{median} ({shown(min(found))}-{shown(max(found))})"


def tables(plan: dict[str, Any]) -> dict[str, list[Column]]:
    """List the tables of a plan: the columns under each title."""
    rooms = [("fanout", str(n), f"room of {n:,}") for n in plan["rooms"]]
    crowd = plan["crowd"]
    flights = [
        ("flight", str(n), f"{crowd}, {n} at once") for n in plan["flights"] if n > 1
    ]
    few = plan["few"]
    flights += [
        ("flight", f"{few} of {n}", f"{n:,}, {few} at once") for n in plan["others"]
    ]
    steady = f"{plan['rate']:.0f}/s"
    kept = f"stop {plan['kept']}"
    return {
        "CPU of the server per delivery, us": [
            (head, kind, case, micros) for kind, case, head in rooms + flights
        ],
        "deliveries a second": [
            (head, kind, case, rate) for kind, case, head in rooms + flights
        ],
        "from send to receipt, p50 and p99, ms": [
            (f"{head} {name}", kind, case, field(f"{name}_ms"))
            for kind, case, head in rooms[-1:] + flights
            for name in ("p50", "p99")
        ],
        f"a lone message in a chat of two; {plan['pairs']} such chats; posts": [
            ("us a lone message", "lone", "lone", per_message),
            ("lone p50 ms", "lone", "lone", field("p50_ms")),
            ("messages/s", "pairs", "flat out", lambda run: rate(run) / 2),
            ("us a message", "pairs", "flat out", per_message),
            (f"p50 ms at {steady}", "pairs", steady, field("p50_ms")),
            (f"p99 ms at {steady}", "pairs", steady, field("p99_ms")),
            ("posts/s", "posts", "posts", rate),
            ("us a post", "posts", "posts", micros),
            ("post p99 ms", "posts", "posts", field("p99_ms")),
        ],
        "connections": [
            *(
                (f"KB each at {n:,}", "idle", str(n), field("bytes", 1024))
                for n in plan["idle"]
            ),
            ("keep-alive, % of a core", "idle", "quiet", share),
            ("handshakes/s", "handshakes", "shake", rate),
            ("us a handshake", "handshakes", "shake", micros),
            (f"{plan['storm']:,} back, s", "storm", "storm", field("seconds")),
            ("us a returning client", "storm", "storm", micros),
            ("start, s", "handshakes", "start", field("seconds")),
            (f"stop of {plan['kept']:,}, s", "idle", kept, field("seconds")),
        ],
        "growth: CPU of chatd, us": [
            (f"{what}, {n:,}", "growth", f"{what} {n}", micros)
            for what in ("page", "poll", "connect", "send")
            for n in plan["history"]
        ]
        + [
            (f"start s, {n:,}", "growth", f"start {n}", field("seconds"))
            for n in plan["history"]
        ],
        "search by chatd: to the end of a history, and sends beside it": [
            *(
                (f"{what}, {n:,}", "search", f"all {n}", field(name))
                for n in plan.get("searched", ())
                for what, name in (("requests", "count"), ("s", "seconds"))
            ),
            ("send p99 ms", "search", "alone", field("p99_ms")),
            ("beside searches", "search", "beside", field("p99_ms")),
        ],
    }


def counted(results: Results) -> bool:
    """Return whether any run has the server's instructions."""
    return any(run.get("instructions") for run in results["runs"])


def uncounted(results: Results) -> list[str]:
    """Say why there are no instructions, if the load tried to count them."""
    if counted(results) or not any("instructions" in run for run in results["runs"]):
        return []
    return [
        "instructions: not counted: this machine's perf events are not supported, or "
        "kernel.perf_event_paranoid is above 2"
    ]


def in_instructions(columns: Sequence[Column], unit: str = "") -> list[Column]:
    """Turn columns of CPU time into columns of instructions; leave out all others."""
    return [
        (
            unit + head.removeprefix("us ").removeprefix("of CPU "),
            kind,
            case,
            INSTRUCTIONS[figure],
        )
        for head, kind, case, figure in columns
        if figure in INSTRUCTIONS
    ]


def instruction_tables(results: Results) -> dict[str, list[Column]]:
    """List the tables of instructions; none if they were not counted."""
    if not counted(results):
        return {}
    costs, _, _, chats, connections, _, _ = tables(results["plan"]).values()
    return {
        "thousand instructions of the server per delivery": in_instructions(costs),
        "thousand instructions of the server": in_instructions([*chats, *connections]),
    }


def rows(
    results: Results, columns: Sequence[Column], *, spread: bool
) -> list[list[str]]:
    """Make a table's rows, the heading first. A peer without figures has no row."""
    table = [["", *(head for head, *_ in columns)]]
    for name in PEERS:
        found = [values(results, name, column) for column in columns]
        if any(found):
            label = PEERS[name].label
            table.append([label, *(cell(each, spread=spread) for each in found)])
    return table


def text(results: Results) -> str:
    """Write all tables for a terminal, with the range behind each median."""
    out = []
    every = {**tables(results["plan"]), **instruction_tables(results)}
    for title, columns in every.items():
        table = rows(results, columns, spread=True)
        if len(table) == 1:
            continue
        out += [f"\n{title}", *aligned(table)]
    out += ["", *uncounted(results), *faults(results)]
    return "\n".join(out)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Align a table for a terminal: the first column left, the others right."""
    lines = []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return lines


def faults(results: Results) -> list[str]:
    """List what was lost, late, repeated, out of order or refused, and all errors."""
    told = []
    for run in results["runs"]:
        name = run["peer"]
        label = PEERS[name].label if name in PEERS else name
        where = f"{label}, {run['workload']} {run['case']}".rstrip()
        if "error" in run:
            told.append(f"{where}: {run['error']}")
        found = [f"{run[name]:,} {name}" for name in FAULTS if run.get(name)]
        if found:
            told.append(f"{where}, round {run['round'] + 1}: {', '.join(found)}")
    return told or ["Nothing was lost, late, repeated, out of order or refused."]


# --- docs/speed.md --------------------------------------------------------------------


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Write a table in Markdown: columns of words left, columns of numbers right."""

    def side(place: int) -> str:
        cells = [row[place] for row in table[1:]]
        words = any(c.isalpha() for cell in cells if cell != "none" for c in cell)
        return "---" if words else "--:"

    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    sides = ["---", *(side(place) for place in range(1, len(table[0])))]
    return [head, f"|{'|'.join(sides)}|", *body]


def spread(results: Results) -> float:
    """Return how far rounds differ: half the range in percent, median of all cases."""
    columns = next(iter(tables(results["plan"]).values()))
    found = [values(results, name, column) for name in PEERS for column in columns]
    parts = [
        (max(each) - min(each)) / 2 / statistics.median(each)
        for each in found
        if len(each) > 1 and not math.isnan(sum(each))
    ]
    return 100 * statistics.median(parts) if parts else 0.0


def read(path: Path) -> Results:
    """Read what run.py has written. Exits with a sentence if this is another file."""
    try:
        results: Results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or "runs" not in results:
        raise SystemExit(f"{path}: not the results of bench/run.py")
    return results


def whole_rounds(results: Results) -> Results:
    """Leave out a last round that was interrupted: it lacks some peers."""
    last = results["runs"][-1]["round"]
    rounds = last + 1 if "took_seconds" in results else max(1, last)
    return {
        **results,
        "runs": [run for run in results["runs"] if run["round"] < rounds],
        "loads": results.get("loads", [])[:rounds],
        "plan": {**results["plan"], "rounds": rounds},
    }


def busiest(results: Results) -> str:
    """Describe how busy the machine was."""
    if not results.get("loads"):
        return "without a record of how busy the machine was"
    most = max(results["loads"])
    return f"at most {most:.2f} cores busy with anything else before a round"


def measured(results: Results) -> str:
    """Describe how certain the figures are."""
    rounds = results["plan"]["rounds"]
    if rounds == 1:
        return f"one round, {busiest(results)}"
    typically = f"typically ±{spread(results):.0f} %"
    return f"medians of {rounds} rounds, {typically}, {busiest(results)}"


def origin(results: Results) -> str:
    """Say where, when and by which command the figures were measured."""
    machine = results["machine"]
    return (
        f"On {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"{results['date']}, by `{results['command']}`"
    )


def section(results: Results) -> str:
    """Write the part of docs/speed.md that stands between the markers."""
    plan = results["plan"]
    costs, _, _, pairs, connections, growth, search = tables(plan).values()
    aged = [
        [what, *(cell(values(results, "chatd", c), spread=False) for c in columns)]
        for what in ("page", "poll", "connect", "send")
        if (columns := [c for c in growth if c[0].startswith(what)])
    ]
    ages = [f"{n:,} messages" for n in plan["history"]]
    lines = [
        f"{origin(results)}; {measured(results)}.",
        "",
        "**CPU of the server for one delivery, in microseconds**. First one message at "
        "a time, in a room of so many members; then so many people send at once:",
        "",
        *markdown(rows(results, costs, spread=False)),
        "",
        "![CPU per delivery](../bench/chart.svg)",
        "",
        "**Two-person chats**: one message at a time in one chat, "
        f"{plan['pairs']} chats flat out and at a steady {plan['rate']:,.0f} messages "
        "a second, and posts over HTTP:",
        "",
        *markdown(rows(results, pairs, spread=False)),
        "",
        f"**Connections**: idle ones, handshakes, {plan['storm']:,} clients that come "
        f"back at once (with chatd, each of them missed {plan['missed']} messages and "
        f"gets them), the start, and the stop with {plan['kept']:,}:",
        "",
        *markdown(rows(results, connections, spread=False)),
        "",
        *executed(results),
        "**chatd with a long history**, CPU in microseconds:",
        "",
        *markdown([["", *ages], *aged]),
        "",
        *looked(results, search),
        *faults(results),
        "",
        "The servers, and what each does besides passing messages on:",
        "",
        *(
            f"- *{PEERS[name].label}* ({version}): {PEERS[name].does}"
            for name, version in results["versions"].items()
        ),
    ]
    return "\n".join(lines)


def executed(results: Results) -> list[str]:
    """Write the tables of instructions, if they were counted."""
    lines = []
    for title, columns in instruction_tables(results).items():
        table = rows(results, columns, spread=False)
        lines += [f"**{title.capitalize()}**, in user space:", "", *markdown(table), ""]
    return lines


def looked(results: Results, columns: Sequence[Column]) -> list[str]:
    """Write the table of the search, if it was measured."""
    table = rows(results, columns, spread=False)
    if len(table) == 1:
        return []
    return [
        "**Search**: requests and seconds to look through a history for a word that is "
        "not there, and the p99 of sends without and with searches all the time:",
        "",
        *markdown(table),
        "",
    ]


def between_markers(page: str, section: str) -> str:
    """Return a page with a new section between its markers."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def publish(results: Results) -> None:
    """Write the figures of docs/speed.md, and the chart."""
    PAGE.write_text(between_markers(PAGE.read_text(), section(results)))
    (HERE / "chart.svg").write_text(chart(results))


# --- the chart ------------------------------------------------------------------------

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.us { font-weight: 700 }
.small { font-size: 11px; fill: #59636e }
.grid { stroke: #d1d9e0 }
.one { fill: #9a6700 } .many { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } .grid { stroke: #3d444d }
  .one { fill: #d29922 } .many { fill: #4493f8 }
}
"""
WIDTH, LEFT, RIGHT, TOP, ROW = 760, 210, 60, 62, 40


def chart(results: Results) -> str:
    """Draw the CPU per delivery, of one sender and of many, on a logarithmic scale."""
    plan = results["plan"]
    many = next(n for n in reversed(plan["flights"]) if n <= 32)
    series: list[tuple[str, str, Column]] = [
        ("one", "one message at a time", ("", "flight", "1", micros)),
        ("many", f"{many} people at once", ("", "flight", str(many), micros)),
    ]
    bars = {
        name: [values(results, name, column) for *_, column in series]
        for name in PEERS
        if values(results, name, series[0][2])
    }
    tops = [
        value
        for each in bars.values()
        for found in each
        for value in found
        if not math.isnan(value)
    ]
    low = 10.0 ** math.floor(math.log10(min(tops)))
    high = 10.0 ** math.ceil(math.log10(max(tops)))
    scale = (WIDTH - LEFT - RIGHT) / math.log10(high / low)

    def x(value: float) -> float:
        return LEFT + scale * math.log10(value / low)

    height = TOP + ROW * len(bars) + 34
    title = f"Microseconds of server CPU per delivery, a room of {plan['crowd']}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text class="us" x="8" y="20">{title}</text>',
    ]
    for place, (style, label, _) in enumerate(series):
        left = 8 + place * 200
        out.append(f'<rect class="{style}" x="{left}" y="33" width="12" height="12"/>')
        out.append(f'<text class="small" x="{left + 18}" y="43">{label}</text>')
    power = low
    while power <= high:
        at, bottom = x(power), TOP + ROW * len(bars)
        out.append(
            f'<line class="grid" x1="{at:.1f}" y1="{TOP - 6}" '
            f'x2="{at:.1f}" y2="{bottom}"/>'
        )
        label = f"{power:g}"
        out.append(
            f'<text class="small" x="{at:.1f}" y="{bottom + 16}" '
            f'text-anchor="middle">{label}</text>'
        )
        power *= 10
    for place, (name, each) in enumerate(bars.items()):
        top = TOP + ROW * place
        style = "us" if name == "chatd" else "them"
        label = html.escape(PEERS[name].label)
        out.append(f'<text class="{style}" x="8" y="{top + 20}">{label}</text>')
        for line, found in enumerate(each):
            value = statistics.median(found) if found else math.nan
            if math.isnan(value):
                continue
            y = top + 3 + 15 * line
            out.append(
                f'<rect class="{series[line][0]}" x="{LEFT}" y="{y}" '
                f'width="{max(1, x(value) - LEFT):.1f}" height="13"/>'
            )
            out.append(
                f'<text class="small" x="{x(value) + 5:.1f}" y="{y + 11}">'
                f"{shown(value)}</text>"
            )
    note = "logarithmic: each line is ten times the one before"
    out.append(f'<text class="small" x="{LEFT}" y="{height - 2}">{note}</text>')
    return "\n".join([*out, "</svg>", ""])
