"""Every attack that we know by name gets its right answer, and hurts nobody else.

The tables say what is sent instead of a request, of frames, of a command, of a body,
of a token, and beside it the answer that the protocol promises. Attacks that are more
than bytes are functions: tickets that race, kicks among pings, crowds that are refused
and stay. After every single one two other clients talk to each other, and after every
table descriptors and sockets are back where they were.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from harness import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Chatd,
    Client,
    Closed,
    Figures,
    Refused,
    Reply,
    WebSocket,
    client_frame,
    http,
    make_chat,
    run_trio,
    save_evidence,
    text,
)

CLAIM = (
    "each of the named attacks gets the right answer; other clients go on talking, and "
    "nothing stays behind"
)
SECONDS = 5.0  # the longest wait for what should come at once
CUT, END = b"<cut>", b"<end>"  # in a row: send what follows later; end our side
CONTINUATION = 0


# --- in bytes ------------------------------------------------------------------------


class Raw:
    """One TCP connection, in bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, port: int) -> AsyncIterator[Raw]:
        """Connect; closed at the end, if not before."""
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        try:
            yield cls(stream)
        finally:
            stream.socket.close()

    async def send(self, data: bytes) -> None:
        """Send what the other side takes; to hang up meanwhile is its right."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.stream.send_all(data)

    async def read(self) -> bool:
        """Read once. False: the other side is at its end."""
        try:
            more = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            return False
        self.data += more
        return bool(more)

    async def ends(self, seconds: float = SECONDS) -> bytes:
        """Read to the other side's end, which must come; all that came."""
        with trio.fail_after(seconds):
            while await self.read():
                pass
        return self.data


def hang_up(stream: trio.SocketStream) -> None:
    """End a connection with RST."""
    option = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
    stream.socket.close()


def request(method: str, target: str, *lines: str, body: bytes = b"") -> bytes:
    """One request's bytes: header lines as they are given, a body as it is."""
    head = "\r\n".join((f"{method} {target} HTTP/1.1", *lines, "", ""))
    return head.encode("latin-1") + body


def take_answers(data: bytes, replies: list[Reply]) -> bytes:
    """Move the whole answers from the front of data to replies; what is left."""
    while b"\r\n\r\n" in data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1", f"not an answer: {first!r}"
        pairs = [line.lower().split(": ", 1) for line in lines]
        headers = dict(pairs)  # of two lines Connection the last: close
        twice = len(pairs) - len(headers) - headers.get("connection", "").count("close")
        assert twice <= 0, f"a header twice: {lines}"
        bodiless = status in ("100", "101", "204", "304")
        size = 0 if bodiless else int(headers["content-length"])
        if len(rest) < size:
            break
        reply, data = Reply(int(status), headers, rest[:size]), rest[size:]
        replies.append(reply)
        if reply.status >= 400:
            save_evidence("error", reply.body)
            assert code_of(reply), f"an error without a code: {reply}"
            assert reply.json["error"]["message"], f"without a sentence: {reply}"
    return data


def code_of(reply: Reply) -> str:
    """The code of an error."""
    return str(reply.json["error"]["code"])


# --- the innocent --------------------------------------------------------------------


def open_sockets(chatd: Chatd) -> int:
    """How many of its descriptors are sockets; the rest is the database's."""
    found = 0
    for fd in Path(f"/proc/{chatd.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += str(fd.readlink()).startswith("socket:")
    return found


class House:
    """A server, two who talk to each other, and what it held before the attacks."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.anna, self.ben = Client(chatd, 1), Client(chatd, 2)
        self.users = 10
        self.chat = self.descriptors = self.sockets = self.rss = 0
        self.rows = 0
        self.slowest = 0.0  # seconds, for a message to be heard and acked

    async def move_in(self) -> None:
        """Connect the two, and let the server open what it opens once."""
        self.chat = await make_chat(self.chatd, [1, 2])
        await self.anna.connect()
        await self.ben.connect()
        async with trio.open_nursery() as nursery:
            for _ in range(40):  # all its readers
                nursery.start_soon(self.get, "/api/v1/chats")
        await self.talk()
        self.sockets = await self.active()
        counted = []
        for _ in range(20):  # the readers' connections are about to go
            await trio.sleep(0.05)
            counted.append(open_sockets(self.chatd))
        self.descriptors = min(counted)
        self.rss = self.chatd.rss_bytes()

    async def get(self, path: str) -> Reply:
        """Ask as the service."""
        return await http(self.chatd, "GET", path, self.chatd.service_token())

    async def active(self) -> int:
        """How many sockets the server counts."""
        reply = await self.get("/api/v1/internal/chat/ws/stats")
        errors = reply.json["errors"]
        assert not errors, f"exceptions in the server: {errors}"
        return int(reply.json["connections"]["active"])

    def user(self) -> int:
        """A user whom no other row has."""
        self.users += 1
        return self.users

    async def talk(self) -> None:
        """Let one tell the other something; claim that it arrives, and only that."""
        began = time.monotonic()
        words = text()
        await self.anna.send(self.chat, words)
        frame = await self.anna.receive(seconds=SECONDS)
        assert frame["type"] == "new_message", f"the sender heard {frame}"
        assert (await self.anna.receive(seconds=SECONDS))["type"] == "ack"
        heard = await self.ben.receive(seconds=SECONDS)
        assert heard["type"] == "new_message", f"the other heard {heard}"
        assert heard["message"]["content"] == words, "the other heard something else"
        self.slowest = max(self.slowest, time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def attacked(self, name: str) -> AsyncIterator[None]:
        """Run one attack; then the innocent talk. A false claim has the row's name."""
        try:
            with trio.fail_after(60):
                yield
                await self.talk()
        except (AssertionError, Closed, Refused, trio.TooSlowError, KeyError) as error:
            kind = type(error).__name__
            raise AssertionError(f"attack {name!r}: {kind}: {error}") from error
        self.rows += 1

    async def emptied(self, what: str, seconds: float = SECONDS) -> None:
        """Claim that descriptors and sockets are back where they were, soon."""
        deadline = trio.current_time() + seconds
        while left := max(0, open_sockets(self.chatd) - self.descriptors):
            if trio.current_time() > deadline:
                break
            await trio.sleep(0.05)
        assert not left, f"after {what} {left} sockets stayed open {seconds:.0f} s"
        files = self.chatd.descriptors() - self.descriptors
        assert files < 32, f"after {what} {files} other descriptors are open"
        sockets = await self.active() - self.sockets
        assert sockets == 0, f"after {what} {sockets} sockets are still counted"


# --- instead of a request ------------------------------------------------------------

HOST = "Host: chat.example"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
CHUNKED = "Transfer-Encoding: chunked"
HEALTH = request("GET", "/healthz", HOST)

# What is expected: the statuses of all answers to a row, in their order.
Rows = dict[str, tuple[int | tuple[int, ...], bytes]]


async def try_request(
    port: int, expected: int | tuple[int, ...], data: bytes, *, ends: bool
) -> Reply:
    """Send bytes; claim that exactly these answers come. Returns the last.

    ends: the other side hangs up after them, although we do not.
    """
    statuses = expected if isinstance(expected, tuple) else (expected,)
    replies: list[Reply] = []
    async with Raw.open(port) as raw:
        for piece in data.split(CUT):
            if piece == END:
                with contextlib.suppress(trio.BrokenResourceError):
                    await raw.stream.send_eof()
            else:
                await raw.send(piece)
                await trio.lowlevel.checkpoint()
        with trio.fail_after(SECONDS):
            while (ends or len(replies) < len(statuses)) and await raw.read():
                raw.data = take_answers(raw.data, replies)
    got = tuple(reply.status for reply in replies)
    assert got == statuses, f"answered {got}, not {statuses}: {replies[-1:]}"
    assert not raw.data, f"bytes behind the last answer: {raw.data[:80]!r}"
    if not replies:
        return Reply(0, {}, b"")
    said = replies[-1].headers.get("connection")
    assert not ends or said == "close", f"the last answer says Connection: {said}"
    return replies[-1]


def in_bytes(data: bytes) -> bytes:
    """Make a row that is sent byte by byte."""
    return CUT.join(bytes([byte]) for byte in data)


def get(target: str, *lines: str) -> bytes:
    """A GET."""
    return request("GET", target, HOST, *lines)


def broken_heads() -> Rows:
    """What no server should take; each is answered once, and the connection ends."""
    many = ["X: y"] * 700
    return {
        "random bytes": (400, bytes(range(256)) * 8 + b"\r\n\r\n"),
        "a TLS hello": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n"),
        "an SSH hello": (400, b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        "an SMTP hello": (400, b"EHLO example\r\n\r\n"),
        "a PROXY header": (400, b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n"),
        "HTTP/2's preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "HTTP/0.9": (400, b"GET /healthz\r\n\r\n"),
        "HTTP/1.2": (400, b"GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n"),
        "HTTP/1.10": (400, b"GET /healthz HTTP/1.10\r\nHost: x\r\n\r\n"),
        "HTTP/3.0": (400, b"GET /healthz HTTP/3.0\r\nHost: x\r\n\r\n"),
        "http/1.1": (400, b"GET /healthz http/1.1\r\nHost: x\r\n\r\n"),
        "two spaces": (400, b"GET  /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        "a tab": (400, b"GET\t/healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        "a fold before any header": (400, b"GET / HTTP/1.1\r\n X: y\r\n\r\n"),
        "no Host": (400, request("GET", "/healthz")),
        "two Hosts": (400, get("/healthz", HOST)),
        "a space before the colon": (400, get("/healthz", "X : y")),
        "a line without a colon": (400, get("/healthz", "nonsense")),
        "a header without a name": (400, get("/healthz", ": y")),
        "a NUL in a value": (400, get("/healthz", "X: y\0z")),
        "a bare CR": (400, get("/healthz", "X: y\rz")),
        "a space in the target": (400, get("/a b")),
        "byte 255 in the target": (400, get("/\xff")),
        "a method with a slash": (400, request("G/T", "/healthz", HOST)),
        "an error in single bytes": (400, in_bytes(get("/healthz", "X : y"))),
        "65 header lines": (431, get("/healthz", *many[:64])),
        "700 header lines": (431, get("/healthz", *many)),
        "a header of 100 KB": (431, get("/healthz", "X: " + "y" * 100_000)),
        "a target of 100 KB": (431, get("/" + "y" * 100_000)),
        "a method of 100 KB": (431, b"Y" * 100_000),
        "a header without end": (
            431,
            CUT.join([b"GET / HTTP/1.1\r\nX", b"y" * 40_000]),
        ),
        "a whole URL": (400, get("http://chat.example/healthz")),
        "two slashes": (400, get("//healthz")),
        "two slashes and a bracket": (400, get("//[::1/healthz")),
        "an asterisk": (400, request("OPTIONS", "*", HOST)),
        "CONNECT": (400, request("CONNECT", "chat.example:443", HOST)),
        "nonsense behind a request": ((200, 400), HEALTH + b"\xff\r\n\r\n"),
        "behind Connection: close": (
            200,
            get("/healthz", "Connection: close") + HEALTH,
        ),
        "behind HTTP/1.0": (200, b"GET /healthz HTTP/1.0\r\n\r\n" + HEALTH),
        "behind a refused upgrade": (401, get("/ws/chat", *UPGRADE, KEY) + HEALTH),
        "nothing but line ends": (400, b"\r\n" * 3),
        "a head cut short": ((), CUT.join([HEALTH[:-2], END])),
    }


def odd_requests(token: str, post: str) -> Rows:
    """What is odd and no harm: it is answered, and the connection goes on."""
    bearer = f"Authorization: Bearer {token}"
    events = "/api/v1/events"
    hello = json.dumps({"content": text()}).encode()
    length = f"Content-Length: {len(hello)}"
    high = "".join(map(chr, range(128, 256)))
    forged = "X-Forwarded-For: " + "1.2.3.4, " * 500 + "::1, [::1], fe80::1%eth0, , x"
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(hello), hello)

    def send(*lines: str, body: bytes = hello) -> bytes:
        return request("POST", post, HOST, bearer, *lines, body=body)

    def chats(chat: object) -> bytes:
        return get(f"/api/v1/chats/{chat}/messages", bearer)

    return {
        "a folded header": (200, get("/healthz", "X: y\r\n z")),
        "bare line feeds": (200, b"GET /healthz HTTP/1.1\nHost: x\n\n"),
        "ESC in a value": (200, get("/healthz", "X: \x1b[2J\x07")),
        "bytes above 127 in a value": (200, get("/healthz", "X: " + high)),
        "64 header lines": (200, get("/healthz", *["X: y"] * 63)),
        "a request in single bytes": (200, in_bytes(HEALTH)),
        "three requests at once": ((200, 200, 200), HEALTH * 3),
        "TRACE": (405, request("TRACE", "/healthz", HOST)),
        "a method in small letters": (405, request("get", "/healthz", HOST)),
        "a method of nobody": (405, request("HACK", "/healthz", HOST)),
        "dots": (404, get("/web/../chatd.py")),
        "dots in disguise": (404, get("/web/%2e%2e/chatd.py")),
        "a slash in disguise": (404, get("/web%2findex.html")),
        "a NUL in disguise": (404, get("/web/index.html%00")),
        "the secret": (404, get("/chatd.secret")),
        "the database": (404, get("/chatd.db")),
        "a semicolon": (404, get("/healthz;a=b")),
        "a fragment": (404, get("/healthz#a")),
        "a chat 0": (404, chats(0)),
        "a chat -1": (404, chats(-1)),
        "a chat 1.0": (404, chats("1.0")),
        "a chat *": (404, chats("*")),
        "a chat 2**53": (404, chats(2**53)),
        "a chat of 30 digits": (404, chats("9" * 30)),
        "a chat of others": (404, chats(1)),
        "17 fields in the query": (400, get(events + "?" + "a=b&" * 17, bearer)),
        "bad UTF-8 in the query": (400, get(events + "?cursor=%ff", bearer)),
        "a limit of 0": (400, get(events + "?limit=0", bearer)),
        "a limit of -1": (400, get(events + "?limit=-1", bearer)),
        "a limit of 501": (400, get(events + "?limit=501", bearer)),
        "a limit of 1e2": (400, get(events + "?limit=1e2", bearer)),
        "a limit of 5,000 digits": (400, get(f"{events}?limit={'9' * 5000}", bearer)),
        "a limit in Arabic digits": (400, get(events + "?limit=%D9%A3", bearer)),
        "two limits": (400, get(events + "?limit=1&limit=2", bearer)),
        "two cursors": (400, get(events + "?cursor=a&cursor=b", bearer)),
        "SQL for a cursor": (200, get(events + "?cursor=x.1%20OR%201=1", bearer)),
        "a cursor of the future": (200, get(f"{events}?cursor=x.{10**15}", bearer)),
        "a before of another chat": (400, get(f"{post}?before=1", bearer)),
        "the same length twice": (201, send(length, length)),
        "chunks": (201, send(CHUNKED, body=chunk + b"\r\n")),
        "chunks in single bytes": (
            200, in_bytes(get("/healthz", CHUNKED) + b"1\r\nx\r\n0\r\n\r\n")
        ),
        "CHUNKED": (201, send(CHUNKED.upper(), body=chunk + b"\r\n")),
        "a trailer": (201, send(CHUNKED, body=chunk + b"Host: y\r\n\r\n")),
        "65,536 bytes": (201, send("Content-Length: 65536", body=hello.rjust(65_536))),
        "100-continue": (
            (100, 201),
            CUT.join([send(length, "Expect: 100-continue", body=b""), hello]),
        ),
        "an Expect of nobody": (201, send(length, "Expect: 200-ok")),
        "another content type": (201, send(length, "Content-Type: text/xml")),
        "a body that nobody wants": (
            (200, 200), get("/healthz", "Content-Length: 9") + b"GET / HTT" + HEALTH
        ),
        "no Upgrade": (426, get("/ws/chat", *UPGRADE[1:], KEY)),
        "an Upgrade to h2c": (426, get("/ws/chat", "Upgrade: h2c", *UPGRADE[1:], KEY)),
        "Basic": (401, get("/api/v1/me", "Authorization: Basic eDp5")),
        "Bearer and nothing": (401, get("/api/v1/me", "Authorization: Bearer ")),
        "Bearer twice": (401, get("/api/v1/me", bearer, bearer)),
        "byte 255 for a token": (401, get("/api/v1/me", "Authorization: Bearer \xff")),
        "a token in the query": (401, get(f"/api/v1/me?token={token}")),
        "a token in a cookie": (401, get("/api/v1/me", f"Cookie: {bearer}")),
        "forged addresses": (200, get("/api/v1/me", bearer, forged)),
        "stats without their scope": (
            403, get("/api/v1/internal/chat/ws/stats", bearer)
        ),
        "metrics without their scope": (403, get("/metrics", bearer)),
        "revoking without its scope": (
            403, request("POST", "/api/v1/internal/chat/revoke", HOST, bearer,
                         "Content-Length: 13", body=b'{"user_id":1}')
        ),
        "an empty key": (400, send(length, "Idempotency-Key:")),
        "a key of 65": (400, send(length, "Idempotency-Key: " + "x" * 65)),
        "a key with an accent": (400, send(length, "Idempotency-Key: \xe9")),
    }  # fmt: skip


def bodies_at_odds(bearer: str, post: str) -> Rows:
    """Bodies that two readers would read differently, or that are too much.

    Behind most of them hides a request, which must not be answered.
    """
    hello = json.dumps({"content": text()}).encode()
    length = f"Content-Length: {len(hello)}"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(hello), hello)

    def send(*lines: str, body: bytes = hello + HEALTH) -> bytes:
        return request("POST", post, HOST, bearer, *lines, body=body)

    def chunks(data: bytes) -> bytes:
        return send(CHUNKED, body=data)

    return {
        "length beside chunks": (400, send(length, CHUNKED, body=chunk + HEALTH)),
        "chunks beside length": (400, send(CHUNKED, length, body=chunk + HEALTH)),
        "two lengths": (400, send(length, "Content-Length: 0")),
        "two lengths in a line": (400, send(f"{length}, 0")),
        "a length of -1": (400, send("Content-Length: -1")),
        "a length of +5": (400, send("Content-Length: +5")),
        "a length of 0x5": (400, send("Content-Length: 0x5")),
        "a length of 1_0": (400, send("Content-Length: 1_0")),
        "a length of 5.0": (400, send("Content-Length: 5.0")),
        "a length in Arabic digits": (400, send("Content-Length: \xb2")),
        "a length of 30 digits": (400, send("Content-Length: " + "9" * 30)),
        "a length of nothing": (400, send("Content-Length:")),
        "a length of 2**63": (413, send(f"Content-Length: {2**63}")),
        "100 MB for who waits": (
            413, send("Content-Length: 100000000", "Expect: 100-continue", body=b"")
        ),
        "65,537 bytes": (413, send("Content-Length: 65537", body=b" " * 65_537)),
        "chunks twice": (400, send(CHUNKED, CHUNKED, body=chunk)),
        "gzip, then chunks": (400, send("Transfer-Encoding: gzip, chunked")),
        "gzip": (400, send("Transfer-Encoding: gzip")),
        "identity": (400, send("Transfer-Encoding: identity")),
        "xchunked": (400, send("Transfer-Encoding: xchunked", body=chunk)),
        "chunks behind a tab": (400, send("Transfer-Encoding:\x0bchunked", body=chunk)),
        "a chunk of zz": (400, chunks(b"zz\r\n")),
        "a chunk of -1": (400, chunks(b"-1\r\nx\r\n0\r\n\r\n")),
        "a chunk of 0x5": (400, chunks(b"0x5\r\nhello\r\n0\r\n\r\n")),
        "a chunk of 1_0": (400, chunks(b"1_0\r\nhello\r\n0\r\n\r\n")),
        "a chunk of 2**84": (400, chunks(b"1" + b"0" * 21 + b"\r\nx")),
        "a chunk of 2**60": (413, chunks(b"1" + b"0" * 15 + b"\r\n" + b"x" * 70_000)),
        "a chunk that ends wrongly": (400, chunks(b"1\r\nxYY0\r\n\r\n" + HEALTH)),
        "a chunk that ends with LF": (400, chunks(b"1\r\nx\n0\r\n\r\n" + HEALTH)),
        "an extension of 100 KB": (431, chunks(b"1;" + b"x" * 100_000)),
        "a trailer of 100 KB": (431, chunks(chunk[:-2] + b"X: " + b"y" * 100_000)),
        "a bad trailer": (400, chunks(chunk[:-2] + b"X : y\r\n\r\n")),
        "70,000 chunks of a byte": (413, chunks(b"1\r\nx\r\n" * 70_000)),
        "a body cut short": ((), CUT.join([send(length, body=hello[:-3]), END])),
        "chunks cut short": ((), CUT.join([chunks(chunk[:9]), END])),
        "a body and no token": (401, request("POST", post, HOST, length, body=hello)),
    }  # fmt: skip


def broken_handshakes(token: str) -> Rows:
    """Upgrades that are refused before 101; a frame waits behind each, in vain."""
    target = f"/ws/chat?token={token}"
    ping = client_frame(TEXT, b'{"type":"ping"}')
    keys, whole = "Sec-WebSocket-Key: ", (*UPGRADE, KEY)

    def ask(*lines: str, to: str = target, host: str = HOST) -> bytes:
        return request("GET", to, host, *(lines or whole), body=ping)

    def more(*lines: str) -> bytes:
        return ask(*whole, *lines)

    return {
        "byte 255 in Host": (400, ask(host="Host: \xff")),
        "byte 255 in Connection": (400, more("Connection: \xff")),
        "byte 255 in Upgrade": (400, more("Upgrade: \xff")),
        "byte 255 in the key": (400, ask(*UPGRADE, keys + "\xff")),
        "byte 255 in the version": (400, more("Sec-WebSocket-Version: \xff")),
        "byte 255 in the protocol": (400, more("Sec-WebSocket-Protocol: \xff")),
        "byte 255 in the extensions": (400, more("Sec-WebSocket-Extensions: \xff")),
        "byte 255 in Origin": (400, more("Origin: \xff")),
        "a key of zz": (400, ask(*UPGRADE, keys + "zz")),
        "a key of 15 bytes": (400, ask(*UPGRADE, keys + "MTIzNDU2Nzg5MDEyMzQ1")),
        "a key of 17 bytes": (400, ask(*UPGRADE, keys + "MTIzNDU2Nzg5MDEyMzQ1Njc=")),
        "a key and loose bits": (400, ask(*UPGRADE, keys + "dGhlIHNhbXBsZSBub25jZR==")),
        "two keys": (400, more(KEY)),
        "no key": (400, ask(*UPGRADE)),
        "no Host": (400, request("GET", target, *whole)),
        "version 8": (426, ask(*UPGRADE[:2], KEY, "Sec-WebSocket-Version: 8")),
        "versions 13 and 8": (
            426, ask(*UPGRADE[:2], KEY, "Sec-WebSocket-Version: 13, 8")
        ),
        "version 13 twice": (426, more(UPGRADE[2])),
        "no version": (426, ask(*UPGRADE[:2], KEY)),
        "no Connection": (426, ask(UPGRADE[0], UPGRADE[2], KEY)),
        "HTTP/1.0": (426, ask().replace(b"HTTP/1.1", b"HTTP/1.0")),
        "POST": (405, ask().replace(b"GET", b"POST", 1)),
        "another path": (404, ask(to="/ws")),
        "a whole URL": (400, ask(to="http://chat.example" + target)),
        "two slashes": (400, ask(to="//evil.example" + target)),
        "a length": (400, more("Content-Length: 5")),
        "a length of 00": (400, more("Content-Length: 00")),
        "chunks": (400, more(CHUNKED)),
        "two tokens": (400, ask(to=f"{target}&token={token}")),
        "no token": (401, ask(to="/ws/chat")),
        "an empty token": (401, ask(to="/ws/chat?token=")),
        "a token in Authorization": (
            401, ask(*whole, f"Authorization: Bearer {token}", to="/ws/chat")
        ),
        "two cursors": (400, ask(to=f"{target}&cursor=a&cursor=b")),
        "Origin: null": (403, more("Origin: null")),
        "another page": (403, more("Origin: https://evil.example")),
        "our name in front": (403, more("Origin: http://chat.example.evil.example")),
        "our name at the end": (403, more("Origin: http://evilchat.example")),
        "our name for a user": (403, more("Origin: http://chat.example@evil.example")),
        "our name and a path": (403, more("Origin: http://chat.example/x")),
        "our name, another port": (403, more("Origin: http://chat.example:81")),
        "our name, another scheme": (403, more("Origin: ws://chat.example")),
        "ours beside another": (
            403, more("Origin: http://chat.example", "Origin: http://evil.example")
        ),
    }  # fmt: skip


async def try_requests(house: House) -> None:
    """Send all the rows of the tables above."""
    user = house.user()
    token = house.chatd.token(user)
    chat = await make_chat(house.chatd, [user])
    bearer, post = f"Authorization: Bearer {token}", f"/api/v1/chats/{chat}/messages"
    tables = [
        ("a head", broken_heads(), True),
        ("a request", odd_requests(token, post), False),
        ("a body", bodies_at_odds(bearer, post), True),
        ("a handshake", broken_handshakes(token), True),
    ]
    for kind, rows, ends in tables:
        for name, (expected, data) in rows.items():
            async with house.attacked(f"{kind}: {name}"):
                await try_request(house.chatd.port, expected, data, ends=ends)
        await house.emptied(f"the attacks with {kind}")


# --- instead of frames ---------------------------------------------------------------


def raw_frame(first: int, payload: bytes = b"", *, masked: bool = True) -> bytes:
    """One short frame with its first byte as it is given."""
    if masked:
        return bytes((first, 0x80 | len(payload))) + bytes(4) + payload
    return bytes((first, len(payload))) + payload


def close(code: int, reason: bytes = b"") -> bytes:
    """A close frame, of whatever code."""
    return client_frame(CLOSE, code.to_bytes(2, "big") + reason)


def part(opcode: int, payload: bytes) -> bytes:
    """A fragment that is not the last."""
    return client_frame(opcode, payload, fin=False)


def broken_frames() -> dict[str, tuple[int, bytes]]:
    """What ends a connection, and the code of the close that it is told before."""
    ping = client_frame(PING, b"p")
    big = client_frame(TEXT, b"x" * 65_537)
    say = client_frame(TEXT, b'{"type":"ping"}')
    inside, empty = part(TEXT, b"{"), part(CONTINUATION, b"")
    rows = {
        "unmasked": (1002, raw_frame(0x81, b"{}", masked=False)),
        "an unmasked ping": (1002, raw_frame(0x89, masked=False)),
        "an unmasked close": (1002, raw_frame(0x88, masked=False)),
        "a ping in two": (1002, part(PING, b"p") + client_frame(CONTINUATION, b"p")),
        "a fragmented close": (1002, part(CLOSE, b"\x03\xe8")),
        "a ping of 126": (1002, client_frame(PING, b"x" * 126)),
        "a pong of 126": (1002, client_frame(PONG, b"x" * 126)),
        "a close of 126": (1002, close(1000, b"x" * 124)),
        "a ping of 2**63": (1002, b"\x89\xff\x80" + bytes(7)),
        "a continuation of nothing": (1002, client_frame(CONTINUATION, b"x")),
        "a continuation after a message": (1002, say + client_frame(CONTINUATION, b"")),
        "a message in a message": (1002, inside + say),
        "a binary one in a text": (1002, inside + client_frame(BINARY, b"x")),
        "a binary part in a text": (1002, inside + part(BINARY, b"x")),
        "a length of 2**63": (1002, b"\x81\xff\x80" + bytes(7)),
        "a length of 2**64 - 1": (1002, b"\x81\xff" + b"\xff" * 8),
        "5 in 2 bytes": (1002, b"\x81\xfe\0\x05\0\0\0\0hello"),
        "125 in 2 bytes": (1002, b"\x81\xfe\0\x7d\0\0\0\0"),
        "5 in 8 bytes": (1002, b"\x81\xff\0\0\0\0\0\0\0\x05\0\0\0\0hello"),
        "65,535 in 8 bytes": (1002, b"\x81\xff\0\0\0\0\0\0\xff\xff\0\0\0\0"),
        "a close of one byte": (1002, client_frame(CLOSE, b"\x03")),
        "a close with bad UTF-8": (1007, close(1000, b"\xff")),
        "a close with half a character": (1007, close(1000, b"\xf0\x9f")),
        "bad UTF-8": (1007, client_frame(TEXT, b'{"type":"\xff"}')),
        "overlong UTF-8": (1007, client_frame(TEXT, b"\xc0\x80")),
        "a surrogate": (1007, client_frame(TEXT, b"\xed\xa0\x80")),
        "past Unicode": (1007, client_frame(TEXT, b"\xf4\x90\x80\x80")),
        "half a character": (1007, client_frame(TEXT, b'"\xf0\x9f\x98')),
        "half a character in two": (
            1007, part(TEXT, b'"\xf0\x9f') + client_frame(CONTINUATION, b"\x98")
        ),
        "bad UTF-8 between parts": (
            1007, part(TEXT, b'"\xf0\x9f') + part(CONTINUATION, b'"')
        ),
        "bad UTF-8 in no last part": (1007, inside + part(CONTINUATION, b"\xff")),
        "65,537 bytes": (1009, big),
        "65,537 bytes and a ping": (1009, big + ping),
        "65,537 bytes and a close": (1009, big + close(1000)),
        "65,537 bytes twice": (1009, big * 2),
        "65,537 bytes in parts": (
            1009, inside + part(CONTINUATION, b"x" * 32_768) * 2
        ),
        "65,537 bytes, 16,385 characters": (
            1009, client_frame(TEXT, "\U0001f600".encode() * 16_384 + b"x")
        ),
        "65,537 binary bytes": (1009, client_frame(BINARY, bytes(65_537))),
        "a length of 2**40": (1009, b"\x81\xff\0\0\1" + bytes(70_000)),
        "a length of 2**63 - 1": (1009, b"\x81\xff\x7f" + b"\xff" * 7 + bytes(70_000)),
        "65 parts": (1009, inside + empty * 64),
        "100,000 empty parts": (1009, inside + empty * 100_000),
        "a close and all else": (1000, close(1000) + say + big + ping + close(1001)),
        "a close in a message": (1000, inside + close(1000)),
        "a close without a code": (1005, client_frame(CLOSE, b"")),
        "a close and unmasked bytes": (1000, close(1000) + bytes(999)),
        "an HTTP request": (1002, HEALTH),
        "a TLS hello": (1002, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"),
        "line ends": (1002, b"\r\n\r\n\r\n"),
    }  # fmt: skip
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        rows[f"opcode {opcode}"] = (1002, raw_frame(0x80 | opcode))
        rows[f"a part of opcode {opcode}"] = (1002, raw_frame(opcode))
    for bits in (0x10, 0x20, 0x40, 0x70):
        for opcode in (TEXT, BINARY, CLOSE, PING, PONG):
            name = f"reserved bits {bits:02x} with opcode {opcode}"
            rows[name] = (1002, raw_frame(0x80 | bits | opcode))
        name = f"reserved bits {bits:02x} in a continuation"
        rows[name] = (1002, inside + raw_frame(0x80 | bits, b"}"))
    for code in (
        0,
        1,
        999,
        1004,
        1005,
        1006,
        1015,
        1016,
        1999,
        2000,
        2999,
        5000,
        65535,
    ):
        rows[f"a close with code {code}"] = (1002, close(code))
    for code in (1001, 1003, 1007, 1012, 1013, 3000, 3999, 4000, 4401, 4999):
        rows[f"a good close with code {code}"] = (code, close(code, b"x" * 123))
    return rows


def odd_frames() -> dict[str, tuple[str, bytes]]:
    """What is odd and right: the type of its answer, and the connection goes on."""
    whole = b'{"type":"ping","ref":"\xf0\x9f\x98\x80"}'
    head, tail = part(TEXT, whole[:24]), client_frame(CONTINUATION, whole[24:])
    parts = [part(TEXT, b"")] + [part(CONTINUATION, b" ")] * 62
    return {
        "a character in two parts": ("pong", head + tail),
        "pings in a message": (
            "pong",
            head + client_frame(PING, b"x" * 125) * 3 + tail,
        ),
        "a pong in a message": ("pong", head + client_frame(PONG, b"") + tail),
        "a pong that nobody asked for": (
            "pong",
            client_frame(PONG, b"p") + head + tail,
        ),
        "64 parts": ("pong", b"".join(parts) + client_frame(CONTINUATION, whole)),
        "an empty text": ("error", client_frame(TEXT, b"")),
        "an empty binary": ("error", client_frame(BINARY, b"")),
        "a binary ping": ("error", client_frame(BINARY, whole)),
        "65,536 bytes": ("pong", client_frame(TEXT, whole.ljust(65_536))),
        "65,536 binary bytes": ("error", client_frame(BINARY, bytes(65_536))),
    }


async def open_wire(house: House) -> WebSocket:
    """Open a socket of a new user, past its greeting."""
    token = house.chatd.token(house.user())
    wire = await WebSocket.open(house.chatd.port, f"/ws/chat?token={token}")
    assert json.loads(await wire.receive_message())["type"] == "connected"
    return wire


async def send_frames(wire: WebSocket, data: bytes) -> None:
    """Send what the other side takes; to close meanwhile is its right."""
    with contextlib.suppress(trio.BrokenResourceError):
        await wire.send(data)


async def close_code(wire: WebSocket) -> int:
    """The code of the close that must come, with nothing behind it but the end."""
    try:
        while True:
            opcode, payload = await wire.receive_frame()
            if opcode == CLOSE:
                code = int.from_bytes(payload[:2], "big") if payload else 1005
                break
    except Closed:
        return 1006
    with contextlib.suppress(Closed):
        frame = await wire.receive_frame()
        raise AssertionError(f"behind the close came {frame}")
    assert not wire.buffer, f"behind the close came {wire.buffer[:80]!r}"
    return code


async def try_frames(house: House) -> None:
    """Send the rows of the tables of frames: whole, and the short ones byte by byte."""
    for name, (code, data) in broken_frames().items():
        slowly = [in_bytes(data)] if len(data) < 300 else []
        for form in (data, *slowly):
            async with house.attacked(f"frames: {name}"):
                wire = await open_wire(house)
                for piece in form.split(CUT):
                    await send_frames(wire, piece)
                with trio.fail_after(SECONDS):
                    got = await close_code(wire)
                wire.cut()
                assert got == code, f"closed with {got}, not {code}"
    await house.emptied("the attacks with frames")
    for name, (kind, data) in odd_frames().items():
        async with house.attacked(f"frames: {name}"):
            wire = await open_wire(house)
            for piece in (in_bytes(data) if len(data) < 300 else data).split(CUT):
                await wire.send(piece)
            with trio.fail_after(SECONDS):
                answer = json.loads(await wire.receive_message())
                assert answer["type"] == kind, f"answered {answer}, not {kind}"
                await wire.send(client_frame(TEXT, b'{"type":"ping"}'))
                assert json.loads(await wire.receive_message())["type"] == "pong"
            wire.cut()
    await house.emptied("odd frames")


# --- instead of a command, and of a body ---------------------------------------------

BIG = "9" * 5000
DEEP = "[" * 30_000
# No JSON, or no object, or JSON that says more than one thing.
NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "a space": b" ",
    "a word": b"hello",
    "null": b"null",
    "a number": b"1",
    "a text": b'"ping"',
    "a list": b'[{"type":"ping"}]',
    "half an object": b'{"type":"ping"',
    "an object and more": b'{"type":"ping"}{"type":"ping"}',
    "a comma too many": b'{"type":"ping",}',
    "a comment": b'{"type":"ping"/**/}',
    "single quotes": b"{'type':'ping'}",
    "a byte order mark": b'\xef\xbb\xbf{"type":"ping"}',
    "30,000 brackets": DEEP.encode(),
    "30,000 objects": b'{"a":' * 12_000,
    "depth in a field that nobody reads": b'{"type":"ping","x":' + DEEP.encode() + b"}",
    "closed depth": b'{"type":"ping","x":%s%s}' % (b"[" * 30_000, b"]" * 30_000),
    "NaN": b'{"type":"ping","x":NaN}',
    "Infinity": b'{"type":"ping","x":Infinity}',
    "-Infinity": b'{"type":"ping","x":-Infinity}',
    "a leading zero": b'{"type":"ping","x":01}',
    "a plus": b'{"type":"ping","x":+1}',
    "a hexadecimal": b'{"type":"ping","x":0x1}',
    "a lone surrogate": b'{"type":"ping","ref":"\\ud800"}',
    "surrogates the wrong way round": b'{"type":"ping","ref":"\\ude00\\ud83d"}',
    "a bad escape": b'{"type":"ping","ref":"\\x41"}',
    "a raw line end in a text": b'{"type":"ping","ref":"a\nb"}',
    "a raw NUL in a text": b'{"type":"ping","ref":"a\0b"}',
    "an object in UTF-16": '{"type":"ping"}'.encode("utf-16-le"),
}
# What no id may be, in JSON.
NO_IDS = {
    **{name: name for name in ("0", "-1", "-0", "1.5", "1e400", "true", "null", "[]")},
    "a text": '"1"',
    "2**53": str(2**53),
    "2**63": str(2**63),
    "2**64": str(2**64),
    "5,000 digits": BIG,
    "an object": "{}",
}
NO_CONTENTS = {
    "no text": "1",
    "null": "null",
    "a list": '["a"]',
    "nothing": '""',
    "spaces": '" \\t\\n\\u00a0\\u3000"',
    "4,001 characters": json.dumps("x" * 4001),
    "NUL": '"a\\u0000b"',
    "ESC": '"a\\u001b[2J"',
    "DEL": '"a\\u007f"',
    "a backspace": '"a\\b"',
}
NO_KEYS = {
    "no text": "1",
    "nothing": '""',
    "65 characters": json.dumps("k" * 65),
    "an accent": '"\\u00e9"',
    "a line end": '"a\\nb"',
    "a trailing line end": '"a\\n"',
}


def broken_commands(chat: int) -> Iterator[tuple[str, bytes, str]]:
    """What is said instead of a command: its name, it, and the error's code."""

    def row(name: str, text_: str, code: str) -> tuple[str, bytes, str]:
        return name, text_.encode(), code

    for name, data in NOT_JSON.items():
        yield name, data, "bad_json"
    yield row("no type", "{}", "bad_field")
    yield row("a type of nobody", '{"type":"hack"}', "unknown_type")
    yield row("PING", '{"type":"PING"}', "unknown_type")
    yield row("an event for a command", '{"type":"new_message"}', "unknown_type")
    yield row("a type of 1", '{"type":1}', "bad_field")
    yield row("a type of null", '{"type":null}', "bad_field")
    yield row("a type of 60 KB", '{"type":"%s"}' % ("x" * 60_000), "unknown_type")
    yield row("a ref of 1", '{"type":"ping","ref":1}', "bad_field")
    yield row("a ref of 65", '{"type":"ping","ref":"%s"}' % ("r" * 65), "bad_field")
    for name, value in NO_IDS.items():
        for kind, field, rest in (
            ("mark_read", "message_id", ""),
            ("typing", "chat_id", ',"is_typing":true'),
            ("send_message", "chat_id", ',"content":"x"'),
        ):
            said = f'{{"type":"{kind}","{field}":{value}{rest}}}'
            yield row(f"{kind} with {field} {name}", said, "bad_field")
    for value in ("1", "0", '"true"', "null"):
        said = f'{{"type":"typing","chat_id":{chat},"is_typing":{value}}}'
        yield row(f"is_typing {value}", said, "bad_field")
    send = f'{{"type":"send_message","chat_id":{chat}'
    for name, value in NO_CONTENTS.items():
        yield row(f"a content of {name}", f'{send},"content":{value}}}', "bad_field")
    for name, value in NO_KEYS.items():
        said = f'{send},"content":"x","client_id":{value}}}'
        yield row(f"a client_id of {name}", said, "bad_field")
    # Names that stand twice: the last one counts, and it is checked.
    said = f'{{"type":"send_message","chat_id":1,"chat_id":{2**50},"content":"x"}}'
    yield row("two chats", said, "not_found")
    yield row("two types", '{"type":"ping","type":"hack"}', "unknown_type")
    yield row("a chat of others", '{"type":"send_message","chat_id":1,"content":"x"}',
              "not_found")  # fmt: skip
    yield row("typing elsewhere", '{"type":"typing","chat_id":1,"is_typing":true}',
              "not_found")  # fmt: skip
    yield row("reading elsewhere", '{"type":"mark_read","message_id":1}', "not_found")


async def try_commands(house: House) -> None:
    """Say all the rows on one connection, which stays; the answer has the code."""
    user = house.user()
    chat = await make_chat(house.chatd, [user])
    async with Client(house.chatd, user) as peer:
        assert peer.websocket is not None
        for name, data, code in broken_commands(chat):
            async with house.attacked(f"a command: {name}"):
                await peer.websocket.send(client_frame(TEXT, data))
                answer = await peer.receive(seconds=SECONDS)
                assert answer["type"] == "error", f"answered {answer}"
                assert answer["code"] == code, f"answered {answer}, not {code}"
                assert answer["message"], "an error without a sentence"
                assert (await peer.ask("ping", SECONDS))["type"] == "pong"
        for said in (
            '{"type":"ping","x":1e308,"y":{"type":"hack"},"z":"\\u0000"}',
            '{"ref":"a","type":"ping","ref":"b"}',
            ' \n\t{"type":"ping"}\r\n',
        ):
            async with house.attacked(f"a command: {said}"):
                await peer.websocket.send(client_frame(TEXT, said.encode()))
                assert (await peer.receive(seconds=SECONDS))["type"] == "pong"
    await house.emptied("broken commands")


def broken_bodies(chat: int) -> Iterator[tuple[str, str, bytes, int]]:
    """What is sent instead of a body: its name, the path, it, and the status."""
    chats, post = "/api/v1/chats", f"/api/v1/chats/{chat}/messages"
    add = f"/api/v1/chats/{chat}/members"
    for name, data in NOT_JSON.items():
        for path in (chats, post, add):
            yield f"{path} with {name}", path, data, 400
    for name, value in NO_IDS.items():
        yield f"member {name}", chats, b'{"member_ids":[%s]}' % value.encode(), 400
        yield f"user_id {name}", add, b'{"user_id":%s}' % value.encode(), 400
    for name, value in NO_CONTENTS.items():
        yield f"content {name}", post, b'{"content":%s}' % value.encode(), 400
    for name, value in NO_KEYS.items():
        body = b'{"content":"x","client_id":%s}' % value.encode()
        yield f"client_id {name}", post, body, 400
    many = json.dumps({"member_ids": list(range(1, 5003))}).encode()
    yield "5,002 members", chats, many, 400
    for title in ('""', '" "', '"a\\nb"', '"\\u0000"', "1", json.dumps("t" * 201)):
        yield f"title {title[:9]}", chats, b'{"title":%s}' % title.encode(), 400
    yield "members for a text", chats, b'{"member_ids":"12"}', 400
    yield "members for a number", chats, b'{"member_ids":12}', 400
    yield "another's name", post, b'{"content":"x","sender_id":1}', 403
    yield "a chat of others", "/api/v1/chats/1/messages", b'{"content":"x"}', 404
    yield "joining others", "/api/v1/chats/1/members", b'{"user_id":99}', 404


async def try_bodies(house: House) -> None:
    """Send all the rows; each gets its status, and what they name stays as it was."""
    user = house.user()
    token, chat = house.chatd.token(user), await make_chat(house.chatd, [user])
    before = (await http(house.chatd, "GET", "/api/v1/chats", token)).json["chats"]
    async with Raw.open(house.chatd.port) as raw:
        for name, path, body, status in broken_bodies(chat):
            async with house.attacked(f"a body: {name}"):
                lines = (HOST, f"Authorization: Bearer {token}")
                length = f"Content-Length: {len(body)}"
                await raw.send(request("POST", path, *lines, length, body=body))
                replies: list[Reply] = []
                with trio.fail_after(SECONDS):
                    while not replies and await raw.read():
                        raw.data = take_answers(raw.data, replies)
                got = [reply.status for reply in replies]
                assert got == [status], f"answered {replies}, not {status}"
    after = (await http(house.chatd, "GET", "/api/v1/chats", token)).json["chats"]
    assert after == before, f"what was refused has changed the chats: {after}"
    await house.emptied("broken bodies")


# --- instead of a token --------------------------------------------------------------


class Keys:
    """The keys of a site's backend: the files are what chatd gets of them."""

    def __init__(self, folder: Path) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.shared = b"a secret that chatd shares with the shop's backend"
        self.files = []
        for name, key in (("rsa", self.rsa), ("ec", self.ec), ("ed", self.ed)):
            path = folder / f"{name}.pem"
            path.write_bytes(pem(key.public_key()))
            self.files.append(path)
        (folder / "shared").write_bytes(self.shared)
        self.files.append(folder / "shared")


PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def pem(key: PublicKey) -> bytes:
    """A public key as everybody may have it."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def base64url(data: bytes) -> str:
    """Base64 as tokens have it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(
    header: Any, body: Any, secret: str | bytes, digest: Any = hashlib.sha256
) -> str:
    """Sign whatever is given: no library would."""
    halves = [
        base64url(half if isinstance(half, bytes) else json.dumps(half).encode())
        for half in (header, body)
    ]
    signed = ".".join(halves)
    key = secret.encode() if isinstance(secret, str) else secret
    return f"{signed}.{base64url(hmac.new(key, signed.encode(), digest).digest())}"


NO_EXPS: list[Any] = [None, "x", "", [], {}, math.nan, math.inf, -math.inf]
NO_IATS: list[Any] = ["x", True, [], math.nan, -math.inf]
NO_USERS: list[Any] = [
    None, True, 0, -1, 1.0, "7", "", [1], {}, 2**53, 2**64, -(2**63), math.nan
]  # fmt: skip
NO_SUBS: list[Any] = [
    None, True, 0, "0", "-1", " 7", "7 ", "७", "1e3", "9" * 21, "7\n", "x", [7], 1.5
]  # fmt: skip


def bad_tokens(house: House, keys: Keys) -> dict[str, tuple[str, str]]:
    """What is shown instead of a token, and the error's code."""
    secret, user, now = house.chatd.secret, house.user(), int(time.time())
    hs256 = {"alg": "HS256", "typ": "JWT"}
    claims = {"user_id": user, "iat": now, "exp": now + 600}
    good = by_hand(hs256, claims, secret)
    head, middle, signature = good.split(".")

    def alg(name: Any, key: str | bytes = secret, **header: Any) -> str:
        return by_hand({"alg": name, "typ": "JWT"} | header, claims, key)

    def said(**changed: Any) -> str:
        body = {n: v for n, v in (claims | changed).items() if v != "absent"}
        return by_hand(hs256, body, secret)

    rows = {
        "nothing but dots": "..",
        "one part": head,
        "two parts": f"{head}.{middle}",
        "four parts": f"{good}.x",
        "five parts, as JWE": f"{head}.x.y.z.w",
        "4,097 bytes": "x" * 4097,
        "4 KB of dots": "." * 4000,
        "a space in it": f"{head}. {middle}.{signature}",
        "an accent": f"{head}.{middle}.é",
        "no signature": f"{head}.{middle}.",
        "a signature of one byte": f"{head}.{middle}.AA",
        "half a signature": good[:-20],
        "another body under the signature": (
            f"{head}.{base64url(json.dumps(claims | {'user_id': 1}).encode())}"
            f".{signature}"
        ),
        "another's secret": by_hand(hs256, claims, "x" * 48),
        "an empty secret": by_hand(hs256, claims, ""),
        "a secret of NULs": by_hand(hs256, claims, bytes(48)),
        "a secret with its line end": by_hand(hs256, claims, secret + "\n"),
        **{
            f"alg {name}": f"{base64url(json.dumps({'alg': name}).encode())}.{middle}."
            for name in ("none", "None", "NONE", "nOnE", "", None, 1, ["HS256"])
        },
        "alg none, signed": alg("none"),
        "no alg": by_hand({"typ": "JWT"}, claims, secret),
        "HS384": by_hand({"alg": "HS384"}, claims, secret, hashlib.sha384),
        "HS512": by_hand({"alg": "HS512"}, claims, secret, hashlib.sha512),
        "hs256": alg("hs256"),
        "RS256 for our secret": alg("RS256"),
        "EdDSA for our secret": alg("EdDSA"),
        "the RSA key as a secret": alg("HS256", pem(keys.rsa.public_key())),
        "the RSA key, stripped": alg("HS256", pem(keys.rsa.public_key()).strip()),
        "the EC key as a secret": alg("HS256", pem(keys.ec.public_key())),
        "the Ed25519 key as a secret": alg("HS256", pem(keys.ed.public_key())),
        "PS256 with the RSA key": jwt.encode(claims, keys.rsa, "PS256"),
        "RS512 with the RSA key": jwt.encode(claims, keys.rsa, "RS512"),
        "another's RSA key": jwt.encode(
            claims, rsa.generate_private_key(public_exponent=65537, key_size=2048),
            "RS256", headers={"jwk": {"kty": "RSA"}, "jku": "http://127.0.0.1:1/"},
        ),
        "another's EC key": jwt.encode(
            claims, ec.generate_private_key(ec.SECP256R1()), "ES256"
        ),
        "ES256 of zeros": (
            base64url(b'{"alg":"ES256"}') + f".{middle}.{base64url(bytes(64))}"
        ),
        "crit": alg("HS256", crit=["exp"], exp=1),
        "crit of b64": alg("HS256", crit=["b64"], b64=False),
        "crit that is empty": alg("HS256", crit=[]),
        "crit for a text": alg("HS256", crit="exp"),
        "a kid that is a number": alg("HS256", kid=7),
        "a header that is a list": by_hand([], claims, secret),
        "a header that is no JSON": by_hand(b"{", claims, secret),
        "a header that is deep": by_hand(b"[" * 2000, claims, secret),
        "a body that is a list": by_hand(hs256, [claims], secret),
        "a body that is null": by_hand(hs256, None, secret),
        "a body that is no JSON": by_hand(hs256, b"{", secret),
        "a body that is deep": by_hand(hs256, b'{"a":' * 400, secret),
        "no exp": said(exp="absent"),
        **{
            f"exp {value!r}": said(exp=value)
            for value in NO_EXPS
        },
        "exp a text of digits": said(exp=str(now + 600)),
        "exp 1e300": said(exp=1e300),
        "exp 10**400": by_hand(
            hs256, b'{"user_id":%d,"exp":1%s}' % (user, b"0" * 400), secret
        ),
        "exp 5,000 digits": by_hand(
            hs256, b'{"user_id":%d,"exp":%s}' % (user, b"9" * 2900), secret
        ),
        "iat in an hour": said(iat=now + 3600),
        **{f"iat {value!r}": said(iat=value) for value in NO_IATS},
        "nbf in an hour": said(nbf=now + 3600),
        "nbf a text": said(nbf="x"),
        **{
            f"user_id {value!r}": said(user_id=value)
            for value in NO_USERS
        },
        "no user": said(user_id="absent"),
        **{
            f"sub {value!r}": said(user_id="absent", sub=value)
            for value in NO_SUBS
        },
        "a use of nobody": said(use="hack"),
        "a use of 1": said(use=1),
    }  # fmt: skip
    table = {name: (token, "token_invalid") for name, token in rows.items()}
    for name, exp in {"6 s ago": now - 6, "0": 0, "1.5": 1.5, "true": True}.items():
        table[f"exp {name}"] = (said(exp=exp), "token_expired")
    return table


def good_tokens(house: House, keys: Keys) -> dict[str, str]:
    """Tokens that look like an attack and are right."""
    now, user = int(time.time()), house.user()
    claims = {"user_id": user, "exp": now + 600}
    sub = {"sub": str(user), "exp": now + 600}
    odd = {"kid": "../../etc/passwd", "jku": "http://127.0.0.1:1/", "x5u": "x"}
    return {
        "RS256": jwt.encode(claims, keys.rsa, "RS256"),
        "ES256": jwt.encode(claims, keys.ec, "ES256"),
        "EdDSA": jwt.encode(claims, keys.ed, "EdDSA"),
        "the shared secret": jwt.encode(claims, keys.shared, "HS256"),
        "sub for a text": jwt.encode(sub, keys.shared, "HS256"),
        "an aud": jwt.encode(claims | {"aud": "other"}, keys.shared, "HS256"),
        "odd headers": jwt.encode(claims, keys.shared, "HS256", headers=odd),
        "3 s over": jwt.encode(claims | {"exp": now - 3}, keys.shared, "HS256"),
    }


async def socket_code(chatd: Chatd, token: str) -> str:
    """Try to open a socket; the code of the refusal, empty if it opens."""
    try:
        wire = await WebSocket.open(chatd.port, f"/ws/chat?token={quote(token)}")
    except Refused as no:
        return str(json.loads(no.body)["error"]["code"])
    wire.cut()
    return ""


async def bearer_code(
    chatd: Chatd, token: str, method: str = "GET", path: str = "/api/v1/me"
) -> str:
    """Ask with a token; the code of the refusal, empty if it is taken."""
    data = request(method, path, HOST, f"Authorization: Bearer {token}")
    async with Raw.open(chatd.port) as raw:
        await raw.send(data)
        replies: list[Reply] = []
        with trio.fail_after(SECONDS):
            while not replies and await raw.read():
                raw.data = take_answers(raw.data, replies)
    return code_of(replies[0]) if replies[0].status >= 400 else ""


async def try_tokens(house: House, keys: Keys) -> None:
    """Show each token at a request, at a socket's door, and in an `auth`."""
    chatd = house.chatd
    async with Client(chatd, house.user()) as peer:
        for name, (token, code) in bad_tokens(house, keys).items():
            async with house.attacked(f"a token: {name}"):
                ascii_only = token if token.isascii() else "x"
                got = await bearer_code(chatd, ascii_only)
                assert got in (code, "token_invalid"), f"a request: {got!r}"
                got = await socket_code(chatd, token)
                assert got == code, f"a socket: {got!r}, not {code}"
                answer = await peer.ask("auth", SECONDS, token=token)
                assert answer.get("code") == code, f"auth: {answer}"
                assert (await peer.ask("ping", SECONDS))["type"] == "pong"
    for name, token in good_tokens(house, keys).items():
        async with house.attacked(f"a good token: {name}"):
            assert not await bearer_code(chatd, token), "a request"
            assert not await socket_code(chatd, token), "a socket"
    await house.emptied("bad tokens")


async def try_tickets(house: House) -> None:
    """Tickets, sign-in tokens and scopes where they do not belong."""
    chatd, user, now = house.chatd, house.user(), int(time.time())
    token = chatd.token(user)

    async def ticket() -> str:
        got = await http(chatd, "GET", "/api/v2/ws-token", token)
        return str(got.json["token"])

    async with house.attacked("a ticket in Authorization"):
        assert await bearer_code(chatd, await ticket()) == "token_invalid"
    async with house.attacked("a ticket for a ticket"):
        path = "/api/v2/ws-token"
        assert await bearer_code(chatd, await ticket(), path=path) == "token_invalid"
    async with house.attacked("a ticket twice"):
        one = await ticket()
        assert not await socket_code(chatd, one)
        assert await socket_code(chatd, one) == "token_used"
        # Another spelling of the same signature is the same ticket.
        assert await socket_code(chatd, f"{one}=") in ("token_used", "token_invalid")
    async with house.attacked("ten who race with a ticket"):
        one, codes = await ticket(), list[str]()

        async def race() -> None:
            codes.append(await socket_code(chatd, one))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(race)
        assert sorted(codes) == ["", *["token_used"] * 9], f"{codes}"
    async with house.attacked("a ticket as auth"), Client(chatd, user) as peer:
        one = await ticket()
        assert (await peer.ask("auth", token=one))["type"] == "ack"
        again = await peer.ask("auth", token=one)
        assert again["code"] == "token_used", f"{again}"
    async with house.attacked("a ticket that was spent on a refusal is not spent"):
        one = await ticket()
        port, target = chatd.port, f"/ws/chat?token={one}"
        await try_request(port, 400, get(target, *UPGRADE), ends=True)
        assert not await socket_code(chatd, one)
    foreign: dict[str, Any] = {"use": "ticket", "jti": "x", "until": now + 60}
    for boot in ("x", "", None, 7, ["x"]):
        async with house.attacked(f"a ticket of boot {boot!r}"):
            other = chatd.token(user, **foreign, boot=boot)
            got = await socket_code(chatd, other)
            assert got in ("token_used", "token_invalid"), got
            assert await bearer_code(chatd, other) == "token_invalid"
    signin = chatd.token(user, use="signin")
    async with house.attacked("a sign-in token elsewhere"):
        assert await bearer_code(chatd, signin) == "token_invalid"
        assert await socket_code(chatd, signin) == "token_invalid"
        path = "/api/v1/session"
        assert not await bearer_code(chatd, signin, "POST", path)
    for name, other in (("a ticket", await ticket()), ("a plain token", token)):
        async with house.attacked(f"a session for {name}"):
            got = await bearer_code(chatd, other, "POST", "/api/v1/session")
            assert got == "token_invalid", got
    for scope in ("", "Service Stats", "service,stats", "xservice", ["service"], 1):
        async with house.attacked(f"a scope of {scope!r}"):
            odd = chatd.token(user, scope=scope)
            assert await bearer_code(chatd, odd, path="/metrics") == "forbidden"
    await house.emptied("tickets")


async def try_foreign(house: House, keys: Keys) -> None:
    """What the keys of a backend cannot say: scopes, and chatd's own uses."""
    user, now = house.user(), int(time.time())
    claims = {"user_id": user, "exp": now + 600, "scope": "service stats"}
    for name, key, algorithm in (
        ("RSA", keys.rsa, "RS256"),
        ("shared", keys.shared, "HS256"),
    ):
        async with house.attacked(f"scopes of the {name} key"):
            token = jwt.encode(claims, key, algorithm)
            assert await bearer_code(house.chatd, token, path="/metrics") == "forbidden"
        async with house.attacked(f"a sign-in token of the {name} key"):
            token = jwt.encode(claims | {"use": "signin"}, key, algorithm)
            got = await bearer_code(house.chatd, token, "POST", "/api/v1/session")
            assert got == "token_invalid", got


STRICT = ("--issuer=shop", "--audience=chat")


async def try_strict(chatd: Chatd, keys: Keys) -> None:
    """With --issuer and --audience, a backend's token must have them."""
    claims = {"user_id": 7, "exp": int(time.time()) + 600}
    right = {"iss": "shop", "aud": "chat"}
    wrong: list[dict[str, Any]] = [
        {}, {"iss": "shop"}, {"aud": "chat"}, right | {"iss": "sho"},
        right | {"iss": "shopx"}, right | {"iss": ["shop"]}, right | {"aud": "cha"},
        right | {"aud": ["x"]}, right | {"aud": []}, right | {"aud": {"chat": 1}},
        right | {"iss": None}, right | {"aud": None}, right | {"iss": 7},
    ]  # fmt: skip
    for change in wrong:
        token = by_hand({"alg": "HS256"}, claims | change, keys.shared)
        got = await bearer_code(chatd, token)
        assert got == "token_invalid", f"{change} was answered {got!r}"
    for change in (right, right | {"aud": ["x", "chat"]}):
        token = by_hand({"alg": "HS256"}, claims | change, keys.shared)
        assert not await bearer_code(chatd, token), f"{change} was refused"


# --- more than bytes -----------------------------------------------------------------


async def hang_up_everywhere(house: House) -> None:
    """A request, a handshake and a frame, cut after every few bytes, by FIN and RST."""
    token = house.chatd.token(house.user())
    whole = get(f"/ws/chat?token={token}", *UPGRADE, KEY)
    whole += client_frame(TEXT, b'{"type":"ping"}') + client_frame(CLOSE, b"")
    places = range(0, len(whole) + 1, 7)
    for place in (*places, len(whole)):
        for how in (hang_up, lambda stream: stream.socket.close()):
            async with Raw.open(house.chatd.port) as raw:
                await raw.send(whole[:place])
                how(raw.stream)


async def leave_at_once(house: House) -> None:
    """200 that connect and close; 200 that open a socket and reset."""
    for _ in range(200):
        async with Raw.open(house.chatd.port):
            pass
    for _ in range(200):
        wire = await open_wire(house)
        hang_up(wire.stream)


async def be_refused_and_stay(house: House) -> None:
    """Who was refused, or closed, and keeps his end open does not keep the server's."""
    chatd = house.chatd
    refused = get("/ws/chat?token=x", *UPGRADE, KEY)
    big = client_frame(TEXT, b"x" * 65_537)
    async with contextlib.AsyncExitStack() as stay:
        for _ in range(100):
            for data in (refused, b"\xff\r\n\r\n"):
                raw = await stay.enter_async_context(Raw.open(chatd.port))
                await raw.send(data)
            wire = await open_wire(house)
            stay.callback(wire.cut)
            await send_frames(wire, big)
        await house.emptied("300 who were refused and stay")


async def kick_among_pings(house: House) -> None:
    """60 sockets with 40 pings a second each are revoked: all 60 see 4503."""
    users = [house.user() for _ in range(60)]
    codes: list[int] = []
    ready = trio.Event()
    waiting, pings = len(users), client_frame(PING, b"p") * 4

    async def pinger(user: int) -> None:
        nonlocal waiting
        async with Client(house.chatd, user) as peer:
            wire = peer.websocket
            assert wire is not None
            waiting -= 1
            if not waiting:
                ready.set()

            async def ping() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await wire.send(pings)
                        await trio.sleep(0.1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ping)
                codes.append(await close_code(wire))
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(pinger, user)
        await ready.wait()
        for user in users:
            path = "/api/v1/internal/chat/revoke"
            service = house.chatd.service_token()
            reply = await http(house.chatd, "POST", path, service, {"user_id": user})
            assert reply.json == {"user_id": user, "closed": 1}, f"{reply}"
    assert codes == [4503] * 60, f"{codes.count(4503)} of 60 saw 4503: {set(codes)}"


async def come_back_revoked(house: House) -> None:
    """All that was signed before the revocation is refused: ticket and `auth` too."""
    chatd, user = house.chatd, house.user()
    token, other = chatd.token(user), house.user()
    no_iat = chatd.token(user, iat=None)
    ticket = (await http(chatd, "GET", "/api/v2/ws-token", token)).json["token"]
    signin = chatd.token(user, use="signin")
    service = chatd.service_token()
    path = "/api/v1/internal/chat/revoke"
    reply = await http(chatd, "POST", path, service, {"user_id": user})
    assert reply.status == 200, f"{reply}"
    for name, old in (("token", token), ("a token without iat", no_iat)):
        assert await bearer_code(chatd, old) == "token_invalid", name
        assert await socket_code(chatd, old) == "token_invalid", name
    assert await socket_code(chatd, ticket) == "token_invalid", "a ticket"
    got = await bearer_code(chatd, signin, "POST", "/api/v1/session")
    assert got == "token_invalid", "a sign-in token"
    async with Client(chatd, other) as peer:
        assert (await peer.ask("auth", token=token))["code"] == "token_invalid"
    later = chatd.token(user, iat=int(time.time()) + 6)
    assert await bearer_code(chatd, later) in ("", "token_invalid")


async def speak_behind_a_close(house: House) -> None:
    """What comes behind a close, or behind what broke the protocol, is not obeyed."""
    chatd, user = house.chatd, house.user()
    chat = await make_chat(chatd, [user])
    say = json.dumps({"type": "send_message", "chat_id": chat, "content": text()})
    for before in (close(1000), raw_frame(0x83), client_frame(TEXT, b"x" * 65_537)):
        target = f"/ws/chat?token={chatd.token(user)}"
        wire = await WebSocket.open(chatd.port, target)
        await wire.receive_message()
        await send_frames(wire, before + client_frame(TEXT, say.encode()))
        await close_code(wire)
        wire.cut()
    reply = await http(
        chatd, "GET", f"/api/v1/chats/{chat}/messages", chatd.token(user)
    )
    assert reply.json["messages"] == [], "what came behind a close was obeyed"


async def speak_before_the_answer(house: House) -> None:
    """Frames right behind the handshake are heard, wherever the cut is."""
    token = house.chatd.token(house.user())
    whole = get(f"/ws/chat?token={token}", *UPGRADE, KEY)
    say = client_frame(TEXT, b'{"type":"ping"}')
    for cut in range(len(say) + 1):
        async with Raw.open(house.chatd.port) as raw:
            await raw.send(whole + say[:cut])
            await trio.lowlevel.checkpoint()
            await raw.send(say[cut:])
            with trio.fail_after(SECONDS):
                while b'"pong"' not in raw.data:
                    assert await raw.read(), f"cut at {cut} the frame was lost"


async def shake_hands_oddly(house: House) -> None:
    """What is odd in a handshake and allowed opens a socket that hears."""
    token = house.chatd.token(house.user())
    odd = (
        ("Upgrade: WebSocket", "Connection: keep-alive, UPGRADE", UPGRADE[2], KEY),
        ("Upgrade: h2c, websocket", *UPGRADE[1:], KEY),
        (*UPGRADE, KEY, "Content-Length: 0"),
        (*UPGRADE, KEY, "Connection: close"),
        (*UPGRADE, KEY, "Expect: 100-continue"),
        (*UPGRADE, KEY, "Origin: HTTP://CHAT.EXAMPLE:80"),
    )
    for lines in odd:
        async with Raw.open(house.chatd.port) as raw:
            say = client_frame(TEXT, b'{"type":"ping"}')
            await raw.send(get(f"/ws/chat?token={token}", *lines) + say)
            with trio.fail_after(SECONDS):
                while b'"pong"' not in raw.data:
                    assert await raw.read(), f"{lines} opened no socket"


async def offer_extensions(house: House) -> None:
    """Compression and subprotocols are offered in vain: 101 names neither."""
    token = house.chatd.token(house.user())
    offers = (
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Extensions: x-webkit-deflate-frame, " + "a;b=c, " * 200,
        "Sec-WebSocket-Protocol: chat, superchat",
    )
    for offer in offers:
        async with Raw.open(house.chatd.port) as raw:
            await raw.send(get(f"/ws/chat?token={token}", *UPGRADE, KEY, offer))
            with trio.fail_after(SECONDS):
                while b"\r\n\r\n" not in raw.data:
                    assert await raw.read(), "the handshake was refused"
            head = raw.data.partition(b"\r\n\r\n")[0].lower()
            assert b" 101 " in head, f"{head!r}"
            assert b"extensions" not in head, f"{head!r}"
            assert b"protocol:" not in head, f"{head!r}"


FEW_DESCRIPTORS = ("sh", "-c", 'ulimit -n 330; exec "$@"', "sh")


async def run_out_of_descriptors(chatd: Chatd) -> None:
    """More connections than descriptors: some are told 503, those within talk on."""
    house = House(chatd)
    await house.move_in()
    async with contextlib.AsyncExitStack() as stay:
        for _ in range(500):
            await stay.enter_async_context(Raw.open(chatd.port))
        for _ in range(20):
            await house.anna.ask("ping", SECONDS)
            await house.talk()
        most = chatd.descriptors()
    assert most <= 330, f"{most} descriptors"
    await house.emptied("500 connections with 330 descriptors", 15)
    lines = chatd.log.read_text(errors="replace").count("full ")
    assert lines <= 20, f"{lines} lines in the log about a full house"


DEEDS: Sequence[Callable[[House], Awaitable[None]]] = (
    hang_up_everywhere,
    leave_at_once,
    be_refused_and_stay,
    kick_among_pings,
    come_back_revoked,
    speak_behind_a_close,
    speak_before_the_answer,
    shake_hands_oddly,
    offer_extensions,
)


async def attack(chatd: Chatd, keys: Keys) -> House:
    """Try everything above against one server."""
    house = House(chatd)
    await house.move_in()
    await try_requests(house)
    await try_frames(house)
    await try_commands(house)
    await try_bodies(house)
    await try_tokens(house, keys)
    await try_tickets(house)
    await try_foreign(house, keys)
    for deed in DEEDS:
        async with house.attacked(deed.__name__):
            await deed(house)
        await house.emptied(deed.__name__)
    return house


def prove(full: bool) -> Figures:
    """Try every attack; in the full form three times over, on one server."""
    rounds = 3 if full else 1
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        keys = Keys(Path(folder))
        flags = [f"--jwt-key={path}" for path in keys.files]
        with Chatd(*flags, log_level="info") as chatd:
            houses = [run_trio(attack, chatd, keys) for _ in range(rounds)]
            grown = chatd.rss_bytes() - houses[0].rss
            peak = chatd.peak_rss_bytes()
            failed = [
                line
                for line in chatd.log.read_text().splitlines()
                if line.startswith(("ERROR", "Traceback"))
            ]
        assert not failed, f"the log has {len(failed)} errors: {failed[0]}"
        with Chatd(f"--jwt-key={keys.files[-1]}", *STRICT) as chatd:
            run_trio(try_strict, chatd, keys)
    with Chatd(before=FEW_DESCRIPTORS) as chatd:
        run_trio(run_out_of_descriptors, chatd)
    rows = sum(house.rows for house in houses)
    slowest = max(house.slowest for house in houses)
    assert grown < 64 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
    return Figures(
        CLAIM,
        f"{rows} attacks answered as promised; other clients waited "
        f"{slowest * 1000:.0f} ms at most; all descriptors came back; memory "
        f"+{grown / 2**20:.0f} MiB",
        {
            "attacks": rows,
            "slowest_ms": round(slowest * 1000, 1),
            "rss_growth_mib": round(grown / 2**20, 1),
            "peak_rss_mib": round(peak / 2**20, 1),
        },
    )
