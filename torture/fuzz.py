"""Noise from thousands of hostile connections ends none but its own.

Noise is what chance makes of real traffic: requests and frames with bits turned, parts
dropped, repeated or swapped, cut anywhere and hung up on in every way; and plain random
bytes. Whatever chatd says to it has to be HTTP, or whole frames with a code of the
protocol. Two innocent clients talk all the while. Then hypothesis makes commands and
bodies with structure, and an independent reading of the protocol says what has to be
answered to each. `--seed` repeats a run.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
import trio
from harness import (
    CLOSE,
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
    save_evidence,
    seeded_rng,
    text,
)
from hypothesis import strategies as st

CLAIM = (
    "hostile noise ends no connection but the one that sends it, and gets the answer "
    "that the protocol has for it"
)
CODES = frozenset((1000, 1001, 1002, 1005, 1007, 1008, 1009, 1012, 1013, 4008, 4401,
                   4503, 4504))  # fmt: skip
ERRORS = frozenset(("bad_json", "bad_field", "unknown_type", "not_found",
                    "token_invalid", "idempotency_mismatch"))  # fmt: skip
Dice = random.Random
MAX_ID = 2**53 - 1


# --- noise ---------------------------------------------------------------------------


class Noise:
    """Makes hostile bytes, by dice, out of traffic that would be right."""

    def __init__(self, chatd: Chatd, chat: int, user: int) -> None:
        self.chat = chat
        self.token = chatd.token(user)
        bearer = f"Host: x\r\nAuthorization: Bearer {self.token}\r\n"
        post = f"/api/v1/chats/{chat}/messages"
        hello = json.dumps({"content": text()})
        self.requests = [
            f"GET / HTTP/1.1\r\n{bearer}\r\n",
            f"GET /api/v1/chats HTTP/1.1\r\n{bearer}\r\n",
            f"GET {post}?limit=5&before=1 HTTP/1.1\r\n{bearer}\r\n",
            f"POST {post} HTTP/1.1\r\n{bearer}Content-Length: {len(hello)}\r\n\r\n"
            f"{hello}",
            f"POST {post} HTTP/1.1\r\n{bearer}Transfer-Encoding: chunked\r\n\r\n"
            f"{len(hello):x}\r\n{hello}\r\n0\r\n\r\n",
            f"OPTIONS {post} HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\n\r\n",
        ]
        self.upgrade = (
            f"GET /ws/chat?token={self.token}&cursor=x.1 HTTP/1.1\r\nHost: x\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        ).encode()

    def command(self, dice: Dice) -> bytes:
        """A command, right or nearly."""
        values: list[Any] = [
            self.chat,
            1,
            0,
            -1,
            2**53,
            1.5,
            True,
            None,
            "x",
            "",
            [],
            {},
            text(),
        ]
        kinds = ["ping", "typing", "mark_read", "send_message", "auth", "hack", 1, None]
        body = {
            "type": dice.choice(kinds),
            "chat_id": dice.choice([self.chat, *values]),
            "is_typing": dice.choice([True, False, *values]),
            "content": dice.choice([text(), *values]),
            "message_id": dice.choice(values),
            "token": dice.choice([self.token, *values]),
            "client_id": dice.choice([None, f"{dice.random()}", *values]),
            "ref": dice.choice([None, "r", *values]),
        }
        for name in list(body):
            if dice.random() < 0.3:
                del body[name]
        return json.dumps(body).encode()

    def frame(self, dice: Dice, *, mild: bool) -> bytes:
        """One frame: of random bytes, of a command, or of what was a command once.

        A mild one does not break the protocol, so that those behind it are read.
        """
        if mild:
            mostly = client_frame(TEXT, self.command(dice))
            return mostly if dice.random() < 0.9 else client_frame(PING, b"p")
        roll = dice.random()
        if roll < 0.35:
            payload = self.command(dice)
            return client_frame(TEXT, payload, fin=dice.random() < 0.95)
        if roll < 0.55:
            return self.mutated(dice, client_frame(TEXT, self.command(dice)))
        payload = dice.randbytes(dice.choice((0, 1, 2, 5, 60, 125, 126, 127, 1000)))
        opcode = dice.choice((0, 1, 2, CLOSE, PING, PONG, dice.randrange(16)))
        if opcode == CLOSE and dice.random() < 0.7:
            opcode = PING  # else every connection would end soon
        frame = bytearray(client_frame(opcode, payload, fin=dice.random() < 0.8))
        if dice.random() < 0.05:
            frame[0] |= dice.choice((0x10, 0x20, 0x40))
        if dice.random() < 0.05:
            frame[1] ^= 0x80  # unmasked
        return bytes(frame)

    def mutated(self, dice: Dice, data: bytes) -> bytes:
        """Turn bits; drop, repeat, swap or put in parts; cut."""
        out = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 4, 16))):
            if not out:
                break
            at, size = dice.randrange(len(out)), dice.choice((1, 1, 2, 8, 40))
            match dice.randrange(7):
                case 0:
                    out[at] ^= 1 << dice.randrange(8)
                case 1:
                    out[at : at + size] = dice.randbytes(size)
                case 2:
                    del out[at : at + size]
                case 3:
                    out[at:at] = out[at : at + size] * dice.choice((1, 2, 50))
                case 4:
                    out[at:at] = dice.choice(PIECES)
                case 5:
                    other = dice.randrange(len(out))
                    out[at], out[other] = out[other], out[at]
                case _:
                    del out[at:]
        return bytes(out)

    def request(self, dice: Dice) -> bytes:
        """What stands where a request should."""
        roll = dice.random()
        if roll < 0.15:
            return dice.randbytes(dice.choice((1, 3, 50, 500, 5000)))
        if roll < 0.3:
            return self.mutated(dice, self.upgrade)
        whole = "".join(dice.choices(self.requests, k=dice.choice((1, 1, 2, 3))))
        return self.mutated(dice, whole.encode())


PIECES = (
    b"\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b":", b"\r\n\r\n", b"Host: y\r\n",
    b"Content-Length: 0\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"\xed\xa0\x80",
    b"\xf0\x9f\x98", b"%ff", b"//", b"{",
    b"[" * 200, b"9" * 40, b"\x81\xff" + b"\xff" * 8, b"\x88\x00", b"\x80\x80\0\0\0\0",
)  # fmt: skip


# --- what chatd may say to it --------------------------------------------------------


def check_said(data: bytes) -> str:
    """Claim that these are answers of HTTP, then perhaps frames. What they end on.

    The last may be cut: we were the one who hung up.
    """
    last = "nothing"
    while data.startswith(b"HTTP/1.1 "):
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return last
        status = int(head[9:12])
        assert status != 500, f"chatd made a mistake: {data[:500]!r}"
        last = str(status)
        if status == 101:
            return check_frames(rest)
        found = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
        size = int(found[1]) if found else 0
        body, data = rest[:size], rest[size:]
        if status >= 400 and len(body) == size and size:
            save_evidence("error", body)
            assert json.loads(body)["error"]["code"], f"an error: {body!r}"
    assert not data, f"neither an answer nor a frame: {data[:80]!r}"
    return last


def check_frames(data: bytes) -> str:
    """Claim that these bytes are whole frames that chatd may send. The last's kind."""
    last, place = "101", 0
    while len(data) - place >= 2:
        first, size = data[place], data[place + 1]
        opcode, start = first & 15, place + 2
        assert first & 0xF0 == 0x80, f"a fragment, or reserved bits: {first:02x}"
        assert opcode in (TEXT, CLOSE, PING, PONG), f"opcode {opcode}"
        assert size < 0x80, "a masked frame from a server"
        if size > 125:
            wide = 2 if size == 126 else 8
            size = int.from_bytes(data[start : start + wide], "big")
            start += wide
        if start + size > len(data):
            return last
        payload, place = data[start : start + size], start + size
        if opcode == TEXT:
            frame = json.loads(payload)
            last = frame["type"]
            if last == "error":
                save_evidence("error", payload)
                assert frame["code"] in ERRORS, f"an error of its own: {frame}"
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            valid = code in CODES or 3000 <= code < 5000 or 1003 <= code <= 1014
            assert valid, f"closed with {code}"
            assert place == len(data), "bytes behind a close"
            last = str(code)
    return last


# --- hostile connections -------------------------------------------------------------


class Siege:
    """All the hostile connections of a run, and the two who talk through it."""

    def __init__(self, chatd: Chatd, connections: int, frames: int) -> None:
        self.chatd = chatd
        self.dice = seeded_rng("fuzz")
        self.connections_left = connections
        self.frames_wanted = frames
        self.frames = 0
        self.connections = 0
        self.said: Counter[str] = Counter()
        self.talks = 0
        self.slowest = 0.0
        self.over = False

    async def run(self) -> None:
        """Besiege, with 16 at a time, while two talk."""
        chatd = self.chatd
        chat = await make_chat(chatd, [1, 2])
        # A hostile user is a member of a chat of his own, and he cannot be kicked out.
        hostile = await make_chat(chatd, [3])
        noise = Noise(chatd, hostile, 3)
        async with Client(chatd, 1) as anna, Client(chatd, 2) as ben:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.talk, anna, ben, chat)
                async with trio.open_nursery() as hostiles:
                    for number in range(16):
                        dice = random.Random(self.dice.randrange(2**32))
                        upgrading = number % 2 == 0
                        hostiles.start_soon(self.attack, noise, dice, upgrading)
                self.over = True
            assert len(anna.acked) == self.talks, "an ack did not come"
            heard = [event["message"]["n"] for event in ben.events]
            assert heard == list(range(1, self.talks + 1)), "a message did not come"

    async def talk(self, anna: Client, ben: Client, chat: int) -> None:
        """Say something every 20 ms; it must be heard and acked, and nothing else."""
        while not self.over:
            began = time.monotonic()
            await anna.send(chat, text())
            told = ((anna, "new_message"), (anna, "ack"), (ben, "new_message"))
            for client, kind in told:
                frame = await client.receive(seconds=10)
                assert frame["type"] == kind, f"the innocent heard {frame}"
            self.talks += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            await trio.sleep(0.02)

    async def attack(self, noise: Noise, dice: Dice, upgrading: bool) -> None:
        """Open one hostile connection after another, until there were enough."""
        while self.connections_left > 0:
            self.connections_left -= 1
            self.connections += 1
            stream = await trio.open_tcp_stream("127.0.0.1", self.chatd.port)
            with contextlib.suppress(trio.BrokenResourceError):
                await self.assail(stream, noise, dice, upgrading)
            if dice.random() < 0.3:
                option = struct.pack("ii", 1, 0)
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            stream.socket.close()

    async def assail(
        self, stream: trio.SocketStream, noise: Noise, dice: Dice, upgrading: bool
    ) -> None:
        """Send noise, perhaps in pieces; perhaps look what comes back."""
        if upgrading:
            share = 2 * self.frames_wanted // max(1, self.connections_left + 1)
            count = max(share, dice.choice((3, 8, 20)))
            count = min(40, count) if self.frames < self.frames_wanted else 3
            self.frames += count
            mild = dice.random() < 0.5
            frames = b"".join(noise.frame(dice, mild=mild) for _ in range(count))
            data = noise.upgrade + frames
        else:
            data = noise.request(dice)
        if dice.random() < 0.2:
            at = dice.randrange(len(data) + 1)
            await stream.send_all(data[:at])
            await trio.lowlevel.checkpoint()
            data = data[at:]
        await stream.send_all(data)
        roll = dice.random()
        if roll < 0.1:
            await stream.send_eof()
        if roll < 0.5:
            self.said[check_said(await hear(stream))] += 1


async def hear(stream: trio.SocketStream) -> bytes:
    """What comes within a moment, or up to the end."""
    data = b""
    with trio.move_on_after(0.1), contextlib.suppress(trio.BrokenResourceError):
        while more := await stream.receive_some(65536):
            data += more
    return data


# --- structure -----------------------------------------------------------------------


class Plain:
    """One connection with blocking calls: what hypothesis can hold."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.data = b""

    def take(self, whole: Callable[[bytes], int]) -> bytes:
        """Read until `whole` says how many of the bytes belong together."""
        while not (size := whole(self.data)):
            more = self.sock.recv(65536)
            assert more, f"chatd hung up behind {self.data[-200:]!r}"
            self.data += more
        first, self.data = self.data[:size], self.data[size:]
        return first

    def request(self, data: bytes) -> tuple[int, Any]:
        """Send a request; the status of its answer, and its body."""
        self.sock.sendall(data)
        head = self.take(size_of_head)
        found = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
        size = int(found[1]) if found else 0
        body = self.take(lambda data: size * (len(data) >= size)) if size else b"{}"
        return int(head[9:12]), json.loads(body)

    def receive(self) -> dict[str, Any]:
        """Read the next text frame, past pings."""
        while True:
            data = self.take(size_of_frame)
            if data[0] == 0x80 | TEXT:
                start = 2 if data[1] < 126 else 4
                frame: dict[str, Any] = json.loads(data[start:])
                return frame
            assert data[0] == 0x80 | PING, f"neither a text nor a ping: {data!r}"

    def send(self, command: bytes) -> None:
        """Send a text frame."""
        self.sock.sendall(client_frame(TEXT, command))


def size_of_head(data: bytes) -> int:
    """How long the head of an answer is; 0 if it is not whole."""
    end = data.find(b"\r\n\r\n")
    return end + 4 if end >= 0 else 0


def size_of_frame(data: bytes) -> int:
    """How long the first frame is; 0 if it is not whole."""
    if len(data) < 4:
        return 0
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    return (start + size) * (len(data) >= start + size)


# Values that are wrong in interesting ways, for any field.
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=70),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
words = st.text(min_size=1, max_size=40) | st.sampled_from(
    ["a\tb\nc", "x" * 4000, "x" * 4001, " ", "\u3000", "\x00", "\x7f",
     "\U0001f600" * 4000, "\u202e", "\ufeff", "e\u0301", "</script>", "'; DROP TABLE"]
)  # fmt: skip
keys = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=66)


def commands(chat: int) -> st.SearchStrategy[dict[str, Any]]:
    """Commands: some right, most nearly, with fields that belong elsewhere."""
    chats = st.sampled_from([chat, chat, chat, 1, 0, -1, MAX_ID, MAX_ID + 1]) | odd
    return st.fixed_dictionaries(
        {"type": st.sampled_from(KINDS) | odd},
        optional={
            "ref": st.text(max_size=66) | odd,
            "chat_id": chats,
            "is_typing": st.booleans() | odd,
            "message_id": chats,
            "content": words | odd,
            "client_id": keys | odd,
            "token": st.text(max_size=50) | odd,
            "nobody": odd,
        },
    )


KINDS = ["ping", "typing", "mark_read", "send_message", "send_message", "auth"]
FIELDS = {
    "ping": ("ref",),
    "typing": ("ref", "chat_id", "is_typing"),
    "mark_read": ("ref", "message_id"),
    "send_message": ("ref", "chat_id", "content", "client_id"),
    "auth": ("ref", "token"),
}
NO_CONTROL = re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")


def is_id(value: Any) -> bool:
    """Is this a number from 1 to 2**53 - 1?"""
    return type(value) is int and 1 <= value <= MAX_ID


RIGHT: dict[str, Callable[[Any], bool]] = {
    "ref": lambda value: value is None or (type(value) is str and len(value) <= 64),
    "chat_id": is_id,
    "message_id": is_id,
    "is_typing": lambda value: type(value) is bool,
    "token": lambda value: type(value) is str,
    "content": lambda value: (
        type(value) is str
        and 0 < len(value) <= 4000
        and not value.isspace()
        and NO_CONTROL.fullmatch(value) is not None
    ),
    "client_id": lambda value: (
        value is None
        or (type(value) is str and re.fullmatch(r"[ -~]{1,64}", value) is not None)
    ),
}
OPTIONAL = ("ref", "client_id")


def promised(command: dict[str, Any], chat: int) -> set[str]:
    """What the protocol promises to answer: types, or codes of errors."""
    kind = command["type"]
    if type(kind) is not str:
        return {"bad_field"}
    if kind not in FIELDS:
        return {"unknown_type"}
    for name in FIELDS[kind]:
        if name not in command and name not in OPTIONAL:
            return {"bad_field"}
        if name in command and not RIGHT[name](command[name]):
            return {"bad_field"}
    if kind == "auth":
        return {"token_invalid"}
    if kind == "mark_read":
        return {"ack", "not_found"}
    if kind in ("typing", "send_message") and command["chat_id"] != chat:
        return {"not_found"}
    if kind == "send_message":
        repeat = {"idempotency_mismatch"} if command.get("client_id") else set()
        return {"ack", *repeat}
    return {"nothing" if kind == "typing" else "pong"}


def try_commands(chatd: Chatd, chat: int, examples: int, seed: int) -> None:
    """Say made commands; each gets what is promised, once, with its ref."""
    plain = Plain(chatd.port)
    noise = Noise(chatd, chat, 4)
    plain.sock.sendall(noise.upgrade)
    plain.take(size_of_head)
    assert plain.receive()["type"] == "connected"

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(commands(chat))
    def answered(command: dict[str, Any]) -> None:
        plain.send(json.dumps(command).encode())
        plain.send(b'{"type":"ping","ref":"end of this example"}')
        heard = []
        while (frame := plain.receive()).get("ref") != "end of this example":
            if frame["type"] not in ("new_message", "message_read"):
                heard.append(frame)
        wanted = promised(command, chat)
        got = [frame.get("code", frame["type"]) for frame in heard] or ["nothing"]
        assert len(got) == 1, f"{command} was answered {heard}"
        assert got[0] in wanted, f"{command} was answered {heard}, not {wanted}"
        ref = command.get("ref")
        if heard and type(ref) is str and len(ref) <= 64:
            assert heard[0].get("ref") == ref, f"{command} was answered {heard}"

    answered()
    plain.sock.close()


def try_bodies(chatd: Chatd, chat: int, examples: int, seed: int) -> None:
    """Post made bodies; each gets the status that is promised."""
    plain = Plain(chatd.port)
    head = (
        f"POST /api/v1/chats/{chat}/messages HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {chatd.token(4)}\r\nContent-Length: "
    )
    bodies = st.fixed_dictionaries(
        {},
        optional={
            "content": words | odd,
            "client_id": keys | odd,
            "sender_id": st.sampled_from([4, 5]) | odd,
            "nobody": odd,
        },
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(bodies)
    def answered(body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        status, answer = plain.request(f"{head}{len(data)}\r\n\r\n".encode() + data)
        sender = body.get("sender_id")
        right = "content" in body and RIGHT["content"](body["content"])
        right = right and RIGHT["client_id"](body.get("client_id"))
        right = right and (sender is None or is_id(sender))
        if not right:
            wanted = {400, 403}  # both may be wrong
        elif sender not in (None, 4):
            wanted = {403}
        else:
            wanted = {201, 200, 409} if body.get("client_id") else {201}
        assert status in wanted, f"{body} was answered {status} {answer}, not {wanted}"

    answered()
    plain.sock.close()


SETTINGS = hypothesis.settings(
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


# --- the proof -----------------------------------------------------------------------


async def besiege(chatd: Chatd, siege: Siege) -> None:
    """Run a siege; then everything hostile must be gone from the server soon."""
    before = chatd.descriptors()
    await siege.run()
    path, token = "/api/v1/internal/chat/ws/stats", chatd.service_token()
    deadline = trio.current_time() + 20
    while True:
        left = chatd.descriptors() - before
        stats = (await http(chatd, "GET", path, token)).json
        assert not stats["errors"], f"exceptions in the server: {stats['errors']}"
        active = stats["connections"]["active"]
        if left <= 16 and not active:  # what its readers hold of the database
            return
        stayed = f"{left} descriptors and {active} sockets stayed"
        assert trio.current_time() < deadline, stayed
        await trio.sleep(0.1)


def prove(full: bool) -> Figures:
    """Besiege; then let hypothesis speak. The full form is twenty times as long."""
    connections, frames, examples = (
        (60_000, 180_000, 1_500) if full else (10_000, 30_000, 250)
    )
    with Chatd("--connections-per-user=10000", log_level="info") as chatd:
        started = time.monotonic()
        siege = Siege(chatd, connections, frames)
        rss = chatd.rss_bytes()
        run_trio(besiege, chatd, siege, seconds=4 * 3600 if full else 300)
        seconds = time.monotonic() - started
        grown = chatd.rss_bytes() - rss
        chat = run_trio(make_chat, chatd, [4])
        seed = seeded_rng("structure").randrange(2**32)
        try_commands(chatd, chat, examples, seed)
        try_bodies(chatd, chat, examples, seed)
        log = chatd.log.read_text(errors="replace")
        assert "Traceback" not in log, f"the log: {log[-2000:]}"
    assert siege.connections >= connections, f"only {siege.connections} connections"
    assert siege.frames >= frames, f"only {siege.frames} frames"
    assert grown < 96 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
    return Figures(
        CLAIM,
        f"{siege.connections:,} hostile connections and {siege.frames:,} frames in "
        f"{seconds:.0f} s, {2 * examples:,} generated commands and bodies: no "
        f"exception; other clients sent {siege.talks:,} messages, the slowest took "
        f"{siege.slowest * 1000:.0f} ms; memory +{grown / 2**20:.0f} MiB",
        {
            "connections": siege.connections,
            "frames": siege.frames,
            "seconds": round(seconds, 1),
            "innocent_messages": siege.talks,
            "slowest_ms": round(siege.slowest * 1000, 1),
            "rss_growth_mib": round(grown / 2**20, 1),
            "kinds_of_answers": len(siege.said),
        },
    )
