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
#     "idna>=3",
# ]
# ///
"""chatd: a real-time chat server in one file (Trio, trio-websocket, SQLite, JWT).

THE PROMISE

An ack means the message is on disk. A client that keeps its cursor sees every event of
its chats exactly once and in order: over the socket, over the poll, or over any mix of
the two, across lost connections and server restarts. A client that missed too much is
told so (`resync`). Its chats are those that it is a member of when it reads; of a chat
that it was removed from it sees the removal. Only typing is best effort. Deleted text
is gone: from the database, from every replay, from search.

ONE IDEA

Everybody reads the event log. Everything lasting that happens is a row of one SQLite
table of events with a growing `seq`. One query, `Store.events_after`, serves the poll,
the resume after a reconnect, and the client that fell behind. The live path is a short
cut for clients that are up to date:

    command -> Store (group commit) -> Hub (tail) -> Outbox of each member's connection
                 |                                      ^
                 +------ the event log, in pages -------+   only for a seat far behind

A slow client's queue does not grow beyond its bound: its seat stops being live and
reads the event log later, at the client's own pace.

ONE MESSAGE, STEP BY STEP

Two threads take part: Trio's main thread, and the writer's worker thread. Each step is
a plain `def` where it does not wait, so no cancellation can leave it half done.

    task, thread                step
    the sender's session, main  `WebSocketReader` has read a frame. It calls
                                `Session._receive`: rate, JSON, `match`. `_send` checks
                                the content and the sender's bucket, and `_submit` puts
                                a Job into the store's channel. The reader reads on; it
                                waits while 64 of its commands have no answer, while
                                its outbox is full, and for --receive-bytes.
    Store.run, main             `_gather` takes all jobs that wait (at most 512), turn
                                by turn of the scheduler until a turn brings no more,
                                and waits for `_transact`.
    Store.run, writer's thread  `_transact`: BEGIN, one job after another
                                (`send_message` inserts the message, and a trigger its
                                event), COMMIT. Here SQLite calls fsync on the WAL:
                                when COMMIT has returned, the message is DURABLE.
    Store.run, main             puts the Batch into the hub's channel, which has room
                                for one. Then the next transaction starts in the
                                writer's thread.
    Hub.run, main               `publish`: append to the tail; find the live seats of
                                the chat's members; make the answers (`Job.done`);
                                `Outbox.push` one joined piece of bytes to each seat.
                                The ack is the last frame of the sender's piece: no ack
                                precedes its event.
    Hub.run, main               `Outbox.push` writes to the socket at once. The kernel
                                has the bytes, or the rest is buffered.
    Outbox._flush, main         exists only while bytes are buffered: waits until the
                                socket takes more.

If the process dies before COMMIT has returned, the message was never acked: the client
repeats it with the same client_id and it is stored once. If it dies later, every client
reads the message in the event log.

THE TASK TREE

A task never outlives the nursery above it. The nurseries end from the inside out: when
the last connection ends, the store and the hub still run and can answer it.

    trio.run
    `- run_root                         the root
       |- watch_signals                 the first signal stops, the second cancels
       `- Server.run
          |- Store.run                  commits, one batch after another
          |- Hub.run                    publishes each batch
          |- Server._sweep              once a second: deadlines, the file, watchdog
          |- Store.erase                truncates the WAL: what was deleted is gone
          `- Listener.run
             `- connections             (a nursery: ends with its last connection)
                |- accepting            (a nursery: ends at the first signal)
                |  `- Listener._accept  one for each listening socket
                `- Listener._connection one for each TCP connection: the bulkhead; first
                   |                    HttpConnection.run, then perhaps
                   |                    Server.serve_socket, with a nursery of its own:
                   |- Outbox._flush     only while bytes wait for this client
                   `- Session._catch_up only while this client catches up

`chatd proxy` is a process of its own: run_root and a Listener, without the rest.

THREADS

There are worker threads, and no thread lock. One thread at a time writes: there is a
limiter of 1, and Store.run, or Store.erase, waits for it. That thread uses the writer's
connection, `seq`, `failure` and the commit times; while it runs, the main thread only
reads these. A cancelled Store.run still waits for it: the thread always finishes its
transaction. At most 5 threads read, each with a connection of its own; one of them may
search. While Store.erase waits for its turn, one thread reads at a time. All threads
share the list of idle connections (`append` and `pop` are atomic), the JSON encoder,
the cache of `timestamp`, and the counts in Stats, where one may be lost; nothing is
decided by them. The GIL makes that safe. Tasks, seats and outboxes are the main
thread's alone.

An exception in a connection's tasks ends that connection (the bulkhead in
`Listener._connection`). One in Store.run, Store.erase, Hub.run, the sweeper or a
listening task ends the process: acks would be lies without them. Only what SQLite or
the disk reports is an answer (`Store._transact`). So no input of a client may make a
method that writes (`Job.write`) or a callback (`Job.done`) fail: they run in Store.run
and in Hub.run.

BOUNDS AND DEADLINES

Every queue has a bound: jobs for the store (4,096), commands of one connection without
an answer (64), searches that wait (64), bytes of one outbox (256 KiB and the batch that
crossed the line), the tail (16,384 events, 16 MiB). Every wait for a client has a
deadline: the first byte of a request 10 s, or 75 s on a connection that is kept alive;
its head 10 s more, its body and its work 15 s, its answer 15 s; on a WebSocket silence
35 s, output that the kernel does not accept 40 s, or 3 s if the user needs the place; a
stop 5 s.

A commit cannot be cut short, by a second signal either. A batch that is committed then
is acked to nobody, and every client reads it after the next start. While chatd serves,
the service manager ends it if a commit takes over a minute (`Server._sweep`); at a stop
TimeoutStopSec does.

GLOSSARY

    event log   the table `event`: every lasting event, by seq
    seq         an event's number: 1, 2, 3, without holes. A message's id is the seq of
                its event
    n           a message's number in its chat: 1, 2, 3, without holes
    head        the seq of the last published event. Every read is "as of the head"
    tail        the newest end of the event log, in memory
    cursor      how far a client has seen the event log: "epoch.seq"
    epoch       the random half of cursors; new after `chatd restore`
    seat        a connection as the hub knows it: user, outbox, cursor
    live        a seat that has been given everything up to the head
    batch       the events of one transaction, and the callers to answer
    ticket      a token for one socket, good for a minute
    answer      what a command or a request gets back: ack, pong or error; over HTTP an
                Answer. A Reply is a command's answer that may have to wait for its
                event
    parked      a connection that waits for a client's bytes

Part I (Server, Connection, Store, Hub, Outbox) is the way of a message, from the root
of the task tree down. Part II, from PROTOCOL on, is what it uses there: rules, formats
and edges. Part I uses a few names of Part II: a Refusal is an answer that says no;
`Bucket.take` returns the seconds to wait, so 0.0 means yes; CUT stands for a connection
that ends without a close frame.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import codecs
import dataclasses
import email.utils
import errno
import fcntl
import gc
import gzip
import hashlib
import http
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import resource
import secrets
import select
import signal
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections import Counter, deque
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from logging import DEBUG, ERROR, INFO, WARNING
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    assert_never,
    dataclass_transform,
    get_args,
)
from unicodedata import category, combining, normalize

import h11
import idna
import jwt
import msgspec
import trio
import wsproto
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from msgspec.structs import astuple, replace
from trio_websocket import WebSocketConnection
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.frame_protocol import FrameProtocol

__version__ = "1.1.0.dev0"

HERE = Path(__file__).resolve().parent
# Beside this file in a checkout; in an installed wheel in chatd_assets/ beside it.
ASSETS = HERE / "chatd_assets" if (HERE / "chatd_assets").is_dir() else HERE

logger = logging.getLogger("chatd")
T = TypeVar("T")
Db = sqlite3.Connection
JsonObject = dict[str, Any]
Actor = int | None  # the user who changes something; None: a service
MAX_ID = 2**53 - 1  # JavaScript's largest safe integer


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, frozen=True):
    """Values with names and types, which msgspec checks. Never changed once made."""


class ServerMessage(Record, omit_defaults=True, tag_field="type"):
    """A message from the server. Fields at their default are left out."""


# =====================================================================================
# SERVER: the task tree, from the root down
#
# `serve` opens the database and starts Trio; `run_root` is the root task. At a stop the
# tasks below it end in this order: the listening tasks, the connections, the sweeper,
# the store, the hub. One bulkhead stands around each connection (`except* Exception`):
# nothing a client sends ends any connection but its own.
# =====================================================================================


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until a signal says stop. ready gets the URLs that it listens at."""
    settings = raise_file_limit(settings)
    with locked(settings.db, secret_path(settings)) as unfinished:

        def listening(url: str) -> None:
            unfinished.clear()
            ready(url)

        make_secret(secret_path(settings))
        keyring = read_keyring(settings)
        about = {"db": settings.db, "sqlite": sqlite3.sqlite_version} | keyring.about()
        with closing(Store(settings)) as store:
            server = Server(store, keyring)
            trio.run(run_root, server.listener, server.run, about, listening)


async def run_root(
    listener: Listener,
    run: Callable[..., Awaitable[None]],
    about: Mapping[str, object],
    ready: Callable[[str], None],
) -> None:
    """The root task, of `chatd serve` and of `chatd proxy`.

    run(sockets) serves until the listener is told to stop. about is what the log line
    `ready` says.
    """
    settings = listener.settings
    if settings.jwt_key and settings.audience is None:
        log(WARNING, "no_audience", hint="tokens for any aud are accepted")
    async with trio.open_nursery() as root:
        await root.start(watch_signals, listener, root.cancel_scope)
        sockets = await open_listeners(settings.listen)
        async with trio.open_nursery() as serving:
            serving.start_soon(run, sockets)
            # All objects that exist now stay to the end, the garbage of the imports
            # too: no collection looks at them.
            gc.freeze()
            # A full collection stops everything: 0.56 s with 8,000 sockets, and by
            # default it ran several times while they connected. A closed socket leaves
            # 0.8 KB of reference cycles (wsproto's): once in 150,000 of them is enough.
            gc.set_threshold(5000, 10, 20)
            url = " ".join(sorted(map(url_of, sockets)))  # Unix sockets come last
            log(INFO, "ready", url=url, **about)
            ready(url)
            notify(f"READY=1\nSTATUS=listening on {url}")
        root.cancel_scope.cancel()


async def watch_signals(  # noqa: ASYNC114 (only ever given to nursery.start)
    listener: Listener, root: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    """Stop at the first SIGTERM, SIGINT or SIGHUP; cancel every task at the second.

    SIGHUP means that the terminal is gone; nohup(1) has it ignored. After the second
    signal main's own handlers are back: a third ends the process.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if listener.stopping.is_set():
                log(WARNING, "stopping_at_once", signal=name)
                root.cancel()
                return
            log(INFO, "stopping", signal=name, sockets=len(listener.sessions))
            notify("STOPPING=1")
            listener.stopping.set()


# A commit that takes longer is hung: the watchdog is no longer fed, so systemd restarts
# chatd.
COMMIT_SECONDS = 60.0


class Server:
    """One chatd: what all its connections share, and the tasks that outlive them.

    Owns the store's and the hub's tasks, and the listener.
    """

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self.settings = settings = store.settings
        self.stats = store.stats
        self.keyring = keyring
        self.store, self.chats = store, Chats(store)
        self.read, self.commit = store.read, store.commit
        self.hub = Hub(store)
        keyring.revoked = store.revoked()
        self.pages = page_answers()
        self.sends = bucket_table(settings.sends)
        self.typing = bucket_table(settings.typing)
        self.requests = bucket_table(settings.requests)
        self.joins = Bucket(Rate(1, 50))  # of all addresses
        self.searching = trio.Lock()  # one at a time
        self.names: dict[int, tuple[int, str]] = {}  # the newest: its time, the name
        # A user to be forgotten: up to which id there are no messages of that user.
        self.walked = Counter[int]()
        self.sessions: set[Session] = set()
        self.listener = Listener(
            settings, self.stats, self.sessions, partial(answer_request, self)
        )

    async def run(self, sockets: Sequence[trio.SocketListener]) -> None:
        """Serve until the listener stops. Store and hub outlive the connections."""
        # Room for one, so that the store need not wait for the hub's turn.
        to_hub, from_store = trio.open_memory_channel[Batch](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run, to_hub)
            nursery.start_soon(self.hub.run, from_store)
            async with trio.open_nursery() as sweeping:
                sweeping.start_soon(self._sweep)
                sweeping.start_soon(self.store.erase)
                await self.listener.run(sockets)
                sweeping.cancel_scope.cancel()
            self.store.finish()

    async def serve_socket(
        self,
        claims: Claims,
        cursor: str | None,
        key: str,
        trailing: bytes,
        stream: trio.SocketStream,
    ) -> None:
        """Serve a WebSocket from its 101 to its end.

        trailing holds the bytes that the client sent right behind its handshake.
        """
        async with trio.open_nursery() as nursery:
            outbox = Outbox(stream, nursery, self.settings)
            outbox.push(switching_protocols(key))
            session = Session(self, outbox, claims, cursor)
            try:
                await session.run(trailing)
            finally:
                outbox.sealed = True  # nothing is written once the stream is closed
                nursery.cancel_scope.cancel()

    async def _sweep(self) -> None:
        """Once a second check deadlines and the database file; feed the watchdog."""
        while True:
            await trio.sleep(1)
            now, since = trio.current_time(), self.store.writing_since
            if since is None:  # while a commit runs, its thread checks
                with suppress(OSError):  # the disk fails: see Store
                    self.store.check_file()
            for session in list(self.sessions):
                seat = session.seat
                why = seat.sweep(now)
                if why is None:
                    # A clock that was stepped forward ends the token, too.
                    left = session.claims.ends - time.time()
                    seat.sweep_token(min(left, session.token_ends - now))
                    continue
                self.stats.stalls += why == "stalled"
                session.end(CUT, why)
            if since is None or now - since < COMMIT_SECONDS:
                sick = "; no writing" if self.store.failure else ""
                state = f"WATCHDOG=1\nSTATUS=sockets: {len(self.sessions)}{sick}"
                notify(state, wait_seconds=0)

    def retry_after_seconds(self) -> float:
        """Spread reconnecting clients: 500 a second, none in the first half second."""
        return round(random.uniform(0.5, 1 + len(self.sessions) / 500), 1)


# Serves the rest of a connection after a request: a socket, or an answer of a proxy.
TakeOver = Callable[[trio.SocketStream], Awaitable[None]]

# The process has no descriptor or memory left, until a connection ends.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclasses.dataclass(eq=False)
class Listener:
    """Accepts TCP connections and serves each in a task of its own.

    Owns every accepted connection, bounds their number, and ends them when it stops.
    answer(connection, request) returns an Answer, or a function that serves the rest of
    the connection. sessions are the open sockets: with the first signal each is told to
    end. Without keeps_alive a connection has one request.
    """

    settings: Settings
    stats: Stats
    sessions: Collection[Session | Tunnel]
    answer: Callable[[HttpConnection, Request], Awaitable[Answer | TakeOver]]
    keeps_alive: bool = True

    def __post_init__(self) -> None:
        """Begin with no connection."""
        self.proxies = Proxies(self.settings.trusted_proxy)
        self.handshakes = bucket_table(self.settings.handshakes)
        self.open = 0  # TCP connections
        # Connections that wait for a client's bytes, the oldest first. True: it is idle
        # between two requests.
        self.parked: dict[trio.CancelScope, bool] = {}
        self.stopping = trio.Event()
        self.unlimited = False  # the log has a line about clients without an address
        self.warnings = bucket_table(Rate(0.1, 1))  # log lines of `warn`, by their verb
        self.bugs = Bucket(Rate(1, 10))  # log lines about bugs of chatd

    async def run(self, sockets: Sequence[trio.SocketListener]) -> None:
        """Serve until `stopping` is set; then end every connection, and return.

        Owns the listening sockets.
        """
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in sockets:
                    accepting.start_soon(self._accept, listener, connections)
                await self.stopping.wait()
                accepting.cancel_scope.cancel()
            deadline = trio.current_time() + self.settings.drain_seconds
            connections.cancel_scope.deadline = deadline
            for session in self.sessions:
                session.end(CLOSE_RESTART, "the server restarts")
            self.end_parked()

    async def _accept(
        self, listener: trio.SocketListener, connections: trio.Nursery
    ) -> None:
        """Accept connections, each into a task of its own."""
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    self.warn("full", error.strerror)
                    await trio.sleep(0.1)
                    continue
                connections.start_soon(self._connection, stream)

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection. The bulkhead: what fails in it ends only this one."""
        self.open += 1
        http: HttpConnection | None = None
        try:
            http = HttpConnection(self, stream)
            if self.open > self.settings.max_connections + 128 and not self._evict():
                self.warn("full", "connections")
                await http.refuse(Refusal("overloaded", retry_after=5))
                if self.open <= self.settings.max_connections + 192:
                    await linger(stream)  # while there are descriptors for it
                return
            take_over = await http.run()
            http = None  # a socket does not need its 6 KB
            if take_over:
                await take_over(stream)
        except* trio.BrokenResourceError:
            pass
        except* Exception as group:  # the one bulkhead
            for error in leaves(group):
                self.stats.errors[type(error).__name__] += 1
                if self.bugs.take() == 0.0:
                    log_bug("failed", error)
            if http:
                await http.refuse(Refusal("internal"))
        finally:
            self.open -= 1
            stream.socket.close()

    def _evict(self) -> bool:
        """End the connection that has waited longest for bytes, if one waits."""
        for scope in self.parked:
            scope.cancel()
            del self.parked[scope]
            return True
        return False

    def end_parked(self) -> None:
        """At a stop, once no socket is left, end the connections that only wait.

        A connection that was accepted but not yet answered gets one second to send a
        request: the next process cannot serve it any more.
        """
        if self.stopping.is_set() and not self.sessions:
            now = trio.current_time()
            for scope, idle in self.parked.items():
                end = now if idle else now + LINGER_SECONDS
                scope.deadline = min(scope.deadline, end)

    def warn(self, verb: str, why: object) -> None:
        """Log a warning that every connection could cause: at most one in 10 s."""
        if self.warnings(verb).take() == 0.0:
            log(WARNING, verb, why=why, open=self.open)

    def check_handshakes(self, address: Address | None, amount: int = 1) -> None:
        """Take tokens of the address's bucket. Raises Refusal rate_limited.

        A reverse proxy on a Unix socket may not name its client. Then there is no
        address, and no limit, which the log says once.
        """
        if address != UNIX_PEER:
            charge(self, "handshakes", self.handshakes(address_key(address)), amount)
        elif not self.unlimited:
            self.unlimited = True
            log(
                WARNING,
                "no_client_address",
                hint="no X-Forwarded-For: --handshakes has no effect",
            )


# =====================================================================================
# CONNECTION: the WebSocket reader and the session
#
# One task for each open socket: it reads a frame, handles the command in it, and reads
# on. A second task exists only while bytes wait for the client (Outbox), a third only
# while the client catches up (Session).
# =====================================================================================


class ClientFault(Exception):
    """A client closed, or broke a limit or the protocol."""

    args: tuple[int, str]  # close code, reason


class WebSocketReader(WebSocketConnection):
    """trio-websocket's connection, made safe against hostile clients.

    By itself the library counts characters, not bytes, and does not count fragments.
    It answers a ping also after its close frame, which raises an exception, and it does
    not answer a protocol error. It hands each message to a second task through a queue.
    Here its reader task handles the message itself. That took a message in a two-person
    chat from 160 us to 105 us and an idle connection from 31 KB to 18 KB, and while a
    command waits, nothing is read. The library only reads: Outbox writes.

    It replaces private methods, so the library's version is pinned. Each replacement
    has a test.
    """

    # The library's reader task uses these; a test compares. The library's own __init__
    # would add 3 KB to each connection for handshakes, pings and tasks that wait.
    _id = 0
    _initial_request = None
    _close_reason = None
    _reader_running = True
    _receive_buffer_size = 8192
    _send_channel, _recv_channel = trio.open_memory_channel[str | bytes](0)
    _close_handshake = trio.Event()

    def __init__(
        self,
        outbox: Outbox,
        trailing: bytes,
        on_message: Callable[[str | bytes], Awaitable[None]],
    ) -> None:
        # The handshake is over: wsproto starts open, with the bytes that followed it.
        self._wsproto: Any = Connection(ConnectionType.SERVER, trailing_data=trailing)
        self._stream: Any = outbox  # the library only reads from it
        self._outbox = outbox
        self._on_message = on_message
        self._message_parts: list[Any] = []
        self._message_size = self._fragments = 0

    # Reads and handles messages until the connection ends. Raises ClientFault.
    read = WebSocketConnection._reader_task

    async def _handle_ping_event(self, event: wsproto.events.Ping) -> None:
        self._outbox.charge()
        self._outbox.pong(bytes(event.payload))

    async def _handle_pong_event(self, event: wsproto.events.Pong) -> None:
        self._outbox.charge()  # only its arrival matters: see Outbox.received_at

    async def _handle_close_connection_event(
        self, event: wsproto.events.CloseConnection
    ) -> None:
        # wsproto reports a protocol error as a close too, but then stays open.
        if self._wsproto.state is not ConnectionState.OPEN:
            self._outbox.seal(bytes(_frames.close(event.code, event.reason)))
            self._outbox.client_closed = True
        raise ClientFault(event.code, event.reason or "")

    async def _handle_message_event(
        self, event: wsproto.events.BytesMessage | wsproto.events.TextMessage
    ) -> None:
        self._outbox.charge()
        data, settings = event.data, self._outbox.settings
        self._message_size += len(data.encode() if isinstance(data, str) else data)
        self._fragments += event.frame_finished
        if self._message_size > settings.max_message_bytes:
            why = f"more than {settings.max_message_bytes} bytes"
            raise ClientFault(CLOSE_TOO_BIG, why)
        if self._fragments > settings.fragments:
            why = f"more than {settings.fragments} fragments"
            raise ClientFault(CLOSE_TOO_BIG, why)
        self._message_parts.append(data)
        if not event.message_finished:
            return
        parts, self._message_parts = self._message_parts, []
        self._message_size = self._fragments = 0
        message = "".join(parts) if isinstance(data, str) else b"".join(parts)
        try:
            await self._on_message(message)
        except KeyError as error:
            # The library would take a KeyError for an event that it does not know.
            raise RuntimeError("a KeyError while handling a message") from error


REFUSED_IN_A_ROW = 100  # commands over the rate: then 4008


@dataclasses.dataclass(eq=False)
class Session:
    """One WebSocket after its 101: greet, handle commands, close. Owns its seat.

    The reader's task puts commands into the store's channel in the order read. Answers
    come back as calls of a plain `def`. So an idle connection has one task.
    """

    server: Server
    outbox: Outbox
    claims: Claims
    cursor: str | None
    close_with: tuple[int, str] | None = None  # code and reason, once known
    refused: int = 0  # commands in a row over the rate

    def __post_init__(self) -> None:
        """Make the seat, which the hub does not know yet."""
        self.reading = trio.CancelScope()
        self.bucket = Bucket(self.server.settings.commands)
        person = Person(self.claims.user_id)  # until Hub.enter: there may be one
        self.seat = Seat(person, self.outbox, self._start_catch_up, self.end)
        self._set_token(self.claims)

    async def run(self, trailing: bytes) -> None:
        """Serve the connection to its end. The caller then cancels its nursery.

        trailing holds the bytes that the client sent right behind its handshake.
        """
        server, user_id = self.server, self.claims.user_id
        server.sessions.add(self)
        server.stats.total += 1
        log(DEBUG, "joined", user=user_id)
        reader = WebSocketReader(self.outbox, trailing, self._receive)
        try:
            try:
                with self.reading:
                    # Register first, read second: no event that is published meanwhile
                    # is missed.
                    if await self._enter() and await self._greet():
                        await reader.read()
            except ClientFault as fault:
                self.close_with = self.close_with or fault.args
            if reader.closed and not self.close_with:
                self.close_with = (reader.closed.code, reader.closed.reason or "")
            await self._close()
        finally:
            server.hub.leave(self.seat)
            server.sessions.discard(self)
            server.listener.end_parked()
            code, _ = self.close_with or (CUT, "")
            server.stats.closed[str(code)] += 1
            log(DEBUG, "left", user=user_id, code=code)
            # Break the reference cycle between session and seat: all of this is then
            # freed at once and does not wait for a full pass of the collector.
            del self.seat.catch_up, self.seat.end

    def end(self, code: int, reason: str) -> None:
        """Close this connection, from any task. The first call decides the code.

        CUT ends it at once: a client that takes no bytes would not get a close frame.
        """
        if not self.close_with:
            self.close_with = (code, reason)
            self.reading.cancel()
        if code == CUT:
            user = self.claims.user_id
            queued = len(self.outbox.buffer)
            log(INFO, "cut", user=user, why=reason, queued=queued)
            self.outbox.nursery.cancel_scope.cancel()

    # --- joining ---------------------------------------------------------------------

    async def _enter(self) -> bool:
        """Enter the hub. False: the user has too many connections that are alive.

        Of those that are not, the one that has been silent longest is cut to make room.
        To learn which are, it pings them and may have to wait.
        """
        hub, user_id = self.server.hub, self.claims.user_id
        for _ in range(40):  # 4 s: DEAD_SECONDS, and some
            if hub.enter(self.seat):
                return True
            now, seats = trio.current_time(), hub.people[user_id].seats
            dead = [seat for seat in seats if seat.sweep(now, DEAD_SECONDS)]
            if dead:
                oldest = min(dead, key=lambda one: one.pinged_at or one.outbox.moved_at)
                oldest.end(CUT, "replaced")
            elif not any(seat.pinged_at for seat in seats):
                break
            await trio.sleep(0.1)
        self.end(CLOSE_TOO_MANY, "this user has too many connections")
        return False

    async def _greet(self) -> bool:
        """Read the user's chats and send `connected`. False: they cannot be read."""
        store, hub = self.server.store, self.server.hub
        upto = hub.head
        given, user_id = parse_cursor(self.server, self.cursor), self.claims.user_id
        start = upto if given is None else given
        try:
            joined, marks, missed = await store.read(
                store.greeting, user_id, upto, start
            )
        except Refusal as refusal:
            self._answer(error_of(refusal))
            self.end(CLOSE_LATER, "the database cannot be read: come back later")
            return False
        hub.set_chats(self.seat.person, joined)
        if self.cursor is None:
            resume = "fresh"
        elif given is None or missed is None:
            resume, start = "resync", upto
        else:
            resume = "replay" if missed else "live"
        self.server.stats.resumes[resume] += 1
        self.seat.cursor = start
        connected = Connected(
            user_id=user_id,
            timestamp=timestamp(now_seconds()),
            cursor=write_cursor(self.server, start),
            resume=resume,
            expires_in=self.claims.expires_in(),
            chats=marks,
            more_chats=len(marks) < len(joined),
        )
        self._answer(connected)
        self.seat.warned = False
        if hub.in_tail(start):
            hub.push_tail(self.seat)  # with nothing new it only makes the seat live
        if not self.seat.live:
            self._start_catch_up()
        return True

    def _start_catch_up(self) -> None:
        self.server.stats.catch_ups += 1
        self.outbox.nursery.start_soon(self._catch_up)

    async def _catch_up(self) -> None:
        """Push the events that the seat missed, until it is live.

        They come from the tail if all of them are there, else from the event log in
        pages. A page is pushed when the kernel has accepted the one before.
        """
        store, hub, seat = self.server.store, self.server.hub, self.seat
        user_id, limit = self.claims.user_id, self.server.settings.page_events
        person = seat.person
        while not seat.live:
            await trio.lowlevel.checkpoint()  # one page, then the other tasks
            await self.outbox.wait_empty()
            if self.outbox.sealed:
                return
            if hub.in_tail(seat.cursor):
                hub.push_tail(seat)
                continue
            try:
                person.replaying = person.replaying or trio.Lock()
                async with person.replaying:
                    page = await store.read(
                        store.events_after, user_id, seat.cursor, hub.head, limit
                    )
            except Refusal:
                self.end(CLOSE_LATER, "events cannot be read now: keep your cursor")
                return
            hub.push_page(seat, page)

    # --- commands --------------------------------------------------------------------

    async def _receive(self, text: str | bytes) -> None:
        """Handle one message in the reader's task: nothing is read meanwhile.

        A command that needs no write is answered at once, and so before the acks of
        earlier commands. A client tells its answers apart by `ref`.
        """
        if self.close_with:
            return  # it was read together with the bytes that ended the connection
        if self.outbox.full:
            await self.outbox.wait_not_full()
        try:
            self._check_rate()
            if isinstance(text, bytes):
                raise Refusal("bad_json", "a binary message; send JSON as text")
            await self._handle(parse(text.encode(), COMMANDS))
        except Refusal as refusal:
            self._answer(error_of(refusal, text))

    def _check_rate(self) -> None:
        try:
            charge(self.server, "commands", self.bucket)
            self.refused = 0
        except Refusal:
            self.refused += 1
            if self.refused >= REFUSED_IN_A_ROW:
                self.end(CLOSE_FLOOD, "far over the rate of commands")
            raise

    async def _handle(self, command: AnyCommand) -> None:
        """Handle one command. Raises the Refusal that is its answer."""
        match command:
            case SendMessage():
                await self._send(command)
            case EditMessage():
                await self._change(command, command.content, command.if_rev)
            case DeleteMessage():
                await self._change(command)
            case Typing():
                self._type(command)
            case MarkRead():
                await self._mark_read(command)
            case Ping(ref=ref):
                self._answer(Pong(timestamp(now_seconds()), ref))
            case Auth():
                self._auth(command)
            case _:
                assert_never(command)

    def _answer(self, message: ServerMessage) -> None:
        self.outbox.push(text_frame(message), always=True)

    async def _submit(
        self,
        command: AnyCommand,
        reply: Callable[[T], Reply],
        write: Callable[..., T],
        *args: Any,
    ) -> None:
        """Queue write(db, events, *args); reply makes the answer from its result.

        At most 64 commands of this connection are without an answer.
        """

        def done(outcome: T | Refusal) -> Reply:
            if isinstance(outcome, Refusal):
                return Reply(text_frame(error_of(outcome, encode(command))), 0)
            return reply(outcome)

        await take(self.seat.slots)
        try:
            await self.server.store.submit(Job(write, args, done, self.seat))
        except trio.Cancelled:
            self.seat.slots.release()  # it was not queued: no answer will come
            raise

    async def _send(self, command: SendMessage) -> None:
        server, user_id = self.server, self.claims.user_id
        check_content(command.content, server.settings)
        send = Send(command.chat_id, user_id, command.content, command.client_id)
        if sent := await allow_send(server, self.claims, send):
            await take(self.seat.slots)  # Seat.reply gives it back
            self.seat.reply(sent_reply(sent, command.ref))
            return

        def reply(sent: Sent) -> Reply:
            count_sent(server, self.claims, sent)
            return sent_reply(sent, command.ref)

        await self._submit(
            command, reply, server.store.send_message, send, self.claims.service
        )

    async def _change(
        self, command: EditMessage | DeleteMessage, *new: str | int | None
    ) -> None:
        """Edit a message, with a new content and an if_rev, or delete it."""
        by = None if self.claims.service else self.claims.user_id
        charge_change(self.server, self.claims)

        def reply(message: Message) -> Reply:
            rev = message.rev or message.id
            ack = Ack(
                command.ref, message_id=message.id, chat_id=message.chat_id, rev=rev
            )
            return Reply(text_frame(ack), rev)

        await self._submit(
            command,
            reply,
            self.server.chats.change_message,
            by,
            command.message_id,
            *new,
        )

    async def _mark_read(self, command: MarkRead) -> None:
        await self._submit(
            command,
            lambda marked: Reply(text_frame(Ack(command.ref)), marked.seq),
            self.server.store.mark_read,
            self.claims.user_id,
            command.message_id,
        )

    def _type(self, command: Typing) -> None:
        user_id, chat_id = self.claims.user_id, command.chat_id
        if chat_id not in self.seat.person.chats:
            raise no_chat()
        with suppress(Refusal):  # a sign over the rate is dropped
            charge(self.server, "typing", self.server.typing((user_id, chat_id)))
            self.server.hub.show_typing(user_id, chat_id, command.is_typing)

    def _auth(self, command: Auth) -> None:
        """Replace the connection's token. A bad token changes nothing."""
        claims = self.server.keyring.verify(command.token, "socket")
        if claims.user_id != self.claims.user_id:
            self.end(CLOSE_SIGN_IN, "this is another user's token: sign in again")
            raise Refusal("forbidden", "token: it is another user's")
        self.server.keyring.spend(claims)
        self._set_token(claims)
        self.seat.warned = False
        self._answer(Ack(command.ref, expires_in=claims.expires_in()))

    def _set_token(self, claims: Claims) -> None:
        self.claims = claims
        # In trio's time: a clock that is stepped back gives the socket no more time.
        self.token_ends = trio.current_time() + claims.ends - time.time()

    # --- closing ---------------------------------------------------------------------

    async def _close(self) -> None:
        """Write the close frame and wait until the client has it.

        chatd closes, not the library: its aclose() has no deadline.
        """
        code, reason = self.close_with or (CLOSE_NORMAL, "")
        if code in (CLOSE_RESTART, CUT) and self.seat.slots.value < UNANSWERED:
            # At most half of the drain: the close frame has to go out before the cut.
            with trio.move_on_after(self.server.settings.drain_seconds / 2):
                for _ in range(UNANSWERED):
                    await self.seat.slots.acquire()  # all free: all are answered
        if code == CLOSE_RESTART:
            self._answer(Bye(self.server.retry_after_seconds()))
        if code == CUT:
            # The client ended its side without a close frame: it is `reader.closed`
            # that says so, for Session.end(CUT) has cancelled this task. `chatd proxy`
            # does so when it stops, and its own client has to come back.
            code, reason = CLOSE_RESTART, "the connection ended without a close frame"
        # A reason has at most 123 bytes (RFC 6455 5.5).
        self.outbox.seal(bytes(_frames.close(code, reason)))
        await self.outbox.finish()


# =====================================================================================
# STORE: the event log on disk
#
# `seq` orders everything, so "what did this client miss" is a comparison of two
# integers, and every way to catch up is the same query with other bounds. One task
# writes, in one worker thread and on one connection: it takes every job that waits and
# runs them in one transaction. Reads use connections of their own in at most five
# threads. An event is durable when COMMIT has returned, and published only then.
# =====================================================================================


# --- event kinds ---------------------------------------------------------------------


class Event(ServerMessage):
    """One kind of event: its JSON, and what it does to the membership of its `to_user`.

    To add a kind, write a subclass, and the method that records it and decides its
    audience. The fields that a kind adds to its base are stored in the `body` of the
    event's row. Those of the bases below are never copied: they are joined each time
    the event is read. tests/test_docs.py names a kind that docs/protocol.md lacks.
    """

    seq: int
    chat_id: int
    membership: ClassVar[Literal["joins", "leaves", ""]] = ""


class MessageEvent(Event):
    """An event that quotes a message: as it is when the event is sent."""

    message: Message


class ChatEvent(Event):
    """An event that shows its `to_user` the chat.

    From the tail it is the chat as of the event's commit, but for a change of its last
    message; from the event log it is the chat as it is then. To a user who has left
    since, either shows the chat empty (`hidden_chat`).
    """

    chat: Chat


class UserEvent(Event):
    """An event that names a user: by the name at the event's commit, or a later one."""

    user_id: int
    name: str | None


class NewMessage(MessageEvent, tag="new_message"):
    """To all members, and to the sender's own sockets too.

    Its sender has read the chat up to it, unless `read` is false.
    """

    read: bool = True


class MessageRead(Event, tag="message_read"):
    """To all members; in a large chat to the reader only."""

    message_id: int
    read_by: int
    n: int


class ChatAdded(ChatEvent, tag="chat_added"):
    """To the user who is in the chat from here on."""

    membership = "joins"


class MemberAdded(UserEvent, tag="member_added"):
    """To those who were members before."""


class ChatRenamed(Event, tag="chat_renamed"):
    """To all members. user_id is the member who renamed the chat; None: a service."""

    title: str | None
    user_id: int | None


class MessageChange(MessageEvent):
    """An event that changes a message. The hub renews its entries that show it."""


class MessageEdited(MessageChange, tag="message_edited"):
    """To all members: the message has another text."""


class MessageDeleted(MessageChange, tag="message_deleted"):
    """To all members: the message has no text any more."""


class MemberRemoved(Event, tag="member_removed"):
    """To the remaining members, and to the removed user, as the chat's last event."""

    user_id: int
    membership = "leaves"


BASES = (Event, MessageEvent, MessageChange, ChatEvent, UserEvent)
# The `type` of each kind of event: its class, and the fields that it adds to its base.
KINDS = {
    str(kind.__struct_config__.tag): (
        kind,
        kind.__struct_fields__[len(base.__struct_fields__) :],
    )
    for base in BASES
    for kind in base.__subclasses__()
    if kind not in BASES
}


class Entry(msgspec.Struct, eq=False):
    """An event in a batch, a page or the tail, with its audience: to_chat, to_user."""

    event: Event
    to_user: int | None = None
    to_chat: bool = False
    seq: int = 0
    chat_id: int = 0
    quotes: int = 0  # the id of the message that it shows
    size: int = 0  # about how many bytes of memory it takes in the tail
    built: bytes | None = None

    def __post_init__(self) -> None:
        """Derive the other fields from the event."""
        event, self.built = self.event, None
        self.seq, self.chat_id = event.seq, event.chat_id
        if isinstance(event, MessageEvent):
            self.quotes = event.message.id
            # A text that is not ASCII is held three times: as str, as its UTF-8, and
            # in the frame.
            self.size = 256 + 3 * len(event.message.content.encode())
            return
        self.size = 256 + len(encode(event))
        if isinstance(event, ChatEvent) and event.chat.last_message:
            self.quotes = event.chat.last_message.id

    @property
    def kind(self) -> str:
        """The event's `type` in JSON."""
        return str(self.event.__struct_config__.tag)

    @property
    def frame(self) -> bytes:
        """The event's bytes on the wire, built at the first use.

        The frame of an event with one reader, which may be large, is not kept.
        """
        frame = self.built or text_frame(self.event)
        if self.to_chat:
            self.built = frame
        return frame


Entries = list[Entry]


# --- what jobs and queries return ----------------------------------------------------


class Send(NamedTuple):
    """A message to store. Repeated with the same client_id it is the same message."""

    chat_id: int
    sender_id: int
    content: str
    client_id: str | None = None


class Sent(Record):
    """The result of a send. The message's id is its event's seq."""

    message: Message
    duplicate: bool


class Marked(NamedTuple):
    """The result of mark_read. seq is that of its event; 0: the mark did not move."""

    message_id: int
    chat_id: int
    n: int
    seq: int


class Page(NamedTuple):
    """A page of the event log: all events that a reader sees in (start, cursor].

    It was read when all events up to `upto` were published.
    """

    events: Entries
    cursor: int
    upto: int


def page_of(
    entries: Iterable[Entry], settings: Settings, upto: int, limit: int = MAX_ID
) -> Page:
    """Make a page of the first of these entries, at most about 128 KiB.

    A page that is not cut short by its limits moves the cursor to upto.
    """
    events: Entries = []
    size = 0
    for entry in entries:
        events.append(entry)
        size += len(entry.built or encode(entry.event))
        if size >= settings.page_bytes or len(events) >= limit:
            return Page(events, entry.seq, upto)
    return Page(events, upto, upto)


class Reply(NamedTuple):
    """An answer for the caller's own socket, not to be written before event `seq`."""

    frame: bytes
    seq: int


class Job(NamedTuple):
    """A write with its arguments, and the callback that answers its caller.

    write(db, events, *args) runs in the writer's thread, inside the transaction; it
    appends the events that it makes. It changes nothing but db and events, because it
    may be rolled back and run again. done runs on the main thread while the hub
    publishes them; it gets the result of write, or the Refusal that write raised.
    """

    write: Callable[..., Any]
    args: tuple[Any, ...]
    done: Callable[[Any], Reply | None]
    seat: Seat | None = None


class Batch(NamedTuple):
    """The events of one transaction, and its jobs with their outcomes."""

    events: Entries
    outcomes: list[tuple[Job, Any]]


class HalfDone(Exception):
    """A job was refused after it had written something."""


# --- queries -------------------------------------------------------------------------


JOINS, LEAVES = (
    ", ".join(f"'{kind}'" for kind in KINDS if KINDS[kind][0].membership == effect)
    for effect in ("joins", "leaves")
)

# The events that a user sees: those of the user's chats since it joined, and those to
# the user alone. Each chat gives at most :limit rows by index, so the cost of a page
# depends neither on the length of the event log nor on how far behind the reader is.
#
# Membership is as of :upto too. When a removal is on disk and not yet published, the
# member's row is gone, but events up to :upto are still for the user. The second half
# of MINE finds these chats: without it a reader of that moment would skip such events.
# For example: joined at 10, removed at 90, :upto is 80. The row is gone; the removal is
# above :upto, and the user's last such event up to :upto is the join: (chat, 10).
#
# CROSS JOIN fixes the order of SQLite's loops: first the few chats, then their events.
MINE = f"""
    SELECT chat_id, joined_seq FROM member WHERE user_id = :user
    UNION
    SELECT gone.chat_id, joined.seq FROM event gone CROSS JOIN event joined
    WHERE gone.to_user = :user AND gone.seq > :upto AND gone.kind IN ({LEAVES})
      AND joined.kind IN ({JOINS}) AND joined.seq = (
        SELECT seq FROM event
        WHERE to_user = :user AND seq <= :upto AND chat_id = gone.chat_id
          AND kind IN ({JOINS}, {LEAVES}) ORDER BY seq DESC LIMIT 1)
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

# A message as it is now: its newest change says it, if there is one. Then the message's
# own text is overwritten with NULs, so messages without a change cost no search for it.
# So is the client_id of a forgotten user.
MESSAGE_COLUMNS = """
    m.id, m.chat_id, m.sender_id, coalesce(newest.content, m.content),
    strftime('%Y-%m-%dT%H:%M:%SZ', m.created_at, 'unixepoch'), m.n,
    iif(m.client_id >= ' ', m.client_id, NULL), newest.rev,
    strftime('%Y-%m-%dT%H:%M:%SZ', newest.edited_at, 'unixepoch'), newest.deleted
"""
NEWEST_CHANGE = """
    LEFT JOIN change newest ON newest.rev = CASE WHEN m.content < char(1) THEN (
        SELECT max(rev) FROM change WHERE message_id = m.id) END
"""
MESSAGES = f"SELECT {MESSAGE_COLUMNS} FROM message m {NEWEST_CHANGE}"

EVENTS = f"""
    SELECT e.seq, e.kind, e.chat_id, e.to_chat, e.to_user, e.user_id, a.name, e.body,
           {MESSAGE_COLUMNS}
    FROM event e LEFT JOIN message m ON m.id = e.message_id {NEWEST_CHANGE}
                 LEFT JOIN user u ON u.id = e.user_id
                 LEFT JOIN user_name a ON a.id = u.name_id
"""

PAGE = f"""{EVENTS} WHERE e.seq IN
    (SELECT seq FROM ({VISIBLE}) ORDER BY seq LIMIT :limit) ORDER BY e.seq"""
FEED = f"""{EVENTS} WHERE e.seq > :cursor AND e.seq <= :upto
    ORDER BY e.seq LIMIT :limit"""

# The chats of a user ?1 as of ?2, the one with the newest message first. A chat without
# one since the user joined is as new as that. No two chats share the seq `active`.
NEWEST_FIRST = """
    SELECT b.chat_id, b.joined_seq, coalesce(m.n, 0) AS last_n,
           min(b.read_n, coalesce(m.n, 0)) AS read_n,
           max(b.joined_seq, coalesce(m.id, 0)) AS active
    FROM member b LEFT JOIN message m ON m.id = (
        SELECT id FROM message WHERE chat_id = b.chat_id AND id <= ?2
        ORDER BY n DESC LIMIT 1)
    WHERE b.user_id = ?1 AND b.joined_seq <= ?2
    ORDER BY active DESC
"""

REVOKED = "SELECT id, revoked_at FROM user WHERE revoked_at IS NOT NULL"
IS_MEMBER = "SELECT 1 FROM member WHERE chat_id = ? AND user_id = ?"
# Has a chat more than so many members?
IS_LARGE = "SELECT 1 FROM member WHERE chat_id = ? LIMIT 1 OFFSET ?"
# A read mark that a user, ?1, moves up to a message, ?2: the chat and the message's n;
# and the message before the next one of another sender, or NULL if the mark does not
# move.
MARK = """
    SELECT m.chat_id, m.n, last.n, last.id
    FROM message m JOIN member b ON b.chat_id = m.chat_id AND b.user_id = ?1
    LEFT JOIN message last ON last.chat_id = m.chat_id AND last.n = CASE
        WHEN m.n > b.read_n THEN coalesce((
            SELECT n - 1 FROM message
            WHERE chat_id = m.chat_id AND n > m.n AND sender_id != ?1
            ORDER BY n LIMIT 1), (SELECT max(n) FROM message WHERE chat_id = m.chat_id))
        END
    WHERE m.id = ?2
"""
APPLICATION_ID = 0x63686174  # "chat": says whose file this is


# Trio's own methods give other tasks a turn even if there is nothing to wait for. These
# two do not. So commands that came in one read get into one commit (measured with 32 in
# flight: 12 a commit with a turn for each job, 32 without), and a message takes fewer
# turns.


async def put(channel: trio.MemorySendChannel[T], value: T) -> None:
    """Send a value into a channel. Waits only while the channel is full."""
    try:
        channel.send_nowait(value)
    except trio.WouldBlock:
        await channel.send(value)


async def take(limit: trio.Semaphore | trio.CapacityLimiter) -> None:
    """Acquire a slot. Waits only while all are taken."""
    try:
        limit.acquire_nowait()
    except trio.WouldBlock:
        await limit.acquire()


def outcome_of(outcome: T | Refusal) -> T:
    """Return the result of a write, or raise its Refusal."""
    if isinstance(outcome, Refusal):
        raise outcome
    return outcome


async def in_thread(
    function: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter
) -> T:
    """Run function(*args) in a thread. A cancelled caller waits for it all the same.

    trio.to_thread.run_sync does the same at a higher cost: it names the thread, copies
    a context, and waits a turn for a limiter that is free. Unlike it, this is no
    checkpoint: a caller that was cancelled before learns it at its next one.
    """
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

    def deliver(outcome: Any) -> None:
        token.run_sync_soon(trio.lowlevel.reschedule, task, outcome)

    await take(limiter)
    try:
        trio.lowlevel.start_thread_soon(partial(function, *args), deliver)
        result: T = await trio.lowlevel.wait_task_rescheduled(
            lambda _: trio.lowlevel.Abort.FAILED
        )
    finally:
        limiter.release()
    return result


# Chats, and bytes of them, in `connected`: so no frame exceeds 32 KiB. The newest ones.
GREETING_CHATS = 500
GREETING_BYTES = 24_576

PROBE_SECONDS = 2.0  # between two probes of a disk that failed
READERS = 5  # threads that read at once; one of them may search


class Store:
    """The database. One task and one connection write; at most 5 threads read.

    A write is a Job in a bounded channel. `run` takes all jobs that wait, runs them in
    one transaction, and hands the batch to the hub. While one batch is in fsync the
    next one gathers, so under load many messages share the cost of an fsync (measured:
    342 us for a lone message, 11 us in a batch of 64).

    run_sync runs a function in a thread; tests pass one that calls it directly, which
    works under virtual time.
    """

    def __init__(
        self, settings: Settings, *, run_sync: Callable[..., Awaitable[Any]] = in_thread
    ) -> None:
        self.settings = settings
        self.stats = Stats()
        self.path = settings.db
        self.wal = wal_of(self.path)
        self.failure = ""  # why writes are refused: a code of SQLite
        self.erase_at = 0.0  # when the WAL is to be truncated
        self.writing_since: float | None = None  # of the commit under way
        self._run_sync = run_sync
        self._idle_readers: list[Db] = []
        self._read_limiter = trio.CapacityLimiter(READERS)
        self._write_limiter = trio.CapacityLimiter(1)
        self._submit, self._inbox = trio.open_memory_channel[Job](4096)
        self._writer = db = prepare_database(self.path, settings.check_bytes)
        with file_errors("database", self.path):
            self.epoch: str = query_value(
                db, "SELECT value FROM meta WHERE key = 'epoch'"
            )
            # The seq of the last event that is known to be committed.
            self.seq: int = query_value(db, "SELECT coalesce(max(seq), 0) FROM event")
        self._files = self._inodes()

    def close(self) -> None:
        """Fold the WAL into the file and close. No other method may be running."""
        for db in self._idle_readers:
            db.close()
        with suppress(sqlite3.Error):  # a failed disk: the WAL has it all
            self._writer.executescript(
                "PRAGMA optimize; PRAGMA wal_checkpoint(TRUNCATE)"
            )
        self._writer.close()

    # --- writing: the task -----------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Queue a job, in order. Waits only while 4,096 others wait."""
        await put(self._submit, job)

    async def commit(
        self,
        write: Callable[..., T],
        *args: Any,
        then: Callable[[T], object] = lambda _: None,
    ) -> T:
        """Run write(db, events, *args); wait until it is on disk and published.

        Returns its result or raises its Refusal. then(result) is called as soon as the
        write is published. If the caller is cancelled while it waits for that, both
        happen all the same.
        """
        answered = trio.Event()
        outcomes: list[T | Refusal] = []

        def done(outcome: T | Refusal) -> None:
            if not isinstance(outcome, Refusal):
                then(outcome)
            outcomes.append(outcome)
            answered.set()

        await self.submit(Job(write, args, done))
        await answered.wait()
        return outcome_of(outcomes[0])

    def commit_now(self, write: Callable[..., T], *args: Any) -> T:
        """Run and commit write(db, events, *args) at once. Only before `run`."""
        job = Job(write, args, lambda _: None)
        outcome: T | Refusal = self._transact([job]).outcomes[0][1]
        return outcome_of(outcome)

    def finish(self) -> None:
        """Take no more jobs. `run` ends when those that wait are done."""
        self._submit.close()

    async def run(self, to_hub: trio.MemorySendChannel[Batch]) -> None:
        """Commit the submitted jobs until `finish`. Closes the hub's channel."""
        async with to_hub:
            async for job in self._inbox:
                jobs = await self._gather(job)
                while jobs:
                    batch = await self._write(self._transact, jobs)
                    jobs = jobs[len(batch.outcomes) :]
                    await put(to_hub, batch)
                while self.failure:
                    await self._heal(to_hub)

    async def _gather(self, first: Job) -> list[Job]:
        """Take all jobs that wait; then, as long as there were any, let others come.

        So the commands that many sockets sent at one time get into one commit, and a
        lone one waits for no turn of the scheduler.
        """
        jobs, before, most = [first], 0, self.settings.batch_jobs
        while True:
            before = len(jobs)
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while len(jobs) < most:
                    jobs.append(self._inbox.receive_nowait())
            if len(jobs) in (before, most):
                return jobs
            await trio.lowlevel.checkpoint()

    async def _write(self, function: Callable[..., Batch], *args: Any) -> Batch:
        self.writing_since = trio.current_time()
        try:
            batch: Batch = await self._run_sync(
                function, *args, limiter=self._write_limiter
            )
        finally:
            self.writing_since = None
        return batch

    async def erase(self) -> None:
        """Truncate the WAL now and then: it may have texts that were deleted since.

        That needs a moment without readers. chatd's own then read one at a time, until
        this task gets its turn or 20 s are over. While another process reads, it tries
        again each second. While the disk fails, only `_probe` writes.
        """
        while True:
            await trio.sleep(1)
            if self.failure or trio.current_time() < self.erase_at:
                continue
            self._read_limiter.total_tokens = 1
            with trio.move_on_after(20):
                async with self._read_limiter:
                    if await self._run_sync(
                        self._truncate, limiter=self._write_limiter
                    ):
                        now = trio.current_time()
                        self.erase_at = now + self.settings.erase_seconds
            self._read_limiter.total_tokens = READERS

    async def _heal(self, to_hub: trio.MemorySendChannel[Batch]) -> None:
        """After a failure: refuse jobs for 2 s, then try to write again."""
        deadline = trio.current_time() + PROBE_SECONDS
        while True:
            # The scope holds only the wait: a job that was received is always answered.
            with trio.move_on_at(deadline) as scope:
                try:
                    job = await self._inbox.receive()
                except trio.EndOfChannel:
                    self.failure = ""  # stopping: no job is left to refuse
                    return
            if scope.cancelled_caught:
                break
            await put(to_hub, self._storage_failed([job]))
        await put(to_hub, await self._write(self._probe))

    def _storage_failed(self, jobs: list[Job]) -> Batch:
        self.stats.failed += len(jobs)
        refusal = Refusal("storage_failed", retry_after=PROBE_SECONDS)
        return Batch([], [(job, refusal) for job in jobs])

    # --- writing: in the writer's thread ---------------------------------------------

    def _transact(self, jobs: list[Job]) -> Batch:
        """Run jobs in one transaction. A failing disk is an answer, not an exception.

        On a full disk or an I/O error SQLite discards the whole transaction, and the
        next statement would quietly be one of its own: so one error ends the batch. A
        failed commit is *unknown*: it may be in the file all the same. `_probe` then
        finds and publishes it, before anything else is written.
        """
        started = time.perf_counter()
        try:
            try:
                batch = self._run_all(jobs)
            except HalfDone:
                self._writer.execute("ROLLBACK")
                batch = self._run_all(jobs, savepoints=True)
            self._writer.execute("COMMIT")
            # After an OSError here they are committed and not counted: `_probe` finds
            # them.
            self.check_file()
            self.seq += len(batch.events)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return self._storage_failed(jobs)
        self.stats.committed(time.perf_counter() - started, len(batch.outcomes))
        return batch

    def _run_all(self, jobs: list[Job], savepoints: bool = False) -> Batch:
        """Begin a transaction and run the jobs: all, or those that make a large batch.

        A refused job does not undo its neighbours. With savepoints it is undone alone;
        without, HalfDone says that it has written something. Savepoints cost a lone
        message an eighth of its transaction, and few jobs are refused that late.
        """
        db, batch = self._writer, Batch([], [])
        db.execute("BEGIN IMMEDIATE")
        for job in jobs:
            batch.outcomes.append((job, self._run_one(job, batch.events, savepoints)))
            if len(batch.events) >= self.settings.batch_events:
                break  # a large chat was created: the other jobs come next
        return batch

    def _run_one(self, job: Job, events: Entries, savepoints: bool) -> Any:
        db = self._writer
        before = len(events)
        changes = db.total_changes
        if savepoints:
            db.execute("SAVEPOINT job")
        try:
            outcome = job.write(db, events, *job.args)
        except (Refusal, sqlite3.IntegrityError, OverflowError) as error:
            if savepoints:
                db.execute("ROLLBACK TO job")
                db.execute("RELEASE job")
            elif db.total_changes != changes:
                raise HalfDone from None
            del events[before:]
            if isinstance(error, Refusal):
                return error
            self.stats.errors[type(error).__name__] += 1
            why = "it broke a rule of the schema, or a number was too large"
            log(ERROR, "refused", why=why, error=error)
            return Refusal("internal")
        if savepoints:
            db.execute("RELEASE job")
        return outcome

    def _failed(self, error: sqlite3.Error | OSError) -> None:
        """Refuse writes until a probe succeeds, whatever is wrong with the disk."""
        before = self.failure
        self.failure = getattr(error, "sqlite_errorname", type(error).__name__)
        if self.failure != before:  # else a broken disk fills the journal, too
            log(ERROR, "storage_failed", db=self.path, code=self.failure, error=error)
        with suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")

    def _truncate(self) -> bool:
        """Fold the WAL into the file and empty it. False: another process reads it."""
        db, busy = self._writer, 1
        db.execute("PRAGMA busy_timeout = 0")  # no message waits for that process
        with suppress(sqlite3.Error, OSError):  # the disk fails: tried again
            sql = "PRAGMA wal_checkpoint(TRUNCATE)"
            busy = file_bytes(self.wal) and query_value(db, sql)  # idle: no write
        db.execute("PRAGMA busy_timeout = 5000")
        return not busy

    def _probe(self) -> Batch:
        """Write as much as a message needs; then publish events that are unpublished.

        A one-row probe could succeed where no message fits, so it writes 64 KB.
        """
        try:
            # A full disk and another program's lock leave the connection sound.
            if not self.failure.startswith(("SQLITE_FULL", "SQLITE_BUSY")):
                self._open_anew()
            db = self._writer
            with suppress(sqlite3.Error):
                # The WAL may be what fills the disk: only commits would fold it into
                # the database, and there are none.
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            for text in ("x" * 65536, str(time.time())):  # the second frees the 64 KB
                db.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", (text,))
            unpublished = {"cursor": self.seq, "upto": MAX_ID, "limit": -1}
            rows = db.execute(FEED, unpublished).fetchall()
            found = [self._entry(db, row, MAX_ID) for row in rows]
            self.check_file()
            self.seq += len(found)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return Batch([], [])
        self.failure = ""
        log(WARNING, "storage_recovered", db=self.path, found=len(found))
        return Batch(found, [])

    def _open_anew(self) -> None:
        """Replace the writer's connection; put the WAL on the disk once more.

        The old connection may hold pages that were never written, or be read-only, if
        its disk was when it was opened. The new one is opened before the old one is
        closed, because the last connection that closes removes the WAL.
        """
        self.check_file()
        before, self._writer = self._writer, open_database(self.path, readonly=False)
        before.close()
        sync_wal(self.wal)  # before anything is added to it, or folded into the file

    def check_file(self) -> None:
        """Raise UsageError if the database's name now belongs to another file.

        SQLite goes on writing to a file that was removed, and every ack would be a lie.
        The check costs 4 us a commit. Raises OSError if the disk cannot tell.
        """
        if self._inodes() != self._files:
            raise UsageError(
                f"database {self.path}: removed or replaced while it is served"
            )

    def _inodes(self) -> list[int]:
        """Return the inodes of the database and its WAL, which has the newest rows."""
        found = []
        for path in (self.path, self.wal):
            with suppress(FileNotFoundError, NotADirectoryError):
                found.append(os.stat(path).st_ino)
        return found

    # --- writes ----------------------------------------------------------------------
    # Each runs inside the transaction. db is the writer's connection; events are the
    # batch's so far, and the write appends its own.

    def next_seq(self, events: Entries) -> int:
        return self.seq + len(events) + 1

    def record(self, db: Db, events: Entries, entry: Entry) -> None:
        """Append an event to the event log, and to the batch."""
        events.append(entry)
        event, kind = entry.event, entry.kind
        own = {field: getattr(event, field) for field in KINDS[kind][1]}
        db.execute(
            """INSERT INTO event
               (seq, kind, chat_id, to_chat, to_user, user_id, message_id, body)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
            (entry.seq, kind, entry.chat_id, entry.to_chat, entry.to_user,
             event.user_id if isinstance(event, UserEvent) else None,
             event.message.id if isinstance(event, MessageEvent) else None,
             encode(own).decode() if own else None),
        )  # fmt: skip

    def send_message(
        self, db: Db, events: Entries, send: Send, service: bool = False
    ) -> Sent:
        """Store a message, once: a repeat of (sender_id, client_id) gets the same ack.

        A service may send for a user who is not a member. Raises Refusal not_found,
        idempotency_mismatch.

        A member who sends has read the chat. If earlier messages were unread until
        then, an event says so; if a service sends in the member's name, they stay
        unread.
        """
        if sent := self.find_sent(db, send):
            return sent
        chat_id, sender_id, content, client_id = send
        found = db.execute(
            """SELECT last_n + 1,
                   (SELECT read_n FROM member WHERE chat_id = ?1 AND user_id = ?2)
               FROM chat WHERE id = ?1""",
            (chat_id, sender_id),
        ).fetchone()
        n, read_n = found or (0, None)
        if read_n is None:  # not a member, so there is no mark
            if not (service and found):
                raise no_chat()
            know_user(db, sender_id)
            read_n = n - 1
        seq, now = self.next_seq(events), now_seconds()
        which = (seq, chat_id, sender_id, content)
        # schema.sql's trigger message_event does the rest.
        db.execute(
            """INSERT INTO message
               (id, chat_id, sender_id, content, created_at, n, client_id, folded)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, nullif(?8, ?4))""",
            (*which, now, n, client_id, fold(content)),
        )
        message = Message(*which, timestamp(now), n, client_id)
        event = NewMessage(seq, chat_id, message, read_n == n - 1 or not service)
        events.append(Entry(event, to_chat=True))
        if not event.read:
            db.execute(
                "UPDATE event SET body = '{\"read\":false}' WHERE seq = ?", (seq,)
            )
        elif read_n < n - 1:
            self._mark(db, events, sender_id, chat_id, n, seq)
        return Sent(message, duplicate=False)

    def find_sent(self, db: Db, send: Send, upto: int = MAX_ID) -> Sent | None:
        """Find the message with this sender and key. Raises idempotency_mismatch.

        A message that was changed since is not compared. It is returned to a member
        only: to others raises not_found.
        """
        if send.client_id is None:
            return None
        row = db.execute(
            f"""SELECT CASE
                    WHEN rev IS NULL AND (m.chat_id != ?1 OR m.content != ?3)
                        THEN 'idempotency_mismatch'
                    WHEN rev AND NOT EXISTS (
                            SELECT 1 FROM member
                            WHERE chat_id = m.chat_id AND user_id = ?2)
                        THEN 'not_found|chat_id: there is no such chat for you'
                    END, {MESSAGE_COLUMNS}
                FROM message m {NEWEST_CHANGE}
                WHERE sender_id = ?2 AND client_id = ?4 AND client_id >= ' '
                    AND m.id <= ?5""",
            (*send, upto),
        ).fetchone()
        if row is None:
            return None
        refusal, *message = row
        if refusal:
            raise Refusal(*refusal.split("|"))
        return Sent(message_of(message), duplicate=True)

    def mark_read(
        self, db: Db, events: Entries, user_id: int, message_id: int
    ) -> Marked:
        """Move the user's read mark up to a message, never down. Raises not_found.

        It also moves over the user's own messages that follow: those that a service
        has sent.
        """
        row = db.execute(MARK, (user_id, message_id)).fetchone()
        if row is None:
            raise Refusal("not_found", "message_id: there is no such message for you")
        chat_id, n, last_n, last_id = row
        if last_n is None:
            return Marked(message_id, chat_id, n, 0)
        return self._mark(db, events, user_id, chat_id, last_n, last_id)

    def _mark(
        self, db: Db, events: Entries, user_id: int, chat_id: int, n: int, last_id: int
    ) -> Marked:
        """Set a member's read mark to n, which is that of the message last_id."""
        db.execute(
            "UPDATE member SET read_n = ? WHERE chat_id = ? AND user_id = ?",
            (n, chat_id, user_id),
        )
        seq = self.next_seq(events)
        event = MessageRead(seq, chat_id, last_id, user_id, n)
        # Every mark to every member costs members squared: in a large chat, too much.
        large = query_value(db, IS_LARGE, chat_id, self.settings.large_chat)
        entry = Entry(event, user_id) if large else Entry(event, to_chat=True)
        self.record(db, events, entry)
        return Marked(last_id, chat_id, n, seq)

    # --- reading ---------------------------------------------------------------------
    # Methods that take a db run in a reader's thread, in one read transaction. `upto`
    # is the hub's head at the time of the request. Events committed since do not exist
    # yet for the reader, so no reader and no cursor is ever ahead of the hub.

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
                db.close()  # this ends the transaction of a query that raised
                raise
        except sqlite3.Error as error:
            self.stats.errors[type(error).__name__] += 1
            log(ERROR, "read_failed", db=self.path, error=error)
            raise Refusal("storage_failed", "the database cannot be read") from error
        self._idle_readers.append(db)
        return result

    def _reader(self) -> Db:
        try:
            return self._idle_readers.pop()  # atomic; never more than READERS
        except IndexError:
            return open_database(self.path)

    def greeting(
        self, db: Db, user_id: int, upto: int, cursor: int
    ) -> tuple[dict[int, int], dict[str, Marks], int | None]:
        """Read the state that a socket begins with, as of upto.

        Returns the user's chats, each with its joined_seq; marks, of the newest chats
        only if there are many; and how many events were missed since cursor, None if
        they are too many to replay.
        """
        rows = db.execute(NEWEST_FIRST, (user_id, upto)).fetchall()
        marks = {str(row[0]): Marks(*row[2:4]) for row in rows[:GREETING_CHATS]}
        while len(encode(marks)) > GREETING_BYTES:
            marks.popitem()
        missed = self.missed(db, user_id, cursor, upto)
        return dict(row[:2] for row in rows), marks, missed

    def missed(self, db: Db, user_id: int, cursor: int, upto: int) -> int | None:
        """Count a user's events in (cursor, upto]. None: too many to replay."""
        if cursor >= upto:
            return 0
        limit = self.settings.resync_events + 1
        bounds = {"user": user_id, "cursor": cursor, "upto": upto, "limit": limit}
        count: int = db.execute(COUNT_VISIBLE, bounds).fetchone()[0]
        return None if count >= limit else count

    def events_after(
        self, db: Db, user_id: int | None, cursor: int, upto: int, limit: int
    ) -> Page:
        """Read a page of a user's events in (cursor, upto], at most limit.

        This one query serves the poll, the resume and the slow reader. Without a user
        it reads everybody's: the feed.
        """
        bounds = {"user": user_id, "cursor": cursor, "upto": upto, "limit": limit}
        rows = db.execute(PAGE if user_id else FEED, bounds)
        entries = (self._entry(db, row, upto) for row in rows)
        return page_of(entries, self.settings, upto, limit)

    def tail(self) -> Iterator[Entry]:
        """Read the end of the event log for the hub's tail, the newest event first.

        It goes back to the last event that shows a chat or a name (see Hub.set_tail),
        without that event: so no chat is read for it.
        """
        db, floor = self._writer, max(0, self.seq - self.settings.tail_events)
        sql = f"""{EVENTS} WHERE e.seq > max(?1, coalesce((
                SELECT seq FROM event
                WHERE seq > ?1 AND (kind IN ({JOINS}) OR user_id IS NOT NULL)
                ORDER BY seq DESC LIMIT 1), 0))
            ORDER BY e.seq DESC"""
        bytes_left = self.settings.tail_bytes
        with file_errors("database", self.path):
            for row in db.execute(sql, (floor,)):
                entry = self._entry(db, row, self.seq)
                bytes_left -= entry.size
                if bytes_left < 0:
                    break
                yield entry

    def revoked(self) -> dict[int, int]:
        """Read, at the start, the users whose older tokens are refused."""
        with file_errors("database", self.path):
            return dict(self._writer.execute(REVOKED))

    def _entry(self, db: Db, row: tuple[Any, ...], upto: int) -> Entry:
        """Make the entry of a row of EVENTS. Unknown kind: raises DatabaseError."""
        seq, kind, chat_id, to_chat, to_user, user_id, name, body, *message = row
        joined: tuple[object, ...] = ()
        try:
            cls, _ = KINDS[kind]
            if issubclass(cls, MessageEvent):
                joined = (message_of(message),)
            elif issubclass(cls, ChatEvent):
                joined = (hidden_chat(chat_id),)
                with suppress(Refusal):  # the user has left since
                    joined = (read_chat(db, chat_id, upto, to_user),)
            elif issubclass(cls, UserEvent):
                joined = (user_id, name)
            event = cls(seq, chat_id, *joined, **msgspec.json.decode(body or "{}"))
        except (KeyError, TypeError, msgspec.MsgspecError) as error:
            raise sqlite3.DatabaseError(
                f"event {seq}, a {kind!r}: {error!r}"
            ) from error
        return Entry(event, to_user, bool(to_chat))


def message_of(row: Sequence[Any]) -> Message:
    """Make the message of a row of MESSAGE_COLUMNS."""
    return Message(*row[:-1], *map(bool, row[-1:]))


# =====================================================================================
# HUB: who is connected, and the newest end of the event log
#
# The hub knows seats (a connection's user, cursor and outbox), and which of them are
# live in which chat. Its methods are plain `def` on the main thread: in Trio only
# `await` lets another task run, so each of them is a transaction.
#
# Person and Seat are msgspec's Structs: each instance gets its own copy of an empty
# default.
# =====================================================================================


class Person(msgspec.Struct, eq=False):
    """A user with at least one seat, and its chats as of the hub's head.

    Until `known` the chats are being read from disk, and changes that are published
    meanwhile wait in `changes`: register first, read second, and none is missed.
    """

    user_id: int
    seats: list[Seat] = []
    chats: dict[int, int] = {}  # chat -> joined_seq
    known: bool = False
    changes: dict[int, int | None] = {}
    # One replay of a user at a time: its sockets must not take all reading threads.
    replaying: trio.Lock | None = None

    def view(self, entry: Entry) -> Entry | None:
        """Return an event as the user may see it; None: it is not for the user.

        A `chat_added` of a chat that the user has left since shows that chat empty.
        """
        if entry.to_user == self.user_id:
            if isinstance(entry.event, ChatEvent) and entry.chat_id not in self.chats:
                return Entry(replace(entry.event, chat=hidden_chat(entry.chat_id)))
            return entry
        if entry.to_chat and entry.seq > self.chats.get(entry.chat_id, entry.seq):
            return entry
        return None


UNANSWERED = 64  # commands of one connection; reading waits for their answers
PING_SECONDS = 25.0  # of silence; +-10 %; nginx cuts a socket after 60 s of it
PONG_SECONDS = 10.0  # of silence after a ping: cut
# A connection is cut when the kernel has accepted none of its waiting bytes for so
# long. A client that steadily reads 5 KB/s frees part of Linux's first receive window
# every 26 s, and is not cut.
STALL_SECONDS = 40.0
# The three times above are at most this long while a user at --connections-per-user
# opens another connection.
DEAD_SECONDS = 3.0
TOKEN_WARNING_SECONDS = 60.0  # before a token's end
TOKEN_GRACE_SECONDS = 25.0  # after a token's end: 4401


class Seat(msgspec.Struct, eq=False):
    """A connection as the hub knows it: its user, its cursor and its outbox.

    A live seat has been given all up to the hub's head, and its `cursor` means nothing.
    Only `Hub.push_page` makes a seat live.
    A seat that is not live has been given all events up to `cursor`; its session's
    `_greet` or `_catch_up` pushes the rest.
    """

    person: Person
    outbox: Outbox
    catch_up: Callable[[], None]  # called when the seat is no longer live
    end: Callable[[int, str], None]  # called with a close code and a reason
    cursor: int = 0
    live: bool = False
    held: list[Reply] = []  # answers that wait until their event is written
    # One for each command without an answer: the session takes it before it queues the
    # command, and the hub gives it back when it writes the answer.
    slots: trio.Semaphore = msgspec.field(
        default_factory=lambda: trio.Semaphore(UNANSWERED)
    )
    ping_after: float = msgspec.field(
        default_factory=lambda: PING_SECONDS * random.uniform(0.9, 1.1)
    )
    pinged_at: float = 0.0  # 0.0: no ping is unanswered
    warned: bool = True  # of its token's end; not before `connected`

    def reply(self, reply: Reply) -> None:
        """Write an answer, but never before its event."""
        if self.live or reply.seq <= self.cursor:
            self.outbox.push(reply.frame, always=True)
            self.slots.release()
        else:
            self.held.append(reply)

    def push_held(self) -> None:
        """Write the held answers whose events are written now."""
        held, self.held = self.held, []
        for reply in held:
            self.reply(reply)

    def sweep(self, now: float, most: float = math.inf) -> str | None:
        """Check this seat's deadlines. Returns why it is to be cut, or None.

        most bounds each of their times, in seconds.
        While output waits, only the stall limit applies. A ping goes only to a client
        that has nothing to read; any byte that comes after it answers it. While chatd
        itself reads nothing of the client, a missing pong proves nothing.
        """
        outbox = self.outbox
        reads = outbox.listening and not outbox.buffer
        if not reads or self.pinged_at <= outbox.received_at:
            self.pinged_at = 0.0
        if outbox.buffer:
            if now - outbox.moved_at > min(STALL_SECONDS, most):
                return "stalled"
        elif self.pinged_at:
            if now - self.pinged_at > min(PONG_SECONDS, most):
                return "silent"
        elif reads and now - outbox.received_at > min(self.ping_after, most):
            self.pinged_at = now
            outbox.push(PING_FRAME)
        return None

    def sweep_token(self, left: float) -> None:
        """Warn before the token's end, in `left` seconds; some time after it, close."""
        if left <= TOKEN_WARNING_SECONDS and not self.warned:
            self.warned = True
            self.outbox.push(
                text_frame(TokenExpiring(max(0, round(left)))), always=True
            )
        if left <= -TOKEN_GRACE_SECONDS:
            self.end(CLOSE_TOKEN_ENDED, "the token has ended: get a new one")


class Hub:
    """The seats, and the newest end of the event log. It does not know sessions.

    `head` is the seq of the last published event. Every read is bounded by it, so no
    cursor that a client gets is ahead of it, and nobody reads an event that the hub is
    about to publish to them.
    """

    def __init__(self, store: Store) -> None:
        self.settings = store.settings
        self.stats = store.stats
        self.head = store.seq
        self.people: dict[int, Person] = {}
        # chat -> the live seats of its members. Kept, because finding them for each
        # batch through person, list and seat cost 1.4 us a delivery in a chat of 500,
        # more than all the rest of Python's part.
        self.live_seats: dict[int, set[Seat]] = {}
        # The last published events. seq is dense, so the entry of a seq is found by
        # subtraction: tail[i].seq == tail[0].seq + i.
        self.set_tail(store.tail())

    async def run(self, batches: trio.MemoryReceiveChannel[Batch]) -> None:
        """Publish batches, until the store closes the channel."""
        async with batches:
            async for batch in batches:
                self.publish(batch)

    # --- seats -----------------------------------------------------------------------

    def enter(self, seat: Seat) -> bool:
        """Register a seat that is to catch up. False: this user has too many."""
        person = self.people.setdefault(seat.person.user_id, seat.person)
        if len(person.seats) >= self.settings.connections_per_user:
            return False
        seat.person = person
        person.seats.append(seat)
        return True

    def leave(self, seat: Seat) -> None:
        """Forget a seat that may have entered, and its person with the last one."""
        self._set_live(seat, False)
        person = seat.person
        if seat in person.seats:
            person.seats.remove(seat)
            if not person.seats:
                del self.people[person.user_id]

    def set_chats(self, person: Person, joined: dict[int, int]) -> None:
        """Set a person's chats as they were read, but for the changes since."""
        if person.known:
            return  # another seat's read came first
        person.known = True
        for chat_id, joined_seq in (joined | person.changes).items():
            self._change(person, chat_id, joined_seq)

    def _change(self, person: Person, chat_id: int, joined_seq: int | None) -> None:
        """Make a person a member of a chat since joined_seq; None: not a member."""
        if not person.known:
            person.changes[chat_id] = joined_seq
        elif joined_seq is None:
            person.chats.pop(chat_id, None)
        else:
            person.chats[chat_id] = joined_seq
        for seat in person.seats:
            self._place(seat, chat_id)

    def _set_live(self, seat: Seat, live: bool) -> None:
        """Make a seat live, and so one of the live seats of its chats; or not live."""
        if live is not seat.live:
            seat.live = live
            for chat_id in seat.person.chats:
                self._place(seat, chat_id)

    def _place(self, seat: Seat, chat_id: int) -> None:
        """Put a seat among the live seats of a chat, or take it out."""
        seats = self.live_seats.setdefault(chat_id, set())
        if seat.live and chat_id in seat.person.chats:
            seats.add(seat)
        else:
            seats.discard(seat)
        if not seats:
            del self.live_seats[chat_id]

    # --- the tail --------------------------------------------------------------------

    def set_tail(self, newest_first: Iterable[Entry]) -> None:
        """Make these the tail: all that are newer than one that shows a chat or a name.

        Such an event shows them as they were when it was read, so later readers have to
        query it.
        """
        kept = itertools.takewhile(
            lambda entry: not isinstance(entry.event, ChatEvent | UserEvent),
            newest_first,
        )
        self.tail = deque([*kept][::-1])
        self.tail_size = sum(entry.size for entry in self.tail)

    # --- publishing ------------------------------------------------------------------

    def publish(self, batch: Batch) -> None:
        """Publish a batch: the tail, memberships, its jobs' answers, live seats.

        The frames of a live seat with events are joined and written by one call, its
        answers last: no ack is ahead of its event. Seats with the same events share
        the bytes. If the outbox of a seat is full, it takes nothing: the seat is no
        longer live, and its answers are held. A seat without events gets its answers.
        """
        before = self.head
        self._append(batch.events)
        deliveries = self._deliveries(batch.events)
        behind: list[Seat] = []
        replies: dict[Seat, list[Reply]] = {}
        for job, outcome in batch.outcomes:
            reply = job.done(outcome)
            if reply and job.seat:
                replies.setdefault(job.seat, []).append(reply)
        for seats, events in deliveries:
            joined = b"".join([entry.frame for entry in events])
            written = len(seats)
            for seat in seats:
                if seat in replies:
                    frames = joined + b"".join([reply.frame for reply in replies[seat]])
                    if seat.outbox.push(frames):
                        for _ in replies.pop(seat):
                            seat.slots.release()
                        continue
                elif seat.outbox.push(joined):
                    continue
                behind.append(seat)  # it gets the events, and they are counted, later
                written -= 1
            self.stats.deliveries += written * len(events)
            self.stats.writes += written
        for seat in behind:
            self._set_live(seat, False)
            seat.cursor = before
            seat.catch_up()
        for seat, unsent in replies.items():
            for reply in unsent:
                seat.reply(reply)

    def _append(self, events: Entries) -> None:
        """Append to the tail, and renew its entries that show a changed message."""
        for entry in events:
            self.stats.events[entry.kind] += 1
            self.tail_size += entry.size
        self.tail += events
        self.head += len(events)
        if changed := changes(events):
            # An event shows no message that is younger than itself.
            for entry in self.since(min(changed) - 1):
                if entry.quotes in changed:
                    self.tail_size -= entry.size
                    entry.event = renewed(entry.event, changed)
                    entry.__post_init__()
                    self.tail_size += entry.size
        most, most_bytes = self.settings.tail_events, self.settings.tail_bytes
        while len(self.tail) > most or self.tail_size > most_bytes:
            self.tail_size -= self.tail.popleft().size

    def _deliveries(self, events: Entries) -> list[tuple[Collection[Seat], Entries]]:
        """Find which live seats get which events, and apply changes of membership.

        Consecutive events of one chat with the same `to_chat` and `to_user` have the
        same readers, because an event changes the membership of its `to_user` only.
        Such events are one list, shared by all seats that get no others of the batch.
        Events for one user that change no membership come last: else each sender's
        read mark would begin a new list for all others (in a chat of 500, with 32
        messages in a batch, a delivery took four times as long).
        """
        readers = {(entry.chat_id, entry.to_user) for entry in events}
        if len(readers) == 1 and events[0].to_user is None:  # nearly always
            return [(self.live_seats.get(events[0].chat_id, ()), events)]
        deliveries: dict[Seat, Entries] = {}
        by_chat = sorted(
            events,
            key=lambda entry: (
                entry.chat_id,
                not (entry.to_chat or entry.event.membership),
            ),
        )
        audience = operator.attrgetter("chat_id", "to_chat", "to_user")
        for (chat_id, to_chat, to_user), group in itertools.groupby(by_chat, audience):
            news = list(group)
            seats = set(self.live_seats.get(chat_id, ()) if to_chat else ())
            if person := self.people.get(to_user):
                seats.update(seat for seat in person.seats if seat.live)
                for entry in news:
                    if effect := entry.event.membership:
                        joined_seq = entry.seq if effect == "joins" else None
                        self._change(person, chat_id, joined_seq)
            for seat in seats:
                if (had := deliveries.setdefault(seat, news)) is not news:
                    deliveries[seat] = sorted(had + news, key=lambda entry: entry.seq)
        shared: dict[int, tuple[list[Seat], Entries]] = {}
        for seat, news in deliveries.items():
            shared.setdefault(id(news), ([], news))[0].append(seat)
        return list(shared.values())

    # --- catching up -----------------------------------------------------------------

    def in_tail(self, cursor: int) -> bool:
        """Is everything after this cursor still in memory?"""
        return cursor >= self.head - len(self.tail)

    def since(self, seq: int) -> Entries:
        """Return the published events above seq, as far as they are in the tail."""
        newest_first = itertools.islice(reversed(self.tail), self.head - seq)
        return [*newest_first][::-1]

    def correct(self, shown: Iterable[T], upto: int) -> list[T]:
        """Return messages, or what shows them, read as of upto, as they are now.

        A message may be changed between its reading and its answer: this is for the
        plain step that encodes the answer. Raises Refusal overloaded if there was so
        much meanwhile that the tail does not go back to upto.
        """
        if not self.in_tail(upto):
            raise Refusal(
                "overloaded", "too much is going on: ask again", retry_after=1
            )
        changed = changes(self.since(upto))
        return [renewed(one, changed) for one in shown] if changed else [*shown]

    def push_tail(self, seat: Seat) -> None:
        """Push a page of the tail to a seat; at the end of the tail it is live.

        This is a plain def: nothing is published between the last event given and
        `live`. So a seat that reads fast enough becomes live, however busy the hub is.
        """
        news = filter(seat.person.view, self.since(seat.cursor))
        self.push_page(seat, page_of(news, self.settings, self.head))

    def push_page(self, seat: Seat, page: Page) -> None:
        """Push a page of the event log, without events that are no longer for it.

        It shows messages as they are now. If the tail does not reach back to the page
        any more, nobody knows what was changed since it was read: it is not pushed, and
        the seat reads it again.
        """
        if not self.in_tail(page.upto):
            return
        events = self.correct(page.events, page.upto)
        seat.cursor = page.cursor
        if frames := [shown.frame for shown in map(seat.person.view, events) if shown]:
            seat.outbox.push(b"".join(frames), always=True)
            self.stats.deliveries += len(frames)
            self.stats.writes += 1
        # It may have left while a page was read.
        self._set_live(seat, seat in seat.person.seats and seat.cursor >= self.head)
        seat.push_held()

    def show_typing(self, user_id: int, chat_id: int, is_typing: bool) -> None:
        """Send a typing sign to the other live seats that have no output waiting."""
        frame = text_frame(TypingSign(chat_id, user_id, is_typing))
        for seat in self.live_seats.get(chat_id, ()):
            if seat.person.user_id != user_id and not seat.outbox.buffer:
                seat.outbox.push(frame)


# =====================================================================================
# OUTBOX: every byte of a WebSocket
#
# Writing never waits. A frame goes to the kernel at once, or into a bounded buffer, or
# the seat stops being live and reads the event log later. So no client waits for a
# slow one.
# =====================================================================================


@dataclasses.dataclass(eq=False)
class Outbox:
    """One client's stream: every byte to it, and what trio-websocket reads from it.

    push writes to the socket at once and buffers the bytes that the kernel does not
    accept. Only then a task in the connection's nursery waits for the socket; it ends
    when the buffer is empty. A push is taken whole or not at all, so no cancellation
    can leave half a frame. The first close frame seals the outbox: later frames are
    dropped.

    It keeps the number of the socket's descriptor, which could later be another
    connection's. That is safe because the stream is closed only after the outbox is
    sealed and its tasks have ended.
    """

    stream: trio.SocketStream
    nursery: trio.Nursery  # the connection's
    settings: Settings

    def __post_init__(self) -> None:
        """Begin with nothing buffered."""
        # The bytes that the kernel has not accepted. b"" while nothing waits: testing
        # it does not touch the buffer of an idle connection.
        self.buffer: bytes | bytearray = b""
        self.sealed = False
        self.received_at = self.moved_at = trio.current_time()
        self._fd = self.stream.socket.fileno()
        self.listening = False  # waiting for the client, not busy with its command
        self.client_closed = False  # with a close frame: it sends no message more
        self._pace = Bucket(self.settings.receive_bytes)
        self._blocked = trio.lowlevel.ParkingLot()
        self._owed_pong = b""

    @property
    def full(self) -> bool:
        """Is the buffer at its bound, so that only answers are taken?"""
        return len(self.buffer) >= self.settings.outbox_bytes

    def push(self, frames: bytes, always: bool = False) -> bool:
        """Write whole frames now, or buffer them. False: full, nothing was taken.

        With always they are taken even if the outbox is full: for answers, whose number
        is bounded elsewhere, and for pages, of which one at a time is pushed.
        Never raises: a broken connection takes everything and ends soon.
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
            self.nursery.start_soon(self._flush)
        return True

    def seal(self, frame: bytes) -> None:
        """Write a close frame, the last frame of all."""
        self.push(frame, always=True)
        self.sealed = True

    def pong(self, payload: bytes) -> None:
        """Answer a ping; while full, only the newest one (RFC 6455 5.5.3)."""
        frame = bytes(_frames.pong(payload))
        if not self.push(frame):
            self._owed_pong = frame

    def charge(self) -> None:
        """Charge 128 bytes for each frame: tiny frames cost that much to handle."""
        self._pace.spend(128, self.received_at)

    def _break(self) -> None:
        self.sealed = True
        self.buffer = b""
        self._blocked.unpark_all()
        self.nursery.cancel_scope.cancel()

    async def _flush(self) -> None:
        """Write the buffer as the socket accepts it: the one task that waits for it."""
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
            self._blocked.unpark_all()
        if self._owed_pong:
            pong, self._owed_pong = self._owed_pong, b""
            self.push(pong)

    async def wait_not_full(self) -> None:
        """Wait until the buffer is below its bound. The sweeper bounds the wait."""
        while self.full:
            await self._blocked.park()

    async def wait_empty(self) -> None:
        """Wait until the kernel has accepted every byte."""
        while self.buffer:
            await self._blocked.park()

    async def finish(self) -> None:
        """End the write side, then read and discard, so that the last bytes arrive.

        Closing a socket with unread input makes the kernel send RST, which can overtake
        them. A client that has closed sends no more, but perhaps a pong that crosses
        our close frame, and waits for our end (RFC 6455 7.1.1).
        """
        if self.buffer:  # a scope costs 10 us
            with trio.move_on_after(self.settings.drain_seconds):
                await self.wait_empty()
        if not self.client_closed:
            await linger(self.stream)

    async def receive_some(self, max_bytes: int) -> bytes:
        """Return bytes from the client, at the rate of --receive-bytes.

        The only method of a trio.abc.Stream that trio-websocket uses here.
        """
        self.listening = True
        data = await read_socket(self._fd, max_bytes)
        self.listening = False
        now = self.received_at = trio.current_time()
        debt = self._pace.spend(len(data), now)
        while debt > 1:
            # A client that floods and hangs up is not read to the end: that could take
            # minutes.
            await trio.sleep(1)
            debt -= 1
            look = select.poll()
            look.register(self._fd, getattr(select, "POLLRDHUP", 0))  # else only HUP
            if look.poll(0):
                raise trio.BrokenResourceError
        if debt:
            await trio.sleep(debt)
        return data


# =====================================================================================
# PROTOCOL: refusals, close codes, messages
#
# The messages on the wire, as tables, and the functions that check and encode them.
# Nothing here waits.
# =====================================================================================


class Refusal(Exception):
    """A refused command or request: a code of REFUSALS, a sentence, when to retry.

    Its text is sent to the client, as an error frame or as an HTTP answer. (Of other
    exceptions only a ClientFault's reason is, in the close frame.) The sentence begins
    with the field that is wrong, if one is.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        retry_after: float | None = None,
        status: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:
        usual_status, usual_message = REFUSALS[code]
        self.code = code
        self.message = message or usual_message
        self.status = status or usual_status
        self.retry_after = retry_after and round(retry_after, 3)
        self.headers = headers or {}
        super().__init__(f"{code}: {self.message}")


# code: the HTTP status, and the sentence when there is no better one.
REFUSALS: dict[str, tuple[int, str]] = {
    "bad_json": (400, "this is not a JSON object"),
    "bad_field": (400, "a field is wrong"),
    "unknown_type": (400, "type: there is no such command"),
    "token_invalid": (401, "this token is not valid: sign in again"),
    "token_expired": (401, "this token has expired: get a new one"),
    "token_used": (401, "this ticket was used already: get a new one"),
    "forbidden": (403, "this token may not do that"),
    "too_late": (403, "this message can no longer be changed"),
    "not_found": (404, "there is nothing here, or it is not yours to see"),
    "method_not_allowed": (405, "this path does not take that method"),
    "timeout": (408, "the request took too long"),
    "idempotency_mismatch": (409, "client_id: it was used for another message"),
    "direct": (409, "this is a direct chat: its two members stay, without a title"),
    "deleted": (409, "this message was deleted"),
    "changed": (409, "if_rev: this message was changed since"),
    "too_large": (413, "the request is too large"),
    "upgrade_required": (426, "this path speaks WebSocket: send an upgrade request"),
    "rate_limited": (429, "too many at once: slow down"),
    "overloaded": (503, "the server is full, or restarts: come back later"),
    "storage_failed": (503, "it may not be stored: repeat it with the same client_id"),
    "internal": (500, "the server made a mistake; it has been logged"),
    "upstream": (502, "the chat service is away: come back later"),
}


def bad_field(sentence: str) -> Refusal:
    """Make the most common Refusal. The sentence begins with the field's name."""
    return Refusal("bad_field", sentence)


def no_chat() -> Refusal:
    """Make the Refusal for an unknown chat; a chat of other users gets the same."""
    return Refusal("not_found", "chat_id: there is no such chat for you")


# Close codes: RFC 6455 7.4.1, and chatd's own. 4000-4499: reconnect. 4500-4999: do not.
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
# Not blank, and without control characters.
Title = Annotated[
    str, msgspec.Meta(max_length=200, pattern=r"\A(?=.*\S)[^\x00-\x1f\x7f]+\Z")
]

# Text may have tabs and line ends. The other control characters of ASCII have no place
# in a chat: they steer terminals, and SQLite's length() stops at NUL.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


# The fields that tell a client which of its commands was refused.
NAMES = {"ref": Ref, "client_id": ClientId, "chat_id": Id, "message_id": Id}


class Command(Record, tag_field="type", kw_only=True):
    """A command from a client. Its answer repeats ref, if there is one."""

    ref: Ref | None = None


class Ping(Command, tag="ping"):
    """Answered by pong: a page's own check that the server answers."""


class Typing(Command, tag="typing"):
    """Sent on to the other members' live connections; never stored."""

    chat_id: Id
    is_typing: bool


class MarkRead(Command, tag="mark_read"):
    """Moves the user's read mark up to that message, never down."""

    message_id: Id


class SendMessage(Command, tag="send_message"):
    """Stores a message. client_id tells a repeat from a second message."""

    chat_id: Id
    content: str
    client_id: ClientId | None = None


class EditMessage(Command, tag="edit_message"):
    """Gives a message another text. With if_rev only if that is still its rev."""

    message_id: Id
    content: str
    if_rev: Id | None = None


class DeleteMessage(Command, tag="delete_message"):
    """Deletes a message's text, for good."""

    message_id: Id


class Auth(Command, tag="auth"):
    """Replaces the connection's token by a newer one, or a ticket, of the same user."""

    token: str


# To add a command, write its struct and name it here, give it an arm in the match of
# Session._handle (mypy reports a missing one), and write what the arm calls.
AnyCommand = Ping | Typing | MarkRead | SendMessage | EditMessage | DeleteMessage | Auth
if forgotten := {*Command.__subclasses__()} - {*get_args(AnyCommand)}:
    raise TypeError(f"AnyCommand is without {forgotten}")
COMMANDS = msgspec.json.Decoder(AnyCommand)


class NewChat(msgspec.Struct):
    """Body of POST /api/v1/chats. client_id tells a repeat from a second chat."""

    member_ids: list[Id] = []
    title: Title | None = None
    direct: bool = False
    client_id: ClientId | None = None


class NewTitle(Record):
    """Body of renaming a chat; null: no title."""

    title: Title | None


class InviteBody(Record):
    """Body of inviting (ttl_seconds), of joining (token, name), of PATCH /me (name)."""

    # A week; at most 30 days.
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=2_592_000)] = 604_800
    token: str = ""
    name: str | None = None


class UserBody(Record):
    """Body of adding a member, of revoking and of forgetting."""

    user_id: Id


class PostMessage(Record):
    """Body of SendMessage over HTTP. sender_id is for services only."""

    content: str
    client_id: ClientId | None = None
    sender_id: Id | None = None


class PatchMessage(Record):
    """Body of editing a message."""

    content: str
    if_rev: Id | None = None


class Message(Record, omit_defaults=True):
    """One message. n is its number in its chat: 1, 2, 3, without holes.

    rev is the seq of the event that made it what it is: of its last change, or None.
    The content of a deleted message is "".
    """

    id: int
    chat_id: int
    sender_id: int
    content: str
    created_at: str
    n: int
    client_id: str | None = None
    rev: int | None = None
    edited_at: str | None = None
    deleted: bool = False


class Member(msgspec.Struct, omit_defaults=True):
    """One member of a chat, who has read the messages up to n = read_n.

    online: has it a socket now? Only where one chat is asked for.
    """

    user_id: int
    name: str | None
    read_n: int
    online: bool | None = None


class Chat(msgspec.Struct):
    """A chat and its members, as of a seq."""

    id: int
    title: str | None
    members: list[Member]
    last_n: int
    last_message: Message | None
    direct: bool
    created_by: int | None
    member_count: int


class MyChat(Chat):
    """A chat in the list of one of its members. position is its place in that list."""

    read_n: int
    unread: int
    position: int


def hidden_chat(chat_id: int) -> Chat:
    """Return an empty chat: a user who has left a chat sees nothing more of it."""
    return Chat(chat_id, None, [], 0, None, False, None, 0)


def changes(events: Entries) -> dict[int, Message]:
    """Return the messages that these events change, by id, as they are after it."""
    return {
        entry.quotes: entry.event.message
        for entry in events
        if isinstance(entry.event, MessageChange)
    }


def renewed(shown: Any, changed: Mapping[int, Message]) -> Any:
    """Return a message, or what shows one, as it is now.

    changed has the messages that were changed, by id, as they are now.
    """
    if isinstance(shown, Message):
        return changed.get(shown.id, shown)
    for field in ("event", "message", "chat", "last_message"):
        if part := getattr(shown, field, None):
            return replace(shown, **{field: renewed(part, changed)})
    return shown


class Marks(Record):
    """A chat's last n, and the user's read mark."""

    last_n: int
    read_n: int


class Connected(ServerMessage, tag="connected"):
    """The first frame. The events that follow come after cursor."""

    user_id: int
    timestamp: str
    cursor: str
    resume: str
    expires_in: int
    chats: dict[str, Marks]
    more_chats: bool = False


class Pong(ServerMessage, tag="pong"):
    """Answer to ping."""

    timestamp: str
    ref: str | None = None


class TypingSign(ServerMessage, tag="typing"):
    """A user types, or has stopped."""

    chat_id: int
    user_id: int
    is_typing: bool


class Ack(ServerMessage, tag="ack"):
    """A command is done; what it wrote is on disk. The fields depend on the command."""

    ref: str | None = None
    client_id: str | None = None
    message_id: int | None = None
    chat_id: int | None = None
    n: int | None = None
    created_at: str | None = None
    duplicate: bool | None = None
    rev: int | None = None
    expires_in: int | None = None


class ErrorFrame(ServerMessage, tag="error"):
    """A command was refused. code is one of REFUSALS; the last fields are NAMES."""

    code: str
    message: str
    retry_after: float | None = None
    ref: str | None = None
    client_id: str | None = None
    chat_id: int | None = None
    message_id: int | None = None


class TokenExpiring(ServerMessage, tag="token_expiring"):
    """Send `auth` soon."""

    expires_in: int


class Bye(ServerMessage, tag="bye"):
    """The server stops; reconnect after so many seconds."""

    retry_after: float


encode = msgspec.json.Encoder().encode


# In JSON a character above U+FFFF may be escaped as a pair (RFC 8259 7). Half of one:
LONE_SURROGATE = rb"""(?xi) (?<!\\)(?:\\\\)*
    (?: \\u d[89ab] [0-9a-f]{2} (?! \\u d[c-f] )
    | (?<! \\u d[89ab] [0-9a-f]{2} ) \\u d[c-f] )"""


def parse(text: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode one command or body. Raises Refusal, naming the field that is wrong."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        # In words, the patterns of Title and ClientId.
        sentence = re.sub(
            "matching regex '.*'",
            "without control characters, not blank (a client_id: printable ASCII)",
            str(error),
        )
        if sentence.startswith("Invalid value"):  # msgspec says so of a tag only
            raise Refusal("unknown_type") from None
        if sentence.startswith("Expected `object`"):
            raise Refusal("bad_json", f"not a JSON object: {sentence}") from None
        what, at, field = sentence.rpartition(" - at `$.")
        # Without a place it is about a field that is missing, and names it.
        raise bad_field(f"{field[:-1]}: {what}" if at else sentence) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        # Deep nesting is a RecursionError even in a field that chatd ignores.
        why = str(error)
        if re.search(LONE_SURROGATE, text):  # msgspec may call it truncated
            why = "a lone surrogate (half of a \\uXXXX\\uXXXX pair) is no character"
        raise Refusal("bad_json", f"not JSON: {why}") from None


def check_content(content: str, settings: Settings) -> None:
    """Refuse a text that no message may have."""
    if not content or content.isspace():
        raise bad_field("content: it is empty")
    most = settings.max_content_chars
    if len(content) > most:
        raise bad_field(f"content: {len(content)} characters; at most {most}")
    if found := CONTROL.search(content):
        raise bad_field(f"content: control character U+{ord(found[0]):04X} in it")


def fold(text: str) -> str:
    """Fold a text for search: case, accents, width and the like are gone.

    SQL has this function, too, on the connections of `open_database`.
    """
    if text.isascii():
        return text.lower()
    # One character at a time: to sort many marks of one letter takes quadratic time.
    apart = "".join(map(partial(normalize, "NFKD"), text)).casefold().replace("ı", "i")
    # The two that stay make other letters: か to が, は to ぱ.
    kept = (
        one
        for one in apart
        if one in "\u3099\u309a" or not (combining(one) or category(one) == "Mn")
    )
    return normalize("NFC", "".join(kept))


def parse_cursor(server: Server, text: str | None) -> int | None:
    """Read a cursor's seq. None: unreadable, of another epoch, or of the future."""
    epoch, _, seq = (text or "").rpartition(".")
    if epoch != server.store.epoch or not re.fullmatch("[0-9]{1,16}", seq):
        return None
    return int(seq) if int(seq) <= server.hub.head else None


def write_cursor(server: Server, seq: int) -> str:
    """Write a cursor."""
    return f"{server.store.epoch}.{seq}"


@lru_cache(maxsize=64)  # a batch of messages has one or two different seconds
def timestamp(unix_seconds: int) -> str:
    """Write a time as the wire has it: RFC 3339, UTC, whole seconds, Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_seconds))


def now_seconds() -> int:
    """Whole Unix seconds, for what is stored or signed."""
    return int(time.time())


# wsproto's own encoder. Frames to clients are unmasked (RFC 6455 5.1) and chatd
# negotiates no extension, so a frame has the same bytes for each client.
_frames = FrameProtocol(client=False, extensions=[])
PING_FRAME = bytes(_frames.ping())


def text_frame(message: ServerMessage) -> bytes:
    """Encode a message, once for all who get it.

    The head is that of a final, unmasked text frame (RFC 6455 5.2). wsproto's encoder
    writes the same, but takes 5 us longer, and has a state that threads cannot share.
    """
    text = encode(message)
    size = len(text)
    if size < 126:
        return bytes((0x81, size)) + text
    if size < 65_536:
        return struct.pack("!BBH", 0x81, 126, size) + text
    return struct.pack("!BBQ", 0x81, 127, size) + text


def sent_reply(sent: Sent, ref: str | None) -> Reply:
    m = sent.message
    ack = Ack(ref, m.client_id, m.id, m.chat_id, m.n, m.created_at, sent.duplicate)
    return Reply(text_frame(ack), m.id)


def error_of(refusal: Refusal, command: str | bytes = b"{}") -> ErrorFrame:
    """Return the answer to a refused command, with the command's fields that are NAMES.

    A field that is not valid is left out. Python's json reads a command that msgspec
    refuses as a whole: one with half of a surrogate pair in some field.
    """
    names: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):
        fields = json.loads(command)
        for name in NAMES.keys() & (fields if isinstance(fields, dict) else ()):
            with suppress(msgspec.DecodeError):
                value = json.dumps(fields[name])
                names[name] = msgspec.json.decode(value, type=NAMES[name])
    return ErrorFrame(refusal.code, refusal.message, refusal.retry_after, **names)


# =====================================================================================
# CHATS: members, names, and what is read of them
#
# The writes and the queries beside the way of a message. The store runs them, as it
# runs its own: a write inside a transaction of the writer, a query as of the head.
# =====================================================================================


NAME = """
    SELECT name FROM user_name WHERE id = (SELECT name_id FROM user WHERE id = ?)
"""

# The answer to a request for the known users, those with a name first, at most 200. A
# user is known that is or was a member of a chat, has sent a message, or has a name. If
# ?2, which is --invites, is on, user ?1 knows those that it shares a chat with.
USERS = """
    SELECT CAST(json_object(
        'users', json_group_array(json_object('user_id', id, 'name', name))) AS BLOB)
    FROM (SELECT u.id, name FROM user u LEFT JOIN user_name a ON a.id = u.name_id
          WHERE ?2 = 'off' OR ?1 IS NULL OR u.id IN (
              SELECT theirs.user_id FROM member mine
              JOIN member theirs USING (chat_id) WHERE mine.user_id = ?1)
          ORDER BY name IS NULL, name, u.id LIMIT 200)
"""

# The answer to a request for the members whose oldest unread message is older than ?1
# seconds, in the order of their positions, which are CHAT-USER. It walks `member` along
# its key from ?2 on, until it has one more than ?3. It counts nothing: last_n gives the
# number of unread messages. ?4 is the head; ?5 has the users that are online.
UNREAD = """
    WITH online AS (SELECT value FROM json_each(CAST(?5 AS TEXT)))
    SELECT CAST(json_object(
        'unread', json_remove(json_group_array(json_object(
            'user_id', user_id,
            'name', name,
            'chat_id', chat_id,
            'unread', unread,
            'since', strftime('%Y-%m-%dT%H:%M:%SZ', created_at, 'unixepoch'),
            'online', json(iif(user_id IN (SELECT value FROM online), 'true', 'false')),
            'position', chat_id || '-' || user_id)), '$[' || ?3 || ']'),
        'more', json(iif(count(*) > ?3, 'true', 'false'))) AS BLOB)
    FROM (
        SELECT b.user_id, a.name, b.chat_id, c.last_n - b.read_n AS unread, m.created_at
        FROM member b CROSS JOIN chat c ON c.id = b.chat_id
            CROSS JOIN message m ON m.chat_id = b.chat_id AND m.n = b.read_n + 1
            CROSS JOIN user u ON u.id = b.user_id
            LEFT JOIN user_name a ON a.id = u.name_id
        WHERE (b.chat_id, b.user_id) > (
                CAST(?2 AS INTEGER), CAST(substr(?2, instr(?2, '-') + 1) AS INTEGER))
            AND b.read_n < c.last_n AND m.id <= ?4
            AND m.created_at + ?1 < (julianday('now') - 2440587.5) * 86400
        ORDER BY b.chat_id, b.user_id LIMIT ?3 + 1)
"""


@dataclasses.dataclass
class Chats:
    """Chats, their members, and the users' names. A write appends its events."""

    store: Store

    def create_chat(
        self, db: Db, events: Entries, new: NewChat, by: Actor = None
    ) -> tuple[int, bool]:
        """Create a chat, with one event for each member. Returns its id, and True.

        by is the member who creates it; None: a service. With False: the chat was there
        before, as the direct chat of these two, or under this creator's client_id;
        nothing else is compared. Raises Refusal bad_field.
        """
        members = sorted(set(new.member_ids))
        key = ":".join(map(str, members)) if new.direct else None
        found = query_value(
            db,
            """SELECT coalesce((SELECT id FROM chat WHERE direct_key = ?1), (
                   SELECT id FROM chat
                   WHERE coalesce(created_by, 0) = coalesce(?2, 0) AND client_id = ?3))
            """,
            key,
            by,
            new.client_id,
        )
        if found:
            return found, False
        if by:
            know_user(db, by)
        chat_id = query_value(
            db,
            """INSERT INTO chat (title, created_at, created_by, client_id, direct_key)
               VALUES (?, ?, ?, ?, ?) RETURNING id""",
            new.title,
            now_seconds(),
            by,
            new.client_id,
            key,
        )
        self._let_in(db, events, chat_id, members, by)
        return chat_id, True

    def add_member(
        self, db: Db, events: Entries, chat_id: int, user_id: int, by: Actor
    ) -> bool:
        """Add a member: an event to the members, then one to the new one.

        by is the member who adds; None: a service. Returns False if the user is a
        member already. Raises Refusal not_found, direct.
        """
        find_chat(db, chat_id, by, "change")
        if query_value(db, IS_MEMBER, chat_id, user_id):
            return False
        know_user(db, user_id)
        seq, name = self.store.next_seq(events), query_value(db, NAME, user_id)
        added = MemberAdded(seq, chat_id, user_id, name)
        self.store.record(db, events, Entry(added, to_chat=True))
        self._let_in(db, events, chat_id, [user_id], by)
        return True

    def remove_member(
        self, db: Db, events: Entries, chat_id: int, user_id: int, by: Actor
    ) -> None:
        """Remove a member: by is that member, the chat's creator, or None, a service.

        Raises Refusal not_found, direct, forbidden.
        """
        created_by = find_chat(db, chat_id, by, "leave")
        if by not in (None, user_id, created_by):
            raise Refusal("forbidden", "only the member or the chat's creator may")
        sql = "DELETE FROM member WHERE chat_id = ? AND user_id = ?"
        if not db.execute(sql, (chat_id, user_id)).rowcount:
            raise Refusal("not_found", "user_id: not a member of this chat")
        # To remove somebody ends all invitations to the chat; to leave it ends none.
        sql = "UPDATE chat SET invite_key = NULL WHERE id = ? AND ? IS NOT ?"
        db.execute(sql, (chat_id, by, user_id))
        event = MemberRemoved(self.store.next_seq(events), chat_id, user_id)
        self.store.record(db, events, Entry(event, user_id, to_chat=True))

    def set_title(
        self, db: Db, events: Entries, chat_id: int, title: str | None, by: Actor
    ) -> None:
        """Rename a chat: an event to the members, unless it has this title already.

        by is the member who does it; None: a service. Raises Refusal not_found, direct.
        """
        find_chat(db, chat_id, by, "change")
        sql = "UPDATE chat SET title = ?1 WHERE id = ?2 AND title IS NOT ?1"
        if db.execute(sql, (title, chat_id)).rowcount:
            event = ChatRenamed(self.store.next_seq(events), chat_id, title, by)
            self.store.record(db, events, Entry(event, to_chat=True))

    def change_message(
        self,
        db: Db,
        events: Entries,
        by: Actor,
        message_id: int,
        content: str | None = None,
        if_rev: int | None = None,
    ) -> Message:
        """Edit a message; without content delete it. Returns it as it is now.

        by is the user who changes it; None: a service. A repeat changes nothing and
        makes no event. Raises the Refusal that CHECK_CHANGE names.
        """
        if content is not None:
            check_content(content, self.store.settings)
        seq, window = self.store.next_seq(events), self.store.settings.edit_seconds
        values = (by, if_rev, window, message_id, content, seq, now_seconds())
        refusal, done = db.execute(CHECK_CHANGE, values).fetchone()
        if refusal:
            raise Refusal(*refusal.split("|"))
        if not done:
            db.execute(CHANGE, values)
        rows = db.execute(f"{MESSAGES} WHERE id = ?", (message_id,))
        message = message_of(rows.fetchone())
        if not done:
            kind = MessageEdited if content else MessageDeleted
            event = kind(seq, message.chat_id, message)
            self.store.record(db, events, Entry(event, to_chat=True))
        return message

    def rename(
        self, db: Db, _events: Entries, user_id: int, name: str, named_at: int = 0
    ) -> tuple[int, str]:
        """Store a user's name, "" for none, unless it was named or revoked later.

        A stored name from the future does not count: a wrong clock made it. A name that
        the user has chosen is a second ahead (see about_me), and does count. Returns
        what is stored. It is not an event: names are read when shown.
        """
        values = (name, now_seconds() + 1, named_at, user_id)
        for sql in RENAME:
            row = db.execute(sql, values).fetchone()
        return tuple(row)

    def invitation(
        self, db: Db, _events: Entries, chat_id: int, by: int, new: bool
    ) -> str:
        """Return what the invitations to a group name. new: earlier ones have ended.

        Raises Refusal not_found, direct.
        """
        find_chat(db, chat_id, by, "change")
        sql = """UPDATE chat SET invite_key = iif(?2 OR invite_key IS NULL,
                     lower(hex(randomblob(9))), invite_key)
                 WHERE id = ?1 RETURNING id || ':' || invite_key"""
        return str(query_value(db, sql, chat_id, new))

    def join(
        self, db: Db, events: Entries, invite: Claims, who: int | str | None
    ) -> tuple[bool, Any]:
        """Let a user into the chat of an invitation; or, by a name, a new user.

        Returns whether somebody joined, and the answer. None: nobody does, and the
        answer shows the chat. Raises Refusal token_invalid, bad_field.
        """
        # A new user has a random id: so nobody else gets it, not even after a restore
        # of a backup that does not know the user.
        sql = """SELECT c.id, iif(typeof(?3) = 'integer', ?3, (
                     WITH RECURSIVE drawn(id) AS (
                         SELECT (1 << 40) + (random() & ((1 << 40) - 1)) UNION ALL
                         SELECT (1 << 40) + (random() & ((1 << 40) - 1)) FROM drawn
                         LIMIT 100)
                     SELECT id FROM drawn WHERE id NOT IN (SELECT id FROM user) LIMIT 1
                 )), json_object('title', c.title, 'member_count', (
                     SELECT count(*) FROM member WHERE chat_id = c.id))
                 FROM chat c JOIN member b ON b.chat_id = c.id
                             JOIN user maker ON maker.id = b.user_id
                 WHERE c.id = CAST(?1 AS INTEGER) AND maker.id = ?2
                   AND coalesce(maker.revoked_at < ?4, TRUE)
                   AND c.id || ':' || c.invite_key = ?1"""
        bounds = (invite.invite, invite.user_id, who, invite.iat)
        row = db.execute(sql, bounds).fetchone()
        if row is None:
            raise bad_token("token: this invitation has ended: ask for another one")
        chat_id, user_id, shown = row
        if who is None:
            return False, msgspec.Raw(shown)
        if isinstance(who, str):
            self.rename(db, events, user_id, who, now_seconds())
        added = self.add_member(db, events, chat_id, user_id, None)
        return added, {"user_id": user_id, "chat_id": chat_id}

    def revoke(self, db: Db, _events: Entries, user_id: int, revoked_at: int) -> None:
        """Store that a user's tokens up to this Unix second are refused."""
        sql = """INSERT INTO user (id, revoked_at) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET revoked_at = ?2"""
        db.execute(sql, (user_id, revoked_at))

    def forget(self, db: Db, events: Entries, user_id: int, after: int) -> int:
        """Do a step of forgetting a user: small, so that sends get in between.

        It takes the user out of 20 chats. If there are none, it deletes the user's
        next 15 messages, as far as they are in the next 1,000 ids. Returns up to which
        id they are gone. A direct chat stays one, by a key of its own, and lets its
        other member leave.
        """
        db.execute(
            """UPDATE chat SET client_id = NULL
               WHERE coalesce(created_by, 0) = ? AND client_id IS NOT NULL""",
            (user_id,),
        )
        rows = db.execute(
            """UPDATE chat SET direct_key = iif(direct_key IS NULL, NULL, id)
               WHERE id IN (SELECT chat_id FROM member WHERE user_id = ? LIMIT 20)
               RETURNING id""",
            (user_id,),
        ).fetchall()
        for (chat_id,) in rows:
            self.remove_member(db, events, chat_id, user_id, None)
        if rows:
            return after
        sql = """UPDATE message SET client_id =
                     nullif(CAST(zeroblob(length(client_id)) AS TEXT), '')
                 WHERE id IN (
                     SELECT id FROM message m
                     WHERE id > ?2 AND id <= ?2 + 1000 AND sender_id = ?1
                         AND (client_id >= ' ' OR NOT EXISTS (
                             SELECT 1 FROM change WHERE message_id = m.id AND deleted))
                     ORDER BY id LIMIT 15)
                 RETURNING id"""
        rows = db.execute(sql, (user_id, after)).fetchall()
        for row in rows:
            self.change_message(db, events, None, *row)
        return max(rows)[0] if rows else min(after + 1000, self.store.seq)

    def _let_in(
        self, db: Db, events: Entries, chat_id: int, users: list[int], by: Actor
    ) -> None:
        """Make users members who have read all messages so far: an event to each.

        With invitations on, by may add only people it shares another chat with. Raises
        Refusal bad_field, forbidden.
        """
        first, settings = self.store.next_seq(events), self.store.settings
        sql = "SELECT count(*) + ? FROM member WHERE chat_id = ?"
        count = query_value(db, sql, len(users), chat_id)
        if count > settings.members:
            raise bad_field(f"members: {count} of them; at most {settings.members}")
        sql = """INSERT INTO member (chat_id, user_id, joined_seq, read_n)
                 SELECT ?1, ?2, ?3, last_n FROM chat
                 WHERE id = ?1 AND (?5 = 'off' OR ?4 IS NULL OR ?4 = ?2 OR EXISTS (
                     SELECT 1 FROM member mine JOIN member theirs USING (chat_id)
                     WHERE mine.user_id = ?4 AND theirs.user_id = ?2
                       AND mine.chat_id != ?1))"""
        for seq, user_id in enumerate(users, first):
            know_user(db, user_id)
            bounds = (chat_id, user_id, seq, by, settings.invites)
            if not db.execute(sql, bounds).rowcount:
                why = f"you share no chat with {user_id}: invite them"
                raise Refusal("forbidden", why)
        chat = read_chat(db, chat_id, first)
        for seq, user_id in enumerate(users, first):
            self.store.record(db, events, Entry(ChatAdded(seq, chat_id, chat), user_id))

    # --- reading ---------------------------------------------------------------------

    def my_chats(
        self, db: Db, user_id: int, upto: int, *page: int | None
    ) -> list[MyChat]:
        """Read a user's chats as of upto, the one with the newest message first.

        page is: the position after which to begin, or None; how many, or None for all,
        and there is one more if there are more.
        """
        rows = db.execute(
            f"""SELECT chat_id, read_n, last_n - read_n, active FROM ({NEWEST_FIRST})
                WHERE active < coalesce(?3, 1 << 62) LIMIT coalesce(?4, -2) + 1""",
            (user_id, upto, *page),
        )
        return [MyChat(*astuple(read_chat(db, row[0], upto)), *row[1:]) for row in rows]

    def history(
        self,
        db: Db,
        user_id: int,
        chat_id: int,
        message_id: int | None,
        limit: int,
        upto: int,
        place: str = "before",
    ) -> tuple[list[Message], bool, bool]:
        """Read a page of messages, oldest first; are there older ones, newer ones?

        The page is before or after a message of this chat, or around it; None: before
        the end. Raises Refusal not_found, bad_field.
        """
        find_chat(db, chat_id, user_id)
        # n has no holes: the page is n from `start` on, `limit` of them.
        last_n, start = db.execute(
            """WITH last (n) AS (SELECT coalesce((
                   SELECT n FROM message WHERE chat_id = ?1 AND id <= ?2
                   ORDER BY n DESC LIMIT 1), 0))
               SELECT n, iif(?5 IS NULL, n + 1,
                             (SELECT n FROM message WHERE id = ?5 AND chat_id = ?1))
                   + CASE ?3 WHEN 'before' THEN -?4 WHEN 'after' THEN 1 ELSE -?4 / 2 END
               FROM last""",
            (chat_id, upto, place, limit, message_id),
        ).fetchone()
        if start is None:
            raise bad_field(f"{place}: not a message of this chat")
        rows = db.execute(
            f"""{MESSAGES} WHERE chat_id = ?1 AND id <= ?2 AND n >= ?3 AND n < ?3 + ?4
                ORDER BY n""",
            (chat_id, upto, start, limit),
        )
        return [*map(message_of, rows)], start > 1, start + limit <= last_n

    def search(
        self,
        db: Db,
        found: list[Message],
        user_id: int,
        chat_id: int | None,
        *more: object,
    ) -> int | None:
        """Find messages in all the user's chats, or in one, the newest first.

        One step of a search: it ends when 50 are found, or after a fiftieth of the
        time of a search. more: the words as JSON, an id before which to look or None,
        and upto. Returns where it stopped; None: at the beginning. Raises not_found.
        """
        if chat_id:
            find_chat(db, chat_id, user_id)
        deadline = time.monotonic() + self.store.settings.search_seconds / 50
        for at, *row, matches in db.execute(SEARCH, (user_id, chat_id, *more)):
            if matches:
                found.append(message_of(row))
            if len(found) == 50 or time.monotonic() > deadline:
                return int(at)
        return None


# A user's name, ?1, that was given at ?3; a time after ?2 does not count. The row of an
# older name is overwritten with NULs (schema.sql: name_erases).
RENAME = (
    """INSERT INTO user (id, named_at) VALUES (?4, ?3) ON CONFLICT DO UPDATE
       SET named_at = ?3 WHERE coalesce(named_at <= ?3 OR named_at > ?2, TRUE)
           AND coalesce(min(revoked_at, ?2) <= ?3, TRUE)""",
    """INSERT INTO user_name (user_id, name)
       SELECT u.id, nullif(?1, '')
       FROM user u LEFT JOIN user_name a ON a.id = u.name_id
       WHERE u.id = ?4 AND named_at = ?3 AND coalesce(min(revoked_at, ?2) <= ?3, TRUE)
           AND name IS NOT nullif(?1, '')""",
    # A row, also for the user NULL: nobody could draw an id (see `Chats.join`).
    """SELECT max(named_at), coalesce(max(name), '')
       FROM user u LEFT JOIN user_name a ON a.id = u.name_id WHERE u.id = ?4""",
)

# A search walks back over all messages, or over the events of one chat: one of the two
# halves has no row. It returns the messages found, and some of all others, so that
# Python can look at the clock: one in 512 of the short ones, one in 8 of those with
# 4,000 characters. To ask every row for its length would take a fifth more time.
FOUND = """NOT EXISTS (
    SELECT 1 FROM words WHERE NOT instr(coalesce(
        newest.folded, newest.content, m.folded, m.content), value)) AS found
"""
SEARCH = f"""
    WITH words AS MATERIALIZED (SELECT value FROM json_each(?3))
    SELECT m.id AS at, {MESSAGE_COLUMNS}, b.user_id AND {FOUND}
    FROM message m LEFT JOIN member b ON b.chat_id = m.chat_id AND b.user_id = ?1
        {NEWEST_CHANGE}
    WHERE ?2 IS NULL AND m.id < min(coalesce(?4, ?5 + 1), ?5 + 1)
      AND (found OR random() & 7 = 0 AND random() & 63
           <= length(coalesce(newest.content, m.content, '')) >> 6)
    UNION ALL
    SELECT e.seq, {MESSAGE_COLUMNS}, m.id AND {FOUND}
    FROM event e LEFT JOIN message m ON m.id = e.seq {NEWEST_CHANGE}
    WHERE e.chat_id = ?2 AND e.to_chat = 1 AND e.seq < min(coalesce(?4, ?5 + 1), ?5 + 1)
      AND (found OR random() & 7 = 0 AND random() & 63
           <= length(coalesce(newest.content, m.content, '')) >> 6)
    ORDER BY at DESC
"""


def find_chat(
    db: Db, chat_id: int, by: Actor, to: Literal["see", "change", "leave"] = "see"
) -> Any:
    """Find a chat for one of its members; by is None: a service. Returns its creator.

    A direct chat cannot be changed; nor left, unless one of the two is forgotten.
    Raises Refusal not_found, direct.
    """
    row = db.execute(
        """SELECT created_by, CASE ?3 WHEN 'change' THEN direct_key IS NOT NULL
                                      WHEN 'leave' THEN direct_key LIKE '%:%' END
           FROM chat WHERE id = ?1 AND (?2 IS NULL OR EXISTS (
               SELECT 1 FROM member WHERE chat_id = ?1 AND user_id = ?2))""",
        (chat_id, by, to),
    ).fetchone()
    if row is None:
        raise no_chat()
    created_by, barred = row
    if barred:
        raise Refusal("direct")
    return created_by


def know_user(db: Db, user_id: int) -> None:
    """Make a row for a user, if there is none."""
    db.execute("INSERT OR IGNORE INTO user (id) VALUES (?)", (user_id,))


# The checks of a change, in their order, for user ?1; NULL: a service. The first column
# is the Refusal's arguments, the second whether nothing is left to do. ?5 is the new
# content; NULL: a deletion. The creator of a group may delete any message there, at any
# time.
CHECK_CHANGE = f"""
    SELECT CASE
        WHEN m.id IS NULL OR ?1 IS NOT NULL AND NOT EXISTS (
                SELECT 1 FROM member WHERE chat_id = m.chat_id AND user_id = ?1)
            THEN 'not_found|message_id: there is no such message for you'
        WHEN ?1 != m.sender_id AND NOT is_creator
            THEN 'forbidden|message_id: it is another user''s message'
        WHEN deleted AND ?5 IS NOT NULL THEN 'deleted'
        WHEN done THEN NULL
        WHEN ?2 != coalesce(rev, m.id) THEN 'changed'
        WHEN ?1 = m.sender_id AND NOT is_creator AND max(?7 - m.created_at, 0) >= ?3
            THEN 'too_late'
        END, done
    FROM (SELECT ?4 AS id) LEFT JOIN (
        SELECT m.*, rev, deleted,
            iif(deleted, TRUE, coalesce(newest.content, m.content) IS ?5) AS done,
            ?5 IS NULL AND c.direct_key IS NULL AND c.created_by IS ?1 AS is_creator
        FROM message m JOIN chat c ON c.id = m.chat_id {NEWEST_CHANGE}
        WHERE m.id = ?4) m
"""

# A trigger overwrites the texts that it replaces (schema.sql: change_erases).
CHANGE = f"""
    INSERT INTO change (rev, message_id, content, folded, edited_at, deleted)
    SELECT ?6, m.id, coalesce(?5, ''),
           nullif(fold(coalesce(?5, '')), coalesce(?5, '')),
           iif(?5 IS NULL, newest.edited_at, ?7), ?5 IS NULL
    FROM message m {NEWEST_CHANGE} WHERE m.id = ?4
"""

# A chat in an event or a list has its members only if they are at most 50, of at most
# 50 * 245 bytes together. So no frame exceeds 32 KiB but for a message's own text. A
# request for one chat has all its members.
CHAT_MEMBERS = 50
MEMBER_BYTES = 245

CHAT = f"""
    SELECT coalesce(m.n, 0), c.title, c.direct_key IS NOT NULL, c.created_by,
           (SELECT count(*) FROM member WHERE chat_id = c.id), {MESSAGE_COLUMNS}
    FROM chat c LEFT JOIN message m ON m.id = (
        SELECT id FROM message WHERE chat_id = c.id AND id <= ?2
        ORDER BY n DESC LIMIT 1) {NEWEST_CHANGE}
    WHERE c.id = ?1
"""


def read_chat(
    db: Db, chat_id: int, upto: int, by: Actor = None, most: int = CHAT_MEMBERS
) -> Chat:
    """Read a chat: its messages as of upto, its title and members as they are now.

    by is the member who reads it; None: a service, or the server. If it has more than
    most members, or these have too many bytes, they are left out. Raises not_found.
    """
    members = read_members(db, chat_id, upto, by, None, 0, most)
    if len(members) > most or len(encode(members)) > most * MEMBER_BYTES:
        members = []
    n, title, direct, created_by, count, *message = db.execute(
        CHAT, (chat_id, upto)
    ).fetchone()
    last = message_of(message) if n else None
    return Chat(chat_id, title, members, n, last, bool(direct), created_by, count)


def read_members(
    db: Db, chat_id: int, upto: int, by: Actor, *page: int | str | None
) -> list[Member]:
    """Read members of a chat in the order of their ids, their marks as of upto.

    by is as for read_chat. page is: the ids, with commas, or None for all; the id after
    which to begin; how many, and there is one more if there are more.
    """
    find_chat(db, chat_id, by)
    rows = db.execute(
        """SELECT b.user_id, a.name, min(b.read_n, coalesce((
               SELECT n FROM message WHERE chat_id = ?1 AND id <= ?2
               ORDER BY n DESC LIMIT 1), 0))
           FROM member b JOIN user u ON u.id = b.user_id
                LEFT JOIN user_name a ON a.id = u.name_id
           WHERE b.chat_id = ?1 AND b.user_id > coalesce(?4, 0)
               AND (?3 IS NULL OR b.user_id IN (
                   SELECT value FROM json_each('[' || ?3 || ']')))
           ORDER BY b.user_id LIMIT ?5 + 1""",
        (chat_id, upto, *page),
    )
    return [Member(*row) for row in rows]


# =====================================================================================
# AUTH AND LIMITS: buckets, addresses, keys, tokens
#
# Identity, and how much each user, address and connection may do. Plain functions and
# small tables. Durations use trio.current_time(); times that are signed or stored use
# time.time().
# =====================================================================================


class Rate(NamedTuple):
    """A token bucket's size: tokens a second in the long run, and tokens at once.

    A rate of 0 means no limit.
    """

    per_second: float
    burst: float

    def __str__(self) -> str:
        return f"{self.per_second:g}/{self.burst:g}" if self.per_second else "0"


@dataclasses.dataclass(slots=True)
class Bucket:
    """A token bucket (GCRA, ITU-T I.371). Its only state: when it is full again."""

    rate: Rate
    full_at: float = 0.0

    def take(self, amount: int = 1, now: float | None = None) -> float:
        """Take tokens, all or none. Returns 0.0, or else the seconds until they are."""
        before = self.full_at
        wait = self.spend(amount, now)
        if wait > 1e-9:
            self.full_at = before
            return wait
        return 0.0

    def spend(self, amount: float, now: float | None = None) -> float:
        """Take an amount, even into debt. Returns the seconds until nothing is owed.

        A negative amount is given back. now is trio.current_time(), unless given.
        """
        per_second, burst = self.rate
        if not per_second:
            return 0.0
        if now is None:
            now = trio.current_time()
        self.full_at = max(self.full_at, now) + amount / per_second
        return max(0.0, self.full_at - now - burst / per_second)


TABLE_KEYS = 65_536  # in a table that invented keys could fill


def bucket_table(rate: Rate) -> Callable[[Hashable], Bucket]:
    """Make a table of token buckets: a function that returns the bucket of a key.

    The table is bounded: when it overflows, the key that was used least recently is
    forgotten, which fills its bucket. So invented keys cannot use up memory.
    """
    return lru_cache(TABLE_KEYS)(lambda _key: Bucket(rate))


def charge(
    owner: Server | Listener, limit: str, bucket: Bucket, amount: int = 1
) -> None:
    """Take tokens of a bucket. Raises Refusal rate_limited, and counts it."""
    if wait := bucket.take(amount):
        owner.stats.rate_limited[limit] += 1
        raise Refusal("rate_limited", retry_after=wait)


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Stands for a client of a Unix socket. It has no address, and is a trusted proxy: the
# mode of the socket's file says who may connect. No TCP client has this address.
UNIX_PEER = ipaddress.IPv6Address("::")


# An address as proxies write it, in quotes or not: 192.0.2.1:80, [2001:db8::1]:443,
# 2001:db8::1, fe80::1%eth0.
ADDRESS = r"""(?x) \A \s* "? (?: \[ ([^]%]*) (?: %[^]]* )? \] (?: :[0-9]* )?
    | ([0-9.]+) :[0-9]* | ([^]["%\s]+) (?: %[^]["\s]* )? ) "? \s* \Z"""


def parse_address(text: str) -> Address | None:
    """Read an IP address, as proxies write it. None: it is not an address.

    An IPv4-mapped IPv6 address is IPv4.
    """
    try:
        address = ipaddress.ip_address(re.sub(ADDRESS, r"\1\2\3", text))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Proxies:
    """The proxies whose X-Forwarded-... headers are believed."""

    def __init__(self, cidrs: Iterable[str]) -> None:
        trusted = (*cidrs, "::")  # UNIX_PEER
        self.networks = [
            ipaddress.ip_network(cidr) for cidr in trusted if cidr != "none"
        ]

    def trust(self, address: Address | None) -> bool:
        """Is this address a trusted proxy?"""
        return address is not None and any(address in net for net in self.networks)

    def client(self, peer: Address | None, forwarded: str) -> Address | None:
        """Find the client's address behind the proxies.

        forwarded is X-Forwarded-For. It is read from the right, where the trusted
        proxies wrote. The first address that is not one of them is the client; the
        client itself may have written the entries to its left. If an entry is not an
        address, the peer counts.
        """
        client = peer
        for hop in reversed(forwarded.split(",")):
            if not self.trust(client):
                break
            client = parse_address(hop)
        return client or peer


def address_key(address: Address | None) -> str:
    """Name the bucket of an address: of IPv6 the /64, which one host has as a whole."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def short_origin(origin: str) -> str:
    """Leave out the default port of an origin and a slash at its end."""
    scheme, mark, host = origin.lower().partition("://")
    host = host.removesuffix("/")
    return scheme + mark + host.removesuffix(DEFAULT_PORTS.get(scheme, ""))


def same_origin(origin: str, hosts: Iterable[str]) -> bool:
    """Does the page's Origin name the host that the request is for?"""
    ours = (f"{scheme}://{host}" for scheme in DEFAULT_PORTS for host in hosts)
    return short_origin(origin) in map(short_origin, ours)


UnixSeconds = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]


class Claims(Record, kw_only=True):
    """The claims of a verified token. Only chatd's own have those after `foreign`."""

    user_id: Id
    name: str | None = None  # "": the user has none; None: the token does not say
    exp: UnixSeconds
    iat: UnixSeconds = 0.0  # 0: it does not say when it was signed
    nbf: UnixSeconds = 0.0
    foreign: bool = False  # signed with a --jwt-key
    scopes: frozenset[str] = frozenset()
    use: Literal["signin", "ticket", "session", "invite"] | None = None
    jti: str = ""  # of a ticket
    boot: str = ""  # of a ticket: the process that signed it
    until: float = 0.0  # of a ticket: when its socket has to end
    invite: str = ""  # of an invitation: the id of its chat, and the chat's invite_key

    @property
    def service(self) -> bool:
        """May the bearer act for any user?"""
        return "service" in self.scopes

    @property
    def ends(self) -> float:
        """When a socket that was opened with this token ends."""
        return self.until or self.exp

    def expires_in(self) -> int:
        """Whole seconds until then."""
        return max(0, int(self.ends - time.time()))


class Key(NamedTuple):
    """A key and the one algorithm that it is used with (RFC 8725 3.1)."""

    algorithm: str
    key: Any  # what PyJWT takes: bytes, or a public key of `cryptography`
    path: Path | None = None  # of a --jwt-key; None: chatd's own secret

    def __str__(self) -> str:
        kind = "shared secret" if self.algorithm == "HS256" else "public key"
        return f"{self.path} ({self.algorithm}, {kind})"


TICKET_SECONDS = 60  # for one socket, soon
LINK_SECONDS = 86_400  # a sign-in link's life
SESSION_SECONDS = 30 * 86_400  # a session token's life
LEEWAY_SECONDS = 5  # between the clocks of those who sign and check tokens
# A time of revocation may be so far ahead of the clock: several in one second, or the
# clock was stepped back. If it is further ahead, it was made by a wrong clock.
AHEAD_SECONDS = 60
TOKEN_BYTES = 4_096  # in a token
KEY_FILE_BYTES = 65_536

# A file that contains this is meant as PEM, in whatever state it is.
PEM = rb"(?i)-{2,} ?(?:BEGIN|END) |\b(?:BEGIN|END) [A-Z0-9 ]*(?:KEY|CERTIFICATE)\b"

# A PEM file (RFC 7468) of a --jwt-key must not hold any of these.
PEM_FAULTS = {
    rb"-----(BEGIN|END) [^\r\n-]*PRIVATE KEY": (
        "a private key; give chatd the public one: openssl pkey -pubout"
    ),
    rb"-----(BEGIN|END) [^\r\n-]*CERTIFICATE": (
        "a certificate; give its key: openssl x509 -pubkey -noout -in FILE"
    ),
    rb"(?s)(-----BEGIN [^\r\n-]*KEY-----.*){2}": (
        "at least 2 keys in one file; give each a file and a --jwt-key"
    ),
}

# The first bytes of a key or certificate in DER (X.690 8.1; RFC 5208, 5280, 5915, 8017)
# and, anywhere, the names of the algorithms of public keys (RFC 3279, 8410). A part of
# a public key is refused too: the rest is public as well. About one in 50 million
# random secrets looks like one.
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

# The other forms of an asymmetric key: how to recognise each, its name, and what to do.
KEY_FORMS = {
    DER: (
        "a key or certificate in DER",
        "give a public key as PEM: its base64 between the lines -----BEGIN PUBLIC "
        "KEY----- and -----END PUBLIC KEY-----; docs/embedding.md says how",
    ),
    # PyJWT signs with nothing that begins like the text form, whatever follows.
    rb"(?s)\A\x00\x00\x00.(?:ssh|ecdsa|sk|rsa)-|openssh-key-v1\x00"
    rb"|\A(?:ssh-(?:ed25519|rsa|dss)|ecdsa-sha2-nistp)": (
        "an OpenSSH key",
        "make it PEM; docs/embedding.md says how",
    ),
    PEM: (
        "a PEM block",
        "a --jwt-key file has the PEM block as it is, not encoded again",
    ),
    rb"(?mi)(?<![a-z])kty\W{1,8}(?:rsa|ec|okp|oct)\b|<(?:modulus|rsakeyvalue)>"
    rb"|^[ \t]*modulus *[:=]|\bpublic[ -]key\b.*:|^\W*aqab\W*$|\bk[1-4]\.public\.": (
        "the description of a key (JWK, XML, text)",
        "make it PEM; docs/embedding.md says how",
    ),
    rb"(?i)\A[a-z][a-z0-9+.-]*://\S*\Z|\Adata:\S*\Z|/\.well-known/": (
        "a URL",
        "chatd fetches no keys: download it, and give it as PEM",
    ),
}


def read_key_file(what: str, path: Path) -> tuple[bytes, int]:
    """Read the file of a key, and its mode. Raises UsageError."""
    with file_errors(what, path), path.open("rb") as file:
        data = file.read(KEY_FILE_BYTES + 1)
        mode = os.fstat(file.fileno()).st_mode & 0o7777
    if len(data) > KEY_FILE_BYTES:
        raise UsageError(
            f"{what} {path}: over {KEY_FILE_BYTES} bytes; no key is so long"
        )
    return data, mode


def check_secret(what: str, path: Path, data: bytes) -> bytes:
    """Return a shared secret without the white space around it. Raises UsageError.

    A public key is not a secret: anyone may know it, and could then sign tokens for any
    user. So an asymmetric key is refused in any form that can be recognised.
    """
    secret = data.strip()
    # The last byte of a binary key may be white space.
    if form := key_form(data) or key_form(secret):
        why = f"it holds {form[0]}, which is not a shared secret; {form[1]}"
    elif len(secret) < 32:
        why = f"{len(secret)} bytes; it must have at least 32: openssl rand -hex 32"
    else:
        return secret
    raise UsageError(f"{what} {path}: {why}")


def read_secret(path: Path) -> bytes:
    """Read chatd's own secret, which no other user may be able to read.

    Files in $CREDENTIALS_DIRECTORY come from the service manager, which protects them
    (systemd.exec(5)); their mode means little: it is 0440 when there is an ACL for the
    unit's user, as systemd 254 and newer make one. Raises UsageError.
    """
    data, mode = read_key_file("secret", path)
    folder = variable("CREDENTIALS_DIRECTORY")
    provided = folder and path.resolve().is_relative_to(Path(folder).resolve())
    if mode & 0o077 and not provided:
        raise UsageError(
            f"secret {path}: others can read it (mode {mode:04o}): chmod 600 {path}"
        )
    return check_secret("secret", path, data)


def read_jwt_key(path: Path) -> Key:
    """Read a key of the site's backend. The kind of key decides the algorithm."""
    data, _mode = read_key_file("--jwt-key", path)
    data = data.removeprefix(codecs.BOM_UTF8)
    if re.search(PEM, data):
        return read_public_pem(path, data)
    secret = check_secret("--jwt-key", path, data)
    if plain_text(secret) is None:
        raise UsageError(
            f"--jwt-key {path}: it is not text (UTF-8); give a public key as PEM, or a "
            "shared secret such as `openssl rand -hex 32` prints"
        )
    return Key("HS256", secret, path)


def read_public_pem(path: Path, data: bytes) -> Key:
    """Read the one public key of a PEM file. Raises UsageError."""
    for pattern, why in PEM_FAULTS.items():
        if re.search(pattern, data):
            raise UsageError(f"--jwt-key {path}: {why}")
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
            algorithm = "RS256"
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            algorithm = "ES256"
        case ed25519.Ed25519PublicKey():
            algorithm = "EdDSA"
        case _:
            raise UsageError(
                f"--jwt-key {path}: this kind of key is not supported; give an RSA key "
                "of 2048 bits or more, a P-256 key, or an Ed25519 key"
            )
    return Key(algorithm, key, path)


def plain_text(data: bytes) -> str | None:
    """Decode text. None: it is not UTF-8, or has control characters."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if CONTROL.search(text) else text


def key_form(data: bytes, layers: int = 3) -> tuple[str, str] | None:
    """Name the form of a key that these bytes have, and what to do about it.

    None: they may be a secret. It looks below `layers` layers of base64, base64url, hex
    and percent encoding. It cannot tell 32 random bytes from a bare Ed25519 key.
    """
    for pattern, form in KEY_FORMS.items():
        if re.search(pattern, data):
            return form
    if is_curve_point(data):
        return "a point of an elliptic curve", "give the whole key as PEM"
    text = plain_text(data)
    if text is None:
        return None
    with suppress(msgspec.DecodeError):
        msgspec.json.decode(text, type=dict | list | str)
        return "JSON", "write the key alone, a public one as PEM"
    for inner in unwrapped(text) if layers else ():
        if found := key_form(inner, layers - 1):
            return found
    return None


def unwrapped(text: str) -> Iterator[bytes]:
    """Decode a text in each way in which it may contain a key."""
    if "%" in text:
        yield urllib.parse.unquote_to_bytes(text)
    # Hex in any style: 3082, 30:82, 0x30, \\x30; with text around it.
    for run in re.findall(r"(?:(?:0[xX]|\\x)?[0-9a-fA-F]{2}[\s:,;._|-]*){16,}", text):
        yield bytes.fromhex("".join(re.findall("[0-9a-fA-F]{2}", run)))
    # Base64 of either alphabet (RFC 4648 4 and 5).
    text = re.sub(r"\\[nrt]", " ", text).replace("-", "+").replace("_", "/")
    words = re.findall("[A-Za-z0-9+/]+", text)
    joined = ["".join(words[start:]) for start in range(min(len(words), 64))]
    for run in words + joined:  # a key of several lines is in one of these
        # Other characters may stand right before the key, or its first may be missing.
        for first in range(4 if len(run) >= 40 else 1):
            digits = run[first:]
            if len(digits) % 4 == 1:  # it is cut short
                digits = digits[:-1]
            yield base64.b64decode(digits + "==")


def is_curve_point(data: bytes) -> bool:
    """Are these bytes an uncompressed point (SEC 1, 2.3.3) of a common curve?"""
    if data[:1] != b"\x04":
        return False
    for curve in (ec.SECP256R1(), ec.SECP256K1(), ec.SECP384R1(), ec.SECP521R1()):
        with suppress(ValueError):
            ec.EllipticCurvePublicKey.from_encoded_point(curve, data)
            return True
    return False


# The kinds of token that a purpose of `Keyring.verify` takes. Any other purpose takes a
# plain or a session token.
USES = {
    "signin": "signin session",
    "session": "session",
    "invite": "invite",
    "socket": "plain session ticket",
    "edge": "plain session ticket",
}


def bad_token(sentence: str = "") -> Refusal:
    """Make the Refusal of an invalid token. Nothing of the token is repeated."""
    return Refusal("token_invalid", sentence)


class CheckedOnce(jwt.algorithms.HMACAlgorithm):
    """HS256 whose secret is checked once.

    PyJWT looks for a public key in the secret for each token, which takes two fifths of
    the time to verify one.
    """

    prepare_key = lru_cache(64)(jwt.algorithms.HMACAlgorithm.prepare_key)


jwt.unregister_algorithm("HS256")
jwt.register_algorithm("HS256", CheckedOnce(CheckedOnce.SHA256))


class Keyring:
    """The trusted keys: signs tokens and verifies them.

    A token is believed when one of these keys, with the algorithm of that key, made its
    signature. Its header decides nothing. Owns the spent tickets and the times of
    revocation.
    """

    def __init__(self, settings: Settings, secret: bytes) -> None:
        self.settings = settings
        self.secret = secret
        self.keys = [Key("HS256", secret), *map(read_jwt_key, settings.jwt_key)]
        self.boot = secrets.token_urlsafe(9)
        # A client that polls sends the same token each time: to find it takes 0.2 us,
        # to verify it 74 us (timeit). Keys do not change while the process runs; expiry
        # and revocation are checked each time.
        self._known = lru_cache(settings.known_tokens)(self._claims_of)
        self.spent: dict[str, float] = {}  # jti of a used ticket: when to forget it
        self.revoked: dict[int, int] = {}  # user: revoked_at, in Unix seconds

    def about(self) -> dict[str, str]:
        """Name each --jwt-key and its kind, for the log."""
        names = ", ".join(map(str, self.keys[1:]))
        return {"jwt_keys": names} if names else {}

    def sign(self, user_id: int, seconds: int, **claims: Any) -> str:
        """Sign a token with chatd's own secret. Claims that are None are left out."""
        iat, exp = self.time_to_sign(user_id), now_seconds() + seconds
        body = {"user_id": user_id, "iat": iat, "exp": exp} | claims
        body = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(body, self.secret, "HS256")

    def grant(self, user_id: int, seconds: int, **claims: Any) -> JsonObject:
        """Sign a token: the fields of the answer that brings it to its user."""
        return {"token": self.sign(user_id, seconds, **claims), "expires_in": seconds}

    def ticket(self, claims: Claims) -> JsonObject:
        """Grant a ticket: for a socket soon, which may last as long as the token."""
        return self.grant(
            claims.user_id,
            TICKET_SECONDS,
            use="ticket",
            jti=secrets.token_urlsafe(12),
            boot=self.boot,
            until=claims.exp,
            scope=" ".join(claims.scopes),
        )

    def verify(self, token: str, use: str | None = None) -> Claims:
        """Return a token's claims. Raises Refusal token_invalid, _expired or _used.

        use is the purpose: one of USES, or any other for a request. "socket" is for an
        upgrade; so is "edge", but a proxy cannot check `boot` or `spent`.
        """
        if len(token) > TOKEN_BYTES:
            raise bad_token(f"token: longer than {TOKEN_BYTES} bytes")
        claims, now = self._known(token), time.time()
        if claims.exp + LEEWAY_SECONDS <= now:
            raise Refusal("token_expired")
        # A proxy does not know how far ahead revocations have put the time to sign.
        ahead = AHEAD_SECONDS if use == "edge" else LEEWAY_SECONDS
        latest = max(now + ahead, self.time_to_sign(claims.user_id))
        if max(claims.iat, claims.nbf) > latest:
            raise bad_token("token: iat or nbf is in the future; are the clocks right?")
        if (claims.use or "plain") not in USES.get(str(use), "plain session"):
            raise bad_token(
                "token: not the kind that this takes. A ticket opens a socket; a "
                "sign-in link or a session token, a session; an invitation, a chat"
            )
        if claims.use == "ticket" and use == "socket" and claims.boot != self.boot:
            why = "a ticket from before a restart: get a new one"
            raise Refusal("token_used", why)
        self.recheck(claims)
        return claims

    def time_to_sign(self, user_id: int) -> int:
        """Return the iat of a token that is signed now: after the user's revocation.

        No token so far has a later one, so it is also the time of a revocation now.
        """
        now, after = now_seconds(), self.revoked.get(user_id, 0) + 1
        return after if now < after <= now + AHEAD_SECONDS else now

    def recheck(self, claims: Claims) -> None:
        """Raise Refusal if the token was used, or may be from before a revocation."""
        if claims.jti in self.spent:
            raise Refusal("token_used")
        revoked_at = self.revoked.get(claims.user_id)
        late = LEEWAY_SECONDS * claims.foreign  # the other clock may be ahead
        # In whole seconds: within one, both may have happened in any order.
        if revoked_at is not None and int(claims.iat) <= revoked_at + late:
            raise bad_token("this token was revoked: get a new one")

    def spend(self, claims: Claims) -> None:
        """Let a verified token open a socket, and use it up if it is a ticket.

        Raises Refusal token_used or token_invalid if it was used, or its user revoked,
        since it was verified.
        """
        self.recheck(claims)
        if claims.use != "ticket":
            return
        for jti in list(itertools.islice(self.spent, 8)):  # the oldest
            if self.spent[jti] < time.time():  # up to 8 go for each that comes
                del self.spent[jti]
        self.spent[claims.jti] = claims.exp + LEEWAY_SECONDS

    def _claims_of(self, token: str) -> Claims:
        """Check a token's signature and claims, but not its times. Raises Refusal."""
        for key in self.keys:
            foreign = key.path is not None
            try:
                body = jwt.decode(
                    token,
                    key.key,
                    algorithms=[key.algorithm],
                    issuer=self.settings.issuer,
                    audience=self.settings.audience,
                    options={
                        # `verify` and read_claims check these.
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                        "verify_sub": False,
                        "verify_jti": False,
                        "verify_iss": foreign,
                        # Without --audience any is accepted.
                        "verify_aud": foreign and self.settings.audience is not None,
                    },
                )
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
            except (
                jwt.InvalidIssuerError,
                jwt.InvalidAudienceError,
                jwt.MissingRequiredClaimError,
            ) as error:
                # PyJWT's words for these quote nothing of the token.
                why = f"token: {error} (--issuer is its iss, --audience its aud)"
                raise bad_token(why) from None
            except (jwt.PyJWTError, ValueError, RecursionError):
                raise bad_token() from None
            return read_claims(body, foreign)
        raise bad_token()


def read_claims(body: JsonObject, foreign: bool) -> Claims:
    """Read the claims of a token whose signature is right. Raises Refusal."""
    user_id, scope = body.get("user_id", body.get("sub")), body.get("scope")
    if isinstance(user_id, str) and re.fullmatch("[0-9]{1,20}", user_id):
        user_id = int(user_id)  # RFC 7519 4.1.2: sub is a string
    scopes = scope.split() if isinstance(scope, str) else []
    name = clean_name(body.get("name"))
    body |= {"user_id": user_id, "name": name, "scopes": scopes, "foreign": foreign}
    if foreign:  # the other claims count only in chatd's own tokens
        believed = {"user_id", "name", "exp", "iat", "nbf", "foreign"}
        body = {name: body[name] for name in believed & body.keys()}
    try:
        return msgspec.convert(body, Claims)
    except (msgspec.ValidationError, UnicodeError) as error:
        # It names the claim. It quotes no value but a `use` that chatd has signed, or
        # half of a surrogate pair.
        raise bad_token(
            f"token: {error} (user_id, or else sub, is a user's number; exp, iat and "
            "nbf are Unix seconds)"
        ) from None


def clean_name(name: object) -> str | None:
    """Make a name fit for display: one line of at most 64 characters.

    "" clears the user's name. None: it is not text, so the token says no name.
    """
    if not isinstance(name, str):
        return None
    printable = (char if char.isprintable() else " " for char in name[:256])
    return " ".join("".join(printable).split())[:64].strip()


# =====================================================================================
# HTTP: one connection, requests one after another
#
# h11 reads a request's head before trio-websocket sees a byte, under one deadline and
# one bound. ROUTE_ROWS is the table of methods and paths, and of the token that each
# needs; it says how to add a route.
# =====================================================================================


class Answer(Record):
    """One HTTP answer, whole."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = {}


def json_answer(body: object, status: int = 200) -> Answer:
    """Answer with JSON."""
    return Answer(status, encode(body))


def refusal_answer(refusal: Refusal) -> Answer:
    """Make an HTTP answer of a Refusal. Retry-After has whole seconds (RFC 9110)."""
    error: dict[str, object] = {"code": refusal.code, "message": refusal.message}
    headers = STATUS_HEADERS.get(refusal.status, {}) | refusal.headers
    if refusal.retry_after is not None:
        error["retry_after"] = refusal.retry_after
        headers["Retry-After"] = str(math.ceil(refusal.retry_after))
    return Answer(refusal.status, encode({"error": error}), headers=headers)


# The headers that a status must have: RFC 9110 15.5.2 and 15.5.22, RFC 6455 4.4.
STATUS_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    426: {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
    },
}


HEAD_SECONDS = 10.0  # for a request's head to arrive: 408
REQUEST_SECONDS = 15.0  # for its body to arrive: 408; and for its work: 503
# A keep-alive lasts longer than the 60 s of common proxies. So the proxy closes first,
# and no request meets a connection that was just closed.
IDLE_SECONDS = 75.0
HEAD_BYTES = 16_384  # in a request's head: 431
HEADER_LINES = 64  # in a request's head: 431
CHUNKS = 1024  # a body may come in: 413. Each costs as much CPU as 1 KB

# The headers that chatd or a library decodes or compares.
ASCII_FIELDS = (
    "host", "connection", "upgrade", "origin", "sec-websocket-key",
    "sec-websocket-version", "sec-websocket-protocol", "sec-websocket-extensions",
)  # fmt: skip


class Request:
    """The head of one request, checked; then its claims and body."""

    claims: Claims  # set when the route asks for a token
    methods: str  # those that the path takes
    ids: tuple[int, ...]  # the numbers in the path
    body: bytes

    def __init__(
        self, head: h11.Request, peer: Address | None, listener: Listener
    ) -> None:
        """Check what h11 accepts but chatd does not. Raises Refusal."""
        if len(head.headers) > HEADER_LINES:
            why = f"{len(head.headers)} header lines; at most {HEADER_LINES}"
            raise Refusal("too_large", why, status=431)
        self.version = head.http_version.decode("ascii")
        if self.version not in ("1.0", "1.1"):
            raise bad_field("version: this server speaks HTTP/1.1")
        self.method = head.method.decode("ascii")
        # The lines of a header are joined (RFC 9110 5.3). X-Forwarded-... headers are
        # dropped, unless a trusted proxy sends them.
        self.fields: dict[str, str] = {}
        trusted = listener.proxies.trust(peer)
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
            if name in self.fields:
                self.fields[name] += f", {value}"
            elif trusted or not name.startswith("x-forwarded"):
                self.fields[name] = value
        for name in ASCII_FIELDS:
            if not self.header(name).isascii():
                raise bad_field(f"{name}: only ASCII may be in it")
        in_chunks = "transfer-encoding" in self.fields
        if in_chunks and ("content-length" in self.fields or self.version != "1.1"):
            # Two servers may read it differently: request smuggling (RFC 9112 6.1).
            raise bad_field("Transfer-Encoding: only in HTTP/1.1, without a length")
        self.target = head.target.decode("ascii")
        # RFC 9112 3.2.2: the host of an absolute target replaces the header.
        if match := re.match(r"(?i)https?://([^/?#@]++)(?![#@])/?(.*)", self.target):
            self.fields["host"], rest = match.groups()
            self.target = f"/{rest}"
        if not re.match("/(?!/)", self.target):
            raise bad_field("target: it must start with exactly one slash")
        self.path, _, query = self.target.partition("?")
        try:
            self.query = urllib.parse.parse_qs(
                query, keep_blank_values=True, errors="strict", max_num_fields=16
            )
        except ValueError as error:
            raise bad_field(f"query: {error}") from None
        forwarded = self.header("x-forwarded-for")
        self.address = listener.proxies.client(peer, forwarded) if forwarded else peer
        if forwarded and self.address is peer:
            listener.warn("unread_address", loggable(forwarded))

    @property
    def user_id(self) -> int:
        """The user whose token this is."""
        return self.claims.user_id

    @property
    def by(self) -> Actor:
        """The user who changes a chat or a message; None: a service."""
        return None if self.claims.service else self.claims.user_id

    @property
    def upgrades(self) -> bool:
        """Is it for the socket's path? check_upgrade checks the rest."""
        return self.path == "/ws/chat" and self.method == "GET"

    def header(self, name: str) -> str:
        """Return a header; "" if there is none."""
        return self.fields.get(name, "")

    def argument(self, name: str) -> str | None:
        """Read a query parameter, given at most once. Raises Refusal bad_field."""
        value, *more = self.query.get(name, [None])
        if more:
            raise bad_field(f"{name}: given {len(more) + 1} times in the query")
        return value

    def parse(self, form: type[T]) -> T:
        """Decode the body. Raises Refusal, naming the field that is wrong."""
        return parse(self.body, msgspec.json.Decoder(form))

    def number(self, name: str, most: int = MAX_ID) -> int | None:
        """Read a query parameter from 1 to most. Raises Refusal bad_field."""
        text = self.argument(name)
        if text is None:
            return None
        if not (re.fullmatch("[0-9]{1,20}", text) and 1 <= int(text) <= most):
            raise bad_field(f"{name}: must be a number from 1 to {most}")
        return int(text)

    def bearer(self) -> str:
        """Read the token of Authorization: Bearer. Raises Refusal token_invalid."""
        match self.header("authorization").split():
            case [scheme, token] if scheme.lower() == "bearer":
                return token
        raise bad_token("token: send Authorization: Bearer, or ?token= for a socket")

    def words(self, name: str) -> set[str]:
        """Read a header that is a list, such as Connection."""
        return {part.strip() for part in self.header(name).lower().split(",")}

    @property
    def has_body(self) -> bool:
        """Does it announce a body, even an empty one?"""
        return "content-length" in self.fields or "transfer-encoding" in self.fields


@dataclasses.dataclass
class HttpConnection:
    """One TCP connection: requests one after another (h11), until one upgrades.

    It reads a head under one deadline and one bound, answers, and goes on if both
    sides want to: `_respond` says when not. Each answer is whole.
    """

    listener: Listener
    stream: trio.SocketStream

    def __post_init__(self) -> None:
        self.peer = peer_address(self.stream)
        self._expect_request()
        self.kept = False  # a keep-alive: it has had an answer
        self.gone = False  # the client gets no answer

    def _expect_request(self, received: bytes = b"") -> None:
        """Begin to read a request, of which these bytes have come already.

        h11 reads, and writes only a 100: to check our own headers took it an eighth of
        the time of a post. Its connection goes on to a next request only if it wrote
        the answer, so each request has a new one.
        """
        self.is_head = False  # of a HEAD, whose answer has no body
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        if received:  # none would mean the end
            self.h11.receive_data(received)

    async def run(self) -> TakeOver | None:
        """Serve requests until the connection ends; or return what takes it over.

        Raises BrokenResourceError if the client has gone or is not waited for. The
        caller closes the stream.
        """
        while (outcome := await self._serve_one()) is True:
            self.kept = True
        return outcome or None

    async def _serve_one(self) -> TakeOver | bool:
        """Serve one request. False: the connection is at its end.

        One scope has the deadline of what is waited for: the head, then the body and
        the work. A scope costs 10 us.
        """
        request: Request | None = None
        begun = bool(self.h11.trailing_data[0])
        wait = IDLE_SECONDS if self.kept and not begun else HEAD_SECONDS
        try:
            with trio.CancelScope(deadline=trio.current_time() + wait) as self.scope:
                request = Request(await self._head(begun), self.peer, self.listener)
                self.scope.deadline = trio.current_time() + REQUEST_SECONDS
                if not request.has_body:
                    self.h11.next_event()  # its end
                outcome = await self.listener.answer(self, request)
                if not isinstance(outcome, Answer):
                    return outcome
                answer = outcome
            if self.gone:
                raise trio.BrokenResourceError
            if self.scope.cancelled_caught:
                if self.h11.their_state is h11.DONE:
                    raise Refusal("storage_failed")  # it may have been done
                raise Refusal("timeout")  # a client may repeat it: RFC 9110 15.5.9
        except Refusal as refusal:
            if request and request.upgrades:
                self.listener.stats.refused[refusal.code] += 1
            answer = refusal_answer(refusal)
        except h11.RemoteProtocolError as error:
            answer = refusal_answer(_protocol_refusal(error))
        if await self._respond(request, answer):
            self._expect_request(self.h11.trailing_data[0])
            return True
        await linger(self.stream)
        return False

    async def refuse(self, refusal: Refusal) -> None:
        """Answer without a request, or after a bug."""
        with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError):
            await self._respond(None, refusal_answer(refusal))

    async def _head(self, begun: bool) -> h11.Request:
        """Read a request's head. begun: a part of it came with the one before."""
        if begun:
            await trio.lowlevel.checkpoint()  # one request, then the other tasks
        try:
            reads = 0
            while not isinstance(event := self.h11.next_event(), h11.Request):
                if reads == 1 and not begun:  # a first part of it has come
                    self.scope.deadline = trio.current_time() + HEAD_SECONDS
                await self._receive(begun or reads > 0)
                reads += 1
            self.is_head = event.method == b"HEAD"
            return event
        finally:
            self.listener.parked.pop(self.scope, None)

    async def _receive(self, begun: bool = True) -> None:
        """Read on, parked: a full server cancels the scope that was parked first.

        The caller takes the scope out of `parked`. Raises BrokenResourceError when the
        client has ended its side. If the scope is cancelled before a request has begun,
        or by a full server, the client is `gone`: it gets no answer.
        """
        self.listener.parked[self.scope] = self.kept and not begun
        self.listener.end_parked()
        try:
            data = await read_socket(self.stream.socket.fileno(), 8192)
            # The bytes and the end of the wait may have come together. What is
            # cancelled must not begin: it would be done, and its client not told so.
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            self.gone = not begun or self.scope not in self.listener.parked
            raise
        if not data:
            raise trio.BrokenResourceError
        self.h11.receive_data(data)

    async def read_body(self, request: Request) -> bytes:
        """Read the body, at most as long as a message. Raises Refusal too_large."""
        most = self.listener.settings.max_message_bytes
        declared = int(request.header("content-length") or 0)  # h11 checked: digits
        body = bytearray()
        chunks = 0
        while self.h11.their_state is h11.SEND_BODY:
            if max(declared, len(body)) > most or chunks > CHUNKS:
                raise Refusal(
                    "too_large", f"a body of more than {most} bytes, or {CHUNKS} chunks"
                )
            if self.h11.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self._send(self.h11.send(go_on) or b"")
            event = self.h11.next_event()
            if isinstance(event, h11.Data):
                body += event.data
                chunks += event.chunk_start
            elif event is h11.NEED_DATA:
                ends = self.scope.deadline  # a stop may shorten the wait, not the work
                try:
                    await self._receive()
                finally:
                    self.listener.parked.pop(self.scope, None)
                    self.scope.deadline = ends
        return bytes(body)

    async def _respond(self, request: Request | None, answer: Answer) -> bool:
        """Write an answer. False: it is the connection's last.

        That is so without a request (its head was malformed, or there was a bug), with
        any byte of it left unread, behind an Upgrade or a CONNECT, in HTTP/1.0, if the
        client says so, at a stop, and with every answer of a proxy.
        """
        headers = {
            "Date": http_date(now_seconds()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **answer.headers,
        }
        body = answer.body
        if body:
            headers["Content-Type"] = answer.content_type
        if answer.status not in (204, 304):  # RFC 9110 8.6
            headers["Content-Length"] = str(len(body))
        lines = list(headers.items())
        goes_on = False
        if request:
            listener = self.listener
            # Not one dict: both may have a Vary.
            lines += cors_headers(listener.settings, request).items()
            goes_on = (
                self.h11.their_state is h11.DONE
                and listener.keeps_alive
                and not listener.stopping.is_set()
            )
        if not goes_on:
            lines.append(("Connection", "close"))  # a 426 has one more Connection
        status = http.HTTPStatus(answer.status)
        head = write_head(f"HTTP/1.1 {status} {status.phrase}", lines)
        await self._send(head if self.is_head else head + body)
        return goes_on

    async def _send(self, data: bytes) -> None:
        """Write at once what the kernel takes; for the rest, wait 15 s.

        Raises BrokenResourceError.
        """
        try:
            sent = os.write(self.stream.socket.fileno(), data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise trio.BrokenResourceError from error
        if sent < len(data):
            with trio.move_on_after(REQUEST_SECONDS) as scope:
                await self.stream.send_all(data[sent:])
            if scope.cancelled_caught:
                raise trio.BrokenResourceError


def write_head(first: str, lines: Iterable[tuple[str, str]]) -> bytes:
    """Write the first line and the headers of a message (RFC 9112 2.1)."""
    headers = "".join(f"{name}: {value}\r\n" for name, value in lines)
    return f"{first}\r\n{headers}\r\n".encode("latin-1")


async def read_socket(fd: int, max_bytes: int) -> bytes:
    """Wait for bytes, and return them; none at the end. Raises BrokenResourceError.

    trio.SocketStream reads first, nearly always in vain, and takes 15 us longer.
    """
    while True:
        await trio.lowlevel.wait_readable(fd)
        try:
            return os.read(fd, max_bytes)
        except BlockingIOError:
            continue
        except OSError as error:
            raise trio.BrokenResourceError from error


# After the last byte, for the client to read it: a close sooner may be a reset, which
# overtakes that byte.
LINGER_SECONDS = 1.0


async def linger(stream: trio.SocketStream) -> None:
    """End the write side, then read and discard until the client ends its own."""
    with (
        trio.move_on_after(LINGER_SECONDS),
        suppress(OSError, trio.BrokenResourceError),
    ):
        stream.socket.shutdown(socket.SHUT_WR)
        while await read_socket(stream.socket.fileno(), 65536):
            pass


def cors_headers(settings: Settings, request: Request) -> dict[str, str]:
    """Tell a browser that a page of --origin may read the answer."""
    if not settings.origin:
        return {}
    headers = {"Vary": "Origin"}
    origin = request.header("origin")
    if short_origin(origin) in settings.origin:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = "Retry-After"
    return headers


def _protocol_refusal(error: h11.RemoteProtocolError) -> Refusal:
    if error.error_status_hint == 431:
        return Refusal("too_large", "the request head is too long", status=431)
    # Not h11's words: they repeat what was sent, which may be a token.
    return bad_field("not HTTP/1.1: a malformed request line, header or body")


def switching_protocols(key: str) -> bytes:
    """Write the answer that opens a WebSocket (RFC 6455 4.2.2)."""
    accept = wsproto.utilities.generate_accept_token(key.encode("ascii"))
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def check_upgrade(request: Request, keyring: Keyring, use: str) -> Claims:
    """Check a handshake as RFC 6455 4.2.1 asks, and its token. Raises Refusal."""
    asked = "websocket" in request.words("upgrade") and request.version == "1.1"
    if not asked or "upgrade" not in request.words("connection"):
        raise Refusal("upgrade_required")
    if request.header("sec-websocket-version") != "13":
        raise Refusal("upgrade_required", "Sec-WebSocket-Version: must be 13")
    if request.has_body and request.header("content-length") != "0":
        raise bad_field("Content-Length: an upgrade has no body")
    key = request.header("sec-websocket-key")
    # 16 bytes in base64 are 22 characters and two =, the last with 4 unused bits.
    if not re.fullmatch(r"[A-Za-z0-9+/]{21}[AQgw]==", key):
        raise bad_field("Sec-WebSocket-Key: must be 16 bytes in base64")
    # A reverse proxy may have an Authorization of its own: the query counts first.
    return keyring.verify(request.argument("token") or request.bearer(), use)


# Reading an address costs 14 us, and that of a proxy is read for each connection.
peer_of = lru_cache(1024)(parse_address)


def peer_address(stream: trio.SocketStream) -> Address | None:
    """Return the client's address. None: it has gone."""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return None
    return peer_of(name[0]) if isinstance(name, tuple) else UNIX_PEER


# The Date header (RFC 9110 6.6.1). Kept for its second, which saves 2 us an answer.
http_date = lru_cache(maxsize=2)(partial(email.utils.formatdate, usegmt=True))

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "manifest-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

# The types of the page's files. A file with another suffix is not served.
PAGE_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
# The page's paths and their files. A name begins with a letter: an editor's .#app.js
# is not served either.
WEB = ASSETS / "web"
PAGE_FILES = {"/": WEB / "index.html"} | {
    f"/web/{file.name}": file
    for file in WEB.glob("[a-z]*")
    if file.suffix in PAGE_TYPES
}


def page_answers() -> dict[str, tuple[Answer, Answer]]:
    """Read the page's files at the start: no request's path ever reaches the disk.

    Each as it is and compressed. Both have one ETag, so it is a weak one.
    """
    answers = {}
    for path, file in PAGE_FILES.items():
        body = file.read_bytes()
        headers = {
            "Content-Security-Policy": CSP,
            "Cache-Control": "no-cache",
            "ETag": f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
            "Vary": "Accept-Encoding",
        }
        plain = packed = Answer(200, body, PAGE_TYPES[file.suffix], headers)
        if file.suffix != ".png":
            headers = {**headers, "Content-Encoding": "gzip"}
            packed = replace(plain, body=gzip.compress(body, mtime=0), headers=headers)
        answers[path] = plain, packed
    return answers


async def answer_request(
    server: Server, connection: HttpConnection, request: Request
) -> Answer | TakeOver:
    """Answer a request, or let a socket in. Raises Refusal."""
    if request.upgrades:
        server.listener.check_handshakes(request.address)
    check_origin(server, request)
    if request.upgrades:
        return await _admit(server, connection, request)
    route = find_route(request)
    known = route.who != "anyone"
    if route.who == "guest":
        # So that no address makes users, or tries tokens, in bulk.
        server.listener.check_handshakes(request.address, 10)
        known = "authorization" in request.fields
    if known:
        authorize(server, request, route.who)
        with suppress(Refusal):
            await store_name(server, request.claims)
    request.body = await connection.read_body(request)
    if "invites" in route.needs and server.settings.invites == "off":
        raise Refusal("forbidden", "there are no invitations here (--invites off)")
    if known:
        # The body may have taken long: the user may have been revoked meanwhile.
        server.keyring.recheck(request.claims)
        if "changes" in route.needs:
            charge_change(server, request.claims)
        if "chats_by" in route.needs:
            check_chats_by(server, request)
    answer = route.handler(server, request)
    return answer if isinstance(answer, Answer) else await answer


async def _admit(
    server: Server, connection: HttpConnection, request: Request
) -> TakeOver:
    """Accept an upgrade: the last checks that can still be an HTTP answer."""
    claims = check_upgrade(request, server.keyring, "socket")
    cursor = request.argument("cursor")
    if claims.name is not None:
        # Half of what the request has: if the disk hangs, the socket opens even so.
        with trio.move_on_after(REQUEST_SECONDS / 2), suppress(Refusal):
            await store_name(server, claims)
    # No task switch from here until `Session.run` counts it, so the bound is exact.
    full = len(server.sessions) >= server.settings.max_connections
    if full:
        server.listener.warn("full", "sockets")
    if full or server.listener.stopping.is_set():
        raise Refusal("overloaded", retry_after=server.retry_after_seconds())
    server.keyring.spend(claims)
    key = request.header("sec-websocket-key")
    trailing = connection.h11.trailing_data[0]
    return partial(server.serve_socket, claims, cursor, key, trailing)


async def store_name(server: Server, claims: Claims) -> None:
    """Store the name in a token, if no newer token said another one.

    Raises Refusal storage_failed, which is no reason to refuse a request.
    """
    user_id, name, latest = claims.user_id, claims.name, now_seconds() + 1
    named_at, names = min(int(claims.iat), latest), server.names
    newest_at, newest = names.get(user_id, (0, None))
    if name is None or named_at < newest_at <= latest:
        return
    if name == newest:  # saves a write for each new token
        names[user_id] = named_at, name
        return
    if len(names) >= TABLE_KEYS:
        names.clear()
    # `then` is called in the order of the commits, so the table has the newest name.
    rename, stored = server.chats.rename, partial(names.__setitem__, user_id)
    await server.commit(rename, user_id, name, named_at, then=stored)


def loggable(text: str) -> str:
    """Let a client's text into the log if it cannot be a token: these have capitals."""
    return text if re.fullmatch(r"[a-z0-9 .,:/\[\]%_+-]{1,100}", text) else "?"


def check_origin(server: Server, request: Request) -> None:
    """Accept programs (no Origin), chatd's own page, and the pages of --origin."""
    origin = request.header("origin")
    if not origin or short_origin(origin) in server.settings.origin:
        return
    hosts = {request.header("host"), *request.words("x-forwarded-host")} - {""}
    if not same_origin(origin, hosts):
        server.listener.warn("refused_origin", loggable(origin))
        raise Refusal("forbidden", "Origin: pages of this origin may not use chatd")


def authorize(server: Server, request: Request, who: str) -> None:
    """Check that a request's token fits its route; set its claims. Raises Refusal."""
    try:
        request.claims = claims = server.keyring.verify(request.bearer(), who)
    except Refusal:  # a guess: it counts for the address
        server.listener.check_handshakes(request.address)
        raise
    if who in ("service", "stats") and who not in claims.scopes:
        raise Refusal("forbidden", f"the token must have scope {who}")
    if not claims.service:
        charge(server, "requests", server.requests(claims.user_id))


def get_page(server: Server, request: Request) -> Answer:
    """Return a file of the page, or 304 if the browser has it."""
    plain, packed = server.pages[request.path]
    if plain.headers["ETag"] in request.header("if-none-match"):
        return Answer(304, headers=plain.headers)
    # Browsers give it no weight. A client that does gets the file as it is.
    return packed if "gzip" in request.words("accept-encoding") else plain


def get_socket(server: Server, request: Request) -> Answer:
    """Answer HEAD: a GET upgrades, or is refused, before its route is looked up."""
    raise Refusal("upgrade_required")


def get_ws_token(server: Server, request: Request) -> Answer:
    """Return a ticket, so that the page need not put its token into a URL."""
    return json_answer(server.keyring.ticket(request.claims))


async def post_session(server: Server, request: Request) -> Answer:
    """Exchange the token of a sign-in link or of a session for a new session token."""
    user_id = request.user_id
    name = await server.read(query_value, NAME, user_id)
    # The user may have been revoked meanwhile. From here on nothing waits.
    server.keyring.recheck(request.claims)
    # No name in it: it is newer than the link, and would undo a change of the name.
    return json_answer(
        {
            **server.keyring.grant(user_id, SESSION_SECONDS, use="session"),
            "user_id": user_id,
            "name": name,
        }
    )


def post_link(server: Server, request: Request) -> Answer:
    """Return the token of a sign-in link, for a second device of the same user."""
    return json_answer(server.keyring.grant(request.user_id, 600, use="signin"))


async def about_me(server: Server, request: Request) -> Answer:
    """Return the user's id and stored name, and what this server allows the user.

    PATCH changes the name before, where no backend says it.
    """
    settings = server.settings
    if request.method == "PATCH":
        if settings.jwt_key:
            raise Refusal(
                "forbidden", "name: here the site's tokens (--jwt-key) say it"
            )
        if not (name := clean_name(request.parse(InviteBody).name)):
            raise bad_field("name: it is empty")
        # Newer than the name in a token of this second.
        await store_name(
            server, replace(request.claims, name=name, iat=now_seconds() + 1)
        )
    name = await server.read(query_value, NAME, request.user_id)
    return json_answer(
        {
            "user_id": request.user_id,
            "name": name,
            "server": {
                "max_content_chars": settings.max_content_chars,
                "edit_seconds": settings.edit_seconds,
                "create_chats": not request.by or settings.chats_by == "user",
                "invites": settings.invites == "on",
                "rename": not settings.jwt_key,
            },
        }
    )


async def get_users(server: Server, request: Request) -> Answer:
    """Return the known users, where users may create chats."""
    return Answer(
        200, await server.read(query_value, USERS, request.by, server.settings.invites)
    )


def check_chats_by(server: Server, request: Request) -> None:
    """Refuse what needs --chats-by user, unless a service asks for it."""
    if request.by and server.settings.chats_by != "user":
        raise Refusal("forbidden", "here only the service creates and changes chats")


async def get_chats(server: Server, request: Request) -> Answer:
    """Return the user's chats, and the cursor after which their events follow."""
    limit, upto = request.number("limit", 100), server.hub.head
    found = await server.read(
        server.chats.my_chats, request.user_id, upto, request.number("before"), limit
    )
    chats = server.hub.correct(found[:limit], upto)
    return json_answer(
        {
            "chats": chats,
            "cursor": write_cursor(server, upto),
            "more": len(chats) < len(found),
            "position": chats[-1].position if chats else None,
        }
    )


async def post_chat(server: Server, request: Request) -> Answer:
    """Create a chat: 201, or 200 for a repeat. A user is a member of its own chats."""
    new, by = request.parse(NewChat), request.by
    members = new.member_ids
    if by:
        members.append(by)
        # Every member gets an event: charge one request for ten.
        server.requests(by).spend(len(members) // 10)
    if new.direct and (new.title or not len(members) == len({*members}) == 2):
        raise bad_field(
            "direct: it is with one other user (a service: of two), untitled"
        )
    new.client_id = _idempotency_key(request, new)
    chat_id, is_new = await server.commit(server.chats.create_chat, new, by)
    request.ids = (chat_id,)
    return await get_chat(server, request, 201 if is_new else 200)


async def get_chat(server: Server, request: Request, status: int = 200) -> Answer:
    """Return one chat with all its members, to a member or a service."""
    upto = server.hub.head
    chat = await server.read(read_chat, *request.ids, upto, request.by, MAX_ID)
    (chat,) = server.hub.correct([chat], upto)
    for member in chat.members:
        member.online = member.user_id in server.hub.people
    return json_answer({"chat": chat}, status)


async def patch_chat(server: Server, request: Request) -> Answer:
    """Rename a chat."""
    await server.commit(
        server.chats.set_title, *request.ids, request.parse(NewTitle).title, request.by
    )
    return await get_chat(server, request)


async def get_members(server: Server, request: Request) -> Answer:
    """Return members of a chat: those in `ids`, or a page of all."""
    ids, limit = request.argument("ids"), request.number("limit", 500) or 100
    if not re.fullmatch(r"[1-9][0-9]{0,15}(,[1-9][0-9]{0,15}){0,99}", ids or "1"):
        raise bad_field("ids: must be 1 to 100 user ids, with commas between them")
    found = await server.read(
        read_members,
        *request.ids,
        server.hub.head,
        request.by,
        ids,
        request.number("after"),
        limit,
    )
    for member in found:
        member.online = member.user_id in server.hub.people
    return json_answer({"members": found[:limit], "more": len(found) > limit})


async def post_member(server: Server, request: Request) -> Answer:
    """Add a user to a chat: 201, or 200 if the user is a member already."""
    (chat_id,) = request.ids
    user_id = request.parse(UserBody).user_id
    added = await server.commit(server.chats.add_member, chat_id, user_id, request.by)
    return json_answer({"chat_id": chat_id, "user_id": user_id}, 201 if added else 200)


async def delete_member(server: Server, request: Request) -> Answer:
    """Leave a chat; its creator and a service may remove others. Effective at once."""
    chat_id, user_id = request.ids
    if request.by != user_id:
        check_chats_by(server, request)
    await server.commit(server.chats.remove_member, chat_id, user_id, request.by)
    return Answer(204)


async def change_invites(server: Server, request: Request) -> Answer:
    """POST: make an invitation to a group. DELETE: end all that were made."""
    ends, by = request.method == "DELETE", request.user_id
    if ends or not request.body:
        request.body = b"{}"
    seconds = request.parse(InviteBody).ttl_seconds
    invite = await server.commit(server.chats.invitation, *request.ids, by, ends)
    if ends:
        return Answer(204)
    # The user may have been revoked meanwhile: its invitation would count all the same.
    server.keyring.recheck(request.claims)
    return json_answer(
        server.keyring.grant(by, seconds, use="invite", invite=invite), 201
    )


async def post_join(server: Server, request: Request) -> Answer:
    """Let a user, or with a name a new one, into the chat of an invitation.

    Without a name and a token of a user it only shows the chat: 200.
    """
    body = request.parse(InviteBody)
    invite = server.keyring.verify(body.token, "invite")
    who: int | str | None = clean_name(body.name)
    if "authorization" in request.fields:
        who = request.user_id
    if who == "":
        raise bad_field("name: it is empty")
    if who:
        charge(server, "joins", server.joins)
    added, answer = await server.commit(server.chats.join, invite, who)
    server.stats.joins += added
    if isinstance(who, str):
        answer |= {
            **server.keyring.grant(answer["user_id"], SESSION_SECONDS, use="session"),
            "name": who,
        }
    return json_answer(answer, 201 if added else 200)


async def get_messages(server: Server, request: Request) -> Answer:
    """Return a page of messages, oldest first."""
    limit, upto = request.number("limit", 100) or 50, server.hub.head
    place, *others = request.query.keys() & {"before", "after", "around"} or ["before"]
    if others:
        raise bad_field(f"{place}: give only one of before, after and around")
    messages, older, newer = await server.read(
        server.chats.history,
        request.user_id,
        *request.ids,
        request.number(place),
        limit,
        upto,
        place,
    )
    messages = server.hub.correct(messages, upto)
    return json_answer({"messages": messages, "more": older, "more_after": newer})


# A query has 1 to 200 characters and 1 to 8 words.
QUERY = r"(?s)(?=.{1,200}\Z)\s*+(?:[^\s\0-\x1f\x7f]++\s*+){1,8}"


async def get_search(server: Server, request: Request) -> Answer:
    """Search the user's messages, newest first: one step of a walk to the beginning."""
    query = request.argument("q") or ""
    words = [fold(word).strip() for word in query.split()]
    if "" in words or not re.fullmatch(QUERY, query):
        raise bad_field(
            f"q: {len(words)} words in {len(query)} characters; it takes 1 to 8 words "
            "in at most 200 characters, without control characters or lone accents"
        )
    chat_id, at = request.number("chat_id"), request.number("before")
    # It costs as much as five requests. (A service pays for none.)
    server.requests(request.by).spend(4)
    if server.searching.statistics().tasks_waiting >= 64:
        raise Refusal("overloaded", "too many searches at once", retry_after=3)
    found: list[Message] = []
    async with server.searching:
        server.keyring.recheck(request.claims)  # others may have taken some seconds
        deadline = trio.current_time() + server.settings.search_seconds
        where = request.user_id, chat_id, json.dumps(words)
        upto = server.hub.head
        while (  # noqa: ASYNC110 (it waits for nothing, but lets others go first)
            (at := await server.read(server.chats.search, found, *where, at, upto))
            and len(found) < 50
            and trio.current_time() < deadline
        ):
            # Without pauses, on one core, the p50 of sends was five times as long, and
            # the WAL, which cannot begin anew under a reader, grew by 9 MB a second.
            await trio.sleep(0.004)
    server.stats.searches += 1
    # A message that was changed meanwhile is shown as it is now; it may not match.
    messages = server.hub.correct(found, upto)
    return json_answer({"messages": messages, "before": at})


async def post_message(server: Server, request: Request) -> Answer:
    """Send a message (SPEC.md, SendMessage): 201, or 200 for a repeat."""
    claims, (chat_id,), upto = request.claims, request.ids, server.hub.head
    post = request.parse(PostMessage)
    check_content(post.content, server.settings)
    if request.by and post.sender_id not in (None, request.by):
        raise Refusal("forbidden", "sender_id: only a service may send for others")
    sender_id = post.sender_id or claims.user_id
    send = Send(chat_id, sender_id, post.content, _idempotency_key(request, post))
    sent = await allow_send(server, claims, send)
    if sent is None:
        sent = await server.commit(server.store.send_message, send, claims.service)
        count_sent(server, claims, sent)
    if changed := changes(server.hub.since(upto)):
        sent = renewed(sent, changed)
    return json_answer(sent, 200 if sent.duplicate else 201)


async def change_message(server: Server, request: Request) -> Answer:
    """Edit a message, or delete it."""
    patches, upto = request.method == "PATCH", server.hub.head
    new = astuple(request.parse(PatchMessage)) if patches else ()
    message = await server.commit(
        server.chats.change_message, request.by, *request.ids, *new
    )
    message = renewed(message, changes(server.hub.since(upto)))
    return json_answer({"message": message}) if patches else Answer(204)


async def post_read(server: Server, request: Request) -> Answer:
    """Mark messages as read up to this one (SPEC.md, MarkMessageAsRead)."""
    message_id, chat_id, n, _seq = await server.commit(
        server.store.mark_read, request.user_id, *request.ids
    )
    return json_answer({"message_id": message_id, "chat_id": chat_id, "n": n})


async def get_events(server: Server, request: Request, feed: bool = False) -> Answer:
    """Answer a poll: the events that a socket would have received since the cursor.

    The feed brings all events, and says whom each is for. Nobody can miss too much of
    it: where a user has to resync, it begins again with the oldest event.
    """
    limit = request.number("limit", 500) or 100
    given, hub = request.argument("cursor"), server.hub
    start, upto = parse_cursor(server, given), hub.head
    resync = given is not None and start is None
    if feed and resync:
        start, resync = 0, given != "first"
    if start is None:
        start = upto
    which = None if feed else request.user_id, start, upto
    if (feed or start == upto) and hub.in_tail(start):
        page = page_of(hub.since(start), server.settings, upto, limit)
    elif not feed and await server.read(server.store.missed, *which) is None:
        page, resync = Page([], upto, upto), True
    else:
        page = await server.read(server.store.events_after, *which, limit)
    return json_answer(
        {
            "events": [
                {
                    **msgspec.to_builtins(entry.event),
                    "to_chat": entry.to_chat,
                    "to_user": entry.to_user,
                }
                if feed
                else entry.event
                for entry in hub.correct(page.events, page.upto)
            ],
            "cursor": write_cursor(server, page.cursor),
            "more": page.cursor < upto,
            "resync": resync,
        }
    )


async def get_unread(server: Server, request: Request) -> Answer:
    """Return the members with a message that is unread for older_than seconds."""
    after = request.argument("after") or "0-0"
    if not re.fullmatch("[0-9]{1,16}-[0-9]{1,16}", after):
        raise bad_field("after: not the position of a member in an earlier answer")
    answer = await server.read(
        query_value,
        UNREAD,
        request.number("older_than") or 300,
        after,
        request.number("limit", 500) or 100,
        server.hub.head,
        encode([*server.hub.people]),
    )
    return Answer(200, answer)


def get_stats(server: Server, request: Request) -> Answer:
    """Return the stats document."""
    return json_answer(stats_document(server))


def get_metrics(server: Server, request: Request) -> Answer:
    """Return the same numbers for Prometheus."""
    return Answer(
        200,
        prometheus_text(stats_document(server)),
        "text/plain; version=0.0.4; charset=utf-8",
    )


async def post_revoke(server: Server, request: Request) -> Answer:
    """Refuse all tokens of a user so far, and close the user's sockets."""
    user_id = request.parse(UserBody).user_id
    # Before the write: during it, an old token could get a new one signed, and a socket
    # could go on. If the write fails, so does the request: it has to be sent again.
    revoked_at = server.keyring.time_to_sign(user_id)
    server.keyring.revoked[user_id] = revoked_at
    theirs = [each for each in server.sessions if each.claims.user_id == user_id]
    log(INFO, "revoked", user=user_id, sockets=len(theirs))
    for session in theirs:
        session.end(CLOSE_SIGN_IN, "revoked: sign in again")
    await server.commit(server.chats.revoke, user_id, revoked_at)
    return json_answer({"user_id": user_id, "closed": len(theirs)})


async def post_forget(server: Server, request: Request) -> Answer:
    """Forget a user but for the number, in this order: tokens, chats, messages, name.

    It works for 10 s. Each step looks for what is left, so a later request goes on.
    """
    await post_revoke(server, request)
    user_id = request.parse(UserBody).user_id
    walked, upto = server.walked, server.store.seq
    with trio.move_on_after(10) as scope:
        while (after := walked[user_id]) < upto:
            walked[user_id] = await server.commit(server.chats.forget, user_id, after)
            # Without pauses, the p99 of sends was up to 2.8 times as long.
            await trio.sleep(0.004)
        # The tail may show the name: cut it, and all readers read the event log.
        await server.commit(
            server.chats.rename,
            user_id,
            "",
            server.keyring.revoked[user_id] + 1,
            then=lambda _: server.hub.set_tail(reversed(server.hub.tail)),
        )
        server.names.pop(user_id, None)
    return json_answer({"more": scope.cancelled_caught})


def get_health(server: Server, request: Request) -> Answer:
    """Answer 200, or 503 while stopping or degraded."""
    status = "ok"
    if server.listener.stopping.is_set():
        status = "stopping"
    elif server.store.failure:
        status = "degraded"
    return json_answer({"status": status}, 200 if status == "ok" else 503)


async def allow_send(server: Server, claims: Claims, send: Send) -> Sent | None:
    """Take a token of the sender's bucket. Raises Refusal rate_limited.

    With an empty bucket a repeat is not refused, though it is counted: the message
    that it repeats is returned.
    """
    try:
        charge_change(server, claims)
    except Refusal:
        if send.client_id is None:
            raise
        # As of the head: a message that is not published yet is not answered yet.
        sent = await server.read(  # noqa: ASYNC120 (nobody waits then)
            server.store.find_sent, send, server.hub.head
        )
        if sent is None:
            raise
        server.stats.duplicates += 1
        return sent
    return None


def charge_change(server: Server, claims: Claims) -> None:
    """Take a token of the user's bucket; a service needs none. Raises rate_limited."""
    if not claims.service:
        charge(server, "sends", server.sends(claims.user_id))


def count_sent(server: Server, claims: Claims, sent: Sent) -> None:
    """Count a repeat; it gets its token back."""
    if sent.duplicate:
        server.stats.duplicates += 1
        if not claims.service:
            server.sends(claims.user_id).spend(-1)


def _idempotency_key(request: Request, post: PostMessage | NewChat) -> str | None:
    """Read client_id or Idempotency-Key, which mean the same. Raises Refusal."""
    if "idempotency-key" not in request.fields:
        return post.client_id
    key = request.header("idempotency-key")
    if not re.fullmatch(r"[\x20-\x7e]{1,64}", key):
        raise bad_field("Idempotency-Key: must be 1-64 printable ASCII")
    if post.client_id not in (None, key):
        raise bad_field("client_id: differs from Idempotency-Key")
    return key


def preflight(server: Server, request: Request) -> Answer:
    """Answer OPTIONS, which a browser sends before a request from another origin."""
    headers = {
        "Allow": request.methods,
        "Access-Control-Allow-Methods": request.methods,
        "Access-Control-Allow-Headers": "authorization, content-type, idempotency-key",
        "Access-Control-Max-Age": "600",
    }
    return Answer(204, headers=headers)


Handler = Callable[[Server, Request], Answer | Awaitable[Answer]]


class Route(NamedTuple):
    """The token that a route needs, and its handler.

    anyone: none; guest: a user's token or none; else a purpose of Keyring.verify.
    needs: "invites", that there are invitations here; and of a user: "changes", a token
    of --sends, as a message does; "chats_by", that users may change chats here.
    """

    who: str
    handler: Handler
    needs: Collection[str] = ()


# Method and path, then `who` and `needs` of the Route. A * is a number in the path. To
# add a route, write its row and its handler, and the method of Chats or the struct of a
# body that the handler needs.
ROUTE_ROWS: dict[str, Handler] = {
    **{f"GET {path} anyone": get_page for path in PAGE_FILES},
    "GET    /ws/chat                         anyone": get_socket,
    "GET    /api/v2/ws-token                 user": get_ws_token,
    "POST   /api/v1/session                  signin": post_session,
    "GET    /api/v1/me                       user": about_me,
    "PATCH  /api/v1/me                       user    changes": about_me,
    "POST   /api/v1/me/link                  session": post_link,
    "GET    /api/v1/users                    user    chats_by": get_users,
    "GET    /api/v1/chats                    user": get_chats,
    "POST   /api/v1/chats                    user    changes chats_by": post_chat,
    "GET    /api/v1/chats/*                  user": get_chat,
    "PATCH  /api/v1/chats/*                  user    changes chats_by": patch_chat,
    "GET    /api/v1/chats/*/members          user": get_members,
    "POST   /api/v1/chats/*/members          user    changes chats_by": post_member,
    "DELETE /api/v1/chats/*/members/*        user    changes": delete_member,
    "POST   /api/v1/chats/*/invites          user    invites": change_invites,
    "DELETE /api/v1/chats/*/invites          user    invites": change_invites,
    "POST   /api/v1/join                     guest   changes invites": post_join,
    "GET    /api/v1/chats/*/messages         user": get_messages,
    "POST   /api/v1/chats/*/messages         user": post_message,
    "PATCH  /api/v1/messages/*               user    changes": change_message,
    "DELETE /api/v1/messages/*               user    changes": change_message,
    "POST   /api/v1/messages/*/read          user": post_read,
    "GET    /api/v1/search                   user": get_search,
    "GET    /api/v1/events                   user": get_events,
    "GET    /api/v1/internal/chat/ws/stats   stats": get_stats,
    "GET    /metrics                         stats": get_metrics,
    "GET    /api/v1/internal/chat/events     service": partial(get_events, feed=True),
    "GET    /api/v1/internal/chat/unread     service": get_unread,
    "POST   /api/v1/internal/chat/revoke     service": post_revoke,
    "POST   /api/v1/internal/chat/forget     service": post_forget,
    "GET    /healthz                         anyone": get_health,
}
ROUTES: dict[str, dict[str, Route]] = {}
for row, handler in ROUTE_ROWS.items():
    method, path, who, *needs = row.split()
    ROUTES.setdefault(path, {})[method] = Route(who, handler, needs)
for methods in ROUTES.values():
    if "GET" in methods:
        methods["HEAD"] = methods["GET"]  # without the body (RFC 9110 9.3.2)
    methods["OPTIONS"] = Route("anyone", preflight)
NUMBER = re.compile(r"(?<=/)0*[1-9][0-9]{0,15}(?=/|\Z)")


def find_route(request: Request) -> Route:
    """Find a request's route, and the numbers in its path. Raises Refusal."""
    path = NUMBER.sub("*", request.path)
    if path not in ROUTES or "*" in request.path:
        raise Refusal("not_found", "there is nothing at this path")
    request.methods = ", ".join(ROUTES[path])
    if request.method not in ROUTES[path]:
        raise Refusal("method_not_allowed", headers={"Allow": request.methods})
    request.ids = tuple(map(int, NUMBER.findall(request.path)))
    return ROUTES[path][request.method]


# =====================================================================================
# MONITORING: log lines, stats, metrics
#
# Log lines on stderr, one for each thing that happens; one document of numbers; and the
# same numbers for Prometheus.
# =====================================================================================


def log(level: int, verb: str, **fields: object) -> None:
    """Write one log line: a verb and fields. User text cannot forge a line.

    ascii() escapes line ends, escape sequences and right-to-left marks. Callers never
    pass a token or the text of a message.
    """
    if logger.isEnabledFor(level):
        words = (
            f"{name}={value if isinstance(value, int) else ascii(str(value))}"
            for name, value in fields.items()
        )
        logger.log(level, " ".join((verb, *words)))


def log_bug(verb: str, error: BaseException) -> None:
    """Log a bug of chatd: the exception's class and where it was raised.

    Not its text, which may contain anything that came over the wire.
    """
    kinds, places = [], []
    cause: BaseException | None = error
    while cause is not None:
        kinds.append(type(cause).__name__)
        places += [
            f"{Path(f.filename).name}:{f.lineno} {f.name}"
            for f in traceback.extract_tb(cause.__traceback__)[:-9:-1]
        ]
        cause = cause.__cause__
    log(ERROR, verb, error=" from ".join(kinds), at=" < ".join(places))


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """Walk the exceptions of a group, however deep."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def in_journal() -> bool:
    """Is stderr connected to the journal (systemd.exec(5))?"""
    there = os.fstat(2)
    return variable("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}


class JournalFormatter(logging.Formatter):
    """Writes a log line for the journal: with a priority as in sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        return f"<{PRIORITIES[record.levelname]}>{record.getMessage()}"


def set_up_log(level: str) -> None:
    """Log to stderr. trio-websocket's own logger is off: it would log every frame."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JournalFormatter()
        if in_journal()
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%FT%T%z")
    )
    logging.raiseExceptions = False  # a stderr that is full or gone ends nothing
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logging.getLogger("trio-websocket").disabled = True


Counts = Counter[str]


class Stats:
    """Counts since the start, named as in the stats document."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.total = self.deliveries = self.writes = self.catch_ups = self.stalls = 0
        self.commits = self.batch_max = self.duplicates = self.failed = self.joins = 0
        self.searches = 0
        self.closed = Counts()
        self.refused = Counts()
        self.events = Counts()
        self.rate_limited = Counts()
        self.errors = Counts()
        self.resumes = Counts(fresh=0, live=0, replay=0, resync=0)
        self.commit_times = deque[float](maxlen=1024)
        self.commit_max = 0.0

    def committed(self, seconds: float, jobs: int) -> None:
        """Count one commit and the time it took."""
        self.commits += 1
        self.batch_max = max(self.batch_max, jobs)
        seconds = round(seconds, 6)
        self.commit_times.append(seconds)
        self.commit_max = max(self.commit_max, seconds)

    def commit_seconds(self) -> dict[str, float]:
        """p50 and p99 of the last 1,024 commits, and the longest of all."""
        ranked = sorted(self.commit_times) or [0.0]
        p50, p99 = (ranked[len(ranked) * part // 100] for part in (50, 99))
        return {"p50": p50, "p99": p99, "max": self.commit_max}


def stats_document(server: Server) -> JsonObject:
    """Make the stats document: what is connected, and what has happened."""
    stats, store = server.stats, server.store

    def counted(*names: str) -> JsonObject:
        return {name: getattr(stats, name) for name in names}

    return {
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - stats.started, 3),
        "connections": {
            "active": len(server.sessions),
            "users": len(server.hub.people),
            "catching_up": sum(not s.seat.live for s in server.sessions),
            **counted("total", "closed", "refused"),
        },
        "broadcast": counted("events", "deliveries", "writes", "catch_ups", "stalls"),
        "store": {
            **counted("commits", "batch_max", "duplicates", "failed", "joins"),
            # Also those that a failed commit has stored: nobody got their ack.
            "messages": stats.events["new_message"],
            "commit_seconds": stats.commit_seconds(),
            "degraded": bool(store.failure),
            "wal_bytes": file_bytes(store.wal),
            "sqlite": sqlite3.sqlite_version,
        },
        **counted("searches", "resumes", "rate_limited", "errors"),
    }


# The numbers of the stats document that only grow; all others are gauges.
COUNTERS = vars(Stats()).keys() - {"batch_max"} | {"messages"}

LABELS = {
    "closed": "code", "refused": "code", "events": "type", "resumes": "kind",
    "rate_limited": "limit", "errors": "type", "commit_seconds": "quantile",
}  # fmt: skip


def prometheus_text(document: JsonObject) -> bytes:
    """Write the stats document in Prometheus's text format.

    A name is the path in the document; a table becomes one metric with a label.
    """
    # Imported at the first scrape: it would take a tenth of the time to start.
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
    )

    class Document(CollectorRegistry):
        def collect(self) -> Iterator[Metric]:
            return families("chatd", document)

    def families(prefix: str, part: JsonObject) -> Iterator[Metric]:
        for name, value in part.items():
            family = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            if isinstance(value, str):
                yield InfoMetricFamily(f"{prefix}_{name}", name, value={name: value})
            elif name in LABELS:
                metric = family(f"{prefix}_{name}", name, labels=[LABELS[name]])
                for label, number in value.items():
                    metric.add_metric([label], number)
                yield metric
            elif isinstance(value, dict):
                yield from families(f"{prefix}_{name}", value)
            else:
                yield family(f"{prefix}_{name}", name, value=value)

    return generate_latest(Document())


# =====================================================================================
# PROXY: `chatd proxy`
#
# A process of its own in front of a chatd: it checks the token of a socket before
# anything else is asked. One request a connection: h11 reads its head, the body (at
# most --max-message-bytes) is read whole, and both are written anew. Bytes behind it
# are never sent on, so no second request can be smuggled past. The answer is not
# parsed: it goes down as it comes, until the upstream ends it. Only after "HTTP/1.1
# 101" do bytes of the client go up as they are.
#
# A proxy cannot know which tickets were used and which users were revoked; the upstream
# refuses those. No request is sent twice.
# =====================================================================================


# A request ends with 504 when no byte moves between client, proxy and upstream for so
# long. Above REQUEST_SECONDS, so that the server answers first.
UPSTREAM_SECONDS = 20.0
COPY_BYTES = 16_384  # held for one direction, and no more: nothing queues here
# Headers of one connection and not of the message (RFC 9110 7.6.1), and those that the
# proxy writes itself.
NOT_PASSED_ON = {
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate",
    "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "expect",
    "host", "content-length", "forwarded", "x-real-ip",
}  # fmt: skip
ANSWER_BEGINS = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time: a close is a reset


def proxy(settings: Settings, upstream: str) -> None:
    """Stand in front of a chatd that listens elsewhere, until a signal says stop."""
    settings = raise_file_limit(settings, each=2)
    if upstream.startswith("unix:"):
        dial = partial(trio.open_unix_socket, upstream[5:])
    else:
        host, _, port = upstream.rpartition(":")
        dial = partial(trio.open_tcp_stream, host.strip("[]"), int(port))
    keyring = read_keyring(settings)
    listener = Proxy(settings, keyring, upstream, dial).listener
    about = {"upstream": upstream} | keyring.about()
    trio.run(run_root, listener, listener.run, about, announce)


@dataclasses.dataclass
class Proxy:
    """One proxy. dial opens a connection to the upstream: the seam for tests."""

    settings: Settings
    keyring: Keyring
    upstream: str
    dial: Callable[[], Awaitable[trio.SocketStream]]

    def __post_init__(self) -> None:
        self.sessions: set[Tunnel] = set()
        self.listener = Listener(
            self.settings, Stats(), self.sessions, self.pass_request, keeps_alive=False
        )

    async def pass_request(
        self, connection: HttpConnection, request: Request
    ) -> TakeOver:
        """Pass a request up; return what passes its answer down. Raises Refusal."""
        if request.method == "CONNECT":
            raise bad_field("method: CONNECT is not passed on")
        if request.upgrades:
            self.listener.check_handshakes(request.address)
            check_upgrade(request, self.keyring, "edge")
        body = await connection.read_body(request)
        connection.scope.deadline = math.inf  # _ask has its own
        status = 0
        try:
            upstream, begun = await self._ask(self._head_up(request, body) + body)
            status = int(begun[9:])
        finally:
            # An unknown path or method may contain a token, so it is not logged.
            path = request.path if NUMBER.sub("*", request.path) in ROUTES else "?"
            known = request.method in http.HTTPMethod.__members__
            log(DEBUG, "passed", method=request.method if known else "?",
                path=path, client=request.address, status=status)  # fmt: skip
        opened = request.upgrades and begun == b"HTTP/1.1 101"
        sent = connection.h11.trailing_data[0] if opened else None
        return Tunnel(self, upstream, sent, begun).run

    async def _ask(self, question: bytes) -> tuple[trio.SocketStream, bytes]:
        """Send a request to the upstream; return how its answer begins.

        The caller owns the stream. Raises Refusal upstream if no HTTP answer begins in
        time.
        """
        try:
            with trio.fail_after(UPSTREAM_SECONDS):
                upstream = await self.dial()
                try:
                    return upstream, await _exchange(upstream, question)
                except BaseException:
                    upstream.socket.close()
                    raise
        except trio.TooSlowError:
            raise Refusal(
                "upstream", "the chat service does not answer", status=504
            ) from None
        except (OSError, trio.BrokenResourceError) as error:
            self.listener.warn("upstream_failed", error)
            raise Refusal("upstream") from error

    def _head_up(self, request: Request, body: bytes) -> bytes:
        """Write a request's head anew: the message's own headers, then the proxy's.

        It has the client's version of HTTP, so that the answer suits the client.
        """
        ours_alone = NOT_PASSED_ON | request.words("connection")
        fields = {
            name: value
            for name, value in request.fields.items()
            if name not in ours_alone and not name.startswith("x-forwarded")
        }
        host = request.header("host") or self.upstream
        via = f"{request.header('via')}, {request.version} chatd"
        fields |= {
            "host": host,
            "x-forwarded-host": request.fields.get("x-forwarded-host", host),
            "x-forwarded-proto": request.fields.get("x-forwarded-proto", "http"),
            "via": via.removeprefix(", "),
            "connection": "close",
        }
        if request.address not in (None, UNIX_PEER):
            fields["x-forwarded-for"] = str(request.address)
        if request.upgrades:
            fields |= {"connection": "Upgrade", "upgrade": "websocket"}
        elif request.has_body:
            fields["content-length"] = str(len(body))
        first = f"{request.method} {request.target} HTTP/{request.version}"
        return write_head(first, fields.items())


async def _exchange(upstream: trio.SocketStream, question: bytes) -> bytes:
    """Send a request; return the first twelve bytes of its answer. Raises OSError."""
    # An upstream that answers before it has read all may refuse the rest.
    with suppress(trio.BrokenResourceError):
        await upstream.send_all(question)
    begun = b""
    while len(begun) < 12 and (data := await upstream.receive_some(12 - len(begun))):
        begun += data
    if not ANSWER_BEGINS.match(begun):
        raise OSError(errno.EPROTO, "an answer that is not HTTP/1")
    return begun


@dataclasses.dataclass(eq=False)
class Tunnel:
    """Two connections joined: the answer goes down; after a 101 all bytes go up, too.

    An end of one side is passed on as an end, a reset as a reset. When the proxy stops
    it ends its side to the upstream; chatd then writes a close frame, whole and in its
    place, because it knows where frames end. Owns the upstream's stream.

    begun is what the upstream has answered, sent is what the client has sent behind its
    upgrade; None: this is no socket, and nothing of the client goes up.
    """

    proxy: Proxy
    upstream: trio.SocketStream
    sent: bytes | None
    begun: bytes

    def __post_init__(self) -> None:
        self.seconds = UPSTREAM_SECONDS  # without a byte in between
        self.idle = trio.CancelScope()
        self.reading = trio.CancelScope()  # the client

    def end(self, _code: int, _reason: str) -> None:
        """Read no more of the client; the upstream then gets an end of file."""
        self.reading.cancel()

    async def run(self, client: trio.SocketStream) -> None:
        """Copy until both sides have ended. Closes both."""
        broken = True
        if self.sent is not None:
            self.seconds = IDLE_SECONDS
            self.proxy.sessions.add(self)
            if self.proxy.listener.stopping.is_set():
                self.reading.cancel()
        try:
            with self.idle:
                self._moved()
                async with trio.open_nursery() as nursery:
                    if self.sent is not None:
                        nursery.start_soon(
                            self._copy, client, self.upstream, self.sent, self.reading
                        )
                    to_the_end = trio.CancelScope()
                    await self._copy(self.upstream, client, self.begun, to_the_end)
                self.upstream.socket.close()
                await linger(client)
                broken = False
        finally:
            self.proxy.sessions.discard(self)
            self.proxy.listener.end_parked()
            for sock in (client.socket, self.upstream.socket):
                if broken:
                    with suppress(OSError):  # it is closed already
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()

    def _moved(self) -> None:
        self.idle.deadline = trio.current_time() + self.seconds

    async def _copy(
        self,
        source: trio.SocketStream,
        target: trio.SocketStream,
        data: bytes,
        reading: trio.CancelScope,
    ) -> None:
        """Copy data, and then all until the source ends or the target has gone.

        Then, or when reading is cancelled, the target gets an end of file, and the
        other side has not much longer to end, too.
        """
        with reading:
            while data := data or await source.receive_some(COPY_BYTES):
                try:
                    await target.send_all(data)
                except trio.BrokenResourceError:
                    break  # what the target sent before still goes to the source
                self._moved()
                data = b""
        with suppress(trio.BrokenResourceError):  # it has gone
            await target.send_eof()
        self.seconds = STALL_SECONDS
        self._moved()


# =====================================================================================
# OPERATIONS: systemd, listening sockets, files, backup, restore, check
#
# The side of chatd that a person or a service manager meets. Errors here are sentences:
# what was wrong, with which value, and what to do.
# =====================================================================================


class UsageError(Exception):
    """The person who runs chatd has to change something: exit status 1."""


# The file is damaged. sqlite3 raises this class itself for SQLITE_CORRUPT and
# SQLITE_NOTADB, and a subclass for what else can happen to a file.
Damage = sqlite3.DatabaseError


@contextmanager
def file_errors(what: str, path: Path) -> Iterator[None]:
    """Turn the OSError or sqlite3.Error of a file into a UsageError that names it.

    If the database that is served is damaged, the sentence says what to do.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = str(getattr(error, "strerror", None) or error)
        user, folder, hint = f"user {os.geteuid()}", path.absolute().parent, ""
        if not os.path.isdir(folder):
            hint = f"; {user} finds no folder {folder}: make it, name another, or sudo"
        for place in (path, folder):
            if os.path.exists(place) and not os.access(place, os.W_OK):
                hint = (
                    f"; {user} cannot write {place}: run chatd as its owner, user "
                    f"{place.stat().st_uid}, and not on a read-only disk"
                )
        if type(error) is Damage:
            why, hint = f"damaged: {' '.join(why.split())}", ""
            if what == "database":
                hint = (
                    f"; `chatd check --db {path}` lists what is wrong, "
                    f"`chatd restore BACKUP --db {path}` puts a backup there"
                )
        raise UsageError(f"{what} {path}: {why}{hint}") from error


def notify(state: str, fds: Sequence[int] = (), *, wait_seconds: float = 5) -> None:
    """Notify systemd (sd_notify(3)) and pass it descriptors. Without systemd: nothing.

    The process waits until systemd accepts the message: a systemd that hangs must not
    hang chatd for longer than wait_seconds.
    """
    address = variable("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait_seconds)
            sock.connect(re.sub("^@", "\0", address))  # @: in the abstract namespace
            socket.send_fds(sock, [state.encode()], fds)
    except OSError as error:
        log(WARNING, "notify_failed", error=error)


def raise_file_limit(settings: Settings, each: int = 1) -> Settings:
    """Raise the limit of open files to max_connections + 256, or lower max_connections.

    each is the number of descriptors that a connection takes.
    """
    wanted = (settings.max_connections + 256) * each
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return settings
    fewer = max(1, allowed // each - 256)
    log(WARNING, "fewer_connections", max_connections=fewer, open_files=allowed)
    return dataclasses.replace(settings, max_connections=fewer)


def query_value(db: Db, sql: str, *values: Any) -> Any:
    """Run a query for one value: the first column of the first row, or None."""
    row = db.execute(sql, values).fetchone()
    return row[0] if row else None


def schema_steps() -> list[str]:
    """Split schema.sql at its "-- version N" lines: step N makes version N."""
    text = (ASSETS / "schema.sql").read_text("utf-8")
    return re.split(r"(?m)^-- version \d+$", text)[1:]


def open_database(path: Path, *, readonly: bool = True, alone: bool = False) -> Db:
    """Open a connection with the pragmas that the promise needs. Raises sqlite3.Error.

    alone: without a -wal, nobody writes while this reader is open.
    Exactly one connection may commit and checkpoint: before SQLite 3.51.3 two that do
    so at the same time can corrupt a WAL. Readers beside a writer can do neither.
    """
    wal, mode, fixed = wal_of(path), "ro" if readonly else "rw", False
    if alone and not wal.exists():
        # SQLite makes -wal and -shm for a reader, too, and removes them only if it
        # could write. Where it has no right or no room to make them, it reads the file
        # as it is.
        mode, disk = "rw", os.statvfs(wal.parent)
        full = disk.f_bfree < min(16, disk.f_blocks)  # 0 blocks: the size is unknown
        fixed = full or not os.access(wal.parent, os.W_OK)
    uri = f"{Path(os.path.realpath(path)).as_uri()}?mode={mode}&immutable={fixed:d}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5
    )
    db.set_progress_handler(progress(path), 1_000_000)
    try:
        db.executescript("PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY")
        db.create_function("fold", 1, fold)
        if readonly:
            db.executescript("PRAGMA query_only = ON; PRAGMA wal_autocheckpoint = 0")
            return db
        journal = query_value(db, "PRAGMA journal_mode = WAL")
        if journal != "wal":
            raise sqlite3.OperationalError(
                f"journal_mode is {journal}, not wal: no room or no right for a -wal"
            )
        db.executescript(
            """PRAGMA synchronous = FULL;  -- an ack survives a power cut
            PRAGMA foreign_keys = ON;
            PRAGMA secure_delete = ON;
            PRAGMA cell_size_check = ON;
            PRAGMA journal_size_limit = 67108864"""
        )
    except BaseException:
        db.close()
        raise
    return db


def wal_of(path: Path) -> Path:
    """Name the WAL of a database: SQLite puts it beside the file, not beside a link."""
    return Path(f"{os.path.realpath(path)}-wal")


def file_bytes(path: Path) -> int:
    """Return the size of a file: 0 if there is none. Raises OSError for a device."""
    if path.is_file():
        return path.stat().st_size
    if path.exists():
        raise OSError("Is a directory, a device or a pipe, and no file")
    return 0


def sync_wal(wal: Path) -> None:
    """Write a WAL to the disk once more, as a whole, and sync it. Raises OSError.

    A crash between write and fsync can leave rows that are readable but not on disk; a
    repeated message would be acked from them. After a failed fsync Linux marks the
    pages clean and never retries, so only pages that are written again reach the disk;
    and SQLite reads a WAL only up to its first gap.
    """
    with suppress(FileNotFoundError), wal.open("r+b", buffering=0) as file:
        fd, at = file.fileno(), 0
        while data := os.pread(fd, 1_048_576, at):
            at += os.pwrite(fd, data, at)
        os.fsync(fd)


def check_not_emptied(path: Path) -> None:
    """Raise Damage for a file that SQLite would take for a new database.

    SQLite would then remove the -wal, which may hold all there is. A database is at
    least as long as its header.
    """
    size = file_bytes(path)
    if 0 < size < 100:
        raise Damage(f"it has only {size} bytes")
    if not size and file_bytes(wal_of(path)):
        raise Damage("it is empty, and its -wal is not")


# The size that the file of a database should have, if nothing is left in the WAL.
DATABASE_BYTES = (
    "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
)


def examine(what: str, path: Path, db: Db) -> int:
    """Return the version of a database's schema: 0 if there is nothing in it yet.

    Raises UsageError if it is not chatd's, or if a newer chatd made it; Damage if its
    end or a part of its schema is lost.
    """
    version: int = query_value(db, "PRAGMA user_version")
    steps = schema_steps()
    if query_value(db, "PRAGMA application_id") != APPLICATION_ID:
        if schema_names(db):
            raise UsageError(f"{what} {path}: it belongs to another program")
        return 0
    if version > len(steps):
        raise UsageError(
            f"{what} {path}: made by a newer chatd (schema {version}, this one knows "
            f"{len(steps)}): install that version, or restore an older backup"
        )
    size, left = query_value(db, DATABASE_BYTES), file_bytes(path)
    if left < size and not file_bytes(wal_of(path)):  # the WAL may have the rest
        raise Damage(f"{left} bytes are left of {size}")
    if version < 1:
        raise Damage(f"its schema has version {version}")
    with closing(sqlite3.connect(":memory:")) as model:
        model.create_function("fold", 1, fold)
        model.executescript("".join(steps[:version]))
        if missing := schema_names(model) - schema_names(db):
            raise Damage(f"without {', '.join(sorted(missing))}")
    return version


def schema_names(db: Db) -> set[str]:
    """Return the tables, indexes and triggers of a database: "table meta"."""
    names = "SELECT type || ' ' || name FROM sqlite_schema WHERE sql IS NOT NULL"
    return {name for (name,) in db.execute(names)}


def check_at_start(db: Db, path: Path, check_bytes: int) -> None:
    """Refuse to serve a damaged database. The file's size bounds the time it takes.

    Raises Damage. quick_check reads each page once (measured: 27 MB in 32 ms); it
    does not compare indexes with their tables, as `chatd check` does.
    """
    size = query_value(db, DATABASE_BYTES)
    if size > check_bytes:
        log(INFO, "unchecked", db=path, bytes=size, check_bytes=check_bytes)
        return
    began = time.monotonic()
    found = query_value(db, "PRAGMA quick_check(1)")
    if found != "ok":
        raise Damage(found)
    log(
        INFO, "checked", db=path, bytes=size, seconds=round(time.monotonic() - began, 3)
    )


# SQL for the random half of cursors.
NEW_EPOCH = "lower(hex(randomblob(4)))"


def prepare_database(path: Path, check_bytes: int) -> Db:
    """Open the writer's connection; create the schema, or migrate an older one.

    Raises UsageError with a sentence for the person, and then changes nothing.
    """
    steps = schema_steps()
    with file_errors("database", path):
        check_not_emptied(path)
        # SQLite would make the file readable by all. -wal and -shm get its mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(open_database(path, alone=True)) as look:
            version = examine("database", path, look)
            if version:
                check_at_start(look, path, check_bytes)
        sync_wal(wal_of(path))  # its last writer may have been killed
        db = open_database(path, readonly=False)
        try:
            if version < len(steps):
                db.executescript(
                    f"""PRAGMA foreign_keys = OFF;  -- else no table can be replaced
                    BEGIN IMMEDIATE; {"".join(steps[version:])}
                    PRAGMA application_id = {APPLICATION_ID};
                    PRAGMA user_version = {len(steps)};
                    INSERT OR IGNORE INTO meta VALUES ('epoch', {NEW_EPOCH});
                    COMMIT;
                    PRAGMA foreign_keys = ON;
                    -- The file itself, not only its WAL, shows that it is chatd's.
                    PRAGMA wal_checkpoint(TRUNCATE)"""
                )
        except sqlite3.Error:
            db.close()
            raise
    return db


CLEAR = "\x1b[K\r"  # what follows overwrites the line


def progress(path: Path) -> Callable[..., None]:
    """Make a function that shows a step's progress on a terminal, after a second.

    SQLite calls it after so many instructions, or pages of a copy: (status, left, all).
    Signals are handled then, too. The server's own threads show nothing.
    """
    began = time.monotonic()

    def show(*pages: int) -> None:
        seconds = int(time.monotonic() - began)
        here = threading.current_thread() is threading.main_thread()
        if seconds and here and sys.stderr.isatty():
            part = f", {100 * pages[1] // pages[2]}% to copy" if pages else ""
            sys.stderr.write(f"{path.name}: {seconds} s{part}{CLEAR}")

    return show


@contextmanager
def locked(db: Path, *others: Path) -> Iterator[list[Path]]:
    """Hold the lock of a database: one serve, or one restore. Raises UsageError.

    The file itself is locked, whatever name leads to it. Yields the files that are new,
    or will be: the database, empty now, and the others. Those that are still in that
    list at the end are removed.
    """
    path = Path(os.path.realpath(db))
    with file_errors("database", db):
        if db.is_symlink() and db.lstat().st_uid not in (0, os.geteuid()):
            # Root would replace any file that the unit's user links to.
            raise UsageError(f"database {db}: a link of another user; name its target")
        new = [file for file in (path, *others) if not os.path.lexists(file)]
        if not file_bytes(path) and file_bytes(wal_of(path)):
            new = []  # all that is left of a database
        # Root does this too, in a folder of the unit's user: follow no link there.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with open(fd, "rb"):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"database {db}: in use by process {holder(db) or '?'}; stop that one "
                "first (systemctl stop chatd), or name another with --db"
            ) from None
        try:
            if path in new:
                keep_owner(path.parent, path)
            yield new
        finally:
            for file in new:
                remove(file)


def holder(path: Path) -> str:
    """Find the process that holds the lock of a database. "": none, or it is hidden."""
    lock = rf"FLOCK .* (\d+) \S+:{path.stat().st_ino} "
    with suppress(OSError):
        return "".join(re.findall(lock, Path("/proc/locks").read_text("ascii"))[:1])
    return ""


def keep_owner(like: Path, path: Path) -> None:
    """Give a file that root made to the owner of `like`: the unit must write it."""
    if os.geteuid() == 0:
        owner = like.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def secret_path(settings: Settings) -> Path:
    """Find chatd's own secret: flag, systemd credential, or beside the database."""
    if settings.secret_file is not None:
        return settings.secret_file
    folder = variable("CREDENTIALS_DIRECTORY")
    if folder and (credential := Path(folder, "chatd.secret")).exists():
        return credential
    return settings.db.parent / "chatd.secret"


def read_keyring(settings: Settings) -> Keyring:
    """Read the keys. Raises UsageError."""
    path = secret_path(settings)
    if not os.path.exists(path):
        raise UsageError(
            f"secret {path}: user {os.geteuid()} finds none; `chatd serve` makes it at "
            "its first start; or name yours with --secret-file, or the database with "
            "--db; or use sudo"
        )
    return Keyring(settings, read_secret(path))


def make_secret(path: Path) -> None:
    """Make chatd's secret if there is none. Only `serve` calls this."""
    if os.path.lexists(path):
        return
    # A full disk must not leave an empty secret.
    with file_errors("secret", path), new_file(path) as partial:
        partial.write_text(secrets.token_urlsafe(48) + "\n", "ascii")
        sync(partial)
    log(INFO, "made_secret", path=path)


# The name of chatd's own listening sockets in systemd's descriptor store. There they
# outlive the process, and their backlog with them: a client that connects during a
# restart waits for the next process.
KEPT = "chatd"


def passed_sockets() -> tuple[list[socket.socket], list[socket.socket]]:
    """Take the sockets that systemd passed (sd_listen_fds(3)).

    Returns those of a socket unit, and those that the last process kept. The variables
    are removed: the sockets are passed only once. Raises UsageError.
    """
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, called = (os.environ.pop(name, "") for name in names)
    given: list[socket.socket] = []
    kept: list[socket.socket] = []
    if pid != str(os.getpid()) or not count.isdigit():
        return given, kept
    fd_names = dict(enumerate(called.split(":"), 3))
    for fd in range(3, 3 + int(count)):
        name = fd_names.get(fd)
        sockets = kept if name == KEPT else given
        with suppress(OSError):
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sockets is kept or (listens and sock.type == socket.SOCK_STREAM):
                sockets.append(sock)
                continue
        raise UsageError(
            f"LISTEN_FDS: descriptor {fd} ({name}) is no listening stream socket; "
            "write ListenStream=HOST:PORT, or a path, into the socket unit"
        )
    return given, kept


async def open_listeners(listen: Iterable[str]) -> list[trio.SocketListener]:
    """Listen on the socket unit's sockets, else on these. Raises UsageError.

    The last process's sockets are used again where they fit; all sockets are kept for
    the next one.
    """
    given, kept = passed_sockets()
    own = await _listen_at(() if given else listen, kept)
    if own:
        notify(f"FDSTORE=1\nFDNAME={KEPT}", [sock.fileno() for sock in own])
    return [
        trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        for sock in given or own
    ]


async def _listen_at(
    listen: Iterable[str], kept: Sequence[socket.socket]
) -> list[socket.socket]:
    """Listen on every place; use kept sockets where they fit. Raises UsageError.

    A name may have addresses that this machine lacks (::1 without IPv6): one is enough.
    """
    # A place is a family, and a path or what getsockname(2) returns for TCP.
    places: dict[tuple[int, Any], str] = {}  # its --listen
    sockets = []
    try:
        # Unix sockets come last: a failed start should leave no file.
        for text in sorted(listen, key=lambda text: text.startswith("unix:")):
            if text.startswith("unix:"):
                path = os.path.realpath(text[5:])  # noqa: ASYNC240
                places[socket.AF_UNIX, path] = text
                continue
            host, _, port = text.rpartition(":")
            for family, *_, at in await trio.socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM
            ):
                places[family, at] = text
        again = {at: sock for at in places for sock in kept if _is_at(sock, *at)}
        _forget({*kept} - {*again.values()})
        for place, text in [*places.items()]:
            try:
                sockets.append(again.get(place) or _bind(*place))
            except OSError as error:
                lacks = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if not lacks or [*places.values()].count(text) == 1:
                    raise
                del places[place]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--listen {text}: {error.args[-1]}; choose a free port, from 1024 on, on "
            "an address of this machine, or a free name in a folder that chatd may "
            "write to"
        ) from error
    return sockets


def _bind(family: int, at: Any) -> socket.socket:
    """Listen at a place. [::] takes IPv4, too, as Linux has it. Raises OSError.

    A Unix socket gets the mode 0660 and its folder's group, if chatd is in it. A file
    on which nobody accepts is replaced.
    """
    path = Path(at) if family == socket.AF_UNIX else None
    if path and path.is_socket():
        with socket.socket(family) as probe:
            probe.setblocking(False)
            if probe.connect_ex(at) == errno.ECONNREFUSED:
                path.unlink()
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(at)
        if path:
            path.chmod(0o660)
            with suppress(PermissionError):
                os.chown(path, -1, path.parent.stat().st_gid)
        sock.listen(65_535)  # or as many as net.core.somaxconn allows
    except OSError:
        sock.close()
        raise
    return sock


def _is_at(sock: socket.socket, family: int, at: Any) -> bool:
    """Does the socket listen there? Port 0 means any port."""
    if family == socket.AF_UNIX and not Path(at).is_socket():
        return False  # somebody has removed the file
    name = sock.getsockname()
    same: bool = name == at or (at[1] == 0 and name[0] == at[0])
    return same and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _forget(kept: Collection[socket.socket]) -> None:
    """Close kept sockets that no longer fit, systemd's copies too.

    shutdown(2) ends the listening at once, in every process that has it, so its port
    is free for a socket on another address.
    """
    for sock in kept:
        with suppress(OSError), sock:
            sock.shutdown(socket.SHUT_RDWR)
    if kept:
        notify(f"FDSTOREREMOVE=1\nFDNAME={KEPT}")


def url_of(listener: trio.SocketListener) -> str:
    """Write where a socket listens: as a URL, or as unix:PATH."""
    name = listener.socket.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_demo(settings: Settings) -> None:
    """Serve a temporary database with two users and a chat; print their links."""
    with tempfile.TemporaryDirectory(prefix="chatd-demo-") as folder:
        settings = dataclasses.replace(
            settings, db=Path(folder) / "chatd.db", secret_file=None
        )
        people = {1: "Anna", 2: "Ben"}
        with closing(Store(settings)) as store:
            chats = Chats(store)
            for user_id, name in people.items():
                store.commit_now(chats.rename, user_id, name)
            store.commit_now(chats.create_chat, NewChat([*people], "Demo"))

        def ready(url: str) -> None:
            announce(url)
            keyring, base = read_keyring(settings), page_url(url.split())
            for user_id, name in people.items():
                token = keyring.sign(user_id, LINK_SECONDS, use="signin")
                mention(f"{name + ':':6}{base}/#token={token}")
            upstream = base.removeprefix("http://")
            mention(
                f"""\
Open each link in a tab of its own. Ctrl-C ends the demo and removes
its files. With chatd proxy in front, the links work at its port too:
chatd proxy --upstream {upstream} --secret-file {secret_path(settings)}"""
            )

        serve(settings, ready)


def page_url(listen: Iterable[str]) -> str:
    """Make the page's URL on this machine, from the first TCP address of these."""
    addresses = [*listen, *Settings.listen]
    address = next(each for each in addresses if not each.startswith("unix:"))
    every = r"(?<=//)(0\.0\.0\.0|\[::])(?=:)"
    return re.sub(every, "localhost", f"http://{address.removeprefix('http://')}")


def announce(url: str) -> None:
    """Print the line that scripts wait for: the server is ready."""
    mention(f"listening on {url}")


def mention(text: str) -> None:
    """Print, if stdout can be written: the line matters less than what chatd does."""
    with suppress(UsageError):
        print_result(text)


def print_result(text: str) -> None:
    """Print what was asked for. Raises UsageError if stdout is closed, full or gone."""
    try:
        if sys.stderr.isatty():
            sys.stderr.write(CLEAR)
        with open(1, "wb", closefd=False) as stdout:
            stdout.write(os.fsencode(f"{text}\n"))
    except OSError as error:
        raise UsageError(f"stdout: {error.strerror}: not all was printed") from error


@contextmanager
def reading(what: str, path: Path) -> Iterator[Db]:
    """Open a database of chatd for reading. Any error is a UsageError."""
    with file_errors(what, path):
        check_not_emptied(path)
        path.open("rb").close()  # says better than SQLite what is wrong
        if (pid := holder(path)) and not wal_of(path).exists():
            # A hard link: the WAL with the newest messages has the other name.
            raise UsageError(
                f"{what} {path}: process {pid} uses it by another name; take that one"
            )
        with closing(open_database(path, alone=True)) as db:
            if not examine(what, path, db):
                raise UsageError(f"{what} {path}: it is empty")
            yield db


def copy_database(what: str, source: Path, target: Path, change: str = "") -> str:
    """Copy a database, as of one moment, into a new file, and sync it.

    change is SQL to run on the copy. Returns the copy's CONTENTS. The copy is checked,
    as `chatd check` would, so a damaged source never becomes a backup. Raises
    UsageError; the caller removes the target then.
    """
    with reading(what, source) as db:
        try:
            # One transaction: after a commit between two steps SQLite would begin anew.
            db.executescript("BEGIN; SELECT * FROM meta")
            with closing(sqlite3.connect(target)) as to:
                db.backup(to, pages=1024, progress=progress(source))
                to.executescript(f"PRAGMA journal_mode = DELETE; {change}")
            sync(target)
            sync(target.parent)  # if that fails, then before the copy has its name
            with closing(open_database(target)) as copy:
                if found := faults(copy):
                    raise Damage(found[0])
                contents: str = query_value(copy, CONTENTS)
        except (sqlite3.Error, OSError) as error:
            if type(error) is Damage:
                raise
            raise UsageError(
                f"{what} {source}: copying failed in {target.parent}: {error}"
            ) from error
    return contents


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Make a file, for this user alone, that gets the name path when it is complete.

    Yields its name until then. It is removed if there is an error before.
    """
    partial = Path(f"{path}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(0o600, exist_ok=False)
        yield partial
        partial.rename(path)
        sync(path.parent)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file, and what SQLite may have made beside it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        with suppress(OSError):  # an error before this one says more
            os.unlink(f"{path}{suffix}")


def sync(path: Path) -> None:
    """Put a file on the disk, or what a folder says of its files."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def backup(db: Path, dest: Path, keep: int = 0) -> None:
    """Copy the database, also while it is served. Earlier acks are all in the copy.

    With keep, dest is a folder: the copy is named by its time, and all but the newest
    `keep` of its kind are removed, once it is on disk and was found to be sound. Prints
    the name of the copy. Raises UsageError and leaves all older copies and no new file.
    """
    older: list[Path] = []
    if keep:
        for left in dest.glob("chatd-*Z.db.*.partial*"):
            remove(left)  # of a backup that was killed
        older = sorted(
            filter(Path.is_file, dest.glob("chatd-????????T??????Z.db")), reverse=True
        )
        name, moment = "chatd-%Y%m%dT%H%M%SZ.db", int(time.time())
        # Names are in the order of making, whatever the clock is or was: a copy from
        # when it was ahead does not stay the newest one.
        with suppress(IndexError, ValueError):
            newest = calendar.timegm(time.strptime(older[0].name, name))
            moment = max(moment, newest + 1)
        dest /= time.strftime(name, time.gmtime(moment))
    if os.path.lexists(dest):
        raise UsageError(
            f"backup {dest}: it exists; name a new file, or a folder with --keep COUNT"
        )
    with file_errors("backup", dest), new_file(dest) as partial:
        copy_database("database", db, partial)
    mention(str(dest))
    for path in older[keep - 1 :]:
        with file_errors("backup", path):
            path.unlink()


def restore(db: Path, source: Path) -> None:
    """Put a backup in the database's place, with a new epoch: clients resync."""
    path = Path(os.path.realpath(db))
    with locked(db) as new, file_errors("database", db), new_file(path) as partial:
        epoch = f"UPDATE meta SET value = {NEW_EPOCH} WHERE key = 'epoch'"
        contents = copy_database("restore", source, partial, epoch)
        partial.chmod(path.stat().st_mode)
        keep_owner(path, partial)
        # The old WAL must not meet the new file. Closing a sound old database folds its
        # WAL in; that of a damaged one is lost with it.
        with suppress(sqlite3.Error):
            open_database(path, readonly=False).close()
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        new.clear()
    mention(f"{path}: restored from {source}: {contents}. Every client will resync.")


# Why ?1, a user, or ?2, a chat, cannot be exported.
NO_EXPORT = """
SELECT CASE
    WHEN user_version < 2 THEN 'an older chatd made it; `chatd serve` upgrades it'
    WHEN ?1 IS NOT NULL AND ?1 NOT IN (SELECT id FROM user)
        THEN 'it does not know user ' || ?1
    WHEN ?2 IS NOT NULL AND ?2 NOT IN (SELECT id FROM chat)
        THEN 'it has no chat ' || ?2 END
FROM pragma_user_version
"""

# JSON for each user, chat and message, with the fields of the API. Of a user: the user,
# its chats, and what it has sent. Of a chat: its members, the chat, and its messages.
# json_patch leaves out what is NULL.
EXPORT = f"""
SELECT json_object('user', json_object('user_id', u.id, 'name', name))
FROM user u LEFT JOIN user_name a ON a.id = u.name_id
WHERE (?1 IS NULL OR u.id = ?1)
  AND (?2 IS NULL OR u.id IN (SELECT user_id FROM member WHERE chat_id = ?2))
UNION ALL
SELECT json_object('chat', json_object(
    'id', id, 'title', title,
    'members', json((
        SELECT json_group_array(json_object(
            'user_id', b.user_id, 'name', a.name, 'read_n', b.read_n))
        FROM member b JOIN user u ON u.id = b.user_id
            LEFT JOIN user_name a ON a.id = u.name_id
        WHERE b.chat_id = chat.id)),
    'last_n', last_n,
    'direct', json(iif(direct_key IS NULL, 'false', 'true')),
    'created_by', created_by,
    'member_count', (SELECT count(*) FROM member WHERE chat_id = chat.id),
    'created_at', strftime('%Y-%m-%dT%H:%M:%SZ', created_at, 'unixepoch')))
FROM chat
WHERE (?2 IS NULL OR id = ?2)
  AND (?1 IS NULL OR id IN (SELECT chat_id FROM member WHERE user_id = ?1))
UNION ALL
SELECT json_object('message', json_patch('{{}}', json_object(
    'id', id, 'chat_id', chat_id, 'sender_id', sender_id,
    'content', coalesce(newest.content, m.content),
    'created_at', strftime('%Y-%m-%dT%H:%M:%SZ', created_at, 'unixepoch'),
    'n', n, 'client_id', iif(client_id >= ' ', client_id, NULL), 'rev', rev,
    'edited_at', strftime('%Y-%m-%dT%H:%M:%SZ', edited_at, 'unixepoch'),
    'deleted', iif(deleted, json('true'), NULL))))
FROM message m {NEWEST_CHANGE}
WHERE (?2 IS NULL OR chat_id = ?2) AND (?1 IS NULL OR sender_id = ?1)
"""


def export(path: Path, *which: int | None) -> None:
    """Print what is stored, of one user or of one chat or all. Raises UsageError.

    It is one statement, so it shows one moment, also while the database is served.
    """
    with reading("database", path) as db:
        if why := query_value(db, NO_EXPORT, *which):
            raise UsageError(f"database {path}: {why}")
        lines = db.execute(EXPORT, which)
        while some := lines.fetchmany(500):
            print_result("\n".join(map("".join, some)))


def faults(db: Db) -> list[str]:
    """Return what is wrong in a database, a sentence each; empty if it is sound."""
    sql = FAULTS if query_value(db, "PRAGMA user_version") < 2 else FAULTS + FAULTS_2
    return [" ".join(sentence.split()) for (sentence,) in db.execute(sql)]


# SQL that says in words what is in a database.
CONTENTS = """
SELECT (SELECT count(*) FROM user) || ' users, ' || (SELECT count(*) FROM chat) ||
    ' chats, ' || count(*) || ' messages' || coalesce(', the newest of ' ||
    strftime('%Y-%m-%dT%H:%M:%SZ', max(created_at), 'unixepoch'), '') FROM message
"""

# SQL that says in words what breaks a rule: each SELECT is a rule that every database
# of chatd obeys.
FAULTS = f"""
SELECT printf('integrity: %s', integrity_check) FROM pragma_integrity_check
    WHERE integrity_check != 'ok'
UNION ALL
SELECT printf('epoch: %s of them', count(*)) FROM meta WHERE key = 'epoch'
    HAVING count(*) != 1
UNION ALL
SELECT printf('table %s, row %s: refers to a missing %s',
        "table", ifnull(rowid, '?'), parent)
    FROM pragma_foreign_key_check
UNION ALL
SELECT printf('seq: %s events, but the last seq is %s', count(*), max(seq)) FROM event
    HAVING count(*) != coalesce(max(seq), 0)
UNION ALL
SELECT printf('event %s: of the unknown kind %s', seq, kind) FROM event
    WHERE kind NOT IN {tuple(KINDS)}
UNION ALL
SELECT printf('n: chat %s has %s messages, but the last n is %s',
        chat_id, count(*), max(n))
    FROM message GROUP BY chat_id HAVING count(*) != max(n) OR min(n) != 1
UNION ALL
SELECT printf('message %s: it has no event', m.id) FROM message m
    LEFT JOIN event e ON e.seq = m.id AND e.kind = 'new_message'
        AND e.message_id = m.id AND e.chat_id = m.chat_id
    WHERE e.seq IS NULL
UNION ALL
SELECT printf('user %s has read more of chat %s than there is', b.user_id, b.chat_id)
    FROM member b WHERE b.read_n >
        (SELECT coalesce(max(n), 0) FROM message m WHERE m.chat_id = b.chat_id)
"""
# Those that hold from version 2 of the schema on.
FAULTS_2 = """
UNION ALL
SELECT printf('chat %s: last_n is %s, but its newest message has another n', id, last_n)
    FROM chat WHERE last_n !=
        (SELECT coalesce(max(n), 0) FROM message WHERE chat_id = chat.id)
UNION ALL
SELECT printf('chat %s: it is direct, but user %s is a member', c.id, b.user_id)
    FROM chat c JOIN member b ON b.chat_id = c.id WHERE c.direct_key LIKE '%:%'
        AND ':' || c.direct_key || ':' NOT LIKE '%:' || b.user_id || ':%'
UNION ALL
SELECT printf('chat %s: it is direct, but its key is %s', id, direct_key) FROM chat
    WHERE direct_key NOT LIKE '%_:_%' AND direct_key != id
UNION ALL
SELECT printf('chat %s: it is direct, but it has a title', id) FROM chat
    WHERE direct_key IS NOT NULL AND title IS NOT NULL
UNION ALL
SELECT printf('change %s of message %s: it has no event', c.rev, c.message_id)
    FROM change c LEFT JOIN event e ON e.seq = c.rev AND e.message_id = c.message_id
    WHERE e.seq IS NULL
UNION ALL
SELECT printf('message %s: it was changed and still has its old text', m.id)
    FROM message m WHERE m.content >= char(1)
        AND m.id IN (SELECT message_id FROM change)
"""

# =====================================================================================
# SETTINGS AND COMMAND LINE
#
# Everything that can be set, but for the proxy's --upstream, is a field of Settings. A
# flag has a unit, default, reason and consequence there: variables, `--help` and the
# table in the documentation come from it. `main` is the whole program.
# =====================================================================================


def flag(default: Any, unit: str, why: str, over: str = "") -> Any:
    """Make a setting a flag: its unit, what it is for, and what happens beyond it."""
    metadata = {"unit": unit, "why": why, "over": over}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set.

    `--help` and the CHATD_... variables are made from it.
    """

    # fmt: off
    listen: tuple[str, ...] = flag(("127.0.0.1:8086",), "ADDRESS",
        "the listening address: HOST:PORT, [IPV6]:PORT or unix:PATH. A name stands for "
        "all its addresses on this machine, [::] for all addresses, IPv4 too; port 0 "
        "is any free port; may be given several times")
    db: Path = flag(Path("chatd.db"), "FILE",
        "the database; under systemd $STATE_DIRECTORY/chatd.db")
    secret_file: Path | None = flag(None, "FILE",
        "chatd's own signing secret; else the credential chatd.secret of systemd, "
        "else the file chatd.secret beside the database")
    jwt_key: tuple[Path, ...] = flag((), "FILE",
        "also trust tokens signed with this key: a PEM public key (RS256, ES256, "
        "EdDSA), otherwise a shared secret (HS256); may be given several times")
    issuer: str | None = flag(None, "ISS",
        "the iss that tokens signed with a --jwt-key must have",
        "otherwise: token_invalid")
    audience: str | None = flag(None, "AUD",
        "the aud that tokens signed with a --jwt-key must have",
        "otherwise: token_invalid")
    origin: tuple[str, ...] = flag((), "ORIGIN",
        "pages of this origin may use chatd too; may be given several times",
        "other origins: 403")
    trusted_proxy: tuple[str, ...] = flag(("127.0.0.0/8", "::1"), "CIDR",
        "proxies whose X-Forwarded-For is trusted, or none; may be given several "
        "times")
    chats_by: str = flag("user", "WHO",
        "who may create and change chats: user or service",
        "others: forbidden")
    invites: str = flag("off", "SWITCH",
        "whether members of a group may invite anyone with a link: on or off; on needs "
        "--chats-by user and no --jwt-key, and users add only people that they share a "
        "chat with", "off: forbidden")
    edit_seconds: float = flag(86_400, "SECONDS/never",
        "how long after sending a user may edit and delete a message; never: without "
        "end; 0: not at all",
        "after it: too_late")
    log_level: str = flag("info", "LEVEL",
        "what to log: debug, info, warning or error")
    sends: Rate = flag(Rate(5, 20), "RATE/BURST",
        "messages and changes a second per user, so that no user floods a chat",
        "over it: rate_limited")
    commands: Rate = flag(Rate(30, 60), "RATE/BURST",
        "commands a second per connection",
        "over it: rate_limited; 4008 after 100 refused in a row")
    typing: Rate = flag(Rate(1, 5), "RATE/BURST",
        "typing signs a second per user and chat", "over it: dropped")
    handshakes: Rate = flag(Rate(10, 50), "RATE/BURST",
        "upgrades and 401s a second per address (IPv6: per /64)", "over it: 429")
    requests: Rate = flag(Rate(20, 100), "RATE/BURST",
        "HTTP requests a second per user", "over it: 429")
    receive_bytes: Rate = flag(Rate(65536, 524288), "RATE/BURST",
        "bytes a second per connection, so that a flood meets TCP, not the CPU",
        "over it: reading waits")
    max_connections: int = flag(10_000, "COUNT",
        "open sockets; raise the limit of open files to this plus 256",
        "over it: 503 overloaded")
    connections_per_user: int = flag(20, "COUNT",
        "open sockets per user, so that one page cannot use up all", "over it: 4504")
    max_message_bytes: int = flag(65_536, "BYTES",
        "the size of a message on a socket, or of a request's body",
        "over it: 1009, 413")
    max_content_chars: int = flag(4_000, "CHARACTERS",
        "the length of a message's content", "over it: bad_field")
    drain_seconds: float = flag(5, "SECONDS",
        "the time that a stop may take", "after it: open connections are cut")
    check_bytes: int = flag(33_554_432, "BYTES",
        "the size of a database that is checked for damage at the start",
        "a larger one is not checked, and the log says so; run chatd check")

    # Not flags: an operator should not have to think of them. Tests set them.

    # Unsent bytes of one connection, before the batch that crosses this line. Over it
    # the seat is no longer live: it reads the event log when its outbox is empty.
    outbox_bytes: int = 262_144
    fragments: int = 64  # of one message; over it: 1009
    # Missed events of one user. Over it, loading the chats anew is cheaper: resync.
    resync_events: int = 5_000
    page_events: int = 500  # in a page of the event log
    page_bytes: int = 131_072
    # Then a search stops and says where. Its steps take a fiftieth, with pauses.
    search_seconds: float = 0.05
    tail_events: int = 16_384
    tail_bytes: int = 16_777_216
    batch_jobs: int = 512  # in one transaction, so that none takes long
    batch_events: int = 2_000  # in one transaction
    # Members of a chat: each new member gets an event. Over it: bad_field.
    members: int = 5_000
    large_chat: int = 50  # members; over it the read marks go to the reader only
    # A text that was edited or deleted may be in the WAL for so long, and for some
    # seconds. The documentation promises 60.
    erase_seconds: float = 30.0
    known_tokens: int = 4_096  # that were verified; the least recently used goes


FlagParser = Callable[[str], Any]  # reads a flag's text


def parser(
    what: str, pattern: str = ".*", read: FlagParser = str, most: float | None = None
) -> FlagParser:
    """Make a function that reads the text of a flag.

    The text has to match the pattern, read may raise ValueError, and a number has to be
    from 0 to most; the error says what was wanted.
    """

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if re.fullmatch(pattern, text):
                value = read(text)
                if most is None or 0 <= value <= most:
                    return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


def _rate(text: str) -> Rate:
    rate, _, burst = text.partition("/")
    per_second, at_once = float(rate), float(burst or 0)
    if per_second == 0:
        return Rate(0, 0)
    if 0 < per_second < math.inf and 1 <= at_once < math.inf:
        return Rate(per_second, at_once)
    raise ValueError


def _ttl(text: str) -> int:
    seconds = {"m": 60, "h": 3600, "d": 86400}.get(text[-1], 1)
    return int(text.rstrip("smhd")) * seconds


def _network(text: str) -> str:
    if text != "none":
        ipaddress.ip_network(text)
    return text


def _origin(text: str) -> str:
    """Write an origin as browsers do: without its default port, the host in ASCII."""
    parts = urllib.parse.urlsplit(text)
    host, port = parts.hostname, f":{parts.port}" if parts.port else ""
    if not host:  # null, file://
        return short_origin(text)
    if ":" in host:
        host = f"[{ipaddress.IPv6Address(host)}]"
    elif not host.isascii():
        host = idna.encode(host, uts46=True).decode()
    return short_origin(f"{parts.scheme}://{host}{port}")  # the port was :0443


def _listen(text: str) -> str:
    if not text.startswith("unix:") and int(text.rpartition(":")[2]) > 65535:
        raise ValueError
    return text


COUNT = "0*[1-9][0-9]{0,15}"
parse_count = parser("a whole number above 0", COUNT, int)
parse_listen = parser(
    "an address, such as 127.0.0.1:8086, [::1]:8086, unix:PATH (at most 107 bytes), or "
    "[::]:8086 for all addresses",
    r"unix:[^@].{0,106}|(\[\S+\]|[^][:/@*\s]+):[0-9]{1,5}",
    _listen,
)
parse_id = parser(f"an id, a number from 1 to {MAX_ID}", COUNT, int, MAX_ID)
parse_ttl = parser(
    "a time of at most 100 years, such as 30d, 12h, 15m or 90s",
    "0*[1-9][0-9]{0,9}[smhd]?",
    _ttl,
    100 * 366 * 86400,
)
parse_base = parser(
    "the page's address, such as https://chat.example.org",
    r"https?://[^/?#\s@]+(/[^?#\s]*)?",
)
parse_scope = parser(
    "a scope: service, stats, or both",
    r"\s*(service|stats)(\s+(service|stats))*\s*",
    lambda text: " ".join(text.split()),
)

# The parser of a flag's text, by the flag's unit.
PARSERS: dict[str, FlagParser] = {
    "ADDRESS": parse_listen,
    "FILE": Path,
    "ISS": str,
    "AUD": str,
    "ORIGIN": parser(
        "an origin: write SCHEME://HOST or SCHEME://HOST:PORT without a path, user or "
        "*, such as https://shop.example.org, capacitor://localhost of an app, or null",
        r"""(?xi) null | (?!wss?:|ftp:|https?://(?:[:/]|\Z)) [a-z][a-z0-9+.-]* ://
            ([\w.-]* | \[[0-9a-f:.]+]) (:0*[1-9][0-9]*)? /?""",
        _origin,
    ),
    "CIDR": parser("a network, such as 10.0.0.0/8, or none", read=_network),
    "WHO": parser("one of user, service", "user|service"),
    "SWITCH": parser("one of on, off", "on|off"),
    "LEVEL": parser("one of debug, info, warning, error", "debug|info|warning|error"),
    "RATE/BURST": parser("RATE/BURST, such as 5/20, or 0 for no limit", read=_rate),
    "COUNT": parse_count,
    "BYTES": parse_count,
    "CHARACTERS": parse_count,
    "SECONDS/never": parser(
        "a whole number of seconds, of at most 10 digits, or never",
        "never|[0-9]{1,10}",
        lambda text: math.inf if text == "never" else int(text),
    ),
    "SECONDS": parser(
        "a number of seconds, 0 or more", read=float, most=sys.float_info.max
    ),
}


# The settings that are flags.
FLAGS = [field for field in dataclasses.fields(Settings) if field.metadata]


def shown(value: object) -> str:
    """Write a default value as a person would type it."""
    return " ".join(map(str, value)) if type(value) is tuple else str(value or "")


def variable(name: str) -> str:
    """Read an environment variable. A blank one counts as unset, and both are "".

    Compose files and scripts write `NAME=${NAME:-}`, which sets it to nothing.
    """
    return os.environ.get(name, "").strip()


def add_flags(parser: argparse.ArgumentParser, *names: str, **defaults: object) -> None:
    """Add the flags of all settings, or of those named, or with other defaults."""
    parser.set_defaults(defaults=defaults, refuse=parser.error)
    for field in FLAGS:
        if names and field.name not in names:
            continue
        unit, why, over = field.metadata.values()
        over = over and f"; {over}"
        default = shown(defaults.get(field.name, field.default))
        default = default and f" (default {default})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            metavar=unit,
            action="append",
            help=f"{why}{over}{default}",
        )


def read_settings(options: argparse.Namespace) -> Settings:
    """Read each setting from its flag, else from CHATD_NAME, else use the default."""
    chosen: dict[str, Any] = dict(options.defaults)
    if folders := variable("STATE_DIRECTORY"):
        chosen["db"] = Path(folders.split(":")[0]) / "chatd.db"
    for field in FLAGS:
        name = f"CHATD_{field.name.upper()}"
        where = f"argument --{field.name.replace('_', '-')}"
        texts = [*filter(str.strip, getattr(options, field.name, None) or ())]
        several = type(field.default) is tuple
        if not texts and (text := variable(name)):
            where, texts = f"environment {name}", text.split() if several else [text]
        try:
            values = tuple(map(PARSERS[field.metadata["unit"]], texts))
        except argparse.ArgumentTypeError as error:
            options.refuse(f"{where}: {error}")
        if values:
            chosen[field.name] = values if several else values[-1]
    return Settings(**chosen)


def tell_unknown_variables() -> None:
    """Warn of CHATD_ variables that no setting has: one may be misspelt."""
    known = {"CHATD_UPSTREAM", *(f"CHATD_{field.name.upper()}" for field in FLAGS)}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("CHATD_") and variable(name):
            log(WARNING, "unknown_variable", name=name)


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
    serving.add_argument(
        "--demo", action="store_true", help="try it: two users, a chat, no traces"
    )
    add_flags(serving)

    proxying = commands.add_parser(
        "proxy", help="check tokens in front of another chatd", epilog=too
    )
    proxying.add_argument(
        "--upstream",
        metavar="ADDRESS",
        type=parse_listen,
        default=variable("CHATD_UPSTREAM") or Settings.listen[0],
        help=f"where that chatd listens (default {Settings.listen[0]})",
    )
    # It trusts no X-Forwarded-For header, unless it is told of a proxy before it.
    add_flags(
        proxying, *PROXY_FLAGS, listen=("127.0.0.1:3000",), trusted_proxy=("none",)
    )

    token = commands.add_parser("token", help="print a token, or a sign-in link")
    add = token.add_argument
    add("USER_ID", type=parse_id)
    add("--name", help="what others see")
    add(
        "--ttl",
        metavar="TIME",
        type=parse_ttl,
        help="how long it is good: 30d, 12h, 15m, 90s (default 30d; a link 1d)",
    )
    add = token.add_mutually_exclusive_group().add_argument  # a link has no scopes
    add("--scope", type=parse_scope, help="service, stats")
    add(
        "--link",
        metavar="BASE",
        nargs="?",
        const=True,
        type=parse_base,
        help="a sign-in link to the page at BASE (default: at the address of --listen)",
    )
    add_flags(token, "db", "secret_file", "listen")

    copy = commands.add_parser("backup", help="copy the database, also while it serves")
    copy.add_argument("DEST", type=Path)
    copy.add_argument(
        "--keep",
        metavar="COUNT",
        type=parse_count,
        default=0,
        help="DEST is a folder: name the copy by its time, keep the newest COUNT",
    )
    add_flags(copy, "db")

    put = commands.add_parser(
        "restore", help="put a backup in the database's place; stop chatd before"
    )
    put.add_argument("SRC", type=Path)
    add_flags(put, "db")

    lines = commands.add_parser("export", help="print what is stored, as JSON lines")
    add = lines.add_mutually_exclusive_group().add_argument
    for what in ("user", "chat"):
        add(
            f"--{what}",
            metavar="ID",
            type=parse_id,
            help=f"only what belongs to this {what}",
        )
    add_flags(lines, "db")

    add_flags(
        commands.add_parser("check", help="look whether the database is sound"), "db"
    )
    return parser


def print_token(settings: Settings, options: argparse.Namespace) -> None:
    """Print a token, or a link with it, and nothing else.

    The link signs its user in, any number of times until it expires.
    """
    keyring = read_keyring(settings)
    # Elsewhere than at the server there is no database, and nothing to look up.
    with suppress(UsageError), reading("database", settings.db) as db:
        keyring.revoked |= db.execute(REVOKED)
    base = options.link
    token = keyring.sign(
        options.USER_ID,
        options.ttl or (LINK_SECONDS if base else SESSION_SECONDS),
        use="signin" if base else None,
        name=clean_name(options.name),
        scope=options.scope,
    )
    if base is True:
        base = page_url(settings.listen)
    print_result(f"{base.rstrip('/')}/#token={token}" if base else token)


def end_with_a_sentence() -> None:
    """Let a signal end a command in an orderly way, so that no partial file is left."""

    def end(number: int, _frame: object) -> None:
        raise UsageError(f"ended by {signal.Signals(number).name}, before it was done")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)


def print_check(path: Path) -> None:
    """Print that a database is sound, or raise UsageError with all that is wrong."""
    with reading("database", path) as db:
        found, contents = faults(db), query_value(db, CONTENTS)
    if found:
        raise UsageError("\n       ".join([f"database {path}:", *found]))
    print_result(f"{path}: ok: {contents}")


def fill_standard_streams() -> None:
    """Let no file or socket get the number of a standard stream that is closed.

    To write to stdout then fails, as if it were closed still.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (for the process)
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(fd)


def main(argv: Sequence[str] | None = None) -> int:  # noqa: PLR0912 (an arm each)
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong use."""
    fill_standard_streams()
    options = make_parser().parse_args(argv)
    settings = read_settings(options)
    set_up_log(settings.log_level)
    tell_unknown_variables()
    end_with_a_sentence()
    status = 0
    try:
        match options.command:
            case "serve" if options.demo and options.db is not None:
                options.refuse("--demo has a database of its own: leave --db away")
            case "serve" if settings.invites == "on" and (
                settings.jwt_key or settings.chats_by != "user"
            ):
                options.refuse(
                    "--invites on: not with --jwt-key or --chats-by service, nor with "
                    "their CHATD_ variables: then the backend says who is in a chat"
                )
            case "serve" if options.demo:
                serve_demo(settings)
            case "serve":
                serve(settings, announce)
            case "proxy":
                proxy(settings, options.upstream)
            case "token":
                print_token(settings, options)
            case "backup":
                backup(settings.db, options.DEST, options.keep)
            case "restore":
                restore(settings.db, options.SRC)
            case "export":
                export(settings.db, options.user, options.chat)
            case "check":
                print_check(settings.db)
    except* Exception as group:
        status = 1
        start = "<3>" if in_journal() else ""  # the priority, as in JournalFormatter
        for error in leaves(group):
            if isinstance(error, UsageError):
                sentence = f"{start}chatd: {error}".replace("\n", f"\n{start}")
                print(sentence, file=sys.stderr)
            else:  # a bug in what all connections share
                log_bug("crashed", error)
    return status


if __name__ == "__main__":
    sys.exit(main())
