"""What the tests of more than one file share, if it looks inside chatd.

Each part is for one kind of test. The parts look at chatd from further and further
outside:

- Memory: a real Store on a real file, a real Hub and real Seats, without a network. A
  test runs the steps of a batch (transact, publish, page, push) one by one, in any
  order that a scheduler could choose.
- VirtualServer: a real Server behind socket pairs, under virtual time.
- VirtualProxy: the same for a Proxy, between a client and an upstream.

client.py has what comes next: a real process in real time, and the clients in bytes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import json
import logging
import math
import socket
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Self, TypeVar, cast
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
from chatd import (
    Job,
    Keyring,
    NewChat,
    Rate,
    Refusal,
    Send,
    Settings,
    Store,
    UsageError,
)
from tests.client import Frame, HttpAnswer, RawClient, request_bytes, upgrade_bytes

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
    def buffer(self) -> bool:
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


class Greeting(NamedTuple):
    """What Store.greeting returns."""

    joined: dict[int, int]
    marks: dict[str, chatd.Marks]
    missed: int | None


class Memory:
    """A store and a hub, driven step by step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.settings = Settings(db=folder / "chatd.db", **changes)
        self.store = memory_store(self.settings, run_sync=run_inline)
        self.chats = chatd.Chats(self.store)
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
        return self.do(self.chats.create_chat, NewChat([*users], title))[0]

    def send(self, chat: int, user: int, text: str = "hi", key: str = "") -> chatd.Sent:
        return cast(chatd.Sent, self.do(*self.sends(chat, user, text, key)))

    def sends(
        self, chat: int, user: int, text: str = "hi", key: str = "", **more: bool
    ) -> MemoryWork:
        """Return the job that sends a message, for `do` or `commit`."""
        send = Send(chat, user, text, key or None)
        return (self.store.send_message, send, *more.values())

    def edit(
        self, by: int | None, message: int, text: str, if_rev: int | None = None
    ) -> chatd.Message:
        return self.do(self.chats.change_message, by, message, text, if_rev)

    def delete(self, by: int | None, message: int) -> chatd.Message:
        return self.do(self.chats.change_message, by, message)

    def files(self) -> bytes:
        """Read all bytes of the database's files."""
        wal = self.store.wal
        return self.store.path.read_bytes() + (
            wal.read_bytes() if wal.exists() else b""
        )

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
        return self.read(self.chats.my_chats, user, self.hub.head, None, None)

    def users(self, by: int | None = None) -> list[Any]:
        invites = self.store.settings.invites
        read = self.read(chatd.query_value, chatd.USERS, by, invites)
        found: list[Any] = json.loads(read)["users"]
        return found

    def count(self, table: str) -> int:
        (count,) = self.store._writer.execute(
            f"SELECT count(*) FROM {table}"
        ).fetchone()
        return int(count)

    # --- seats: the steps that Session takes

    def enter(self, user: int) -> MemorySeat:
        """Enter a seat into the hub. Its user's chats are not read yet."""
        made = MemorySeat(user)
        assert self.hub.enter(made.seat)
        made.seat.cursor = self.hub.head
        return made

    def greeting(self, user: int, cursor: int | None = None) -> Greeting:
        upto = self.hub.head
        start = upto if cursor is None else cursor
        return Greeting(*self.read(self.store.greeting, user, upto, start))

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
# LibraryClient is trio-websocket's own client, which reads all the time. RawClient, for
# HTTP and for clients that misbehave, is the one of client.py.
# =====================================================================================


P = ParamSpec("P")
TEST_SECRET = b"0123456789abcdef0123456789abcdef"
OFF = Rate(0, 0)
SMALL = 4096  # bytes of buffer asked of the kernel; it holds a few thousand more


class VirtualDisk:
    """The Store's run_sync: without threads, and as slow as a test wants."""

    def __init__(self) -> None:
        self.turning = trio.Event()
        self.turning.set()
        self.holds_reads = self.is_done = False

    def hold(self, *, reads: bool = False, done: bool = False) -> None:
        """Delay every commit, or every read, until `go`; or, if done, its end."""
        self.turning = trio.Event()
        self.holds_reads, self.is_done = reads, done

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
        held = one_writer != self.holds_reads
        if held and not self.is_done:
            await self.turning.wait()
        result = function(*args)
        if held and self.is_done:
            await self.turning.wait()
        return result


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


App = TypeVar("App", chatd.Server, chatd.Proxy)


class Virtual(Generic[App]):
    """A running Server or Proxy under virtual time, and how clients reach it."""

    nursery: trio.Nursery

    def __init__(self, app: App) -> None:
        self.app: App = app
        self.listener = PairListener()
        self.finished = trio.Event()  # the app's run has returned
        self.errors: dict[str, int] = {}  # what the bulkhead is expected to catch
        self.streams: list[trio.SocketStream] = []  # the clients' ends

    def connect(
        self, *, tcp: bool = False, receive_buffer: int = 0
    ) -> tuple[trio.SocketStream, RawClient]:
        """Make a connection; return the app's end and the client.

        With `receive_buffer` it is TCP, with a window of that many bytes.
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
        ends = []
        for sock in (ours, theirs):
            sock.setblocking(False)
            ends.append(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        self.streams.append(ends[1])
        return ends[0], RawClient(ends[1], soon=1)

    async def _run(self) -> None:
        app = self.app
        run = app.run if isinstance(app, chatd.Server) else app.listener.run
        await run([cast("trio.SocketListener", self.listener)])
        self.finished.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Run it, then stop it: every connection must end by itself."""
        async with trio.open_nursery() as self.nursery:
            self.nursery.start_soon(self._run)
            try:
                yield self
                if not self.finished.is_set():
                    await self.stop()
                self.check_left()
            finally:
                for stream in self.streams:
                    stream.socket.close()
                self.nursery.cancel_scope.cancel()

    async def stop(self) -> None:
        """Stop it as a signal does. It must end within the drain."""
        self.app.listener.stopping.set()
        with trio.fail_after(self.app.settings.drain_seconds + 0.1):
            await self.finished.wait()

    def check_left(self) -> None:
        """Claim that nothing is left of any connection."""
        listener = self.app.listener
        assert (listener.open, len(self.app.sessions)) == (0, 0)
        assert not listener.parked
        assert dict(listener.stats.errors) == self.errors


class VirtualServer(Virtual[chatd.Server]):
    """A running Server, and ways to connect to it."""

    def __init__(self, app: chatd.Server, disk: VirtualDisk) -> None:
        super().__init__(app)
        self.store = app.store
        self.disk = disk
        self.ends: list[trio.SocketStream] = []  # the server's, as `streams`

    def dial(
        self,
        *,
        small: bool = False,
        tcp: bool = False,
        receive_buffer: int = 0,
        accepted: bool = True,
    ) -> RawClient:
        """Connect. With `small` the kernel buffers little of what the server writes."""
        ours, raw = self.connect(tcp=tcp, receive_buffer=receive_buffer)
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        self.ends.append(ours)
        try:
            self.listener.offer.send_nowait(ours)
        except trio.BrokenResourceError:
            assert not accepted, "the server does not accept"
            ours.socket.close()
        return raw

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
        raw = self.dial()
        answer = await raw.ask(method, target, body, token=token, **headers)
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
        token = self.token(999, scope="service")
        target = f"/api/v1/chats/{chat}/messages"
        for content in contents:
            body = {"content": content, "sender_id": sender}
            answer = await raw.ask("POST", target, body, token=token)
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

    def check_left(self) -> None:
        super().check_left()
        hub = self.app.hub
        assert not hub.people
        assert not hub.live_seats


@contextlib.asynccontextmanager
async def virtual_server(
    path: Path, store_class: type[chatd.Store], settings: dict[str, Any]
) -> AsyncIterator[VirtualServer]:
    """Run a server for a test, with these settings and a store of this class."""
    chosen = Settings(db=path / "chat.db", **settings)
    disk = VirtualDisk()
    store = store_class(chosen, run_sync=disk.run_sync)
    with contextlib.closing(store):
        app = chatd.Server(store, Keyring(chosen, TEST_SECRET))
        async with VirtualServer(app, disk).running() as server:
            yield server


def run_virtual(main: Callable[[], Awaitable[None]], still: float = 0) -> None:
    """Run it under a clock that jumps. A group of one exception is that exception.

    The clock jumps when every task has waited for so many real seconds.
    """
    try:
        trio.run(main, clock=MockClock(autojump_threshold=still))
    except BaseExceptionGroup as group:
        errors = list(chatd.leaves(group))
        raise errors[0] if len(errors) == 1 else group from None


def in_virtual_time(
    fixture: str,
    started: Callable[[Any], AbstractAsyncContextManager[V]],
    still: float = 0,
) -> Callable[[Callable[Concatenate[V, P], Awaitable[None]]], Callable[..., None]]:
    """Run a test with what `started` makes of a fixture, under a clock that jumps.

    pytest sees this fixture in place of the test's first argument.
    """

    def decorate(
        test: Callable[Concatenate[V, P], Awaitable[None]],
    ) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**given: Any) -> None:
            async def main() -> None:
                async with started(given.pop(fixture)) as first:
                    await cast("Callable[..., Awaitable[None]]", test)(first, **given)

            run_virtual(main, still)

        _, *others = inspect.signature(test).parameters.values()
        first = inspect.Parameter(fixture, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([first, *others])
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate


def with_server(
    *, store: type[chatd.Store] = chatd.Store, **settings: Any
) -> Callable[
    [Callable[Concatenate[VirtualServer, P], Awaitable[None]]], Callable[..., None]
]:
    """Run a test with a server of these settings, under a clock that jumps."""
    return in_virtual_time(
        "tmp_path", lambda path: virtual_server(path, store, settings)
    )


BIG = "x" * 4000  # a few of these fill the kernel's buffer and then the outbox

BAD_HEADS: dict[str, tuple[bytes, int]] = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
    "two slashes": (request_bytes("GET", "//evil.example/healthz"), 400),
    "an absolute target with a user": (
        request_bytes("GET", "http://x.example@y.example/healthz"), 400,
    ),
    "an absolute target without a host": (request_bytes("GET", "http:///healthz"), 400),
    "an absolute target of ftp": (request_bytes("GET", "ftp://x.example/"), 400),
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

    async def read(self, query: Callable[..., V], *args: Any) -> V:
        faulty = self.history if query.__name__ == "history" else query
        return await super().read(faulty, *args)

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


class VirtualProxy(Virtual[chatd.Proxy]):
    """A running Proxy, its clients, and the upstream that it dials."""

    def __init__(
        self, settings: Settings, log: pytest.LogCaptureFixture | None
    ) -> None:
        keyring = Keyring(settings, TEST_SECRET)
        upstream = "chat.example:8086"
        super().__init__(chatd.Proxy(settings, keyring, upstream, self._dial))
        self.log = log
        self.dials = 0
        self.fault: OSError | None = None  # what dialling raises
        self.hanging = False  # dialling never ends
        self.small = False  # the kernel buffers little between proxy and upstream
        self._come, self._came = trio.open_memory_channel[RawClient](math.inf)

    def _pair(self, *, tcp: bool, small: bool) -> tuple[trio.SocketStream, RawClient]:
        ours, raw = self.connect(tcp=tcp and not small)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if small else ():
            for stream in (ours, raw.stream):
                stream.setsockopt(socket.SOL_SOCKET, option, SMALL)
        return ours, raw

    async def _dial(self) -> trio.SocketStream:
        self.dials += 1
        await trio.lowlevel.checkpoint()
        if self.hanging:
            await trio.sleep_forever()
        if self.fault is not None:
            raise self.fault
        ours, theirs = self._pair(tcp=True, small=self.small)
        self._come.send_nowait(theirs)
        return ours

    def dial(self, *, small: bool = False, tcp: bool = True) -> RawClient:
        """Connect as a client. TCP has addresses and resets, but needs real time."""
        ours, raw = self._pair(tcp=tcp, small=small)
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


PROXY_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PROXY_101 = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


# Much data over TCP needs real time: up to 40 ms for an acknowledgement.
PROXY_STILL = 0.05


@contextlib.asynccontextmanager
async def virtual_proxy(
    log: pytest.LogCaptureFixture | None, settings: dict[str, Any]
) -> AsyncIterator[VirtualProxy]:
    """Run a proxy for a test, with these settings. It must log no token."""
    chosen = Settings(**{"trusted_proxy": ("none",)} | settings)
    if log:
        log.set_level(logging.DEBUG, "chatd")
    async with VirtualProxy(chosen, log).running() as proxy:
        yield proxy
    assert not log or "eyJ" not in log.text, "a token in the log"


def proxy_run(test: Callable[[VirtualProxy], Awaitable[None]]) -> None:
    """Run a test with a proxy, under a clock that jumps."""

    async def main() -> None:
        async with virtual_proxy(None, {}) as proxy:
            await test(proxy)

    run_virtual(main, PROXY_STILL)


def proxied(
    **settings: Any,
) -> Callable[
    [Callable[Concatenate[VirtualProxy, P], Awaitable[None]]], Callable[..., None]
]:
    """Run a test with a proxy of these settings, under a clock that jumps."""
    return in_virtual_time(
        "caplog", lambda log: virtual_proxy(log, settings), PROXY_STILL
    )
