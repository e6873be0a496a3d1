#!/usr/bin/env python3
"""How far one machine goes: from measured costs to the size of a community.

    python bench/capacity.py FILE     prints the tables; FILE is else results.json

`run.py --report` writes them into docs/capacity.md. run.py measures what chatd pays for
each thing that it does. HABITS says how often the users of a community do it. MACHINE
says what there is. The model multiplies and adds, one formula for each resource
(`used`), and names the resource of which the largest share is used. That one ends
first. The workload `community` is the check: a run with the habits of CHECKED, beside
what the model says about exactly this run.

A command (a message or a read mark) that comes alone pays for a commit of its own. Many
at the same time share one. Each cost is measured at two rates (`Cost`), and a straight
line joins them. Beyond the higher rate the model counts the cost at that rate. Only the
ends of the line are measured. We expect the true cost to lie below it, because the
first commands that share a commit save the most.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from peer import HERE
from report import (
    FAULTS,
    Figure,
    Results,
    Run,
    aligned,
    between_markers,
    busiest,
    markdown,
    micros,
    origin,
    read,
    shown,
    values,
)

PAGE = HERE.parent / "docs/capacity.md"
WORKLOADS = "idle,handshakes,growth,costs,community"  # what the tables need
MEASURE = f"python bench/run.py --full --only {WORKLOADS} measures all that is needed"
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
HOUR, DAY, YEAR_DAYS = 3_600, 86_400, 365
COUPLE, GROUP = 2, 50  # the sizes of the chats in the workload `costs`
SOME, MANY = 50, 1_000  # its commands a second
# Bytes around a frame on the network: Ethernet 18, IP 20, TCP 32, TLS 22.
AROUND_FRAME = 92


class Missing(Exception):
    """The results lack a figure; the text names the workload that measures it."""


# --- what people do -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Habits:
    """What the users of a community do in its busiest hour. WHY has the reasons."""

    name: str
    online: float  # the share of the members
    messages: float  # that an online user sends in an hour
    largest_chat: int  # chats have 2 to so many online members, each size as often
    watching: float  # the share of a chat's online members who have it on the screen
    visits: float  # how often an hour a user opens a chat that has unread messages
    typing: float  # signs for each message
    reconnects: float  # of a user in an hour
    daily: float  # messages of a member in a day, of all members


HABITS = {
    "quiet": Habits(
        name="a quiet club",
        online=0.1,
        messages=4,
        largest_chat=20,
        watching=0.3,
        visits=4,
        typing=2,
        reconnects=4,
        daily=2,
    ),
    "busy": Habits(
        name="a busy game or marketplace",
        online=0.3,
        messages=20,
        largest_chat=50,
        watching=0.2,
        visits=12,
        typing=2,
        reconnects=2,
        daily=10,
    ),
}

# Each habit in words, and why it has these values.
WHY = {
    "online": (
        "members online in the busiest hour",
        "A club's members look in; a game's players stay.",
    ),
    "messages": (
        "messages of an online user in that hour",
        "One in a quarter of an hour, or one in three minutes, is the mean of many who "
        "only read and few who write a lot.",
    ),
    "largest_chat": (
        "online members of a chat, from 2 to",
        "All sizes are equally frequent. A message counts its whole chat as online: "
        "people write when others are there.",
    ),
    "watching": (
        "of them, those who have the chat on the screen",
        "Their pages mark each message as read when it comes. Every mark goes to every "
        "member of the chat, so this costs more than the messages.",
    ),
    "visits": (
        "chats with unread messages that a user opens in an hour",
        "Each costs a page of history and one read mark.",
    ),
    "typing": (
        "typing signs for a message",
        "A page sends one at the first key and one every 3 s.",
    ),
    "reconnects": (
        "reconnects of a user in an hour",
        "Phones lose the network and sleep; a page is reloaded.",
    ),
    "daily": (
        "messages of a member in a day",
        "For the disk. The mean of all members, online or not.",
    ),
}
PERCENT = ("online", "watching")  # shown in percent

# What the workload `community` does. Nobody comes, goes or opens an old chat in it.
CHECKED = dataclasses.replace(HABITS["busy"], visits=0, reconnects=0)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is. The CPU and the disk's speed are those of the measurement."""

    cpu: float = 0.7  # of the one core that chatd uses; beyond it, queues grow
    memory_gb: float = 1  # the smallest server that one rents has about this to spare
    connections: int = 10_000  # the default of --max-connections
    network_mbit: float = 100
    return_seconds: float = 60  # for all to be back after a restart
    disk_gb: float = 40  # to be filled in a year


MACHINE = Machine()


def chat_sizes(users: int, largest: int) -> list[int]:
    """Divide users into chats of 2, 3, ... `largest` members, and again from 2."""
    sizes: list[int] = []
    left = users
    while left:
        size = min(2 + len(sizes) % (largest - 1), left)
        if size == 1 and sizes:
            sizes[-1] += 1
        else:
            sizes.append(size)
        left -= size
    return sizes


@dataclasses.dataclass(frozen=True)
class Activity:
    """What happens in a second."""

    online: float  # how many; all others are a second's
    messages: float
    deliveries: float  # of messages
    marks: float
    mark_deliveries: float
    typing: float
    signs: float  # deliveries of typing
    visits: float
    reconnects: float

    @property
    def commands(self) -> float:
        """Messages and marks: what is stored."""
        return self.messages + self.marks


def activity(online: int, habits: Habits) -> Activity:
    """Say what so many online users do in a second."""
    sizes = chat_sizes(online, habits.largest_chat)
    messages = online * habits.messages / HOUR
    visits = online * habits.visits / HOUR

    def mean(of: Callable[[int], float]) -> float:
        """The mean over messages: a chat gets as many as it has members."""
        return sum(size * of(size) for size in sizes) / online

    members = mean(lambda size: size)
    seen = habits.watching * messages
    typing = habits.typing * messages
    return Activity(
        online=online,
        messages=messages,
        deliveries=messages * members,
        marks=seen * mean(lambda size: size - 1) + visits,
        mark_deliveries=seen * mean(lambda size: (size - 1) * size) + visits * members,
        typing=typing,
        signs=typing * mean(lambda size: size - 1),
        visits=visits,
        reconnects=online * habits.reconnects / HOUR,
    )


# --- what it costs --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one thing at SOME and at MANY commands a second."""

    some: float
    many: float

    def at(self, rate: float) -> float:
        """Return the cost at so many commands a second: on the line between the two.

        Where that made a higher rate cost less a second than a lower one, it costs the
        same.
        """
        slope = (self.many - self.some) / (MANY - SOME)

        def line(rate: float) -> float:
            return self.some + slope * (min(max(rate, SOME), MANY) - SOME)

        if slope >= 0:
            return line(rate)
        peak = min(max((SOME - self.some / slope) / 2, SOME), MANY)
        return max(line(rate), line(peak) * peak / rate if rate > peak else 0.0)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What chatd pays. Times are in microseconds of CPU."""

    message: Cost  # without its deliveries
    mark: Cost  # likewise
    delivery: float
    typing: float  # without its deliveries
    sign: float
    handshake: float
    visit: float  # a page of history
    idle: float  # a second of an idle connection: its keep-alive
    commits: Cost  # for one command
    fsync_seconds: float
    empty_bytes: float  # of memory, without connections
    connection_bytes: float
    message_bytes: float  # on disk
    mark_bytes: float
    delivery_bytes: float  # on the network
    mark_delivery_bytes: float
    sign_bytes: float


def figure(results: Results, workload: str, case: str, of: Figure) -> float:
    """Return the median of a figure over the rounds. Raises Missing."""
    found = values(results, "chatd", ("", workload, case, of))
    if not found:
        raise Missing(f"no case {case!r} of the workload {workload}; {MEASURE}")
    return statistics.median(found)


def largest_case(results: Results, workload: str, prefix: str = "") -> str:
    """Return the case with the largest number behind the prefix. Raises Missing."""
    found: dict[int, str] = {
        int(number): run["case"]
        for run in results["runs"]
        if (run["peer"], run["workload"]) == ("chatd", workload)
        and run["case"].startswith(prefix)
        and (number := run["case"].removeprefix(prefix)).isdigit()
    }
    if not found:
        raise Missing(f"no case of the workload {workload}; {MEASURE}")
    return found[max(found)]


def each(total: str, *counts: str) -> Figure:
    """Make a figure: a field of the run divided by the sum of others."""
    return lambda run: float(run[total]) / max(1, sum(run[name] for name in counts))


def measured(results: Results) -> Costs:
    """Take the costs from the results. Raises Missing."""

    def of(case: str, what: Figure) -> float:
        return figure(results, "costs", case, what)

    cpu = each("cpu", "messages")

    # Two sizes of chats tell what is paid once from what each member costs. Only at the
    # lower rate: at the higher one, the larger chats also share more commits.
    small = 1e6 * of(f"message {COUPLE} {SOME}", cpu)
    large = 1e6 * of(f"message {GROUP} {SOME}", cpu)
    delivery = max(0.0, (large - small) / (GROUP - COUPLE))

    def message(amount: int) -> float:
        return 1e6 * of(f"message {COUPLE} {amount}", cpu) - COUPLE * delivery

    def mark(amount: int) -> float:
        """The other half of the commands are messages."""
        case = f"mark {COUPLE} {amount}"
        both = 1e6 * of(case, cpu) - message(amount) - COUPLE * delivery
        return max(0.0, both / of(case, each("marks", "messages")) - COUPLE * delivery)

    def typing(size: int, beside: float) -> float:
        """Beside the signs there are messages."""
        case = f"typing {size} {SOME}"
        both = 1e6 * of(case, cpu) - beside
        return max(0.0, both / of(case, each("typed", "messages")))

    def bytes_of_mark(total: str, messages: str, marks: str, both: float) -> float:
        """The sender of a message over unread ones has read them: that is a mark, too.

        So it is when there are no other marks: `both` are the bytes of the two. When
        everybody marks every message at once, senders have nothing unread.
        """

        def rest(run: Run) -> float:
            more = run[marks] - run[messages]
            return float((run[total] - run[messages] * both) / max(1, more))

        return max(0.0, of(f"mark {GROUP} {MANY}", rest))

    couple, group = typing(COUPLE, small), typing(GROUP, large)
    sign = max(0.0, (group - couple) / (GROUP - COUPLE))
    lone, crowded = f"message {COUPLE} {SOME}", f"message {COUPLE} {MANY}"
    commits = each("commits", "sent", "all_marks")
    message_bytes = of(crowded, each("grown", "sent"))
    delivery_bytes = of(f"message {GROUP} {SOME}", each("bytes", "count"))
    idle = largest_case(results, "idle")
    page = largest_case(results, "growth", "page ")
    return Costs(
        message=Cost(message(SOME), message(MANY)),
        mark=Cost(mark(SOME), mark(MANY)),
        delivery=delivery,
        typing=max(0.0, couple - sign * (COUPLE - 1)),
        sign=sign,
        handshake=figure(results, "handshakes", "shake", micros),
        visit=figure(results, "growth", page, micros),
        idle=1e6
        * figure(
            results, "idle", "quiet", lambda r: r["cpu"] / r["seconds"] / r["count"]
        ),
        commits=Cost(of(lone, commits), of(crowded, commits)),
        fsync_seconds=of("fsync", lambda run: float(run["seconds"])),
        empty_bytes=figure(results, "idle", idle, lambda run: float(run["empty"])),
        connection_bytes=figure(results, "idle", idle, lambda r: float(r["bytes"])),
        message_bytes=message_bytes,
        mark_bytes=bytes_of_mark("grown", "sent", "all_marks", message_bytes),
        delivery_bytes=delivery_bytes,
        mark_delivery_bytes=bytes_of_mark("bytes", "count", "reads", delivery_bytes),
        sign_bytes=of(
            f"typing {GROUP} {SOME}",
            lambda r: max(
                0.0, (r["bytes"] - r["count"] * delivery_bytes) / max(1, r["signs"])
            ),
        ),
    )


# --- the model ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Use:
    """What a community uses of each resource, in the resource's own unit."""

    cpu: float  # the share of a core
    memory_bytes: float
    connections: float
    fsyncs: float  # a second
    network_bits: float  # a second
    return_seconds: float
    disk_bytes: float  # in a year


def used(doing: Activity, costs: Costs, stored_a_day: float = 0) -> Use:
    """Say what an activity uses: one formula for each resource.

    `stored_a_day` is in messages; each is stored with as many marks as in the busiest
    hour.
    """
    rate = doing.commands
    micros = (
        doing.messages * costs.message.at(rate)
        + doing.marks * costs.mark.at(rate)
        + (doing.deliveries + doing.mark_deliveries) * costs.delivery
        + doing.typing * costs.typing
        + doing.signs * costs.sign
        + doing.visits * costs.visit
        + doing.reconnects * costs.handshake
        + doing.online * costs.idle
    )
    sent = (
        doing.deliveries * (costs.delivery_bytes + AROUND_FRAME)
        + doing.mark_deliveries * (costs.mark_delivery_bytes + AROUND_FRAME)
        + doing.signs * (costs.sign_bytes + AROUND_FRAME)
    )
    marks = doing.marks / doing.messages
    return Use(
        cpu=micros / 1e6,
        memory_bytes=costs.empty_bytes + doing.online * costs.connection_bytes,
        connections=doing.online,
        fsyncs=rate * costs.commits.at(rate),
        network_bits=8 * sent,
        return_seconds=doing.online * costs.handshake / 1e6,
        disk_bytes=YEAR_DAYS
        * stored_a_day
        * (costs.message_bytes + marks * costs.mark_bytes),
    )


def shares(use: Use, costs: Costs, machine: Machine = MACHINE) -> dict[str, float]:
    """Return how much of each resource is used; 1 is all of it."""
    return {
        "CPU": use.cpu / machine.cpu,
        "memory": use.memory_bytes / (machine.memory_gb * 1e9),
        "connections": use.connections / machine.connections,
        "fsyncs": use.fsyncs * costs.fsync_seconds,
        "network": use.network_bits / (machine.network_mbit * 1e6),
        "return": use.return_seconds / machine.return_seconds,
        "disk": use.disk_bytes / (machine.disk_gb * 1e9),
    }


@dataclasses.dataclass(frozen=True)
class Community:
    """A community on this machine."""

    members: int
    doing: Activity
    shares: dict[str, float]

    @property
    def first(self) -> str:
        """The resource that ends first."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def fits(self) -> bool:
        """Whether there is enough of everything."""
        return self.shares[self.first] <= 1


def community(
    members: int, habits: Habits, costs: Costs, machine: Machine = MACHINE
) -> Community:
    """Say what so many members use of the machine."""
    online = max(2, round(members * habits.online))
    doing = activity(online, habits)
    use = used(doing, costs, members * habits.daily)
    return Community(members, doing, shares(use, costs, machine))


def largest(habits: Habits, costs: Costs, machine: Machine = MACHINE) -> Community:
    """Find the largest community that fits, to two digits."""
    fitting = community(10, habits, costs, machine)
    power = 10
    while power < 10_000_000:
        for members in range(power, 10 * power, max(1, power // 10)):
            found = community(members, habits, costs, machine)
            if not found.fits:
                return fitting
            fitting = found
        power *= 10
    return fitting


# --- the tables -----------------------------------------------------------------------

Table = list[list[str]]


def percent(share: float) -> str:
    """Write a share; one that is more than there is stands out."""
    text = f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"
    return f"**{text}**" if share > 1 else text


def habits_table() -> Table:
    """List the habits, and why."""
    table = [["in the busiest hour", *(each.name for each in HABITS.values()), "why"]]
    for field, (label, reason) in WHY.items():
        found = [getattr(habits, field) for habits in HABITS.values()]
        form = percent if field in PERCENT else "{:g}".format
        table.append([label, *map(form, found), reason])
    return table


def machine_table(machine: Machine = MACHINE) -> Table:
    """List what there is, and why."""
    return [
        ["resource", "there is", "why"],
        [
            "CPU",
            f"{percent(machine.cpu)} of a core",
            "chatd's sockets use one core; when it is almost busy, everybody waits",
        ],
        [
            "memory",
            f"{machine.memory_gb:g} GB",
            "what a small rented server has to spare",
        ],
        [
            "connections",
            f"{machine.connections:,}",
            "the default of `--max-connections`",
        ],
        ["fsyncs", "all of the time", "the disk does one after another"],
        ["network", f"{machine.network_mbit:g} Mbit/s", "the least that is common"],
        [
            "return",
            f"{machine.return_seconds:g} s",
            "longer than that, people think that it is broken",
        ],
        ["disk", f"{machine.disk_gb:g} GB", "to be filled in a year"],
    ]


def costs_table(costs: Costs) -> Table:
    """List the costs, and the workload that measures each."""
    rows = [
        ("message", "us", costs.message, "costs"),
        ("read mark", "us", costs.mark, "costs"),
        ("commits for a message or a mark", "", costs.commits, "costs"),
    ]
    single = [
        ("each delivery of them", "us", costs.delivery, "costs"),
        ("typing sign", "us", costs.typing, "costs"),
        ("each delivery of it", "us", costs.sign, "costs"),
        ("handshake", "us", costs.handshake, "handshakes"),
        ("page of history", "us", costs.visit, "growth"),
        ("idle connection, a second of it", "us", costs.idle, "idle"),
        ("idle connection, memory", "KB", costs.connection_bytes / 1024, "idle"),
        ("chatd without connections", "MB", costs.empty_bytes / 2**20, "idle"),
        ("fsync of the disk", "ms", 1e3 * costs.fsync_seconds, "costs"),
        ("message on disk", "bytes", costs.message_bytes, "costs"),
        ("read mark on disk", "bytes", costs.mark_bytes, "costs"),
        ("message on a socket", "bytes", costs.delivery_bytes, "costs"),
        ("read mark on a socket", "bytes", costs.mark_delivery_bytes, "costs"),
        ("typing sign on a socket", "bytes", costs.sign_bytes, "costs"),
    ]
    head = ["", "unit", f"at {SOME} a second", f"at {MANY:,} a second", "workload"]
    return [
        head,
        *([n, u, shown(c.some), shown(c.many), w] for n, u, c, w in rows),
        *([n, u, shown(c), "", w] for n, u, c, w in single),
    ]


def sizes_table(found: Sequence[Community]) -> Table:
    """List communities: what they do, what they use, and what ends first."""
    resources = list(found[0].shares)
    head = ["members", "online", "messages/s", "marks/s", "deliveries/s"]
    table = [[*head, *resources, "first"]]
    for each in found:
        doing = each.doing
        numbers = (
            doing.messages,
            doing.marks,
            doing.deliveries + doing.mark_deliveries + doing.signs,
        )
        table.append(
            [
                f"{each.members:,}",
                f"{doing.online:,}",
                *(shown(number) for number in numbers),
                *(percent(share) for share in each.shares.values()),
                each.first,
            ]
        )
    return table


def crowd_run(results: Results) -> Run:
    """Return the run of the workload `community`. Raises Missing."""
    case = largest_case(results, "community")
    runs: list[Run] = [
        run
        for run in results["runs"]
        if (run["peer"], run["workload"], run["case"]) == ("chatd", "community", case)
    ]
    return runs[-1]


def crowd_text(run: Run) -> str:
    """Describe the run of the workload `community`."""
    faults = [f"{run[name]:,} {name}" for name in FAULTS if run.get(name)]
    return (
        f"{int(run['case']):,} sockets, {run['seconds']:,.0f} s: {run['sent']:,} "
        f"messages and {run['all_marks']:,} read marks, "
        f"{shown(100 * run['cpu'] / run['seconds'])} % of a core; from send to receipt "
        f"p50 {shown(run['p50_ms'])} ms, p99 {shown(run['p99_ms'])} ms; "
        f"{', '.join(faults) or 'nothing was lost, late, repeated or out of order'}."
    )


def checked(run: Run, costs: Costs) -> Table:
    """Compare the run of the workload `community` with the model."""
    seconds = run["seconds"]
    doing = activity(int(run["case"]), Habits(**run["habits"]))
    use = used(doing, costs)
    rows = [
        ("messages a second", doing.messages, run["messages"] / seconds),
        ("read marks a second", doing.marks, run["marks"] / seconds),
        (
            "deliveries a second",
            doing.deliveries + doing.mark_deliveries + doing.signs,
            (run["count"] + run["reads"] + run["signs"]) / seconds,
        ),
        ("CPU, % of a core", 100 * use.cpu, 100 * run["cpu"] / seconds),
        ("memory, MB", use.memory_bytes / 2**20, run["memory"] / 2**20),
        (
            "commits a second",
            use.fsyncs,
            run["commits"] / (run["sent"] / doing.messages),
        ),
        (
            "network, Mbit/s",
            use.network_bits / 1e6,
            8e-6
            * (
                run["bytes"]
                + AROUND_FRAME * (run["count"] + run["reads"] + run["signs"])
            )
            / seconds,
        ),
        (
            "disk, bytes for a message and its marks",
            costs.message_bytes + doing.marks / doing.messages * costs.mark_bytes,
            run["grown"] / run["sent"],
        ),
        ("seconds to connect all", use.return_seconds, run["open_seconds"]),
    ]
    head = ["", "the model", "measured", "measured / model"]
    return [
        head,
        *([n, shown(said), shown(was), f"{was / said:.2f}"] for n, said, was in rows),
    ]


def conclusion(found: Community, habits: Habits) -> str:
    """Say how far the machine goes."""
    return (
        f"One machine carries {habits.name} of about {found.members:,} members, "
        f"{found.doing.online:,} of them online. What ends then: {ENDS[found.first]}."
    )


ENDS = {
    "CPU": "the CPU of the core that chatd uses",
    "memory": "the memory",
    "connections": "the connections of `--max-connections`",
    "fsyncs": "the fsyncs of the disk",
    "network": "the network",
    "return": "the time to take everybody back after a restart",
    "disk": "the disk, within a year",
}


def parts(results: Results) -> Iterator[tuple[str, str | Table]]:
    """Yield the headings with their tables, and the sentences. Raises Missing."""
    costs = measured(results)
    yield "What each thing costs", costs_table(costs)
    yield "What there is", machine_table()
    yield "Habits", habits_table()
    for habits in HABITS.values():
        found = [community(members, habits, costs) for members in SIZES]
        yield f"{habits.name[0].upper()}{habits.name[1:]}", sizes_table(found)
        yield "", conclusion(largest(habits, costs), habits)
    run = crowd_run(results)
    yield "The run beside the model", checked(run, costs)
    yield "", crowd_text(run)


def text(results: Results) -> str:
    """Write all tables for a terminal, without the reasons. Raises Missing."""
    lines = []
    for title, content in parts(results):
        lines += [f"\n{title}"] if title else []
        if isinstance(content, str):
            lines.append(f"\n{content}")
            continue
        reasons = content[0][-1] == "why"
        lines += aligned([row[:-1] for row in content] if reasons else content)
    return "\n".join(lines)


def summary(results: Results) -> str:
    """Write what a run of some workloads tells: the tables, if nothing is missing."""
    try:
        return text(results)
    except Missing as why:
        try:
            return f"\n{crowd_text(crowd_run(results))}\nNo other tables: {why}"
        except Missing:
            return f"\nNo tables of the capacity: {why}"


def section(results: Results) -> str:
    """Write the part of docs/capacity.md between the markers. Raises Missing."""
    lines = [f"{origin(results)}; {busiest(results)}."]
    for title, content in parts(results):
        if title:
            lines += ["", f"### {title}"]
        lines += ["", content] if isinstance(content, str) else ["", *markdown(content)]
    return "\n".join(lines)


def publish(results: Results) -> None:
    """Write the figures of docs/capacity.md. Raises Missing."""
    PAGE.write_text(between_markers(PAGE.read_text(), section(results)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "results.json")
    options = parser.parse_args()
    try:
        print(text(read(options.file)))
    except Missing as why:
        raise SystemExit(f"capacity.py: {options.file}: {why}") from None


if __name__ == "__main__":
    main()
