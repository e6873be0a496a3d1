"""What the tests of more than one file share.

Each part is for one kind of test. The parts look at chatd from further and further
outside:

- Memory: a real Store on a real file, a real Hub and real Seats, without a network. A
  test runs the steps of a batch (transact, publish, page, push) one by one, in any
  order that a scheduler could choose.
- VirtualServer: a real Server behind socket pairs, under virtual time.
- VirtualProxy: the same for a Proxy, between a client and an upstream.
- ServerProcess: a real process with a port and signals, in real time.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast
from urllib.parse import urlencode

import h11
import jwt
import pytest
import trio
import trio.testing
import trio_websocket
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.frame_protocol import FrameProtocol, Opcode

import chatd
from chatd import Job, Keyring, Rate, Refusal, Send, Settings, Store, UsageError
from tests.client import MISTAKE, NO_RATES, WAIT_SECONDS, HttpAnswer, Progress

V = TypeVar("V")


def refusal_of(function: Callable[..., object], *args: object) -> Refusal:
    """Claim that a call raises a Refusal; return it."""
    with pytest.raises(Refusal) as caught:
        function(*args)
    assert caught.value.message
    return caught.value


def usage_error_of(function: Callable[..., object], *args: object) -> str:
    """Claim that a call raises a UsageError of one line; return that line."""
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def words_hear(data: bytes) -> list[tuple[Opcode, Any]]:
    """Read frames with a wsproto client: return (opcode, payload) of each.

    Every frame must be whole.
    """
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(data)
    frames = [*client.received_frames()]
    assert all(frame.frame_finished and frame.message_finished for frame in frames)
    return [(frame.opcode, frame.payload) for frame in frames]


@functools.cache
def new_private_key(kind: str) -> Any:
    """Make a private key of a kind. It is made once, because RSA is slow."""
    match kind:
        case "RS256":
            return rsa.generate_private_key(65537, 2048)
        case "RSA 3072":
            return rsa.generate_private_key(65537, 3072)
        case "RSA 1024":
            return rsa.generate_private_key(65537, 1024)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "P-384":
            return ec.generate_private_key(ec.SECP384R1())
        case "secp256k1":
            return ec.generate_private_key(ec.SECP256K1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


KEY_PARTS = {
    "SubjectPublicKeyInfo": (
        serialization.Encoding.DER,
        serialization.PublicFormat.SubjectPublicKeyInfo,
    ),
    "PKCS 1": (serialization.Encoding.DER, serialization.PublicFormat.PKCS1),
    "OpenSSH": (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
    "a point": (
        serialization.Encoding.X962,
        serialization.PublicFormat.UncompressedPoint,
    ),
}


def jwk_of(private: Any) -> dict[str, Any]:
    algorithms: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (found,) = (a for kind, a in algorithms.items() if isinstance(private, kind))
    jwk: dict[str, Any] = found.to_jwk(private.public_key(), as_dict=True)
    return jwk


def certificate_of(private: Any) -> bytes:
    """Make a certificate of a key, in DER. A throwaway key signs it."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "chat.example")])
    year = datetime.timedelta(days=365)
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + year)
        .sign(new_private_key("ES256"), hashes.SHA256())
    )  # fmt: skip
    return certificate.public_bytes(serialization.Encoding.DER)


# =====================================================================================
# STORE AND HUB: a real Store on a real file, a real Hub, real Seats
#
# MemoryOutbox stands where the network begins. It keeps what is pushed and has a bound.
# Hub and Seat use no more of an outbox than its attributes here. test_outbox.py tests
# the real one.
# =====================================================================================


async def run_inline(
    function: Callable[..., V], *args: object, limiter: trio.CapacityLimiter | None
) -> V:
    """Run a function of the Store without a thread, so that time can be virtual."""
    await trio.lowlevel.checkpoint()
    return function(*args)


def memory_frames(data: bytes) -> list[dict[str, Any]]:
    """Read the JSON messages in these bytes with a wsproto client."""
    return [json.loads(text) for op, text in words_hear(data) if op is Opcode.TEXT]


MemoryWork = tuple[Any, ...]  # a method of the Store for a job, and its arguments


def memory_job(
    work: Callable[..., V],
    *args: object,
    done: Callable[[Any], chatd.Reply | None] = lambda _: None,
    seat: chatd.Seat | None = None,
) -> Job:
    return Job(work, args, done, seat)


class MemoryOutbox:
    """Keeps what is pushed. While it is stuck, its client reads nothing."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.unsent = 0
        self.bound = math.inf
        self.stuck = False
        self.sealed = False
        self.received_at = self.moved_at = 0.0
        self.listening = True

    @property
    def waiting(self) -> bool:
        return self.unsent > 0

    @property
    def full(self) -> bool:
        return self.unsent >= self.bound

    def push(self, frames: bytes, *, always: bool = False) -> bool:
        if self.full and not always:
            return False
        self.taken.append(frames)
        self.unsent += len(frames) if self.stuck else 0
        return True

    def drain(self) -> None:
        self.stuck, self.unsent = False, 0


class MemorySeat:
    """A real Seat, and what its client has received."""

    def __init__(self, user: int = 1) -> None:
        self.outbox = MemoryOutbox()
        self.fell = 0
        self.ended: list[tuple[int, str]] = []
        self.seat = chatd.Seat(
            chatd.Person(user),
            cast(chatd.Outbox, self.outbox),
            catch_up=self._behind,
            end=lambda code, reason: self.ended.append((code, reason)),
        )

    def _behind(self) -> None:
        self.fell += 1

    def received(self) -> list[dict[str, Any]]:
        """Return every message received so far."""
        return [
            message for data in self.outbox.taken for message in memory_frames(data)
        ]

    def seqs(self) -> list[int]:
        """Return the seqs of the events received so far."""
        return [message["seq"] for message in self.received() if "seq" in message]


STORES: list[Store] = []


def memory_store(*args: Any, **more: Any) -> Store:
    """Open a store. It is closed when its test ends, if not before."""
    STORES.append(Store(*args, **more))
    return STORES[-1]


class Memory:
    """A store and a hub, driven step by step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.settings = Settings(db=folder / "chatd.db", **changes)
        self.store = memory_store(self.settings, run_sync=run_inline)
        self.stats = self.store.stats
        self.hub = chatd.Hub(self.store)

    def again(self, **changes: Any) -> Memory:
        """Close the store and open the same file again."""
        self.store.close()
        return Memory(self.settings.db.parent, **changes)

    # --- writing

    def commit(self, *works: MemoryWork) -> chatd.Batch:
        """Run jobs in one transaction; publish nothing."""
        return self.store._transact([memory_job(*work) for work in works])

    def do(self, work: Callable[..., V], *args: object) -> V:
        """Run one job and publish it. Return its result, or raise its Refusal."""
        batch = self.commit((work, *args))
        self.hub.publish(batch)
        outcome = batch.outcomes[0][1]
        if isinstance(outcome, Refusal):
            raise outcome
        return cast(V, outcome)

    def chat(self, *users: int, title: str | None = None) -> int:
        return self.do(self.store.create_chat, title, users).id

    def send(self, chat: int, user: int, text: str = "hi", key: str = "") -> chatd.Sent:
        return cast(chatd.Sent, self.do(*self.sends(chat, user, text, key)))

    def sends(
        self, chat: int, user: int, text: str = "hi", key: str = "", **more: bool
    ) -> MemoryWork:
        """Return the job that sends a message, for `do` or `commit`."""
        send = Send(chat, user, text, key or None)
        return (self.store.send_message, send, *more.values())

    # --- reading

    def read(self, query: Callable[..., V], *args: object) -> V:
        """Run a query, as Store.read does in a thread."""
        return self.store._query(query, *args)

    def page(self, user: int, cursor: int = 0, limit: int = 500) -> chatd.Page:
        return self.read(self.store.events_after, user, cursor, self.hub.head, limit)

    def seqs(self, user: int, cursor: int = 0) -> list[int]:
        """Return the seqs of all events that a user can read after the cursor."""
        return [event.seq for event in self.page(user, cursor).events]

    def my_chats(self, user: int) -> list[chatd.MyChat]:
        return self.read(self.store.my_chats, user, self.hub.head)

    def count(self, table: str) -> int:
        (count,) = self.store._writer.execute(
            f"SELECT count(*) FROM {table}"
        ).fetchone()
        return int(count)

    # --- seats: the steps that Session takes

    def enter(self, user: int) -> MemorySeat:
        """Enter a seat into the hub. Its user's chats are not read yet."""
        made = MemorySeat(user)
        assert self.hub.enter(made.seat, self.hub.head)
        return made

    def greeting(self, user: int, cursor: int | None = None) -> chatd.Greeting:
        upto = self.hub.head
        start = upto if cursor is None else cursor
        return self.read(self.store.greeting, user, upto, start)

    def catch_up(self, made: MemorySeat) -> None:
        """Push a seat the events that it missed, until it is live."""
        seat = made.seat
        while not seat.live:
            if self.hub.in_tail(seat.cursor):
                self.hub.push_tail(seat)
            else:
                limit = self.settings.page_events
                user = seat.person.user_id
                self.hub.push_page(seat, self.page(user, seat.cursor, limit))

    def sit(self, user: int, cursor: int | None = None) -> MemorySeat:
        """Enter a seat and make it live."""
        made = self.enter(user)
        greeting = self.greeting(user, cursor)
        self.hub.set_chats(made.seat.person, greeting.joined)
        made.seat.cursor = self.hub.head if cursor is None else cursor
        self.catch_up(made)
        return made


@contextlib.contextmanager
def memory_with(**changes: Any) -> Iterator[Memory]:
    """Make a Memory with these settings; a property test makes one per example."""
    with tempfile.TemporaryDirectory() as folder:
        made = Memory(Path(folder), **changes)
        try:
            yield made
        finally:
            made.store.close()


def memory_is_sound(memory: Memory) -> None:
    """Claim that event log and messages have no holes and the hub is up to date."""
    db = memory.store._writer
    seqs = [seq for (seq,) in db.execute("SELECT seq FROM event ORDER BY seq")]
    assert seqs == [*range(1, len(seqs) + 1)]
    assert memory.hub.head == memory.store.seq == len(seqs)
    ordinals: dict[int, list[int]] = {}
    for chat, n in db.execute("SELECT chat_id, n FROM message ORDER BY n"):
        ordinals.setdefault(chat, []).append(n)
    assert all(ns == [*range(1, len(ns) + 1)] for ns in ordinals.values())
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []


# =====================================================================================
# SERVER: a real Server behind socket pairs
#
# The Store runs without threads and time is virtual: the clock jumps when every task
# waits. A stall of 40 seconds takes no real time, and every deadline can be asserted.
# @with_server starts the server that a test gets and stops it after the test. So each
# test also claims that a stop ends everything in time, that no seat is left, and that
# the bulkhead caught no exception.
#
# LibraryClient is trio-websocket's own client. RawClient sends and reads bytes, for
# HTTP and for clients that misbehave.
# =====================================================================================


P = ParamSpec("P")
Frame = dict[str, Any]
TEST_SECRET = b"0123456789abcdef0123456789abcdef"
OFF = Rate(0, 0)
SMALL = 4096  # bytes of buffer asked of the kernel; it holds a few thousand more
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class VirtualDisk:
    """The Store's run_sync: without threads, and as slow as a test wants."""

    def __init__(self) -> None:
        self.turning = trio.Event()
        self.turning.set()
        self.holds_reads = False

    def hold(self, *, reads: bool = False) -> None:
        """Delay every commit, or every read, until `go`."""
        self.turning = trio.Event()
        self.holds_reads = reads

    def go(self) -> None:
        self.turning.set()

    async def run_sync(
        self,
        function: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter | None = None,
    ) -> Any:
        await trio.lowlevel.checkpoint()
        one_writer = limiter is not None and limiter.total_tokens == 1
        if one_writer != self.holds_reads:
            await self.turning.wait()
        return function(*args)


class PairListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts what a test offers: one end of a socket pair, or an OSError."""

    def __init__(self) -> None:
        self.offer, self._offered = trio.open_memory_channel[
            trio.SocketStream | OSError
        ](math.inf)

    async def accept(self) -> trio.SocketStream:
        offered = await self._offered.receive()
        if isinstance(offered, OSError):
            raise offered
        return offered

    async def aclose(self) -> None:
        self._offered.close()
        await trio.lowlevel.checkpoint()


def request_bytes(
    method: str, target: str, body: bytes | None = None, /, **headers: str
) -> bytes:
    """Return the bytes of a request. `Some_Name` is the header Some-Name."""
    lines = [f"{method} {target} HTTP/1.1"]
    headers = {"Host": "chat.example"} | headers
    if body is not None:
        headers["Content-Length"] = str(len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (body or b"")


def upgrade_bytes(target: str, **changed: str) -> bytes:
    """Return the bytes of a handshake. A header changed to "" is left out."""
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    } | changed
    given = {name: value for name, value in headers.items() if value}
    return request_bytes("GET", target, None, **given)


def frame_bytes(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True
) -> bytes:
    """Return the bytes of a client's frame. Its mask is zeros."""
    first, mask, size = opcode | (0x80 if fin else 0), 0x80 if masked else 0, b""
    length = len(payload)
    if length > 125:
        size = struct.pack("!H", length)
        length = 126
    if len(payload) > 65535:
        size = struct.pack("!Q", len(payload))
        length = 127
    mask_key = bytes(4) if masked else b""
    return bytes((first, mask | length)) + size + mask_key + payload


def close_bytes(code: int) -> bytes:
    return frame_bytes(CLOSE, struct.pack("!H", code))


def command_bytes(kind: str, **fields: Any) -> bytes:
    return frame_bytes(TEXT, json.dumps({"type": kind, **fields}).encode())


def take_frames(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Remove whole frames of a server from the front of `data`, one by one."""
    while len(data) >= 2:
        assert data[0] & 0x70 == 0, "reserved bits"
        assert data[0] & 0x80, "a fragment"
        assert data[1] < 128, "a server's frame is not masked"
        size, start = data[1], 2
        if size == 126:
            (size,), start = struct.unpack_from("!H", data, 2), 4
        elif size == 127:
            (size,), start = struct.unpack_from("!Q", data, 2), 10
        if len(data) < start + size:
            return
        opcode, payload = data[0] & 15, bytes(data[start : start + size])
        del data[: start + size]
        yield opcode, payload


@contextlib.contextmanager
def taking(least: float, most: float | None = None) -> Iterator[None]:
    """Claim how many virtual seconds the block takes."""
    started = trio.current_time()
    yield
    took = trio.current_time() - started
    assert least - 1e-6 <= took <= (least if most is None else most) + 1e-6


class LibraryClient:
    """A trio-websocket client. The library reads, answers pings, and keeps messages."""

    def __init__(
        self, ws: trio_websocket.WebSocketConnection, stream: trio.SocketStream
    ) -> None:
        self.ws = ws
        self.stream = stream
        self.hello: Frame = {}

    async def send_command(self, kind: str, **fields: Any) -> None:
        await self.ws.send_message(json.dumps({"type": kind, **fields}))

    async def receive(self, kind: str, within: float = 1.0) -> Frame:
        """Return the next message, which must be of this type and come soon."""
        with trio.fail_after(within):
            received: Frame = json.loads(await self.ws.get_message())
        assert received["type"] == kind, received
        return received

    async def ask(self, kind: str, **fields: Any) -> Frame:
        """Send a command and return its answer. Events before it do not matter."""
        await self.send_command(kind, ref="ask", **fields)
        while True:
            with trio.fail_after(1):
                received: Frame = json.loads(await self.ws.get_message())
            if received.get("ref") == "ask":
                return received

    async def refused(self, kind: str, **fields: Any) -> Frame:
        """Send a command that must be refused; return the error."""
        answer = await self.ask(kind, **fields)
        assert answer["type"] == "error", answer
        assert answer["message"]
        return answer

    async def receives_nothing(self, seconds: float = 1.0) -> None:
        with trio.move_on_after(seconds):
            pytest.fail(f"received {await self.ws.get_message()!r}")

    async def end(self, within: float = 1.0) -> tuple[list[Frame], int]:
        """Receive to the end. Return the messages and the close code; disconnect."""
        received = []
        with trio.fail_after(within):
            with contextlib.suppress(trio_websocket.ConnectionClosed):
                while True:
                    received.append(json.loads(await self.ws.get_message()))
        assert self.ws.closed is not None
        self.stream.socket.close()
        await wait_all_tasks_blocked()
        return received, self.ws.closed.code

    async def leave(self, code: int = 1000) -> None:
        await self.ws.aclose(code)


class RawClient:
    """A client's connection in bytes. It reads only in the methods that read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = bytearray()
        self.informed: list[int] = []

    async def send(self, *parts: bytes) -> None:
        await self.stream.send_all(b"".join(parts))

    async def read(self, most: int = 65536) -> bytes:
        data = bytes(await self.stream.receive_some(most))
        self.data += data
        return data

    async def listen(self, seconds: float = 1.0) -> None:
        """Read everything that comes within `seconds`."""
        with trio.move_on_after(seconds):
            while await self.read():
                pass

    # --- HTTP ------------------------------------------------------------------------

    async def answer(self, method: str = "GET", within: float = 1.0) -> HttpAnswer:
        """Read one whole answer to a request of this method."""
        client = h11.Connection(h11.CLIENT)
        client.send(
            h11.Request(
                method=method,
                target="/",
                headers=[("Host", "x"), ("Upgrade", "x"), ("Connection", "upgrade")],
            )
        )
        client.send(h11.EndOfMessage())
        if self.data:
            client.receive_data(bytes(self.data))
        status, headers, body = 0, dict[str, str](), b""
        with trio.fail_after(within):
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await self.read())
                elif isinstance(event, h11.Response | h11.InformationalResponse):
                    status = event.status_code
                    headers = {}
                    for name, value in event.headers:  # RFC 9110 5.3
                        had = headers.get(name.decode())
                        line = value.decode()
                        headers[name.decode()] = f"{had}, {line}" if had else line
                    if status == 100:
                        self.informed.append(status)
                    elif status == 101:
                        break
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    break
        self.data = bytearray(client.trailing_data[0])
        return HttpAnswer(status, headers, body)

    async def ask(
        self, method: str, target: str, body: Any = None, /, **headers: str
    ) -> HttpAnswer:
        """Send a request, with its body as JSON, and read its answer."""
        encoded = None if body is None else json.dumps(body).encode()
        await self.send(request_bytes(method, target, encoded, **headers))
        return await self.answer(method)

    async def ends(self, within: float = 1.0) -> bytes:
        """Read until EOF or a reset; return the data."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.finishes(within)
        return bytes(self.data)

    async def finishes(self, within: float = 1.0) -> bytes:
        """Read until EOF; return the data. A reset raises."""
        with trio.fail_after(within):
            while await self.read():
                pass
        return bytes(self.data)

    async def receives(self, size: int, within: float = 1.0) -> bytes:
        """Read at least `size` bytes; return everything read so far."""
        with trio.fail_after(within):
            while len(self.data) < size:
                assert await self.read(), bytes(self.data)
        return bytes(self.data)

    # --- the socket ------------------------------------------------------------------

    async def frame(self, within: float = 1.0) -> tuple[int, bytes]:
        with trio.fail_after(within):
            while True:
                for frame in take_frames(self.data):
                    return frame
                assert await self.read(), "the connection has ended"

    async def receive(self, kind: str, within: float = 1.0) -> Frame:
        opcode, payload = await self.frame(within)
        received: Frame = json.loads(payload)
        assert (opcode, received["type"]) == (TEXT, kind), received
        return received

    async def close_code(self, within: float = 1.0) -> int:
        """Read the close frame; return its code. Nothing may follow it. Disconnect."""
        opcode, payload = await self.frame(within)
        assert opcode == CLOSE, payload
        assert await self.ends() == b""
        self.stream.socket.close()
        await wait_all_tasks_blocked()
        return int.from_bytes(payload[:2], "big") if payload else 1005


class VirtualServer:
    """A running Server, and ways to connect to it."""

    def __init__(
        self,
        app: chatd.Server,
        listener: PairListener,
        disk: VirtualDisk,
        nursery: trio.Nursery,
    ) -> None:
        self.app = app
        self.store = app.store
        self.listener = listener
        self.finished = trio.Event()  # the server's run has returned
        self.disk = disk
        self.nursery = nursery
        self.errors: dict[str, int] = {}  # what the bulkhead is expected to catch
        self.streams: list[trio.SocketStream] = []  # the clients' ends
        self.ends: list[trio.SocketStream] = []  # the server's

    def dial(
        self,
        *,
        small: bool = False,
        tcp: bool = False,
        receive_buffer: int = 0,
        accepted: bool = True,
    ) -> RawClient:
        """Connect. With `small` the kernel buffers little of what the server writes.

        With `receive_buffer` the connection is TCP, with a window of that many bytes.
        """
        if tcp or receive_buffer:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                theirs = socket.socket()
                if receive_buffer:
                    option = (socket.SOL_SOCKET, socket.SO_RCVBUF)
                    theirs.setsockopt(*option, receive_buffer)
                theirs.connect(listener.getsockname())
                ours, _ = listener.accept()
        else:
            ours, theirs = socket.socketpair()
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        ours.setblocking(False)
        theirs.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        self.streams.append(stream)
        self.ends.append(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            self.listener.offer.send_nowait(self.ends[-1])
        except trio.BrokenResourceError:
            assert not accepted, "the server does not accept"
            ours.close()
        return RawClient(stream)

    def token(self, user_id: int, seconds: float = 3600, **claims: Any) -> str:
        """Sign a token that expires in `seconds` from now."""
        exp = time.time() + seconds
        return self.app.keyring.sign(user_id, 0, **{"exp": exp} | claims)

    def target(
        self, user_id: int = 1, *, token: str = "", cursor: str | None = None
    ) -> str:
        """Return the request target that opens a user's socket."""
        query = {"token": token or self.token(user_id)}
        return "/ws/chat?" + urlencode(
            query if cursor is None else query | {"cursor": cursor}
        )

    async def join(
        self,
        user_id: int,
        *,
        token: str = "",
        cursor: str | None = None,
        hello: bool = True,
    ) -> LibraryClient:
        """Connect a trio-websocket client and receive `connected`."""
        raw = self.dial()
        with trio.fail_after(1):
            ws = await trio_websocket.wrap_client_stream(
                self.nursery,
                raw.stream,
                "chat.example",
                self.target(user_id, token=token, cursor=cursor),
                message_queue_size=10_000,
            )
        peer = LibraryClient(ws, raw.stream)
        if hello:
            peer.hello = await peer.receive("connected")
        return peer

    async def join_raw(
        self,
        user_id: int,
        *,
        small: bool = False,
        receive_buffer: int = 0,
        behind: bytes = b"",
        **where: Any,
    ) -> RawClient:
        """Connect in bytes and receive `connected`. `behind` follows the handshake."""
        raw = self.dial(small=small, receive_buffer=receive_buffer)
        target = self.target(user_id, **where)
        await raw.send(upgrade_bytes(target), behind)
        assert (await raw.answer()).status == 101
        await raw.receive("connected")
        return raw

    async def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        /,
        *,
        user: int = 0,
        token: str = "",
        **headers: str,
    ) -> HttpAnswer:
        """Send a request on a new connection, for this user or with this token."""
        if user:
            token = self.token(user)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        raw = self.dial()
        answer = await raw.ask(method, target, body, **headers)
        raw.stream.socket.close()
        return answer

    async def command(self, method: str, target: str, body: Any = None) -> Any:
        """Send a request as the service, without rates. It must succeed."""
        token = self.token(999, scope="service stats")
        answer = await self.ask(method, target, body, token=token)
        assert answer.status < 300, answer
        return answer.json if answer.body else None

    async def chat(self, *members: int) -> int:
        made = await self.command(
            "POST", "/api/v1/chats", {"member_ids": members, "title": "Tea"}
        )
        return int(made["chat"]["id"])

    async def post(self, chat: int, *contents: str, sender: int = 1) -> list[int]:
        """Send messages over HTTP, one after another; return their ids."""
        raw = self.dial()
        ids = []
        auth = f"Bearer {self.token(999, scope='service')}"
        target = f"/api/v1/chats/{chat}/messages"
        for content in contents:
            body = {"content": content, "sender_id": sender}
            answer = await raw.ask("POST", target, body, Authorization=auth)
            assert answer.status == 201, answer
            ids.append(int(answer.json["message"]["id"]))
        raw.stream.socket.close()
        return ids

    def session(self, user_id: int) -> chatd.Session:
        """Return the only session of a user."""
        (found,) = [s for s in self.app.sessions if s.claims.user_id == user_id]
        return found

    def session_of(self, raw: RawClient) -> chatd.Session:
        """Return the session at the other end of a connection."""
        place = self.streams.index(raw.stream)
        (found,) = [s for s in self.app.sessions if s.outbox.stream is self.ends[place]]
        return found

    async def stats(self) -> Any:
        return await self.command("GET", "/api/v1/internal/chat/ws/stats")

    async def run(  # noqa: ASYNC114, ASYNC128 (the server says `started`)
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Run the server to its end."""
        sockets = [cast("trio.SocketListener", self.listener)]
        await self.app.run(sockets, task_status=task_status)
        self.finished.set()

    async def stop(self) -> None:
        """Stop the server as a signal does. It must end within the drain."""
        self.app.listener.stopping.set()
        with trio.fail_after(self.app.settings.drain_seconds + 0.1):
            await self.finished.wait()

    def check_left(self) -> None:
        """Claim that nothing is left of any connection."""
        app, hub = self.app, self.app.hub
        listener = app.listener
        assert (listener.open, len(app.sessions)) == (0, 0)
        assert not listener.parked
        assert not hub.people
        assert not hub.live_seats
        assert dict(app.stats.errors) == self.errors


@contextlib.asynccontextmanager
async def virtual_server(
    path: Path, store_class: type[chatd.Store], settings: dict[str, Any]
) -> AsyncIterator[VirtualServer]:
    """Run a server for a test, then stop it: every connection must end by itself."""
    chosen = chatd.Settings(db=path / "chat.db", **settings)
    disk = VirtualDisk()
    store = store_class(chosen, run_sync=disk.run_sync)
    try:
        app = chatd.Server(store, chatd.Keyring(chosen, TEST_SECRET))
        listener = PairListener()
        async with trio.open_nursery() as nursery:
            server = VirtualServer(app, listener, disk, nursery)
            await nursery.start(server.run)
            try:
                yield server
                if not server.finished.is_set():
                    await server.stop()
                server.check_left()
            finally:
                for stream in server.streams:
                    stream.socket.close()
                nursery.cancel_scope.cancel()
    finally:
        store.close()


def run_virtual(main: Callable[[], Awaitable[None]], still: float = 0) -> None:
    """Run it under a clock that jumps. A group of one exception is that exception.

    The clock jumps when every task has waited for so many real seconds.
    """
    try:
        trio.run(main, clock=MockClock(autojump_threshold=still))
    except BaseExceptionGroup as group:
        errors = list(chatd.leaves(group))
        raise errors[0] if len(errors) == 1 else group from None


def with_fixture(
    name: str, run: Callable[..., None], test: Callable[..., object]
) -> Callable[..., None]:
    """Let pytest call `run` with this fixture in place of the test's first argument."""
    _, *given = inspect.signature(test).parameters.values()
    fixture = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([fixture, *given])
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def with_server(
    *, store: type[chatd.Store] = chatd.Store, **settings: Any
) -> Callable[
    [Callable[Concatenate[VirtualServer, P], Awaitable[None]]], Callable[..., None]
]:
    """Run a test with a server of these settings, under a clock that jumps."""

    def decorate(
        test: Callable[Concatenate[VirtualServer, P], Awaitable[None]],
    ) -> Callable[..., None]:
        @functools.wraps(test)
        def run(tmp_path: Path, **given: Any) -> None:
            async def main() -> None:
                async with virtual_server(tmp_path, store, settings) as server:
                    await cast("Callable[..., Awaitable[None]]", test)(server, **given)

            run_virtual(main)

        return with_fixture("tmp_path", run, test)

    return decorate


BIG = "x" * 4000  # a few of these fill the kernel's buffer and then the outbox

BAD_HEADS: dict[str, tuple[bytes, int]] = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
    "two slashes": (request_bytes("GET", "//evil.example/healthz"), 400),
    "an absolute target": (request_bytes("GET", "http://x.example/healthz"), 400),
    "an authority": (request_bytes("CONNECT", "x.example:443"), 400),
    "an asterisk": (request_bytes("OPTIONS", "*"), 400),
    "no slash": (request_bytes("GET", "healthz"), 400),
    "a control character in the target": (
        b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400,
    ),
    "a length and chunks": (
        request_bytes("POST", "/healthz", b"0\r\n\r\n", Transfer_Encoding="chunked"),
        400,
    ),
    "two lengths": (
        request_bytes("POST", "/api/v1/chats", b"{}", content_length="3"), 400,
    ),
    "a length of -1": (request_bytes("POST", "/healthz", Content_Length="-1"), 400),
    "another HTTP": (b"GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a Host that is not ASCII": (request_bytes("GET", "/healthz", Host="caf\xe9"), 400),
    "an Origin that is not ASCII": (
        request_bytes("GET", "/healthz", Origin="http://caf\xe9"), 400,
    ),
    "a Connection that is not ASCII": (
        request_bytes("GET", "/healthz", Connection="clos\xe9"), 400,
    ),
    "a query that is not UTF-8": (request_bytes("GET", "/healthz?a=%ff"), 400),
    "a query of 17 fields": (request_bytes("GET", "/?" + "a=1&" * 16 + "a=1"), 400),
    "65 header lines": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 64 + b"\r\n", 431,
    ),
    "a head of 40 KB": (request_bytes("GET", "/healthz", X="x" * 40_000), 431),
    "a target of 40 KB": (request_bytes("GET", "/" + "x" * 40_000), 431),
}  # fmt: skip


class FaultyStore(chatd.Store):
    """A store with bugs."""

    def history(self, *args: Any) -> Any:
        raise ValueError(f"a mistake of ours: {len(args)}")

    def find_sent(self, db: sqlite3.Connection, *args: Any) -> Any:
        if db is not self._writer:
            raise KeyError("a mistake that the library would swallow")
        return super().find_sent(db, *args)

    def missed(self, *args: Any) -> int | None:
        if args[2] == 0:
            raise ValueError("another")
        return super().missed(*args)


# =====================================================================================
# PROXY: a real Proxy between socket pairs, under virtual time
# =====================================================================================


class ProxyUp(NamedTuple):
    """A whole request, as the upstream received it."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """Return the header of that name. It must be there once."""
        (value,) = [value for key, value in self.headers if key == name]
        return value

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.headers}


class VirtualProxy:
    """A running Proxy, its clients, and the upstream that it dials."""

    def __init__(
        self, settings: Settings, log: pytest.LogCaptureFixture | None
    ) -> None:
        keyring = Keyring(settings, TEST_SECRET)
        self.log = log
        self.app = chatd.Proxy(settings, keyring, "chat.example:8086", self._dial)
        self.listener = PairListener()
        self.finished = trio.Event()  # the proxy's run has returned
        self.dials = 0
        self.fault: OSError | None = None  # what dialling raises
        self.hanging = False  # dialling never ends
        self.small = False  # the kernel buffers little between proxy and upstream
        self.errors: dict[str, int] = {}
        self.streams: list[trio.SocketStream] = []
        self._come, self._came = trio.open_memory_channel[RawClient](math.inf)

    def _pair(
        self, *, tcp: bool = False, small: bool = False
    ) -> tuple[trio.SocketStream, RawClient]:
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                theirs = socket.create_connection(listener.getsockname())
                ours, _ = listener.accept()
        else:
            ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            if small:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            sock.setblocking(False)
        streams = [
            trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (ours, theirs)
        ]
        self.streams.append(streams[1])
        return streams[0], RawClient(streams[1])

    async def _dial(self) -> trio.SocketStream:
        self.dials += 1
        await trio.lowlevel.checkpoint()
        if self.hanging:
            await trio.sleep_forever()
        if self.fault is not None:
            raise self.fault
        ours, theirs = self._pair(tcp=not self.small, small=self.small)
        self._come.send_nowait(theirs)
        return ours

    def dial(self, *, small: bool = False, tcp: bool = True) -> RawClient:
        """Connect as a client. TCP has addresses and resets, but needs real time."""
        ours, raw = self._pair(tcp=tcp and not small, small=small)
        self.listener.offer.send_nowait(ours)
        return raw

    async def upstream(self) -> RawClient:
        """Return the next connection that the proxy has made upstream."""
        with trio.fail_after(1):
            return await self._came.receive()

    async def request(self, up: RawClient) -> ProxyUp:
        """Read one whole request as the upstream. What follows it is in `up.data`."""
        side, method, target, version = h11.Connection(h11.SERVER), "", "", ""
        headers: list[tuple[str, str]] = []
        body = b""
        with trio.fail_after(1):
            while True:
                event = side.next_event()
                if event is h11.NEED_DATA:
                    side.receive_data(await up.read())
                elif isinstance(event, h11.Request):
                    method, target = event.method.decode(), event.target.decode()
                    version = event.http_version.decode()
                    headers = [
                        (k.decode(), v.decode("latin-1")) for k, v in event.headers
                    ]
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    break
        await wait_all_tasks_blocked()
        up.data = bytearray(side.trailing_data[0])
        return ProxyUp(method, target, version, headers, body)

    async def run(  # noqa: ASYNC114, ASYNC128 (the listener says `started`)
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Run the proxy to its end."""
        sockets = [cast("trio.SocketListener", self.listener)]
        await self.app.listener.run(sockets, task_status=task_status)
        self.finished.set()

    def target(self, user_id: int = 6, **claims: Any) -> str:
        token = self.app.keyring.sign(user_id, 600, **claims)
        return "/ws/chat?" + urlencode({"token": token})

    async def exchange(
        self, sent: bytes, answer: bytes = b"", method: str = "GET"
    ) -> tuple[ProxyUp, HttpAnswer]:
        """Pass a request up and its answer down. The answer must come unchanged."""
        raw, answer = self.dial(), answer or PROXY_OK
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send, sent)
            up = await self.upstream()
            got = await self.request(up)
        assert up.data == b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.finishes)
            await up.send(answer)
            up.stream.socket.close()
        assert raw.data == answer
        return got, await raw.answer(method)

    async def socket(
        self, *, said: bytes = b"", received: bytes = b"", small: bool = False
    ) -> tuple[RawClient, RawClient]:
        """Open a socket through the proxy; return the client's and upstream's end."""
        raw = self.dial(small=small)
        await raw.send(upgrade_bytes(self.target()), said)
        up = await self.upstream()
        await self.request(up)
        await up.send(PROXY_101, received)
        assert (await raw.answer()).status == 101
        return raw, up

    def check_left(self) -> None:
        """Claim that nothing is left of any connection."""
        proxy = self.app
        listener = proxy.listener
        assert (listener.open, len(proxy.sessions), listener.parked) == (0, 0, {})
        assert dict(listener.stats.errors) == self.errors


PROXY_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PROXY_101 = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


def proxy_run(
    test: Callable[[VirtualProxy], Awaitable[None]],
    log: pytest.LogCaptureFixture | None = None,
    **settings: Any,
) -> None:
    """Run a test with a proxy of these settings, under a clock that jumps."""
    chosen = Settings(**{"trusted_proxy": ("none",)} | settings)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            proxy = VirtualProxy(chosen, log)
            await nursery.start(proxy.run)
            try:
                await test(proxy)
                proxy.app.listener.stopping.set()
                with trio.fail_after(chosen.drain_seconds + 0.1):
                    await proxy.finished.wait()
                proxy.check_left()
            finally:
                for stream in proxy.streams:
                    stream.socket.close()
                nursery.cancel_scope.cancel()

    # Much data over TCP needs real time: up to 40 ms for an acknowledgement.
    run_virtual(main, 0.05)


def proxied(
    **settings: Any,
) -> Callable[
    [Callable[Concatenate[VirtualProxy, P], Awaitable[None]]], Callable[..., None]
]:
    """Run a test with a proxy of these settings. It must log no token."""

    def decorate(
        test: Callable[Concatenate[VirtualProxy, P], Awaitable[None]],
    ) -> Callable[..., None]:
        @functools.wraps(test)
        def run(caplog: pytest.LogCaptureFixture, **given: Any) -> None:
            caplog.set_level(logging.DEBUG, "chatd")
            proxy_run(functools.partial(test, **given), caplog, **settings)
            assert "eyJ" not in caplog.text, "a token in the log"

        return with_fixture("caplog", run, test)

    return decorate


# =====================================================================================
# PROCESS: chatd from outside
#
# A process with a port and signals, in real time. Nothing here looks inside it.
# ServerProcess is a database and the process that serves it; the process can be killed
# and started again. SocketClient is a WebSocket client that does not use the server's
# library. It reads only in `receive` and the methods that call it. A test waits for an
# event (a line, a frame, the end of a process), and every wait has a deadline.
# =====================================================================================


CHECKOUT = Path(chatd.__file__).resolve().parent
UPGRADE_LINES = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
ACCEPT_KEY = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3, for the key above
new_users = itertools.count(1000)  # every test gets users of its own


class Disconnected(Exception):
    """The server ended the connection; `code` is 1006 without a close frame."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code


@dataclass(frozen=True)
class CommandResult:
    """The exit status of a command and what it wrote."""

    status: int
    out: str
    err: str


def split_answer(data: bytes, *, bodiless: bool = False) -> tuple[HttpAnswer, bytes]:
    """Split `data` into the first answer and the rest. EOFError if it is not whole."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        raise EOFError
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    status = int(first.split()[1])
    empty = bodiless or status in {101, 204, 304}
    size = 0 if empty else int(headers["content-length"])
    if len(rest) < size:
        raise EOFError
    return HttpAnswer(status, headers, rest[:size]), rest[size:]


def get_bytes(target: str, *lines: str, version: str = "1.1") -> bytes:
    """Return the bytes of a GET with these header lines."""
    text = "\r\n".join((f"GET {target} HTTP/{version}", *lines, "", ""))
    return text.encode("latin-1")


def client_frame(
    opcode: int, payload: bytes = b"", *, first: int = 0x80, masked: bool = True
) -> bytes:
    """Return the bytes of a client's frame. `first` has FIN and the reserved bits."""
    size, mask = len(payload), 0x80 if masked else 0
    if size < 126:
        head = struct.pack(">BB", first | opcode, mask | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", first | opcode, mask | 126, size)
    else:
        head = struct.pack(">BBQ", first | opcode, mask | 127, size)
    return head + (bytes(4) if masked else b"") + payload  # a mask of zeros


def reset(stream: trio.SocketStream) -> None:
    """Disconnect with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


async def read_rest(stream: trio.SocketStream, seconds: float = WAIT_SECONDS) -> bytes:
    """Read until the server ends the connection, as it must; return the data."""
    data = b""
    with trio.fail_after(seconds), suppress(trio.BrokenResourceError):
        while more := await stream.receive_some(65536):
            data += more
    return data


class SocketClient:
    """A WebSocket client. It reads only in `receive` and the methods that call it."""

    def __init__(self, stream: trio.SocketStream, data: bytes) -> None:
        self.stream = stream
        self.data = bytearray(data)
        self.hello: Frame = {}
        self.pongs: list[bytes] = []
        self.owed = bytearray()  # pongs and a close frame, sent before the next read

    async def send_command(self, kind: str, /, **fields: object) -> None:
        await self.send_frame(json.dumps({"type": kind, **fields}))

    async def send_frame(self, text: str | bytes, opcode: int = 1) -> None:
        payload = text.encode() if isinstance(text, str) else text
        with trio.fail_after(WAIT_SECONDS):
            await self.stream.send_all(client_frame(opcode, payload))

    async def receive(self, kind: str = "", seconds: float = WAIT_SECONDS) -> Frame:
        """Return the next message, which must be of that type. Raises Disconnected."""
        with trio.fail_after(seconds):
            while (frame := self.received()) is None:
                await self.sip(65536)
        assert kind in {"", frame["type"]}, frame
        return frame

    async def find(self, kind: str, seconds: float = WAIT_SECONDS) -> Frame:
        """Return the next message of that type; messages before it do not matter."""
        with trio.fail_after(seconds):
            while (frame := await self.receive(seconds=seconds))["type"] != kind:
                pass
        return frame

    async def receives_nothing(self) -> None:
        """Claim that nothing was on its way: the next message answers a ping."""
        await self.send_command("ping")
        await self.receive("pong")

    async def ask(self, kind: str, /, **fields: object) -> Frame:
        """Send a command and return its answer; other messages do not matter."""
        ref = os.urandom(8).hex()
        await self.send_command(kind, ref=ref, **fields)
        while (frame := await self.receive()).get("ref") != ref:
            pass
        return frame

    async def ended(self, seconds: float = WAIT_SECONDS) -> int:
        """Receive to the end; return the server's close code."""
        with trio.fail_after(seconds):
            while True:
                try:
                    await self.receive(seconds=seconds)
                except Disconnected as gone:
                    return gone.code

    async def leave(self) -> None:
        """Close with 1000, and receive the answer (RFC 6455 7.1)."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(client_frame(8, struct.pack(">H", 1000)))
            assert await self.ended() in {1000, 1006}
        await self.stream.aclose()

    def drop(self) -> None:
        reset(self.stream)

    async def sip(self, size: int) -> None:
        """Read at most `size` bytes."""
        try:
            if self.owed:
                await self.stream.send_all(bytes(self.owed))
                self.owed.clear()
            data = await self.stream.receive_some(size)
        except trio.BrokenResourceError:
            raise Disconnected(1006) from None
        if not data:
            raise Disconnected(1006)
        self.data += data

    def received(self) -> Frame | None:
        """Return the next message of the bytes read, or None if it is not whole."""
        while (frame := self._frame()) is not None:
            opcode, payload = frame
            if opcode == 1:
                message = json.loads(payload)
                assert isinstance(message, dict)
                return message
            if opcode == 8:
                with suppress(trio.BrokenResourceError):
                    self.owed += client_frame(8, payload[:2])
                code = struct.unpack(">H", payload[:2])[0] if payload else 1005
                raise Disconnected(code, payload[2:].decode())
            if opcode == 9:
                self.owed += client_frame(10, payload)
            else:
                assert opcode == 10, frame
                self.pongs.append(payload)
        return None

    def _frame(self) -> tuple[int, bytes] | None:
        """Return the next whole frame: not masked, no fragment, no extension."""
        if len(self.data) < 2:
            return None
        first, size = self.data[:2]
        assert first & 0xF0 == 0x80, bytes(self.data[:64])
        assert size < 0x80, "a server masks nothing"
        start = 2 if size < 126 else 4 if size == 126 else 10
        if len(self.data) < start:
            return None
        if size >= 126:
            size = int.from_bytes(self.data[2:start], "big")
        if len(self.data) < start + size:
            return None
        payload = bytes(self.data[start : start + size])
        del self.data[: start + size]
        return first & 0x0F, payload


class HttpClient:
    """A keep-alive HTTP connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def ask(
        self,
        method: str,
        target: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> HttpAnswer:
        """Send a request, `body` as it is or as JSON; `Some_Name` is Some-Name."""
        lines = {"Host": "chatd.test", **headers}
        if token:
            lines["Authorization"] = f"Bearer {token}"
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines["Content-Length"] = str(len(data))
            lines.setdefault("Content-Type", "application/json")
        head = [f"{name.replace('_', '-')}: {value}" for name, value in lines.items()]
        text = "\r\n".join((f"{method} {target} HTTP/1.1", *head, "", ""))
        with trio.fail_after(WAIT_SECONDS):
            with suppress(trio.BrokenResourceError):  # the server may refuse early
                await self.stream.send_all(text.encode("latin-1") + data)
            return await self.answer(bodiless=method == "HEAD")

    async def answer(self, *, bodiless: bool = False) -> HttpAnswer:
        while True:
            with suppress(EOFError):
                answer, self.data = split_answer(self.data, bodiless=bodiless)
                if answer.status != 100:
                    return answer
                continue
            more = await self.stream.receive_some(65536)
            if not more:
                raise trio.BrokenResourceError(self.data)
            self.data += more


class ServerProcess:
    """A database and, between `begin` and `stop` or `kill`, its server process."""

    verb = "serve"
    open = tuple(NO_RATES)

    def __init__(self, home: Path) -> None:
        self.home = home
        self.db = home / "chatd.db"
        self.port = 0
        self.serve: tuple[str, ...] = ("--db", str(self.db))
        self.flags: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.said = ""  # stdout of all processes so far
        self.up = trio.Event()  # set while the server can be reached
        self.streams: list[trio.SocketStream] = []
        self.process: subprocess.Popen[str] | None = None
        self.listener: threading.Thread | None = None

    # ---- the process

    def start(self) -> None:
        """Start the process and block until it prints that it listens."""
        command = [sys.executable, "-m", "chatd", self.verb, *self.serve]
        command += ["--listen", f"127.0.0.1:{self.port}", *self.flags]
        ready = threading.Event()
        with (self.home / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=clean_environment(TMPDIR=str(self.home), **self.environment),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.listener = threading.Thread(
            target=self._listen, args=(self.process.stdout, ready)
        )
        self.listener.start()
        ready.wait(WAIT_SECONDS)
        found = re.findall(r"(?m)^listening on http://127\.0\.0\.1:(\d+)$", self.said)
        if not found or self.process.poll() is not None:
            self.end(signal.SIGKILL)
            pytest.fail(f"it did not start: {self.output}")
        self.port = int(found[-1])

    def _listen(self, stdout: IO[str], ready: threading.Event) -> None:
        with stdout:
            for line in stdout:
                self.said += line
                if line.startswith("listening on "):
                    ready.set()
        ready.set()

    def end(self, signum: int = 0, seconds: float = WAIT_SECONDS) -> int:
        """Send a signal, if one is given, and block until the process has ended."""
        assert self.process is not None
        assert self.listener is not None
        if signum:
            self.process.send_signal(signum)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.listener.join()
            pytest.fail(f"it did not end: {self.output}")
        self.listener.join()
        self.process = None
        return status

    async def begin(self, *flags: str) -> None:
        """Start the process, again on the same port, with these or the same flags."""
        self.flags = flags or self.flags
        await trio.to_thread.run_sync(self.start)
        self.up.set()

    async def ended(self, signum: int = 0, seconds: float = WAIT_SECONDS) -> int:
        self.up = trio.Event()
        return await trio.to_thread.run_sync(self.end, signum, seconds)

    async def kill(self) -> None:
        await self.ended(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop the process with SIGTERM. Its status must be 0 and its log clean."""
        for stream in self.streams:
            stream.socket.close()
        self.streams.clear()
        assert await self.ended(signal.SIGTERM) == 0, self.output
        assert not MISTAKE.search(self.output), self.output

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    @asynccontextmanager
    async def serving(self, *flags: str) -> AsyncIterator[ServerProcess]:
        """Serve during the block, without rates but with `flags`, then stop."""
        await self.begin(*self.open, *flags)
        yield self
        if self.process is not None:
            await self.stop()

    def tidy(self) -> None:
        """Close the clients' connections and kill the process if it still runs."""
        for stream in self.streams:
            stream.socket.close()
        self.streams.clear()
        if self.process is not None:
            self.end(signal.SIGKILL)

    @property
    def output(self) -> str:
        return self.said + (self.home / "stderr").read_text("utf-8", "replace")

    @property
    def rss(self) -> int:
        """The resident memory of the process in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    @property
    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    # ---- tokens

    @property
    def secret(self) -> bytes:
        return self.db.with_name("chatd.secret").read_bytes().strip()

    def token(self, user: int = 0, /, *, key: Any = None, **claims: object) -> str:
        """Sign a token for an hour, with `key` or the secret. None omits a claim."""
        now = int(time.time())
        plain: dict[str, object] = {"iat": now, "exp": now + 3600}
        if user:
            plain["sub"] = str(user)
        plain = {k: v for k, v in {**plain, **claims}.items() if v is not None}
        return jwt.encode(plain, key or self.secret, algorithm="HS256")

    @property
    def service(self) -> str:
        return self.token(1, scope="service")

    @property
    def stats_token(self) -> str:
        return self.token(1, scope="stats")

    # ---- HTTP

    async def dial(self, receive_buffer: int = 0) -> trio.SocketStream:
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            with trio.fail_after(WAIT_SECONDS):
                await sock.connect(("127.0.0.1", self.port))
            stream = trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise
        self.streams.append(stream)
        return stream

    async def ask(
        self,
        method: str,
        target: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> HttpAnswer:
        """Send a request on a new connection; return the answer."""
        stream = await self.dial()
        async with stream:
            return await HttpClient(stream).ask(method, target, token, body, **headers)

    async def want(
        self,
        status: int,
        request: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> Any:
        """Send a request ("GET /healthz"); return its JSON. Claim its status."""
        method, target = request.split(" ", 1)
        answer = await self.ask(method, target, token, body, **headers)
        assert answer.status == status, (request, body, answer)
        return answer.json if answer.body else None

    async def raw(self, data: bytes, seconds: float = WAIT_SECONDS) -> bytes:
        """Send bytes and read until the server disconnects, as it must."""
        stream = await self.dial()
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(data)
            return await read_rest(stream, seconds)

    # ---- WebSocket

    async def knock(
        self, data: bytes, *, receive_buffer: int = 0
    ) -> SocketClient | HttpAnswer:
        """Send a handshake in bytes. Return a client, or the refusal.

        After a refusal the server must disconnect.
        """
        stream = await self.dial(receive_buffer)
        await stream.send_all(data)
        got = b""
        with trio.fail_after(WAIT_SECONDS):
            while b"\r\n\r\n" not in got:
                more = await stream.receive_some(65536)
                if not more:
                    raise trio.BrokenResourceError(got)
                got += more
        if got.startswith(b"HTTP/1.1 101 "):
            answer, rest = split_answer(got)
            assert answer.headers["sec-websocket-accept"] == ACCEPT_KEY
            assert "sec-websocket-extensions" not in answer.headers
            return SocketClient(stream, rest)
        got += await read_rest(stream, 3)  # the server must disconnect
        await stream.aclose()
        answer, rest = split_answer(got)
        assert answer.headers["connection"].lower() == "close", answer
        assert not rest
        return answer

    async def peer(
        self, who: int | str, cursor: str = "", /, *lines: str, receive_buffer: int = 0
    ) -> SocketClient:
        """Open the socket of a user, or of this token."""
        peer = await self.knock(
            get_bytes(
                self.socket_path(who, cursor),
                "Host: chatd.test",
                *UPGRADE_LINES,
                *lines,
            ),
            receive_buffer=receive_buffer,
        )
        assert isinstance(peer, SocketClient), peer
        peer.hello = await peer.receive("connected")
        return peer

    async def refusal(self, who: int | str, /, *lines: str) -> HttpAnswer:
        """Return the answer to an upgrade that must be refused."""
        answer = await self.knock(
            get_bytes(self.socket_path(who), "Host: chatd.test", *UPGRADE_LINES, *lines)
        )
        assert isinstance(answer, HttpAnswer)
        return answer

    def socket_path(self, who: int | str, cursor: str = "") -> str:
        token = self.token(who) if isinstance(who, int) else who
        query = {"token": token, "cursor": cursor} if cursor else {"token": token}
        return f"/ws/chat?{urlencode(query)}"

    # ---- what most tests begin with

    async def chat(self, *members: int, title: str | None = None) -> int:
        body = {"title": title, "member_ids": members}
        got = await self.want(201, "POST /api/v1/chats", self.service, body)
        return int(got["chat"]["id"])

    async def post(self, chat: int, sender: int, content: str) -> Frame:
        """Send a message as the service; return it as it is stored."""
        body = {"content": content, "sender_id": sender}
        target = f"POST /api/v1/chats/{chat}/messages"
        message = (await self.want(201, target, self.service, body))["message"]
        assert isinstance(message, dict)
        return message

    async def cursor(self, user: int) -> str:
        """Return a cursor after everything that has happened."""
        got = await self.want(200, "GET /api/v1/events", self.token(user))
        assert got["events"] == []
        return str(got["cursor"])

    async def log(self, user: int, cursor: str) -> list[Frame]:
        """Poll every event of this user after the cursor."""
        events: list[Frame] = []
        more = True
        while more:
            target = f"GET /api/v1/events?limit=500&cursor={cursor}"
            got = await self.want(200, target, self.token(user))
            assert not got["resync"], got
            events += got["events"]
            cursor, more = got["cursor"], got["more"]
        return events

    async def history(self, chat: int, user: int) -> list[Frame]:
        """Return every message of a chat, oldest first. Claim that `n` has no holes."""
        messages: list[Frame] = []
        before, more = "", True
        while more:
            target = f"GET /api/v1/chats/{chat}/messages?limit=100{before}"
            got = await self.want(200, target, self.token(user))
            messages[:0] = got["messages"]
            before, more = (
                f"&before={messages[0]['id']}" if messages else "",
                got["more"],
            )
        assert [m["n"] for m in messages] == list(range(1, len(messages) + 1))
        return messages

    async def stats(self) -> Any:
        target = "GET /api/v1/internal/chat/ws/stats"
        return await self.want(200, target, self.stats_token)


class ProxyProcess(ServerProcess):
    """A proxy process in front of a server. Its clients reach that server."""

    verb = "proxy"
    open = ("--handshakes=0", "--drain-seconds=2")

    def __init__(self, home: Path, port: int, db: Path) -> None:
        super().__init__(home)
        self.db = db
        self.serve = ("--db", str(db), "--upstream", f"127.0.0.1:{port}")


def clean_environment(**more: str) -> dict[str, str]:
    """Return our environment without the variables that chatd reads.

    The rest must stay: coverage measures child processes by it.
    """
    systemd = ("CREDENTIALS_", "JOURNAL_", "LISTEN_", "NOTIFY_", "STATE_", "WATCHDOG_")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("CHATD_", *systemd))
    }
    return {**kept, **more}


async def run_chatd(*words: object, **environment: str) -> CommandResult:
    """Run a chatd command to its end."""
    done = await trio.run_process(
        [sys.executable, "-m", "chatd", *map(str, words)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=CHECKOUT,
        env=clean_environment(**environment),
    )
    run = CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not MISTAKE.search(run.err), run
    return run


class RepeatingSender:
    """Sends messages in order. Sends again, after a lost connection, until acked."""

    def __init__(self, server: ServerProcess, user: int, texts: list[tuple[int, str]]):
        self.server, self.user = server, user
        name = f"{user}-{next(new_users)}"
        self.left = deque(
            {"chat_id": chat, "content": text, "client_id": f"{name}-{number}"}
            for number, (chat, text) in enumerate(texts)
        )
        self.acks: dict[str, Frame] = {}

    async def send(self, acked: Progress, in_flight: int = 16) -> None:
        while self.left:
            with suppress(OSError, Disconnected, trio.BrokenResourceError):
                peer = await self.server.peer(self.user)
                await self.send_over(peer, acked, in_flight)
                await peer.leave()
            await self.server.up.wait()

    async def send_over(
        self, peer: SocketClient, acked: Progress, in_flight: int = 16
    ) -> None:
        """Send until all are acked, or the connection ends. `left` has no ack yet."""
        waiting = 0
        while self.left:
            for message in list(self.left)[waiting:in_flight]:
                await peer.send_command("send_message", **message)
                waiting += 1
            ack = await peer.find("ack")
            assert ack["client_id"] == self.left.popleft()["client_id"]
            self.acks[ack["client_id"]] = ack
            waiting -= 1
            acked.add()


BULK = "\U0001f600" * 3990  # about 16 KB in UTF-8


async def send_bulk(
    server: ServerProcess, chat: int, user: int, count: int
) -> list[str]:
    """Send `count` large messages, eight in flight; return their texts in order."""
    texts = [f"{i} {BULK}" for i in range(count)]
    peer = await server.peer(user)
    sender = RepeatingSender(server, user, [(chat, text) for text in texts])
    await sender.send_over(peer, Progress(), 8)
    await peer.leave()
    return texts


async def receive_texts(peer: SocketClient, count: int) -> list[str]:
    """Return the texts of the next `count` messages, which must be new messages."""
    received = [await peer.receive("new_message") for _ in range(count)]
    return [frame["message"]["content"] for frame in received]


@asynccontextmanager
async def others_are_served(server: ServerProcess) -> AsyncIterator[None]:
    """Claim that other clients are served before, during and after the block."""
    ann, bob = next(new_users), next(new_users)
    chat = await server.chat(ann, bob)
    before = await server.peer(ann)
    yield
    await before.receives_nothing()
    after = await server.peer(bob)
    await after.send_command("send_message", chat_id=chat, content="still here")
    assert (await before.receive("new_message"))["message"]["content"] == "still here"
    await after.find("ack")
    before.drop()
    after.drop()


def node_path(*flags: str) -> str:
    """Return the path of a Node that knows these flags. Without one: fail in CI."""
    node = shutil.which("node")
    asked = [node or "", *flags, "-e", ""]
    if node and not subprocess.run(asked, capture_output=True, check=False).returncode:
        return node
    why = f"no Node on PATH that knows {flags or 'anything'}: install Node 20 or newer"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


async def refuses_connections(server: ServerProcess) -> None:
    """Claim that the server accepts no connection any more."""
    with pytest.raises(ConnectionRefusedError):
        await server.dial()
