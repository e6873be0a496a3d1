"""Slow, stalled and silent peers cost the others nothing, and lose nothing.

Three parts share the time, since most of it is waiting. In a room of 200 fifty stop to
read, again and again, while the others' p99 is compared with that of the rounds in
between in which all read. Steady readers take 5 KB a second off a long backlog. And 200
peers are parked in every state that a connection has: each must be gone by the
deadline of its state, as the kernel's table of sockets tells.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from pathlib import Path

import trio
from harness import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Chatd,
    Client,
    Closed,
    Figures,
    WebSocket,
    client_frame,
    http,
    make_chat,
    quantile,
    run_trio,
    text,
    until,
)

CLAIM = (
    "50 stalled clients of 200 delay no other client and get everything; a steady "
    "reader is never cut; a connection that waits in any state is gone at its deadline"
)
SMALL = 4096  # bytes of a receive buffer: the kernel makes it twice that


# --- a room of 200 -------------------------------------------------------------------

ROOM, STALLED = 200, 50
PER_SECOND, ROUND_SECONDS = 25, 3.0
WORDS = "x" * 3000  # a round is twice what the kernel holds for one that stalls


class Peer:
    """One in the room, who reads while its gate is open."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard: list[int] = []  # the n of every message, as they came
        self.late: list[float] = []  # seconds, of the round under way
        self.gate = trio.Event()
        self.gate.set()
        self.sockets = 0

    async def run(self) -> None:
        """Come, with the cursor, and read; come back when the server ends it."""
        while True:
            await self.client.connect()
            self.sockets += 1
            with contextlib.suppress(Closed):
                while True:
                    await self.gate.wait()
                    frame = await self.client.receive(seconds=120)
                    if frame["type"] == "new_message":
                        message = frame["message"]
                        self.heard.append(message["n"])
                        sent = float(message["content"].split()[2])
                        self.late.append(time.monotonic() - sent)

    def stop_reading(self) -> None:
        """Stall, from the next byte on."""
        self.gate = trio.Event()


class Room:
    """200 who hear what one says, 25 times a second."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        users = range(1000, 1000 + ROOM)
        self.peers = [
            Peer(
                Client(
                    chatd,
                    user,
                    remember=False,
                    receive_buffer=SMALL if user < 1000 + STALLED else None,
                )
            )
            for user in users
        ]
        self.stalled, self.others = self.peers[:STALLED], self.peers[STALLED:]
        self.sender = Client(chatd, 1, remember=False)
        self.said = 0
        self.calm: list[float] = []  # p99 of each round in which all read
        self.rough: list[float] = []  # of each in which fifty do not
        self.growth = 0

    async def run(self, rounds: int) -> None:
        """Compare round by round; then let the fifty stall until they are dropped."""
        self.chat = await make_chat(self.chatd, [1, *range(1000, 1000 + ROOM)])
        await self.sender.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sender.receive_until_closed)
            for peer in self.peers:
                nursery.start_soon(peer.run)
            assert await until(lambda: all(peer.sockets for peer in self.peers), 60)
            await self.say(20)
            await self.caught_up(self.peers)
            rss = self.chatd.rss_bytes()
            for number in range(4 * rounds):
                if number >= rounds and self.ratio() <= 2:
                    break  # a busy machine: more rounds tell noise from delay
                self.calm.append(await self.round())
                for peer in self.stalled:
                    peer.stop_reading()
                self.rough.append(await self.round())
                self.growth = max(self.growth, self.chatd.rss_bytes() - rss)
                self.wake()
                await self.caught_up(self.peers)
                changed = [peer for peer in self.peers if peer.sockets != 1]
                assert not changed, f"{len(changed)} were cut within the stall limit"
            await self.be_dropped()
            self.growth = max(self.growth, self.chatd.rss_bytes() - rss)
            nursery.cancel_scope.cancel()
        self.sender.cut()
        for peer in self.peers:
            peer.client.cut()
            assert peer.heard == list(range(1, self.said + 1)), (
                f"user {peer.client.user_id} heard {len(peer.heard)} of {self.said} "
                "messages, or not in order"
            )

    def ratio(self) -> float:
        """How much later the others hear with the fifty stalled: 1.0 is no later.

        Below 5 ms the scheduler of this machine is all that is measured.
        """
        calm, rough = statistics.median(self.calm), statistics.median(self.rough)
        return rough / max(calm, 0.005)

    async def say(self, count: int) -> None:
        """Say so many things, evenly."""
        start = trio.current_time()
        for number in range(count):
            await trio.sleep_until(start + number / PER_SECOND)
            words = f"{text()} {time.monotonic()} {WORDS}"
            await self.sender.send(self.chat, words)
            self.said += 1

    async def round(self) -> float:
        """Talk for some seconds; the p99 of the others, in seconds."""
        for peer in self.others:
            peer.late.clear()
        await self.say(int(PER_SECOND * ROUND_SECONDS))
        await self.caught_up(self.others)
        return quantile(0.99, [late for peer in self.others for late in peer.late])

    async def caught_up(self, peers: list[Peer]) -> None:
        """Wait until they have heard everything."""
        behind = "the rest did not come within 60 s"
        assert await until(
            lambda: all(len(peer.heard) >= self.said for peer in peers), 60
        ), behind

    def wake(self) -> None:
        """Let all read again."""
        for peer in self.stalled:
            peer.gate.set()

    async def be_dropped(self) -> None:
        """Stall until the server gives up; then come back with the cursors."""
        for peer in self.stalled:
            peer.stop_reading()
        path, token = "/api/v1/internal/chat/ws/stats", self.chatd.service_token()
        deadline = trio.current_time() + 70
        while True:
            await self.say(PER_SECOND)
            stats = (await http(self.chatd, "GET", path, token)).json
            stalls = stats["broadcast"]["stalls"]
            if stalls == STALLED:
                break
            assert trio.current_time() < deadline, f"{stalls} of {STALLED} were cut"
        self.wake()
        await self.caught_up(self.peers)
        back = [peer for peer in self.stalled if peer.sockets == 2]
        assert len(back) == STALLED, f"{len(back)} of {STALLED} came back once"
        resyncs = sum(peer.client.resyncs for peer in self.peers)
        assert not resyncs, f"{resyncs} were told to resync"


# --- 5 KB a second -------------------------------------------------------------------


class Steady:
    """One that takes 5 KB a second, in sips, and may never be cut."""

    def __init__(self, chatd: Chatd, user: int, buffer: int | None, sip: int) -> None:
        self.client = Client(chatd, user, receive_buffer=buffer)
        self.sip = sip
        self.cuts = 0
        self.bytes = 0

    async def run(self, chat: int, seconds: float) -> None:
        """Read so many seconds at that pace, then the rest at once; all in order."""
        wanted = self.client.user_id
        await self.client.connect()
        start = trio.current_time()
        while trio.current_time() < start + seconds:
            await self.read()
            await trio.sleep_until(start + self.bytes / 5000)
        while True:
            history = f"/api/v1/chats/{chat}/messages?limit=1"
            chatd, token = self.client.chatd, self.client.token
            last = (await http(chatd, "GET", history, token)).json["messages"][0]["n"]
            try:
                while self.heard() < last:
                    await self.client.receive(seconds=60)
                break
            except Closed:
                await self.back()
        numbers = [event["message"]["n"] for event in self.client.events]
        assert numbers == list(range(1, last + 1)), (
            f"reader {wanted} heard {len(numbers)} of {last}, or not in order"
        )
        self.client.cut()

    def heard(self) -> int:
        """How many messages it has."""
        return len(self.client.events)

    async def read(self) -> None:
        """Take a sip."""
        websocket = self.client.websocket
        assert websocket is not None
        data = b""
        with contextlib.suppress(trio.BrokenResourceError):
            data = await websocket.stream.receive_some(self.sip)
        if not data:
            await self.back()
            return
        self.bytes += len(data)
        websocket.buffer += data
        while frame := websocket.parse_frame():
            opcode, payload = frame
            if opcode == TEXT:
                self.client.handle(json.loads(payload))
            elif opcode == PING:
                await websocket.send(client_frame(PONG, payload))

    async def back(self) -> None:
        """Come back with the cursor after a cut."""
        self.cuts += 1
        await self.client.connect()


# --- parked in every state -----------------------------------------------------------

EACH = 13  # connections in each state


class State:
    """A state to park in, and when its deadline ends it: from, to, in seconds."""

    def __init__(
        self,
        earliest: float,
        latest: float,
        *,
        sends: bytes = b"",
        then: bytes = b"",
        upgraded: bool = False,
        small: bool = False,
        behind: bool = False,
        drips: bool = False,
        pings: bool = False,
    ) -> None:
        self.earliest, self.latest = earliest, latest
        self.sends = sends  # at once; TOKEN and PORT are filled in
        self.then = then  # some seconds later
        self.upgraded = upgraded  # after a handshake
        self.small = small  # with a small receive buffer
        self.behind = behind  # with a cursor from before 600 KB of events
        self.drips = drips  # and then spaces, one a second
        self.pings = pings  # and then pings, one a second


BEARER = b"Host: x\r\nAuthorization: Bearer TOKEN\r\n"
POST = b"POST /api/v1/chats HTTP/1.1\r\n" + BEARER + b"Content-Length: 100\r\n\r\n"
REFUSED = (
    b"GET /ws/chat?token=x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CLOSING = client_frame(CLOSE, b"\x03\xe8")
# A ping comes after 25 s +-10 %, the end 10 s later; the sweeper looks once a second.
SILENT = (22.5 + 10, 27.5 + 10 + 2)
STATES = {
    "no byte": State(10, 10),
    "half a head": State(10, 10, sends=b"GET /healthz HTTP/1.1\r\nHo"),
    "a head by drips": State(10, 10, sends=b"GET /healthz HTTP/1.1\r\nX:", drips=True),
    "a head without its body": State(15, 15, sends=POST),
    "half a body": State(15, 15, sends=POST + b'{"title":'),
    "a body by drips": State(15, 15, sends=POST, drips=True),
    "an answer that is not read": State(
        14, 16, sends=b"GET /api/v1/events?limit=500&cursor=CURSOR HTTP/1.1\r\n"
        + BEARER + b"\r\n", small=True,
    ),
    "a refused handshake": State(0, 1, sends=REFUSED),
    "a bad head": State(0, 1, sends=b"\xff\r\n\r\n"),
    "silent after 101": State(*SILENT, upgraded=True),
    "in a frame's head": State(*SILENT, upgraded=True, sends=b"\x81\xfe\x01"),
    "in a frame": State(*SILENT, upgraded=True, sends=client_frame(TEXT, b"{}")[:-1]),
    "in a message": State(
        *SILENT, upgraded=True, sends=client_frame(TEXT, b"{", fin=False)
    ),
    "closing": State(0, 2, upgraded=True, sends=CLOSING),
    "broken": State(0, 2, upgraded=True, sends=b"\x81\0"),
    "stalled": State(40, 42, upgraded=True, small=True, behind=True),
    "stalled with a large window": State(40, 42, upgraded=True, behind=True),
    "stalled, and pings": State(
        40, 42, upgraded=True, small=True, behind=True, pings=True
    ),
    "stalled, then closing": State(
        8, 18, upgraded=True, small=True, behind=True, then=CLOSING
    ),
}  # fmt: skip
LONG_STATES = {
    "kept alive": State(75, 75, sends=b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
}


def open_ends(port: int) -> set[int]:
    """The ports of the clients whose connections the server still holds open.

    In the kernel's table the row of a socket that its process has closed has inode 0.
    """
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(fields[i].rpartition(":")[2], 16) for i in (1, 2))
        if local == port and fields[9] != "0" and fields[3] != "0A":
            found.add(remote)
    return found


class CarPark:
    """All the parked connections, and when the server ended each."""

    def __init__(self, chatd: Chatd, cursor: str, states: dict[str, State]) -> None:
        self.chatd = chatd
        self.cursor = cursor
        self.states = states
        self.users = 5000
        self.streams: list[trio.SocketStream] = []
        self.dripping: list[tuple[trio.SocketStream, bytes]] = []
        self.parked: dict[int, tuple[str, float]] = {}  # port: the state, since when
        self.slowest = 0.0  # seconds, for an answer of /healthz meanwhile
        self.asked_at = math.inf
        self.took: dict[str, list[float]] = {name: [] for name in states}

    async def run(  # noqa: ASYNC114 (only ever given to nursery.start)
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Park EACH in every state; watch until all are gone, or late."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.ask)
            nursery.start_soon(self.drip)
            for name, state in self.states.items():
                for _ in range(EACH):
                    await self.park(name, state, nursery)
            task_status.started()
            await self.watch()
            nursery.cancel_scope.cancel()
        for stream in self.streams:
            stream.socket.close()

    async def park(self, name: str, state: State, nursery: trio.Nursery) -> None:
        """Bring one connection into a state."""
        self.users += 1
        # A member of the chat with the backlog has something that he does not read.
        member = 20 + self.users % 80
        user = member if state.behind or state.small else self.users
        token = self.chatd.token(user)
        buffer = SMALL if state.small else None
        if state.upgraded:
            target = f"/ws/chat?token={token}"
            target += f"&cursor={self.cursor}" if state.behind else ""
            port = self.chatd.port
            stream = (await WebSocket.open(port, target, receive_buffer=buffer)).stream
        else:
            sock = trio.socket.socket()
            if buffer is not None:
                option = (trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF)
                sock.setsockopt(*option, buffer)
            await sock.connect(("127.0.0.1", self.chatd.port))
            stream = trio.SocketStream(sock)
        data = state.sends.replace(b"TOKEN", token.encode())
        if data:
            await stream.send_all(data.replace(b"CURSOR", self.cursor.encode()))
        self.streams.append(stream)
        since = trio.current_time()
        self.parked[stream.socket.getsockname()[1]] = (name, since)
        if state.drips or state.pings:
            drop = b" " if state.drips else client_frame(PING, b"")
            self.dripping.append((stream, drop))
        if state.then:
            nursery.start_soon(send_later, stream, state.then)

    async def drip(self) -> None:
        """Send a byte or a ping a second where that is the state."""
        while True:
            await trio.sleep(1)
            for stream, drop in self.dripping:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(drop)

    async def ask(self) -> None:
        """Ask how it is, all the while: what that takes, a deadline may be late too."""
        while True:
            self.asked_at = trio.current_time()
            assert (await http(self.chatd, "GET", "/healthz")).status == 200
            self.slowest = max(self.slowest, trio.current_time() - self.asked_at)
            await trio.sleep(0.2)

    async def watch(self) -> None:
        """Note when the server ends each; none may stay."""
        while self.parked:
            await trio.sleep(0.2)
            now, still = trio.current_time(), open_ends(self.chatd.port)
            slack = SLACK + 2 * max(self.slowest, now - self.asked_at)
            for port, (name, since) in list(self.parked.items()):
                latest = self.states[name].latest + slack
                if port not in still:
                    self.took[name].append(now - since)
                    del self.parked[port]
                late = f"{name!r} is still there after {now - since:.1f} s"
                assert now - since < latest, late
        for name, state in self.states.items():
            first = min(self.took[name])
            early = f"{name!r} was ended after {first:.1f} s, before its deadline"
            assert first > state.earliest - 1, early


SLACK = 4.0  # seconds, for a machine that does other things


async def send_later(stream: trio.SocketStream, data: bytes) -> None:
    """Send it in a while."""
    await trio.sleep(3)
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(data)


# --- the proof -----------------------------------------------------------------------


async def make_backlog(chatd: Chatd, count: int) -> tuple[int, str]:
    """A chat of the users 4 to 99 with so many messages; the cursor before them."""
    chat = await make_chat(chatd, range(4, 100))
    async with Client(chatd, 4, remember=False) as writer:
        cursor = writer.connected["cursor"]
        for number in range(count):
            await writer.send(chat, text(WORDS))
            if number % 50 == 49:
                await writer.ask("ping")
        while writer.unacked:
            await writer.receive()
    return chat, str(cursor)


BUFFERS = (SMALL, 16_384, 32_768, None)


async def wait_it_out(
    room: Room, chatd: Chatd, full: bool
) -> tuple[list[Steady], CarPark]:
    """Run the three parts at the same time."""
    seconds = 180.0 if full else 60.0
    chat, cursor = await make_backlog(chatd, 1200 if full else 500)
    readers: list[Steady] = []
    for buffer in BUFFERS:
        for sip in (5000, 500):
            reader = Steady(chatd, 10 + len(readers), buffer, sip)
            reader.client.cursor = cursor
            readers.append(reader)
    park = CarPark(chatd, cursor, STATES | (LONG_STATES if full else {}))
    async with trio.open_nursery() as nursery:
        await nursery.start(park.run)
        for reader in readers:
            nursery.start_soon(reader.run, chat, seconds)
        nursery.start_soon(room.run, 8 if full else 3)
    return readers, park


def prove(full: bool) -> Figures:
    """Run all three parts; the longest wait decides how long it takes."""
    with Chatd(log_level="info") as busy, Chatd(log_level="info") as quiet:
        room = Room(busy)
        readers, park = run_trio(wait_it_out, room, quiet, full, seconds=900)
        for chatd in (busy, quiet):
            log = chatd.log.read_text(errors="replace")
            assert "Traceback" not in log, f"the log: {log[-2000:]}"
    ratio, growth = room.ratio(), room.growth / 2**20
    assert ratio <= 2, (
        f"with {STALLED} stalled the others' p99 is {ratio:.1f} times as long: "
        f"{room.calm} against {room.rough}"
    )
    assert growth < STALLED, f"50 stalled readers cost {growth:.0f} MiB"
    for reader in readers:
        size = reader.client.receive_buffer or "the usual size"
        assert not reader.cuts, f"5 KB a second with a buffer of {size}: it was cut"
    parked = sum(map(len, park.took.values()))
    return Figures(
        CLAIM,
        f"p99 of the others {statistics.median(room.rough) * 1000:.0f} ms with "
        f"{STALLED} of {ROOM} stalled, {statistics.median(room.calm) * 1000:.0f} ms "
        f"without; +{growth:.0f} MiB; {room.said} messages, all received once and in "
        f"order; {len(readers)} readers of 5 KB a second never cut; {parked} "
        f"connections waited in {len(park.took)} states, all gone in time",
        {
            "p99_calm_ms": round(statistics.median(room.calm) * 1000, 1),
            "p99_stalled_ms": round(statistics.median(room.rough) * 1000, 1),
            "rss_growth_mib": round(growth, 1),
            "rounds": len(room.calm),
            "parked": parked,
            "steady_readers": len(readers),
        },
    )
