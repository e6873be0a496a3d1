"""The workloads. Each yields its cases, with the raw figures of one run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import capacity
import peer as peers
from capacity import COUPLE, GROUP, MANY, SOME
from peer import BUILD, LOAD_CORE, Peer, Server, running, token

Result = dict[str, Any]
Cases = Iterator[tuple[str, Result]]
MARK = "#00000.00000000.0000000000000000#"  # load.c fills in sender, number and time


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes and times of all workloads."""

    rounds: int
    seconds: float  # the length of a measured window
    warm: float  # the seconds of load before it
    rooms: Sequence[int]
    crowd: int  # the size of the room in which `flights` vary
    others: Sequence[int]  # more rooms, with `few` messages in flight
    few: int
    flights: Sequence[int]  # messages in flight
    pairs: int
    rate: float  # 0: flat out only
    posters: int
    idle: Sequence[int]
    once: Sequence[str]  # the workloads that only the first round runs
    kept: int  # connections that are open at the stop
    quiet_seconds: float  # how long the keep-alive is measured
    starts: int
    storm: int
    storms: int  # how often they return
    missed: int
    history: Sequence[int]
    searched: Sequence[int]
    community: int  # the sockets of `community`
    community_seconds: float
    hurry: float  # how many times as often as in a real community they write


FULL = Plan(
    rounds=3,
    seconds=1.0,
    warm=0.3,
    rooms=(10, 100, 500, 1000),
    crowd=500,
    others=(100, 1000),
    few=4,
    flights=(1, 4, 32, 128),
    pairs=200,
    rate=1000,
    posters=32,
    idle=(1_000, 5_000, 10_000),
    # They take long, and memory hardly varies from round to round.
    once=("idle", "community"),
    kept=5_000,
    quiet_seconds=30,
    starts=1,
    storm=1_000,
    storms=1,
    missed=20,
    history=(10_000, 1_000_000),
    searched=(10_000, 100_000, 1_000_000),
    community=10_000,
    community_seconds=600,
    hurry=1,
)
QUICK = Plan(
    rounds=1,
    seconds=0.2,
    warm=0.1,
    rooms=(10, 100),
    crowd=100,
    others=(),
    few=4,
    flights=(1, 32),
    pairs=20,
    rate=200,
    posters=8,
    idle=(100, 300),
    once=("idle", "community"),
    kept=200,
    quiet_seconds=0.5,
    starts=1,
    storm=100,
    storms=1,
    missed=5,
    history=(1_000,),
    searched=(1_000, 10_000),
    community=300,
    community_seconds=1,
    hurry=60,
)
# Few cases, long windows: the noise of a ratio of two versions is a few percent.
BESIDE = dataclasses.replace(
    FULL,
    rounds=9,
    seconds=3.0,
    warm=0.5,
    rooms=(10, 500),
    others=(),
    flights=(32,),
    rate=0,
    idle=(4_000,),
    once=(),
    kept=4_000,
    quiet_seconds=0,
    starts=5,
    storms=5,  # the time of one varies by a fifth
)


class Broken(Exception):
    """The load failed; the text says why."""


def load_command(mode: str, server: Server, file: Path, **options: object) -> list[str]:
    """Make the command of the load generator, pinned to its core."""
    pids = ",".join(map(str, server.pids))
    all_options = {
        "proto": server.peer.protocol,
        "port": server.port,
        "pids": pids,
        "file": file,
        "content": server.peer.content,
        **options,
    }
    words = [f"{key}={value}" for key, value in all_options.items()]
    return ["taskset", "-c", str(LOAD_CORE), str(BUILD / "load"), mode, *words]


def load(mode: str, server: Server, file: Path, **options: object) -> Result:
    """Run the load once; return what it measured. Raises Broken."""
    command = load_command(mode, server, file, **options)
    done = subprocess.run(
        command,
        check=False,
        text=True,
        capture_output=True,
        timeout=180 + float(str(options.get("seconds", 0))),
    )
    if done.returncode:
        raise Broken((done.stderr or done.stdout).strip())
    result: Result = json.loads(done.stdout)
    return result


@contextlib.contextmanager
def holding(
    server: Server, file: Path, **options: object
) -> Iterator[Callable[[str], Result]]:
    """Hold connections. Yield a function that sends the load a line, for its answer."""
    process = subprocess.Popen(
        load_command("hold", server, file, **options),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def tell(line: str) -> Result:
        print(line, file=process.stdin, flush=True)
        assert process.stdout is not None  # it is a pipe
        answer = process.stdout.readline()
        result: Result = json.loads(answer or '{"error": "the load has ended"}')
        if "error" in result:
            raise Broken(result["error"])
        return result

    try:
        yield tell
    finally:
        process.terminate()
        process.communicate()


def talk(
    peer: Peer, command: list[str], plan: Plan, users: int, rooms: int, **options: float
) -> Result:
    """Let members of rooms send messages, on a fresh server."""
    with running(peer, command) as server:
        file = server.seat([users // rooms] * rooms)
        times = {"seconds": plan.seconds, "warm": plan.warm}
        return load("talk", server, file, conns=users, **{**times, **options})


# --- the workloads --------------------------------------------------------------------


def fanout(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Send one message at a time, in chats of several sizes."""
    for size in plan.rooms:
        yield str(size), talk(peer, command, plan, size, 1)


def lone(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Send one message at a time, in one chat of two: nothing shares its costs."""
    yield "lone", talk(peer, command, plan, 2, 1)


def flight(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Let several members of one chat send at the same time."""
    for speakers in plan.flights:
        result = talk(peer, command, plan, plan.crowd, 1, senders=speakers)
        yield str(speakers), result
    for size in plan.others:
        result = talk(peer, command, plan, size, 1, senders=plan.few)
        yield f"{plan.few} of {size}", result


def pairs(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Send in two-person chats: as fast as possible, then at a steady rate."""
    users = plan.pairs * 2
    yield "flat out", talk(peer, command, plan, users, plan.pairs)
    if not plan.rate:
        return
    long = 2 * plan.seconds
    steady = talk(peer, command, plan, users, plan.pairs, rate=plan.rate, seconds=long)
    yield f"{plan.rate:.0f}/s", steady


def post_request(path: str, bearer: str, body: str) -> str:
    """Return the bytes of a POST, as text."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {bearer}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )


def get_request(path: str, bearer: str) -> str:
    """Return the bytes of a GET, as text."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {bearer}\r\n\r\n"
    )


def write_requests(folder: Path, requests: Sequence[str]) -> Path:
    """Write the file of requests that the load sends."""
    file = folder / "requests"
    file.write_text("".join(request + "\0" for request in requests))
    return file


def stored(folder: Path) -> int:
    """Count the messages on disk."""
    (database,) = folder.glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as db:
        (count,) = db.execute("SELECT count(*) FROM message").fetchone()
    return int(count)


def posts(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Post messages on keep-alive connections; every answered one must be on disk."""
    if not peer.stores:
        return
    with running(peer, command) as server:
        seats = server.seat([plan.posters]).read_text().splitlines()
        path = "/chats/{}/messages"
        if peer.protocol == "chatd":
            path = "/api/v1/chats/{}/messages"
        body = json.dumps({"content": MARK + "x" * (64 - len(MARK))})
        requests = [
            post_request(path.format(seat.split()[1]), token(user + 1), body)
            for user, seat in enumerate(seats)
        ]
        result = load(
            "http",
            server,
            write_requests(server.folder, requests),
            proto="http",
            conns=plan.posters,
            status=201,
            seconds=plan.seconds,
            warm=plan.warm,
        )
        result["missing_on_disk"] = max(0, result["done"] - stored(server.folder))
        yield "posts", result


def idle(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Hold idle connections: memory of each, CPU of the keep-alive, and the stop."""
    most = max(plan.idle)
    rooms = max(1, most // 1000)
    with running(peer, command) as server:
        file = server.seat([most // rooms] * rooms)
        empty = server.memory_bytes()
        with holding(server, file, conns=most, parallel=64) as tell:
            for count in plan.idle:
                result = tell(f"open {count}")
                grown = server.memory_bytes() - empty
                yield str(count), {**result, "bytes": grown / count, "empty": empty}
            if plan.quiet_seconds and peer.keeps_alive:
                cpu = server.cpu_seconds()
                # Meanwhile the load answers pings, and nothing else happens.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.process.wait(plan.quiet_seconds)
                spent = server.cpu_seconds() - cpu
                quiet = {"cpu": spent, "seconds": plan.quiet_seconds, "count": most}
                yield "quiet", quiet
            tell(f"keep {plan.kept}")
            server.settle()
            yield f"stop {plan.kept}", {"seconds": server.stop()}


def handshakes(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Start. Then connect, wait for the greeting and close, each time with a new token.

    Every start is yielded as a case of its own.
    """
    for _ in range(plan.starts):
        with running(peer, command) as server:
            cpu = server.start_cpu_seconds
            yield "start", {"seconds": server.start_seconds, "cpu": cpu}
    with running(peer, command) as server:
        file = server.seat([100] * 100)
        result = load("shake", server, file, conns=32, seconds=plan.seconds)
        yield "shake", result


def storm(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Let all clients return at once after a restart.

    A client of chatd brings its cursor, and receives the messages that it missed. The
    time ends when the last client has the last of them. Every return is yielded as a
    case of its own, and brings the same cursor.
    """
    with running(peer, command) as server:
        expect = 0
        file = server.seat([plan.storm])
        if peer.protocol == "chatd":
            expect = plan.missed
            cursor = server.call("GET", "/api/v1/events", None, token(1))["cursor"]
            targets, chats = zip(*map(str.split, file.open()), strict=True)
            lines = [f"{target}&cursor={cursor} 0\n" for target in targets]
            file.write_text("".join(lines))
            for _ in range(plan.missed):
                path = f"/api/v1/chats/{chats[0]}/messages"
                server.call("POST", path, {"content": MARK}, token(1))
        size = plan.storm
        for _ in range(plan.storms):
            server.stop()
            server.start()
            options = {"conns": size, "parallel": size, "expect": expect}
            with holding(server, file, **options) as tell:
                result = tell(f"open {size}")
            repeated = max(0, result["caught"] - size * expect)
            yield "storm", {**result, "count": size, "repeated": repeated}


# --- growth ---------------------------------------------------------------------------

CHATS = 100  # chats in the history; each has two members
POLLED = 10  # events that the poll of a member finds


def fill(database: Path, messages: int) -> None:
    """Write a history into chatd's tables: a message to each chat in turn, no gaps."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        (first,) = db.execute("SELECT max(seq) + 1 FROM event").fetchone()
        db.execute("PRAGMA synchronous = OFF")
        with db:
            db.execute(
                "WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k"
                "                        WHERE i + 1 < :messages)"
                " INSERT INTO message (id, chat_id, n, sender_id, content, created_at)"
                " SELECT :first + i, 1 + i % :chats, 1 + i / :chats,"
                "        1 + 2 * (i % :chats), printf('message %d of a history', i),"
                "        1750000000 + i FROM k",
                {"messages": messages, "first": first, "chats": CHATS},
            )
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def growth(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Measure a page, a poll, a connect and a send with a long history."""
    if peer.protocol != "chatd":
        return
    for messages in plan.history:
        with running(peer, command) as server:
            server.seat([2] * CHATS)
            server.stop()
            fill(server.folder / "chatd.db", messages)
            server.start()
            yield f"start {messages}", {"seconds": server.start_seconds}
            for name, result in aged(server, plan, messages):
                yield f"{name} {messages}", result


def aged(server: Server, plan: Plan, messages: int) -> Cases:
    """Measure a running server that has a history of `messages`."""
    cursor = server.call("GET", "/api/v1/events", None, token(1))["cursor"]
    epoch, _, head = cursor.rpartition(".")
    back = f"{epoch}.{int(head) - POLLED * CHATS}"
    first = int(head) - messages + 1
    halfway = first + messages // CHATS // 2 * CHATS  # a message of the first chat
    body = json.dumps({"content": MARK})

    def asked(status: int, write: Callable[[int], str]) -> Result:
        requests = [write(chat) for chat in range(1, CHATS + 1)]
        return load(
            "http",
            server,
            write_requests(server.folder, requests),
            proto="http",
            conns=16,
            status=status,
            seconds=plan.seconds,
            warm=plan.warm,
        )

    def of(chat: int) -> tuple[str, str]:
        return f"/api/v1/chats/{chat}", token(2 * chat - 1)

    def page(chat: int) -> str:
        path, bearer = of(chat)
        before = halfway + chat - 1
        return get_request(f"{path}/messages?limit=50&before={before}", bearer)

    yield "page", asked(200, page)
    poll = f"/api/v1/events?limit={POLLED}&cursor={back}"
    yield "poll", asked(200, lambda c: get_request(poll, of(c)[1]))
    seats = server.folder / "seats"
    targets = [
        f"/ws/chat?token={token(user + 1)}&cursor={cursor} 0\n"
        for user in range(CHATS * 2)
    ]
    seats.write_text("".join(targets))
    yield "connect", load("shake", server, seats, conns=16, seconds=plan.seconds)

    def post(chat: int) -> str:
        path, bearer = of(chat)
        return post_request(path + "/messages", bearer, body)

    yield "send", asked(201, post)


# --- search ---------------------------------------------------------------------------


NOWHERE = "/api/v1/search?q=nowhere"


def search(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Look through histories for a word that is not there, in steps of one request.

    The last user is in every chat. Then chats of two send at a steady rate, before and
    while searches run without pause.
    """
    if peer.protocol != "chatd":
        return
    for messages in plan.searched:
        with running(peer, command) as server:
            file = server.seat([2] * plan.pairs)
            server.stop()
            fill(server.folder / "chatd.db", messages)
            searcher = plan.pairs * 2 + 1
            join_all(server.folder / "chatd.db", searcher)
            server.start()
            for name, path in (("all", NOWHERE), ("one", f"{NOWHERE}&chat_id=1")):
                yield f"{name} {messages}", walk(server, path, token(searcher))
            if messages == max(plan.searched) and plan.rate:
                yield "alone", sending(server, plan, file)
                with searching(server, token(searcher)):
                    yield "beside", sending(server, plan, file)


def join_all(database: Path, user: int) -> None:
    """Make a user a member of every chat."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("INSERT INTO user (id) VALUES (?)", (user,))
        db.execute(
            "INSERT INTO member (chat_id, user_id, joined_seq)"
            " SELECT id, ?, 0 FROM chat",
            (user,),
        )


def walk(server: Server, path: str, bearer: str) -> Result:
    """Search to the beginning, and count the requests."""
    begin, spent, count, longest = time.monotonic(), server.cpu_seconds(), 0, 0.0
    before: str | None = ""
    while before is not None:
        asked = time.monotonic()
        answer = server.call("GET", f"{path}{before}", None, bearer)
        longest = max(longest, time.monotonic() - asked)
        count += 1
        left = answer["before"]
        before = None if left is None else f"&before={left}"
    return {
        "count": count,
        "seconds": time.monotonic() - begin,
        "cpu": server.cpu_seconds() - spent,
        "longest_ms": longest * 1000,
    }


def sending(server: Server, plan: Plan, file: Path) -> Result:
    """Send in two-person chats at a steady rate."""
    return load(
        "talk",
        server,
        file,
        conns=plan.pairs * 2,
        rate=plan.rate,
        seconds=10 * plan.seconds,
        warm=plan.warm,
    )


@contextlib.contextmanager
def searching(server: Server, bearer: str) -> Iterator[None]:
    """Let four clients search without pause."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            server.call("GET", NOWHERE, None, bearer)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            yield
        finally:
            done.set()
        for each in asking:
            each.result()


# --- capacity: the costs that capacity.py needs, and the run that checks it -----------

TYPING = 200  # signs a second: enough to see their cost, and no commit waits for them


def stored_bytes(server: Server) -> int:
    """Return the size of the database, with what is only in the WAL yet."""
    address = f"file:{server.folder}/chatd.db?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    return int(pages * size)


def observed(server: Server, file: Path, **options: float) -> Result:
    """Talk by the clock. Add the commits, the growth on disk and the memory.

    Members that send one after another are far apart in the file, in different chats.
    """
    bearer, most, done = token(1, "stats"), [0], threading.Event()

    def commits() -> int:
        path = "/api/v1/internal/chat/ws/stats"
        return int(server.call("GET", path, None, bearer)["store"]["commits"])

    def watch() -> None:
        while not done.wait(options["seconds"] / 20):
            most.append(server.memory_bytes())

    before, stored_before = commits(), stored_bytes(server)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = load("talk", server, file, stride=7919, **options)
    finally:
        done.set()
        watcher.join()
    return {
        **result,
        "commits": commits() - before,
        "grown": stored_bytes(server) - stored_before,
        "memory": max(most),
    }


def fsync_seconds(folder: Path) -> float:
    """Return how long an fsync of a page takes on this disk, the median of many."""
    took = []
    with (folder / "probe").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(bytes(4096))
            begin = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - begin)
    return statistics.median(took)


def costs(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Measure chatd's commands one by one, alone and many a second."""
    if peer.protocol != "chatd":
        return
    with running(peer, command) as server:
        yield "fsync", {"seconds": fsync_seconds(server.folder)}
        users = max(GROUP, plan.pairs)
        files = {
            size: server.seat([size] * (users // size)) for size in (COUPLE, GROUP)
        }
        for name, size, amount, options in (
            ("message", COUPLE, SOME, {"rate": SOME}),
            ("message", GROUP, SOME, {"rate": SOME}),
            ("mark", COUPLE, SOME, {"rate": SOME / 2, "watching": 1, "look": 0.1}),
            ("typing", COUPLE, SOME, {"rate": SOME, "typing": TYPING}),
            ("typing", GROUP, SOME, {"rate": SOME, "typing": TYPING}),
            ("message", COUPLE, MANY, {"rate": MANY}),
            ("mark", COUPLE, MANY, {"rate": MANY / 2, "watching": 1, "look": 0.1}),
            ("mark", GROUP, MANY, {"rate": MANY / GROUP, "watching": 1, "look": 0.1}),
        ):
            times = {"conns": users, "seconds": 3 * plan.seconds, "warm": plan.warm}
            case = f"{name} {size} {amount}"
            yield case, observed(server, files[size], **times, **options)


def community(peer: Peer, command: list[str], plan: Plan) -> Cases:
    """Let a whole community do what capacity.py says that a busy one does.

    Each user is in one chat. No user reconnects or opens an old chat meanwhile.
    """
    if peer.protocol != "chatd":
        return
    often = capacity.CHECKED.messages * plan.hurry
    habits = dataclasses.replace(capacity.CHECKED, messages=often)
    sizes = capacity.chat_sizes(plan.community, habits.largest_chat)
    doing = capacity.activity(plan.community, habits)
    with running(peer, command) as server:
        file = server.seat(sizes)
        result = observed(
            server,
            file,
            conns=plan.community,
            seconds=plan.community_seconds,
            warm=plan.warm,
            rate=doing.messages,
            typing=doing.typing,
            watching=habits.watching,
        )
        yield str(plan.community), {**result, "habits": dataclasses.asdict(habits)}


WORKLOADS: dict[str, Callable[[Peer, list[str], Plan], Cases]] = {
    "fanout": fanout,
    "lone": lone,
    "flight": flight,
    "pairs": pairs,
    "posts": posts,
    "idle": idle,
    "handshakes": handshakes,
    "storm": storm,
    "growth": growth,
    "search": search,
    "costs": costs,
    "community": community,
}


def build_load() -> None:
    """Compile the load generator."""
    peers.build_c(peers.HERE / "load.c")
