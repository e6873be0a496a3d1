#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trio>=0.27",
#     "trio-websocket==0.12.2",
#     "h11>=0.16",
#     "pyjwt[crypto]>=2.13",
#     "msgspec>=0.19",
#     "prometheus-client>=0.21",
# ]
# ///
"""chatd: a real-time chat server in one file (Trio, trio-websocket, SQLite, JWT).

The promise. An ack means the message is on disk. A client that keeps its cursor sees
every event of its chats exactly once and in order, over the socket, over the poll, or
over any mix of the two, across lost connections and restarts, or is told to `resync`.

One idea carries it: everybody reads the log. Every lasting thing that happens is a row
of one table with a growing `seq`. The live path is a short cut for those who are up to
date; whoever is not reads the log until he is, from memory (the tail) or from disk:

    command -> Store (group commit) -> Hub (tail) -> Outbox of each member's socket
                 |                                      ^
                 +------- the log, in pages ------------+     only for who is far behind

The task tree; a task never outlives the nursery above it:

    serve                      the root: _serve
    |- House.watch_signals     SIGTERM and SIGINT: the first stops, the second ends
    `- House.run               of a Server, which is a House and has what is below:
       |- Store.run            takes all that waits, ONE transaction, hands it on
       |- Hub.run              publishes batches: tail, live seats, then the callers
       |- Server._sweep        once a second: ping, pong, stall, token end
       `- connections          a nursery inside, so it ends before the three above
          |- House._accept     one a listening socket, in a nursery until the stop
          `- House._connection  one a TCP connection: Http, then perhaps Session; in
                               its own nursery, only while bytes wait for a peer:
                               Outbox._flush and Session._catch_up

Queues and their bounds: jobs for the store (4,096), commands of one connection without
an answer (64), bytes of one outbox (256 KiB and the batch that crossed the line).
Store and hub have nothing between them: a batch is published while the next gathers.
Who cannot take more queues nowhere: he stops being live and reads the log later.

Deadlines: a request head 10 s, a request 15 s, a keep-alive 75 s, silence 25 s before
a ping and 10 s after it, waiting bytes that do not move 10 s (to 35 s, by how large
the peer's receive window is), a close 1 s after the last byte, a stop 5 s. They are
all fields of Settings.

The order of effects of one message: committed, in the tail, on the wire of every live
member, acked. Each step is a plain `def` on the main thread or one transaction in the
writer's thread, so none can be cancelled halfway; and what is lost between two of them
was never acked, or is in the log.

Part I (Server, Connection, Store, Hub, Outbox) is all that a message passes. Part II is
what stands around it: protocol, tokens and limits, HTTP, monitoring, the proxy,
operations, settings.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import dataclasses
import email.utils
import errno
import fcntl
import functools
import gc
import hashlib
import http
import ipaddress
import itertools
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import signal
import socket
import sqlite3
import stat
import struct
import sys
import tempfile
import termios
import time
import traceback
import urllib.parse
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Sequence,
)
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeVar,
)

import h11
import jwt
import msgspec
import trio
import wsproto
from trio_websocket import WebSocketConnection
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.frame_protocol import FrameProtocol

if TYPE_CHECKING:
    from prometheus_client import Metric

__version__ = "1.0.1"

HERE = Path(__file__).resolve().parent
# Beside this file in a checkout; in an installed wheel in chatd_assets/ beside it.
ASSETS = HERE / "chatd_assets" if (HERE / "chatd_assets").is_dir() else HERE

logger = logging.getLogger("chatd")
T = TypeVar("T")
Db = sqlite3.Connection
MAX_ID = 2**53 - 1  # JavaScript's largest safe integer


# =====================================================================================
# SERVER: the task tree, from the root down
#
# `serve` opens the database and starts Trio; `_serve` is the root task; below it the
# nurseries stand in the order in which they end: first the listening tasks, then the
# connections, then the sweeper, the store and the hub. One bulkhead stands around each
# connection (`except Exception`): nothing a client sends ends more than its own.
# =====================================================================================


def serve(settings: Settings, ready: Callable[[House, str], None]) -> None:
    """Serve until a signal says stop. ready is called with the server's address."""
    settings = raise_file_limit(settings)
    with locked(settings.db):
        make_secret(secret_path(settings))
        keyring = read_keyring(settings)
        store = Store(settings, Stats())
        try:
            server = Server(settings, store, keyring)
            trio.run(_serve, server, ready)
        finally:
            store.close()


# Out of descriptors or memory: those who leave make room.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


async def _serve(house: House, ready: Callable[[House, str], None]) -> None:
    settings = house.settings
    if settings.jwt_key and settings.audience is None:
        say(logging.WARNING, "no_audience", hint="tokens for any aud are accepted")
    listeners = await open_listeners(settings.listen)
    async with trio.open_nursery() as nursery:
        await nursery.start(house.watch_signals, nursery.cancel_scope.cancel)
        await nursery.start(house.run, listeners)
        # What lives now lives on: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # With 8,000 sockets a full pass takes 0.56 s, in which all stands still; by
        # default there were several while they came. A socket leaves 0.8 KB of circles
        # (wsproto's), so one pass for about 150,000 of them is often enough.
        gc.set_threshold(5000, 10, 20)
        url = url_of(listeners[0])
        say(logging.INFO, "ready", url=url, **house.about | house.keyring.about())
        ready(house, url)
        notify(f"READY=1\nSTATUS=listening on {url}")
        await house.finished.wait()
        nursery.cancel_scope.cancel()


class House:
    """What a Server and a Proxy have in common: bounds, bulkhead and signals.

    Owns every connection that came in, each in a task of its own.
    """

    http: Callable[[trio.SocketStream], Http]  # makes what serves one connection
    sessions: AbstractSet[Endable]
    about: dict[str, object]  # what its line in the log says when it is ready

    def __init__(self, settings: Settings, stats: Stats, keyring: Keyring) -> None:
        self.settings = settings
        self.stats = stats
        self.keyring = keyring
        self.proxies = Proxies(settings.trusted_proxy)
        self.handshakes = Buckets(settings.handshakes, settings.buckets)
        self.open = 0  # TCP connections
        # Waiting for bytes, by age; True: idle, it has had the answers it asked for.
        self.parked: dict[trio.CancelScope, bool] = {}
        self.stopping = trio.Event()
        self.finished = trio.Event()
        self.complaints = Bucket(Rate(0.1, 1))  # log lines about a full house
        self.mistakes = Bucket(Rate(1, 10))  # and about our own

    async def run(  # noqa: ASYNC114 (only ever given to nursery.start)
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stopping` is set; then end every connection, and return.

        Owns the listeners.
        """
        async with self.below(), trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, connections)
                task_status.started()
                await self.stopping.wait()
                accepting.cancel_scope.cancel()
            deadline = trio.current_time() + self.settings.drain_seconds
            connections.cancel_scope.deadline = deadline
            for session in self.sessions:
                session.end(CLOSE_RESTART, "the server restarts")
            self._end_parked()
        self.finished.set()

    @contextlib.asynccontextmanager
    async def below(self) -> AsyncIterator[None]:
        """Run what the connections need, and what therefore outlives them."""
        yield

    async def _accept(
        self, listener: trio.SocketListener, connections: trio.Nursery
    ) -> None:
        """Take connections, each into a task of its own."""
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    self.complain("full", error.strerror)
                    await trio.sleep(0.1)
                    continue
                connections.start_soon(self._connection, stream)

    def complain(self, verb: str, why: object) -> None:
        """Warn of what may happen to every connection, but not that often."""
        if not self.complaints.take(trio.current_time()):
            say(logging.WARNING, verb, why=why, open=self.open)

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection. The bulkhead: nothing in it ends anything but it."""
        self.open += 1
        web: Http | None = None
        try:
            if self.open > self.settings.max_connections + 128 and not self._evict():
                await self._turn_away(stream)
                return
            web = self.http(stream)
            after = await web.run()
            web = None  # its 6 KB are not needed by a socket
            if after is not None:
                await after()
        except* trio.BrokenResourceError:
            pass
        except* Exception as group:  # the one bulkhead
            for error in leaves(group):
                self.stats.errors[type(error).__name__] += 1
                if not self.mistakes.take(trio.current_time()):
                    say_mistake("failed", error)
            if web is not None:
                await web.apologize()
        finally:
            self.open -= 1
            stream.socket.close()

    async def _turn_away(self, stream: trio.SocketStream) -> None:
        """Say that the house is full, politely while there are descriptors for it."""
        self.complain("full", "connections")
        with contextlib.suppress(OSError):
            os.write(stream.socket.fileno(), FULL_ANSWER)  # a new socket has room
        if self.open <= self.settings.max_connections + 192:
            await linger(stream, self.settings.linger_seconds)

    def _evict(self) -> bool:
        """Make room: end the connection that has waited longest for bytes."""
        for scope in self.parked:
            scope.cancel()
            del self.parked[scope]
            return True
        return False

    def park(self, scope: trio.CancelScope, *, idle: bool) -> None:
        """Note who waits for bytes, until it is taken out of `parked`."""
        self.parked[scope] = idle
        self._end_parked(scope)

    def _end_parked(self, *scopes: trio.CancelScope) -> None:
        """When we stop and no socket is left, end who keeps a connection for later.

        Who was taken from the backlog and has had no answer yet gets a second to ask:
        the next process cannot serve him any more.
        """
        if self.stopping.is_set() and not self.sessions:
            now, linger = trio.current_time(), self.settings.linger_seconds
            for scope in scopes or self.parked:
                end = now if self.parked[scope] else now + linger
                scope.deadline = min(scope.deadline, end)

    async def watch_signals(  # noqa: ASYNC114 (only ever given to nursery.start)
        self, at_once: Callable[[], None], *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Stop at the first SIGTERM or SIGINT; call at_once at the second."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                if self.stopping.is_set():
                    say(logging.WARNING, "stopping_at_once", signal=name)
                    at_once()
                    return
                say(logging.INFO, "stopping", signal=name, sockets=len(self.sessions))
                notify("STOPPING=1")
                self.stopping.set()

    # --- what connections ask --------------------------------------------------------

    def cors_headers(self, request: Request) -> list[tuple[str, str]]:
        """Tell a browser that a page of --origin may read the answer."""
        if not self.settings.origin:
            return []
        headers = [("Vary", "Origin")]
        origin = request.one("origin")
        if origin.lower() in self.settings.origin:
            headers.append(("Access-Control-Allow-Origin", origin))
            headers.append(("Access-Control-Expose-Headers", "Retry-After"))
        return headers

    def check_handshakes(self, address: Address | None) -> None:
        """Take one from the address's bucket. Raises Refusal rate_limited."""
        self._charge("handshakes", self.handshakes, address_key(address))

    def _charge(self, limit: str, buckets: Buckets, key: object) -> None:
        if wait := buckets.take(key, trio.current_time()):
            self.stats.rate_limited[limit] += 1
            raise Refusal("rate_limited", retry_after=wait)

    def admit_socket(self, request: Request, use: str = "socket") -> Claims:
        """Check the token of an upgrade. Raises Refusal."""
        token = request.argument("token")
        if not token:
            raise bad_token("token: it is missing in the query")
        return self.keyring.verify(token, use)


class Server(House):
    """The whole of one chatd: what all connections share, and the task tree's root."""

    def __init__(self, settings: Settings, store: Store, keyring: Keyring) -> None:
        super().__init__(settings, store.stats, keyring)
        self.store = store
        self.hub = Hub(settings, self.stats, store)
        keyring.revoked = store.revoked()
        self.pages = page_answers()
        size = settings.buckets
        self.sends = Buckets(settings.sends, size)
        self.typing = Buckets(settings.typing, size)
        self.requests = Buckets(settings.requests, size)
        self.names: dict[int, str] = {}  # what the store already knows
        self.http = functools.partial(HttpApi, self)
        self.sessions: set[Session] = set()
        self.about = {"db": settings.db, "sqlite": sqlite3.sqlite_version}

    # --- the task tree ---------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def below(self) -> AsyncIterator[None]:
        """Run store, hub and sweeper: the last answer has somebody to give it."""
        # Nothing waits between the two: while a batch is published the next gathers.
        batches, published = trio.open_memory_channel[Batch](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run, batches)
            nursery.start_soon(self.hub.run, published)
            sweeping = trio.CancelScope()
            nursery.start_soon(self._sweep, sweeping)
            yield
            sweeping.cancel()
            self.store.finish()

    async def serve_socket(self, stream: trio.SocketStream, upgrade: Upgrade) -> None:
        """Be a socket until it ends."""
        async with trio.open_nursery() as nursery:
            cut = nursery.cancel_scope.cancel
            outbox = Outbox(stream, nursery, self.settings, cut)
            outbox.push(switching_protocols(upgrade.key))
            session = Session(self, outbox, nursery, upgrade.claims, upgrade.cursor)
            try:
                await session.run(upgrade.trailing)
            finally:
                outbox.sealed = True  # nothing is written once the stream is closed
                cut()

    async def _sweep(self, sweeping: trio.CancelScope) -> None:
        """Once a second look at every seat's deadlines, and at the database file."""
        settings = self.settings
        with sweeping:
            while True:
                await trio.sleep(1)
                now, since = trio.current_time(), self.store.writing_since
                if since is None:  # else the writer looks; it may open the files anew
                    self.store.check_file()
                for session in list(self.sessions):
                    seat = session.seat
                    why = seat.sweep(now, settings)
                    if why is None:
                        seat.sweep_token(now, settings)
                        continue
                    self.stats.stalls += why == "stalled"
                    user, queued = session.claims.user_id, len(seat.outbox.buffer)
                    say(logging.INFO, "cut", user=user, why=why, queued=queued)
                    session.end(CUT, why)
                if since is None or now - since < settings.commit_seconds:
                    sick = "; no writing" if self.store.degraded else ""
                    state = f"WATCHDOG=1\nSTATUS=sockets: {len(self.sessions)}{sick}"
                    notify(state, wait_seconds=0)

    # --- what connections ask --------------------------------------------------------

    def check_origin(self, request: Request) -> None:
        """Let in programs (no Origin), our own page, and the pages of --origin."""
        origin = request.one("origin")
        if not origin or origin.lower() in self.settings.origin:
            return
        hosts = [request.one("host")]
        if self.proxies.trust(request.peer):
            hosts += request.fields.get("x-forwarded-host", [])
        if not same_origin(origin, hosts):
            raise Refusal("forbidden", "Origin: pages of this origin may not use chatd")

    def admit(self, request: Request, who: str) -> None:
        """Check that a request's token fits its route; set its claims."""
        if who == "anyone":
            return
        use = "signin" if who == "signin" else None
        request.claims = claims = self.keyring.verify(request.bearer(), use)
        if who in ("service", "stats") and who not in claims.scopes:
            raise Refusal("forbidden", f"the token must have scope {who}")
        if not claims.service:
            self._charge("requests", self.requests, claims.user_id)

    def check_house(self) -> None:
        """Refuse a socket that is one too many. Raises Refusal overloaded."""
        later = self.come_back_in()
        if len(self.sessions) >= self.settings.max_connections:
            self.complain("full", "sockets")
            raise Refusal("overloaded", retry_after=later)
        if self.stopping.is_set():
            raise Refusal("overloaded", "the server restarts", retry_after=later)

    async def remember(self, claims: Claims) -> None:
        """Store what a user is called, if that is new. That it fails stops nobody."""
        user_id, name = claims.user_id, claims.name
        if name is None or self.names.get(user_id) == name:
            return
        if len(self.names) >= self.settings.buckets:
            self.names.clear()
        with contextlib.suppress(Refusal):
            await self.store.do(self.store.rename, user_id, name)
            self.names[user_id] = name

    async def allow_send(self, claims: Claims, send: Send) -> Sent | None:
        """Ask the sender's bucket. Raises Refusal rate_limited.

        With an empty bucket a repeat is not refused: the message that it repeats is
        returned.
        """
        if claims.service:
            return None
        wait = self.sends.take(send.sender_id, trio.current_time())
        if not wait:
            return None
        if send.client_id is not None:
            # As of the head: what is not published yet is not answered yet.
            head = self.hub.head
            sent = await self.store.read(self.store.find_sent, send, head)
            if sent is not None:
                self.stats.duplicates += 1
                return sent
        self.stats.rate_limited["sends"] += 1
        raise Refusal("rate_limited", retry_after=wait)

    def count_sent(self, sent: Sent, sender_id: int) -> None:
        """Count an outcome; a repeat gets its token back."""
        if sent.duplicate:
            self.stats.duplicates += 1
            self.sends.give_back(sender_id)
        else:
            self.stats.messages += 1

    def parse_cursor(self, text: str | None) -> int | None:
        """Read a cursor's seq. None: unreadable, of another epoch, or of the future."""
        epoch, _, seq = (text or "").rpartition(".")
        if epoch != self.store.epoch or not re.fullmatch("[0-9]{1,16}", seq):
            return None
        return int(seq) if int(seq) <= self.hub.head else None

    def write_cursor(self, seq: int) -> str:
        """Write a cursor."""
        return f"{self.store.epoch}.{seq}"

    def come_back_in(self) -> float:
        """Spread those who come back: 500 a second, none in the first half second."""
        return round(random.uniform(0.5, 1 + len(self.sessions) / 500), 1)

    def revoke(self, user_id: int, revoked_at: int) -> int:
        """Refuse a user's tokens from now on; close his sockets and count them."""
        self.keyring.revoked[user_id] = revoked_at
        theirs = [s for s in self.sessions if s.claims.user_id == user_id]
        say(logging.INFO, "revoked", user=user_id, sockets=len(theirs))
        for session in theirs:
            session.end(CLOSE_SIGN_IN, "revoked: sign in again")
        return len(theirs)

    def opened(self, session: Session) -> None:
        """Count a socket in."""
        self.sessions.add(session)
        self.stats.total += 1
        say(logging.DEBUG, "joined", user=session.claims.user_id)

    def left(self, session: Session) -> None:
        """Count a socket out."""
        self.sessions.discard(session)
        self._end_parked()
        code, _ = session.verdict or (CUT, "")
        self.stats.closed[str(code)] += 1
        say(logging.DEBUG, "left", user=session.claims.user_id, code=code)

    def stats_document(self) -> dict[str, Any]:
        """Say what happened: did we lose anything; who was cut, and why?"""
        stats, store = self.stats, self.store

        def counted(*names: str) -> dict[str, Any]:
            return {name: getattr(stats, name) for name in names}

        return {
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - stats.started, 3),
            "connections": {
                "active": len(self.sessions),
                "users": len(self.hub.people),
                "catching_up": sum(not s.seat.live for s in self.sessions),
                **counted("total", "closed", "refused"),
            },
            "broadcast": counted(
                "events", "deliveries", "writes", "catch_ups", "stalls"
            ),
            "store": {
                **counted("commits", "messages", "batch_max", "duplicates", "failed"),
                "commit_seconds": stats.commit_seconds(),
                "degraded": store.degraded,
                "wal_bytes": store.wal_bytes(),
                "sqlite": sqlite3.sqlite_version,
            },
            **counted("resumes", "rate_limited", "errors"),
        }


class Endable(Protocol):
    """An open socket, as a house sees it."""

    def end(self, code: int, reason: str) -> None:
        """Close it, from anywhere."""


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """Walk the exceptions of a group, however deep."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


# =====================================================================================
# CONNECTION: the WebSocket reader and the session
#
# One task for each open socket: it reads a frame, handles the command in it, and reads
# on. A second task exists only while bytes wait for the client (Outbox), a third only
# while the client catches up (Session).
# =====================================================================================


class Ended(Exception):
    """The peer broke the protocol or a limit: with which code, and why, to close."""


class Guard(WebSocketConnection):
    """trio-websocket's connection, for peers that do not wish us well.

    Bare, the library counts characters instead of bytes and no fragments at all,
    answers pings while it closes (which raises), and leaves a protocol error without an
    answer. And it hands each message to a second task through a queue. Here its reader
    obeys the message itself, in the connection's one task: that took a message in a
    two-person chat from 160 us to 105, an idle connection from 31 KB to 18, and reading
    waits by itself while a command waits.

    It replaces private methods, so the version is pinned; each has a test.
    """

    # fmt: off
    # Beyond 30 attributes an instance's dict is no longer a shared one: 1.2 KB each.
    __slots__ = ("_bytes", "_fragments", "_most_bytes", "_most_fragments", "_obey",
                 "_outbox", "_parts")
    # fmt: on

    # The library closes and sets these. Nobody here waits for a handshake, a pong or a
    # message, and one task alone sends: so all connections share them. 3 KB each.
    _nobody_hears = trio.open_memory_channel[str | bytes](0)
    _nobody_waits = trio.Event()
    _nobody_pings: ClassVar[OrderedDict[bytes, trio.Event]] = OrderedDict()
    _nobody_else_sends = contextlib.nullcontext()

    def __init__(
        self,
        outbox: Outbox,
        settings: Settings,
        trailing: bytes,
        obey: Callable[[str | bytes], Awaitable[None]],
    ) -> None:
        # The handshake was ours: wsproto starts open, with what came behind it.
        opened = Connection(ConnectionType.SERVER, trailing_data=trailing)
        super().__init__(
            outbox,
            opened,  # type: ignore[arg-type]  # the open half of a WSConnection
            message_queue_size=0,
            max_message_size=sys.maxsize,
            receive_buffer_size=8192,
        )
        self._connection_proposal = None
        self._send_channel, self._recv_channel = self._nobody_hears
        self._open_handshake = self._close_handshake = self._nobody_waits
        self._for_testing_peer_closed_connection = self._nobody_waits
        self._pings = self._nobody_pings
        self._stream_lock = self._nobody_else_sends  # type: ignore[assignment]
        self._outbox = outbox
        self._obey = obey
        self._most_bytes = settings.max_message_bytes
        self._most_fragments = settings.fragments
        self._parts: list[Any] = []
        self._bytes = 0
        self._fragments = 0

    async def read(self) -> None:
        """Read and obey until the peer closes or has gone. Raises Ended."""
        await self._reader_task()

    async def _handle_ping_event(self, event: wsproto.events.Ping) -> None:
        self._outbox.charge()
        self._outbox.pong(bytes(event.payload))

    async def _handle_pong_event(self, event: wsproto.events.Pong) -> None:
        self._outbox.charge()  # that it was heard is all that counts

    async def _handle_close_connection_event(
        self, event: wsproto.events.CloseConnection
    ) -> None:
        if self._wsproto.state is ConnectionState.OPEN:  # no close came: it is a fault
            raise Ended(int(event.code), event.reason or "")
        await super()._handle_close_connection_event(event)

    async def _handle_message_event(
        self, event: wsproto.events.BytesMessage | wsproto.events.TextMessage
    ) -> None:
        self._outbox.charge()
        data = event.data
        self._bytes += len(data.encode() if isinstance(data, str) else data)
        self._fragments += event.frame_finished
        if self._bytes > self._most_bytes:
            raise Ended(CLOSE_TOO_BIG, f"more than {self._most_bytes} bytes")
        if self._fragments > self._most_fragments:
            raise Ended(CLOSE_TOO_BIG, f"more than {self._most_fragments} fragments")
        self._parts.append(data)
        if not event.message_finished:
            return
        parts, self._parts = self._parts, []
        self._bytes = self._fragments = 0
        message = "".join(parts) if isinstance(data, str) else b"".join(parts)
        try:
            await self._obey(message)
        except KeyError as error:
            # The library would take it for an event that it does not know.
            raise RuntimeError("a KeyError while obeying") from error


class Session:
    """One socket after its 101: greet, read commands, close. Owns its seat.

    Commands enter the store's channel in the order read, put there by the reader
    itself; answers come back as calls of a plain def. So there is one task at rest.
    """

    def __init__(
        self,
        server: Server,
        outbox: Outbox,
        nursery: trio.Nursery,
        claims: Claims,
        cursor: str | None,
    ) -> None:
        self.server = server
        self.outbox = outbox
        self.nursery = nursery
        self.claims = claims
        self.cursor = cursor
        self.reading = trio.CancelScope()
        self.verdict: tuple[int, str] | None = None  # why we close, if it is us
        self.bucket = Bucket(server.settings.commands)
        self.refused = 0  # commands in a row over the rate
        settings = server.settings
        self.seat = Seat(outbox, settings=settings, behind=self._behind, end=self.end)
        self._set_token(claims)
        self.seat.warned = True  # of nothing yet: `connected` is the first frame

    async def run(self, trailing: bytes) -> None:
        """Live one connection's life. Its nursery is cancelled by the caller then.

        trailing is what the peer sent right behind its handshake.
        """
        server = self.server
        server.opened(self)
        if server.keyring.is_revoked(self.claims):  # since the token was checked
            self.end(CLOSE_SIGN_IN, "revoked: sign in again")
        upto = server.hub.head
        # Register first, read second: what is published meanwhile is not missed.
        entered = server.hub.enter(self.seat, self.claims.user_id, upto)
        guard = Guard(self.outbox, server.settings, trailing, self._hear)
        try:
            try:
                with self.reading:
                    if not entered:
                        self.end(CLOSE_TOO_MANY, "this user has too many connections")
                    elif await self._greet(upto):
                        await guard.read()
            except Ended as fault:
                self.verdict = self.verdict or fault.args
            if guard.closed is not None and self.verdict is None:
                self.verdict = (guard.closed.code, guard.closed.reason or "")
            await self._close()
        finally:
            if entered:
                server.hub.leave(self.seat)
            server.left(self)
            # They refer to us, and we to the seat. Without the circle all of this is
            # freed at once; with it, it would wait for a full pass of the collector.
            del self.seat.behind, self.seat.end

    def end(self, code: int, reason: str) -> None:
        """Close this connection, from anywhere; the first who says so is heard.

        CUT ends it at once: a peer that takes no bytes would not get a close frame.
        """
        if self.verdict is None:
            self.verdict = (code, reason)
            self.reading.cancel()
        if code == CUT:
            self.nursery.cancel_scope.cancel()

    # --- joining ---------------------------------------------------------------------

    async def _greet(self, upto: int) -> bool:
        """Read where this user stands; say `connected`. False: it cannot be read."""
        store, hub = self.server.store, self.server.hub
        start, user_id = self.server.parse_cursor(self.cursor), self.claims.user_id
        since = upto if start is None else start
        try:
            greeting = await store.read(store.greeting, user_id, upto, since)
        except Refusal as no:
            self.outbox.push(error_frame(no))
            self.end(CLOSE_LATER, "the database cannot be read: come back later")
            return False
        if self.cursor is None:
            resume = "fresh"
        elif start is None or greeting.missed is None:
            resume = "resync"
        else:
            resume = "replay" if greeting.missed else "live"
        self.server.stats.resumes[resume] += 1
        if start is None or resume == "resync":
            start = upto
        hub.know(self.seat.person, greeting.joined)
        self.seat.cursor = start
        connected = Connected(
            user_id=user_id,
            timestamp=timestamp(now_seconds()),
            cursor=self.server.write_cursor(start),
            resume=resume,
            expires_in=self.claims.expires_in(),
            chats=greeting.marks,
        )
        self._answer(text_frame(connected))
        self.seat.warned = False
        if hub.in_tail(start):
            hub.feed(self.seat)
        if not self.seat.live:
            self._behind()
        return True

    def _behind(self) -> None:
        self.server.stats.catch_ups += 1
        self.nursery.start_soon(self._catch_up)

    async def _catch_up(self) -> None:
        """Give the seat what it missed, as fast as its peer takes it, until it is live.

        From the tail, without waiting, if it is all there; else from the log in pages.
        """
        store, hub, seat = self.server.store, self.server.hub, self.seat
        user_id, limit = self.claims.user_id, self.server.settings.page_events
        person = seat.person
        while not seat.live:
            await trio.lowlevel.checkpoint()  # one helping each, then the others
            await self.outbox.empty()
            if self.outbox.sealed:
                return
            if hub.in_tail(seat.cursor):
                hub.feed(seat)
                continue
            try:
                person.replaying = person.replaying or trio.Lock()
                async with person.replaying:
                    where = (user_id, seat.cursor, hub.head, limit)
                    page = await store.read(store.events_after, *where)
            except Refusal:
                self.end(CLOSE_LATER, "the log cannot be read: keep your cursor")
                return
            hub.give_page(seat, page)

    # --- commands --------------------------------------------------------------------

    async def _hear(self, text: str | bytes) -> None:
        """Obey one command, in the reader's own task: nothing is read meanwhile."""
        if self.verdict is not None:
            return  # it came in one piece with what ended the connection
        if self.outbox.full:
            await self.outbox.room()
        try:
            self._check_rate()
            if isinstance(text, bytes):
                raise Refusal("bad_json", "a binary message; send JSON as text")
            command = parse(text, COMMANDS)
        except Refusal as no:
            self._answer(error_frame(no, _ref_of(text)))
            return
        try:
            await self._obey(command)
        except Refusal as no:
            self._answer(error_frame(no, command.ref))

    def _check_rate(self) -> None:
        wait = self.bucket.take(trio.current_time())
        if not wait:
            self.refused = 0
            return
        self.refused += 1
        self.server.stats.rate_limited["commands"] += 1
        if self.refused >= self.server.settings.refused_in_a_row:
            self.end(CLOSE_FLOOD, "far over the rate of commands")
        raise Refusal("rate_limited", retry_after=wait)

    async def _obey(self, command: Command) -> None:
        """Do one command. Raises the Refusal that is its answer."""
        match command:
            case SendMessage():
                await self._send(command)
            case Typing():
                self._type(command)
            case MarkRead():
                await self._mark_read(command)
            case Ping(ref=ref):
                self._answer(text_frame(Pong(timestamp(now_seconds()), ref)))
            case Auth():
                self._auth(command)

    def _answer(self, frame: bytes) -> None:
        self.outbox.push(frame, always=True)

    async def _submit(
        self,
        ref: str | None,
        work: Callable[[Db, Log], T],
        reply: Callable[[T, str | None], Reply],
    ) -> None:
        """Queue a work; at most 64 of this connection are without an answer."""

        def done(outcome: T | Refusal) -> Reply:
            if isinstance(outcome, Refusal):
                return Reply(error_frame(outcome, ref), 0)
            return reply(outcome, ref)

        try:
            self.seat.slots.acquire_nowait()  # no turn for nothing: see Store.submit
        except trio.WouldBlock:
            await self.seat.slots.acquire()
        try:
            await self.server.store.submit(Job(work, done, self.seat))
        except trio.Cancelled:
            self.seat.slots.release()  # it was not queued: nothing will answer it
            raise

    async def _send(self, command: SendMessage) -> None:
        server, user_id = self.server, self.claims.user_id
        check_content(command.content, server.settings)
        send = Send(command.chat_id, user_id, command.content, command.client_id)
        if sent := await server.allow_send(self.claims, send):
            await self.seat.slots.acquire()
            self.seat.answer(_sent_reply(sent, command.ref))
            return
        service = self.claims.service

        def reply(sent: Sent, ref: str | None) -> Reply:
            server.count_sent(sent, user_id)
            return _sent_reply(sent, ref)

        await self._submit(
            command.ref,
            lambda db, log: server.store.send_message(db, log, send, service),
            reply,
        )

    async def _mark_read(self, command: MarkRead) -> None:
        store, user_id = self.server.store, self.claims.user_id
        await self._submit(
            command.ref,
            lambda db, log: store.mark_read(db, log, user_id, command.message_id),
            lambda marked, ref: Reply(text_frame(Ack(ref=ref)), marked.seq),
        )

    def _type(self, command: Typing) -> None:
        user_id, chat_id = self.claims.user_id, command.chat_id
        if chat_id not in self.seat.person.chats:
            raise no_chat()
        if self.server.typing.take((user_id, chat_id), trio.current_time()):
            self.server.stats.rate_limited["typing"] += 1
            return
        self.server.hub.show_typing(user_id, chat_id, command.is_typing)

    def _auth(self, command: Auth) -> None:
        """Live on with a newer token. A bad one changes nothing."""
        claims = self.server.keyring.verify(command.token, "socket")
        if claims.user_id != self.claims.user_id:
            self.end(CLOSE_SIGN_IN, "this is another user's token: sign in again")
            raise Refusal("forbidden", "token: it is another user's")
        self.server.keyring.spend(claims)
        self._set_token(claims)
        self._answer(text_frame(Ack(ref=command.ref, expires_in=claims.expires_in())))

    def _set_token(self, claims: Claims) -> None:
        self.claims = claims
        self.seat.token_ends = trio.current_time() + claims.ends - time.time()
        self.seat.warned = False

    # --- closing ---------------------------------------------------------------------

    async def _close(self) -> None:
        """Say why, let it arrive, and end. Our closes are ours, not the library's."""
        code, reason = self.verdict or (CLOSE_NORMAL, "")
        settings = self.server.settings
        if code == CLOSE_RESTART:
            # Half of the drain at most: the close has to go out before all is cut.
            if self.seat.slots.value < settings.unanswered:
                with trio.move_on_after(settings.drain_seconds / 2):
                    for _ in range(settings.unanswered):
                        await self.seat.slots.acquire()  # all back: all answered
            self._answer(text_frame(Bye(self.server.come_back_in())))
        if code != CUT:
            self.outbox.seal(close_frame(code, reason))
        await self.outbox.finish()


def _ref_of(text: str | bytes) -> str | None:
    """Read the ref of a command that is wrong, if it can be read."""
    try:
        return ONLY_REF.decode(text).ref
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def _sent_reply(sent: Sent, ref: str | None) -> Reply:
    message = sent.message
    ack = Ack(
        ref=ref,
        client_id=message.client_id,
        message_id=message.id,
        chat_id=message.chat_id,
        n=message.n,
        created_at=message.created_at,
        duplicate=sent.duplicate,
    )
    return Reply(text_frame(ack), message.id)


# =====================================================================================
# STORE: the event log on disk
#
# `seq` orders everything, so "what did this client miss" is a comparison of two
# integers, and every way to catch up is the same query with other bounds. One task
# writes, in one worker thread and on one connection: it takes every job that waits and
# runs them in one transaction. Reads use connections of their own in at most four
# threads. An event is durable when COMMIT has returned, and published only then.
# =====================================================================================


class Send(NamedTuple):
    """What identifies a message: repeated under the same client_id, it is the same."""

    chat_id: int
    sender_id: int
    content: str
    client_id: str | None = None


class Sent(NamedTuple):
    """Outcome of a send. The message's id is its event's seq."""

    message: Message
    duplicate: bool


class Marked(NamedTuple):
    """Outcome of mark_read. seq is that of the event, 0 if nothing moved."""

    message_id: int
    chat_id: int
    n: int
    seq: int


class Greeting(NamedTuple):
    """What a socket starts with. joined: chat -> joined_seq. missed: None, too many."""

    joined: dict[int, int]
    marks: dict[str, Marks]
    missed: int | None


class Page(NamedTuple):
    """A stretch of the log for one user: everything visible in (start, cursor]."""

    events: Log
    cursor: int
    more: bool


class Reply(NamedTuple):
    """A frame for the caller's own socket, not to be written before event `seq`."""

    frame: bytes
    seq: int


class Job(NamedTuple):
    """Something to write, and whom to tell.

    work runs in the writer's thread, inside the transaction; it appends the events it
    makes. done runs on the main thread when the hub has published them; it gets what
    work returned, or the Refusal it raised.
    """

    work: Callable[[Db, Log], Any]
    done: Callable[[Any], Reply | None]
    seat: Seat | None = None


class Batch(NamedTuple):
    """One transaction's events, and its callers with their outcomes."""

    events: Log
    answers: list[tuple[Job, Any]]


class Event:
    """One row of the log, in memory: whom it is for, and what they are told.

    The frame is built at the first use, once; a chat_added has one reader, so its
    frame, which can be large, is not kept.
    """

    __slots__ = ("_frame", "chat_id", "seq", "size", "to_chat", "to_user", "wire")

    def __init__(
        self, wire: Wire, *, to_chat: bool, to_user: int | None = None, size: int = 256
    ) -> None:
        self.wire = wire
        self.seq = wire.seq
        self.chat_id = wire.chat_id
        self.to_chat = to_chat
        self.to_user = to_user
        self.size = size  # about how many bytes of memory it takes, in the tail
        self._frame: bytes | None = None

    @property
    def kind(self) -> str:
        """Its `type` on the wire."""
        return str(self.wire.__struct_config__.tag)

    @property
    def frame(self) -> bytes:
        """The event's bytes on the wire."""
        if self._frame is not None:
            return self._frame
        built = text_frame(self.wire)
        if type(self.wire) is not ChatAdded:
            self._frame = built
        return built


Log = list[Event]

# Which events a user sees: those of the chats he is in, since he joined, and those told
# to him alone. Each chat gives at most :limit rows by index, so a page costs the same
# whatever the length of the log, and however far behind the reader is.
#
# "Is in" is as of :upto too. A removal that is on disk and not yet published has taken
# the member's row away; without the second half of MINE a reader of that moment would
# skip what was said before, and then be told live what was said after that.
MINE = """
    SELECT chat_id, joined_seq FROM member WHERE user_id = :user
    UNION
    SELECT gone.chat_id, joined.seq FROM event gone CROSS JOIN event joined
    WHERE gone.to_user = :user AND gone.seq > :upto AND gone.kind = 'member_removed'
      AND joined.kind = 'chat_added' AND joined.seq = (
        SELECT seq FROM event
        WHERE to_user = :user AND seq <= :upto AND chat_id = gone.chat_id
          AND kind IN ('chat_added', 'member_removed') ORDER BY seq DESC LIMIT 1)
"""

VISIBLE = f"""
    SELECT e.seq FROM ({MINE}) mine CROSS JOIN event e
    WHERE e.seq IN (
        SELECT x.seq FROM event x
        WHERE x.chat_id = mine.chat_id AND x.to_chat = 1
          AND x.seq > max(:cursor, mine.joined_seq) AND x.seq <= :upto
        ORDER BY x.seq LIMIT :limit)
    UNION ALL
    SELECT seq FROM (
        SELECT seq FROM event
        WHERE to_user = :user AND seq > :cursor AND seq <= :upto
        ORDER BY seq LIMIT :limit)
"""
COUNT_VISIBLE = f"SELECT count(*) FROM ({VISIBLE} LIMIT :limit)"

MESSAGE_COLUMNS = (
    "m.id, m.chat_id, m.sender_id, m.content, m.created_at, m.n, m.client_id"
)
MESSAGES = f"SELECT {MESSAGE_COLUMNS} FROM message m"

EVENTS = f"""
    SELECT e.seq, e.kind, e.chat_id, e.to_chat, e.to_user, e.user_id, u.name,
           {MESSAGE_COLUMNS}
    FROM event e LEFT JOIN message m ON m.id = e.message_id
                 LEFT JOIN user u ON u.id = e.user_id
"""

PAGE = f"""{EVENTS} WHERE e.seq IN
    (SELECT seq FROM ({VISIBLE}) ORDER BY seq LIMIT :limit) ORDER BY e.seq"""
IS_MEMBER = "SELECT 1 FROM member WHERE chat_id = ? AND user_id = ?"
SET_READ_N = "UPDATE member SET read_n = ? WHERE chat_id = ? AND user_id = ?"
APPLICATION_ID = 0x63686174  # "chat": says whose file this is


def one(db: Db, sql: str, *values: Any) -> Any:
    """Run a query for one value: the first column of the first row, or None."""
    row = db.execute(sql, values).fetchone()
    return row[0] if row else None


def outcome_of(outcome: T | Refusal) -> T:
    """Return what a work returned, or raise the Refusal that it raised."""
    if isinstance(outcome, Refusal):
        raise outcome
    return outcome


class Store:
    """The database. One task and one connection write; at most 4 threads read.

    A write is a Job in a bounded channel. `run` takes all that wait, runs them in ONE
    transaction, and hands the batch to the hub: while one is in fsync the next gathers,
    so under load the price of the fsync is shared (measured: 342 us for a message
    alone, 11 us in a batch of 64).

    run_sync is the seam for tests: the default runs a function in a thread; inline it
    works under virtual time.
    """

    def __init__(
        self,
        settings: Settings,
        stats: Stats,
        *,
        run_sync: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
        steps: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings
        self.stats = stats
        self.path = settings.db
        self.degraded = False
        self.writing_since: float | None = None  # of the commit under way
        self._run_sync = run_sync
        self._idle_readers: list[Db] = []
        self._read_limiter = trio.CapacityLimiter(settings.readers)
        self._write_limiter = trio.CapacityLimiter(1)
        self._submit, self._inbox = trio.open_memory_channel[Job](4096)
        self._io_errors = 0  # in a row
        self._writer = db = prepare_database(
            self.path, steps or schema_steps(), settings.check_bytes
        )
        with told_of("database", self.path), contextlib.ExitStack() as undo:
            undo.callback(db.close)
            self.epoch: str = one(db, "SELECT value FROM meta WHERE key = 'epoch'")
            # The last that was committed and handed to the hub.
            self.seq: int = one(db, "SELECT coalesce(max(seq), 0) FROM event")
            undo.pop_all()
        self._files = self._inodes()

    def close(self) -> None:
        """Fold the log of changes into the file, and close. Nothing may run."""
        for db in self._idle_readers:
            db.close()
        with contextlib.suppress(sqlite3.Error):  # a sick disk: it is all in the WAL
            self._writer.execute("PRAGMA optimize")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()

    # --- writing: the task -----------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Queue a job, in order. Waits while 4,096 others wait, and only then.

        A job that need not wait costs no turn of the scheduler, so commands that came
        in one read get into one commit (measured, 32 in flight: 12 a commit with a turn
        each, 32 without).
        """
        try:
            self._submit.send_nowait(job)
        except trio.WouldBlock:
            await self._submit.send(job)

    async def do(
        self,
        work: Callable[..., T],
        *args: Any,
        then: Callable[[T], object] = lambda _: None,
    ) -> T:
        """Run work(db, log, *args); wait until it is on disk and published.

        Raises its Refusal. then gets what it returned, in the same turn. If the caller
        is cancelled both happen all the same.
        """
        answered = trio.Event()
        outcomes: list[T | Refusal] = []

        def done(outcome: T | Refusal) -> None:
            if not isinstance(outcome, Refusal):
                then(outcome)
            outcomes.append(outcome)
            answered.set()

        await self.submit(Job(lambda db, log: work(db, log, *args), done))
        await answered.wait()
        return outcome_of(outcomes[0])

    def write_now(self, work: Callable[..., T], *args: Any) -> T:
        """Do it here and now. Only while `run` does not."""
        job = Job(lambda db, log: work(db, log, *args), lambda _: None)
        outcome: T | Refusal = self._transact([job]).answers[0][1]
        return outcome_of(outcome)

    def finish(self) -> None:
        """Take no more jobs: `run` ends when those that wait are done."""
        self._submit.close()

    async def run(self, hub: trio.MemorySendChannel[Batch]) -> None:
        """Write what is submitted, until `finish`. Closes the hub's channel."""
        async with hub:
            async for job in self._inbox:
                jobs = await self._gather(job)
                while jobs:
                    batch = await self._write(self._transact, jobs)
                    jobs = jobs[len(batch.answers) :]
                    await hub.send(batch)
                while self.degraded:
                    await self._heal(hub)

    async def _gather(self, first: Job) -> list[Job]:
        """Take all that waits, as long as a turn of the scheduler brings more.

        So frames that many sockets got at the same time come into one commit.
        """
        jobs, before, most = [first], 0, self.settings.batch_jobs
        while before < len(jobs) < most:
            before = len(jobs)
            await trio.lowlevel.checkpoint()
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while len(jobs) < most:
                    jobs.append(self._inbox.receive_nowait())
        return jobs

    async def _write(self, function: Callable[..., Batch], *args: Any) -> Batch:
        self.writing_since = trio.current_time()
        try:
            batch: Batch = await self._run_sync(
                function, *args, limiter=self._write_limiter
            )
        finally:
            self.writing_since = None
        return batch

    async def _heal(self, hub: trio.MemorySendChannel[Batch]) -> None:
        """After a failure: refuse what comes for 2 s, then try one small write."""
        deadline = trio.current_time() + self.settings.probe_seconds
        while True:
            # The scope holds only the wait: what was received is always answered.
            with trio.move_on_at(deadline) as scope:
                try:
                    job = await self._inbox.receive()
                except trio.EndOfChannel:
                    self.degraded = False  # stopping: there is nobody left to refuse
                    return
            if scope.cancelled_caught:
                break
            await hub.send(self._storage_failed([job]))
        await hub.send(await self._write(self._probe))

    def _storage_failed(self, jobs: list[Job]) -> Batch:
        self.stats.failed += len(jobs)
        no = Refusal("storage_failed", retry_after=self.settings.probe_seconds)
        return Batch([], [(job, no) for job in jobs])

    # --- writing: in the writer's thread ---------------------------------------------

    def _transact(self, jobs: list[Job]) -> Batch:
        """Run jobs in one transaction. Never raises an sqlite3.Error: it is an answer.

        SQLite throws away the whole transaction on a full disk or an I/O error, and a
        next SAVEPOINT would quietly open one of its own: so one error ends the batch.
        A failed commit is *unknown*: it may be in the file all the same. Then it is
        found, and published, by `_probe` before anything else is written.
        """
        started = time.perf_counter()
        log: Log = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            answers = []
            for job in jobs:
                answers.append((job, self._run_one(job, log)))
                if len(log) >= self.settings.batch_events:
                    break  # a large chat was made: the other jobs come next
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            self._failed(error)
            return self._storage_failed(jobs)
        self._committed(log)
        self.stats.committed(time.perf_counter() - started, len(jobs))
        return Batch(log, answers)

    def _run_one(self, job: Job, log: Log) -> Any:
        """Run one job in a savepoint: a refused one does not sink the others."""
        db, before = self._writer, len(log)
        db.execute("SAVEPOINT job")
        try:
            outcome = job.work(db, log)
        except (Refusal, sqlite3.IntegrityError, OverflowError) as error:
            db.execute("ROLLBACK TO job")
            db.execute("RELEASE job")
            del log[before:]
            if isinstance(error, Refusal):
                return error
            self.stats.errors[type(error).__name__] += 1
            why = "a broken rule of the schema"
            say(logging.ERROR, "refused", why=why, error=error)
            return Refusal("internal")
        db.execute("RELEASE job")
        return outcome

    def _committed(self, log: Log) -> None:
        self.check_file()
        self.seq += len(log)
        self._io_errors = 0

    def _failed(self, error: sqlite3.Error | OSError) -> None:
        """Be degraded. After an I/O error open the file anew; three in a row end us."""
        self.degraded = True
        name = getattr(error, "sqlite_errorname", "?")
        say(logging.ERROR, "storage_failed", db=self.path, code=name, error=error)
        with contextlib.suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        if name.startswith("SQLITE_IOERR") and self._has_room():
            self._io_errors += 1
            if self._io_errors >= 3:
                raise UsageError(f"database {self.path}: {error}, 3 times in a row")
            self._writer.close()
            with told_of("database", self.path):
                self._writer = open_database(self.path, readonly=False)
                one(self._writer, "SELECT count(*) FROM meta")  # makes the -wal anew
            self._files = self._inodes()

    def _has_room(self) -> bool:
        """Is it a sick disk, not a full one? SQLite calls only ENOSPC full.

        A quota, or a limit of the file's size, is an I/O error to it. We try ourselves
        to write where the -wal would grow.
        """
        try:
            with tempfile.TemporaryFile(dir=self.path.parent) as file:
                os.pwrite(file.fileno(), bytes(65536), self.wal_bytes())
        except OSError as error:
            return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return True

    def _probe(self) -> Batch:
        """Try to write as much as some messages; then publish what the log holds above.

        A row alone might find a place where no message does, again and again.
        """
        db = self._writer
        with contextlib.suppress(sqlite3.Error):
            # What fills the disk may be the log of changes: a file of 4 MB that only
            # commits would fold into the database, and there are none.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        try:
            for text in ("x" * 65536, str(time.time())):
                db.execute("BEGIN IMMEDIATE")
                db.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", (text,))
                db.execute("COMMIT")
            sync_wal(self.path)
            found = self._above(db, self.seq)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return Batch([], [])
        self._committed(found)
        self.degraded = False
        say(logging.WARNING, "storage_recovered", db=self.path, found=len(found))
        return Batch(found, [])

    def check_file(self) -> None:
        """Raise UsageError if our file is no longer the one of that name.

        SQLite goes on happily with a file that was removed, and every ack would be a
        lie. The look costs 4 us a commit.
        """
        if self._inodes() != self._files:
            raise UsageError(f"database {self.path}: removed or replaced under us")

    def _inodes(self) -> list[int]:
        """Which files stand at our names, the -wal too: it holds the newest rows."""
        found = []
        for path in (self.path, beside(self.path, "-wal")):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.stat().st_ino)
        return found

    # --- writing: the works ----------------------------------------------------------
    # Each runs inside the transaction: db is the writer's connection, log are the
    # batch's events so far, to which it appends its own.

    def _next_seq(self, log: Log) -> int:
        return self.seq + len(log) + 1

    def _record(
        self,
        db: Db,
        log: Log,
        event: Event,
        user_id: int | None = None,
        message_id: int | None = None,
    ) -> None:
        log.append(event)
        db.execute(
            """INSERT INTO event
               (seq, kind, chat_id, to_chat, to_user, user_id, message_id)
               VALUES (?, ?, ?, ?, ?, ?, ?)""",
            (event.seq, event.kind, event.chat_id, event.to_chat,
             event.to_user, user_id, message_id),
        )  # fmt: skip

    def send_message(self, db: Db, log: Log, send: Send, service: bool = False) -> Sent:
        """Store a message, once: a repeat of (sender_id, client_id) is answered alike.

        A service may send for somebody who is not a member. Raises Refusal not_found,
        idempotency_mismatch.
        """
        if sent := self.find_sent(db, send):
            return sent
        chat_id, sender_id, content, client_id = send
        last_n, is_member, is_chat = db.execute(
            """SELECT (SELECT coalesce(max(n), 0) FROM message WHERE chat_id = ?1),
               EXISTS (SELECT 1 FROM member WHERE chat_id = ?1 AND user_id = ?2),
               EXISTS (SELECT 1 FROM chat WHERE id = ?1)""",
            (chat_id, sender_id),
        ).fetchone()
        if not (is_member or (service and is_chat)):
            raise no_chat()
        if not is_member:
            self._know(db, sender_id)
        seq, n, now = self._next_seq(log), last_n + 1, now_seconds()
        row = (seq, chat_id, sender_id, content, now, n, client_id)
        db.execute(
            """INSERT INTO message
               (id, chat_id, sender_id, content, created_at, n, client_id)
               VALUES (?, ?, ?, ?, ?, ?, ?)""",
            row,
        )
        db.execute(SET_READ_N, (n, chat_id, sender_id))
        message = message_of(row)
        self._record(db, log, message_event(message), message_id=seq)
        return Sent(message, duplicate=False)

    def find_sent(self, db: Db, send: Send, upto: int = MAX_ID) -> Sent | None:
        """Find what this sender sent under this key. Raises idempotency_mismatch."""
        if send.client_id is None:
            return None
        row = db.execute(
            f"{MESSAGES} WHERE sender_id = ? AND client_id = ? AND id <= ?",
            (send.sender_id, send.client_id, upto),
        ).fetchone()
        if row is None:
            return None
        message = message_of(row)
        if (message.chat_id, message.content) != (send.chat_id, send.content):
            raise Refusal("idempotency_mismatch")
        return Sent(message, duplicate=True)

    def mark_read(self, db: Db, log: Log, user_id: int, message_id: int) -> Marked:
        """Move the reader up to a message, never down. Raises Refusal not_found."""
        row = db.execute(
            """SELECT m.chat_id, m.n, b.read_n FROM message m
               JOIN member b ON b.chat_id = m.chat_id AND b.user_id = ?
               WHERE m.id = ?""",
            (user_id, message_id),
        ).fetchone()
        if row is None:
            raise Refusal("not_found", "message_id: there is no such message for you")
        chat_id, n, read_n = row
        if n <= read_n:
            return Marked(message_id, chat_id, n, 0)
        db.execute(SET_READ_N, (n, chat_id, user_id))
        # In a large chat everybody's marks to everybody would grow as the square.
        most = self.settings.large_chat
        members = "SELECT 1 FROM member WHERE chat_id = ? LIMIT ?"
        large = one(db, f"SELECT count(*) FROM ({members})", chat_id, most + 1) > most
        seq = self._next_seq(log)
        wire = MessageRead(seq, message_id, chat_id, user_id, n)
        event = Event(wire, to_chat=not large, to_user=user_id if large else None)
        self._record(db, log, event, user_id, message_id)
        return Marked(message_id, chat_id, n, seq)

    def create_chat(
        self, db: Db, log: Log, title: str | None, member_ids: Iterable[int]
    ) -> Chat:
        """Make a chat and tell each of its members. Raises Refusal bad_field."""
        members = sorted(set(member_ids))
        self._check_size(len(members))
        sql = "INSERT INTO chat (title, created_at) VALUES (?, ?) RETURNING id"
        chat_id: int = one(db, sql, title, now_seconds())
        first = self._next_seq(log)
        for seq, user_id in enumerate(members, first):
            self._join(db, chat_id, user_id, seq)
        chat = self.chat(db, chat_id, first)
        raw = msgspec.Raw(encode(chat))
        size = 256 + len(raw) // (len(members) or 1)  # they share it
        for seq, user_id in enumerate(members, first):
            wire = ChatAdded(seq, chat_id, raw)
            event = Event(wire, to_chat=False, to_user=user_id, size=size)
            self._record(db, log, event, user_id)
        return chat

    def add_member(
        self, db: Db, log: Log, chat_id: int, user_id: int, by: int | None
    ) -> bool:
        """Add a user: the members are told, then he. False if he was there already.

        by is the member who adds, None for a service. Raises Refusal not_found.
        """
        self._find_chat(db, chat_id, by)
        if one(db, IS_MEMBER, chat_id, user_id):
            return False
        sql = "SELECT count(*) FROM member WHERE chat_id = ?"
        self._check_size(one(db, sql, chat_id) + 1)
        name = self.name(db, user_id)
        told = MemberAdded(self._next_seq(log), chat_id, user_id, name)
        seq = told.seq + 1
        self._join(db, chat_id, user_id, seq)
        self._record(db, log, Event(told, to_chat=True), user_id)
        raw = msgspec.Raw(encode(self.chat(db, chat_id, seq)))
        added, size = ChatAdded(seq, chat_id, raw), 256 + len(raw)
        event = Event(added, to_chat=False, to_user=user_id, size=size)
        self._record(db, log, event, user_id)
        return True

    def remove_member(
        self, db: Db, log: Log, chat_id: int, user_id: int, by: int | None
    ) -> None:
        """Remove a user, by himself or by a service (by=None). Raises not_found."""
        self._find_chat(db, chat_id, by)
        sql = "DELETE FROM member WHERE chat_id = ? AND user_id = ?"
        if not db.execute(sql, (chat_id, user_id)).rowcount:
            raise Refusal("not_found", "user_id: not a member of this chat")
        wire = MemberRemoved(self._next_seq(log), chat_id, user_id)
        self._record(db, log, Event(wire, to_chat=True, to_user=user_id), user_id)

    def rename(self, db: Db, _log: Log, user_id: int, name: str) -> None:
        """Remember what a user is called. It is no event: who looks sees it."""
        sql = """INSERT INTO user (id, name) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET name = ?2 WHERE name IS NOT ?2"""
        db.execute(sql, (user_id, name))

    def revoke(self, db: Db, _log: Log, user_id: int) -> int:
        """Remember that all tokens so far are refused. Returns the Unix second."""
        now = now_seconds()
        sql = """INSERT INTO user (id, revoked_at) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET revoked_at = ?2"""
        db.execute(sql, (user_id, now))
        return now

    def _join(self, db: Db, chat_id: int, user_id: int, seq: int) -> None:
        """Make him a member who has read all there is."""
        self._know(db, user_id)
        db.execute(
            """INSERT INTO member (chat_id, user_id, joined_seq, read_n) VALUES (?1, ?2,
               ?3, (SELECT coalesce(max(n), 0) FROM message WHERE chat_id = ?1))""",
            (chat_id, user_id, seq),
        )

    def _know(self, db: Db, user_id: int) -> None:
        db.execute("INSERT OR IGNORE INTO user (id) VALUES (?)", (user_id,))

    def _find_chat(self, db: Db, chat_id: int, by: int | None) -> None:
        found = one(db, "SELECT 1 FROM chat WHERE id = ?", chat_id)
        if not found or not (by is None or one(db, IS_MEMBER, chat_id, by)):
            raise no_chat()

    def _check_size(self, members: int) -> None:
        most = self.settings.members
        if members > most:
            raise bad_field(f"member_ids: {members} members; at most {most}")

    # --- reading ---------------------------------------------------------------------
    # Methods that take a db run in a reader's thread, in one read transaction. `upto`
    # is the hub's head at the time of asking: what was committed since does not exist
    # yet, so no reader is ever ahead of the hub, nor any cursor.

    async def read(self, query: Callable[..., T], *args: Any) -> T:
        """Run query(db, *args) read-only. Raises its Refusal, or storage_failed."""
        result: T = await self._run_sync(
            self._query, query, *args, limiter=self._read_limiter
        )
        return result

    def _query(self, query: Callable[..., T], *args: Any) -> T:
        try:
            db = self._reader()
            try:
                db.execute("BEGIN")
                result = query(db, *args)
                db.execute("COMMIT")
            except BaseException:
                db.close()  # the query refused or failed: its transaction goes with it
                raise
        except sqlite3.Error as error:
            self.stats.errors[type(error).__name__] += 1
            say(logging.ERROR, "read_failed", db=self.path, error=error)
            raise Refusal("storage_failed", "the database cannot be read") from error
        self._idle_readers.append(db)
        return result

    def _reader(self) -> Db:
        try:
            return self._idle_readers.pop()  # atomic; never more than there are threads
        except IndexError:
            return open_database(self.path, readonly=True)

    def greeting(self, db: Db, user_id: int, upto: int, cursor: int) -> Greeting:
        """Read a user's chats as of upto, and count what he missed since cursor."""
        rows = db.execute(
            """SELECT b.chat_id, b.joined_seq, b.read_n, coalesce((
                   SELECT n FROM message m WHERE m.chat_id = b.chat_id AND m.id <= ?2
                   ORDER BY n DESC LIMIT 1), 0)
               FROM member b WHERE b.user_id = ?1 AND b.joined_seq <= ?2""",
            (user_id, upto),
        ).fetchall()
        marks = {str(row[0]): Marks(row[3], min(row[2], row[3])) for row in rows}
        missed = self.missed(db, user_id, cursor, upto)
        return Greeting({row[0]: row[1] for row in rows}, marks, missed)

    def missed(self, db: Db, user_id: int, cursor: int, upto: int) -> int | None:
        """Count a user's events in (cursor, upto]; None if too many to replay."""
        if cursor >= upto:
            return 0
        limit = self.settings.resync_events + 1
        bounds = {"user": user_id, "cursor": cursor, "upto": upto, "limit": limit}
        count: int = db.execute(COUNT_VISIBLE, bounds).fetchone()[0]
        return None if count >= limit else count

    def events_after(
        self, db: Db, user_id: int, cursor: int, upto: int, limit: int
    ) -> Page:
        """Read a user's events in (cursor, upto], at most limit, at most 128 KiB.

        This one query serves the poll, the resume and the slow reader. A page that is
        not cut short by its limits moves the cursor to upto.
        """
        bounds = {"user": user_id, "cursor": cursor, "upto": upto, "limit": limit}
        events: Log = []
        size = 0
        for row in db.execute(PAGE, bounds):
            events.append(self._event(db, row, upto))
            size += events[-1].size
            if size >= self.settings.page_bytes or len(events) >= limit:
                return Page(events, events[-1].seq, more=events[-1].seq < upto)
        return Page(events, max(cursor, upto), more=False)

    def _above(self, db: Db, seq: int) -> Log:
        """Read the whole log above seq."""
        rows = db.execute(f"{EVENTS} WHERE e.seq > ? ORDER BY e.seq", (seq,)).fetchall()
        return [self._event(db, row, MAX_ID) for row in rows]

    def tail(self) -> Log:
        """Read the log's end at the start, as far back as the hub would hold it.

        It stops after the last chat_added, which is told with the chat as it is at the
        time: that is the query's business, not the tail's.
        """
        db, floor = self._writer, max(0, self.seq - self.settings.tail_events)
        sql = f"{EVENTS} WHERE e.seq > ? ORDER BY e.seq DESC"
        newest_first: Log = []
        room = self.settings.tail_bytes
        with told_of("database", self.path):
            for row in db.execute(sql, (floor,)):
                if row[1] == "chat_added":
                    break
                event = self._event(db, row, self.seq)
                room -= event.size
                if room < 0:
                    break
                newest_first.append(event)
        return newest_first[::-1]

    def revoked(self) -> dict[int, int]:
        """Read at the start whose older tokens are refused."""
        sql = "SELECT id, revoked_at FROM user WHERE revoked_at IS NOT NULL"
        with told_of("database", self.path):
            return dict(self._writer.execute(sql))

    def _event(self, db: Db, row: tuple[Any, ...], upto: int) -> Event:
        """Make the event of a row of EVENTS."""
        seq, kind, chat_id, to_chat, to_user, user_id, name, *message = row
        size = 256
        wire: Wire
        match kind:
            case "new_message":
                return message_event(message_of(message))
            case "message_read":
                wire = MessageRead(seq, message[0], chat_id, user_id, n=message[5])
            case "chat_added":
                raw = msgspec.Raw(encode(self.chat(db, chat_id, upto, to_user)))
                wire = ChatAdded(seq, chat_id, raw)
                size += len(raw)
            case "member_added":
                wire = MemberAdded(seq, chat_id, user_id, name)
            case _:
                wire = MemberRemoved(seq, chat_id, user_id)
        return Event(wire, to_chat=bool(to_chat), to_user=to_user, size=size)

    def chat(
        self, db: Db, chat_id: int, upto: int, viewer_id: int | None = None
    ) -> Chat:
        """Read one chat as of upto.

        A viewer who has left sees that there was a chat, and nothing of it.
        """
        if viewer_id is not None and not one(db, IS_MEMBER, chat_id, viewer_id):
            return Chat(chat_id, None, [], 0, None)
        row = db.execute(
            f"{MESSAGES} WHERE chat_id = ? AND id <= ? ORDER BY n DESC LIMIT 1",
            (chat_id, upto),
        ).fetchone()
        last = message_of(row) if row else None
        last_n = last.n if last else 0
        members = db.execute(
            """SELECT b.user_id, u.name, min(b.read_n, ?) FROM member b
               JOIN user u ON u.id = b.user_id WHERE b.chat_id = ?""",
            (last_n, chat_id),
        )
        title = one(db, "SELECT title FROM chat WHERE id = ?", chat_id)
        return Chat(chat_id, title, [Member(*row) for row in members], last_n, last)

    def my_chats(self, db: Db, user_id: int, upto: int) -> list[MyChat]:
        """Read a user's chats as of upto, the one with the newest message first."""
        rows = db.execute(
            """SELECT chat_id, read_n, joined_seq FROM member
               WHERE user_id = ? AND joined_seq <= ?""",
            (user_id, upto),
        ).fetchall()
        found: list[tuple[int, MyChat]] = []
        for chat_id, position, joined_seq in rows:
            chat = self.chat(db, chat_id, upto)
            last, read_n = chat.last_message, min(position, chat.last_n)
            fields = msgspec.structs.asdict(chat)
            mine = MyChat(**fields, read_n=read_n, unread=chat.last_n - read_n)
            found.append((max(joined_seq, last.id if last else 0), mine))
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [mine for _, mine in found]

    def history(
        self,
        db: Db,
        user_id: int,
        chat_id: int,
        before: int | None,
        limit: int,
        upto: int,
    ) -> tuple[list[Message], bool]:
        """Read a page of messages, oldest first, and whether there are older ones.

        before is a message id of this chat. Raises Refusal not_found, bad_field.
        """
        if not one(db, IS_MEMBER, chat_id, user_id):
            raise no_chat()
        before_n = MAX_ID
        if before is not None:
            sql = "SELECT n FROM message WHERE id = ? AND chat_id = ?"
            before_n = one(db, sql, before, chat_id)
            if before_n is None:
                raise bad_field("before: not a message of this chat")
        rows = db.execute(
            f"""{MESSAGES} WHERE chat_id = ? AND n < ? AND id <= ?
                ORDER BY n DESC LIMIT ?""",
            (chat_id, before_n, upto, limit + 1),
        ).fetchall()
        messages = [message_of(row) for row in reversed(rows[:limit])]
        return messages, len(rows) > limit

    def name(self, db: Db, user_id: int) -> str | None:
        """Read what a user is called."""
        name: str | None = one(db, "SELECT name FROM user WHERE id = ?", user_id)
        return name

    def users(self, db: Db) -> list[User]:
        """Read who is known, those with a name first, at most 200."""
        sql = "SELECT id, name FROM user ORDER BY name IS NULL, name, id LIMIT 200"
        return [User(*row) for row in db.execute(sql)]

    def wal_bytes(self) -> int:
        """How long the log of changes is that the database file does not have yet."""
        try:
            return beside(self.path, "-wal").stat().st_size
        except FileNotFoundError:
            return 0


def message_of(row: Sequence[Any]) -> Message:
    """Make the message of a row of MESSAGE_COLUMNS."""
    return Message(row[0], row[1], row[2], row[3], timestamp(row[4]), row[5], row[6])


def message_event(message: Message) -> Event:
    """Make the event of a message: its seq is the message's id."""
    # A text that is not ASCII is held thrice: as str, its UTF-8, and in the frame.
    size = 256 + 3 * len(message.content.encode())
    wire = NewMessage(message.id, message.chat_id, message)
    return Event(wire, to_chat=True, size=size)


def schema_steps() -> list[str]:
    """Split schema.sql at its "-- version N" lines: step N makes version N."""
    text = (ASSETS / "schema.sql").read_text("utf-8")
    return re.split(r"(?m)^-- version \d+$", text)[1:]


def open_database(path: Path, *, readonly: bool) -> Db:
    """Open a connection with the settings that the promise needs. Raises sqlite3.Error.

    Exactly one connection may commit and checkpoint: before SQLite 3.51.3 two that do
    so at the same time can corrupt a WAL. Readers therefore cannot do either.
    """
    uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5
    )
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA temp_store = MEMORY")
        if readonly:
            db.execute("PRAGMA query_only = ON")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            return db
        mode = one(db, "PRAGMA journal_mode = WAL")
        if mode != "wal":
            raise sqlite3.OperationalError(f"journal_mode is {mode}, not wal")
        db.execute("PRAGMA synchronous = FULL")  # an ack survives a power cut
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA cell_size_check = ON")
        db.execute("PRAGMA journal_size_limit = 67108864")
    except BaseException:
        db.close()
        raise
    return db


def beside(path: Path, suffix: str) -> Path:
    """Name the file that stands beside a database: -wal, -shm, .lock."""
    return path.with_name(path.name + suffix)


def partial_name(path: Path) -> Path:
    """Name a file to write first, and then to rename to path."""
    return beside(path, f".{secrets.token_hex(4)}.partial")


def file_bytes(path: Path) -> int:
    """Return the size of a file: 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def sync_wal(path: Path) -> None:
    """Put a database's log of changes on the disk, whole, once more. Raises OSError.

    Who is killed between write and sync leaves rows that can be read, and acked when
    they are repeated, and that are on no disk. And after a sync that failed Linux takes
    what was not written for written: only what is written anew gets there, and a hole
    would take all that comes behind it.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        beside(path, "-wal").open("r+b", buffering=0) as wal,
    ):
        fd, at = wal.fileno(), 0
        while data := os.pread(fd, 1_048_576, at):
            at += os.pwrite(fd, data, at)
        os.fsync(fd)


def check_not_emptied(path: Path, what: str = "database") -> None:
    """Raise UsageError for a file that SQLite would take for a new database.

    SQLite would then remove the -wal, which may hold all there is. A database is at
    least as long as its header.
    """
    size, wal = file_bytes(path), file_bytes(beside(path.resolve(), "-wal"))
    if 0 < size < 100:
        raise damaged(path, f"it has only {size} bytes", what)
    if not size and wal:
        raise damaged(path, "it is empty, and its -wal is not", what)


def check_not_cut(db: Db, path: Path, what: str = "database") -> int:
    """Raise UsageError for a file that has lost its end. Returns its size in bytes.

    With a -wal that is not empty, the missing pages may be there.
    """
    size: int = one(db, "PRAGMA page_count") * one(db, "PRAGMA page_size")
    if not file_bytes(beside(path.resolve(), "-wal")) and file_bytes(path) < size:
        raise damaged(path, f"{file_bytes(path)} bytes are left of {size}", what)
    return size


def missing_parts(db: Db, version: int) -> list[str]:
    """Name the tables and indexes that a database of this version has to have."""
    names = "SELECT type || ' ' || name FROM sqlite_schema WHERE sql IS NOT NULL"
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript("".join(schema_steps()[:version]))
        wanted = {name for (name,) in model.execute(names)}
    return sorted(wanted - {name for (name,) in db.execute(names)})


def refuse_newer(what: str, path: Path, version: int, known: int) -> None:
    """Raise UsageError for a database that a newer chatd made."""
    if version > known:
        raise UsageError(
            f"{what} {path}: made by a newer chatd (schema {version}, this one knows "
            f"{known}): install that version, or restore an older backup"
        )


def check_at_start(db: Db, path: Path, check_bytes: int) -> None:
    """Refuse to serve what is damaged, in a time that is bounded by the file's size.

    Raises UsageError. quick_check reads each page once (measured: 27 MB in 32 ms); it
    does not compare indexes with their tables, as `chatd check` does.
    """
    size = check_not_cut(db, path)
    if size > check_bytes:
        say(logging.INFO, "unchecked", db=path, bytes=size, check_bytes=check_bytes)
        return
    began = time.monotonic()
    found = one(db, "PRAGMA quick_check(1)")
    if found != "ok":
        raise damaged(path, found)
    seconds = round(time.monotonic() - began, 3)
    say(logging.INFO, "checked", db=path, bytes=size, seconds=seconds)


def prepare_database(path: Path, steps: Sequence[str], check_bytes: int) -> Db:
    """Open the writer's connection; make the schema, or bring an older one up.

    Raises UsageError with a sentence for the person, and changes nothing then.
    """
    with told_of("database", path):
        check_not_emptied(path)
        # SQLite would make it readable by all; -wal and -shm get this file's mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with contextlib.closing(open_database(path, readonly=True)) as look:
            mine, version = database_version(look)
            if not mine and one(look, "SELECT count(*) FROM sqlite_schema"):
                raise UsageError(f"database {path}: it belongs to another program")
            refuse_newer("database", path, version, len(steps))
            if mine and version < 1:
                raise damaged(path, f"its schema has version {version}")
            if mine:
                check_at_start(look, path, check_bytes)
            if mine and (missing := missing_parts(look, version)):
                raise damaged(path, f"without {', '.join(missing)}")
        sync_wal(path.resolve())  # its last writer may have been killed
        db = open_database(path, readonly=False)
        try:
            if version < len(steps):
                db.executescript(
                    f"""BEGIN IMMEDIATE; {"".join(steps[version:])}
                    PRAGMA application_id = {APPLICATION_ID};
                    PRAGMA user_version = {len(steps)};
                    INSERT OR IGNORE INTO meta VALUES ('epoch', '{new_epoch()}');
                    COMMIT"""
                )
                # The file itself, and not only its -wal, says that it is chatd's.
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            db.close()
            raise
    return db


def database_version(db: Db) -> tuple[bool, int]:
    """Is it chatd's, and which version of the schema has it?"""
    mine = one(db, "PRAGMA application_id") == APPLICATION_ID
    return mine, one(db, "PRAGMA user_version")


def new_epoch() -> str:
    """Make the first half of cursors. Short, and never the same twice."""
    return secrets.token_hex(4)


# =====================================================================================
# HUB: who is connected, and the newest end of the event log
#
# The hub knows seats (a connection's user, cursor and outbox), and which of them are
# live in which chat. Its methods are plain `def` on the main thread: in Trio only
# `await` lets another task run, so each of them is a transaction.
# =====================================================================================


class Person:
    """A user with at least one seat, and the chats he is in as of the hub's head.

    Until `known` the chats are being read from disk, and changes that are published
    meanwhile wait in `changes`: register first, read second, and none is missed.
    """

    __slots__ = ("changes", "chats", "known", "replaying", "seats", "user_id")

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.seats: list[Seat] = []
        self.chats: dict[int, int] = {}  # chat -> joined_seq
        self.known = False
        self.changes: list[tuple[int, int | None]] = []
        self.replaying: trio.Lock | None = None  # one replay a user at a time

    def sees(self, event: Event) -> bool:
        """Is this event for him?"""
        if event.to_user == self.user_id:
            return True
        joined_seq = self.chats.get(event.chat_id) if event.to_chat else None
        return joined_seq is not None and event.seq > joined_seq


class Seat:
    """A connection as the hub knows it: who, where he is in the log, and his outbox.

    A live seat has been given all up to the hub's head, and its `cursor` means nothing.
    Another has been given all up to `cursor`; somebody is bringing it the rest.
    """

    # fmt: off
    __slots__ = ("behind", "cursor", "end", "held", "live", "outbox", "person",
                 "ping_after", "pinged_at", "slots", "token_ends", "warned")
    # fmt: on

    person: Person  # from Hub.enter on

    def __init__(
        self,
        outbox: Outbox,
        *,
        settings: Settings,
        behind: Callable[[], None],
        end: Callable[[int, str], None],
    ) -> None:
        self.outbox = outbox
        self.behind = behind  # called when the seat is no longer live
        self.end = end  # called with the close code and the reason when it is over
        self.cursor = 0
        self.live = False
        self.held: list[Reply] = []  # acks that wait for their event to be written
        self.slots = trio.Semaphore(settings.unanswered)
        self.ping_after = settings.ping_seconds * random.uniform(0.9, 1.1)
        self.pinged_at: float | None = None
        self.token_ends = math.inf  # in trio's time
        self.warned = False

    def fall_behind(self, cursor: int) -> None:
        """Be no longer live: all up to cursor was given."""
        self.cursor = cursor
        self.behind()

    def answer(self, reply: Reply) -> None:
        """Write an answer, but never before the event that it speaks of."""
        if self.live or reply.seq <= self.cursor:
            self.outbox.push(reply.frame, always=True)
            self.slots.release()
        else:
            self.held.append(reply)

    def release_held(self) -> None:
        """Write the acks whose events have gone out."""
        held, self.held = self.held, []
        for reply in held:
            self.answer(reply)

    def sweep(self, now: float, settings: Settings) -> str | None:
        """Look at this seat's deadlines. Returns why it is to be cut, or None.

        Life is any byte heard, or any progress of bytes sent. While bytes wait only
        the stall limit judges; a ping asks only a peer that has nothing to read.
        """
        outbox = self.outbox
        if outbox.waiting:
            self.pinged_at = None
            outbox.note_progress(now)
            life = max(outbox.heard_at, outbox.moved_at)
            return "stalled" if now - life > outbox.patience else None
        if not outbox.listening or (self.pinged_at or 0.0) <= outbox.heard_at:
            self.pinged_at = None
        if not outbox.listening:
            return None  # a command of its own makes it wait: silence says nothing
        if self.pinged_at is not None:
            return "silent" if now - self.pinged_at > settings.pong_seconds else None
        if now - outbox.heard_at > self.ping_after:
            self.pinged_at = now
            outbox.push(PING_FRAME)
        return None

    def sweep_token(self, now: float, settings: Settings) -> None:
        """Warn before the token's end; some time after it, close."""
        left = self.token_ends - now
        if left <= settings.token_warning_seconds and not self.warned:
            self.warned = True
            expiring = text_frame(TokenExpiring(max(0, round(left))))
            self.outbox.push(expiring, always=True)
        if left <= -settings.token_grace_seconds:
            self.end(CLOSE_TOKEN_ENDED, "the token has ended: get a new one")


class Hub:
    """Who listens, and the newest end of the log. It knows seats, never sessions.

    `head` is the seq of the last published event. Every read asks for what is at or
    below it, and every cursor that a client gets is one it has had.
    """

    def __init__(self, settings: Settings, stats: Stats, store: Store) -> None:
        self.settings = settings
        self.stats = stats
        self.head = store.seq
        self.people: dict[int, Person] = {}
        # chat -> the live seats of who is in it. Kept, and not found anew for each
        # batch: to look at person, list and seat first cost 1.4 us a delivery in a room
        # of 500, more than all the rest of Python's part.
        self.rooms: dict[int, set[Seat]] = {}
        # The last published events. seq is dense, so the event of a seq is found by
        # subtraction: tail[i].seq == tail[0].seq + i.
        self.tail = store.tail()
        self.tail_size = sum(event.size for event in self.tail)
        self.seats = 0

    async def run(self, batches: trio.MemoryReceiveChannel[Batch]) -> None:
        """Publish batches, until the store closes the channel."""
        async with batches:
            async for batch in batches:
                self.publish(batch)

    # --- seats -----------------------------------------------------------------------

    def enter(self, seat: Seat, user_id: int, cursor: int) -> bool:
        """Register a seat, catching up. False: this user has too many."""
        person = self.people.setdefault(user_id, Person(user_id))
        if len(person.seats) >= self.settings.connections_per_user:
            return False
        seat.person = person
        seat.cursor = cursor
        person.seats.append(seat)
        self.seats += 1
        return True

    def leave(self, seat: Seat) -> None:
        """Forget a seat, and its person with the last one."""
        self._set_live(seat, False)
        person = seat.person
        person.seats.remove(seat)
        self.seats -= 1
        if not person.seats:
            del self.people[person.user_id]

    def know(self, person: Person, joined: dict[int, int]) -> None:
        """Take the chats of a person as they were read, and what changed since."""
        if person.known or not person.seats:
            return  # another seat's read was first; or everybody has gone meanwhile
        person.known = True
        for change in itertools.chain(joined.items(), person.changes):
            self._change(person, *change)
        person.changes.clear()

    def _change(self, person: Person, chat_id: int, joined_seq: int | None) -> None:
        """Let a person be in a chat since joined_seq, or not at all (None)."""
        if not person.known:
            person.changes.append((chat_id, joined_seq))
        elif joined_seq is not None:
            person.chats[chat_id] = joined_seq
            for seat in person.seats:
                if seat.live:
                    self._enter_room(seat, chat_id)
        elif person.chats.pop(chat_id, None) is not None:
            for seat in person.seats:
                if seat.live:
                    self._leave_room(seat, chat_id)

    def _set_live(self, seat: Seat, live: bool) -> None:
        """Let a seat be live, and so in the rooms of its person's chats; or not."""
        if live is not seat.live:
            seat.live = live
            move = self._enter_room if live else self._leave_room
            for chat_id in seat.person.chats:
                move(seat, chat_id)

    def _enter_room(self, seat: Seat, chat_id: int) -> None:
        self.rooms.setdefault(chat_id, set()).add(seat)

    def _leave_room(self, seat: Seat, chat_id: int) -> None:
        room = self.rooms[chat_id]
        room.remove(seat)
        if not room:
            del self.rooms[chat_id]

    # --- publishing ------------------------------------------------------------------

    def publish(self, batch: Batch) -> None:
        """Make a batch known: tail, chats, live seats, and then its callers.

        All frames for one connection are joined and written by one call, its answers
        last: no ack is ahead of its event. Seats with the same events share the bytes.
        """
        before = self.head
        self._append(batch.events)
        parcels = self._address(batch.events)
        full: list[Seat] = []
        replies: dict[Seat, list[Reply]] = {}
        for job, outcome in batch.answers:
            reply = job.done(outcome)
            if reply is not None and job.seat is not None:
                replies.setdefault(job.seat, []).append(reply)
        for seats, events in parcels:
            joined = b"".join([event.frame for event in events])
            missed = len(full)
            for seat in seats:
                if seat in replies:
                    frames = joined + b"".join([reply.frame for reply in replies[seat]])
                    if seat.outbox.push(frames):
                        for _ in replies.pop(seat):
                            seat.slots.release()
                        continue
                elif seat.outbox.push(joined):
                    continue
                full.append(seat)  # it will be given, and counted, later
            written = len(seats) - (len(full) - missed)
            self.stats.deliveries += written * len(events)
            self.stats.writes += written
        for seat in full:
            self._set_live(seat, False)
            seat.fall_behind(before)
        for seat, rest in replies.items():
            for reply in rest:
                seat.answer(reply)

    def _append(self, events: Log) -> None:
        for event in events:
            self.stats.events[event.kind] += 1
            self.tail_size += event.size
        self.tail += events
        self.head += len(events)
        # Trimmed in strides: del at the front of a list moves all that stays.
        length, most = len(self.tail), self.settings.tail_events
        if length > most * 9 // 8 or self.tail_size > self.settings.tail_bytes:
            cut, least = 0, max(length // 8, length - most)
            while cut < least or self.tail_size > self.settings.tail_bytes:
                self.tail_size -= self.tail[cut].size
                cut += 1
            del self.tail[:cut]

    def _address(self, events: Log) -> list[tuple[Collection[Seat], Log]]:
        """Say which live seats get which events; apply membership as it goes by.

        Events of one chat between two changes of membership have the same readers:
        they are one list, shared by all seats that have no other chat in the batch.
        """
        readers = {(event.chat_id, event.to_user) for event in events}
        if len(readers) == 1 and events[0].to_user is None:  # nearly always
            return [(self.rooms.get(events[0].chat_id, ()), events)]
        parcels: dict[Seat, Log] = {}
        for alike, group in itertools.groupby(events, lambda e: e.to_user is None):
            if alike:
                by_chat: dict[int, Log] = {}
                for event in group:
                    by_chat.setdefault(event.chat_id, []).append(event)
                for chat_id, news in by_chat.items():
                    self._parcel(parcels, self.rooms.get(chat_id, ()), news)
                continue
            for event in group:
                self._parcel(parcels, self._readers(event), [event])
                self._apply(event)
        shared = itertools.groupby(parcels, lambda seat: id(parcels[seat]))
        groups = [list(seats) for _, seats in shared]
        return [(seats, parcels[seats[0]]) for seats in groups]

    def _parcel(
        self, parcels: dict[Seat, Log], seats: Iterable[Seat], news: Log
    ) -> None:
        for seat in seats:
            if (had := parcels.setdefault(seat, news)) is not news:
                parcels[seat] = sorted(had + news, key=lambda event: event.seq)

    def _readers(self, event: Event) -> set[Seat]:
        room = self.rooms.get(event.chat_id, set()) if event.to_chat else set()
        named = self.people.get(event.to_user or 0)
        return room.union(s for s in (named.seats if named else ()) if s.live)

    def _apply(self, event: Event) -> None:
        person = self.people.get(event.to_user or 0)
        if person is not None and isinstance(event.wire, ChatAdded):
            self._change(person, event.chat_id, event.seq)
        elif person is not None and isinstance(event.wire, MemberRemoved):
            self._change(person, event.chat_id, None)

    # --- catching up -----------------------------------------------------------------

    def in_tail(self, cursor: int) -> bool:
        """Is everything after this cursor still in memory?"""
        return cursor >= self.head - len(self.tail)

    def feed(self, seat: Seat) -> None:
        """Give a seat a helping of the tail; at its end the seat is live.

        Between the last event given and `live` nothing can be published: this is a
        plain def. That is why a seat becomes live under any load.
        """
        start = seat.cursor - (self.head - len(self.tail))
        frames: list[bytes] = []
        size = 0
        for event in itertools.islice(self.tail, start, None):
            if seat.person.sees(event):
                frames.append(event.frame)
                size += len(frames[-1])
            seat.cursor = event.seq
            if size >= self.settings.page_bytes:
                break
        self._give(seat, frames)

    def give_page(self, seat: Seat, page: Page) -> None:
        """Give a seat a page of the log, less what is no longer for it."""
        seat.cursor = page.cursor
        self._give(seat, [e.frame for e in page.events if seat.person.sees(e)])

    def _give(self, seat: Seat, frames: list[bytes]) -> None:
        if frames:
            seat.outbox.push(b"".join(frames), always=True)
            self.stats.deliveries += len(frames)
            self.stats.writes += 1
        here = seat in seat.person.seats  # it may have left while a page was read
        self._set_live(seat, here and seat.cursor >= self.head)
        seat.release_held()

    def show_typing(self, user_id: int, chat_id: int, is_typing: bool) -> None:
        """Show a typing sign to the others who are live; who is busy misses it."""
        frame = text_frame(TypingSign(chat_id, user_id, is_typing))
        for seat in self.rooms.get(chat_id, ()):
            if seat.person.user_id != user_id and not seat.outbox.waiting:
                seat.outbox.push(frame)


# =====================================================================================
# OUTBOX: every byte to a client
#
# Writing never waits. A frame goes to the kernel at once, or into a bounded buffer, or
# the seat stops being live and reads the event log later. So a slow client costs the
# others nothing.
# =====================================================================================


class Outbox(trio.abc.Stream):
    """Every byte to a peer: ours by `push`, the library's by `send_all`.

    push writes to the socket at once and keeps what the kernel would not take; only
    then a task waits for the socket, in the connection's nursery, gone when the buffer
    is empty. A push is taken whole or not at all, so no cancellation can tear a frame.
    The first close frame seals the outbox: what comes later is dropped.

    It keeps the number of its descriptor. That is safe because who closes the stream
    has sealed the outbox first, and all its tasks have ended: an old number could be
    somebody else's connection.

    It is also the stream that trio-websocket is given, which reads through it.
    """

    # fmt: off
    __slots__ = ("_broke", "_ended", "_fd", "_nursery", "_owed_pong", "_pace",
                 "_parked", "_settings", "_unacked", "buffer", "heard_at", "listening",
                 "moved_at", "patience", "sealed", "stream")
    # fmt: on

    def __init__(
        self,
        stream: trio.SocketStream,
        nursery: trio.Nursery,
        settings: Settings,
        broke: Callable[[], None],
    ) -> None:
        self.stream = stream
        # b"" while nothing waits: a look at it then costs no line of the cache.
        self.buffer: bytes | bytearray = b""
        self.sealed = False
        self.heard_at = self.moved_at = trio.current_time()
        self._nursery = nursery
        self._settings = settings
        self._fd = stream.socket.fileno()
        self.listening = False  # waiting for the peer, not busy with what it said
        self._ended = False  # the library wants to read no more
        self._pace = Pace(settings.receive_bytes, self.heard_at)
        self._parked = trio.lowlevel.ParkingLot()
        self._unacked = 0  # bytes in the kernel, when last looked at
        self.patience = patience(stream, settings)
        self._owed_pong = b""
        self._broke = broke

    @property
    def waiting(self) -> bool:
        """Do bytes wait that the kernel would not take?"""
        return bool(self.buffer)

    @property
    def full(self) -> bool:
        """Is it at its bound: nothing but answers is taken?"""
        return len(self.buffer) >= self._settings.outbox_bytes

    def push(self, frames: bytes, always: bool = False) -> bool:
        """Write whole frames now, or buffer them. False: it is full, nothing was taken.

        always takes them all the same: for answers, whose number is bounded elsewhere,
        and for pages that are only given to an empty outbox. Never raises: a broken
        connection takes everything, and ends soon.
        """
        if self.sealed:
            return True
        if self.buffer:
            if not always and self.full:
                return False
            self.buffer += frames
            return True
        try:
            sent = os.write(self._fd, frames)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return True
        if sent < len(frames):
            self.buffer = bytearray(frames[sent:])
            self.moved_at = trio.current_time()
            self._nursery.start_soon(self._flush)
        return True

    def note_progress(self, now: float) -> None:
        """Look whether the peer has acknowledged bytes since the last look.

        The kernel asks for more by 64 KiB, which a slow line takes longer to carry than
        the stall limit is. SIOCOUTQ (tcp(7)) tells of every packet that arrived.
        """
        with contextlib.suppress(OSError):  # not every system counts them
            counted = fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4))
            unacked = int.from_bytes(counted, sys.byteorder)
            if unacked < self._unacked:
                self.moved_at = now
            self._unacked = unacked

    def seal(self, frame: bytes) -> None:
        """Write a close frame; it is the last."""
        self.push(frame, always=True)
        self.sealed = True

    def pong(self, payload: bytes) -> None:
        """Answer a ping. While full, only the newest is owed one (RFC 6455 5.5.3)."""
        frame = bytes(_frames.pong(payload))
        if self.full:
            self._owed_pong = frame
        else:
            self.push(frame)

    def charge(self) -> None:
        """Count a frame as 128 bytes more than it has: tiny frames cost us as much."""
        self._pace.spend(128)

    def _break(self) -> None:
        self.sealed = True
        self.buffer = b""
        self._parked.unpark_all()
        self._broke()

    async def _flush(self) -> None:
        """Write the buffer as the socket takes it. The one task that waits to write."""
        while self.buffer:
            try:
                await trio.lowlevel.wait_writable(self._fd)
                sent = os.write(self._fd, self.buffer[:65536])
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                self._break()
                return
            self.buffer = self.buffer[sent:] or b""
            self.moved_at = trio.current_time()
            self._parked.unpark_all()
        if self._owed_pong:
            pong, self._owed_pong = self._owed_pong, b""
            self.push(pong)

    async def room(self) -> None:
        """Wait until it is not full. The sweeper ends a connection that never moves."""
        while self.full:
            await self._parked.park()

    async def empty(self) -> None:
        """Wait until all bytes are the kernel's."""
        while self.buffer:
            await self._parked.park()

    async def finish(self) -> None:
        """End the write side; read and discard, so that our last bytes arrive.

        A close with unread input makes the kernel send RST, which can overtake them.
        """
        with trio.move_on_after(self._settings.drain_seconds):
            await self.empty()
        await linger(self.stream, self._settings.linger_seconds)

    # --- the Stream that trio-websocket is given -------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the library sends: its answer to a close frame, and no more."""
        await trio.lowlevel.checkpoint()
        await self.room()
        self.seal(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """Part of the interface; the library does not use it."""
        await self.room()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Give the library what the peer sends, at the pace of --receive-bytes."""
        if self._ended:
            raise trio.ClosedResourceError
        data = await self._receive(max_bytes or 8192)
        now = self.heard_at = trio.current_time()
        self._pace.spend(len(data))
        debt = self._pace.debt_seconds(now)
        while debt > 1:
            # Who hung up behind a flood is not read to the end: that can take minutes.
            await trio.sleep(1)
            debt -= 1
            if self._hung_up():
                raise trio.BrokenResourceError
        if debt:
            await trio.sleep(debt)
        return data

    def _hung_up(self) -> bool:
        """Has the peer ended its side, whatever of it is still unread?"""
        look = select.poll()
        look.register(self._fd, getattr(select, "POLLRDHUP", 0))  # else only HUP
        return bool(look.poll(0))

    async def _receive(self, max_bytes: int) -> bytes:
        while True:
            # Wait first: a SocketStream would try first, in vain nearly always.
            self.listening = True
            await trio.lowlevel.wait_readable(self._fd)
            self.listening = False
            try:
                return os.read(self._fd, max_bytes)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def aclose(self) -> None:
        """Read no more. The connection closes its stream, when the last byte is out."""
        self._ended = True
        await trio.lowlevel.checkpoint()


def patience(stream: trio.SocketStream, settings: Settings) -> float:
    """Say for how many seconds a peer's waiting bytes may stand still.

    A full receive window opens again by steps (RFC 9293 3.8.6.2.2), and Linux, where
    only whole packets free their room, takes twice the first window for one: who reads
    5 KB a second from the usual 64 KiB is seen to move every 26 s.
    """
    window = 0
    with contextlib.suppress(OSError, AttributeError):  # Linux 5.4: tcpi_snd_wnd
        told = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        window = int.from_bytes(told[228:], sys.byteorder)
    silence = settings.ping_seconds + settings.pong_seconds
    return max(settings.stall_seconds, min(window / settings.slow_bytes, silence))


async def linger(stream: trio.SocketStream, seconds: float) -> None:
    """End the write side, then read and discard until the peer ends his."""
    with (
        trio.move_on_after(seconds),
        contextlib.suppress(OSError, trio.BrokenResourceError),
    ):
        stream.socket.shutdown(socket.SHUT_WR)
        while await stream.receive_some(65536):
            pass


# =====================================================================================
# PROTOCOL: refusals, close codes, messages
#
# What goes over the wire. These are tables: nothing here waits, and nothing decides.
# =====================================================================================


# fmt: on


class Refusal(Exception):
    """No, with the reason: a code of REFUSALS, a sentence, and when to try again.

    It is the one exception that reaches a peer, as an error frame or an HTTP answer.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        retry_after: float | None = None,
        status: int | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        usual_status, usual_message = REFUSALS[code]
        self.code = code
        self.message = message or usual_message
        self.status = status or usual_status
        self.retry_after = None if retry_after is None else round(retry_after, 3)
        self.headers = list(headers)
        super().__init__(f"{code}: {self.message}")


class UsageError(Exception):
    """The person who started chatd has to change something: exit status 2 or 1."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def told_of(what: str, path: Path) -> Iterator[None]:
    """Make a fault of a file or database a UsageError: a sentence with its name."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from error
    except sqlite3.Error as error:
        if what == "database" and is_damage(error):
            raise damaged(path, str(error)) from error
        raise UsageError(f"{what} {path}: {error}") from error


def is_damage(error: Exception) -> bool:
    """Does SQLite say that the file is damaged?"""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its extension
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def damaged(path: Path, why: str, what: str = "database") -> UsageError:
    """Make the error of a damaged database, which says the way out."""
    if what != "database":
        return UsageError(f"{what} {path}: damaged: {' '.join(why.split())}")
    return UsageError(
        f"database {path}: damaged: {' '.join(why.split())}; `chatd check --db {path}` "
        f"lists what is wrong, `chatd restore BACKUP --db {path}` puts a backup there"
    )


# code: the HTTP status, and what to say when there is nothing better to say.
REFUSALS: dict[str, tuple[int, str]] = {
    "bad_json": (400, "this is not a JSON object"),
    "bad_field": (400, "a field is wrong"),
    "unknown_type": (400, "type: there is no such command"),
    "token_invalid": (401, "this token is not valid: sign in again"),
    "token_expired": (401, "this token has expired: get a new one"),
    "token_used": (401, "this ticket was used already: get a new one"),
    "forbidden": (403, "this token may not do that"),
    "not_found": (404, "there is nothing here, or it is not yours to see"),
    "method_not_allowed": (405, "this path does not take that method"),
    "timeout": (408, "the request took too long"),
    "idempotency_mismatch": (409, "client_id: it was used for another message"),
    "too_large": (413, "the request is too large"),
    "upgrade_required": (426, "this path speaks WebSocket: send an upgrade request"),
    "rate_limited": (429, "too many at once: slow down"),
    "overloaded": (503, "the server is full: come back later"),
    "storage_failed": (503, "it is not known to be stored: repeat it, same client_id"),
    "internal": (500, "the server made a mistake; it has been logged"),
    "upstream": (502, "the chat service is away: come back later"),
}


def bad_field(sentence: str) -> Refusal:
    """Make the commonest Refusal. The sentence begins with the field's name."""
    return Refusal("bad_field", sentence)


def no_chat() -> Refusal:
    """Make the answer for a chat that is unknown, and for one of other people."""
    return Refusal("not_found", "chat_id: there is no such chat for you")


# Close codes: RFC 6455 7.4.1, and our own. 4000-4499: come back. 4500-4999: stay away.
CLOSE_NORMAL = 1000
CLOSE_TOO_BIG = 1009
CLOSE_RESTART = 1012
CLOSE_LATER = 1013
CLOSE_FLOOD = 4008
CLOSE_TOKEN_ENDED = 4401
CLOSE_SIGN_IN = 4503
CLOSE_TOO_MANY = 4504
CUT = 1006  # not a code on the wire: the connection ended without a close frame
Id = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
Ref = Annotated[str, msgspec.Meta(max_length=64)]

ClientId = Annotated[
    str, msgspec.Meta(min_length=1, max_length=64, pattern=r"\A[\x20-\x7e]+\Z")
]
Title = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]

# Text may have tabs and line ends. The other control characters of ASCII have no place
# in a chat: they steer terminals, and SQLite's length() stops at NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Command(msgspec.Struct, tag_field="type", frozen=True, kw_only=True):
    """What a client says. ref, if any, comes back with the answer."""

    ref: Ref | None = None


class Ping(Command, frozen=True, tag="ping"):
    """Answered by pong: a page's own check that somebody is there."""


class Typing(Command, frozen=True, tag="typing"):
    """Shown to the other members who are live; never stored."""

    chat_id: Id
    is_typing: bool


class MarkRead(Command, frozen=True, tag="mark_read"):
    """Moves the reader's position up to that message, never down."""

    message_id: Id


class SendMessage(Command, frozen=True, tag="send_message"):
    """Stores a message. With client_id a repeat is told from a second message."""

    chat_id: Id
    content: str
    client_id: ClientId | None = None


class Auth(Command, frozen=True, tag="auth"):
    """A newer token, or ticket, of the same user: the socket lives on with it."""

    token: str


class NewChat(msgspec.Struct, frozen=True):
    """Body of POST /api/v1/chats."""

    member_ids: list[Id] = []
    title: Title | None = None


class UserBody(msgspec.Struct, frozen=True):
    """Body of adding a member, and of revoking."""

    user_id: Id


class PostMessage(msgspec.Struct, frozen=True):
    """Body of SendMessage over HTTP. sender_id is for services only."""

    content: str
    client_id: ClientId | None = None
    sender_id: Id | None = None


class OnlyRef(msgspec.Struct):
    """What can still be read of a command that is wrong."""

    ref: Ref | None = None


class Say(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """What chatd says. Fields that do not apply are left out."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message. n is its place in its chat, without holes."""

    id: int
    chat_id: int
    sender_id: int
    content: str
    created_at: str
    n: int
    client_id: str | None = None


class Member(msgspec.Struct, frozen=True):
    """One member of a chat: the messages up to n = read_n are read."""

    user_id: int
    name: str | None
    read_n: int


class Chat(msgspec.Struct, frozen=True):
    """A chat and its members, as of a seq."""

    id: int
    title: str | None
    members: list[Member]
    last_n: int
    last_message: Message | None


class MyChat(Chat, frozen=True):
    """A chat as one of its members sees it in his list."""

    read_n: int
    unread: int


class User(msgspec.Struct, frozen=True):
    """Somebody who is known."""

    user_id: int
    name: str | None


class Marks(msgspec.Struct, frozen=True):
    """A chat's last n, and the n this user has read up to."""

    last_n: int
    read_n: int


class NewMessage(Say, frozen=True, tag="new_message"):
    """Event: to all members, the sender's own sockets too."""

    seq: int
    chat_id: int
    message: Message


class MessageRead(Say, frozen=True, tag="message_read"):
    """Event: to all members; in a large chat to the reader only."""

    seq: int
    message_id: int
    chat_id: int
    read_by: int
    n: int


class ChatAdded(Say, frozen=True, tag="chat_added"):
    """Event: to the one who is in the chat from here on."""

    seq: int
    chat_id: int
    chat: msgspec.Raw  # a Chat, encoded once for all whom it is told


class MemberAdded(Say, frozen=True, tag="member_added"):
    """Event: to those who were members before."""

    seq: int
    chat_id: int
    user_id: int
    name: msgspec.UnsetType | str | None = msgspec.UNSET


class MemberRemoved(Say, frozen=True, tag="member_removed"):
    """Event: to the rest, and to the removed: the last that he gets."""

    seq: int
    chat_id: int
    user_id: int


class Connected(Say, frozen=True, tag="connected"):
    """The first frame. cursor is where the events that follow start."""

    user_id: int
    timestamp: str
    cursor: str
    resume: str
    expires_in: int
    chats: dict[str, Marks]


class Pong(Say, frozen=True, tag="pong"):
    """Answer to ping."""

    timestamp: str
    ref: str | None = None


class TypingSign(Say, frozen=True, tag="typing"):
    """Somebody types, or has stopped."""

    chat_id: int
    user_id: int
    is_typing: bool


class Ack(Say, frozen=True, tag="ack"):
    """Done, and on disk. Which fields it has depends on the command."""

    ref: str | None = None
    client_id: str | None = None
    message_id: int | None = None
    chat_id: int | None = None
    n: int | None = None
    created_at: str | None = None
    duplicate: bool | None = None
    expires_in: int | None = None


class ErrorFrame(Say, frozen=True, tag="error"):
    """Not done. code is one of REFUSALS."""

    code: str
    message: str
    ref: str | None = None
    retry_after: float | None = None


class TokenExpiring(Say, frozen=True, tag="token_expiring"):
    """Send `auth` soon."""

    expires_in: int


class Bye(Say, frozen=True, tag="bye"):
    """We stop; come back after so many seconds."""

    retry_after: float


Wire = NewMessage | MessageRead | ChatAdded | MemberAdded | MemberRemoved
COMMANDS = msgspec.json.Decoder(Ping | Typing | MarkRead | SendMessage | Auth)
ONLY_REF = msgspec.json.Decoder(OnlyRef)
NEW_CHAT = msgspec.json.Decoder(NewChat)
USER_BODY = msgspec.json.Decoder(UserBody)
POST_MESSAGE = msgspec.json.Decoder(PostMessage)
encode = msgspec.json.Encoder().encode


def parse(text: str | bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode one command or body. Raises Refusal, naming the field that is wrong."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        what, at, field = str(error).rpartition(" - at `$.")
        if not at:  # nothing below the top is wrong: it is the top, or it lacks a field
            if str(error).startswith("Expected `object`"):
                raise Refusal("bad_json", f"not a JSON object: {error}") from None
            raise bad_field(str(error)) from None
        field = field.rstrip("`")
        if field == "type" and what.startswith("Invalid value"):
            raise Refusal("unknown_type") from None
        raise bad_field(f"{field}: {what}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        # Deep nesting is a RecursionError even in a field that nobody asked for.
        raise Refusal("bad_json", f"not JSON: {error}") from None


def check_content(content: str, settings: Settings) -> None:
    """Refuse a text that no message may have."""
    if not content or content.isspace():
        raise bad_field("content: it is empty")
    most = settings.max_content_chars
    if len(content) > most:
        raise bad_field(f"content: {len(content)} characters; at most {most}")
    if found := CONTROL.search(content):
        raise bad_field(f"content: control character U+{ord(found[0]):04X} in it")


@functools.lru_cache(maxsize=64)  # a batch of messages has one or two different seconds
def timestamp(unix_seconds: int) -> str:
    """Write a time as the wire has it: RFC 3339, UTC, whole seconds, Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_seconds))


def now_seconds() -> int:
    """Whole Unix seconds, for what is stored or signed."""
    return int(time.time())


# wsproto's own encoder. Frames to clients are unmasked (RFC 6455 5.1) and we negotiate
# no extension, so the bytes of a frame are the same for everybody who gets it.
_frames = FrameProtocol(client=False, extensions=[])
PING_FRAME = bytes(_frames.ping())


def text_frame(message: Say) -> bytes:
    """Encode a message, once for all who get it."""
    return bytes(_frames.send_data(encode(message).decode()))


def close_frame(code: int, reason: str) -> bytes:
    """Encode a close. The reason is at most 123 bytes (RFC 6455 5.5)."""
    return bytes(_frames.close(code, reason))


def error_frame(no: Refusal, ref: str | None = None) -> bytes:
    """Encode a Refusal as an answer on the socket."""
    return text_frame(ErrorFrame(no.code, no.message, ref, no.retry_after))


# =====================================================================================
# AUTH AND LIMITS: buckets, addresses, keys, tokens
#
# Who is who, and who may do how much. Plain functions and small tables, without Trio:
# the time comes in as an argument. Durations use trio.current_time(); what is signed or
# stored uses time.time().
# =====================================================================================


class Rate(NamedTuple):
    """A token bucket's shape: so many a second in the long run, so many at once.

    A rate of 0 means no limit.
    """

    per_second: float
    burst: float

    def __str__(self) -> str:
        return f"{self.per_second:g}/{self.burst:g}" if self.per_second else "0"


def draw(full_at: float, now: float, rate: Rate) -> tuple[float, float]:
    """Draw one token from a bucket that is full again at full_at (GCRA, ITU-T I.371).

    Returns when it is full now, and 0.0; or full_at and the seconds until there is one.
    """
    if not rate.per_second:
        return 0.0, 0.0
    interval = 1 / rate.per_second
    later = max(full_at, now) + interval
    wait = later - now - rate.burst * interval
    return (full_at, wait) if wait > 1e-9 else (later, 0.0)


class Bucket:
    """One token bucket."""

    __slots__ = ("full_at", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.full_at = 0.0

    def take(self, now: float) -> float:
        """Take one token: 0.0 if there was one, else the seconds until there is."""
        self.full_at, wait = draw(self.full_at, now, self.rate)
        return wait


class Buckets:
    """A table of token buckets, one a key; its only state is when each is full again.

    The table is bounded. When it overflows the oldest key is forgotten, which fills its
    bucket; so invented keys cost memory to nobody.
    """

    def __init__(self, rate: Rate, size: int) -> None:
        self.rate = rate
        self.size = size
        self.full_at: OrderedDict[object, float] = OrderedDict()

    def take(self, key: object, now: float) -> float:
        """Take one token: 0.0 if there was one, else the seconds until there is."""
        if not self.rate.per_second:
            return 0.0
        self.full_at[key], wait = draw(self.full_at.get(key, 0.0), now, self.rate)
        self.full_at.move_to_end(key)
        if len(self.full_at) > self.size:
            self.full_at.popitem(last=False)
        return wait

    def owe(self, key: object, now: float, amount: float) -> None:
        """Take more than one token behind a `take`, even if they are not there yet."""
        if self.rate.per_second:
            full_at = max(self.full_at.get(key, 0.0), now)
            self.full_at[key] = full_at + amount / self.rate.per_second

    def give_back(self, key: object) -> None:
        """Undo one take: what was asked for cost nothing after all."""
        if key in self.full_at:
            self.full_at[key] -= 1 / self.rate.per_second


class Pace:
    """One bucket that may go into debt: it tells how long to wait, not no."""

    __slots__ = ("burst", "level", "rate", "stamp")

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self.burst = rate
        self.level = self.burst
        self.stamp = now

    def spend(self, amount: float) -> None:
        """Take the amount, even if it is not there."""
        self.level -= amount

    def debt_seconds(self, now: float) -> float:
        """How long to wait until nothing is owed."""
        if not self.rate:
            return 0.0
        self.level = min(self.burst, self.level + (now - self.stamp) * self.rate)
        self.stamp = now
        return max(0.0, -self.level / self.rate)


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """Read an IP address; IPv4 in IPv6 clothes is IPv4. None if it is none."""
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


class Proxies:
    """The proxies whose X-Forwarded-... headers are believed."""

    def __init__(self, cidrs: Iterable[str]) -> None:
        self.networks = [ipaddress.ip_network(cidr) for cidr in cidrs if cidr != "none"]

    def trust(self, address: Address | None) -> bool:
        """Is this one of them?"""
        return address is not None and any(address in net for net in self.networks)

    def client(self, peer: Address | None, forwarded: Sequence[str]) -> Address | None:
        """Find the client's address behind the proxies.

        The list is read from the right, where our own proxies wrote; the first address
        that is not one of them is the client. What stands further left the client may
        have written itself. An entry that is no address means the peer.
        """
        if not self.trust(peer):
            return peer
        hops = [parse_address(hop) for hop in ",".join(forwarded).split(",")]
        for hop in reversed(hops):
            if hop is None:
                return peer
            if not self.trust(hop):
                return hop
        return hops[0]


def address_key(address: Address | None) -> str:
    """Name the bucket of an address: IPv6 by /64, which is what one host is given."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)


def same_origin(origin: str, hosts: Iterable[str]) -> bool:
    """Is this page ours: does its Origin name the host that was asked?"""
    scheme, _, host = origin.lower().partition("://")
    usual = {"http": ":80", "https": ":443"}.get(scheme)
    if usual is None:
        return False
    return host.removesuffix(usual) in {h.lower().removesuffix(usual) for h in hosts}


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What a verified token says. Times are Unix seconds."""

    user_id: int
    name: str | None = None
    exp: float
    iat: float | None = None
    scopes: frozenset[str] = frozenset()
    use: str | None = None  # of our own tokens: signin, ticket, session or None
    jti: str = ""  # of a ticket
    boot: str = ""  # of a ticket: the process that gave it
    until: float = 0.0  # of a ticket: how long the socket may live

    @property
    def service(self) -> bool:
        """May it act for any user?"""
        return "service" in self.scopes

    @property
    def ends(self) -> float:
        """When a socket opened with it ends."""
        return self.until if self.use == "ticket" else self.exp

    def expires_in(self) -> int:
        """Whole seconds until then."""
        return max(0, int(self.ends - time.time()))


class Key(NamedTuple):
    """A key and the only algorithm that it is used with (RFC 8725 3.1)."""

    algorithm: str
    key: Any  # what PyJWT takes: bytes, or a public key of `cryptography`
    path: Path | None = None  # of a --jwt-key; None: chatd's own secret

    @property
    def ours(self) -> bool:
        """Is it chatd's own, whose tokens may have scopes?"""
        return self.path is None

    def __str__(self) -> str:
        kind = "shared secret" if self.algorithm == "HS256" else "public key"
        return f"{self.path} ({self.algorithm}, {kind})"


KEY_FILE_BYTES = 65_536

# A file in which this stands is meant as PEM, whatever state it is in.
PEM = re.compile(
    rb"(?i)-{2,} ?(?:BEGIN|END) |\b(?:BEGIN|END) [A-Z0-9 ]*(?:KEY|CERTIFICATE)\b"
)

# How DER begins that is a key or a certificate (X.690 8.1; RFC 5208, 5280, 5915, 8017),
# and, anywhere, the names of the algorithms of public keys (RFC 3279, 8410). It may be
# cut short: the rest of a public key is no secret either. About one in 50 million
# random secrets looks like it.
DER = rb"""(?xs) \A\x30
    (?: LENGTH \x30 LENGTH \x06                      # public; encrypted private keys
      | LONG (?: [\x30\x02] LONG                    # certificates; PKCS 1
             | \x06\x09\x2a\x86 | \x02\x01\x03 )     # PKCS 7; PKCS 12
      | LENGTH \x02\x01[\x00\x01] [\x02\x04\x30] )   # private keys
    | \x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01[\x01\x0a]  # rsaEncryption, RSASSA-PSS
    | \x06\x07\x2a\x86\x48\xce\x3d\x02\x01            # id-ecPublicKey
    | \x30\x05\x06\x03\x2b\x65[\x6e-\x71]            # Ed25519 and its kind
    """
DER = DER.replace(b"LENGTH", rb"(?:[\x00-\x7f]|LONG)")
DER = DER.replace(b"LONG", rb"(?:\x81.|\x82..|\x83...)")

# What else an asymmetric key may come as: how to tell it, and what to do then.
KEY_FORMS = {
    "a key or certificate in DER": (
        re.compile(DER),
        "give a public key as PEM: its base64 between the lines -----BEGIN PUBLIC "
        "KEY----- and -----END PUBLIC KEY-----; docs/embedding.md says how",
    ),
    "an OpenSSH key": (
        re.compile(rb"(?s)\A\x00\x00\x00.(?:ssh|ecdsa|sk|rsa)-|openssh-key-v1\x00"),
        "make it PEM; docs/embedding.md says how",
    ),
    "a PEM block": (
        PEM,
        "a --jwt-key file has the PEM block as it is, not encoded again",
    ),
    "the description of a key (JWK, XML, text)": (
        re.compile(
            rb"(?mi)(?<![a-z])kty\W{1,8}(?:rsa|ec|okp|oct)\b|<(?:modulus|rsakeyvalue)>"
            rb"|^[ \t]*modulus *[:=]|\bpublic[ -]key\b.*:|\bk[1-4]\.public\."
        ),
        "make it PEM; docs/embedding.md says how",
    ),
    "a URL": (
        re.compile(rb"(?i)\A[a-z][a-z0-9+.-]*://\S*\Z|\Adata:\S*\Z|/\.well-known/"),
        "chatd fetches no keys: download it, and give it as PEM",
    ),
}


def read_key_file(what: str, path: Path, *, private: bool) -> bytes:
    """Read the file of a key. Raises UsageError.

    private: nobody else may be able to read it. That is for files that chatd owns; what
    is in $CREDENTIALS_DIRECTORY was put there by the service manager, which sees to its
    protection (systemd.exec(5)). There the mode says little: with an ACL for the unit's
    user, as systemd 254 and newer set one, it is 0440.
    """
    with told_of(what, path), path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        data = file.read(KEY_FILE_BYTES + 1)
        where = path.resolve()
    credentials = variable("CREDENTIALS_DIRECTORY")
    provided = credentials and where.is_relative_to(Path(credentials).resolve())
    if private and mode & 0o077 and not provided:
        why = f"others can read it (mode {mode:04o}): chmod 600 {path}"
        raise UsageError(f"{what} {path}: {why}")
    if len(data) > KEY_FILE_BYTES:
        raise UsageError(
            f"{what} {path}: over {KEY_FILE_BYTES} bytes; no key is so long"
        )
    return data


def check_secret(what: str, path: Path, data: bytes) -> bytes:
    """Return a shared secret without the white space around it. Raises UsageError.

    A public key is no secret: everybody may know it, and could then sign tokens for any
    user. So whatever is an asymmetric key in some form is refused.
    """
    secret = data.strip()
    form, remedy = key_form(data)  # the last byte of a binary key may be white space
    if not form:
        form, remedy = key_form(secret)
    if form:
        remedy = remedy.format(path=path)
        why = f"it holds {form}, which is not a shared secret; {remedy}"
    elif len(secret) < 32:
        why = f"{len(secret)} bytes; it must have at least 32: openssl rand -hex 32"
    else:
        return secret
    raise UsageError(f"{what} {path}: {why}")


def read_secret(path: Path) -> bytes:
    """Read chatd's own secret. Raises UsageError."""
    return check_secret("secret", path, read_key_file("secret", path, private=True))


def read_jwt_key(path: Path) -> Key:
    """Read a key of the site's backend; what it is says which algorithm it serves."""
    data = read_key_file("--jwt-key", path, private=False).removeprefix(codecs.BOM_UTF8)
    if PEM.search(data):
        return read_public_pem(path, data)
    secret = check_secret("--jwt-key", path, data)
    if plain_text(secret) is None:
        raise UsageError(
            f"--jwt-key {path}: it is not text (UTF-8); give a public key as PEM, or a "
            "shared secret such as `openssl rand -hex 32` prints"
        )
    return Key("HS256", secret, path)


def read_public_pem(path: Path, data: bytes) -> Key:
    """Read the one public key of a PEM file (RFC 7468). Raises UsageError."""
    # Only here: it takes longer to import than all the rest.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    ends = re.findall(rb"-----(BEGIN|END) ([^\r\n]*?)-----", data)
    labels = {label for _, label in ends}
    blocks = sum(begin == b"BEGIN" and label.endswith(b"KEY") for begin, label in ends)
    wrong = ""
    if any(b"PRIVATE KEY" in label for label in labels):
        wrong = "a private key; give chatd the public one: openssl pkey -pubout"
    elif any(b"CERTIFICATE" in label for label in labels):
        wrong = f"a certificate; give its key: openssl x509 -pubkey -noout -in {path}"
    elif blocks > 1:
        wrong = f"{blocks} keys in one file; give each a file and a --jwt-key"
    if wrong:
        raise UsageError(f"--jwt-key {path}: {wrong}")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        # Not the library's words: they can quote the file.
        raise UsageError(
            f"--jwt-key {path}: not a PEM public key as a whole; "
            f"`openssl pkey -pubin -noout -in {path}` must read it"
        ) from error
    match key:
        case rsa.RSAPublicKey() if key.key_size >= 2048:
            return Key("RS256", key, path)
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return Key("ES256", key, path)
        case ed25519.Ed25519PublicKey():
            return Key("EdDSA", key, path)
        case _:
            raise UsageError(
                f"--jwt-key {path}: this kind of key is not supported; give an RSA key "
                "of 2048 bits or more, a P-256 key, or an Ed25519 key"
            )


def plain_text(data: bytes) -> str | None:
    """Decode text; None if it is not UTF-8, or has control characters."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if CONTROL.search(text) else text


def key_form(data: bytes, layers: int = 3) -> tuple[str, str]:
    """Name what these bytes are if not a secret, and what to do; two "" if nothing.

    Looks below so many layers of base64, base64url, hex and percent signs. Cannot tell
    32 random bytes from an Ed25519 key that has nothing around it.
    """
    for form, (pattern, remedy) in KEY_FORMS.items():
        if pattern.search(data):
            return form, remedy
    if is_curve_point(data):
        return "a point of an elliptic curve", "give the whole key as PEM"
    text = plain_text(data)
    if text is None:
        return "", ""
    with contextlib.suppress(msgspec.DecodeError):
        if isinstance(msgspec.json.decode(text), dict | list | str):
            return "JSON", "write the key alone, a public one as PEM"
    inner = unwrapped(text) if layers else ()
    found = (key_form(one, layers - 1) for one in inner)
    return next((form for form in found if form[0]), ("", ""))


def unwrapped(text: str) -> Iterator[bytes]:
    """Decode a text in each way in which a key may be wrapped into it."""
    if "%" in text:
        yield urllib.parse.unquote_to_bytes(text)
    # Hex in any style: 3082, 30:82, 0x30, \\x30; with text around it.
    for run in re.findall(r"(?:(?:0[xX]|\\x)?[0-9a-fA-F]{2}[\s:,;._|-]*){16,}", text):
        yield bytes.fromhex(
            "".join(re.findall("[0-9a-fA-F]{2}", run.replace("0x", "")))
        )
    words = re.findall("[A-Za-z0-9+/_-]+", re.sub(r"\\[nrt]", " ", text))
    for word in words:
        # Something may stand right before it, or its first letters may be lost.
        for first in range(4 if len(word) >= 40 else 1):
            yield unbase64(word[first:])
    for start in range(min(len(words), 64)):
        yield unbase64("".join(words[start:]))  # a key of several lines


def unbase64(text: str) -> bytes:
    """Decode base64 of either alphabet (RFC 4648 4 and 5), with what is left of it."""
    text = text.replace("+", "-").replace("/", "_")
    whole = text[:-1] if len(text) % 4 == 1 else text
    return base64.urlsafe_b64decode(whole + "==")


def is_curve_point(data: bytes) -> bool:
    """Is it an uncompressed point (SEC 1, 2.3.3) of a usual curve?"""
    if len(data) not in (65, 97, 133) or data[0] != 4:
        return False
    from cryptography.hazmat.primitives.asymmetric import ec

    for curve in (ec.SECP256R1(), ec.SECP256K1(), ec.SECP384R1(), ec.SECP521R1()):
        with contextlib.suppress(ValueError):
            ec.EllipticCurvePublicKey.from_encoded_point(curve, data)
            return True
    return False


def bad_token(sentence: str = "") -> Refusal:
    """Make the Refusal of a token that is wrong, without repeating any of it."""
    return Refusal("token_invalid", sentence)


class Keyring:
    """The keys, and what a token means under them. Owns the tickets and the revoked.

    A token is a string somebody sent: it is believed when one of our keys, with the
    algorithm of that key, made its signature. Its header decides nothing.
    """

    LEEWAY_SECONDS = 5
    LONGEST = 4096

    def __init__(self, settings: Settings, secret: bytes) -> None:
        self.settings = settings
        self.secret = secret
        self.keys = [Key("HS256", secret)]
        self.keys += [read_jwt_key(path) for path in settings.jwt_key]
        self.boot = secrets.token_urlsafe(9)
        self._known: dict[str, Claims] = {}  # tokens whose signature was right
        self.spent: dict[str, float] = {}  # jti of a used ticket: when to forget it
        self.revoked: dict[int, int] = {}  # user: revoked_at

    def about(self) -> dict[str, str]:
        """Name each --jwt-key and its kind, for the log."""
        names = ", ".join(str(key) for key in self.keys if not key.ours)
        return {"jwt_keys": names} if names else {}

    def sign(self, user_id: int, seconds: int, **claims: Any) -> str:
        """Make a token of our own. Claims that are None are left out."""
        now = now_seconds()
        body = {"user_id": user_id, "iat": now, "exp": now + seconds} | claims
        body = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(body, self.secret, "HS256")

    def ticket(self, claims: Claims) -> str:
        """Make a ticket: one socket, soon, that may live as long as this token."""
        return self.sign(
            claims.user_id,
            self.settings.ticket_seconds,
            use="ticket",
            jti=secrets.token_urlsafe(12),
            boot=self.boot,
            until=claims.exp,
            scope=" ".join(sorted(claims.scopes)) or None,
        )

    def verify(self, token: str, use: str | None = None) -> Claims:
        """Say what a token means. Raises Refusal token_invalid, _expired or _used.

        use is what it is for: None for a request, "signin" for its one purpose, and
        "socket", where a plain token and a ticket are both right. "edge" is that for a
        proxy, which cannot know whose process a ticket is of and whether it was used.
        """
        if len(token) > self.LONGEST:
            raise bad_token(f"token: longer than {self.LONGEST} bytes")
        claims = self._known.get(token)
        if claims is None:
            claims = self._claims(*self._signed_by(token))
            self._keep(token, claims)
        elif claims.exp + self.LEEWAY_SECONDS <= time.time():
            raise Refusal("token_expired")
        if claims.use == "ticket":
            if use not in ("socket", "edge"):
                raise bad_token("a ticket only opens a socket")
            used = claims.boot != self.boot or claims.jti in self.spent
            if used and use == "socket":
                raise Refusal("token_used")
        if claims.use == "signin" and use != "signin":
            raise bad_token("a sign-in link is only good for POST /api/v1/session")
        if claims.use != "signin" and use == "signin":
            raise bad_token("this token is not a sign-in link's")
        self.refuse_revoked(claims)
        return claims

    def refuse_revoked(self, claims: Claims) -> None:
        """Raise the Refusal for a token whose user was revoked since it was signed."""
        if self.is_revoked(claims):
            raise bad_token("this token was revoked: sign in again")

    def _keep(self, token: str, claims: Claims) -> None:
        """Keep what was verified: who polls or posts sends the same token each time.

        Keys do not change while we run; the end and the revocation are looked at anew.
        It saves a sixth of a post. Tickets come once.
        """
        if claims.use != "ticket":
            if len(self._known) >= self.settings.known_tokens:
                self._known.pop(next(iter(self._known)))  # the oldest
            self._known[token] = claims

    def is_revoked(self, claims: Claims) -> bool:
        """Was it signed before, or just after, its user was revoked?"""
        revoked_at = self.revoked.get(claims.user_id)
        if revoked_at is None:
            return False
        return claims.iat is None or claims.iat <= revoked_at + self.LEEWAY_SECONDS

    def spend(self, claims: Claims) -> None:
        """Use a ticket up. Raises Refusal token_used if it is. Other tokens last."""
        if claims.use != "ticket":
            return
        if claims.jti in self.spent:
            raise Refusal("token_used")
        oldest = list(itertools.islice(self.spent.items(), 8))
        for jti, end in oldest:
            if end < time.time():  # up to 8 leave for each that comes: it stays small
                del self.spent[jti]
        self.spent[claims.jti] = claims.exp + self.LEEWAY_SECONDS

    def _signed_by(self, token: str) -> tuple[Key, dict[str, Any]]:
        """Find the key that signed this token, and what it signed."""
        for key in self.keys:
            foreign = not key.ours
            try:
                return key, jwt.decode(
                    token,
                    key.key,
                    algorithms=[key.algorithm],
                    leeway=self.LEEWAY_SECONDS,
                    issuer=self.settings.issuer if foreign else None,
                    audience=self.settings.audience if foreign else None,
                    options={
                        "require": ["exp"],
                        # An integer sub is right for us (PyJWT wants text), and a token
                        # for another audience is refused only if we were told ours.
                        "verify_sub": False,
                        "verify_aud": foreign and self.settings.audience is not None,
                        "enforce_minimum_key_length": True,
                    },
                )
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
            except jwt.ExpiredSignatureError:
                raise Refusal("token_expired") from None
            except (jwt.PyJWTError, ValueError, RecursionError) as error:
                # The class names the fault without repeating any of the token.
                raise bad_token(_token_fault(error)) from None
        raise bad_token()

    def _claims(self, key: Key, body: dict[str, Any]) -> Claims:
        user_id = body.get("user_id", body.get("sub"))
        if "user_id" not in body and isinstance(user_id, str):
            # A decimal string, as RFC 7519 4.1.2 has it; 20 digits are past any id.
            user_id = int(user_id) if re.fullmatch("[0-9]{1,20}", user_id) else None
        if type(user_id) is not int or not 1 <= user_id <= MAX_ID:
            raise bad_token("token: user_id, or else sub, must be a user's number")
        exp, iat = body["exp"], body.get("iat", 0)
        for seconds in (exp, iat):
            if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
                raise bad_token("token: exp and iat must be Unix seconds")
        own = body if key.ours else {}  # what only our own tokens can say
        use, scope = own.get("use"), own.get("scope")
        if use not in (None, "session", "signin", "ticket"):
            raise bad_token("token: its use is unknown")
        return Claims(
            user_id=user_id,
            name=clean_name(body.get("name")),
            exp=exp,
            iat=iat if "iat" in body else None,
            scopes=frozenset(scope.split() if isinstance(scope, str) else ()),
            use=use,
            jti=own.get("jti", ""),
            boot=own.get("boot", ""),
            until=own.get("until", 0.0),
        )


def _token_fault(error: Exception) -> str:
    match error:
        case jwt.MissingRequiredClaimError():
            return f"token: it has no {error.claim}"
        case jwt.InvalidIssuerError():
            return "token: another iss than --issuer"
        case jwt.InvalidAudienceError():
            return "token: another aud than --audience"
        case jwt.ImmatureSignatureError():
            return "token: not valid yet; are the clocks right?"
        case _:
            return REFUSALS["token_invalid"][1]


def clean_name(name: object) -> str | None:
    """Make a name fit to show: one line of at most 64 characters, or None."""
    if not isinstance(name, str):
        return None
    printable = (char if char.isprintable() else " " for char in name[:256])
    return " ".join("".join(printable).split())[:64].strip() or None


# =====================================================================================
# HTTP: one connection, requests one after another
#
# h11 reads the request's head before trio-websocket sees a byte, under one deadline and
# one bound. ROUTES is the table of what can be asked, and by whom.
# =====================================================================================


class Answer(msgspec.Struct, frozen=True):
    """One HTTP answer, whole."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()


def json_answer(body: object, status: int = 200) -> Answer:
    """Answer with JSON."""
    return Answer(status, encode(body))


def refusal_answer(refusal: Refusal) -> Answer:
    """Make a Refusal an HTTP answer; Retry-After is in whole seconds (RFC 9110)."""
    error: dict[str, object] = {"code": refusal.code, "message": refusal.message}
    headers = refusal.headers
    if refusal.retry_after is not None:
        error["retry_after"] = refusal.retry_after
        headers = [*headers, ("Retry-After", str(math.ceil(refusal.retry_after)))]
    if refusal.status == 401:
        headers = [*headers, ("WWW-Authenticate", "Bearer")]
    return Answer(refusal.status, encode({"error": error}), headers=headers)


UPGRADE = [("Upgrade", "websocket"), ("Connection", "Upgrade")]

# What we, or the libraries, decode or compare.
ASCII_FIELDS = frozenset(
    ("host", "connection", "upgrade", "origin", "sec-websocket-key",
     "sec-websocket-version", "sec-websocket-protocol", "sec-websocket-extensions")
)  # fmt: skip


class Request:
    """One request's head, checked, and what is known about who sent it."""

    __slots__ = ("address", "body", "claims", "fields", "head", "ids", "method",
                 "path", "peer", "query", "version")  # fmt: skip

    claims: Claims  # set when the route asks for a token
    ids: tuple[int, ...]  # the numbers in the path
    body: bytes

    def __init__(
        self,
        head: h11.Request,
        peer: Address | None,
        proxies: Proxies,
        settings: Settings,
    ) -> None:
        """Check what h11 lets pass. Raises Refusal bad_field, too_large."""
        lines, most = len(head.headers), settings.header_lines
        if lines > most:
            why = f"{lines} header lines; at most {most}"
            raise Refusal("too_large", why, status=431)
        self.head = head
        self.version = head.http_version
        if self.version not in (b"1.0", b"1.1"):
            raise bad_field("HTTP/1.1 is what we speak")
        self.method = head.method.decode("ascii")
        self.fields: dict[str, list[str]] = {}
        for name, value in head.headers:
            lines_of = self.fields.setdefault(name.decode("ascii"), [])
            lines_of.append(value.decode("latin-1"))
        for field in self.fields:
            if field in ASCII_FIELDS and not self.one(field).isascii():
                raise bad_field(f"{field}: only ASCII may be in it")
        if "transfer-encoding" in self.fields:
            if "content-length" in self.fields:  # RFC 9112 6.1: how one smuggles
                raise bad_field("Content-Length beside Transfer-Encoding")
            if self.version != b"1.1":
                raise bad_field("Transfer-Encoding: not in HTTP/1.0")
        target = head.target.decode("ascii")
        if not target.startswith("/") or target.startswith("//"):
            raise bad_field("target: it must start with exactly one slash")
        self.path, _, query = target.partition("?")
        try:
            self.query = urllib.parse.parse_qs(
                query, keep_blank_values=True, errors="strict", max_num_fields=16
            )
        except ValueError as error:
            raise bad_field(f"query: {error}") from None
        self.peer = peer
        self.address = proxies.client(peer, self.fields.get("x-forwarded-for", []))

    @property
    def user_id(self) -> int:
        """Who asks."""
        return self.claims.user_id

    @property
    def by(self) -> int | None:
        """Which member changes a chat; None: a service."""
        return None if self.claims.service else self.claims.user_id

    @property
    def upgrades(self) -> bool:
        """Is it for the socket's path? Whether it upgrades, check_upgrade will say."""
        return self.path == "/ws/chat" and self.method == "GET"

    def one(self, name: str) -> str:
        """Join the lines of a header (RFC 9110 5.3). Empty if there is none."""
        return ", ".join(self.fields.get(name, ()))

    def argument(self, name: str) -> str | None:
        """Read a query parameter that may stand once. Raises Refusal bad_field."""
        values = self.query.get(name, [])
        if len(values) > 1:
            raise bad_field(f"{name}: given {len(values)} times in the query")
        return values[0] if values else None

    def number(self, name: str, most: int) -> int | None:
        """Read a number from 1 to most in the query. Raises Refusal bad_field."""
        text = self.argument(name)
        if text is None:
            return None
        if not (re.fullmatch("[0-9]{1,20}", text) and 1 <= int(text) <= most):
            raise bad_field(f"{name}: must be a number from 1 to {most}")
        return int(text)

    def bearer(self) -> str:
        """Read the token of Authorization: Bearer. Raises Refusal token_invalid."""
        scheme, _, token = self.one("authorization").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise bad_token("Authorization: Bearer TOKEN is missing")
        return token.strip()

    def has(self, name: str, word: str) -> bool:
        """Is the word in a header that is a list, such as Connection?"""
        return word in {part.strip().lower() for part in self.one(name).split(",")}


class Upgrade(NamedTuple):
    """A handshake that was admitted: all that is left of the request."""

    claims: Claims
    cursor: str | None
    key: str
    trailing: bytes  # what the peer sent right behind it


class Http:
    """One TCP connection: requests one after another (h11), until one upgrades.

    It reads a head under one deadline and one bound, answers, and goes on if both
    sides want to. Each answer is whole; after one to a bad head or to an upgrade that
    is refused the connection ends.
    """

    keeps = True  # a connection for the next request

    def __init__(self, house: House, stream: trio.SocketStream) -> None:
        self.house = house
        self.settings = house.settings
        self.stream = stream
        self.peer = peer_address(stream)
        self.h11 = h11.Connection(
            h11.SERVER, max_incomplete_event_size=self.settings.head_bytes
        )
        self.kept = False  # a keep-alive: it has had an answer
        self.after: Callable[[], Awaitable[None]] | None = None

    async def run(self) -> Callable[[], Awaitable[None]] | None:
        """Serve requests until the connection ends, or is to be a socket.

        Returns what is to be done with the socket. The caller closes the stream.
        """
        try:
            while await self._serve_one():
                self.kept = True
        except trio.BrokenResourceError:
            return None  # the peer has gone; there is nobody to tell
        return self.after

    async def _serve_one(self) -> bool:
        """Serve one request. False: the connection is at its end."""
        request: Request | None = None
        try:
            head = await self._head()
            if head is None:
                return False
            request = Request(head, self.peer, self.house.proxies, self.settings)
            answer = await self.take(request)
            if answer is None:
                return False
        except Refusal as no:
            if request is not None and request.upgrades:
                self.house.stats.refused[no.code] += 1
            answer = refusal_answer(no)
        except h11.RemoteProtocolError as error:
            answer = refusal_answer(_protocol_refusal(error))
        with trio.move_on_after(self.settings.request_seconds):
            await self._respond(request, answer)
            if self.h11.our_state is h11.DONE and self.h11.their_state is h11.DONE:
                self.h11.start_next_cycle()
                return True
            await linger(self.stream, self.settings.linger_seconds)
        return False

    async def take(self, request: Request) -> Answer | None:
        """Do what is asked for. None: this connection has no more requests."""
        raise NotImplementedError

    async def apologize(self) -> None:
        """After a mistake of ours: answer `internal`, unless an answer has begun."""
        with (
            trio.move_on_after(self.settings.linger_seconds),
            contextlib.suppress(trio.BrokenResourceError, h11.LocalProtocolError),
        ):
            await self._respond(None, refusal_answer(Refusal("internal")))

    async def _head(self) -> h11.Request | None:
        """Read a request's head. None: there is no other. Raises Refusal timeout.

        While it is not whole the connection is parked: when the house is full, the one
        that is parked longest makes room, at once and without an answer.
        """
        settings, begun = self.settings, bool(self.h11.trailing_data[0])
        idle = self.kept and not begun
        wait = settings.idle_seconds if idle else settings.head_seconds
        with trio.move_on_after(wait) as scope:
            self.house.park(scope, idle=idle)
            try:
                while True:
                    event = self.h11.next_event()
                    if isinstance(event, h11.Request):
                        if not _has_body(event):
                            self.h11.next_event()  # its end, which h11 knows already
                        return event
                    if event is not h11.NEED_DATA:
                        return None
                    data = await self.stream.receive_some(8192)
                    if not data:
                        return None
                    if not begun:
                        begun = True
                        scope.deadline = trio.current_time() + settings.head_seconds
                        self.house.park(scope, idle=False)
                    self.h11.receive_data(data)
            finally:
                evicted = self.house.parked.pop(scope, None) is None
        if begun and not evicted:
            raise Refusal("timeout", "the request head took too long")
        return None

    async def _more_body(self) -> None:
        """Read on, parked: a full house does not wait for slow bodies."""
        with trio.CancelScope() as scope:
            self.house.park(scope, idle=False)
            try:
                data = await self.stream.receive_some(16384)
            finally:
                self.house.parked.pop(scope, None)
        if scope.cancelled_caught or not data:
            raise trio.BrokenResourceError
        self.h11.receive_data(data)

    async def _respond(self, request: Request | None, answer: Answer) -> None:
        """Write an answer.

        After a bad head, a refused upgrade, or with anything left unread, the
        connection ends with it.
        """
        if self.h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("Date", http_date(now_seconds())),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            *answer.headers,
        ]
        if answer.body:
            headers.append(("Content-Type", answer.content_type))
        if answer.status not in (204, 304):
            headers.append(("Content-Length", str(len(answer.body))))
        if not any(name == "Cache-Control" for name, _ in answer.headers):
            headers.append(("Cache-Control", "no-store"))
        if request is not None:
            headers += self.house.cors_headers(request)
        unread = self.h11.their_state is not h11.DONE
        last = request is None or request.has("upgrade", "websocket")
        if unread or last or not self.keeps or self.house.stopping.is_set():
            headers.append(("Connection", "close"))
        reason = http.HTTPStatus(answer.status).phrase.encode("ascii")
        head = h11.Response(status_code=answer.status, headers=headers, reason=reason)
        parts = [head, h11.EndOfMessage()]
        if answer.body and not (request is not None and request.method == "HEAD"):
            parts.insert(1, h11.Data(data=answer.body))
        await self._send(*parts)

    async def _send(self, *events: h11.Event) -> None:
        await self.stream.send_all(b"".join(self.h11.send(e) or b"" for e in events))


class HttpApi(Http):
    """Requests for the Api, and handshakes."""

    def __init__(self, server: Server, stream: trio.SocketStream) -> None:
        super().__init__(server, stream)
        self.server = server

    async def take(self, request: Request) -> Answer | None:
        """Answer it; or let a socket in."""
        with trio.move_on_after(self.settings.request_seconds) as scope:
            answer = await self._answer(request)
        if scope.cancelled_caught:
            raise Refusal("timeout")
        if answer is None:
            await self._admit(request)
        return answer

    async def _answer(self, request: Request) -> Answer | None:
        """Find the route, check who asks, and do it. None: it upgrades."""
        server = self.server
        if request.upgrades:
            server.check_handshakes(request.address)
        server.check_origin(request)
        if request.upgrades:
            check_upgrade(request)
            return None
        methods = find_methods(request)
        if request.method == "OPTIONS":
            return preflight(methods)
        route = find_route(request, methods)
        try:
            server.admit(request, route.who)
        except Refusal as no:
            if no.status == 401:
                server.check_handshakes(request.address)
            raise
        if route.who != "anyone":
            await server.remember(request.claims)
        request.body = await self._body(request)
        if route.who != "anyone":
            # A body may take its time; who was revoked meanwhile gets nothing for it.
            server.keyring.refuse_revoked(request.claims)
        return await route.handler(Api(server), request)

    async def _body(self, request: Request) -> bytes:
        """Read the body, at most as long as a message. Raises Refusal too_large."""
        most = self.settings.max_message_bytes
        too_large = Refusal("too_large", f"a body of more than {most} bytes")
        if int(request.one("content-length") or 0) > most:  # digits: h11 has checked
            raise too_large
        if self.h11.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        body, chunks = bytearray(), 0
        while self.h11.their_state is h11.SEND_BODY:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                await self._more_body()
            elif isinstance(event, h11.Data):
                body += event.data
                chunks += event.chunk_start
                if len(body) > most:
                    raise too_large
                if chunks > self.settings.chunks:  # each costs us as much as 1 KB
                    why = f"a body in more than {self.settings.chunks} chunks"
                    raise Refusal("too_large", why)
        return bytes(body)

    async def _admit(self, request: Request) -> None:
        """Let a socket in. All that can be refused is refused here, before the 101."""
        server = self.server
        claims = server.admit_socket(request)
        cursor = request.argument("cursor")
        with trio.move_on_after(self.settings.request_seconds):
            await server.remember(claims)
        # No await from here until the session is counted: a house is full at once.
        server.check_house()
        server.keyring.spend(claims)
        key = request.one("sec-websocket-key")
        upgrade = Upgrade(claims, cursor, key, self.h11.trailing_data[0])
        self.after = functools.partial(server.serve_socket, self.stream, upgrade)


def _has_body(head: h11.Request) -> bool:
    return any(n in (b"content-length", b"transfer-encoding") for n, _ in head.headers)


def _protocol_refusal(error: h11.RemoteProtocolError) -> Refusal:
    if error.error_status_hint == 431:
        return Refusal("too_large", "the request head is too long", status=431)
    # Not in h11's words: they repeat what was sent, and that may be a token.
    return bad_field("not HTTP/1.1: a malformed request line, header or body")


def switching_protocols(key: str) -> bytes:
    """Write the answer that opens a socket (RFC 6455 4.2.2)."""
    accept = wsproto.utilities.generate_accept_token(key.encode("ascii"))
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def check_upgrade(request: Request) -> None:
    """Check a handshake as RFC 6455 4.2.1 asks. Raises Refusal."""
    asked = request.has("upgrade", "websocket") and request.has("connection", "upgrade")
    if not asked:
        raise Refusal("upgrade_required", headers=UPGRADE)
    if request.version != b"1.1":
        raise Refusal("upgrade_required", headers=UPGRADE[:1])
    if request.one("sec-websocket-version") != "13":
        why, known = "Sec-WebSocket-Version: must be 13", "Sec-WebSocket-Version"
        raise Refusal("upgrade_required", why, headers=[(known, "13")])
    length = request.one("content-length")
    if length not in ("", "0") or "transfer-encoding" in request.fields:
        raise bad_field("Content-Length: an upgrade has no body")
    key = request.one("sec-websocket-key")
    # 16 bytes in base64 are 22 characters and two =, the last with 4 unused bits.
    if not re.fullmatch(r"[A-Za-z0-9+/]{21}[AQgw]==", key, re.ASCII):
        raise bad_field("Sec-WebSocket-Key: must be 16 bytes in base64")


def peer_address(stream: trio.SocketStream) -> Address | None:
    """Who is at the other end: None if it has gone, or is not on a network."""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return None
    return parse_address(name[0].partition("%")[0]) if isinstance(name, tuple) else None


@functools.lru_cache(maxsize=2)
def http_date(unix_seconds: int) -> str:
    """Write the Date header (RFC 9110 6.6.1)."""
    return email.utils.formatdate(unix_seconds, usegmt=True)


CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/index.html": ("index.html", "text/html; charset=utf-8"),
    "/web/style.css": ("style.css", "text/css; charset=utf-8"),
    "/web/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/web/chat-websocket.js": ("chat-websocket.js", "text/javascript; charset=utf-8"),
}


def page_answers() -> dict[str, Answer]:
    """Read the page's files, once: no path of a request ever reaches the disk."""
    answers = {}
    for path, (name, content_type) in PAGE_FILES.items():
        body = (ASSETS / "web" / name).read_bytes()
        headers = [
            ("Content-Security-Policy", CSP),
            ("Cache-Control", "no-cache"),
            ("ETag", f'"{hashlib.sha256(body).hexdigest()[:32]}"'),
        ]
        answers[path] = Answer(200, body, content_type, headers)
    return answers


class Api:
    """The handlers of ROUTES, in its order.

    Each gets a request whose token was checked as its route says, with its body read.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = server.store
        self.hub = server.hub

    async def page(self, request: Request) -> Answer:
        """A file of the page, or 304 to who has it."""
        answer = self.server.pages[request.path]
        if request.one("if-none-match") == dict(answer.headers)["ETag"]:
            return Answer(304, headers=answer.headers)
        return answer

    async def socket(self, request: Request) -> Answer:
        """HEAD: a GET upgrades, or is refused, before a route is looked for."""
        raise Refusal("upgrade_required", headers=UPGRADE)

    async def ws_token(self, request: Request) -> Answer:
        """A ticket: so that the page need not put its token in an address."""
        ticket = self.server.keyring.ticket(request.claims)
        seconds = self.server.settings.ticket_seconds
        return json_answer({"token": ticket, "expires_in": seconds})

    async def session(self, request: Request) -> Answer:
        """Exchange a sign-in link's token for a session token."""
        user_id, seconds = request.user_id, self.server.settings.session_seconds
        name = await self._name(request)
        token = self.server.keyring.sign(user_id, seconds, use="session", name=name)
        return json_answer(
            {"token": token, "expires_in": seconds, "user_id": user_id, "name": name}
        )

    async def me(self, request: Request) -> Answer:
        """Who am I?"""
        return json_answer(User(request.user_id, await self._name(request)))

    async def _name(self, request: Request) -> str | None:
        told = request.claims.name
        return told or await self.store.read(self.store.name, request.user_id)

    async def users(self, request: Request) -> Answer:
        """Who is known: to choose from, where users may create chats."""
        self._may_change_chats(request)
        return json_answer({"users": await self.store.read(self.store.users)})

    def _may_change_chats(self, request: Request) -> None:
        if self.server.settings.chats_by != "user" and not request.claims.service:
            raise Refusal("forbidden", "here only the service creates chats")

    async def chats(self, request: Request) -> Answer:
        """My chats, and the cursor from which to listen to them."""
        upto = self.hub.head
        chats = await self.store.read(self.store.my_chats, request.user_id, upto)
        return json_answer({"chats": chats, "cursor": self.server.write_cursor(upto)})

    async def create_chat(self, request: Request) -> Answer:
        """Make a chat; a user is always a member of what it creates."""
        self._may_change_chats(request)
        new = parse(request.body, NEW_CHAT)
        title = new.title or ""
        if title.isspace() or re.search(r"[\0-\x1f\x7f]", title):
            raise bad_field("title: it is empty or has a control character")
        members = {*new.member_ids} | ({request.by} if request.by else set())
        if not request.claims.service:
            # Every member is told, with all members: ten of them cost as a request.
            now, tokens = trio.current_time(), len(members) // 10
            self.server.requests.owe(request.user_id, now, tokens)
        chat = await self.store.do(self.store.create_chat, new.title, members)
        return json_answer({"chat": chat}, 201)

    async def add_member(self, request: Request) -> Answer:
        """Add a user to a chat: 201, or 200 if he is in it."""
        self._may_change_chats(request)
        (chat_id,) = request.ids
        user_id = parse(request.body, USER_BODY).user_id
        add = self.store.add_member
        added = await self.store.do(add, chat_id, user_id, request.by)
        body = {"chat_id": chat_id, "user_id": user_id}
        return json_answer(body, 201 if added else 200)

    async def remove_member(self, request: Request) -> Answer:
        """Leave a chat; a service may remove anybody. Effective at once."""
        chat_id, user_id = request.ids
        if request.by not in (None, user_id):
            raise Refusal("forbidden", "only the member or a service may do that")
        remove = self.store.remove_member
        await self.store.do(remove, chat_id, user_id, request.by)
        return Answer(204)

    async def history(self, request: Request) -> Answer:
        """A page of messages, oldest first."""
        limit = request.number("limit", 100) or 50
        before = request.number("before", MAX_ID)
        where = (request.user_id, *request.ids, before, limit, self.hub.head)
        messages, more = await self.store.read(self.store.history, *where)
        return json_answer({"messages": messages, "more": more})

    async def send(self, request: Request) -> Answer:
        """SendMessage: 201, or 200 for a repeat."""
        claims, (chat_id,) = request.claims, request.ids
        post = parse(request.body, POST_MESSAGE)
        check_content(post.content, self.server.settings)
        if post.sender_id not in (None, claims.user_id) and not claims.service:
            raise Refusal("forbidden", "sender_id: only a service may send for others")
        sender_id = post.sender_id or claims.user_id
        send = Send(chat_id, sender_id, post.content, _idempotency_key(request, post))
        sent = await self.server.allow_send(claims, send)
        if sent is None:
            work = self.store.send_message
            sent = await self.store.do(work, send, claims.service)
            self.server.count_sent(sent, sender_id)
        return json_answer(sent._asdict(), 200 if sent.duplicate else 201)

    async def mark_read(self, request: Request) -> Answer:
        """MarkMessageAsRead."""
        mark = self.store.mark_read
        marked = await self.store.do(mark, request.user_id, *request.ids)
        message_id, chat_id, n, _ = marked
        return json_answer({"message_id": message_id, "chat_id": chat_id, "n": n})

    async def events(self, request: Request) -> Answer:
        """The poll: what a socket would have said since the cursor."""
        limit = request.number("limit", 500) or 100
        given, upto = request.argument("cursor"), self.hub.head
        store, user_id = self.store, request.user_id
        start = self.server.parse_cursor(given)
        resync = given is not None and start is None
        page = Page([], upto, more=False)
        if start is not None and start < upto:
            resync = await store.read(store.missed, user_id, start, upto) is None
            if not resync:
                page = await store.read(store.events_after, user_id, start, upto, limit)
        return json_answer(
            {
                "events": [event.wire for event in page.events],
                "cursor": self.server.write_cursor(page.cursor),
                "more": page.more,
                "resync": resync,
            }
        )

    async def stats(self, request: Request) -> Answer:
        """Did we lose anything; who was cut, and why?"""
        return json_answer(self.server.stats_document())

    async def metrics(self, request: Request) -> Answer:
        """The same numbers, for Prometheus."""
        text = prometheus_text(self.server.stats_document())
        return Answer(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def revoke(self, request: Request) -> Answer:
        """Refuse all tokens of a user so far, and close his sockets."""
        user_id, closed = parse(request.body, USER_BODY).user_id, 0

        def close(revoked_at: int) -> None:
            nonlocal closed
            closed = self.server.revoke(user_id, revoked_at)

        await self.store.do(self.store.revoke, user_id, then=close)
        return json_answer({"user_id": user_id, "closed": closed})

    async def health(self, request: Request) -> Answer:
        """Is it well: 200, or 503 while stopping or degraded."""
        if self.server.stopping.is_set():
            return json_answer({"status": "stopping"}, 503)
        if self.store.degraded:
            return json_answer({"status": "degraded"}, 503)
        return json_answer({"status": "ok"})


def _idempotency_key(request: Request, post: PostMessage) -> str | None:
    """Read client_id, or the header of the same meaning. Raises Refusal bad_field."""
    if "idempotency-key" not in request.fields:
        return post.client_id
    key = request.one("idempotency-key")
    if not re.fullmatch(r"[\x20-\x7e]{1,64}", key):
        raise bad_field("Idempotency-Key: must be 1-64 printable ASCII")
    if post.client_id not in (None, key):
        raise bad_field("client_id: differs from Idempotency-Key")
    return key


class Route(NamedTuple):
    """Who may do it (anyone, user, service, stats, signin), and what does it."""

    who: str
    handler: Callable[[Api, Request], Awaitable[Answer]]


# A * is a number in the path.
ROUTES: dict[str, dict[str, Route]] = {
    **{path: {"GET": Route("anyone", Api.page)} for path in PAGE_FILES},
    "/ws/chat": {"GET": Route("anyone", Api.socket)},
    "/api/v2/ws-token": {"GET": Route("user", Api.ws_token)},
    "/api/v1/session": {"POST": Route("signin", Api.session)},
    "/api/v1/me": {"GET": Route("user", Api.me)},
    "/api/v1/users": {"GET": Route("user", Api.users)},
    "/api/v1/chats": {
        "GET": Route("user", Api.chats),
        "POST": Route("user", Api.create_chat),
    },
    "/api/v1/chats/*/members": {"POST": Route("user", Api.add_member)},
    "/api/v1/chats/*/members/*": {"DELETE": Route("user", Api.remove_member)},
    "/api/v1/chats/*/messages": {
        "GET": Route("user", Api.history),
        "POST": Route("user", Api.send),
    },
    "/api/v1/messages/*/read": {"POST": Route("user", Api.mark_read)},
    "/api/v1/events": {"GET": Route("user", Api.events)},
    "/api/v1/internal/chat/ws/stats": {"GET": Route("stats", Api.stats)},
    "/metrics": {"GET": Route("stats", Api.metrics)},
    "/api/v1/internal/chat/revoke": {"POST": Route("service", Api.revoke)},
    "/healthz": {"GET": Route("anyone", Api.health)},
}
NUMBER = re.compile(r"(?<=/)[0-9]{1,16}(?=/|\Z)", re.ASCII)


def find_methods(request: Request) -> dict[str, Route]:
    """Find what a path takes, and the numbers in it. Raises Refusal not_found."""
    request.ids = tuple(int(number) for number in NUMBER.findall(request.path))
    methods = ROUTES.get(NUMBER.sub("*", request.path))
    known = methods and "*" not in request.path
    if not methods or not known or not all(1 <= n <= MAX_ID for n in request.ids):
        raise Refusal("not_found", "there is nothing at this path")
    return methods


def find_route(request: Request, methods: dict[str, Route]) -> Route:
    """Find what a request is for. HEAD is GET without the body (RFC 9110 9.3.2)."""
    route = methods.get("GET" if request.method == "HEAD" else request.method)
    if route is None:
        allow = [("Allow", allowed_methods(methods))]
        raise Refusal("method_not_allowed", headers=allow)
    return route


def allowed_methods(methods: Iterable[str]) -> str:
    """List what a path takes, for Allow."""
    extra = ["HEAD"] if "GET" in methods else []
    return ", ".join([*methods, *extra, "OPTIONS"])


def preflight(methods: Iterable[str]) -> Answer:
    """Answer OPTIONS, a browser's question before a request from another origin."""
    allow = allowed_methods(methods)
    fields = "authorization, content-type, idempotency-key"
    headers = [
        ("Allow", allow),
        ("Access-Control-Allow-Methods", allow),
        ("Access-Control-Allow-Headers", fields),
        ("Access-Control-Max-Age", "600"),
    ]
    return Answer(204, headers=headers)


_FULL = encode({"error": {"code": "overloaded", "message": REFUSALS["overloaded"][1]}})

FULL_ANSWER = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(_FULL)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
).encode("ascii") + _FULL

# =====================================================================================
# MONITORING: log lines, stats, metrics
#
# One line for each thing that happens, one document of numbers, and the same numbers
# for Prometheus.
# =====================================================================================


def say(level: int, verb: str, **fields: object) -> None:
    """Log one event: one line, a verb, fields. User text cannot forge a line.

    ascii() escapes line ends, escape sequences and right-to-left marks. Callers never
    pass a token or a text of a message.
    """
    if logger.isEnabledFor(level):
        words = (
            f"{name}={value if isinstance(value, int) else ascii(str(value))}"
            for name, value in fields.items()
        )
        logger.log(level, "%s", " ".join((verb, *words)))


def say_mistake(verb: str, error: BaseException) -> None:
    """Log a mistake of ours: what it was and where, innermost first.

    Not its text: that may hold anything that came over the wire.
    """
    kinds, places = [], []
    cause: BaseException | None = error
    while cause is not None:
        kinds.append(type(cause).__name__)
        frames = traceback.extract_tb(cause.__traceback__)[:-9:-1]
        places += [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
        cause = cause.__cause__
    say(logging.ERROR, verb, error=" from ".join(kinds), at=" < ".join(places))


def in_journal() -> bool:
    """Does what we write to stderr go to the journal (systemd.exec(5))?"""
    with contextlib.suppress(OSError):
        there = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"
    return False


class Formatter(logging.Formatter):
    """One line an event; in the journal with the priority that sd-daemon(3) defines."""

    PRIORITIES: ClassVar = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(levelname)s %(message)s")
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        priority = f"<{self.PRIORITIES[record.levelname]}>" if self.journal else ""
        return priority + super().format(record)


def set_up_log(level: str) -> None:
    """Log to stderr. trio-websocket stays silent: it would log every frame."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(journal=in_journal()))
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logging.getLogger("trio-websocket").setLevel(logging.CRITICAL)


class Stats:
    """What happened since the start, in the words of the stats document."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.total = self.deliveries = self.writes = self.catch_ups = self.stalls = 0
        self.commits = self.messages = self.batch_max = self.duplicates = 0
        self.failed = 0
        self.closed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.rate_limited: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.resumes: Counter[str] = Counter(fresh=0, live=0, replay=0, resync=0)
        self.commit_times: deque[float] = deque(maxlen=1024)
        self.commit_max = 0.0

    def committed(self, seconds: float, jobs: int) -> None:
        """Count one commit and the time it took."""
        self.commits += 1
        self.batch_max = max(self.batch_max, jobs)
        self.commit_times.append(seconds)
        self.commit_max = max(self.commit_max, seconds)

    def commit_seconds(self) -> dict[str, float]:
        """p50 and p99 of the last 1,024 commits, and the longest of all."""
        ranked = sorted(self.commit_times) or [0.0]
        p50, p99 = (ranked[len(ranked) * part // 100] for part in (50, 99))
        seconds = {"p50": p50, "p99": p99, "max": self.commit_max}
        return {name: round(value, 6) for name, value in seconds.items()}


# Of the stats document, what only ever grows; all other numbers are gauges.
COUNTERS = frozenset(
    {"total", "closed", "refused", "events", "deliveries", "writes", "catch_ups",
     "stalls", "commits", "messages", "duplicates", "failed", "resumes",
     "rate_limited", "errors"}
)  # fmt: skip

LABELS = {
    "closed": "code", "refused": "code", "events": "type", "resumes": "kind",
    "rate_limited": "limit", "errors": "type", "commit_seconds": "quantile",
}  # fmt: skip


def prometheus_text(document: dict[str, Any]) -> bytes:
    """Write the stats document in Prometheus's text format.

    A name is the path in the document; a table becomes one metric with a label.
    """
    # Imported at the first scrape: it would be a tenth of the time to get ready.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return families("chatd", document)

    def families(prefix: str, part: dict[str, Any]) -> Iterator[Metric]:
        for name, value in part.items():
            family = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            if isinstance(value, str):
                info = GaugeMetricFamily(f"{prefix}_{name}_info", name, labels=[name])
                info.add_metric([value], 1)
                yield info
            elif name in LABELS:
                metric = family(f"{prefix}_{name}", name, labels=[LABELS[name]])
                for label, number in value.items():
                    metric.add_metric([label], number)
                yield metric
            elif isinstance(value, dict):
                yield from families(f"{prefix}_{name}", value)
            else:
                yield family(f"{prefix}_{name}", name, value=float(value))

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


# =====================================================================================
# PROXY: `chatd proxy`
#
# `chatd proxy` is a second process, before a chatd that listens elsewhere: the one door
# of a site, where who has no good token for a socket gets no further. The one idea: it
# passes nothing on that it has not understood. A request is read by h11 and written
# anew by h11, one a connection; what stands behind it is never read as a request, so
# nothing is smuggled past. Only behind the upstream's own 101 do bytes pass as they
# are. What one end does not take is not read from the other: nothing queues here.
#
# It cannot judge all of a token: which tickets were used and which users revoked only
# the upstream knows, and refuses them. No request is sent twice.
# =====================================================================================


def proxy(settings: Settings, upstream: str) -> None:
    """Be the door of a chatd that listens elsewhere, until a signal says stop."""
    settings = raise_file_limit(settings, each=2)
    host, _, port = upstream.rpartition(":")
    dial = functools.partial(trio.open_tcp_stream, host.strip("[]"), int(port))
    house = Proxy(settings, read_keyring(settings), upstream, dial)
    trio.run(_serve, house, announce)


CHUNK_BYTES = 16_384  # in the hands of one direction, and no more

# What concerns one connection and not the message (RFC 9110 7.6.1).
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate",
     b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip

# What we say ourselves: how long the body is, and who asks.
OURS = re.compile(rb"host|content-length|forwarded|x-forwarded.*|x-real-ip")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time: a close is a reset


def end_to_end(
    headers: Iterable[tuple[bytes, bytes]], *ours: tuple[str, str]
) -> list[tuple[bytes, bytes]]:
    """Leave out what concerns one connection, and what Connection names; add ours."""
    headers = [(name.lower(), value) for name, value in headers]
    lists = [value.lower() for name, value in headers if name == b"connection"]
    named = {part.strip() for part in b",".join(lists).split(b",")}
    kept = [(n, v) for n, v in headers if n not in HOP_BY_HOP and n not in named]
    return kept + [(n.encode("ascii"), v.encode("latin-1")) for n, v in ours]


def reset(stream: trio.SocketStream) -> None:
    """Close with RST: the other side must not take what it has for the whole."""
    with contextlib.suppress(OSError):  # it is closed already
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    stream.socket.close()


class IdleScope:
    """A cancel scope that ends when nothing has moved for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.scope = trio.CancelScope()
        self.moved()

    def moved(self) -> None:
        """Begin to wait anew."""
        self.scope.deadline = trio.current_time() + self.seconds


class Passage(Http):
    """One connection of the proxy: one request passed up, its answer passed down."""

    keeps = False

    def __init__(self, house: Proxy, stream: trio.SocketStream) -> None:
        super().__init__(house, stream)
        self.proxy = house
        self.idle = IdleScope(self.settings.upstream_seconds)
        self.hearing = False  # waiting for the client, not for the upstream
        self.status = 0  # of the answer, once there is one
        self.no: Refusal | None = None  # why there is none
        self.up = h11.Connection(
            h11.CLIENT, max_incomplete_event_size=self.settings.head_bytes
        )
        self.upstream: trio.SocketStream

    async def take(self, request: Request) -> None:
        """Pass it up, if it may pass; whatever comes of it, it was the only one."""
        if request.method == "CONNECT":
            raise bad_field("method: CONNECT is not passed on")
        if request.upgrades:
            self.proxy.check_handshakes(request.address)
            check_upgrade(request)
            self.proxy.admit_socket(request, "edge")
        self.idle.moved()
        with self.idle.scope as scope:
            await self._exchange(request)
        if scope.cancelled_caught:
            away = Refusal("upstream", "the chat service does not answer", status=504)
            self.no = Refusal("timeout") if self.hearing else away
        # A path or a method that nobody knows may hold anything, a token too.
        path = request.path if NUMBER.sub("*", request.path) in ROUTES else "?"
        known = request.method in http.HTTPMethod.__members__
        method = request.method if known else "?"
        say(logging.DEBUG, "passed", method=method, path=path,
            client=request.address, status=self.status,
            failed=self.no and self.no.code)  # fmt: skip
        if self.no is not None and self.status:
            reset(self.stream)  # the answer has begun: it must not look whole
        elif self.no is not None:
            raise self.no
        elif self.after is None:
            await linger(self.stream, self.settings.linger_seconds)

    async def _exchange(self, request: Request) -> None:
        """Pass the request up and the answer down. Sets no, or after, or neither."""
        try:
            self.upstream = await self.proxy.dial()
        except OSError as error:
            self.no = self._away(error)
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_up, request, nursery.cancel_scope)
                await self._pass_down(request)
                nursery.cancel_scope.cancel()
            if self.status == 101:
                said, heard = self.h11.trailing_data[0], self.up.trailing_data[0]
                tunnel = Tunnel(self.proxy, self.stream, self.upstream)
                self.after = functools.partial(tunnel.run, said, heard)
        finally:
            if self.after is None:
                self.upstream.socket.close()

    def _away(self, why: object) -> Refusal:
        self.proxy.complain("upstream_failed", why)
        return Refusal("upstream")

    # --- up --------------------------------------------------------------------------

    async def _pass_up(self, request: Request, both: trio.CancelScope) -> None:
        """Pass the head, and exactly the body. A body that is none ends both ways."""
        await self._give(self._head_up(request))
        try:
            while self.h11.their_state is h11.SEND_BODY:
                event = self.h11.next_event()
                if isinstance(event, h11.Data):
                    await self._give(h11.Data(data=event.data))
                elif event is h11.NEED_DATA:
                    self.hearing = True
                    await self._more_body()
                    self.hearing = False
        except h11.RemoteProtocolError as error:
            self.no = _protocol_refusal(error)
            both.cancel()
            return
        await self._give(h11.EndOfMessage())

    def _head_up(self, request: Request) -> h11.Request:
        """Write the head anew: the message's own headers, and ours about the client."""
        fields = request.fields
        told = fields if self.proxy.proxies.trust(request.peer) else {}
        host = request.one("host") or self.proxy.upstream
        ours = [
            ("Host", host),
            ("X-Forwarded-Host", ", ".join(told.get("x-forwarded-host", [host]))),
            ("X-Forwarded-Proto", ", ".join(told.get("x-forwarded-proto", ["http"]))),
            ("Via", f"{request.version.decode('ascii')} chatd"),
        ]
        if request.address is not None:
            ours.append(("X-Forwarded-For", str(request.address)))
        if "content-length" in fields:
            ours.append(("Content-Length", request.one("content-length")))
        elif "transfer-encoding" in fields:
            ours.append(("Transfer-Encoding", "chunked"))
        ours += UPGRADE if request.upgrades else [("Connection", "close")]
        head = request.head
        theirs = [(n, v) for n, v in head.headers if not OURS.fullmatch(n)]
        headers = end_to_end(theirs, *ours)
        return h11.Request(method=head.method, target=head.target, headers=headers)

    async def _give(self, event: h11.Event) -> None:
        """Write to the upstream. If it has gone, `_pass_down` will find out."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.upstream.send_all(self.up.send(event) or b"")
        self.idle.moved()

    # --- down ------------------------------------------------------------------------

    async def _pass_down(self, request: Request) -> None:
        """Pass the answer, framed anew, up to its end or to the 101."""
        try:
            while True:
                event = await self._next()
                if isinstance(event, h11.InformationalResponse):
                    if request.version == b"1.1":  # 1.0 knows none
                        await self._send(_head_down(event))
                    if event.status_code == 101:
                        self.status = 101
                        return
                elif isinstance(event, h11.Response):
                    self.status = event.status_code
                    await self._send(_head_down(event))
                elif isinstance(event, h11.Data):
                    await self._send(h11.Data(data=event.data))
                else:
                    await self._send(h11.EndOfMessage())
                    return
                self.idle.moved()
        except Refusal as no:
            self.no = no

    async def _next(self) -> object:
        """Get the upstream's next event. Raises Refusal upstream."""
        try:
            while (event := self.up.next_event()) is h11.NEED_DATA:
                self.up.receive_data(await self.upstream.receive_some(CHUNK_BYTES))
                self.idle.moved()
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise self._away(type(error).__name__) from error
        headers = {name for name, _ in getattr(event, "headers", ())}
        if {b"content-length", b"transfer-encoding"} <= headers:
            raise self._away("Content-Length beside Transfer-Encoding")
        return event


def _head_down(event: h11.Response | h11.InformationalResponse) -> h11.Event:
    """Write the answer's head anew. h11 frames what follows as its reader needs it."""
    ours = [("Connection", "close")] if event.status_code >= 200 else []
    if event.status_code == 101:
        ours = UPGRADE
    headers = end_to_end(event.headers, *ours)
    return type(event)(
        status_code=event.status_code, headers=headers, reason=event.reason
    )


class FrameEnds:
    """Finds where frames end in the bytes of a peer (RFC 6455 5.2)."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0  # of the frame's payload

    @property
    def whole(self) -> bool:
        """Is no frame begun and not ended?"""
        return not self._head and not self._left

    def count(self, data: bytes) -> None:
        """Follow what passes."""
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
                continue
            self._head.append(data[at])
            at += 1
            if len(self._head) < 2:
                continue
            length = self._head[1] & 127
            size = {126: 2, 127: 8}.get(length, 0)
            mask = 4 * (self._head[1] >> 7)
            if len(self._head) == 2 + size + mask:
                long = int.from_bytes(self._head[2 : 2 + size])
                self._left = long if size else length
                self._head.clear()


class Tunnel:
    """A socket's two connections after the 101: what one says the other hears.

    The end of one side is passed on, and so is a reset. When the proxy stops, it writes
    a close frame behind the client's last whole one, as if it were his: the upstream's
    answer then closes the socket as it should be closed, with 1012 for the client.
    """

    def __init__(
        self, proxy: Proxy, client: trio.SocketStream, upstream: trio.SocketStream
    ) -> None:
        self.proxy = proxy
        self.client = client
        self.upstream = upstream
        self.idle = IdleScope(proxy.settings.idle_seconds)
        self.frames = FrameEnds()
        self.close = b""  # the frame that ends it, when we do
        self.ended = False  # the upstream has said all
        self.reading = trio.CancelScope()

    def end(self, code: int, reason: str) -> None:
        """Close it behind the client's last whole frame."""
        frames = FrameProtocol(client=True, extensions=[])  # a client's are masked
        self.close = bytes(frames.close(code, reason))
        if self.frames.whole:
            self.reading.cancel()

    async def run(self, said: bytes, heard: bytes) -> None:
        """Live its life, from what both sides have sent. Owns the upstream's side."""
        self.proxy.sessions.add(self)
        if self.proxy.stopping.is_set():
            self.end(CLOSE_RESTART, "the server restarts")
        self.idle.moved()
        broken = False
        try:
            with self.idle.scope as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._up, said)
                    nursery.start_soon(self._down, heard)
                await linger(self.client, self.proxy.settings.linger_seconds)
            broken = scope.cancelled_caught
        except* trio.BrokenResourceError:
            broken = True
        finally:
            self.proxy.left(self)
            if broken:
                reset(self.client)
                reset(self.upstream)
            self.upstream.socket.close()

    async def _up(self, data: bytes) -> None:
        while not (self.close and self.frames.whole):
            if not data:
                with trio.CancelScope() as self.reading:
                    data = await self.client.receive_some(CHUNK_BYTES)
                    if not data:
                        await self._pass_end(self.upstream)
                        return
                continue
            self.frames.count(data)
            try:
                await self.upstream.send_all(data)
            except trio.BrokenResourceError:
                if self.ended:
                    return  # nothing is lost: what else he says nobody would hear
                raise
            self.idle.moved()
            data = b""
        await self.upstream.send_all(self.close)

    async def _down(self, data: bytes) -> None:
        while data := data or await self.upstream.receive_some(CHUNK_BYTES):
            await self.client.send_all(data)
            self.idle.moved()
            data = b""
        self.ended = True
        await self._pass_end(self.client)

    async def _pass_end(self, stream: trio.SocketStream) -> None:
        """One side says no more. The other has not much longer to do so too."""
        with contextlib.suppress(trio.BrokenResourceError):  # it has gone already
            await stream.send_eof()
        self.idle.seconds = self.proxy.settings.stall_seconds
        self.idle.moved()


class Proxy(House):
    """The whole of one proxy. dial connects to the upstream: the seam for tests."""

    def __init__(
        self,
        settings: Settings,
        keyring: Keyring,
        upstream: str,
        dial: Callable[[], Awaitable[trio.SocketStream]],
    ) -> None:
        super().__init__(settings, Stats(), keyring)
        self.upstream = upstream
        self.dial = dial
        self.http = functools.partial(Passage, self)
        self.sessions: set[Tunnel] = set()
        self.about = {"upstream": upstream}

    def left(self, tunnel: Tunnel) -> None:
        """Count a socket out."""
        self.sessions.discard(tunnel)
        self._end_parked()


# =====================================================================================
# OPERATIONS: systemd, listening sockets, files, backup, restore, check
#
# How a person or a service manager meets chatd. Errors here are sentences: what was
# wrong, with which value, and what to do.
# =====================================================================================


def notify(state: str, fds: Sequence[int] = (), *, wait_seconds: float = 5) -> None:
    """Tell systemd (sd_notify(3)), and hand it descriptors; without it, nothing.

    All stands still until it has room for the words: a systemd that hangs must not
    hang us for longer than that.
    """
    address = variable("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # a name in the abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait_seconds)
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], fds)
    except OSError as error:
        say(logging.WARNING, "notify_failed", error=error)


def raise_file_limit(settings: Settings, each: int = 1) -> Settings:
    """Get descriptors for max_connections + 256, or say by how much it is lowered.

    each is how many a connection takes.
    """
    wanted = (settings.max_connections + 256) * each
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        soft = max(soft, top)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return settings
    fewer = max(1, soft // each - 256)
    say(logging.WARNING, "fewer_connections", max_connections=fewer, open_files=soft)
    return dataclasses.replace(settings, max_connections=fewer)


@contextlib.contextmanager
def locked(db: Path) -> Iterator[None]:
    """Hold the lock of a database: one serve, or one restore. Raises UsageError."""
    path = beside(db.resolve(), ".lock")  # a link is the same database
    if not path.parent.is_dir():
        raise UsageError(
            f"database {db}: there is no folder {path.parent}; make it, or name "
            "another database with --db"
        )
    with told_of("lock", path):
        # Root does this too, in a folder of the unit's user: it follows no link there.
        how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, how, 0o600)
    with open(fd, "r+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"database {db}: in use by process {file.read().strip() or '?'}; stop "
                "that one first (systemctl stop chatd), or name another with --db"
            ) from None
        keep_owner(db.parent, path)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def keep_owner(like: Path, *paths: Path) -> None:
    """Give what root made to the owner of `like`, so that the unit can write it."""
    if os.geteuid() != 0:
        return
    owner = like.stat()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def secret_path(settings: Settings) -> Path:
    """Find chatd's own secret: flag, systemd credential, or beside the database."""
    if settings.secret_file is not None:
        return settings.secret_file
    credentials = variable("CREDENTIALS_DIRECTORY")
    if credentials and (Path(credentials) / "chatd.secret").exists():
        return Path(credentials) / "chatd.secret"
    return settings.db.with_name("chatd.secret")


def read_keyring(settings: Settings) -> Keyring:
    """Read the keys. Raises UsageError."""
    path = secret_path(settings)
    if not path.exists():
        raise UsageError(
            f"secret {path}: there is none yet; `chatd serve` makes it at its first "
            "start; or name yours with --secret-file, or the database with --db"
        )
    return Keyring(settings, read_secret(path))


def make_secret(path: Path) -> None:
    """Make a secret if there is none. Only serve does."""
    if path.exists():
        return
    # A full disk must not leave one that is empty.
    with told_of("secret", path), partial_file(path) as partial:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
            file.flush()
            os.fsync(fd)
        partial.rename(path)
    say(logging.INFO, "made_secret", path=path)


# What our own listening sockets are called in systemd's descriptor store. There they
# outlive us, and their backlog with them: a client that connects during a restart
# waits, and is served by the next process.
KEPT = "chatd"


def passed_sockets() -> tuple[list[socket.socket], list[socket.socket]]:
    """Take what systemd passed (sd_listen_fds(3)): a socket unit's, and those we kept.

    It is passed once: the variables are removed. Raises UsageError.
    """
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, called = (os.environ.pop(name, "") for name in names)
    given: list[socket.socket] = []
    kept: list[socket.socket] = []
    if pid != str(os.getpid()) or not count.isdigit():
        return given, kept
    fd_names = itertools.chain(called.split(":"), itertools.repeat(""))
    for fd, name in zip(range(3, 3 + int(count)), fd_names, strict=False):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise UsageError(f"LISTEN_FDS: descriptor {fd}: {error.strerror}") from None
        tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        if name == KEPT:
            kept.append(sock)
        elif tcp and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            given.append(sock)
        else:
            raise UsageError(
                f"LISTEN_FDS: descriptor {fd} ({name}) is no listening TCP socket; "
                "write ListenStream=HOST:PORT into the socket unit"
            )
    return given, kept


async def open_listeners(listen: str) -> list[trio.SocketListener]:
    """Listen on what a socket unit passed, else on HOST:PORT. Raises UsageError.

    A name may have several addresses: each has a socket. The sockets of the process
    before us are used again where they still fit, and ours are kept for the next.
    """
    given, kept = passed_sockets()
    host, _, port = listen.rpartition(":")
    try:
        sockets = given or await _listen_at(host.strip("[]"), int(port), kept)
    except OSError as error:
        why = f"{error.strerror or error}; choose another, or stop what listens there"
        raise UsageError(f"--listen {listen}: {why}") from error
    if given:
        _forget(kept)
    else:
        notify(f"FDSTORE=1\nFDNAME={KEPT}", [sock.fileno() for sock in sockets])
    from_socket = trio.socket.from_stdlib_socket
    return [trio.SocketListener(from_socket(sock)) for sock in sockets]


async def _listen_at(
    host: str, port: int, kept: Sequence[socket.socket]
) -> list[socket.socket]:
    """Listen on every address of a host, with the kept sockets that are there."""
    found = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    addresses: dict[tuple[Any, ...], None] = {address: None for *_, address in found}
    again = {at: sock for at in addresses for sock in kept if _is_at(sock, at)}
    _forget([sock for sock in kept if sock not in again.values()])
    problem = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for at in addresses.keys() - again.keys():
        try:
            (listener,) = await trio.open_tcp_listeners(at[1], host=at[0])
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # localhost, without IPv6
                raise
            problem = error
        else:
            again[at] = socket.socket(fileno=listener.socket.detach())
    if not again:
        raise problem
    return [again[at] for at in addresses if at in again]


def _is_at(sock: socket.socket, address: tuple[Any, ...]) -> bool:
    """Does it listen at this address? Port 0 is any port."""
    name, listens = sock.getsockname(), (socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    same = name[:1] + name[2:] == address[:1] + address[2:]
    return same and address[1] in (0, name[1]) and bool(sock.getsockopt(*listens))


def _forget(kept: Sequence[socket.socket]) -> None:
    """Close kept sockets that are not wanted any more, systemd's copies too.

    Shutting one down ends its listening at once, whoever else has it, so that its port
    is free for a socket on another address.
    """
    for sock in kept:
        with contextlib.suppress(OSError), sock:
            sock.shutdown(socket.SHUT_RDWR)
    if kept:
        notify(f"FDSTOREREMOVE=1\nFDNAME={KEPT}")


def url_of(listener: trio.SocketListener) -> str:
    """Write the address that a browser can open."""
    host, port = listener.socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_demo(settings: Settings) -> None:
    """Serve a temporary database with two users and a chat; print a link for each."""
    with tempfile.TemporaryDirectory(prefix="chatd-demo-") as folder:
        settings = dataclasses.replace(
            settings, db=Path(folder) / "chatd.db", secret_file=None
        )
        people = {1: "Anna", 2: "Ben"}
        store = Store(settings, Stats())
        for user_id, name in people.items():
            store.write_now(store.rename, user_id, name)
        store.write_now(store.create_chat, "Demo", people)
        store.close()

        def ready(house: House, url: str) -> None:
            announce(house, url)
            for user_id, name in people.items():
                link = sign_in_link(house.keyring, url, user_id, name)
                print(f"{name + ':':6}{link}")
            secret, upstream = secret_path(settings), url.removeprefix("http://")
            last = f"""\
Open each link in a tab of its own. Ctrl-C ends the demo and removes
its files. With the proxy between, the links work at its port too:
chatd proxy --upstream {upstream} --secret-file {secret}"""
            print(last, flush=True)

        serve(settings, ready)


def sign_in_link(
    keyring: Keyring, base: str, user_id: int, name: str | None, seconds: int = 0
) -> str:
    """Write an address that signs a user in, as often as it is used within its time."""
    seconds = seconds or keyring.settings.link_seconds
    token = keyring.sign(user_id, seconds, use="signin", name=name)
    return f"{base.rstrip('/')}/#token={token}"


def announce(_house: House, url: str) -> None:
    """Print the line that scripts wait for."""
    print(f"listening on {url}", flush=True)


@contextlib.contextmanager
def reading(what: str, path: Path) -> Iterator[Db]:
    """Open a database of chatd for reading. What goes wrong is a UsageError."""
    with told_of(what, path):
        if not path.is_file():
            raise UsageError(f"{what} {path}: there is no such file")
        check_not_emptied(path, what)
    try:
        with (
            told_of(what, path),
            contextlib.closing(open_database(path, readonly=True)) as db,
        ):
            mine, version = database_version(db)
            if not mine:
                raise UsageError(f"{what} {path}: not a database of chatd")
            refuse_newer(what, path, version, len(schema_steps()))
            check_not_cut(db, path, what)
            yield db
    finally:
        # A root that reads may have made these; the unit must be able to write them.
        keep_owner(path, beside(path, "-wal"), beside(path, "-shm"))


def copy_database(source: Path, target: Path, what: str, change: str = "") -> None:
    """Copy a database, as of one moment, into one new file that is on disk.

    change is SQL to run on the copy. The copy is checked, as `chatd check` would, so a
    damaged source never becomes a backup. Raises UsageError; the caller removes the
    target then.
    """
    with reading(what, source) as db:
        try:
            os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            connect = sqlite3.connect(target, isolation_level=None)
            with contextlib.closing(connect) as to:
                db.backup(to)
                to.execute("PRAGMA journal_mode = DELETE")
                to.executescript(change)
            with target.open("rb") as file:
                os.fsync(file.fileno())
            found = faults(target)
        except (sqlite3.Error, OSError) as error:
            if what == "database" and is_damage(error):
                raise
            raise UsageError(f"{what} {source}: copying failed: {error}") from error
    if found:
        raise damaged(source, found[0], what)


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Name a file to write first and then rename to path; remove what is left of it."""
    partial = partial_name(path)
    try:
        yield partial
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            beside(partial, suffix).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in it last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def backup(db: Path, dest: Path, keep: int = 0) -> None:
    """Copy the database while it serves: all that was acked before is in the copy.

    With keep, dest is a folder: the copy is named by its time, and all but the newest
    `keep` of its kind are removed, once it is on disk and was found to be sound. Prints
    the name of the copy. Raises UsageError and leaves all older copies and no new file.
    """
    older: list[Path] = []
    if keep:
        if not dest.is_dir():
            raise UsageError(f"backup {dest}: --keep wants a folder that exists")
        for left in dest.glob("chatd-*Z.db.*.partial*"):
            with contextlib.suppress(OSError):
                left.unlink()  # of a backup that was killed
        older = sorted(dest.glob("chatd-????????T??????Z.db"), reverse=True)
        folder, name = dest, "chatd-%Y%m%dT%H%M%SZ.db"
        while (dest := folder / time.strftime(name, time.gmtime())).exists():
            time.sleep(0.1)  # there is one of this second
    if not dest.parent.is_dir():
        raise UsageError(f"backup {dest}: there is no folder {dest.parent}; make it")
    if dest.is_dir():
        raise UsageError(f"backup {dest}: a folder; give --keep COUNT, or name a file")
    if dest.exists():
        raise UsageError(f"backup {dest}: it exists; remove it, or choose another name")
    with told_of("backup", dest), partial_file(dest) as partial:
        copy_database(db, partial, "database")
        sync_folder(dest.parent)  # if that fails, then before the copy has its name
        partial.rename(dest)
        sync_folder(dest.parent)
    print(dest)
    for path in older[max(0, keep - 1) :]:
        with told_of("backup", path):
            path.unlink()


def restore(db: Path, source: Path) -> None:
    """Put a backup in the database's place, with a new epoch: clients then resync."""
    with locked(db), told_of("restore", source), partial_file(db) as partial:
        epoch = f"UPDATE meta SET value = '{new_epoch()}' WHERE key = 'epoch';"
        copy_database(source, partial, "restore", epoch)
        keep_owner(db.parent, partial)
        # The old log of changes must not meet the new file. If the old database is
        # well, closing it folds the log in; if it is not, nothing in it is wanted.
        with contextlib.suppress(sqlite3.Error):
            if db.exists():
                open_database(db, readonly=False).close()
        for suffix in ("-wal", "-shm"):
            beside(db, suffix).unlink(missing_ok=True)
        partial.rename(db)
        sync_folder(db.parent)


def faults(path: Path) -> list[str]:
    """Look for what may not be in a database; empty if it is well."""
    with reading("database", path) as db:
        _, version = database_version(db)
        if version < 1:
            return [f"its schema has version {version}"]
        if missing := missing_parts(db, version):
            return [f"without {', '.join(missing)}"]
        try:
            return [
                " ".join(sentence.format(*row).split())
                for sql, sentence in SANE.items()
                for row in db.execute(sql)
                if row[0] != "ok"
            ]
        except sqlite3.Error as error:
            return [str(error)]


# What holds in every database that chatd wrote: a query that finds the rows where it
# does not, and the sentence about such a row.
SANE = {
    "PRAGMA integrity_check": "integrity: {}",
    "SELECT count(*) FROM meta WHERE key = 'epoch' HAVING count(*) != 1":
        "epoch: {} of them",
    "PRAGMA foreign_key_check": "table {}, row {}: refers to a missing {}",
    "SELECT count(*), max(seq) FROM event HAVING count(*) != coalesce(max(seq), 0)":
        "seq: {} events, but the last seq is {}",
    "SELECT chat_id, count(*), max(n) FROM message GROUP BY chat_id"
    " HAVING count(*) != max(n) OR min(n) != 1":
        "n: chat {} has {} messages, but the last n is {}",
    "SELECT m.id FROM message m LEFT JOIN event e ON e.seq = m.id"
    " AND e.kind = 'new_message' AND e.message_id = m.id AND e.chat_id = m.chat_id"
    " WHERE e.seq IS NULL":
        "message {}: it has no event",
    "SELECT b.user_id, b.chat_id FROM member b WHERE b.read_n >"
    " (SELECT coalesce(max(n), 0) FROM message m WHERE m.chat_id = b.chat_id)":
        "user {} has read more of chat {} than there is",
}  # fmt: skip

# =====================================================================================
# SETTINGS AND COMMAND LINE
#
# Everything that can be set is a field of Settings, with its unit, default, reason and
# consequence; flags, variables, `--help` and the table in the documentation are made of
# it. The last function is the whole program.
# =====================================================================================


def setting(default: Any, unit: str, why: str, over: str = "") -> Any:
    """Make a field of Settings: its unit, what it limits, and what happens then."""
    metadata = {"unit": unit, "why": why, "over": over}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set, with its unit, its reason and its consequence.

    `--help`, the CHATD_... variables and docs/operating.md's table are made from it.
    """

    # fmt: off
    listen: str = setting("127.0.0.1:8086", "HOST:PORT",
        "where to listen; port 0 picks a free one")
    db: Path = setting(Path("chatd.db"), "FILE",
        "the database; under systemd $STATE_DIRECTORY/chatd.db")
    secret_file: Path | None = setting(None, "FILE",
        "chatd's own signing secret; else the credential chatd.secret of systemd, "
        "else chatd.secret beside the database")
    jwt_key: tuple[Path, ...] = setting((), "FILE",
        "also trust tokens signed with this key: a PEM public key (RS256, ES256, "
        "EdDSA), otherwise a shared secret (HS256); may be given several times")
    issuer: str | None = setting(None, "ISS",
        "tokens of a --jwt-key must have this iss", "token_invalid")
    audience: str | None = setting(None, "AUD",
        "tokens of a --jwt-key must have this aud", "token_invalid")
    origin: tuple[str, ...] = setting((), "ORIGIN",
        "pages of this origin may use chatd too; may be given several times", "403")
    trusted_proxy: tuple[str, ...] = setting(("127.0.0.0/8", "::1"), "CIDR",
        "whose X-Forwarded-For is believed, or none; may be given several times")
    chats_by: str = setting("user", "WHO",
        "who may create chats and add members: user or service", "forbidden")
    log_level: str = setting("info", "LEVEL",
        "what to log: debug, info, warning or error")
    sends: Rate = setting(Rate(5, 20), "RATE/BURST",
        "messages a second per user, so that nobody floods a chat", "rate_limited")
    commands: Rate = setting(Rate(30, 60), "RATE/BURST",
        "commands a second per connection",
        "rate_limited; 4008 after 100 refused in a row")
    typing: Rate = setting(Rate(1, 5), "RATE/BURST",
        "typing signs a second per user and chat", "dropped")
    handshakes: Rate = setting(Rate(10, 50), "RATE/BURST",
        "upgrades and 401s a second per address (IPv6: per /64)", "429")
    requests: Rate = setting(Rate(20, 100), "RATE/BURST",
        "HTTP requests a second per user", "429")
    receive_bytes: Rate = setting(Rate(65536, 524288), "RATE/BURST",
        "bytes a second per connection, so that a flood meets TCP, not the CPU",
        "reading waits")
    max_connections: int = setting(10_000, "COUNT",
        "sockets in all; the limit of open files must be this + 256",
        "503 overloaded at once, closed")
    connections_per_user: int = setting(20, "COUNT",
        "sockets per user, so that no page eats them all", "4504")
    max_message_bytes: int = setting(65_536, "BYTES",
        "a message of a socket, a body of a request", "1009, 413")
    max_content_chars: int = setting(4_000, "CHARACTERS",
        "the content of a message", "bad_field")
    drain_seconds: float = setting(5.0, "SECONDS",
        "how long a stop may take", "what is left is cut")
    check_bytes: int = setting(33_554_432, "BYTES",
        "the largest database that is checked for damage at the start",
        "the start does not wait for it; the log says so, and chatd check looks")

    # Not flags: nobody should have to think of them. Tests set them.
    outbox_bytes: int = setting(262_144, "bytes",
        "one connection's unsent bytes, before the batch that crosses it",
        "no longer live: it reads the log when it can take more")
    head_seconds: float = setting(10.0, "s", "a request head to arrive", "408")
    request_seconds: float = setting(15.0, "s", "a request to be done", "408")
    idle_seconds: float = setting(75.0, "s", "a keep-alive; longer than the 60 s of "
        "common proxies, so that the proxy closes first", "closed")
    ping_seconds: float = setting(25.0, "s", "silence before a ping, +-10 %; below the "
        "60 s after which nginx cuts a silent socket", "a ping")
    pong_seconds: float = setting(10.0, "s", "silence after a ping", "cut")
    stall_seconds: float = setting(10.0, "s",
        "waiting bytes that do not move, nothing heard", "cut")
    upstream_seconds: float = setting(20.0, "s", "in which nothing moves between the "
        "proxy and a request's two ends; above request_seconds", "504, or 408")
    slow_bytes: int = setting(2_000, "bytes a second",
        "to read a large window of, while TCP shows no move", "cut")
    linger_seconds: float = setting(1.0, "s",
        "after our last byte, for the peer to read it", "cut")
    token_warning_seconds: float = setting(60.0, "s", "before a token's end")
    token_grace_seconds: float = setting(25.0, "s", "after a token's end", "4401")
    ticket_seconds: int = setting(60, "s", "a ticket's life")
    link_seconds: int = setting(86_400, "s", "a sign-in link's life")
    session_seconds: int = setting(30 * 86_400, "s", "a session token's life")
    probe_seconds: float = setting(2.0, "s", "between probes of a failed disk")
    commit_seconds: float = setting(60.0, "s", "one commit, else it is hung")
    unanswered: int = setting(64, "commands", "in flight", "reading waits")
    fragments: int = setting(64, "frames", "a message may come in", "1009")
    chunks: int = setting(1024, "chunks", "a body may come in", "413")
    header_lines: int = setting(64, "lines", "a request head may have", "431")
    head_bytes: int = setting(16_384, "bytes", "a request head", "431")
    refused_in_a_row: int = setting(100, "commands", "over the rate", "4008")
    resync_events: int = setting(5_000, "events",
        "of one user to replay; more costs more than a fresh look", "resync")
    page_events: int = setting(500, "events", "a page of the log")
    page_bytes: int = setting(131_072, "bytes", "a page, or a helping of the tail")
    tail_events: int = setting(16_384, "events", "the log's end held in memory")
    tail_bytes: int = setting(16_777_216, "bytes", "the same")
    batch_jobs: int = setting(512, "jobs", "a transaction, so that none takes long")
    batch_events: int = setting(2_000, "events", "the same, for large new chats")
    readers: int = setting(4, "threads", "reading at once")
    members: int = setting(5_000, "users",
        "a chat; a new one is told to each, with all of them", "bad_field")
    large_chat: int = setting(50, "users",
        "above it a read mark is told to its reader only")
    known_tokens: int = setting(4_096, "tokens", "verified once", "forgotten")
    buckets: int = setting(65_536, "keys", "a table of buckets", "oldest forgotten")


class WrongText(ValueError, argparse.ArgumentTypeError):
    """A flag's text is wrong: a sentence, which argparse prints as it is."""


def wants(what: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """Decorate what reads the text of a flag: its ValueError says what was wanted."""

    def decorate(read: Callable[[str], T]) -> Callable[[str], T]:
        @functools.wraps(read)
        def parse(text: str) -> T:
            try:
                return read(text)
            except ValueError:
                raise WrongText(f"{text!r} is not {what}") from None

        return parse

    return decorate


@wants("RATE/BURST, such as 5/20, or 0 for no limit")
def parse_rate(text: str) -> Rate:
    """Read "RATE/BURST", or "0" for no limit. Raises ValueError, as all of these."""
    rate, slash, burst = text.partition("/")
    parsed = Rate(float(rate), float(burst) if slash else 0.0)
    if parsed.per_second == 0:
        return Rate(0, 0)
    if not (0 < parsed.per_second < math.inf and 1 <= parsed.burst < math.inf):
        raise ValueError
    return parsed


@wants("a whole number above 0")
def parse_count(text: str) -> int:
    """Read a whole number above 0."""
    if not re.fullmatch("0*[1-9][0-9]{0,15}", text):
        raise ValueError
    return int(text)


@wants(f"a user's id, a number from 1 to {MAX_ID}")
def parse_user(text: str) -> int:
    """Read a user's id."""
    if parse_count(text) > MAX_ID:
        raise ValueError
    return int(text)


@wants("a number of seconds, 0 or more")
def parse_seconds(text: str) -> float:
    """Read a number of seconds."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


@wants("a time of at most 100 years, such as 30d, 12h, 15m or 90s")
def parse_ttl(text: str) -> int:
    """Read a time, in seconds."""
    match = re.fullmatch("0*([1-9][0-9]{0,9})([smhd]?)", text)
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    if not match or int(match[1]) * units[match[2]] > 100 * 366 * 86400:
        raise ValueError
    return int(match[1]) * units[match[2]]


@wants("HOST:PORT, such as 127.0.0.1:8086")
def parse_listen(text: str) -> str:
    """Check HOST:PORT, where HOST may be [::1]."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 65536):
        raise ValueError
    return text


@wants("a network, such as 10.0.0.0/8, or none")
def parse_network(text: str) -> str:
    """Check an address or CIDR network, or the word none."""
    if text != "none":
        ipaddress.ip_network(text)
    return text


@wants("an origin, such as https://example.org")
def parse_origin(text: str) -> str:
    """Check scheme://host[:port] as a browser sends it."""
    if not re.fullmatch(r"https?://[^/?#\s@]+", text):
        raise ValueError
    return text.lower()


@wants("the page's address, such as https://chat.example.org")
def parse_base(text: str) -> str:
    """Check the address that a sign-in link is made of."""
    if not re.fullmatch(r"https?://[^/?#\s@]+(/[^?#\s]*)?", text):
        raise ValueError
    return text


@wants("a scope: service, stats, or both")
def parse_scope(text: str) -> str:
    """Read scopes."""
    if not text.split() or not set(text.split()) <= {"service", "stats"}:
        raise ValueError
    return " ".join(text.split())


def parse_word(*words: str) -> Callable[[str], str]:
    """Make a parser that takes one of the given words."""

    @wants(f"one of {', '.join(words)}")
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return parse


# What reads a flag's text, by its unit. A setting with another unit is no flag.
PARSERS: dict[str, Callable[[str], Any]] = {
    "HOST:PORT": parse_listen,
    "FILE": Path,
    "ISS": str,
    "AUD": str,
    "ORIGIN": parse_origin,
    "CIDR": parse_network,
    "WHO": parse_word("user", "service"),
    "LEVEL": parse_word("debug", "info", "warning", "error"),
    "RATE/BURST": parse_rate,
    "COUNT": parse_count,
    "BYTES": parse_count,
    "CHARACTERS": parse_count,
    "SECONDS": parse_seconds,
}


def flags() -> Iterator[dataclasses.Field[Any]]:
    """Walk the settings that are flags."""
    return (f for f in dataclasses.fields(Settings) if f.metadata["unit"] in PARSERS)


def shown(value: object) -> str:
    """Write a default as one would type it."""
    if type(value) is tuple:
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def settings_table() -> str:
    """Make the table of settings in docs/operating.md."""
    rows = ["| flag | default | what it is for | when over |", "|---|---|---|---|"]
    for field in flags():
        unit, why, over = field.metadata.values()
        default = f"`{shown(field.default)}`" if shown(field.default) else ""
        rows.append(f"| `{flag(field)} {unit}` | {default} | {why} | {over} |")
    return "\n".join(rows)


def flag(field: dataclasses.Field[Any]) -> str:
    """Write a setting's name as a flag."""
    return f"--{field.name.replace('_', '-')}"


def variable_name(field: dataclasses.Field[Any]) -> str:
    """Write a setting's name as a variable of the environment."""
    return f"CHATD_{field.name.upper()}"


def variable(name: str) -> str | None:
    """Read a variable of the environment. A blank one counts as unset.

    Compose files and scripts write `NAME=${NAME:-}`, which sets it to nothing.
    """
    text = os.environ.get(name, "")
    return text if text.strip() else None


def add_flags(parser: argparse.ArgumentParser, *names: str, **defaults: object) -> None:
    """Add the flags of Settings, or only those named, or with other defaults."""
    parser.set_defaults(defaults=defaults)
    for field in flags():
        if names and field.name not in names:
            continue
        unit, why, over = field.metadata.values()
        over = f"; over it: {over}" if over else ""
        default = shown(defaults.get(field.name, field.default))
        default = f" (default {default})" if default else ""
        parser.add_argument(
            flag(field),
            metavar=unit,
            type=PARSERS[unit],
            action="append" if type(field.default) is tuple else "store",
            help=f"{why}{over}{default}",
        )


def read_settings(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> Settings:
    """Take each setting from its flag, else CHATD_NAME, else the default."""
    chosen: dict[str, Any] = dict(options.defaults)
    if folders := variable("STATE_DIRECTORY"):
        chosen["db"] = Path(folders.split(":")[0]) / "chatd.db"
    for field in flags():
        several = type(field.default) is tuple
        value = getattr(options, field.name, None)
        name = variable_name(field)
        if value is None and (text := variable(name)):
            read = PARSERS[field.metadata["unit"]]
            try:
                value = [read(word) for word in text.split()] if several else read(text)
            except ValueError as error:
                parser.error(f"environment {name}: {error}")
        if value is not None:
            chosen[field.name] = tuple(value) if several else value
    return Settings(**chosen)


def tell_unknown_variables() -> None:
    """Log the CHATD_ variables that mean nothing: one of them may be misspelt."""
    known = {"CHATD_UPSTREAM", *map(variable_name, flags())}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("CHATD_") and variable(name):
            say(logging.WARNING, "unknown_variable", name=name)


# A door of its own believes nobody, unless it is told of a proxy before it.
PROXY_DEFAULTS = {"listen": "127.0.0.1:3000", "trusted_proxy": ("none",)}

PROXY_FLAGS = (
    "listen", "db", "secret_file", "jwt_key", "issuer", "audience", "trusted_proxy",
    "log_level", "handshakes", "max_connections", "drain_seconds",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="chatd", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"chatd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    too = "Each flag can be given as CHATD_NAME in the environment too."
    serving = commands.add_parser("serve", help="serve the chat", epilog=too)
    demo = "try it: two users, a chat, no traces"
    serving.add_argument("--demo", action="store_true", help=demo)
    add_flags(serving)

    before = "be the one door of a chatd that listens elsewhere"
    proxying = commands.add_parser("proxy", help=before, epilog=too)
    where, upstream = "where that chatd listens", Settings().listen
    proxying.add_argument(
        "--upstream",
        metavar="HOST:PORT",
        type=parse_listen,
        default=variable("CHATD_UPSTREAM") or upstream,
        help=f"{where} (default {upstream})",
    )
    add_flags(proxying, *PROXY_FLAGS, **PROXY_DEFAULTS)

    token = commands.add_parser("token", help="print a token, or a sign-in link")
    add = token.add_argument
    add("user_id", metavar="USER_ID", type=parse_user)
    add("--name", help="what others see")
    how_long = "how long it is good: 30d, 12h, 15m, 90s (default 30d; a link 1d)"
    add("--ttl", metavar="TIME", type=parse_ttl, help=how_long)
    add("--scope", metavar="SCOPE", type=parse_scope, help="service, stats")
    page = "http://127.0.0.1:8086"
    link = f"a sign-in link to the page at BASE (default {page})"
    add("--link", metavar="BASE", nargs="?", const=page, type=parse_base, help=link)
    add_flags(token, "db", "secret_file")

    copy = "copy the database into a new file, while it serves"
    put = "put a backup in the database's place; stop chatd before"
    look = "look whether the database is sound"
    for name, path, what in (
        ("backup", "DEST", copy), ("restore", "SRC", put), ("check", "", look)
    ):  # fmt: skip
        command = commands.add_parser(name, help=what)
        if path:
            command.add_argument("path", type=Path, metavar=path)
        if name == "backup":
            kept = "DEST is a folder: name the copy by its time, keep the newest COUNT"
            command.add_argument(
                "--keep", metavar="COUNT", type=parse_count, default=0, help=kept
            )
        add_flags(command, "db")
    return parser


def print_token(settings: Settings, options: argparse.Namespace) -> None:
    """Print a token, and nothing else."""
    keyring = read_keyring(settings)
    user_id, name, ttl = options.user_id, clean_name(options.name), options.ttl or 0
    if options.link is None:
        seconds = ttl or settings.session_seconds
        print(keyring.sign(user_id, seconds, name=name, scope=options.scope))
    elif options.scope:
        raise UsageError("--scope: a sign-in link has no scopes", status=2)
    else:
        print(sign_in_link(keyring, options.link, user_id, name, ttl))


def end_with_a_sentence() -> None:
    """Let a signal end a command that copies in good order: no partial file is left."""

    def end(number: int, _frame: object) -> None:
        raise UsageError(f"ended by {signal.Signals(number).name}, before it was done")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)


def print_check(db: Path) -> None:
    """Print that a database is well, or raise UsageError with what is not."""
    found = faults(db)
    if found:
        raise UsageError("\n       ".join([f"database {db}:", *found]))
    print(f"{db}: ok")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong use."""
    parser = make_parser()
    options = parser.parse_args(argv)
    settings = read_settings(parser, options)
    set_up_log(settings.log_level)
    tell_unknown_variables()
    status = 0
    try:
        match options.command:
            case "serve" if options.demo and options.db is not None:
                parser.error("--demo has a database of its own: leave --db away")
            case "serve" if options.demo:
                serve_demo(settings)
            case "serve":
                serve(settings, announce)
            case "proxy":
                proxy(settings, options.upstream)
            case "token":
                print_token(settings, options)
            case "backup":
                end_with_a_sentence()
                backup(settings.db, options.path, options.keep)
            case "restore":
                end_with_a_sentence()
                restore(settings.db, options.path)
            case "check":
                print_check(settings.db)
    except* UsageError as group:
        start = "<3>" if in_journal() else ""  # of each line, as the Formatter's
        for error in leaves(group):
            sentence = f"{start}chatd: {error}".replace("\n", f"\n{start}")
            print(sentence, file=sys.stderr)
            status = getattr(error, "status", 1)
    except* Exception as group:  # a mistake in what all connections share
        for error in leaves(group):
            say_mistake("crashed", error)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
