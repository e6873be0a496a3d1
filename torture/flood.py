"""Floods cost bounded memory, work and log lines, and honest clients are served.

The server has its default limits. Attackers flood it in one way after another: with
pings, messages, edits, searches, joins, empty fragments, heads and bodies that never
end, heads in single bytes, and 10,000 connections that send nothing. All the while two
honest clients send messages to each other and new ones connect; like real ones they
have other addresses than the attackers. Each flood costs a bounded amount of memory. A
flood that the pacing of its connections holds back costs a bounded share of a
processor.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import trio
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
    reset,
    run_trio,
    text,
    until,
    upgrade_request,
)

CLAIM = (
    "a flood costs bounded memory and work, and honest clients are served all the time"
)
MIB = 2**20
CROWD = 10_400  # more than --max-connections and the connections that wait beside it


class Cost(NamedTuple):
    """The cost of a flood to the server."""

    name: str
    sent_bytes: int  # that the kernel accepted from the attackers
    memory_bytes: int  # the largest growth
    processor: float  # the share of one processor after the first burst
    slowest_seconds: float  # the longest that an honest client waited


class HonestClients:
    """Two clients that send each other messages, and others that connect."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.anna, self.ben = Client(chatd, 1), Client(chatd, 2)
        self.slowest = 0.0  # seconds, during the present flood
        self.slowest_ever = 0.0
        self.pings = self.messages = self.newcomers = 0

    async def run(  # noqa: ASYNC114 (only ever given to nursery.start)
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Send pings and messages until cancelled."""
        chat = await make_chat(self.chatd, [1, 2])
        await self.anna.connect()
        await self.ben.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.ben.receive_until_closed)
            nursery.start_soon(self.connect_newcomers)
            task_status.started()
            while True:
                began = time.monotonic()
                assert (await self.anna.ask("ping", 30))["type"] == "pong"
                self.record(time.monotonic() - began)
                self.pings += 1
                if self.pings % 5 == 0:  # well below --sends
                    await self.anna.send(chat, text())
                    self.messages += 1
                await trio.sleep(0.1)

    def record(self, seconds: float) -> None:
        """Record how long a client waited."""
        self.slowest = max(self.slowest, seconds)
        self.slowest_ever = max(self.slowest_ever, seconds)

    async def connect_newcomers(self) -> None:
        """Connect a new client every second, which sends a ping and asks /healthz."""
        for user in range(100, 1_000_000):
            began = time.monotonic()
            async with Client(self.chatd, user) as client:
                assert (await client.ask("ping", 30))["type"] == "pong"
            self.record(time.monotonic() - began)
            assert (await http(self.chatd, "GET", "/healthz")).status == 200
            self.newcomers += 1
            await trio.sleep(1)

    def check(self) -> None:
        """Verify that Ben received all that Anna sent, in order."""
        numbers = [event["message"]["n"] for event in self.ben.events]
        count = len(numbers)
        assert numbers == list(range(1, count + 1)), "ben received out of order"
        assert count >= self.messages - 2, f"ben received {count} of {self.messages}"


# --- the floods ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def dial(chatd: Chatd, address: str) -> AsyncIterator[trio.SocketStream]:
    """Connect from an address of the loopback network; end with RST.

    Without the RST the kernel would go on sending what it has accepted, for minutes.
    """
    with trio.socket.socket() as sock:
        await sock.bind((address, 0))
        await sock.connect(("127.0.0.1", chatd.port))
        stream = trio.SocketStream(sock)
        try:
            yield stream
        finally:
            reset(stream)


async def pour(stream: trio.SocketStream, data: bytes, sent: list[int]) -> None:
    """Send data again and again, as fast as possible, until the connection ends."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while True:
            for start in range(0, len(data), 65536):
                piece = view[start : start + 65536]
                while piece:
                    count = await stream.socket.send(piece)
                    sent[0] += count
                    piece = piece[count:]


async def read_all(stream: trio.SocketStream) -> None:
    """Read and discard."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        while await stream.receive_some(65536):
            pass


class Flood:
    """Connections that all send the same: first once, then data without end.

    upgrades: a handshake comes before that. reads: the attacker reads what comes back.
    """

    def __init__(
        self,
        chatd: Chatd,
        data: bytes,
        *,
        first: bytes = b"",
        upgrades: bool = True,
        reads: bool = False,
    ) -> None:
        self.chatd = chatd
        self.data = data
        self.first = first
        self.upgrades = upgrades
        self.reads = reads
        self.sent = [0]  # bytes, of all connections

    async def attack(self, number: int) -> None:
        """Flood through one connection after another, with this user and address."""
        user = 2_000_000 + number
        address = f"127.0.1.{1 + number}"
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with dial(self.chatd, address) as stream:
                    await self.through(stream, user)
            await trio.sleep(0.05)

    async def through(self, stream: trio.SocketStream, user: int) -> None:
        """Flood through one connection until it ends."""
        head = b""
        if self.upgrades:
            head = upgrade_request(f"/ws/chat?token={self.chatd.token(user)}")
        await stream.send_all(head + self.first)
        async with trio.open_nursery() as nursery:
            if self.reads:
                nursery.start_soon(read_all, stream)
            await pour(stream, self.data, self.sent)
            nursery.cancel_scope.cancel()


class Heads(Flood):
    """Heads in packets of one byte, up to the limit of their size."""

    async def through(self, stream: trio.SocketStream, user: int) -> None:
        """Send one head of 16 KiB, byte by byte."""
        option = (trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY)
        stream.setsockopt(*option, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 16_384:
            self.sent[0] += await stream.socket.send(bytes((byte,)))


async def measure(
    chatd: Chatd,
    honest: HonestClients,
    name: str,
    flood: Flood,
    attackers: int,
    seconds: float,
) -> Cost:
    """Let attackers flood for some seconds; return the cost."""
    honest.slowest = 0.0
    before, most = chatd.rss_bytes(), 0
    async with trio.open_nursery() as nursery:
        for number in range(attackers):
            nursery.start_soon(flood.attack, number)
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


async def silent_crowd(chatd: Chatd, honest: HonestClients, size: int) -> Cost:
    """Open so many connections and send nothing; chatd closes each after 10 s."""
    honest.slowest = 0.0
    before, files, most, peak = chatd.rss_bytes(), chatd.descriptors(), 0, 0
    left = iter(range(size))
    async with contextlib.AsyncExitStack() as stay, trio.open_nursery() as nursery:

        async def connect() -> None:
            for number in left:
                address = f"127.0.2.{1 + number % 200}"
                await stay.enter_async_context(dial(chatd, address))

        async def watch() -> None:
            nonlocal most, peak
            while True:
                most = max(most, chatd.rss_bytes() - before)
                peak = max(peak, chatd.descriptors() - files)
                await trio.sleep(0.2)

        nursery.start_soon(watch)
        async with trio.open_nursery() as connecting:
            for _ in range(32):
                connecting.start_soon(connect)
        # The clients keep their ends open; chatd must close its own.
        assert await until(lambda: chatd.descriptors() - files < 100, 60), (
            f"{chatd.descriptors() - files} silent connections are still open"
        )
        nursery.cancel_scope.cancel()
    assert peak > size / 10, f"at most {peak} of {size} were open at the same time"
    return Cost(f"a crowd of {peak:,}", 0, most, 0.0, honest.slowest)


# --- the proof -----------------------------------------------------------------------


def floods(chatd: Chatd) -> dict[str, tuple[Flood, bool]]:
    """The floods by name, and whether pacing holds each back all the time."""

    def many(*frame: bytes) -> bytes:
        return b"".join(frame) * (131_072 // len(b"".join(frame)))

    big = client_frame(BINARY, bytes(65_536))
    ping, pong = client_frame(PING, b""), client_frame(PONG, b"")
    empty = client_frame(0, b"", fin=False)
    body = b"POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
    edit = client_frame(TEXT, b'{"type":"edit_message","message_id":1,"content":"x"}')
    delete = client_frame(TEXT, b'{"type":"delete_message","message_id":1}')
    token = chatd.token(2_000_000)
    search = (
        "GET /api/v1/search?q=x HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    )
    guess = b'{"token":"a.b.c","name":"x"}'
    join = b"POST /api/v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    join %= len(guess), guess
    return {
        "pings whose pongs are not read": (Flood(chatd, many(ping)), True),
        "pings": (Flood(chatd, many(ping), reads=True), True),
        "pongs": (Flood(chatd, many(pong), reads=True), True),
        "messages of 64 KB": (Flood(chatd, big, reads=True), True),
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
        "edits and deletions": (Flood(chatd, many(edit, delete), reads=True), False),
        "searches": (
            Flood(chatd, many(search.encode()), upgrades=False, reads=True), False
        ),
        "joins": (Flood(chatd, many(join), upgrades=False, reads=True), False),
        "heads in single bytes": (Heads(chatd, b"", upgrades=False), False),
    }  # fmt: skip


async def flood_all(chatd: Chatd, honest: HonestClients, full: bool) -> list[Cost]:
    """Run all the floods, one after the other, and then the silent crowd."""
    costs = []
    async with trio.open_nursery() as nursery:
        await nursery.start(honest.run)
        await trio.sleep(1)
        sockets = chatd.open_sockets()
        for name, (flood, paced) in floods(chatd).items():
            seconds, attackers = (12, 20) if full else (1.5, 10)
            cost = await measure(chatd, honest, name, flood, attackers, seconds)
            costs.append(cost)
            # In the quick form the burst that each connection may use is not over.
            if full and paced:
                share = (
                    f"{name}: 20 connections take {cost.processor:.2f} of a processor"
                )
                assert cost.processor < 0.6, share
        # At most one newcomer is connected.
        assert await until(lambda: chatd.open_sockets() <= sockets + 1, 15), (
            f"{chatd.open_sockets() - sockets} sockets stayed after the floods"
        )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        costs.append(await silent_crowd(chatd, honest, min(CROWD, hard - 500)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    honest.check()
    return costs


def prove(full: bool) -> Figures:
    """Run the floods; in the full form with 20 attackers and 12 s for each."""
    with Chatd("--invites=on", rates=True, log_level="info") as chatd:
        honest = HonestClients(chatd)
        costs = run_trio(flood_all, chatd, honest, full, seconds=1200)
        lines = chatd.log_without_traceback().count("\n")
        assert lines < 200, f"{lines} lines in the log"
    *flooded, crowd = costs
    worst = max(flooded, key=lambda cost: cost.memory_bytes)
    growth = worst.memory_bytes / MIB
    assert growth < 64, f"{worst.name}: +{growth:.0f} MiB"
    each = crowd.memory_bytes / max(
        1, int(crowd.name.rpartition(" ")[2].replace(",", ""))
    )
    assert each < 40_000, f"{crowd.name}: {each:.0f} bytes of memory each"
    sent = sum(cost.sent_bytes for cost in flooded)
    return Figures(
        CLAIM,
        f"{len(flooded)} floods of {sent / MIB:,.0f} MiB: memory "
        f"+{growth:.0f} MiB at most ({worst.name}); {crowd.name} silent "
        f"connections: {each / 1024:.0f} KiB each, gone after 10 s; honest clients "
        f"waited {honest.slowest_ever * 1000:.0f} ms at most",
        {
            **{f"processor, {c.name}": round(c.processor, 2) for c in flooded},
            **{f"slowest ms, {c.name}": round(c.slowest_seconds * 1000) for c in costs},
            **{f"memory MiB, {c.name}": round(c.memory_bytes / MIB, 1) for c in costs},
            "newcomers": honest.newcomers,
            "messages": honest.messages,
        },
    )
