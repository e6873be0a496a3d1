#!/usr/bin/env python3
"""Take one idea out of smallchatd, see what breaks, and put it back.

    python tour/experiments.py              all of them, in a minute or two
    python tour/experiments.py 1 3          those of chapters 1 and 3

Each experiment of the first seven chapters changes a few lines of smallchatd.py, in
memory, and does the same twice: with the change, and without it. The others do the same
to smallchatd and to chatd. An experiment that does not show what its chapter says ends
with status 1. Some read /proc, which only Linux has.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import jwt
import trio
from trio_websocket import (
    ConnectionClosed,
    HandshakeError,
    WebSocketConnection,
    open_websocket_url,
)

HERE = Path(__file__).resolve().parent
SMALLCHATD = HERE / "smallchatd.py"
SECRET = "a secret of this tour, of 32 bytes or more"
ANNA, BEN, CLARA = 1, 2, 3
THREADS = trio.CapacityLimiter(200)  # that post at the same time
LONG = "\N{SNOWMAN}" * 4000  # the longest text: 12 KB

# Runs a program that comes on stdin, as if it stood in the file.
RUN = f"""
import sys
__file__ = {str(SMALLCHATD)!r}
exec(compile(sys.stdin.read(), __file__, "exec"), globals())
"""


# --- the servers ----------------------------------------------------------------------


class Server:
    """A server in a process of its own, on a free port, with a chat of its users."""

    def __init__(self, name: str, folder: Path, source: str = "") -> None:
        self.name, self.source = name, source
        self.db, self.log, self.key = folder / "chat.db", folder / "log", folder / "key"
        self.key.write_text(SECRET)
        self.key.chmod(0o600)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        if self.name == "chatd":
            command = ["-m", "chatd", "serve", f"--db={self.db}"]
            command += [f"--jwt-key={self.key}", "--listen=127.0.0.1:0"]
            # Two users send here what many would send.
            for limit in "sends", "requests", "handshakes":
                command.append(f"--{limit}=10000/10000")
        else:
            command = ["-c", RUN, "0", str(self.db)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=HERE.parent,
                env={**os.environ, "SMALLCHATD_SECRET": SECRET},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdin
        assert self.process.stdout
        with self.process.stdin as program:
            program.write(self.source)
        line = self.process.stdout.readline()
        port = re.search(r"127\.0\.0\.1:(\d+)", line)
        if not port:
            raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()}")
        self.port = int(port[1])

    def stop(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal, and return its exit status."""
        assert self.process.stdout
        self.process.send_signal(number)
        self.process.stdout.close()
        return self.process.wait(15)

    async def has_ended(self) -> bool:
        """Wait until it has ended by itself. False: it does not, within 15 s."""
        with suppress(subprocess.TimeoutExpired):
            await trio.to_thread.run_sync(self.process.wait, 15)
        return self.process.returncode is not None

    def chat(self, *users: int) -> int:
        """Create a chat."""
        if self.name == "chatd":
            body = {"member_ids": users, "title": "tour"}
            return int(
                self.ask("/api/v1/chats", body, 9, scope="service")["chat"]["id"]
            )
        with closing(sqlite3.connect(self.db)) as db, db:
            rows = [(2, user) for user in users]
            db.executemany("INSERT INTO member (chat_id, user_id) VALUES (?, ?)", rows)
        return 2

    def ask(self, path: str, body: object, user: int, **claims: object) -> Any:
        """POST a body as a user, and return the answer. It blocks."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {token(user, **claims)}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    async def post(self, chat: int, user: int, content: str) -> Any:
        """Post a message."""
        path, body = f"/api/v1/chats/{chat}/messages", {"content": content}
        ask = partial(self.ask, path, body, user)
        return await trio.to_thread.run_sync(
            ask, abandon_on_cancel=True, limiter=THREADS
        )

    def url(self, user: int, cursor: str = "") -> str:
        """The URL of a user's socket."""
        more = f"&cursor={cursor}" if cursor else ""
        return f"ws://127.0.0.1:{self.port}/ws/chat?token={token(user)}{more}"

    def stalled_client(self, user: int) -> socket.socket:
        """Open a WebSocket whose client reads nothing behind the handshake's status."""
        client = socket.create_connection(("127.0.0.1", self.port))
        path = self.url(user).partition(str(self.port))[2]
        client.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert client.recv(12) == b"HTTP/1.1 101"
        return client

    def proc(self, name: str) -> str:
        """Read a file of the process in /proc."""
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def memory_mb(self) -> float:
        """Its resident memory."""
        return int(self.proc("statm").split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    def cpu_seconds(self) -> float:
        """The CPU time that it has used."""
        fields = self.proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sockets(self) -> int:
        """How many sockets it has open."""
        folder = f"/proc/{self.process.pid}/fd"
        links = (os.readlink(f"{folder}/{name}") for name in os.listdir(folder))
        return sum(link.startswith("socket:") for link in links)


def token(user: int, **claims: object) -> str:
    """Sign a token."""
    claims = {"user_id": user, "exp": int(time.time()) + 3600, **claims}
    return jwt.encode(claims, SECRET, "HS256")


async def receive(socket: WebSocketConnection, kind: str) -> Any:
    """Return the next message of a type. Raises TooSlowError after 5 s."""
    with trio.fail_after(5):
        while (message := json.loads(await socket.get_message()))["type"] != kind:
            pass
    return message


async def send(socket: WebSocketConnection, chat: int, content: str) -> None:
    """Send a message."""
    command = {"type": "send_message", "chat_id": chat, "content": content}
    await socket.send_message(json.dumps(command))


async def post_at_once(server: Server, chat: int, count: int, content: str) -> None:
    """Post a text of Anna's several times at the same moment."""
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(server.post, chat, ANNA, content)


# --- the experiments ------------------------------------------------------------------

# The damage, or whether there is any; and what was seen.
Found = tuple[float, str]
Try = Callable[[Server], Awaitable[Found]]
Patch = tuple[tuple[str, str], ...]  # each first text is replaced by the second one
# What a client sees of a server that has ended.
GONE = (ConnectionClosed, HandshakeError, HTTPException, OSError)


@dataclass
class Experiment:
    """What a chapter tries: a patch of smallchatd, or none, and what to do then."""

    chapter: int
    question: str
    patch: Patch
    run: Try
    both: Patch = ()  # changes smallchatd for both runs


EXPERIMENTS: list[Experiment] = []
PUBLISH_WAITS: Patch = (
    ("            self.publish(outcome)", "            await self.publish(outcome)"),
    ("    def publish(self, outcome", "    async def publish(self, outcome"),
)


def experiment(
    chapter: int, question: str, *patch: tuple[str, str], both: Patch = ()
) -> Callable[[Try], Try]:
    """Register an experiment."""

    def register(run: Try) -> Try:
        EXPERIMENTS.append(Experiment(chapter, question, patch, run, both))
        return run

    return register


@experiment(
    1,
    "Why does the hub not send?",
    *PUBLISH_WAITS,
    (
        "session.push(outcome.event)",
        "await session.socket.send_message(encode(outcome.event).decode())",
    ),
)
async def a_slow_client_delays_nobody(server: Server) -> Found:
    chat, got, slowest = server.chat(ANNA, BEN, CLARA), 0, 0.0
    stalled = server.stalled_client(BEN)
    async with open_websocket_url(server.url(CLARA)) as clara:
        with stalled:
            while got < 600:
                began = trio.current_time()
                with trio.move_on_after(4) as waiting:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(server.post, chat, ANNA, LONG)
                        await receive(clara, "new_message")
                        got += 1
                slowest = max(slowest, trio.current_time() - began)
                if waiting.cancelled_caught:
                    break
    seen = "Ben's client reads nothing. "
    if waiting.cancelled_caught:
        return True, f"{seen}Clara gets {got} messages, then nothing for 4 s"
    return False, f"{seen}Clara waits at most {slowest * 1000:.0f} ms for a message"


@experiment(
    2,
    "Why does each connection have its own nursery?",
    (
        "                accept = partial(",
        "                self.connections = connections\n"
        "                accept = partial(",
    ),
    (
        "                    nursery, whole,",
        "                    self.connections, whole,",
    ),
    ("self.store.jobs, nursery)", "self.store.jobs, self.connections)"),
    ("nursery.start_soon(session.read)", "self.connections.start_soon(session.read)"),
    ("nursery.start_soon(session.ping)", "self.connections.start_soon(session.ping)"),
)
async def a_client_that_is_cut_ends_no_other(server: Server) -> Found:
    chat, got = server.chat(ANNA, BEN, CLARA), 0
    async with open_websocket_url(server.url(CLARA)) as clara:
        with server.stalled_client(BEN):
            try:
                for _ in range(600):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(server.post, chat, ANNA, LONG)
                        await receive(clara, "new_message")
                    got += 1
            except* GONE:
                pass
    seen = f"Ben's client reads nothing. Clara gets {got} of 600 messages"
    if got < 600:
        assert await server.has_ended(), "Clara is cut, and the server runs"
        seen += ", and the server has ended"
    return got < 600, seen


@experiment(
    3,
    "When may the ack be sent?",
    (
        "                        done = partial(self.reply, command)\n",
        '                        self.reply(command, Outcome({"type": "ack"}, {}))\n'
        "                        done = lambda outcome: None\n",
    ),
    both=(("COMMANDS_PER_SECOND = 20", "COMMANDS_PER_SECOND = 1e9"),),
)
async def an_ack_means_that_it_is_on_disk(server: Server) -> Found:
    chat, acks = server.chat(ANNA, BEN), 0
    for _ in range(5):
        async with open_websocket_url(server.url(ANNA)) as anna:
            for number in range(20):
                await send(anna, chat, f"{number}")
            await receive(anna, "ack")
            server.stop(signal.SIGKILL)
            acks += 1
            with suppress(ConnectionClosed):  # when all is read that it had sent
                while True:
                    await receive(anna, "ack")
                    acks += 1
        server.start()
    with closing(sqlite3.connect(server.db)) as db:
        (stored,) = db.execute("SELECT count(*) FROM message").fetchone()
    return (
        stored < acks,
        f"5 times kill -9 at the first ack: {acks} acks, {stored} stored",
    )


@experiment(
    4,
    "Who may change a set while you go through it?",
    *PUBLISH_WAITS,
    (
        "                session.push(outcome.event)\n",
        "                session.push(outcome.event)\n"
        "                await trio.sleep(0)\n",
    ),
)
async def nobody_changes_a_set_that_is_being_read(server: Server) -> Found:
    chat = server.chat(ANNA, BEN)

    async def come_and_go() -> None:
        while True:
            async with open_websocket_url(server.url(BEN)):
                pass

    gone = False
    with ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(server.stalled_client(BEN))
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(come_and_go)
                for number in range(200):
                    await server.post(chat, ANNA, f"{number}")
                nursery.cancel_scope.cancel()
        except* GONE:
            gone = True
    if gone:
        assert await server.has_ended(), "a client failed, and the server runs"
        log = server.log.read_text().splitlines()
        return True, f"the server has ended: {log[-2].strip(' |')}"
    return False, "all 200 messages are published while Ben's clients come and go"


@experiment(
    5,
    "What does a queue without a bound cost?",
    ("OUTBOX_FRAMES = 100", 'OUTBOX_FRAMES = float("inf")'),
    both=(("WRITE_SECONDS = 10", "WRITE_SECONDS = 1000"),),
)
async def memory_is_bounded(server: Server) -> Found:
    chat = server.chat(ANNA, BEN)
    await post_at_once(server, chat, 40, LONG)
    before = server.memory_mb()  # with what 40 requests at the same time need
    with server.stalled_client(BEN):
        for _ in range(50):
            await post_at_once(server, chat, 40, LONG)
        more = server.memory_mb() - before
    seen = f"2,000 messages for a client that reads nothing: {more:.0f} MB more"
    return max(more, 1), seen


@experiment(
    6,
    "Why does every wait for a client have a deadline?",
    ("                nursery.start_soon(session.ping)\n", ""),
    both=(
        ("PING_SECONDS = 30", "PING_SECONDS = 1"),
        ("PONG_SECONDS = 20", "PONG_SECONDS = 1"),
    ),
)
async def a_client_that_is_gone_leaves_nothing(server: Server) -> Found:
    before = server.sockets()
    clients = [server.stalled_client(BEN) for _ in range(50)]
    await trio.sleep(4)
    left = server.sockets() - before
    for client in clients:
        client.close()
    return left, f"50 clients answer nothing for 4 s: {left} sockets are still open"


@experiment(
    7,
    "What does a stop owe its clients?",
    ("accepting.cancel_scope.cancel()", "nursery.cancel_scope.cancel()"),
)
async def a_stop_says_goodbye(server: Server) -> Found:
    codes = set()
    async with open_websocket_url(server.url(ANNA)) as anna:
        await receive(anna, "connected")
        server.process.send_signal(signal.SIGTERM)
        try:
            await receive(anna, "never")
        except ConnectionClosed as closed:
            codes.add(closed.reason.code if closed.reason else 1006)
    return codes != {1012}, f"the client sees close code {codes.pop()}"


# --- smallchatd beside chatd ----------------------------------------------------------


@experiment(8, "What does a client miss while it is away?")
async def nothing_is_missed(server: Server) -> Found:
    chat = server.chat(ANNA, BEN)
    async with open_websocket_url(server.url(BEN)) as ben:
        cursor = (await receive(ben, "connected")).get("cursor", "")
    for number in range(3):
        await server.post(chat, ANNA, f"{number}")
    got = 0
    async with open_websocket_url(server.url(BEN, cursor)) as ben:
        with trio.move_on_after(3):
            while got < 3:
                await receive(ben, "new_message")
                got += 1
    return got != 3, f"{got} of 3 messages after Ben comes back"


@experiment(9, "What happens to a slow client?")
async def a_slow_client_gets_everything(server: Server) -> Found:
    chat, got = server.chat(ANNA, BEN), 0
    async with open_websocket_url(server.url(BEN), message_queue_size=1) as ben:
        for _ in range(25):
            await post_at_once(server, chat, 40, LONG)
        try:
            while got < 1000:
                await receive(ben, "new_message")
                got += 1
        except (ConnectionClosed, trio.TooSlowError):
            pass
    return got != 1000, f"{got} of 1,000 messages, read after all were sent"


def commits(wal: Path) -> int:
    """Count the commits in SQLite's log: frames with the size of the database.

    https://www.sqlite.org/fileformat2.html#walformat
    """
    data = wal.read_bytes()
    (page_bytes,) = struct.unpack(">I", data[8:12])
    frames = range(32, len(data), 24 + page_bytes)
    return sum(data[at + 4 : at + 8] != bytes(4) for at in frames)


@experiment(10, "How many commits do many messages need?")
async def messages_share_commits(server: Server) -> Found:
    chat = server.chat(ANNA, BEN)
    wal = server.db.with_name(server.db.name + "-wal")
    before = commits(wal)
    await post_at_once(server, chat, 200, "Hello")
    made = commits(wal) - before
    return made, f"200 messages at the same time: {made} commits"


@experiment(11, "How often is one message encoded?")
async def one_frame_serves_all(server: Server) -> Found:
    members, posts = range(101, 201), 40
    chat = server.chat(ANNA, *members)

    got_all, measured = trio.Semaphore(0), trio.Event()

    async def listen(  # noqa: ASYNC114 (only ever given to nursery.start)
        user: int, task_status: trio.TaskStatus[None]
    ) -> None:
        async with open_websocket_url(server.url(user)) as client:
            task_status.started()
            for _ in range(posts):
                await receive(client, "new_message")
            got_all.release()
            await measured.wait()

    async with trio.open_nursery() as nursery:
        for user in members:
            await nursery.start(listen, user)
        before = server.cpu_seconds()
        for number in range(posts):
            await server.post(chat, ANNA, f"{number}")
        for _ in members:
            await got_all.acquire()
        each = (server.cpu_seconds() - before) / len(members) / posts * 1e6
        measured.set()
    return each, f"100 clients: {each:.0f} microseconds of CPU for each delivery"


# --- running them ---------------------------------------------------------------------


def patched(patch: Patch) -> str:
    """Return smallchatd's source with a patch."""
    source = SMALLCHATD.read_text("utf-8")
    for old, new in patch:
        assert source.count(old) == 1, f"not once in smallchatd.py: {old}"
        source = source.replace(old, new)
    return source


def try_on(name: str, run: Try, source: str = "") -> Found:
    """Do an experiment with a fresh server."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(name, Path(folder), source)
        try:
            return trio.run(run, server)
        except BaseException:
            print(server.log.read_text(), file=sys.stderr)
            raise
        finally:
            server.stop()


def show(each: Experiment) -> bool:
    """Do an experiment twice. Returns whether the first time does far more damage."""
    print(f"\n{each.chapter}. {each.question}\n")
    whole, changed = patched(each.both), patched(each.both + each.patch)
    if each.patch:
        for line in difflib.ndiff(whole.split("\n"), changed.split("\n")):
            if line[0] in "-+":
                print(f"    {line}")
        for _, new in each.both:
            print(f"    (both times: {new})")
        print()
        runs = {"changed": ("smallchatd", changed), "as it is": ("smallchatd", whole)}
    else:
        runs = {"smallchatd": ("smallchatd", whole), "chatd": ("chatd", "")}
    damage = []
    for label, (name, source) in runs.items():
        found, seen = try_on(name, each.run, source)
        print(f"    {label + ':':12}{seen}", flush=True)
        damage.append(found)
    return damage[0] > 2 * damage[1]  # True counts as 1


def main() -> int:
    """Do the experiments of the chapters that are named, or all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no server is left running
    chapters = [str(each.chapter) for each in EXPERIMENTS]
    wanted = sys.argv[1:] or chapters
    if unknown := [word for word in wanted if word not in chapters]:
        there = f"there are {chapters[0]} to {chapters[-1]}"
        print(f"no such chapter: {unknown[0]}; {there}", file=sys.stderr)
        return 2
    chosen = [each for each in EXPERIMENTS if str(each.chapter) in wanted]
    wrong = [each.chapter for each in chosen if not show(each)]
    for chapter in wrong:
        print(f"\nchapter {chapter}: it did not show what it should", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
