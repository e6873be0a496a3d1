"""Floods meet bounds: of memory, of work, of log lines; honest clients are served.

A server with its default limits. Others flood it, one way after another: bytes behind a
handshake and behind a head that never ends, pings that nobody reads, empty fragments
and messages, heads in single bytes, and 10,000 connections that say nothing. All the
while two honest clients talk, and new ones come in; they have another address, as they
would have. Each flood costs a bounded amount of memory, and those that a connection's
pace holds back a bounded share of a processor.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import trio
from attacks import hang_up, open_sockets
from harness import (
    BINARY,
    PING,
    PONG,
    TEXT,
    Chatd,
    Client,
    Figures,
    client_frame,
    http,
    make_chat,
    run_trio,
    text,
    until,
)

CLAIM = (
    "a flood costs bounded memory and work, and honest clients are served all the time"
)
MIB = 2**20
CROWD = 10_400  # more than --max-connections and those who may wait beside


class Cost(NamedTuple):
    """What a flood cost the server."""

    name: str
    sent: int  # bytes that the kernel took from those who flood
    memory: int  # bytes of growth, at most
    processor: float  # share of one, when the first burst was over
    slowest: float  # seconds, for an honest client's ping


class Honest:
    """Two who talk, and others who come, all the while."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.anna, self.ben = Client(chatd, 1), Client(chatd, 2)
        self.slowest = 0.0
        self.slowest_ever = 0.0
        self.pings = self.talks = self.newcomers = 0

    async def run(  # noqa: ASYNC114 (only ever given to nursery.start)
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Talk until cancelled. All that is said is heard, in order."""
        chat = await make_chat(self.chatd, [1, 2])
        await self.anna.connect()
        await self.ben.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.ben.receive_until_closed)
            nursery.start_soon(self.come)
            task_status.started()
            while True:
                began = time.monotonic()
                assert (await self.anna.ask("ping", 30))["type"] == "pong"
                self.note(time.monotonic() - began)
                self.pings += 1
                if self.pings % 5 == 0:  # well below --sends
                    await self.anna.send(chat, text())
                    self.talks += 1
                await trio.sleep(0.1)

    def note(self, seconds: float) -> None:
        """Note how long somebody waited."""
        self.slowest = max(self.slowest, seconds)
        self.slowest_ever = max(self.slowest_ever, seconds)

    async def come(self) -> None:
        """Let a new honest client come every second, and look around."""
        for user in range(100, 1_000_000):
            began = time.monotonic()
            async with Client(self.chatd, user) as client:
                assert (await client.ask("ping", 30))["type"] == "pong"
            self.note(time.monotonic() - began)
            assert (await http(self.chatd, "GET", "/healthz")).status == 200
            self.newcomers += 1
            await trio.sleep(1)

    def check(self) -> None:
        """All that anna said, ben heard."""
        heard = [event["message"]["n"] for event in self.ben.events]
        assert heard == list(range(1, len(heard) + 1)), "ben heard out of order"
        assert len(heard) >= self.talks - 2, f"ben heard {len(heard)} of {self.talks}"


# --- those who flood -----------------------------------------------------------------


@contextlib.asynccontextmanager
async def dial(chatd: Chatd, address: str) -> AsyncIterator[trio.SocketStream]:
    """Connect from an address of the loopback network; end with RST.

    Else the kernel would go on with what was poured into it, for minutes.
    """
    with trio.socket.socket() as sock:
        await sock.bind((address, 0))
        await sock.connect(("127.0.0.1", chatd.port))
        stream = trio.SocketStream(sock)
        try:
            yield stream
        finally:
            hang_up(stream)


async def pour(stream: trio.SocketStream, data: bytes, sent: list[int]) -> None:
    """Send it again and again, as fast as it is taken, until it is not."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while True:
            for start in range(0, len(data), 65536):
                piece = view[start : start + 65536]
                while piece:
                    count = await stream.socket.send(piece)
                    sent[0] += count
                    piece = piece[count:]


async def drink(stream: trio.SocketStream) -> None:
    """Read and forget."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        while await stream.receive_some(65536):
            pass


def upgrade(chatd: Chatd, user: int) -> bytes:
    """A handshake of this user."""
    return (
        f"GET /ws/chat?token={chatd.token(user)} HTTP/1.1\r\nHost: x\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


class Flood:
    """Some connections that pour the same."""

    def __init__(
        self,
        chatd: Chatd,
        data: bytes,
        *,
        first: bytes = b"",
        upgrades: bool = True,
        drinks: bool = False,
    ) -> None:
        self.chatd = chatd
        self.data = data
        self.first = first
        self.upgrades = upgrades
        self.drinks = drinks
        self.sent = [0]

    async def one(self, number: int) -> None:
        """Flood with one connection after another; each is of another user."""
        user = 2_000_000 + number
        address = f"127.0.1.{1 + number}"
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with dial(self.chatd, address) as stream:
                    await self.through(stream, user)
            await trio.sleep(0.05)

    async def through(self, stream: trio.SocketStream, user: int) -> None:
        """Flood through one connection until it is ended."""
        head = upgrade(self.chatd, user) if self.upgrades else b""
        await stream.send_all(head + self.first)
        async with trio.open_nursery() as nursery:
            if self.drinks:
                nursery.start_soon(drink, stream)
            await pour(stream, self.data, self.sent)
            nursery.cancel_scope.cancel()


class Heads(Flood):
    """Heads that come in packets of a byte, up to their bound."""

    async def through(self, stream: trio.SocketStream, user: int) -> None:
        """Send one head of 16 KiB, byte by byte."""
        option = (trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY)
        stream.setsockopt(*option, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 16_384:
            self.sent[0] += await stream.socket.send(bytes((byte,)))


async def measure(
    chatd: Chatd,
    honest: Honest,
    name: str,
    flood: Flood,
    attackers: int,
    seconds: float,
) -> Cost:
    """Let some flood for a while; what it costs."""
    honest.slowest = 0.0
    before, most = chatd.rss_bytes(), 0
    async with trio.open_nursery() as nursery:
        for number in range(attackers):
            nursery.start_soon(flood.one, number)
        start = trio.current_time()
        burst_over = start + seconds / 3
        while trio.current_time() < burst_over:
            await trio.sleep(0.1)
            most = max(most, chatd.rss_bytes() - before)
        began, processor = time.monotonic(), chatd.cpu_seconds()
        while trio.current_time() < start + seconds:
            await trio.sleep(0.1)
            most = max(most, chatd.rss_bytes() - before)
        processor = (chatd.cpu_seconds() - processor) / (time.monotonic() - began)
        nursery.cancel_scope.cancel()
    return Cost(name, flood.sent[0], most, processor, honest.slowest)


async def crowd_in(chatd: Chatd, honest: Honest, size: int) -> Cost:
    """Connect so many, and say nothing; all are gone when their 10 s are over."""
    honest.slowest = 0.0
    before, files, most, peak = chatd.rss_bytes(), chatd.descriptors(), 0, 0
    left = iter(range(size))
    async with contextlib.AsyncExitStack() as stay, trio.open_nursery() as nursery:

        async def connect() -> None:
            for number in left:
                address = f"127.0.2.{1 + number % 200}"
                await stay.enter_async_context(dial(chatd, address))

        async def look() -> None:
            nonlocal most, peak
            while True:
                most = max(most, chatd.rss_bytes() - before)
                peak = max(peak, chatd.descriptors() - files)
                await trio.sleep(0.2)

        nursery.start_soon(look)
        async with trio.open_nursery() as connecting:
            for _ in range(32):
                connecting.start_soon(connect)
        # They keep their ends open; the server does not.
        assert await until(lambda: chatd.descriptors() - files < 100, 60), (
            f"{chatd.descriptors() - files} of a silent crowd are still there"
        )
        nursery.cancel_scope.cancel()
    assert peak > size / 10, f"at most {peak} of {size} were there at the same time"
    return Cost(f"a crowd of {peak:,}", 0, most, 0.0, honest.slowest)


# --- the proof -----------------------------------------------------------------------


def floods(chatd: Chatd) -> dict[str, tuple[Flood, bool]]:
    """The floods, and whether a connection's pace holds them back, on and on."""

    def many(*frame: bytes) -> bytes:
        return b"".join(frame) * (131_072 // len(b"".join(frame)))

    big = client_frame(BINARY, bytes(65_536))
    ping, pong = client_frame(PING, b""), client_frame(PONG, b"")
    empty = client_frame(0, b"", fin=False)
    body = b"POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
    return {
        "pings that are not drunk": (Flood(chatd, many(ping)), True),
        "pings": (Flood(chatd, many(ping), drinks=True), True),
        "pongs": (Flood(chatd, many(pong), drinks=True), True),
        "messages of 64 KB": (Flood(chatd, big, drinks=True), True),
        "empty messages": (Flood(chatd, many(client_frame(TEXT, b""))), False),
        "empty fragments": (
            Flood(chatd, many(empty), first=client_frame(TEXT, b"{", fin=False)),
            False,
        ),
        "a message without end": (
            Flood(chatd, bytes(1_000_000), first=b"\x81\xff\0\0\1" + bytes(9)),
            False,
        ),
        "a head without end": (Flood(chatd, b"y" * 1_000_000, upgrades=False), False),
        "bodies without a token": (
            Flood(chatd, bytes(1_000_000), first=body, upgrades=False), False
        ),
        "heads in single bytes": (Heads(chatd, b"", upgrades=False), False),
    }  # fmt: skip


async def flood_all(chatd: Chatd, honest: Honest, full: bool) -> list[Cost]:
    """Let all the floods come, one after another, then the crowd."""
    costs = []
    async with trio.open_nursery() as nursery:
        await nursery.start(honest.run)
        await trio.sleep(1)
        sockets = open_sockets(chatd)
        for name, (flood, paced) in floods(chatd).items():
            seconds, attackers = (12, 20) if full else (1.5, 10)
            cost = await measure(chatd, honest, name, flood, attackers, seconds)
            costs.append(cost)
            # In the quick form the burst that everybody has is not over.
            if full and paced:
                share = (
                    f"{name}: 20 connections take {cost.processor:.2f} of a processor"
                )
                assert cost.processor < 0.6, share
        # Newcomers are honest: at most one is there at the moment.
        assert await until(lambda: open_sockets(chatd) <= sockets + 1, 15), (
            f"{open_sockets(chatd) - sockets} sockets stayed after the floods"
        )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        costs.append(await crowd_in(chatd, honest, min(CROWD, hard - 500)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    honest.check()
    return costs


def prove(full: bool) -> Figures:
    """Flood; the full form with 20 connections, half a minute each."""
    with Chatd(rates=True, log_level="info") as chatd:
        honest = Honest(chatd)
        costs = run_trio(flood_all, chatd, honest, full, seconds=1200)
        log = chatd.log.read_text(errors="replace")
        assert "Traceback" not in log, f"the log: {log[-2000:]}"
        lines = log.count("\n")
        assert lines < 200, f"{lines} lines in the log"
    *poured, crowd = costs
    worst = max(poured, key=lambda cost: cost.memory)
    bound = 64 * MIB
    assert worst.memory < bound, f"{worst.name}: +{worst.memory / MIB:.0f} MiB"
    each = crowd.memory / max(1, int(crowd.name.rpartition(" ")[2].replace(",", "")))
    assert each < 40_000, f"{crowd.name}: {each:.0f} bytes of memory each"
    sent = sum(cost.sent for cost in poured)
    return Figures(
        CLAIM,
        f"{len(poured)} floods of {sent / MIB:,.0f} MiB: memory "
        f"+{worst.memory / MIB:.0f} MiB at most ({worst.name}); {crowd.name} silent "
        f"connections: {each / 1024:.0f} KiB each, gone after 10 s; honest clients "
        f"waited {honest.slowest_ever * 1000:.0f} ms at most",
        {
            **{f"processor, {c.name}": round(c.processor, 2) for c in poured},
            **{f"slowest ms, {c.name}": round(c.slowest * 1000) for c in costs},
            **{f"memory MiB, {c.name}": round(c.memory / MIB, 1) for c in costs},
            "newcomers": honest.newcomers,
            "messages": honest.talks,
        },
    )
