"""Noise on thousands of hostile connections ends no other connection.

Noise is real traffic that was changed at random: requests and frames with flipped bits,
with parts that are dropped, repeated or swapped, cut anywhere, on connections that are
closed in every way; and random bytes. All that chatd sends back must be HTTP, or whole
frames with a code of the protocol. All the while two honest clients send messages. Then
hypothesis generates commands and bodies, and an independent model of the protocol says
which answers each may get. `--seed` repeats a run.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

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
    Http,
    client_frame,
    close_code,
    make_chat,
    post_message,
    reset,
    run_trio,
    save_evidence,
    seeded_rng,
    stats,
    text,
    upgrade_request,
)
from hypothesis import strategies as st

CLAIM = (
    "hostile noise ends no connection but the one that sends it, and gets the answer "
    "that the protocol has for it"
)
CODES = frozenset((1000, 1001, 1002, 1005, 1007, 1008, 1009, 1012, 1013, 4008, 4401,
                   4503, 4504))  # fmt: skip
ERRORS = frozenset(("bad_json", "bad_field", "unknown_type", "not_found",
                    "token_invalid", "idempotency_mismatch", "deleted", "changed",
                    "forbidden"))  # fmt: skip
Rng = random.Random
MAX_ID = 2**53 - 1


# --- noise ---------------------------------------------------------------------------


class Noise:
    """Makes hostile bytes by changing valid traffic at random."""

    def __init__(self, chatd: Chatd, chat: int, user: int, message: int) -> None:
        self.chat = chat
        self.message = message  # of this user
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
            *(
                f"{line} HTTP/1.1\r\n{bearer}Content-Length: {len(body)}\r\n\r\n{body}"
                for line, body in (
                    (f"PATCH /api/v1/messages/{message}", hello),
                    (f"DELETE /api/v1/messages/{message + 1}", ""),
                    (f"PATCH /api/v1/chats/{chat}", '{"title": "x"}'),
                    ("PATCH /api/v1/me", '{"name": "x"}'),
                    (f"GET /api/v1/chats/{chat}/members?ids=3,4", ""),
                    (f"GET /api/v1/chats/{chat}/members?after=3&limit=5", ""),
                    ("GET /api/v1/chats?limit=5&before=1-1", ""),
                    (f"GET /api/v1/search?q=a+b&chat_id={chat}&before=9", ""),
                    (f"GET {post}?around={message}&limit=5", ""),
                    (f"POST /api/v1/chats/{chat}/invites", '{"ttl_seconds": 9}'),
                    (f"DELETE /api/v1/chats/{chat}/invites", ""),
                    ("POST /api/v1/join", '{"token": "a.b.c", "name": "x"}'),
                    ("POST /api/v1/me/link", ""),
                    ("GET /api/v1/internal/chat/events?cursor=first", ""),
                    ("GET /api/v1/internal/chat/unread?older_than=1", ""),
                    ("POST /api/v1/internal/chat/forget", '{"user_id": 3}'),
                )
            ),
            f"OPTIONS {post} HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\n\r\n",
        ]
        self.upgrade = upgrade_request(f"/ws/chat?token={self.token}&cursor=x.1")

    def command(self, rng: Rng) -> bytes:
        """A command that is valid, or nearly."""
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
        kinds = [*KINDS, "hack", 1, None]
        body = {
            "type": rng.choice(kinds),
            "chat_id": rng.choice([self.chat, *values]),
            "is_typing": rng.choice([True, False, *values]),
            "content": rng.choice([text(), *values]),
            "message_id": rng.choice([self.message, self.message, *values]),
            "if_rev": rng.choice([None, self.message, *values]),
            "token": rng.choice([self.token, *values]),
            "client_id": rng.choice([None, f"{rng.random()}", *values]),
            "ref": rng.choice([None, "r", *values]),
        }
        for name in list(body):
            if rng.random() < 0.3:
                del body[name]
        return json.dumps(body).encode()

    def frame(self, rng: Rng, *, mild: bool) -> bytes:
        """One frame: of random bytes, of a command, or of a command that was changed.

        A mild frame keeps to the protocol, so that chatd reads the frames after it.
        """
        if mild:
            command = client_frame(TEXT, self.command(rng))
            return command if rng.random() < 0.9 else client_frame(PING, b"p")
        roll = rng.random()
        if roll < 0.35:
            payload = self.command(rng)
            return client_frame(TEXT, payload, fin=rng.random() < 0.95)
        if roll < 0.55:
            return self.changed(rng, client_frame(TEXT, self.command(rng)))
        payload = rng.randbytes(rng.choice((0, 1, 2, 5, 60, 125, 126, 127, 1000)))
        opcode = rng.choice((0, 1, 2, CLOSE, PING, PONG, rng.randrange(16)))
        if opcode == CLOSE and rng.random() < 0.7:
            opcode = PING  # a close in every second frame would end all connections
        frame = bytearray(client_frame(opcode, payload, fin=rng.random() < 0.8))
        if rng.random() < 0.05:
            frame[0] |= rng.choice((0x10, 0x20, 0x40))
        if rng.random() < 0.05:
            frame[1] ^= 0x80  # unmasked
        return bytes(frame)

    def changed(self, rng: Rng, data: bytes) -> bytes:
        """Change data: flip bits; drop, repeat, swap or insert parts; truncate."""
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            if not out:
                break
            at, size = rng.randrange(len(out)), rng.choice((1, 1, 2, 8, 40))
            match rng.randrange(7):
                case 0:
                    out[at] ^= 1 << rng.randrange(8)
                case 1:
                    out[at : at + size] = rng.randbytes(size)
                case 2:
                    del out[at : at + size]
                case 3:
                    out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
                case 4:
                    out[at:at] = rng.choice(INSERTS)
                case 5:
                    other = rng.randrange(len(out))
                    out[at], out[other] = out[other], out[at]
                case _:
                    del out[at:]
        return bytes(out)

    def request(self, rng: Rng) -> bytes:
        """Bytes for a connection on which chatd expects a request."""
        roll = rng.random()
        if roll < 0.15:
            return rng.randbytes(rng.choice((1, 3, 50, 500, 5000)))
        if roll < 0.3:
            return self.changed(rng, self.upgrade)
        whole = "".join(rng.choices(self.requests, k=rng.choice((1, 1, 2, 3))))
        return self.changed(rng, whole.encode())


INSERTS = (
    b"\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b":", b"\r\n\r\n", b"Host: y\r\n",
    b"Content-Length: 0\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"\xed\xa0\x80",
    b"\xf0\x9f\x98", b"%ff", b"//", b"{",
    b"[" * 200, b"9" * 40, b"\x81\xff" + b"\xff" * 8, b"\x88\x00", b"\x80\x80\0\0\0\0",
)  # fmt: skip


# --- the answers that chatd may send -------------------------------------------------


def check_answers(data: bytes) -> str:
    """Verify that data is HTTP answers, and perhaps frames behind a 101.

    Returns the kind of the last one. It may be truncated: the client stopped reading.
    """
    last = "nothing"
    while data.startswith(b"HTTP/1.1 "):
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return last
        status = int(head[9:12])
        assert status != 500, f"an exception in chatd: {data[:500]!r}"
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
    """Verify that data is frames that chatd may send; return the kind of the last."""
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
                assert frame["code"] in ERRORS, f"an unexpected code: {frame}"
        elif opcode == CLOSE:
            code = close_code(payload)
            valid = code in CODES or 3000 <= code < 5000 or 1003 <= code <= 1014
            assert valid, f"closed with {code}"
            assert place == len(data), "bytes behind a close frame"
            last = str(code)
    return last


# --- hostile connections -------------------------------------------------------------


class Fuzzer:
    """The hostile connections of a run, and two honest clients."""

    def __init__(self, chatd: Chatd, connections: int, frames: int) -> None:
        self.chatd = chatd
        self.rng = seeded_rng("fuzz")
        self.connections_left = connections
        self.frames_wanted = frames
        self.frames = 0
        self.connections = 0
        self.answers: Counter[str] = Counter()
        self.messages = 0  # of the honest clients
        self.slowest = 0.0  # seconds until one of them arrived and was acked
        self.over = False

    async def run(self) -> None:
        """Open hostile connections, 16 at a time, while two clients send messages."""
        chatd = self.chatd
        chat = await make_chat(chatd, [1, 2])
        # The hostile user has a chat of its own, which it cannot be removed from.
        hostile = await make_chat(chatd, [3])
        message = await post_message(Http(chatd), hostile, text(), 3)
        await post_message(Http(chatd), hostile, text(), 3)
        noise = Noise(chatd, hostile, 3, message)
        async with Client(chatd, 1) as anna, Client(chatd, 2) as ben:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.send_messages, anna, ben, chat)
                async with trio.open_nursery() as attackers:
                    for number in range(16):
                        rng = random.Random(self.rng.randrange(2**32))
                        upgrading = number % 2 == 0
                        attackers.start_soon(self.attack, noise, rng, upgrading)
                self.over = True
            assert len(anna.acked) == self.messages, "an ack is missing"
            numbers = [event["message"]["n"] for event in ben.events]
            assert numbers == list(range(1, self.messages + 1)), "a message is missing"

    async def send_messages(self, anna: Client, ben: Client, chat: int) -> None:
        """Send a message every 20 ms; both clients must get it, and nothing else."""
        while not self.over:
            began = time.monotonic()
            await anna.send(chat, text())
            expected = ((anna, "new_message"), (anna, "ack"), (ben, "new_message"))
            for client, kind in expected:
                frame = await client.receive(seconds=10)
                assert frame["type"] == kind, f"an honest client received {frame}"
            self.messages += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            await trio.sleep(0.02)

    async def attack(self, noise: Noise, rng: Rng, upgrading: bool) -> None:
        """Open one hostile connection after another, until the number is reached."""
        while self.connections_left > 0:
            self.connections_left -= 1
            self.connections += 1
            stream = await trio.open_tcp_stream("127.0.0.1", self.chatd.port)
            with contextlib.suppress(trio.BrokenResourceError):
                await self.send_noise(stream, noise, rng, upgrading)
            if rng.random() < 0.3:
                reset(stream)
            else:
                stream.socket.close()

    async def send_noise(
        self, stream: trio.SocketStream, noise: Noise, rng: Rng, upgrading: bool
    ) -> None:
        """Send noise, perhaps in two pieces; perhaps check what comes back."""
        if upgrading:
            share = 2 * self.frames_wanted // max(1, self.connections_left + 1)
            count = max(share, rng.choice((3, 8, 20)))
            count = min(40, count) if self.frames < self.frames_wanted else 3
            self.frames += count
            mild = rng.random() < 0.5
            frames = b"".join(noise.frame(rng, mild=mild) for _ in range(count))
            data = noise.upgrade + frames
        else:
            data = noise.request(rng)
        if rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            await stream.send_all(data[:at])
            await trio.lowlevel.checkpoint()
            data = data[at:]
        await stream.send_all(data)
        roll = rng.random()
        if roll < 0.1:
            await stream.send_eof()
        if roll < 0.5:
            self.answers[check_answers(await receive_some(stream))] += 1


async def receive_some(stream: trio.SocketStream) -> bytes:
    """Receive for a tenth of a second, or up to the end."""
    data = b""
    with trio.move_on_after(0.1), contextlib.suppress(trio.BrokenResourceError):
        while more := await stream.receive_some(65536):
            data += more
    return data


# --- generated commands and bodies ---------------------------------------------------


class BlockingConnection:
    """One connection with blocking calls, because hypothesis calls plain functions."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connect()

    def connect(self) -> None:
        """Connect, or connect again."""
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        self.data = b""

    def read(self, size_of: Callable[[bytes], int]) -> bytes:
        """Read one item; size_of returns its size, or 0 while it is not whole."""
        while not (size := size_of(self.data)):
            more = self.sock.recv(65536)
            assert more, f"chatd ended the connection behind {self.data[-200:]!r}"
            self.data += more
        first, self.data = self.data[:size], self.data[size:]
        return first

    def request(self, data: bytes) -> tuple[int, Any]:
        """Send a request; return the status and the body of the answer.

        If chatd says that it ends the connection, the next request has a new one.
        """
        self.sock.sendall(data)
        head = self.read(size_of_head)
        found = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
        size = int(found[1]) if found else 0
        body = self.read(lambda data: size * (len(data) >= size)) if size else b"{}"
        if b"connection: close" in head.lower():
            self.sock.close()
            self.connect()
        return int(head[9:12]), json.loads(body)

    def receive(self) -> dict[str, Any]:
        """Read the next text frame; skip pings."""
        while True:
            data = self.read(size_of_frame)
            if data[0] == 0x80 | TEXT:
                start = 2 if data[1] < 126 else 4
                frame: dict[str, Any] = json.loads(data[start:])
                return frame
            assert data[0] == 0x80 | PING, f"neither a text nor a ping: {data!r}"

    def send(self, command: bytes) -> None:
        """Send a text frame."""
        self.sock.sendall(client_frame(TEXT, command))


def size_of_head(data: bytes) -> int:
    """The size of an answer's head; 0 if it is not whole."""
    end = data.find(b"\r\n\r\n")
    return end + 4 if end >= 0 else 0


def size_of_frame(data: bytes) -> int:
    """The size of the first frame; 0 if it is not whole."""
    if len(data) < 4:
        return 0
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    return (start + size) * (len(data) >= start + size)


# Values that are wrong for most fields, in different ways.
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


def commands(chat: int, message: int) -> st.SearchStrategy[dict[str, Any]]:
    """Commands: some are valid, most nearly, and some have fields of other types."""
    chats = st.sampled_from([chat, chat, chat, 1, 0, -1, MAX_ID, MAX_ID + 1]) | odd
    return st.fixed_dictionaries(
        {"type": st.sampled_from(KINDS) | odd},
        optional={
            "ref": st.text(max_size=66) | odd,
            "chat_id": chats,
            "is_typing": st.booleans() | odd,
            "message_id": st.sampled_from([message, message]) | chats,
            "if_rev": st.sampled_from([message, 1, None]) | odd,
            "content": words | odd,
            "client_id": keys | odd,
            "token": st.text(max_size=50) | odd,
            "unknown": odd,
        },
    )


KINDS = ["ping", "typing", "mark_read", "send_message", "send_message", "auth",
         "edit_message", "edit_message", "delete_message"]  # fmt: skip
FIELDS = {
    "ping": ("ref",),
    "typing": ("ref", "chat_id", "is_typing"),
    "mark_read": ("ref", "message_id"),
    "send_message": ("ref", "chat_id", "content", "client_id"),
    "auth": ("ref", "token"),
    "edit_message": ("ref", "message_id", "content", "if_rev"),
    "delete_message": ("ref", "message_id"),
}
NO_CONTROL = re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")


def is_id(value: Any) -> bool:
    """Whether this is an integer from 1 to 2**53 - 1."""
    return type(value) is int and 1 <= value <= MAX_ID


VALID: dict[str, Callable[[Any], bool]] = {
    "ref": lambda value: value is None or (type(value) is str and len(value) <= 64),
    "chat_id": is_id,
    "message_id": is_id,
    "if_rev": lambda value: value is None or is_id(value),
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
OPTIONAL = ("ref", "client_id", "if_rev")


def expected_answers(command: dict[str, Any], chat: int) -> set[str]:
    """The answers that the protocol allows: types of frames, or codes of errors."""
    kind = command["type"]
    if type(kind) is not str:
        return {"bad_field"}
    if kind not in FIELDS:
        return {"unknown_type"}
    for name in FIELDS[kind]:
        if name not in command and name not in OPTIONAL:
            return {"bad_field"}
        if name in command and not VALID[name](command[name]):
            return {"bad_field"}
    if kind == "auth":
        return {"token_invalid"}
    if kind == "mark_read":
        return {"ack", "not_found"}
    if kind == "edit_message":
        return {"ack", "not_found", "deleted", "changed"}
    if kind == "delete_message":
        return {"ack", "not_found"}
    if kind in ("typing", "send_message") and command["chat_id"] != chat:
        return {"not_found"}
    if kind == "send_message":
        repeat = {"idempotency_mismatch"} if command.get("client_id") else set()
        return {"ack", *repeat}
    return {"nothing" if kind == "typing" else "pong"}


STORE_CODES = ("not_found", "idempotency_mismatch", "deleted", "changed")
NAMES = ("ref", "client_id", "chat_id", "message_id")
STORED: dict[Any, tuple[str, ...]] = {
    "send_message": ("ref", "client_id", "chat_id"),
    "mark_read": ("ref", "message_id"),
    "edit_message": ("ref", "message_id"),
    "delete_message": ("ref", "message_id"),
}


def try_commands(
    chatd: Chatd, chat: int, message: int, examples: int, seed: int
) -> None:
    """Send generated commands; each gets one expected answer.

    An error names its command: by each of four fields that is valid.
    """
    connection = BlockingConnection(chatd.port)
    noise = Noise(chatd, chat, 4, message)
    connection.sock.sendall(noise.upgrade)
    connection.read(size_of_head)
    assert connection.receive()["type"] == "connected"

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(commands(chat, message))
    def answered(command: dict[str, Any]) -> None:
        connection.send(json.dumps(command).encode())
        connection.send(b'{"type":"ping","ref":"end of this example"}')
        answers = []
        while (frame := connection.receive()).get("ref") != "end of this example":
            if "seq" not in frame:
                answers.append(frame)
        expected = expected_answers(command, chat)
        got = [frame.get("code", frame["type"]) for frame in answers] or ["nothing"]
        assert len(got) == 1, f"{command} was answered {answers}"
        assert got[0] in expected, f"{command} was answered {answers}, not {expected}"
        # The store's answer knows only the fields that the command's type has.
        stored = got[0] in STORE_CODES
        names = STORED.get(command.get("type"), NAMES) if stored else NAMES
        for name in names:
            value = command.get(name)
            if got[0] in ERRORS and value is not None and VALID[name](value):
                given = answers[0].get(name)
                assert given == value, f"{command} was answered {answers}"
        assert got[0] != "pong" or answers[0].get("ref") == command.get("ref")

    answered()
    connection.sock.close()


def try_bodies(chatd: Chatd, chat: int, examples: int, seed: int) -> None:
    """Post generated bodies; each gets an expected status."""
    connection = BlockingConnection(chatd.port)
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
            "unknown": odd,
        },
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(bodies)
    def answered(body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        request = f"{head}{len(data)}\r\n\r\n".encode() + data
        status, answer = connection.request(request)
        sender = body.get("sender_id")
        valid = "content" in body and VALID["content"](body["content"])
        valid = valid and VALID["client_id"](body.get("client_id"))
        valid = valid and (sender is None or is_id(sender))
        if not valid:
            expected = {400, 403}  # the sender may be wrong, too
        elif sender not in (None, 4):
            expected = {403}
        else:
            expected = {201, 200, 409} if body.get("client_id") else {201}
        got = f"{status} {answer}"
        assert status in expected, f"{body} was answered {got}, not {expected}"

    answered()
    connection.sock.close()


def try_routes(chatd: Chatd, chat: int, message: int, examples: int, seed: int) -> None:
    """Send generated bodies and arguments to the other routes: none is a 5xx.

    Who may not use a route gets no 2xx from it.
    """
    connection = BlockingConnection(chatd.port)
    bearer = f"Host: x\r\nAuthorization: Bearer {chatd.token(4)}\r\n"
    ids = st.sampled_from([chat, message, message + 1, 1, 4, MAX_ID, MAX_ID + 1, 0, -1])
    names = ("content", "if_rev", "title", "direct", "member_ids", "user_id", "token",
             "client_id", "ttl_seconds", "name", "message_id")  # fmt: skip
    arguments = ("q", "before", "after", "around", "limit", "chat_id", "cursor", "ids",
                 "older_than")  # fmt: skip
    some = st.dictionaries(
        st.sampled_from(names), words | ids | odd | keys, max_size=5
    ) | st.fixed_dictionaries({"content": words, "title": words, "name": words})
    queries = st.dictionaries(
        st.sampled_from(arguments), words | ids.map(str) | keys, max_size=3
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(st.sampled_from(ROUTES), ids, ids, some, queries)
    def answered(
        route: str, one: int, two: int, body: dict[str, Any], query: dict[str, str]
    ) -> None:
        method, path = route.format(one, two).split()
        data = json.dumps(body).encode()
        target = f"{path}?{urlencode(query, errors='replace')}"
        head = f"{method} {target} HTTP/1.1\r\n{bearer}Content-Length: {len(data)}"
        status, answer = connection.request(f"{head}\r\n\r\n".encode() + data)
        assert status < 500, f"{method} {target} {body} was answered {status} {answer}"
        if "internal" in path:
            refused = status in (403, 431)  # or the head is too long
            assert refused, f"{method} {target} was answered {status} {answer}"

    answered()
    connection.sock.close()


FLAGS = ("--connections-per-user=10000", "--invites=on")
ROUTES = (
    "PATCH /api/v1/messages/{}", "DELETE /api/v1/messages/{}",
    "POST /api/v1/messages/{}/read", "GET /api/v1/search", "GET /api/v1/events",
    "GET /api/v1/chats", "POST /api/v1/chats", "GET /api/v1/chats/{}",
    "PATCH /api/v1/chats/{}", "GET /api/v1/chats/{}/messages",
    "GET /api/v1/chats/{}/members", "POST /api/v1/chats/{}/members",
    "POST /api/v1/chats/{}/invites", "DELETE /api/v1/chats/{}/invites",
    "POST /api/v1/join", "POST /api/v1/session", "POST /api/v1/me/link",
    "GET /api/v1/me", "PATCH /api/v1/me", "GET /api/v1/users",
    "GET /api/v1/internal/chat/events", "GET /api/v1/internal/chat/unread",
    "POST /api/v1/internal/chat/forget", "POST /api/v1/internal/chat/revoke",
)  # fmt: skip

SETTINGS = hypothesis.settings(
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


# --- the proof -----------------------------------------------------------------------


async def fuzz(chatd: Chatd, fuzzer: Fuzzer) -> None:
    """Run a fuzzer; then chatd must soon have closed all hostile connections."""
    before = chatd.descriptors()
    await fuzzer.run()
    deadline = trio.current_time() + 20
    while True:
        left = chatd.descriptors() - before
        document = await stats(chatd)
        assert not document["errors"], f"exceptions in chatd: {document['errors']}"
        active = document["connections"]["active"]
        if left <= 16 and not active:  # up to 16 are files of the database
            return
        stayed = f"{left} descriptors and {active} sockets stayed"
        assert trio.current_time() < deadline, stayed
        await trio.sleep(0.1)


def prove(full: bool) -> Figures:
    """Send noise, then generated commands and bodies; in the full form six times."""
    connections, frames, examples = (
        (60_000, 180_000, 1_500) if full else (10_000, 30_000, 250)
    )
    with Chatd(*FLAGS, log_level="info") as chatd:
        started = time.monotonic()
        fuzzer = Fuzzer(chatd, connections, frames)
        rss = chatd.rss_bytes()
        run_trio(fuzz, chatd, fuzzer, seconds=4 * 3600 if full else 300)
        seconds = time.monotonic() - started
        grown = chatd.rss_bytes() - rss
        chat = run_trio(make_chat, chatd, [4])
        seed = seeded_rng("structure").randrange(2**32)
        message = run_trio(post_message, Http(chatd), chat, text(), 4)
        try_commands(chatd, chat, message, examples, seed)
        try_bodies(chatd, chat, examples, seed)
        try_routes(chatd, chat, message, examples, seed)
        chatd.log_without_traceback()
    assert fuzzer.connections >= connections, f"only {fuzzer.connections} connections"
    assert fuzzer.frames >= frames, f"only {fuzzer.frames} frames"
    assert grown < 96 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
    return Figures(
        CLAIM,
        f"{fuzzer.connections:,} hostile connections and {fuzzer.frames:,} frames in "
        f"{seconds:.0f} s, {3 * examples:,} generated commands and bodies: no "
        f"exception; other clients sent {fuzzer.messages:,} messages, the slowest took "
        f"{fuzzer.slowest * 1000:.0f} ms; memory +{grown / 2**20:.0f} MiB",
        {
            "connections": fuzzer.connections,
            "frames": fuzzer.frames,
            "seconds": round(seconds, 1),
            "honest_messages": fuzzer.messages,
            "slowest_ms": round(fuzzer.slowest * 1000, 1),
            "rss_growth_mib": round(grown / 2**20, 1),
            "kinds_of_answers": len(fuzzer.answers),
        },
    )
